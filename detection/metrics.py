"""Average precision of detections by the rules of PASCAL VOC and of COCO, as fractions 0..1.

VOC: Everingham et al., IJCV 88(2), 2010, Sec. 4.2 (mean over 11 recalls, the VOC2007 figure), and the development kit
from 2010 on (area under the curve). COCO: Lin et al., ECCV 2014, arXiv 1405.0312, with the details of COCOeval in
pycocotools. Both go through the detections of a class by falling score. VOC compares each with the object that it
overlaps most, even if that one is already matched; COCO only with the objects that are still free.

pycocotools is the reference of the tests and not called here: on the 4,952 images of VOC2007 test its loops in Python
take 30 times as long and 8 times the memory for the same twelve figures, and it has none of VOC's.

Boxes are continuous x0, y0, x1, y1 in pixels, labels 1..K. The order of detections matters where scores are equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_IOU = 0.5  # the lowest threshold of both: no pair of boxes that overlaps less can matter
VOC_THRESHOLDS = np.arange(50, 100, 5) / 100  # correctly rounded: an IoU of 9/10 reaches 0.9
COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as in COCOeval, whose 0.9 is the double just below
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}  # inclusive
COCO_FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
COCO_FIGURES += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
VOC_FIGURES = ("map07", "map", "ap07_50_95", "ap_50_95", "ap07_75", "ap_75")
AT_75 = 5  # index of 0.75 in the thresholds
CURVE_POINTS = 200  # at most, of a drawn curve


class Detections(NamedTuple):
    """The detections of one image."""

    boxes: np.ndarray  # (n, 4) float
    labels: np.ndarray  # (n,) int, 1..K
    scores: np.ndarray  # (n,) float


class GroundTruth(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # (m, 4) float
    labels: np.ndarray  # (m,) int, 1..K
    difficult: np.ndarray  # (m,) bool


class BoxTable(NamedTuple):
    """The detections (by falling score) or the objects of all images."""

    boxes: np.ndarray  # (N, 4)
    labels: np.ndarray  # (N,)
    group: np.ndarray  # (N,) a number for each pair of image and class; only boxes of the same group are compared
    extra: np.ndarray  # (N,) scores, or which objects are difficult


class Matches(NamedTuple):
    """Pairs of a detection and an object of the same image and class whose IoU is at least MIN_IOU."""

    detection: np.ndarray  # (P,) index
    truth: np.ndarray  # (P,) index of the object
    iou: np.ndarray  # (P,)


def voc_metrics(detections: Sequence[Detections], truths: Sequence[GroundTruth], classes: Sequence[str]) -> dict:
    """VOC's figures for the detections and objects of the same images in the same order; label k is classes[k - 1].

    Plain numbers, ready for JSON, None where there is nothing to find. ap07 is the mean over 11 recalls, ap the area
    under the curve, at an IoU of 0.5; ..._75 at 0.75, ..._50_95 the mean over 0.5, 0.55 .. 0.95.

    map07, map, ap07_75, ap_75, ap07_50_95, ap_50_95: means over the classes that have objects.
    classes: name -> objects and difficult (an object is counted in one of them), detections, ap07, ap, ap07_75 and so
        on. A difficult object counts neither way, nor does a detection of it.
    curves: name -> precision and recall after each detection that counts, at 0.5; at most CURVE_POINTS of them. Empty
        for a class without objects.

    Raises ValueError for arrays that do not fit together, labels outside 1..K and scores that are NaN.
    """
    found, objects = stack_images(detections, truths, len(classes))
    true, counted = match_voc(match_boxes(found, objects), objects.extra, len(found.labels))
    table, curves = {}, {}
    for label, name in enumerate(classes, 1):
        own, of_class = found.labels == label, objects.labels == label
        difficult = int(objects.extra[of_class].sum())
        positives = int(of_class.sum()) - difficult
        counts = cumulative_tp_fp(true[own], counted[own])
        table[name] = {"objects": positives, "difficult": difficult, "detections": int(own.sum())}
        table[name] |= voc_average_precision(counts, positives)
        curves[name] = precision_recall_curve(*counts[0], positives)
    means = {name: mean([row[name.removeprefix("m")] for row in table.values()]) for name in VOC_FIGURES}
    return means | {"classes": table, "curves": curves}


def coco_metrics(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], num_classes: int, *, count_difficult: bool = False
) -> dict[str, float | None]:
    """The twelve figures of COCOeval for boxes, None where it says -1.

    AP: mean over the classes, over the IoU thresholds 0.5, 0.55 .. 0.95 and over 101 recalls, of the first 100
    detections of each class in each image. AR: the recall of the first 1, 10 or (small, medium, large) 100, mean over
    classes and thresholds. The size is the area of the box; in COCO's own files it is that of the object's mask.
    Difficult objects are "crowds", matched by any number of detections and counted neither way, unless
    count_difficult. Raises ValueError as voc_metrics() does.
    """
    found, objects = stack_images(detections, truths, num_classes)
    rank = rank_in_group(found.group)
    found, rank = BoxTable(*(column[rank < 100] for column in found)), rank[rank < 100]
    crowd = objects.extra & (not count_difficult)
    matches = match_boxes(found, objects, crowd)
    areas, object_areas = box_area(found.boxes), box_area(objects.boxes)
    figures: dict[str, list] = {}
    for suffix, (low, high) in COCO_AREAS.items():
        ignored = crowd | (object_areas < low) | (object_areas > high)
        outside = (areas < low) | (areas > high)
        true, counted = match_coco(matches, found.group[matches.detection], ignored, crowd, outside)
        for label in range(1, num_classes + 1):
            positives = int((~ignored & (objects.labels == label)).sum())
            if not positives:
                continue
            own = found.labels == label
            needed = np.searchsorted(np.arange(positives + 1) / positives, COCO_RECALLS)
            counts = cumulative_tp_fp(true[own], counted[own])
            precision = [interpolate_precision(tp, fp, needed, eps=np.spacing(1)).mean() for tp, fp in counts]
            figures.setdefault(f"AP{suffix}", []).append(np.mean(precision))
            if not suffix:
                figures.setdefault("AP50", []).append(precision[0])
                figures.setdefault("AP75", []).append(precision[AT_75])
            for limit in [100] if suffix else [1, 10, 100]:
                recall = true[own & (rank < limit)].sum(0).mean() / positives
                figures.setdefault(f"AR{suffix or f'_{limit}'}", []).append(recall)
    return {name: mean(figures.get(name, [])) for name in COCO_FIGURES}


# matching


def match_voc(matches: Matches, difficult: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` detections are true, and which count at all: (count, T) bool, a column for each threshold."""
    order = np.lexsort((matches.truth, -matches.iou, matches.detection))
    best = order[np.unique(matches.detection[order], return_index=True)[1]]  # of equal IoU that with the first object
    detection, truth, iou = (column[best] for column in matches)
    true = np.zeros((count, len(VOC_THRESHOLDS)), bool)
    counted = np.ones_like(true)
    for t, threshold in enumerate(VOC_THRESHOLDS):
        near = iou >= threshold
        counted[detection[near & difficult[truth]], t] = False
        first = np.unique(truth[near], return_index=True)[1]  # later detections of the same object are false
        true[detection[near][first], t] = True
    return true & counted, counted


def match_coco(
    matches: Matches, group: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are true and which count, as match_voc(). group (P,): of the matches; ignored, crowd: which
    objects are; outside: which detections have an area outside the range.

    Each detection takes, of the objects that are free, the one it overlaps most (of equal ones the last), and one that
    is ignored only if there is no other. Pairs are offered in this order. As images and classes are independent of one
    another, all groups take turns together, one pair of each at a time.
    """
    order = np.lexsort((-matches.truth, -matches.iou, ignored[matches.truth], matches.detection, group))
    turn = rank_in_group(group[order])
    matched = np.zeros((len(outside), len(COCO_THRESHOLDS)), bool)
    aside = np.zeros_like(matched)  # matched with an object that is ignored
    taken = np.zeros((len(crowd), len(COCO_THRESHOLDS)), bool)
    for rows in np.split(order[np.argsort(turn, kind="stable")], np.cumsum(np.bincount(turn))[:-1]):
        detection, truth, iou = (column[rows] for column in matches)
        new = (iou[:, None] >= COCO_THRESHOLDS) & ~matched[detection] & ~taken[truth]
        matched[detection] |= new
        aside[detection] |= new & ignored[truth, None]
        taken[truth] |= new & ~crowd[truth, None]
    return matched & ~aside, np.where(matched, ~aside, ~outside[:, None])


# precision and recall


def cumulative_tp_fp(true: np.ndarray, counted: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """true, counted (n, T) of one class -> for each threshold the numbers of true and of false positives after each
    of the detections that count.
    """
    counts = [np.cumsum(column[kept]) for column, kept in zip(true.T, counted.T, strict=True)]
    return [(tp, np.arange(1, len(tp) + 1) - tp) for tp in counts]


def interpolate_precision(tp: np.ndarray, fp: np.ndarray, needed: np.ndarray, eps: float = 0.0) -> np.ndarray:
    """The highest precision with at least `needed` (R,) true positives; 0 where there are never so many. eps: added to
    the denominator, as COCOeval does.
    """
    precision = tp / (tp + fp + eps)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(tp, needed)]


def voc_average_precision(counts: list[tuple[np.ndarray, np.ndarray]], positives: int) -> dict[str, float | None]:
    """The APs of a class with these true and false positives at each threshold, and so many objects."""
    if not positives:
        return {name.removeprefix("m"): None for name in VOC_FIGURES}
    # in whole objects: three of ten are a recall of 0.3, and 3 * 0.1 is more than that
    eleven, each = -(-np.arange(11) * positives // 10), np.arange(1, positives + 1)
    figures = {}
    for name, needed in (("ap07", eleven), ("ap", each)):
        ap = [float(interpolate_precision(tp, fp, needed).mean()) for tp, fp in counts]
        figures |= {name: ap[0], f"{name}_75": ap[AT_75], f"{name}_50_95": mean(ap)}
    return figures


def precision_recall_curve(tp: np.ndarray, fp: np.ndarray, positives: int) -> dict[str, list[float]]:
    """At most CURVE_POINTS points, where necessary the first and the last in each of equal bins of recall."""
    if not positives:
        return {"precision": [], "recall": []}
    if len(tp) > CURVE_POINTS:
        bins = tp * (CURVE_POINTS // 2 - 1) // positives
        first = np.flatnonzero(np.diff(bins, prepend=-1))
        shown = np.union1d(first, np.append(first[1:], len(tp)) - 1)
        tp, fp = tp[shown], fp[shown]
    return {"precision": (tp / (tp + fp)).tolist(), "recall": (tp / positives).tolist()}


def mean(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


# boxes of all images


def stack_images(
    detections: Sequence[Detections], truths: Sequence[GroundTruth], num_classes: int
) -> tuple[BoxTable, BoxTable]:
    """All detections, by falling score and in their order where it is equal, and all objects. Raises ValueError, see
    voc_metrics().
    """
    if len(detections) != len(truths):
        raise ValueError(
            f"detections of {len(detections)} images and objects of {len(truths)}: they must be of the same"
        )
    found, objects = concat(detections, num_classes, float), concat(truths, num_classes, bool)
    if np.isnan(found.extra).any():
        raise ValueError(f"{np.isnan(found.extra).sum()} of {len(found.extra)} scores are NaN")
    order = np.argsort(-found.extra, kind="stable")
    return BoxTable(*(column[order] for column in found)), objects


def concat(images: Sequence[Detections] | Sequence[GroundTruth], num_classes: int, dtype: type) -> BoxTable:
    """dtype: of scores, or of which objects are difficult."""
    for index, (boxes, labels, extra) in enumerate(images):
        if labels.ndim != 1 or extra.shape != labels.shape or boxes.shape != (len(labels), 4):
            raise ValueError(
                f"image {index}: {images[index]._fields} must be (n, 4), (n,) and (n,), "
                f"got {boxes.shape}, {labels.shape} and {extra.shape}"
            )
    labels = np.concatenate([np.empty(0, int), *(image.labels for image in images)], dtype=int)
    invalid = labels[(labels < 1) | (labels > num_classes)]
    if len(invalid):
        raise ValueError(f"labels must lie in 1..{num_classes}, got {invalid[0]}")
    boxes = np.concatenate([np.empty((0, 4)), *(image.boxes for image in images)], dtype=float)
    extra = np.concatenate([np.empty(0, dtype), *(image[2] for image in images)], dtype=dtype)
    image = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
    return BoxTable(boxes, labels, image * (num_classes + 1) + labels, extra)


def match_boxes(found: BoxTable, objects: BoxTable, crowd: np.ndarray | None = None) -> Matches:
    """Pairs by rising index of the detection. crowd (M,) bool: objects of which any part may be detected, so that the
    IoU is the share of the detection that lies inside.
    """
    by_group = np.argsort(objects.group, kind="stable")
    first, past = (np.searchsorted(objects.group[by_group], found.group, side) for side in ("left", "right"))
    detection = np.repeat(np.arange(len(first)), past - first)
    truth = by_group[np.arange(len(detection)) - np.repeat(np.cumsum(past - first) - past, past - first)]
    one, other = found.boxes[detection], objects.boxes[truth]
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    intersection = sides.clip(0).prod(1)
    union = box_area(one) + box_area(other) - intersection
    if crowd is not None:
        union = np.where(crowd[truth], box_area(one), union)
    iou = np.divide(intersection, union, out=np.zeros_like(intersection), where=intersection > 0)
    near = iou >= MIN_IOU
    return Matches(detection[near], truth[near], iou[near])


def box_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """(N,): how many before each are of the same group. group (N,)."""
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return rank
