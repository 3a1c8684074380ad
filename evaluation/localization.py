"""Localisation: how well the box around a thresholded saliency map covers a true box of the image.

Protocol of Co-Mixup's evaluation (Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 5): threshold at a share of the map's
maximum, the contour of largest area, its bounding box; right at an IoU of 0.5 with a true box. Since one threshold
for all ranks classifiers unfairly, also the measures of Choe et al., "Evaluating Weakly Supervised Object Localization
Methods Right", CVPR 2020, arXiv 2001.07437, Sec. 4, and MaxBoxAccV2 of their arXiv 2007.04178. They take the threshold
that is best on the images that are scored; for MaxBoxAccV2 it comes from other images here.

Boxes are y1, y2, x1, x2 in pixels of the map, half-open. Of each image there is a (n, 4) tensor of true boxes: None
where none is known, which leaves it out of the scores, and n = 0 where the view shows none of them, which counts as
missed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from engine.data.annotations import BoxAnnotation
from engine.data.views import Box, FixedView
from engine.runtime.distributed import count_cores_per_process

Boxes = list[torch.Tensor | None]
EMPTY_CONTOUR = np.zeros((1, 1, 2), np.int32)  # the contour of a map without one: its box is the first pixel
IOU_CORRECT = 0.5  # IoU from which on a box is right
IOU_LEVELS = (0.3, 0.5, 0.7)  # of MaxBoxAccV2
SCORES = ["top1_loc", "gt_known", "best_top1_loc", "best_top1_loc_th", "best_gt_known", "best_gt_known_th"]
SCORES += ["max_box_acc_v2", "max_box_acc_v2_at", "thresholds", "gt_known_at"]


def project_boxes(truths: list[BoxAnnotation | None], view: FixedView) -> Boxes:
    """The true boxes in the pixels that the classifier sees, (n, 4) long each, without those that it does not see."""

    def project(truth: BoxAnnotation) -> torch.Tensor:
        boxes = [view.place_box(box, truth.width, truth.height) for box in truth.boxes]
        seen = [(y1, y2, x1, x2) for y1, y2, x1, x2 in boxes if y2 > y1 and x2 > x1]
        return torch.tensor(seen, dtype=torch.long).view(-1, 4)

    return [None if truth is None else project(truth) for truth in truths]


def centre_box(size: int | tuple[int, int], share_of_side: float = 0.75) -> Box:
    """The box in the centre of an image of `size` (a side, or height and width); 1.0: the whole image."""
    sides = (size, size) if isinstance(size, int) else size
    margins = [round(side * (1 - share_of_side) / 2) for side in sides]
    return margins[0], sides[0] - margins[0], margins[1], sides[1] - margins[1]


def smooth_maps(maps: torch.Tensor) -> torch.Tensor:
    """(B, h, w) -> (B, h, w): sums over 3 x 3 neighbours with zero padding, as in Co-Mixup's evaluation."""
    return 9 * F.avg_pool2d(maps.float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1)


def scale_maps(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, H, W): bicubic, each then scaled from its own minimum and maximum to 0..1.

    A constant map becomes zeros; so does one that varies less than the rounding errors of the interpolation.
    """
    size = (size, size) if isinstance(size, int) else size
    maps = F.interpolate(maps.float().unsqueeze(1), size, mode="bicubic", align_corners=False).squeeze(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))


def list_thresholds(th: float) -> list[float]:
    """Thresholds as shares of a map's maximum: every hundredth from 0 to 0.99, and th."""
    return sorted({step / 100 for step in range(100)} | {th})


def compute_overlaps(
    maps: torch.Tensor, boxes: Boxes, thresholds: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, H, W) in 0..1 -> for each threshold the IoU with the best true box, twice (B, T) float32.

    First of the box around the contour of largest area (the first of equals), then the best of the boxes around all
    outer contours. A map without a contour has the box of its first pixel. NaN for an image without true boxes; NaN in
    a map counts as 0. This runs on the CPU, with one thread per image.
    """
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(f"maps must be (B, H, W) with true boxes for each, got {tuple(maps.shape)} and {len(boxes)}")
    levels = np.asarray(thresholds, np.float64)
    heatmaps = (maps.nan_to_num().clamp(0, 1) * 255).byte().cpu().numpy()  # cut towards zero, as the protocol does
    with ThreadPoolExecutor(count_cores_per_process()) as pool:  # OpenCV lets go of the interpreter's lock
        found = list(pool.map(lambda heatmap, true: compute_image_overlaps(heatmap, true, levels), heatmaps, boxes))
    both = torch.from_numpy(np.stack(found, 1)) if found else torch.empty(2, 0, len(levels))
    return both[0], both[1]


def compute_image_overlaps(heatmap: np.ndarray, true: torch.Tensor | None, thresholds: np.ndarray) -> np.ndarray:
    """heatmap (H, W) uint8, true (n, 4), thresholds (T,) -> (2, T) float32, see compute_overlaps()."""
    if true is None:
        return np.full((2, len(thresholds)), np.nan, np.float32)
    levels, level_index = np.unique((thresholds * int(heatmap.max())).astype(int), return_inverse=True)
    contours = [find_contours(heatmap, level) for level in levels.tolist()]
    starts = np.cumsum([0, *map(len, contours[:-1])])  # the first contour of each level
    owner = np.repeat(np.arange(len(levels)), list(map(len, contours)))
    boxes, areas = measure_contours([contour for of_level in contours for contour in of_level])
    best = compute_iou(boxes, true.numpy()).max(1, initial=0.0)
    largest = np.lexsort((-areas, owner))[starts]  # stable: the first of equals
    return np.stack([best[largest], np.maximum.reduceat(best, starts)])[:, level_index].astype(np.float32)


def find_contours(heatmap: np.ndarray, level: int) -> Sequence[np.ndarray]:
    """The outer contours of what is strictly above the level: (n, 1, 2) int32 each, x first."""
    above = cv2.threshold(heatmap, level, 255, cv2.THRESH_BINARY)[1]
    return cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0] or (EMPTY_CONTOUR,)


def measure_contours(contours: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The bounding box (n, 4) and the area (n,) of each contour: cv2.boundingRect and cv2.contourArea of all at once.

    Maps of noise have thousands of contours at every threshold, and a call for each would hold up the other threads.
    """
    x, y = np.concatenate(contours)[:, 0].astype(np.int64).T
    ends = np.cumsum(list(map(len, contours)))
    starts = np.concatenate([[0], ends[:-1]])
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = starts
    areas = np.abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    low, high = ([extreme.reduceat(side, starts) for side in (y, x)] for extreme in (np.minimum, np.maximum))
    return np.stack([low[0], high[0] + 1, low[1], high[1] + 1], 1), areas


def compute_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) with others (m, 4) -> (n, m) in 0..1."""
    one, other = np.asarray(boxes)[:, None], np.asarray(others)[None]
    sides = np.minimum(one[..., 1::2], other[..., 1::2]) - np.maximum(one[..., ::2], other[..., ::2])
    intersection = sides.clip(0).prod(-1)  # clipped first: the product of two negative sides would be an overlap
    one_area, other_area = ((box[..., 1::2] - box[..., ::2]).prod(-1) for box in (one, other))
    return intersection / (one_area + other_area - intersection)


def score_localization(
    largest: torch.Tensor,
    best: torch.Tensor,
    correct: torch.Tensor,
    heldout: torch.Tensor,
    thresholds: list[float],
    th: float,
) -> dict:
    """The scores of one classifier, in percent of the images with true boxes, ready for JSON.

    largest, best (N, T): what compute_overlaps() gives for maps of the true class, which are those of the predicted
    class wherever that is right. correct (N,) bool: the class is. heldout (N,) bool: the images that choose the
    threshold of MaxBoxAccV2, which is then evaluated on the others. th: one of the thresholds (T,).

    top1_loc: class and box right at th; gt_known: box right at th; best_...: the same at the threshold that is best on
    these very images, best_..._th. max_box_acc_v2: the mean of the accuracies at IoUs of 0.3, 0.5 and 0.7, which
    max_box_acc_v2_at holds with their thresholds; None where all images or none are held out. All scores are None where
    no image has a box. Raises ValueError where th is none of the thresholds.
    """
    if th not in thresholds:
        given = f"{len(thresholds)} from {thresholds[0]} to {thresholds[-1]}"
        raise ValueError(f"th must be one of the thresholds, got {th} and {given}")
    position = thresholds.index(th)
    known = ~largest[:, 0].isnan().cpu()
    largest, best, correct, heldout = (each.cpu()[known] for each in (largest, best, correct, heldout))
    scores = {"images": len(largest), "held_images": int(heldout.sum()), "th": th} | dict.fromkeys(SCORES)
    if len(largest):
        found = largest >= IOU_CORRECT
        for name, hits in (("gt_known", found), ("top1_loc", found & correct.unsqueeze(1))):
            at = percent(hits)
            scores |= {name: at[position], f"best_{name}": max(at), f"best_{name}_th": thresholds[at.index(max(at))]}
        scores |= {"thresholds": thresholds, "gt_known_at": percent(found)}
        if heldout.any() and not heldout.all():
            scores |= max_box_accuracy(best, heldout, thresholds)
    return scores


def max_box_accuracy(overlaps: torch.Tensor, heldout: torch.Tensor, thresholds: list[float]) -> dict:
    """overlaps (N, T): at each of IOU_LEVELS the accuracy on the images that are not held out, at the threshold (the
    first of equals) that is best on those that are; and the mean.
    """
    rows = []
    for overlap in IOU_LEVELS:
        hits = overlaps >= overlap
        chosen = percent(hits[heldout])
        step = chosen.index(max(chosen))
        rows.append({"overlap": overlap, "accuracy": percent(hits[~heldout])[step], "th": thresholds[step]})
    return {"max_box_acc_v2": sum(row["accuracy"] for row in rows) / len(rows), "max_box_acc_v2_at": rows}


def percent(hits: torch.Tensor) -> list[float]:
    """(N, T) bool -> T shares of the images."""
    return (100 * hits.sum(0).double() / len(hits)).tolist()


def score_fixed_boxes(boxes: Boxes, size: int | tuple[int, int]) -> dict:
    """What boxes that do not look at the image get, in percent: the centred one of 3/4 side, and the whole image."""
    known = [each.numpy() for each in boxes if each is not None]
    scores = {"images": len(known), "centre": None, "whole": None}
    for name, guess in (("centre", centre_box(size)), ("whole", centre_box(size, 1.0))) if known else ():
        hits = [compute_iou([guess], each).max(initial=0.0) >= IOU_CORRECT for each in known]
        scores[name] = 100 * sum(map(int, hits)) / len(hits)
    return scores


def draw_threshold_curves(axes, results: list[tuple[str, dict]], centred: float | None = None) -> None:
    """GT-known localisation against the threshold, a line for each classifier, a dot where it is best.

    results: names and what score_localization() gives. centred: what the centred box gets, dashed.
    """
    for name, scores in results:
        if scores["gt_known_at"] is None:
            continue
        (line,) = axes.plot(scores["thresholds"], scores["gt_known_at"], label=name)
        axes.plot(scores["best_gt_known_th"], scores["best_gt_known"], marker="o", color=line.get_color())
    if centred is not None:
        axes.axhline(centred, color="grey", linestyle="--", linewidth=1, label="centred box")
    axes.set(xlabel="threshold, share of the map's maximum", ylabel="localised, class given (%)", xlim=(0, 1))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
