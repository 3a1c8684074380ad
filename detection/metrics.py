"""Compute average precision by the rules of PASCAL VOC and COCO, as fractions 0..1.

VOC: Everingham et al., IJCV 88(2), 2010, Sec. 4.2 (mean over 11 recalls, the VOC2007 metric), and the development kit
from 2010 on (area under the curve). COCO: Lin et al., ECCV 2014, arXiv 1405.0312, with the details of COCOeval in
pycocotools. Both process the detections of a class in order of decreasing score. VOC compares each detection with the
object that it overlaps most, even if that object is already matched; COCO compares it only with unmatched objects.

The tests compare with pycocotools, but it is not used here. On the 4,952 images of VOC2007 test its Python loops take
30 times as long and 8 times the memory for the same twelve metrics, and it does not compute those of VOC.

Boxes are x0, y0, x1, y1 in continuous pixel coordinates, labels 1..K. Among equal scores the given order counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_IOU = 0.5  # the lowest threshold of both protocols: pairs of boxes with less overlap never match
VOC_THRESHOLDS = np.arange(50, 100, 5) / 100  # correctly rounded, so an IoU of 9/10 reaches 0.9
COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCOeval, whose 0.9 is the next smaller double
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}  # inclusive
COCO_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
COCO_METRICS += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
VOC_METRICS = ("map07", "map", "ap07_50_95", "ap_50_95", "ap07_75", "ap_75")
INDEX_75 = 5  # index of 0.75 in the thresholds
CURVE_POINTS = 200  # maximum number of points of a precision-recall curve


class Detections(NamedTuple):
    """The detections in one image."""

    boxes: np.ndarray  # (n, 4) float
    labels: np.ndarray  # (n,) int, 1..K
    scores: np.ndarray  # (n,) float


class GroundTruth(NamedTuple):
    """The ground-truth objects of one image."""

    boxes: np.ndarray  # (m, 4) float
    labels: np.ndarray  # (m,) int, 1..K
    difficult: np.ndarray  # (m,) bool


class BoxTable(NamedTuple):
    """The detections (by decreasing score) or the ground-truth objects of all images."""

    boxes: np.ndarray  # (N, 4)
    labels: np.ndarray  # (N,)
    group: np.ndarray  # (N,) number of the pair of image and class; only boxes of the same group are compared
    extra: np.ndarray  # (N,) scores of detections, or `difficult` of objects


class Matches(NamedTuple):
    """Pairs of a detection and an object of the same image and class whose IoU is at least MIN_IOU."""

    detection: np.ndarray  # (P,) index of the detection
    truth: np.ndarray  # (P,) index of the object
    iou: np.ndarray  # (P,)


def voc_metrics(detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]) -> dict:
    """Compute the VOC metrics. Both lists hold the same images in the same order; label k is classes[k - 1].

    Returns plain numbers, ready for JSON; None if there are no objects. ap07 is the mean over 11 recalls and ap the
    area under the curve, at an IoU of 0.5; ..._75 is at 0.75, and ..._50_95 is the mean over 0.5, 0.55 .. 0.95.

    map07, map, ap07_75, ap_75, ap07_50_95, ap_50_95: means over the classes that have objects.
    classes: name -> objects, difficult (not included in objects), detections, ap07, ap, ap07_75 and so on. Difficult
        objects and detections of them are ignored.
    curves: name -> precision and recall after each counted detection, at 0.5; at most CURVE_POINTS points. Empty for a
        class without objects.

    Raises ValueError for arrays that do not fit together, labels outside 1..K and NaN scores.
    """
    boxes, objects = stack_images(detections, truths, len(classes))
    is_tp, is_counted = match_voc(match_boxes(boxes, objects), objects.extra, len(boxes.labels))
    table, curves = {}, {}
    for label, name in enumerate(classes, 1):
        box_rows, object_rows = boxes.labels == label, objects.labels == label
        difficult = int(objects.extra[object_rows].sum())
        positives = int(object_rows.sum()) - difficult
        counts = cumulative_tp_fp(is_tp[box_rows], is_counted[box_rows])
        table[name] = {"objects": positives, "difficult": difficult, "detections": int(box_rows.sum())}
        table[name] |= voc_average_precision(counts, positives)
        curves[name] = precision_recall_curve(*counts[0], positives)
    means = {name: mean_or_none([row[name.removeprefix("m")] for row in table.values()]) for name in VOC_METRICS}
    return means | {"classes": table, "curves": curves}


def coco_metrics(
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    num_classes: int,
    *,
    areas: Sequence[np.ndarray] | None = None,
    count_difficult: bool = False,
) -> dict[str, float | None]:
    """Compute the twelve box metrics of COCOeval; None where COCOeval returns -1.

    AP: mean over classes, IoU thresholds 0.5, 0.55 .. 0.95 and 101 recalls, for the first 100 detections per class and
    image. AR: recall of the first 1, 10 or 100 detections (100 for small, medium, large), mean over classes and
    thresholds. areas: those of the objects of each image, by which they are small, medium or large (in COCO's own files
    the areas of the masks); None: those of the boxes. Difficult objects are treated as crowds, which are ignored and
    may match any number of detections, unless count_difficult is set. Raises ValueError as voc_metrics() does.
    """
    boxes, objects = stack_images(detections, truths, num_classes)
    rank = rank_in_group(boxes.group)
    boxes, rank = BoxTable(*(column[rank < 100] for column in boxes)), rank[rank < 100]
    crowd = objects.extra & (not count_difficult)
    matches = match_boxes(boxes, objects, crowd)
    detected_areas, object_areas = box_area(boxes.boxes), box_area(objects.boxes)
    if areas is not None:
        object_areas = np.concatenate([np.empty(0), *areas])
    values: dict[str, list] = {}  # metric -> one value per class
    for suffix, (low, high) in COCO_AREAS.items():
        ignored = crowd | (object_areas < low) | (object_areas > high)
        outside = (detected_areas < low) | (detected_areas > high)
        is_tp, is_counted = match_coco(matches, boxes.group[matches.detection], ignored, crowd, outside)
        for label in range(1, num_classes + 1):
            positives = int((~ignored & (objects.labels == label)).sum())
            if not positives:
                continue
            rows = boxes.labels == label
            needed = np.searchsorted(np.arange(positives + 1) / positives, COCO_RECALLS)
            counts = cumulative_tp_fp(is_tp[rows], is_counted[rows])
            precision = [interpolate_precision(tp, fp, needed, eps=np.spacing(1)).mean() for tp, fp in counts]
            values.setdefault(f"AP{suffix}", []).append(np.mean(precision))
            if not suffix:
                values.setdefault("AP50", []).append(precision[0])
                values.setdefault("AP75", []).append(precision[INDEX_75])
            for limit in [100] if suffix else [1, 10, 100]:
                recall = is_tp[rows & (rank < limit)].sum(0).mean() / positives
                values.setdefault(f"AR{suffix or f'_{limit}'}", []).append(recall)
    return {name: mean_or_none(values.get(name, [])) for name in COCO_METRICS}


# ---- Matching ----


def match_voc(matches: Matches, difficult: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `count` detections are true positives and which are counted: (count, T) bool, T thresholds."""
    order = np.lexsort((matches.truth, -matches.iou, matches.detection))
    best = order[np.unique(matches.detection[order], return_index=True)[1]]  # among equal IoUs, the first object
    detection, truth, iou = (column[best] for column in matches)
    is_tp = np.zeros((count, len(VOC_THRESHOLDS)), bool)
    is_counted = np.ones_like(is_tp)
    for t, threshold in enumerate(VOC_THRESHOLDS):
        reached = iou >= threshold
        is_counted[detection[reached & difficult[truth]], t] = False
        first = np.unique(truth[reached], return_index=True)[1]  # later detections of the same object are false
        is_tp[detection[reached][first], t] = True
    return is_tp & is_counted, is_counted


def match_coco(
    matches: Matches, group: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections are true positives and which are counted, as match_voc() does.

    group (P,): the groups of the matches. ignored, crowd (M,) bool: which objects are. outside (N,) bool: which
    detections have an area outside the size range.

    A detection takes the unmatched object that it overlaps most (the last one among equal overlaps). It takes an
    ignored object only if there is no other. The pairs are sorted in this order. Images and classes are independent,
    so each round of the loop handles one pair of every group.
    """
    order = np.lexsort((-matches.truth, -matches.iou, ignored[matches.truth], matches.detection, group))
    turn = rank_in_group(group[order])
    matched = np.zeros((len(outside), len(COCO_THRESHOLDS)), bool)
    matched_ignored = np.zeros_like(matched)  # matched with an ignored object
    taken = np.zeros((len(crowd), len(COCO_THRESHOLDS)), bool)
    for rows in np.split(order[np.argsort(turn, kind="stable")], np.cumsum(np.bincount(turn))[:-1]):
        detection, truth, iou = (column[rows] for column in matches)
        new = (iou[:, None] >= COCO_THRESHOLDS) & ~matched[detection] & ~taken[truth]
        matched[detection] |= new
        matched_ignored[detection] |= new & ignored[truth, None]
        taken[truth] |= new & ~crowd[truth, None]
    return matched & ~matched_ignored, np.where(matched, ~matched_ignored, ~outside[:, None])


# ---- Precision and recall ----


def cumulative_tp_fp(is_tp: np.ndarray, is_counted: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, per threshold, the numbers of true and false positives up to each counted detection.

    is_tp, is_counted: (n, T) bool, of one class, by decreasing score.
    """
    counts = [np.cumsum(column[kept]) for column, kept in zip(is_tp.T, is_counted.T, strict=True)]
    return [(tp, np.arange(1, len(tp) + 1) - tp) for tp in counts]


def interpolate_precision(tp: np.ndarray, fp: np.ndarray, needed: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """Return the highest precision at which there are at least `needed` true positives; 0 if there are never so many.

    needed (R,) int -> (R,). eps: added to the denominator, as COCOeval does.
    """
    precision = tp / (tp + fp + eps)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(tp, needed)]


def voc_average_precision(counts: list[tuple[np.ndarray, np.ndarray]], positives: int) -> dict[str, float | None]:
    """Return the APs of one class. counts: cumulative_tp_fp(); positives: number of objects that are not difficult."""
    if not positives:
        return {name.removeprefix("m"): None for name in VOC_METRICS}
    # counted in whole objects: 3 of 10 are a recall of 0.3, but in floating point 3 * 0.1 > 0.3
    eleven, each = -(-np.arange(11) * positives // 10), np.arange(1, positives + 1)
    values = {}
    for name, needed in (("ap07", eleven), ("ap", each)):
        ap = [float(interpolate_precision(tp, fp, needed).mean()) for tp, fp in counts]
        values |= {name: ap[0], f"{name}_75": ap[INDEX_75], f"{name}_50_95": mean_or_none(ap)}
    return values


def precision_recall_curve(tp: np.ndarray, fp: np.ndarray, positives: int) -> dict[str, list[float]]:
    """Return precision and recall as lists of at most CURVE_POINTS points.

    A longer curve keeps the first and the last point in each of equal bins of recall.
    """
    if not positives:
        return {"precision": [], "recall": []}
    if len(tp) > CURVE_POINTS:
        bins = tp * (CURVE_POINTS // 2 - 1) // positives
        first = np.flatnonzero(np.diff(bins, prepend=-1))
        shown = np.union1d(first, np.append(first[1:], len(tp)) - 1)
        tp, fp = tp[shown], fp[shown]
    return {"precision": (tp / (tp + fp)).tolist(), "recall": (tp / positives).tolist()}


def mean_or_none(values: list) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


# ---- Boxes of all images ----


def stack_images(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], num_classes: int
) -> tuple[BoxTable, BoxTable]:
    """Return all detections, by decreasing score (stable sort), and all objects. Raises ValueError as voc_metrics()."""
    if len(detections) != len(truths):
        raise ValueError(
            f"detections and ground truth must be of the same images, got {len(detections)} and {len(truths)} images"
        )
    boxes, objects = concat(detections, num_classes, float), concat(truths, num_classes, bool)
    if np.isnan(boxes.extra).any():
        raise ValueError(f"{np.isnan(boxes.extra).sum()} of {len(boxes.extra)} scores are NaN")
    order = np.argsort(-boxes.extra, kind="stable")
    return BoxTable(*(column[order] for column in boxes)), objects


def concat(images: Sequence[Detections] | Sequence[GroundTruth], num_classes: int, dtype: type) -> BoxTable:
    """Concatenate the boxes of all images. dtype: type of the third column, scores or `difficult`."""
    for index, (boxes, labels, extra) in enumerate(images):
        if labels.ndim != 1 or extra.shape != labels.shape or boxes.shape != (len(labels), 4):
            raise ValueError(
                f"image {index}: {', '.join(images[index]._fields)} must have shapes (n, 4), (n,) and (n,), "
                f"got {boxes.shape}, {labels.shape} and {extra.shape}"
            )
    labels = np.concatenate([np.empty(0, int), *(image.labels for image in images)], dtype=int)
    invalid = labels[(labels < 1) | (labels > num_classes)]
    if len(invalid):
        raise ValueError(f"labels must be in 1..{num_classes}, got {invalid[0]}")
    boxes = np.concatenate([np.empty((0, 4)), *(image.boxes for image in images)], dtype=float)
    extra = np.concatenate([np.empty(0, dtype), *(image[2] for image in images)], dtype=dtype)
    image = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
    return BoxTable(boxes, labels, image * (num_classes + 1) + labels, extra)


def match_boxes(boxes: BoxTable, objects: BoxTable, crowd: np.ndarray | None = None) -> Matches:
    """Return the pairs of detections and objects that overlap enough, by increasing index of the detection.

    crowd (M,) bool: objects that are crowds. Their IoU is the share of the detection that lies inside.
    """
    by_group = np.argsort(objects.group, kind="stable")
    first, end = (np.searchsorted(objects.group[by_group], boxes.group, side) for side in ("left", "right"))
    detection = np.repeat(np.arange(len(first)), end - first)
    truth = by_group[np.arange(len(detection)) - np.repeat(np.cumsum(end - first) - end, end - first)]
    one, other = boxes.boxes[detection], objects.boxes[truth]
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    intersection = sides.clip(0).prod(1)
    union = box_area(one) + box_area(other) - intersection
    if crowd is not None:
        union = np.where(crowd[truth], box_area(one), union)
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)
    overlapping = iou >= MIN_IOU
    return Matches(detection[overlapping], truth[overlapping], iou[overlapping])


def box_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """Return, for each element of group (N,), how many before it are of the same group: (N,) int."""
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return rank
