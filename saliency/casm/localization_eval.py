"""Evaluate how well the masks of an extractor localize the objects in an image set."""

import itertools

import torch

from engine.data.annotation_files import BoxAnnotation
from engine.data.annotations import BoxAnnotations, find_boxes
from engine.data.class_names import map_labels
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.inference.classifier import Classifier, make_channel_constant, normalize
from engine.runtime.device import autocast
from engine.runtime.progress import Progress, progress_bar, use_progress_bar
from engine.runtime.text import format_count
from saliency.casm.boxes import binarize, find_rectangles
from saliency.casm.extractors import Extractor
from saliency.casm.metrics import (
    MaskStatistics,
    average_scores,
    compute_saliency_metric,
    crop_rectangles,
    map_box_to_crop,
    score_image,
)
from saliency.casm.results import ScoringConfig
from saliency.casm.training import count_iterations

ANNOTATED_DATASETS = ("shapes", "tiny-imagenet")  # datasets that come with boxes
EMPTY_SCORES = dict.fromkeys(("F1", "F1a", "LE", "OM", "precision", "recall"))


def evaluate_localization(
    extractor: Extractor,
    image_set: ImageSet,
    annotations: BoxAnnotations,
    config: ScoringConfig,
    *,
    device: torch.device,
    sm_classifier: Classifier | None = None,
    precision: torch.dtype | None = None,
) -> dict:
    """Return localization scores of the images with ground-truth boxes, and mask statistics of all images.

    sm_classifier: the classifier of the saliency metric (SM), which is left out without one. Scores are fractions,
    accuracy is in percent, and a value is None if there was nothing to average. Images of classes that the network does
    not know do not count for OM and accuracy, and unreadable files for nothing.
    """
    mean, std = ((0.0,) * 3, (1.0,) * 3) if config.not_normalize else (extractor.mean, extractor.std)
    loader = DeviceLoader(image_set, config.batch_size, device=device, mean=mean, std=std, workers=config.workers)
    label_map = map_labels(image_set.classes, extractor.classes, config.class_list, extractor.num_classes).to(device)
    if sm_classifier:
        sm_classes, sm_num_classes = sm_classifier.classes, sm_classifier.num_classes
        sm_label_map = map_labels(image_set.classes, sm_classes, config.class_list, sm_num_classes).to(device)
    statistics, scores, correct, known, metrics = MaskStatistics(), [], [], [], []
    iterations = count_iterations(len(loader), config.pot)
    with Progress(extractor.name, iterations, bar=use_progress_bar(False)) as progress:
        for step, batch in enumerate(itertools.islice(loader.epoch(), iterations)):
            labels = label_map[batch.labels]
            with autocast(device, precision):
                found = extractor.extract(batch.images, labels)
            masks, rectangles = found.masks.float(), found.rectangles
            if rectangles is None:
                rectangles = find_rectangles(binarize(masks, config.rule))
            statistics.add(masks)
            correct.append(found.correct.cpu())
            known.append((labels >= 0).cpu())
            truths = [annotations.per_image[index] for index in batch.index]
            scores += score_annotated(masks, rectangles, correct[-1], known[-1], truths, config.break_ratio)
            if sm_classifier:
                sm_labels = sm_label_map[batch.labels]
                metrics.append(score_crops(batch.images, rectangles, sm_labels, extractor, sm_classifier))
            shown = scores and ((step + 1) % config.print_freq == 0 or step + 1 == iterations)
            progress(step + 1, **({"LE": sum(row["LE"] for row in scores) / len(scores)} if shown else {}))
    loader.close()
    unreadable = loader.count_unreadable()
    correct, known = torch.cat(correct), torch.cat(known)
    rule = config.rule if found.rectangles is None else "its own"
    result = {"name": extractor.name, "path": extractor.path, "rule": rule, "images": len(correct)}
    result |= {"scored": len(scores), "unknown": int((~known).sum()), "unreadable": unreadable}
    result |= {"accuracy": mean_or_none(100 * correct[known]), **(average_scores(scores) if scores else EMPTY_SCORES)}
    if metrics:
        result |= {key: mean_or_none(torch.cat([one[key] for one in metrics])) for key in metrics[0]}
        result["judge"] = sm_classifier.name
    return result | statistics.means()


def mean_or_none(values: torch.Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None  # JSON has no NaN


def score_annotated(
    masks: torch.Tensor,
    rectangles: torch.Tensor,
    correct: torch.Tensor,
    known: torch.Tensor,
    truths: list[BoxAnnotation | None],
    break_ratio: bool,
) -> list[dict]:
    """Return score_image() of the images of a batch that have a ground-truth box.

    masks (B, H, W), rectangles (B, 4); correct, known (B,) bool: whether the classifier is right, and whether it knows
    the class. OM is None for images of an unknown class.
    """
    scores = []
    columns = (masks.cpu(), rectangles.tolist(), correct.tolist(), known.tolist(), truths)
    for mask, rectangle, is_correct, is_known, truth in zip(*columns, strict=True):
        if truth:
            size = (truth.width, truth.height, mask.shape[-1])
            boxes = [map_box_to_crop(box, *size, break_ratio) for box in truth.boxes]
            row = score_image(mask, rectangle, boxes, is_correct)
            scores.append(row if is_known else row | {"OM": None})
    return scores


@torch.no_grad()
def score_crops(
    images: torch.Tensor, rectangles: torch.Tensor, labels: torch.Tensor, extractor: Extractor, classifier: Classifier
) -> dict[str, torch.Tensor]:
    """Return the saliency metric of the images whose class the classifier knows.

    The classifier is given each rectangle alone, enlarged to the size of the image. labels (B,): -1 if unknown.
    """
    height, width = images.shape[-2:]
    mean, std = (make_channel_constant(tuple(values), images.device) for values in (extractor.mean, extractor.std))
    pixels = images * std + mean
    crops = crop_rectangles(normalize(pixels, classifier.mean, classifier.std), rectangles)
    probabilities = classifier.network(crops).float().softmax(1).gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    y1, y2, x1, x2 = rectangles.unbind(1)
    metric = compute_saliency_metric((y2 - y1) * (x2 - x1) / (height * width), probabilities)
    known = (labels >= 0).cpu()
    return {key: value.cpu()[known] for key, value in metric.items()}


def find_annotations(image_set: ImageSet, dataset: str, annotation_path: str | None) -> BoxAnnotations:
    """Return the ground-truth boxes of an image set, and print notes on them.

    Without a path, the images of a dataset that has no boxes of its own get none.
    """
    if annotation_path or dataset in ANNOTATED_DATASETS:
        annotations = find_boxes(image_set, dataset, annotation_path, progress=progress_bar)
    else:
        annotations = BoxAnnotations([None] * len(image_set), [], [])
        print("note: without --annotation-path only mask statistics are reported")
    for line in annotations.notes():
        print(f"note: {line}")
    return annotations


def list_notes(result: dict) -> list[str]:
    """Return notes on images that a result of evaluate_localization() leaves out."""
    reasons = {
        "unknown": "of classes that the network does not know; left out of OM and accuracy",
        "unreadable": "that cannot be read; left out",
    }
    return [f"{format_count(result[key], 'image')} {reason}" for key, reason in reasons.items() if result[key]]
