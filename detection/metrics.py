"""Average precision of detections, as PASCAL VOC and as COCO have it, as fractions 0..1.

VOC: Everingham et al., IJCV 88(2), 2010, Sec. 4.2 (mean over 11 recalls, the VOC2007 figure), and the development kit
from 2010 on (area under the curve). COCO: Lin et al., ECCV 2014, arXiv 1405.0312, with the details of COCOeval in
pycocotools. Both go through the detections of a class by falling score. VOC compares each with the object it overlaps
most, found before or not; COCO only with those not found before.

Boxes are continuous x0, y0, x1, y1 in pixels, labels 1..K. The order of detections matters where scores are equal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_IOU = 0.5  # the first threshold of both: no pair of boxes that overlaps less can matter
VOC_THRESHOLDS = np.arange(50, 100, 5) / 100  # rounded as boxes on whole pixels are: an overlap of 9/10 reaches 0.9
COCO_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # as COCOeval has them: 0.9 is the number just below
COCO_RECALLS = np.linspace(0, 1, 101)
COCO_AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}  # both ends in
AT_75 = 5  # place of 0.75 in the thresholds
CURVE_POINTS = 200  # of a drawn curve


class Detections(NamedTuple):
    """The detections of one image."""

    boxes: np.ndarray  # (n, 4) float
    labels: np.ndarray  # (n,) int, 1..K
    scores: np.ndarray  # (n,) float


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # (m, 4) float
    labels: np.ndarray  # (m,) int, 1..K
    difficult: np.ndarray  # (m,) bool


class GroundTruth(NamedTuple):
    """Detections (by falling score) or objects of all images."""

    boxes: np.ndarray  # (N, 4)
    labels: np.ndarray  # (N,)
    group: np.ndarray  # (N,) one number for each image and class; only boxes of the same are compared
    marks: np.ndarray  # (N,) scores or difficult


class Matches(NamedTuple):
    """A detection and an object of the same image and class that overlap by LOWEST or more."""

    found: np.ndarray  # (P,) index of the detection
    truth: np.ndarray  # (P,) index of the object
    overlap: np.ndarray  # (P,)


def voc_metrics(found: Sequence[Detections], truths: Sequence[Objects], classes: Sequence[str]) -> dict:
    """VOC's figures of the detections and the objects of the same images in the same order; label k is classes[k - 1].

    Plain numbers, ready for JSON, None where there is nothing to find. ap07 is the mean over 11 recalls, ap the area
    under the curve, at an overlap of 0.5; ..._75 at 0.75, ..._50_95 the mean over 0.5, 0.55 .. 0.95.

    map07, map, ap07_75, ap_75, ap07_50_95, ap_50_95: means over the classes that have objects.
    classes: name -> objects and difficult (an object is counted in one of them), found (all detections), ap07, ap,
        ap07_50_95, ap_50_95. A difficult object counts neither way, nor does a detection of it.
    curves: name -> precision and recall after each detection that counts, at 0.5; of at most POINTS of them. Empty for
        a class without objects.

    Raises ValueError for arrays that do not fit together, labels outside 1..K and scores that are NaN.
    """
    things, objects = stack_images(found, truths, len(classes))
    true, counted = match_voc(match_boxes(things, objects), objects.marks, len(things.labels))
    table, curves, at_75 = {}, {}, []
    for label, name in enumerate(classes, 1):
        own, mine = things.labels == label, objects.labels == label
        difficult = int(objects.marks[mine].sum())
        positives = int(mine.sum()) - difficult
        row = {"objects": positives, "difficult": difficult, "found": int(own.sum())}
        precision = recall = np.empty(0)
        ap07 = ap = [None]
        if positives:
            steps = cumulative_tp_fp(true[own], counted[own])
            # in whole objects: three of ten are a recall of 0.3, and 3 * 0.1 is more than that
            eleven, each = -(-np.arange(11) * positives // 10), np.arange(1, positives + 1)
            ap07 = [float(interpolate_precision(*step, eleven).mean()) for step in steps]
            ap = [float(interpolate_precision(*step, each).mean()) for step in steps]
            at_75.append((ap07[AT_75], ap[AT_75]))
            hits, precision = steps[0]
            shown = curve_points(hits, positives)
            precision, recall = precision[shown], hits[shown] / positives
        table[name] = row | {"ap07": ap07[0], "ap": ap[0], "ap07_50_95": mean(ap07), "ap_50_95": mean(ap)}
        curves[name] = {"precision": precision.tolist(), "recall": recall.tolist()}
    return {
        "map07": mean([row["ap07"] for row in table.values()]),
        "map": mean([row["ap"] for row in table.values()]),
        "ap07_50_95": mean([row["ap07_50_95"] for row in table.values()]),
        "ap_50_95": mean([row["ap_50_95"] for row in table.values()]),
        "ap07_75": mean([ap07 for ap07, _ in at_75]),
        "ap_75": mean([ap for _, ap in at_75]),
        "classes": table,
        "curves": curves,
    }


def coco_metrics(
    found: Sequence[Detections], truths: Sequence[Objects], num_classes: int, *, count_difficult: bool = False
) -> dict[str, float | None]:
    """The twelve figures of COCOeval for boxes, None where it says -1.

    AP: mean over the classes, over the overlaps 0.5, 0.55 .. 0.95 and over 101 recalls, of the first 100 detections of
    each class in each image. AR: the recall of the first 1, 10 or (small, medium, large) 100, mean over classes and
    overlaps. The size is the area of the box; in COCO's own files it is that of the object's mask. Difficult objects
    are "crowds", found by any number of detections and counted neither way, unless count_difficult. Raises ValueError
    as voc().
    """
    things, objects = stack_images(found, truths, num_classes)
    rank = rank_in_group(things.group)
    things, rank = GroundTruth(*(column[rank < 100] for column in things)), rank[rank < 100]
    crowd = objects.marks & (not count_difficult)
    pairs = match_boxes(things, objects, crowd)
    sizes, object_sizes = box_area(things.boxes), box_area(objects.boxes)
    figures: dict[str, list] = {}
    for suffix, (low, high) in COCO_AREAS.items():
        ignored = crowd | (object_sizes < low) | (object_sizes > high)
        outside = (sizes < low) | (sizes > high)
        true, counted = match_coco(pairs, ignored, crowd, things.group[pairs.found], outside)
        for label in range(1, num_classes + 1):
            positives = int((~ignored & (objects.labels == label)).sum())
            if not positives:
                continue
            own = things.labels == label
            needed = np.searchsorted(np.arange(positives + 1) / positives, COCO_RECALLS)
            steps = cumulative_tp_fp(true[own], counted[own], np.spacing(1))
            precision = [interpolate_precision(*step, needed).mean() for step in steps]
            figures.setdefault(f"AP{suffix}", []).append(np.mean(precision))
            if not suffix:
                figures.setdefault("AP50", []).append(precision[0])
                figures.setdefault("AP75", []).append(precision[AT_75])
            for limit in [100] if suffix else [1, 10, 100]:
                recall = true[own & (rank < limit)].sum(0).mean() / positives
                figures.setdefault(f"AR{suffix or f'_{limit}'}", []).append(recall)
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    names += ["AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]
    return {name: mean(figures.get(name, [])) for name in names}


# what was found


def match_voc(pairs: Matches, difficult: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` detections are true, and which count at all: (count, T) bool, a column for each threshold."""
    order = np.lexsort((pairs.truth, -pairs.overlap, pairs.found))
    most = order[np.unique(pairs.found[order], return_index=True)[1]]  # of equal overlaps that with the first object
    found, truth, overlap = (column[most] for column in pairs)
    true = np.zeros((count, len(VOC_THRESHOLDS)), bool)
    counted = np.ones_like(true)
    for t, threshold in enumerate(VOC_THRESHOLDS):
        near = overlap >= threshold
        counted[found[near & difficult[truth]], t] = False
        first = np.unique(truth[near], return_index=True)[1]  # later claims to the same object are false
        true[found[near][first], t] = True
    return true & counted, counted


def match_coco(
    pairs: Matches, ignored: np.ndarray, crowd: np.ndarray, group: np.ndarray, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As voc_verdicts(). ignored, crowd: of the objects; group: of the pairs; outside: of the detections, the area is
    not the one that is asked for.

    Each detection takes, of the objects that are free, the one it overlaps most (of equal ones the last), and one that
    is ignored only if there is no other. Pairs are offered in this order; as no image and class knows of another, they
    take turns together, one pair of each.
    """
    order = np.lexsort((-pairs.truth, -pairs.overlap, ignored[pairs.truth], pairs.found, group))
    turn = rank_in_group(group[order])
    matched = np.zeros((len(outside), len(COCO_THRESHOLDS)), bool)
    aside = np.zeros_like(matched)  # matched with an object that is ignored
    taken = np.zeros((len(crowd), len(COCO_THRESHOLDS)), bool)
    for rows in np.split(order[np.argsort(turn, kind="stable")], np.cumsum(np.bincount(turn))[:-1]):
        found, truth, overlap = (column[rows] for column in pairs)
        new = (overlap[:, None] >= COCO_THRESHOLDS) & ~matched[found] & ~taken[truth]
        matched[found] |= new
        aside[found] |= new & ignored[truth, None]
        taken[truth] |= new & ~crowd[truth, None]
    return matched & ~aside, np.where(matched, ~aside, ~outside[:, None])


# precision and recall


def cumulative_tp_fp(true: np.ndarray, counted: np.ndarray, more: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """true, counted (n, T) of one class -> for each threshold the objects found, and the precision, after each of the
    detections that count. more: what COCOeval adds to the denominator.
    """
    hits = [np.cumsum(right[kept]) for right, kept in zip(true.T, counted.T, strict=True)]
    return [(hit, hit / (np.arange(1, len(hit) + 1) + more)) for hit in hits]


def interpolate_precision(hits: np.ndarray, precision: np.ndarray, needed: np.ndarray) -> np.ndarray:
    """The largest precision at which at least `needed` (R,) objects are found; 0 where so many never are."""
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(hits, needed)]


def curve_points(hits: np.ndarray, positives: int) -> np.ndarray:
    """Indices of at most POINTS detections that give the picture: the first and the last of each of equal bins of
    recall.
    """
    if len(hits) <= CURVE_POINTS:
        return np.arange(len(hits))
    bins = hits * (CURVE_POINTS // 2 - 1) // positives
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    return np.union1d(first, np.append(first[1:], len(hits)) - 1)


def mean(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


# boxes of all images


def stack_images(
    found: Sequence[Detections], truths: Sequence[Objects], num_classes: int
) -> tuple[GroundTruth, GroundTruth]:
    """Detections, by falling score and in their order where it is equal, and objects. Raises ValueError, see voc()."""
    if len(found) != len(truths):
        raise ValueError(f"detections of {len(found)} images and objects of {len(truths)}: they must be of the same")
    things, objects = concat(found, num_classes, float), concat(truths, num_classes, bool)
    if np.isnan(things.marks).any():
        raise ValueError(f"{np.isnan(things.marks).sum()} of {len(things.marks)} scores are NaN")
    order = np.argsort(-things.marks, kind="stable")
    return GroundTruth(*(column[order] for column in things)), objects


def concat(images: Sequence[Detections] | Sequence[Objects], num_classes: int, kind: type) -> GroundTruth:
    for index, (boxes, labels, marks) in enumerate(images):
        if labels.ndim != 1 or marks.shape != labels.shape or boxes.shape != (len(labels), 4):
            raise ValueError(
                f"image {index}: {images[index]._fields} must be (n, 4), (n,) and (n,), "
                f"got {boxes.shape}, {labels.shape} and {marks.shape}"
            )
    labels = np.concatenate([np.empty(0, int), *(image.labels for image in images)], dtype=int)
    strange = labels[(labels < 1) | (labels > num_classes)]
    if len(strange):
        raise ValueError(f"labels must lie in 1..{num_classes}, got {strange[0]}")
    boxes = np.concatenate([np.empty((0, 4)), *(image.boxes for image in images)], dtype=float)
    marks = np.concatenate([np.empty(0, kind), *(image[2] for image in images)], dtype=kind)
    image = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
    return GroundTruth(boxes, labels, image * (num_classes + 1) + labels, marks)


def match_boxes(things: GroundTruth, objects: GroundTruth, crowd: np.ndarray | None = None) -> Matches:
    """Pairs by rising index of the detection. crowd (M,) bool: objects of which any part may be found, so that the
    overlap is the share of the detection inside it; else it is intersection over union.
    """
    by_group = np.argsort(objects.group, kind="stable")
    first, past = (np.searchsorted(objects.group[by_group], things.group, side) for side in ("left", "right"))
    found = np.repeat(np.arange(len(first)), past - first)
    truth = by_group[np.arange(len(found)) - np.repeat(np.cumsum(past - first) - past, past - first)]
    one, other = things.boxes[found], objects.boxes[truth]
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    shared = sides.clip(0).prod(1)
    whole = box_area(one) + box_area(other) - shared
    if crowd is not None:
        whole = np.where(crowd[truth], box_area(one), whole)
    overlap = np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
    near = overlap >= MIN_IOU
    return Matches(found[near], truth[near], overlap[near])


def box_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """(N,) how many before each are of the same group (N,)."""
    order = np.argsort(group, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return rank
