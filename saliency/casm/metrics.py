"""How well masks find the object: F1, localisation error, mask statistics and the saliency metric.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249, localisation: F1 is computed from
the soft mask, LE and OM from the box, and details follow the authors' code. The saliency metric is that of Dabkowski
and Gal, "Real time image saliency for black box classifiers", arXiv 1705.07857. We add precision and recall, and take
any H and W.
"""

from collections.abc import Sequence

import numpy as np
import torch


def map_box_to_crop(
    box: Sequence[float], width: int, height: int, size: int = 224, break_ratio: bool = False
) -> tuple[int, int, int, int]:
    """A box x0, y0, x1, y1 of an image of width x height pixels, in the central square crop of side `size` that is left
    after the shorter side was resized to `size`; break_ratio: after both sides were, without a crop.

    Cut towards zero and not clipped, so it can reach outside the crop or lie outside. Raises ValueError for an image
    without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image needs at least one pixel, got {width}x{height}")
    x0, y0, x1, y1 = box
    if break_ratio:
        return int(size * x0 / width), int(size * y0 / height), int(size * x1 / width), int(size * y1 / height)
    scale = size / min(width, height)
    left = (scale * width - size) / 2 if width > height else 0  # not computed on the short side: a rounding error
    top = 0 if width > height else (scale * height - size) / 2  # would change the cut
    return int(scale * x0 - left), int(scale * y0 - top), int(scale * x1 - left), int(scale * y1 - top)


def score_box(mask: torch.Tensor, rectangle: Sequence[int], box: Sequence[int]) -> dict[str, float]:
    """One annotated box against the soft mask (precision, recall, f1) and the predicted rectangle (iou; hit: 1 if that
    exceeds 0.5, else 0).

    mask (H, W); rectangle y1, y2, x1, x2, zeros where there is none; box x0, y0, x1, y1 in pixels of the mask. Its area
    counts in full, also where it reaches outside; a box that lies outside scores 0. Reads the mask, so it waits for a
    device: take the masks of a batch to the CPU first. Raises ValueError for a mask of another shape.
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
    exact = mask if mask.device.type == "mps" else mask.double()
    inside = float(exact[y0:y1, x0:x1].sum())
    precision, recall = inside / (float(exact.sum()) + 1e-6), inside / area
    top, bottom, left, right = (int(side) for side in rectangle)
    common = max(0, min(y1, bottom) - max(y0, top)) * max(0, min(x1, right) - max(x0, left))
    iou = common / ((bottom - top) * (right - left) + area - common)
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
    """Scores of one image: F1 of the best box, F1a the mean over its boxes, LE 0 if a box is hit else 1, OM 0 if
    besides the classifier is right (`correct`), precision and recall of the box of the best F1.

    mask, rectangle and boxes as in score_box. Raises ValueError where there is no box.
    """
    if len(boxes) == 0:
        raise ValueError("an image without boxes has no scores: leave it out and count it")
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
    """The mean over images of each score of score_image, None where every value is. Raises ValueError for no images."""
    if len(rows) == 0:
        raise ValueError("there are no scores to average: no image had a box")
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


class MaskStatistics:
    """Four numbers of the masks, each taken per batch and averaged over batches by their numbers of images.

    avg_mask: mean pixel. std_mask: sample standard deviation of the mean masks of a batch's images, so it depends on
    the batch size; a batch of one image has none and does not count. entropy: -v log2 v per pixel, in bits, over all
    pixels. tv: mean squared difference of horizontal neighbours plus that of vertical ones.
    """

    def __init__(self):
        self.totals: torch.Tensor | None = None  # (4,) on the device
        self.images, self.images_in_pairs = 0, 0  # all; those of batches of two or more

    def add(self, masks: torch.Tensor) -> None:
        """masks (B, H, W) in 0..1. Does not wait for the device. Raises ValueError for another shape."""
        if masks.dim() != 3 or masks.numel() == 0:
            raise ValueError(f"masks must be (B, H, W) with at least one pixel, got {tuple(masks.shape)}")
        batch = len(masks)
        masks = masks.detach().to(torch.float32 if masks.device.type == "mps" else torch.float64)
        spread = masks.mean((1, 2)).std() if batch > 1 else masks.new_zeros(())
        soft = torch.where((masks > 0) & (masks < 1), masks, 1)  # the logarithm of the rest is 0
        entropy = -(soft * soft.log2()).mean()
        totals = batch * torch.stack([masks.mean(), spread, entropy, total_variation(masks)])
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
        """avg_mask, std_mask (None where every batch was of one image), entropy, tv. Raises ValueError before the first
        masks.
        """
        if self.totals is None:
            raise ValueError("there are no statistics yet: add(masks) first")
        average, spread, entropy, variation = self.totals.tolist()
        return {
            "avg_mask": average / self.images,
            "std_mask": spread / self.images_in_pairs if self.images_in_pairs else None,
            "entropy": abs(entropy) / self.images,
            "tv": variation / self.images,
        }


def total_variation(masks: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (): mean squared difference of horizontal plus of vertical neighbours; 0 where there are none."""
    squares = [masks.diff(dim=dim).square() for dim in (1, 2)]
    return sum((one.mean() for one in squares if one.numel()), masks.new_zeros(()))


def compute_saliency_metric(areas: torch.Tensor, probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of Dabkowski and Gal, per image: SM = SM1 - SM2, low where a small rectangle is enough for the classifier.

    areas (B,): share of the image that the rectangle covers, clipped to 0.05..1; probabilities (B,): of the true class,
    given crop_rectangles alone -> SM, SM1 = ln area, SM2 = ln probability, (B,) each. A probability of 0 counts as the
    smallest positive number, so that no image makes the mean infinite.
    """
    area = areas.clamp(0.05, 1).log()
    probability = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return {"SM": area - probability, "SM1": area, "SM2": probability}


def crop_rectangles(images: torch.Tensor, rectangles: torch.Tensor) -> torch.Tensor:
    """Every rectangle alone, enlarged to the size of the image: images (B, C, H, W) floats, rectangles (B, 4) as y1,
    y2, x1, x2 -> (B, C, H, W); zeros where a rectangle is empty.

    Bicubic as in F.interpolate (pixel centres, a = -0.75, the edge repeated), which takes one size only, for all at
    once. Raises ValueError for other shapes.
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
    """(B, C, H, W): the span from start to stop, (B,) each, of dimension `dim` (2 or 3), enlarged to all of it."""
    size = images.shape[dim]
    start, stop = start.unsqueeze(1), stop.unsqueeze(1)
    last = torch.maximum(stop - 1, start)
    position = (torch.arange(size, device=images.device) + 0.5) * ((stop - start) / size) - 0.5  # (B, size)
    whole = position.floor()
    fraction = position - whole
    result = torch.zeros_like(images)
    shape = [len(images), 1, -1, 1] if dim == 2 else [len(images), 1, 1, -1]
    for tap in (-1, 0, 1, 2):
        distance = (fraction - tap).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        weight = torch.where(distance <= 1, near, far).to(images.dtype)
        index = (start + whole.long() + tap).clamp(start, last)
        result += weight.view(shape) * images.gather(dim, index.view(shape).expand_as(images))
    return result


def choose_plot_batches(batches: int, plots: int, seed: int = 931001) -> list[int]:
    """Which of so many batches to draw, in this order; all of them where plots <= 0.

    The authors' order is NumPy's legacy permutation. No other random generator advances.
    """
    order = np.random.RandomState(seed).permutation(batches).tolist()
    return order[:plots] if plots > 0 else order
