"""Localisation: how well the box around a thresholded saliency map covers a true box of the image.

Protocol of Co-Mixup's evaluation (Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 5): threshold at a share of the map's
maximum, the outline of largest area, its bounding box; right where it overlaps a true box by half. Since one threshold
for all ranks classifiers unfairly, also the measures of Choe et al., "Evaluating Weakly Supervised Object Localization
Methods Right", CVPR 2020, arXiv 2001.07437, Sec. 4, and MaxBoxAccV2 of their arXiv 2007.04178. They take the threshold
that is best on the images that are judged; for MaxBoxAccV2 it comes from other images here.

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
from engine.runtime.distributed import cores_per_process

Boxes = list[torch.Tensor | None]
EMPTY_CONTOUR = np.zeros((1, 1, 2), np.int32)  # the outline where there is none: its box is the first pixel
IOU_CORRECT = 0.5  # overlap from which on a box is right
IOU_LEVELS = (0.3, 0.5, 0.7)  # the overlaps of MaxBoxAccV2


def place_boxes(truths: list[BoxAnnotation | None], view: FixedView | int) -> Boxes:
    """The true boxes in the pixels that the classifier sees, (n, 4) long each. Those that are not seen are dropped.

    view: how the images are cut out of their files, or the side of images that are seen as they are.
    """
    return [truth and torch.tensor(place_box(truth, view), dtype=torch.long).view(-1, 4) for truth in truths]


def place_box(truth: BoxAnnotation, view: FixedView | int) -> list[Box]:
    boxes = [scale_box(box, truth.width, truth.height, view) for box in truth.boxes]
    return [(y1, y2, x1, x2) for y1, y2, x1, x2 in boxes if y2 > y1 and x2 > x1]


def scale_box(box: tuple[int, int, int, int], width: int, height: int, view: FixedView | int) -> Box:
    """box: x0, y0, x1, y1."""
    if not isinstance(view, int):
        return view.placed(box, width, height)
    x0, y0, x1, y1 = box
    seen = (y0 * view // height, y1 * view // height, x0 * view // width, x1 * view // width)
    return tuple(min(max(side, 0), view) for side in seen)


def centre_box(size: int | tuple[int, int], share_of_side: float = 0.75) -> Box:
    """The box in the centre of an image of `size` (a side, or height and width); 1.0: the whole image."""
    sides = (size, size) if isinstance(size, int) else size
    margins = [round(side * (1 - share_of_side) / 2) for side in sides]
    return margins[0], sides[0] - margins[0], margins[1], sides[1] - margins[1]


def classic_map(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """Raw maps (B, h, w) -> (B, H, W) in 0..1: summed over 3 x 3 neighbours, enlarged, scaled."""
    return scaled_map(smooth_map(maps), size)


def smooth_map(maps: torch.Tensor) -> torch.Tensor:
    """(B, h, w) -> (B, h, w): sums over 3 x 3 neighbours, zeros around."""
    return 9 * F.avg_pool2d(maps.float().unsqueeze(1), 3, stride=1, padding=1).squeeze(1)


def scaled_map(maps: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, H, W): enlarged (bicubic), and each from its least to its greatest value scaled to 0..1.

    A map of one value becomes zeros; so does one of less variety than the rounding errors of enlarging.
    """
    size = (size, size) if isinstance(size, int) else size
    maps = F.interpolate(maps.float().unsqueeze(1), size, mode="bicubic", align_corners=False).squeeze(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, high - low))


def list_thresholds(th: float) -> list[float]:
    """Every hundredth from 0 to 0.99, and th: shares of the maximum."""
    return sorted({step / 100 for step in range(100)} | {th})


def box_overlaps(
    maps: torch.Tensor, boxes: Boxes, thresholds: Sequence[float] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (B, H, W) in 0..1 -> for each threshold the overlap with the best true box, twice (B, T) float32.

    First of the box around the outline of largest area (the first of equals), then the best of the boxes around all
    outer outlines. A map without an outline has the box of its first pixel. NaN for an image without true boxes. NaN in
    a map counts as 0. The work is the host's, an image a thread.
    """
    if maps.ndim != 3 or len(maps) != len(boxes):
        raise ValueError(f"maps must be (B, H, W) with true boxes for each, got {tuple(maps.shape)} and {len(boxes)}")
    levels = np.asarray(thresholds, np.float64)
    heats = (maps.nan_to_num().clamp(0, 1) * 255).byte().cpu().numpy()  # cut towards zero, as the protocol does
    with ThreadPoolExecutor(cores_per_process()) as pool:  # OpenCV lets go of the interpreter's lock
        found = list(pool.map(lambda heat, true: contour_overlaps(heat, true, levels), heats, boxes))
    both = torch.from_numpy(np.stack(found, 1)) if found else torch.empty(2, 0, len(levels))
    return both[0], both[1]


def contour_overlaps(heat: np.ndarray, true: torch.Tensor | None, thresholds: np.ndarray) -> np.ndarray:
    """heat (H, W) uint8, true (n, 4), thresholds (T,) -> (2, T) float32, see overlaps()."""
    if true is None:
        return np.full((2, len(thresholds)), np.nan, np.float32)
    levels, where = np.unique((thresholds * int(heat.max())).astype(int), return_inverse=True)
    outlines = [find_contours(heat, level) for level in levels.tolist()]
    starts = np.cumsum([0, *map(len, outlines[:-1])])  # the first outline of each level
    owner = np.repeat(np.arange(len(levels)), list(map(len, outlines)))
    boxes, areas = measure_box([line for lines in outlines for line in lines])
    best = intersection_over_union(boxes, true.numpy()).max(1, initial=0.0)
    largest = np.lexsort((-areas, owner))[starts]  # stable: the first of equals
    return np.stack([best[largest], np.maximum.reduceat(best, starts)])[:, where].astype(np.float32)


def find_contours(heat: np.ndarray, level: int) -> Sequence[np.ndarray]:
    """The outer outlines of what is strictly above the level: (n, 1, 2) int32 each, x first."""
    above = cv2.threshold(heat, level, 255, cv2.THRESH_BINARY)[1]
    return cv2.findContours(above, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0] or (EMPTY_CONTOUR,)


def measure_box(outlines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The bounding box (n, 4) and the area (n,) of each outline: cv2.boundingRect and cv2.contourArea of all at once.

    Maps of noise have thousands of outlines at every threshold, and a call for each would hold up the other threads.
    """
    x, y = np.concatenate(outlines)[:, 0].astype(np.int64).T
    ends = np.cumsum(list(map(len, outlines)))
    starts = np.concatenate([[0], ends[:-1]])
    following = np.arange(1, len(x) + 1)
    following[ends - 1] = starts
    areas = np.abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    low, high = ([extreme.reduceat(side, starts) for side in (y, x)] for extreme in (np.minimum, np.maximum))
    return np.stack([low[0], high[0] + 1, low[1], high[1] + 1], 1), areas


def intersection_over_union(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """boxes (n, 4), others (m, 4) -> (n, m) in 0..1. Sides are cut at 0 before they are multiplied: those of boxes that
    are apart in both directions are both negative, and their product would be an overlap.
    """
    one, other = np.asarray(boxes)[:, None], np.asarray(others)[None]
    tall, wide = (
        np.clip(np.minimum(one[..., end], other[..., end]) - np.maximum(one[..., start], other[..., start]), 0, None)
        for start, end in ((0, 1), (2, 3))
    )
    sizes = [(box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2]) for box in (one, other)]
    return tall * wide / (sizes[0] + sizes[1] - tall * wide)


def measure(
    largest: torch.Tensor,
    any_: torch.Tensor,
    right: torch.Tensor,
    held: torch.Tensor,
    thresholds: Sequence[float] | torch.Tensor,
    th: float,
) -> dict:
    """The scores of one classifier, in percent of the images with true boxes, ready for JSON.

    largest, any_ (N, T): what overlaps() gives for maps of the true class, which are those of the predicted class
    wherever that is right. right (N,) bool: the class is. held (N,) bool: the images that choose the threshold of
    MaxBoxAccV2, which is then judged on the others. th: one of the thresholds (T,).

    top1_loc: class right and box right at th; gt_known: box right at th; best_...: the same at the threshold that is
    best on these very images, best_..._th. max_box_acc_v2: the mean of the accuracies at overlaps of 0.3, 0.5 and 0.7,
    which max_box_acc_v2_at holds with their thresholds; None where all images or none are held. All scores are None
    where no image has a box. Raises ValueError where th is none of the thresholds.
    """
    steps = torch.as_tensor(thresholds, dtype=torch.float64).tolist()
    position = min(range(len(steps)), key=lambda step: abs(steps[step] - th))
    if abs(steps[position] - th) > 1e-6:
        raise ValueError(f"th must be one of the thresholds, got {th} and {len(steps)} from {steps[0]} to {steps[-1]}")
    known = ~largest[:, 0].isnan().cpu()
    largest, any_, right, held = (each.cpu()[known] for each in (largest, any_, right, held))
    scores = {"images": len(largest), "held_images": int(held.sum()), "th": th}
    names = ["top1_loc", "gt_known", "best_top1_loc", "best_top1_loc_th", "best_gt_known", "best_gt_known_th"]
    scores |= dict.fromkeys([*names, "max_box_acc_v2", "max_box_acc_v2_at", "thresholds", "gt_known_at"])
    if not len(largest):
        return scores
    for name, hits in (
        ("gt_known", largest >= IOU_CORRECT),
        ("top1_loc", (largest >= IOU_CORRECT) & right.unsqueeze(1)),
    ):
        at = percent(hits)
        scores |= {name: at[position], f"best_{name}": max(at), f"best_{name}_th": steps[at.index(max(at))]}
        if name == "gt_known":
            scores |= {"thresholds": steps, "gt_known_at": at}
    if held.any() and not held.all():
        chosen = [max_box_accuracy(any_ >= overlap, held) for overlap in IOU_LEVELS]
        scores["max_box_acc_v2"] = sum(accuracy for accuracy, _ in chosen) / len(chosen)
        scores["max_box_acc_v2_at"] = [
            {"overlap": overlap, "accuracy": accuracy, "th": steps[step]}
            for overlap, (accuracy, step) in zip(IOU_LEVELS, chosen, strict=True)
        ]
    return scores


def max_box_accuracy(hits: torch.Tensor, held: torch.Tensor) -> tuple[float, int]:
    """hits (N, T) bool -> the accuracy on the images that are not held, at the threshold that is best on those that
    are, and its position (the first of equals).
    """
    chosen = percent(hits[held])
    step = chosen.index(max(chosen))
    return percent(hits[~held])[step], step


def percent(hits: torch.Tensor) -> list[float]:
    """(N, T) bool -> T shares of the images."""
    return (100 * hits.sum(0).double() / len(hits)).tolist()


def baselines(boxes: Boxes, size: int | tuple[int, int]) -> dict:
    """What boxes that look at nothing get, in percent: the centred one of 3/4 side, and the whole image of `size`."""
    known = [each.numpy() for each in boxes if each is not None]
    guesses = {"centre": centre_box(size), "whole": centre_box(size, 1.0)}
    scores = {"images": len(known)} | dict.fromkeys(guesses)
    for name, guess in guesses.items() if known else ():
        hits = [intersection_over_union([guess], each).max(initial=0.0) >= IOU_CORRECT for each in known]
        scores[name] = 100 * sum(map(int, hits)) / len(hits)
    return scores


def draw_examples(axes, results: list[tuple[str, dict]], centred: float | None = None) -> None:
    """GT-known localisation against the threshold, a line for each classifier, a dot where it is best.

    results: names and what measure() gives. centred: what the centred box gets, dashed.
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
