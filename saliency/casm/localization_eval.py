"""How well the masks of one extractor find the objects in an image set."""

import itertools

import torch

from engine.data.annotations import BoxAnnotation, BoxAnnotations, find_boxes
from engine.data.class_names import map_labels
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.inference.classifier import Classifier
from engine.runtime.device import autocast
from engine.runtime.progress import Progress, progress_bar, use_progress_bar
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

ANNOTATED_DATASETS = ("shapes", "tiny-imagenet")  # they come with boxes
EMPTY_SCORES = dict.fromkeys(("F1", "F1a", "LE", "OM", "precision", "recall"))


def score(
    extractor: Extractor,
    part: ImageSet,
    annotations: BoxAnnotations,
    config: ScoringConfig,
    *,
    device: torch.device,
    judge: Classifier | None = None,
    precision: torch.dtype | None = None,
) -> dict:
    """Localisation over the images that have a true box, mask statistics over all of them; with a judge, a classifier,
    also the saliency metric. Numbers are fractions; None where there was nothing to average. An image of a class that
    the network does not know is left out of OM and accuracy, one that replaces an unreadable file out of all scores.
    """
    mean, std = ((0.0,) * 3, (1.0,) * 3) if config.not_normalize else (extractor.mean, extractor.std)
    batches = DeviceLoader(part, config.batch_size, device=device, mean=mean, std=std, workers=config.workers)
    label_map = map_labels(part.classes, extractor.classes, config.class_list, extractor.num_classes).to(device)
    judge_map = judge and map_labels(part.classes, judge.classes, config.class_list, judge.num_classes).to(device)
    statistics, scores, correct, known, metrics = MaskStatistics(), [], [], [], []
    iterations = count_iterations(len(batches), config.pot)
    with Progress(extractor.name, iterations, bar=use_progress_bar(False)) as progress:
        for step, batch in enumerate(itertools.islice(batches.epoch(), iterations)):
            labels = label_map[batch.labels]
            with autocast(device, precision):
                found = extractor.extract(batch.images, labels)
            masks, rectangles = found.masks.float(), found.rectangles
            if rectangles is None:
                rectangles = find_rectangles(binarize(masks, config.rule))
            statistics.add(masks)
            correct.append(found.correct.cpu())
            known.append((labels >= 0).cpu())
            readable = batch.loaded_index.cpu() == batch.index  # otherwise another image was read in its place
            truths = [
                annotations.per_image[index] if ok else None for index, ok in zip(batch.index, readable, strict=True)
            ]
            scores += score_annotated(masks, rectangles, correct[-1], known[-1], truths, config.break_ratio)
            if judge:
                metrics.append(score_crops(batch.images, rectangles, judge_map[batch.labels], extractor, judge))
            shown = scores and ((step + 1) % config.print_freq == 0 or step + 1 == iterations)
            progress(step + 1, **({"LE": sum(row["LE"] for row in scores) / len(scores)} if shown else {}))
    batches.close()
    correct, known = torch.cat(correct), torch.cat(known)
    rule = config.rule if found.rectangles is None else "its own"
    result = {"name": extractor.name, "path": extractor.path, "rule": rule, "images": len(correct)}
    result |= {"scored": len(scores), "unknown": int((~known).sum()), "unreadable": batches.skipped}
    result |= {"accuracy": average(100 * correct[known]), **(average_scores(scores) if scores else EMPTY_SCORES)}
    if metrics:
        result |= {key: average(torch.cat([one[key] for one in metrics])) for key in metrics[0]}
        result["judge"] = judge.name
    return result | statistics.means()


def average(values: torch.Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None  # JSON has no NaN


def score_annotated(
    masks: torch.Tensor,
    rectangles: torch.Tensor,
    correct: torch.Tensor,
    known: torch.Tensor,
    truths: list[BoxAnnotation | None],
    break_ratio: bool,
) -> list[dict]:
    """score_image() of those images of a batch that have a true box, OM None where the network does not know the class.
    masks (B, H, W), rectangles (B, 4); correct, known (B,) bool: whether the classifier is right and knows the class.
    """
    scores = []
    columns = (masks.cpu(), rectangles.tolist(), correct.tolist(), known.tolist(), truths)
    for mask, rectangle, right, sure, truth in zip(*columns, strict=True):
        if truth:
            size = (truth.width, truth.height, mask.shape[-1])
            boxes = [map_box_to_crop(box, *size, break_ratio) for box in truth.boxes]
            row = score_image(mask, rectangle, boxes, right)
            scores.append(row if sure else row | {"OM": None})
    return scores


@torch.no_grad()
def score_crops(
    images: torch.Tensor, rectangles: torch.Tensor, labels: torch.Tensor, extractor: Extractor, judge: Classifier
) -> dict[str, torch.Tensor]:
    """The saliency metric of a batch, of the images whose class the judge knows: it sees each rectangle alone, enlarged
    to the size of the image.
    """
    height, width = images.shape[-2:]
    own, other = (
        torch.tensor([who.mean, who.std], device=images.device).view(2, 3, 1, 1) for who in (extractor, judge)
    )
    crops = crop_rectangles((images * own[1] + own[0] - other[0]) / other[1], rectangles)
    probabilities = judge.network(crops).float().softmax(1).gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    y1, y2, x1, x2 = rectangles.unbind(1)
    metric = compute_saliency_metric((y2 - y1) * (x2 - x1) / (height * width), probabilities)
    known = (labels >= 0).cpu()
    return {key: value.cpu()[known] for key, value in metric.items()}


def find_annotations(part: ImageSet, dataset: str, annotation_path: str | None) -> BoxAnnotations:
    """The true boxes of a part, none of any image where the data set has none and no path is given. Prints notes."""
    if annotation_path or dataset in ANNOTATED_DATASETS:
        annotations = find_boxes(part, dataset, annotation_path, progress=progress_bar)
    else:
        annotations = BoxAnnotations([None] * len(part), [], [])
        print("note: no --annotation-path, so there are only statistics of the masks")
    for line in annotations.notes():
        print(f"note: {line}")
    return annotations


def list_notes(result: dict) -> list[str]:
    """What the user should know of the images behind a result of score()."""
    reasons = {
        "unknown": "are of a class that the network does not know, and have no say in OM",
        "unreadable": "cannot be read, and are left out of the scores",
    }
    return [f"{result[key]} images {reason}" for key, reason in reasons.items() if result[key]]
