"""The occlusion curve: accuracy as more and more of the image is hidden.

`patches`: random cells of a grid, the PatchDrop of Naseer et al., NeurIPS 2021, arXiv 2105.10497, Sec. 3.1. `centre`: a
hole in the middle, the centre occlusion of CutMix: Yun et al., ICCV 2019, arXiv 1905.04899, Sec. 4.4.
"""

import itertools
from collections.abc import Sequence

import torch

from engine.data.sample_rng import uniform
from engine.drawing.figures import list_colours, place_legend

KINDS = {"patches": "random patches", "centre": "centred hole"}
FRACTIONS = tuple(number / 8 for number in range(8))  # of the area: 0 to 0.875
GRID = 8  # cells per side
LINE_STYLES = {"patches": "-", "centre": "--"}


def occlude(
    pixels: torch.Tensor, kind: str, fraction: float, index: torch.Tensor, fill: tuple[float, float, float], seed: int
) -> torch.Tensor:
    """Hide a fraction of the area of pixels (B, 3, H, W) with the colour `fill`. index (B,): positions in the set.

    Whatever is hidden at one fraction is hidden at every larger one. Raises ValueError for an unknown kind or a
    fraction outside 0..1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in 0..1, got {fraction}")
    size = pixels.shape[-2:]
    if kind == "patches":
        hidden = make_random_patches(index.to(pixels.device, non_blocking=True), fraction, *size, seed=seed)
    else:
        hidden = make_centre_hole(fraction, *size, pixels.device)
    colour = torch.tensor(fill, dtype=pixels.dtype).to(pixels.device, non_blocking=True)
    return torch.lerp(pixels, colour.view(1, -1, 1, 1), hidden.to(pixels.dtype))


def make_random_patches(index: torch.Tensor, fraction: float, height: int, width: int, seed: int) -> torch.Tensor:
    """Return (B, 1, H, W) bool: this fraction of the cells of an 8 x 8 grid, at random.

    Smaller images have fewer cells. The number of cells is exact, and so is the area if 8 divides both sides; otherwise
    cells differ by one row or column.
    """
    rows, columns = min(GRID, height), min(GRID, width)
    order = uniform(index, (rows * columns,), seed=seed, purpose="hidden patches").argsort(dim=1, stable=True)
    hidden = order < round(fraction * rows * columns)  # the first cells in a random order: nested as the fraction grows
    cell_row = torch.arange(height, device=index.device) * rows // height  # (H,) the cell that each pixel row is in
    cell_column = torch.arange(width, device=index.device) * columns // width
    return hidden.view(-1, 1, rows, columns)[:, :, cell_row[:, None], cell_column]


def make_centre_hole(fraction: float, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return (1, 1, H, W) in 0..1: how much of each pixel lies in a centred hole of exactly that fraction of the area.

    The hole has the proportions of the image. Pixels on its border lie in it in part and are blended.
    """
    sides = []
    for length in (height, width):
        margin = (length - length * fraction**0.5) / 2
        pixel = torch.arange(length, device=device, dtype=torch.float32)
        sides.append(((pixel + 1).clamp(max=length - margin) - pixel.clamp(min=margin)).clamp(min=0))
    return (sides[0].unsqueeze(1) * sides[1]).view(1, 1, height, width)


def area_under_curve(fractions: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the mean accuracy along the curve: its trapezoidal area divided by the range of the fractions.

    Raises ValueError unless the fractions increase, there are at least two, and there is one accuracy for each.
    """
    steps = [after - before for before, after in itertools.pairwise(fractions)]
    if len(fractions) != len(accuracies) or not steps or min(steps) <= 0:
        raise ValueError(
            f"expected two or more increasing fractions and an accuracy each, got {fractions}, {accuracies}"
        )
    means = [(before + after) / 2 for before, after in itertools.pairwise(accuracies)]
    return sum(step * mean for step, mean in zip(steps, means, strict=True)) / sum(steps)


def draw_curves(axes, results: list[tuple[str, dict[str, dict[str, list[float]]]]]) -> None:
    """Draw the curves in one colour for each classifier, solid for random patches and dashed for the centred hole.

    axes: Matplotlib axes. results: names, and for each kind the lists `share` (0..1) and `top1` (percent).
    """
    for colour, (name, curves) in zip(list_colours(len(results)), results, strict=True):
        axes.plot([], [], color=colour, label=name)
        for kind, curve in curves.items():
            percent = [100 * fraction for fraction in curve["share"]]
            axes.plot(percent, curve["top1"], LINE_STYLES[kind], color=colour, marker=".")
    for kind in KINDS:
        if any(kind in curves for _, curves in results):
            axes.plot([], [], LINE_STYLES[kind], color="0.4", label=KINDS[kind])
    axes.set(xlabel="hidden (% of the area)", ylabel="top-1 accuracy (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    place_legend(axes)
