"""The scores of one extractor on the images of one part."""

import itertools

import torch

from engine.data.annotations import BoxAnnotations
from engine.data.class_names import map_labels
from engine.data.image_set import ImageSet
from engine.inference.classifier import Classifier
from engine.runtime.device import autocast
from engine.runtime.progress import Progress, use_progress_bar
from saliency.casm.boxes import binarize, rectangles
from saliency.casm.extractors import Extractor
from saliency.casm.metrics import MaskStatistics, crops, image_scores, map_box, saliency_metric, summarise
from saliency.casm.results import make_loader
from saliency.casm.training import count_iterations

EMPTY_RESULT = dict.fromkeys(("F1", "F1a", "LE", "precision", "recall"))


def score(
    extractor: Extractor,
    part: ImageSet,
    truths: BoxAnnotations,
    options: dict,
    device: torch.device,
    judge: Classifier | None = None,
    precision: torch.dtype | None = None,
) -> dict:
    """Localisation over the images that have a true box, mask statistics over all of them; with a judge also the
    saliency metric. Numbers are fractions; None where there was nothing to average. An image of a class that the
    network does not know has no say in OM and accuracy, one that stands for an unreadable file in none of the scores.
    """
    batches = make_loader(part, extractor, options, device)
    labels = map_labels(part.classes, extractor.classes, options["class_list"], extractor.count).to(device)
    of_judge = map_labels(part.classes, judge.classes, options["class_list"], judge.count).to(device) if judge else None
    statistics, rows, right, known, metrics = MaskStatistics(), [], [], [], []
    count = count_iterations(len(batches), options["pot"])
    with Progress(extractor.name, count, bar=use_progress_bar(False)) as shown:
        for step, batch in enumerate(itertools.islice(batches.epoch(), count)):
            own = labels[batch.labels]
            with autocast(device, precision):
                found = extractor.masks_of(batch.images, own)
            found.masks = found.masks.float()
            statistics.add(found.masks)
            boxes = found.rectangles
            if boxes is None:
                boxes = rectangles(binarize(found.masks, options["rule"]))
            right.append(found.correct.cpu())
            known.append((own >= 0).cpu())
            places = torch.where(batch.loaded_index.cpu() == batch.index, batch.index, -1).tolist()
            if judge:
                metrics.append(score_batch(batch.images, boxes, of_judge[batch.labels], extractor, judge))
            rows += compute_scores_of(found.masks.cpu(), boxes.tolist(), right[-1], known[-1], places, truths, options)
            told = (step + 1) % options["print_freq"] == 0 or step + 1 == count
            shown(step + 1, **({"LE": sum(row["LE"] for row in rows) / len(rows)} if rows and told else {}))
    batches.close()
    result = {"name": extractor.name, "path": extractor.path, "rule": options["rule"]}
    if found.rectangles is not None:
        result["rule"] = "its own"
    right, known = torch.cat(right), torch.cat(known)
    result |= {"images": len(right), "scored": len(rows), "unknown": int((~known).sum())}
    result |= {"unreadable": batches.skipped, "accuracy": average(100 * right[known])}
    result |= summarise([{key: row[key] for key in row if key != "OM"} for row in rows]) if rows else EMPTY_RESULT
    judged_too = [row["OM"] for row in rows if row["OM"] is not None]
    result["OM"] = sum(judged_too) / len(judged_too) if judged_too else None
    for number, what in (
        (result["unknown"], "are of a class that the network does not know, and have no say in OM"),
        (result["unreadable"], "cannot be read, and are left out of the scores"),
    ):
        if number:
            print(f"note: {number} images {what}")
    if metrics:
        means = {key: average(torch.cat([one[key] for one in metrics])) for key in metrics[0]}
        result |= {**means, "judge": judge.name}
    return result | statistics.means()


def average(values: torch.Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None  # JSON has no NaN


def compute_scores_of(
    masks: torch.Tensor,
    boxes: list,
    correct: torch.Tensor,
    known: torch.Tensor,
    places: list[int],
    truths: BoxAnnotations,
    options: dict,
) -> list[dict]:
    """metrics.image_scores of those images of a batch that have a true box, OM None where the class is not known. masks
    (B, H, W) on the host; places: in the part, -1 for an image that does not count.
    """
    rows = []
    for mask, box, right, sure, place in zip(masks, boxes, correct.tolist(), known.tolist(), places, strict=True):
        truth = truths.each[place] if place >= 0 else None
        if truth:
            true = [
                map_box(one, truth.width, truth.height, mask.shape[-1], options["break_ratio"]) for one in truth.boxes
            ]
            scores = image_scores(mask, box, true, right)
            rows.append(scores if sure else scores | {"OM": None})
    return rows


@torch.no_grad()
def score_batch(
    images: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, extractor: Extractor, judge: Classifier
) -> dict[str, torch.Tensor]:
    """The saliency metric of a batch: the judge sees each box alone, enlarged to the size of the image."""
    height, width = images.shape[-2:]
    own, other = (
        torch.tensor([who.mean, who.std], device=images.device).view(2, 3, 1, 1) for who in (extractor, judge)
    )
    seen = crops((images * own[1] + own[0] - other[0]) / other[1], boxes)
    chance = judge.network(seen).float().softmax(1).gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    known = (labels >= 0).cpu()
    return {key: value.cpu()[known] for key, value in saliency_metric(area, chance).items()}
