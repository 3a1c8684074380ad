"""Metrics of masks: F1, localization error (LE), OM, mask statistics and the saliency metric (SM).

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249, localization: F1 is computed from
the soft mask, LE and OM from the box. Details follow the authors' code. The saliency metric is that of Dabkowski and
Gal, "Real time image saliency for black box classifiers", arXiv 1705.07857. We add precision and recall, and accept any
H and W.
"""

from collections.abc import Sequence

import numpy as np
import torch


def map_box_to_crop(
    box: Sequence[float], width: int, height: int, size: int = 224, break_ratio: bool = False
) -> tuple[int, int, int, int]:
    """Map a box x0, y0, x1, y1 of an image of width x height pixels to its central square crop of side `size`.

    The shorter side is resized to `size` before the crop; break_ratio: both sides are, and nothing is cropped.
    Coordinates are truncated toward zero and not clipped, so the box may extend or lie outside the crop. Raises
    ValueError for an image without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image needs at least one pixel, got {width}x{height}")
    x0, y0, x1, y1 = box
    if break_ratio:
        return int(size * x0 / width), int(size * y0 / height), int(size * x1 / width), int(size * y1 / height)
    scale = size / min(width, height)
    # The offset along the shorter side is exactly 0. Computing it could leave a rounding error that changes the result.
    left = (scale * width - size) / 2 if width > height else 0
    top = 0 if width > height else (scale * height - size) / 2
    return int(scale * x0 - left), int(scale * y0 - top), int(scale * x1 - left), int(scale * y1 - top)


def score_box(mask: torch.Tensor, rectangle: Sequence[int], box: Sequence[int]) -> dict[str, float]:
    """Score one ground-truth box: precision, recall and f1 with the soft mask, iou with the predicted rectangle, and
    hit (1 if the IoU exceeds 0.5, else 0).

    mask (H, W); rectangle y1, y2, x1, x2, zeros if there is none; box x0, y0, x1, y1 in pixels of the mask. The whole
    area of the box counts, even outside the mask; a box that lies fully outside scores 0. The function reads values of
    the mask, so move the masks of a batch to the CPU first. Raises ValueError for a mask of another shape.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask must be (H, W), got {tuple(mask.shape)}")
    height, width = mask.shape
    x0, y0, x1, y1 = box
    area = (x1 - x0) * (y1 - y0)
    x0, x1 = max(x0, 0), min(x1, width)
    y0, y1 = max(y0, 0), min(y1, height)
    if x1 <= x0 or y1 <= y0:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0, "iou": 0.0, "hit": 0}
    mask = mask if mask.device.type == "mps" else mask.double()  # MPS has no float64
    inside = float(mask[y0:y1, x0:x1].sum())
    precision, recall = inside / (float(mask.sum()) + 1e-6), inside / area
    top, bottom, left, right = (int(side) for side in rectangle)
    intersection = max(0, min(y1, bottom) - max(y0, top)) * max(0, min(x1, right) - max(x0, left))
    iou = intersection / ((bottom - top) * (right - left) + area - intersection)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + 1e-6),
        "iou": iou,
        "hit": int(iou > 0.5),
    }


def score_image(
    mask: torch.Tensor, rectangle: Sequence[int], boxes: Sequence[Sequence[int]], correct: bool
) -> dict[str, float]:
    """Return the scores of one image.

    F1: that of the best box; F1a: the mean over its boxes; LE: 0 if a box is hit, else 1; OM: 0 if a box is hit and the
    classifier is right (`correct`), else 1; precision and recall: of the box with the best F1. mask, rectangle and
    boxes: see score_box(). Raises ValueError for an image without boxes.
    """
    if len(boxes) == 0:
        raise ValueError("an image without boxes has no scores; leave it out of the averages")
    scores = [score_box(mask, rectangle, box) for box in boxes]
    best = max(scores, key=lambda score: score["f1"])
    hit = max(score["hit"] for score in scores)
    return {
        "F1": best["f1"],
        "F1a": sum(score["f1"] for score in scores) / len(scores),
        "LE": 1 - hit,
        "OM": 1 - hit * int(correct),
        "precision": best["precision"],
        "recall": best["recall"],
    }


def average_scores(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Average each score of score_image() over images, ignoring None. Raises ValueError if there are no images."""
    if len(rows) == 0:
        raise ValueError("there are no scores to average: no image had a box")
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


class MaskStatistics:
    """Statistics of masks, computed per batch and averaged over batches, weighted by the number of images.

    avg_mask: mean pixel. std_mask: sample standard deviation of the mean pixels of the images of a batch, so it depends
    on the batch size; batches of one image do not count. entropy: mean of -v log2 v over all pixels, in bits. tv: total
    variation, the mean squared difference of horizontal neighbors plus that of vertical neighbors.
    """

    def __init__(self):
        self.totals: torch.Tensor | None = None  # (4,) on the device
        self.images, self.images_in_pairs = 0, 0  # all images; those in batches of at least two

    def add(self, masks: torch.Tensor) -> None:
        """Add masks (B, H, W) in 0..1 without waiting for the device. Raises ValueError for another shape."""
        if masks.dim() != 3 or masks.numel() == 0:
            raise ValueError(f"masks must be (B, H, W) with at least one pixel, got {tuple(masks.shape)}")
        batch = len(masks)
        masks = masks.detach().to(torch.float32 if masks.device.type == "mps" else torch.float64)
        std = masks.mean((1, 2)).std() if batch > 1 else masks.new_zeros(())
        soft = torch.where((masks > 0) & (masks < 1), masks, 1)  # 1 has entropy 0
        entropy = -(soft * soft.log2()).mean()
        totals = batch * torch.stack([masks.mean(), std, entropy, compute_total_variation(masks)])
        self.totals = totals if self.totals is None else self.totals + totals
        self.images += batch
        self.images_in_pairs += batch if batch > 1 else 0

    def state_dict(self) -> dict:
        totals = None if self.totals is None else self.totals.cpu()
        return {"totals": totals, "images": self.images, "images_in_pairs": self.images_in_pairs}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.totals = None if state["totals"] is None else state["totals"].to(device)
        self.images, self.images_in_pairs = state["images"], state["images_in_pairs"]

    def means(self) -> dict[str, float | None]:
        """Return avg_mask, std_mask (None if every batch held one image), entropy and tv.

        Raises ValueError before the first call of add().
        """
        if self.totals is None:
            raise ValueError("no statistics yet; call add(masks) first")
        average, std, entropy, variation = self.totals.tolist()
        return {
            "avg_mask": average / self.images,
            "std_mask": std / self.images_in_pairs if self.images_in_pairs else None,
            "entropy": abs(entropy) / self.images,
            "tv": variation / self.images,
        }


def compute_total_variation(masks: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of horizontal plus that of vertical neighbors; 0 if there are none.

    masks (B, H, W); returns a scalar.
    """
    squares = [masks.diff(dim=dim).square() for dim in (1, 2)]
    return sum((one.mean() for one in squares if one.numel()), masks.new_zeros(()))


def compute_saliency_metric(areas: torch.Tensor, probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the saliency metric of Dabkowski and Gal: SM = SM1 - SM2, SM1 = ln area, SM2 = ln probability, (B,) each.

    SM is low if a small rectangle is enough for the classifier. areas (B,): fraction of the image that the rectangle
    covers, clamped to 0.05..1; probabilities (B,): of the true class for the output of crop_rectangles(). A probability
    of 0 counts as the smallest positive number, so that no image makes the mean infinite.
    """
    area = areas.clamp(0.05, 1).log()
    probability = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return {"SM": area - probability, "SM1": area, "SM2": probability}


def crop_rectangles(images: torch.Tensor, rectangles: torch.Tensor) -> torch.Tensor:
    """Crop each image to its rectangle and enlarge the crop to the size of the image; empty rectangles give zeros.

    images (B, C, H, W) float, rectangles (B, 4) as y1, y2, x1, x2; returns (B, C, H, W). The interpolation is that of
    F.interpolate(mode="bicubic"), which cannot resize crops of different sizes in one call. Raises ValueError for other
    shapes.
    """
    if images.dim() != 4 or rectangles.shape != (len(images), 4):
        raise ValueError(
            "images must be (B, C, H, W) and rectangles (B, 4), "
            f"got {tuple(images.shape)} and {tuple(rectangles.shape)}"
        )
    y1, y2, x1, x2 = rectangles.unbind(1)
    result = enlarge_span(enlarge_span(images, 2, y1, y2), 3, x1, x2)
    return result.masked_fill(((y2 <= y1) | (x2 <= x1)).view(-1, 1, 1, 1), 0)


def enlarge_span(images: torch.Tensor, dim: int, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Enlarge the span from start to stop, (B,) each, of dimension `dim` (2 or 3) to the whole dimension."""
    size = images.shape[dim]
    start, stop = start.unsqueeze(1), stop.unsqueeze(1)
    last = torch.maximum(stop - 1, start)
    position = (torch.arange(size, device=images.device) + 0.5) * ((stop - start) / size) - 0.5  # (B, size)
    base = position.floor()
    fraction = position - base
    result = torch.zeros_like(images)
    shape = [len(images), 1, -1, 1] if dim == 2 else [len(images), 1, 1, -1]
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1  # cubic convolution with a = -0.75
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weight = torch.where(distance <= 1, near, far).to(images.dtype)
        index = (start + base.long() + tap).clamp(start, last)
        result += weight.view(shape) * images.gather(dim, index.view(shape).expand_as(images))
    return result


def choose_plot_batches(batches: int, plots: int, seed: int = 931001) -> list[int]:
    """Return the indices of the batches to plot, in random order; plots <= 0: all of them.

    The order is that of the authors' code, NumPy's legacy permutation. The global random generators do not advance.
    """
    order = np.random.RandomState(seed).permutation(batches).tolist()
    return order[:plots] if plots > 0 else order
