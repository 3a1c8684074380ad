"""Localisation: how well the box around a thresholded activation map covers a ground-truth box.

Protocol of Co-Mixup's evaluation (Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 5): threshold the map at a fraction of
its maximum, take the contour of largest area and its bounding box; the box is correct if its IoU with a ground-truth
box is at least 0.5. One threshold for all classifiers ranks them unfairly, so the metrics of Choe et al., "Evaluating
Weakly Supervised Object Localization Methods Right", CVPR 2020, arXiv 2001.07437, Sec. 4, and MaxBoxAccV2 of their
arXiv 2007.04178 are computed too. They use the threshold that is best on the scored images; here MaxBoxAccV2 takes it
from other images.

Boxes are y1, y2, x1, x2 in pixels of the map, half-open. Each image has an (n, 4) tensor of ground-truth boxes. It is
None if they are unknown, which leaves the image out of the scores, and n = 0 if the crop shows none of them, which
counts as a miss.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from engine.data.annotation_files import BoxAnnotation
from engine.data.views import Box, FixedView
from engine.drawing.figures import list_colours, place_legend
from engine.runtime.distributed import count_cores_per_process

Boxes = list[torch.Tensor | None]  # the ground-truth boxes of each image
EMPTY_CONTOUR = np.zeros((1, 1, 2), np.int32)  # for a map without a contour: its box is the first pixel
IOU_CORRECT = 0.5  # lowest IoU of a correct box
IOU_LEVELS = (0.3, 0.5, 0.7)  # those of MaxBoxAccV2
SCORES = ["top1_loc", "gt_known", "best_top1_loc", "best_top1_loc_th", "best_gt_known", "best_gt_known_th"]
SCORES += ["max_box_acc_v2", "max_box_acc_v2_at", "thresholds", "gt_known_at"]


def project_boxes(truths: list[BoxAnnotation | None], view: FixedView) -> Boxes:
    """Return the ground-truth boxes in pixels of the network's input, (n, 4) long each, without those outside it."""

    def project(truth: BoxAnnotation) -> torch.Tensor:
        boxes = [view.place_box(box, truth.width, truth.height) for box in truth.boxes]
        visible = [(y1, y2, x1, x2) for y1, y2, x1, x2 in boxes if y2 > y1 and x2 > x1]
        return torch.tensor(visible, dtype=torch.long).view(-1, 4)

    return [None if truth is None else project(truth) for truth in truths]


def make_centre_box(size: int | tuple[int, int], fraction: float = 0.75) -> Box:
    """Return the centred box that covers this fraction of each side. size: one side, or height and width."""
    sides = (size, size) if isinstance(size, int) else size
    margins = [round(side * (1 - fraction) / 2) for side in sides]
    return margins[0], sides[0] - margins[0], margins[1], sides[1] - margins[1]


def smooth_maps(maps: torch.Tensor) -> torch.Tensor:
    """Sum maps (B, h, w) over 3 x 3 neighbours with zero padding, as in Co-Mixup's evaluation."""
    return 9 * F.avg_pool2d(maps.float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1)


def scale_maps(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Upsample maps (B, h, w) to (B, H, W), bicubic, and scale each from its own minimum and maximum to 0..1.

    A constant map becomes zeros, and so does one that varies less than the rounding errors of the interpolation.
    """
    size = (size, size) if isinstance(size, int) else size
    maps = F.interpolate(maps.float().unsqueeze(1), size, mode="bicubic", align_corners=False).squeeze(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))


def list_thresholds(th: float) -> list[float]:
    """Return thresholds as fractions of a map's maximum: 0, 0.01, ... 0.99, and th."""
    return sorted({step / 100 for step in range(100)} | {th})


def compute_map_ious(
    maps: torch.Tensor, boxes: Boxes, thresholds: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two IoUs with the best ground-truth box for each threshold, (B, T) float32 each. maps (B, H, W) in 0..1.

    The first is that of the box around the contour of largest area (the first one if several are equal), the second the
    highest of the boxes around all outer contours. If there is no contour, the box is the first pixel. NaN for an image
    without known boxes; NaN in a map counts as 0. Runs on the CPU with one thread per image.
    """
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(f"maps must be (B, H, W) with one entry of boxes each, got {tuple(maps.shape)}, {len(boxes)}")
    levels = np.asarray(thresholds, np.float64)
    heatmaps = (maps.nan_to_num().clamp(0, 1) * 255).byte().cpu().numpy()  # rounded towards zero, as in the protocol
    with ThreadPoolExecutor(count_cores_per_process()) as pool:  # threads suffice, since OpenCV releases the GIL
        ious = list(pool.map(lambda heatmap, truth: compute_image_ious(heatmap, truth, levels), heatmaps, boxes))
    both = torch.from_numpy(np.stack(ious, 1)) if ious else torch.empty(2, 0, len(levels))
    return both[0], both[1]


def compute_image_ious(heatmap: np.ndarray, truth: torch.Tensor | None, thresholds: np.ndarray) -> np.ndarray:
    """Return the IoUs of compute_map_ious() for one image, (2, T) float32.

    heatmap (H, W) uint8; truth (n, 4): the ground-truth boxes; thresholds (T,).
    """
    if truth is None:
        return np.full((2, len(thresholds)), np.nan, np.float32)
    levels, level_index = np.unique((thresholds * int(heatmap.max())).astype(int), return_inverse=True)
    contours = [find_contours(heatmap, level) for level in levels.tolist()]
    starts = np.cumsum([0, *map(len, contours[:-1])])  # index of the first contour of each level
    contour_level = np.repeat(np.arange(len(levels)), list(map(len, contours)))
    boxes, areas = measure_contours([contour for group in contours for contour in group])
    best = compute_iou(boxes, truth.numpy()).max(1, initial=0.0)
    largest = np.lexsort((-areas, contour_level))[starts]  # a stable sort: the first of equal areas
    return np.stack([best[largest], np.maximum.reduceat(best, starts)])[:, level_index].astype(np.float32)


def find_contours(heatmap: np.ndarray, level: int) -> Sequence[np.ndarray]:
    """Return the outer contours of the region strictly above the level: (n, 1, 2) int32 each, x first."""
    above = cv2.threshold(heatmap, level, 255, cv2.THRESH_BINARY)[1]
    return cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0] or (EMPTY_CONTOUR,)


def measure_contours(contours: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounding box (n, 4) and the area (n,) of each contour, like cv2.boundingRect and cv2.contourArea.

    It handles all contours at once: noisy maps have thousands at every threshold, and Python calls for each would block
    the other threads.
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
    """Return the intersection over union, (n, m) in 0..1, of boxes (n, 4) with others (m, 4)."""
    one, other = np.asarray(boxes)[:, None], np.asarray(others)[None]
    sides = np.minimum(one[..., 1::2], other[..., 1::2]) - np.maximum(one[..., ::2], other[..., ::2])
    intersection = sides.clip(0).prod(-1)  # clip before the product, since two negative sides have a positive product
    one_area, other_area = ((box[..., 1::2] - box[..., ::2]).prod(-1) for box in (one, other))
    return intersection / (one_area + other_area - intersection)


def score_localization(
    largest_iou: torch.Tensor,
    best_iou: torch.Tensor,
    correct: torch.Tensor,
    heldout: torch.Tensor,
    thresholds: list[float],
    th: float,
) -> dict:
    """Return the scores of one classifier, in percent of the images with ground-truth boxes, ready for JSON.

    largest_iou, best_iou (N, T): results of compute_map_ious() for maps of the true class, which are those of the
    predicted class wherever that is correct. correct (N,) bool: whether it is. heldout (N,) bool: the images that
    choose the thresholds of MaxBoxAccV2, which is computed on the others. th: one of the thresholds (T,).

    gt_known: the box is correct at th. top1_loc: class and box are correct at th. best_..., best_..._th: the same at
    the threshold that is best on these very images, and that threshold. max_box_acc_v2: the mean of the accuracies at
    IoUs of 0.3, 0.5 and 0.7; max_box_acc_v2_at lists these with their thresholds; None if all images or none are held
    out. All scores are None if no image has boxes. Raises ValueError if th is not among the thresholds.
    """
    if th not in thresholds:
        given = f"{len(thresholds)} from {thresholds[0]} to {thresholds[-1]}"
        raise ValueError(f"th must be one of the thresholds, got {th} and {given}")
    position = thresholds.index(th)
    known = ~largest_iou[:, 0].isnan().cpu()
    largest_iou, best_iou, correct, heldout = (x.cpu()[known] for x in (largest_iou, best_iou, correct, heldout))
    scores = {"images": len(largest_iou), "held_images": int(heldout.sum()), "th": th} | dict.fromkeys(SCORES)
    if len(largest_iou):
        found = largest_iou >= IOU_CORRECT
        for name, hits in (("gt_known", found), ("top1_loc", found & correct.unsqueeze(1))):
            at = compute_hit_rates(hits)
            scores |= {name: at[position], f"best_{name}": max(at), f"best_{name}_th": thresholds[at.index(max(at))]}
        scores |= {"thresholds": thresholds, "gt_known_at": compute_hit_rates(found)}
        if heldout.any() and not heldout.all():
            scores |= compute_max_box_accuracy(best_iou, heldout, thresholds)
    return scores


def compute_max_box_accuracy(ious: torch.Tensor, heldout: torch.Tensor, thresholds: list[float]) -> dict:
    """Return MaxBoxAccV2 from ious (N, T), and the accuracy at each of IOU_LEVELS.

    For each level, the threshold (the first of equals) is the best one on the held-out images, and the accuracy is
    measured on the others.
    """
    rows = []
    for level in IOU_LEVELS:
        hits = ious >= level
        heldout_rates = compute_hit_rates(hits[heldout])
        best = heldout_rates.index(max(heldout_rates))
        rows.append({"overlap": level, "accuracy": compute_hit_rates(hits[~heldout])[best], "th": thresholds[best]})
    return {"max_box_acc_v2": sum(row["accuracy"] for row in rows) / len(rows), "max_box_acc_v2_at": rows}


def compute_hit_rates(hits: torch.Tensor) -> list[float]:
    """Return the percentage of the images that are hits at each of T thresholds. hits (N, T) bool."""
    return (100 * hits.sum(0).double() / len(hits)).tolist()


def score_fixed_boxes(boxes: Boxes, size: int | tuple[int, int]) -> dict:
    """Return the GT-known accuracy (%) of fixed boxes: a centred one of 3/4 of the side, and the whole image."""
    known = [each.numpy() for each in boxes if each is not None]
    scores = {"images": len(known), "centre": None, "whole": None}
    for name, guess in (("centre", make_centre_box(size)), ("whole", make_centre_box(size, 1.0))) if known else ():
        hits = [compute_iou([guess], each).max(initial=0.0) >= IOU_CORRECT for each in known]
        scores[name] = 100 * sum(map(int, hits)) / len(hits)
    return scores


def draw_threshold_curves(axes, results: list[tuple[str, dict]], centred: float | None = None) -> None:
    """Draw GT-known localisation against the threshold, a line for each classifier with a dot at its maximum.

    results: (name, result of score_localization()) pairs. centred: score of the centred box, drawn as a dashed line.
    """
    for colour, (name, scores) in zip(list_colours(len(results)), results, strict=True):
        if scores["gt_known_at"] is None:
            continue
        axes.plot([100 * th for th in scores["thresholds"]], scores["gt_known_at"], label=name, color=colour)
        axes.plot(100 * scores["best_gt_known_th"], scores["best_gt_known"], marker="o", color=colour)
    if centred is not None:
        axes.axhline(centred, color="grey", linestyle="--", linewidth=1, label="centred box")
    axes.set(xlabel="threshold (% of the map's maximum)", ylabel="GT-known localisation (%)", xlim=(0, 100))
    axes.grid(alpha=0.3)
    place_legend(axes)
