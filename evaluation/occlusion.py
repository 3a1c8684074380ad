"""The occlusion curve: how accuracy falls as more of the image is hidden.

`patches`: random cells of a grid, the PatchDrop of Naseer et al., NeurIPS 2021, arXiv 2105.10497, Sec. 3.1. `centre`: a
hole in the middle, the centre occlusion of CutMix: Yun et al., ICCV 2019, arXiv 1905.04899, Sec. 4.4.
"""

import itertools
from collections.abc import Sequence

import torch

from engine.data.sample_rng import uniform

KINDS = {"patches": "random patches", "centre": "centred hole"}
SHARES = tuple(number / 8 for number in range(8))  # of the area: 0 to 0.875
GRID = 8  # cells per side
LINE_STYLES = {"patches": "-", "centre": "--"}


def occlude(
    pixels: torch.Tensor, kind: str, share: float, index: torch.Tensor, fill: tuple[float, float, float], seed: int
) -> torch.Tensor:
    """pixels (B, 3, H, W) with that share of their area in the colour `fill`. index (B,): positions in the set.

    What is hidden at one share is hidden at every larger one. ValueError for an unknown kind or a share outside 0..1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, got {share}")
    size = pixels.shape[-2:]
    if kind == "patches":
        hidden = draw_patches(index.to(pixels.device, non_blocking=True), share, *size, seed=seed)
    else:
        hidden = make_centre_hole(share, *size, pixels.device)
    colour = torch.tensor(fill, dtype=pixels.dtype).to(pixels.device, non_blocking=True)
    return torch.lerp(pixels, colour.view(1, -1, 1, 1), hidden.to(pixels.dtype))


def draw_patches(index: torch.Tensor, share: float, height: int, width: int, seed: int) -> torch.Tensor:
    """(B, 1, H, W) bool: that share of the cells of a grid of 8 x 8, of fewer where the image has fewer pixels.

    The number of cells is exact, so the area is where 8 divides both sides; otherwise cells differ by a row or column.
    """
    rows, columns = min(GRID, height), min(GRID, width)
    order = uniform(index, (rows * columns,), seed=seed, purpose="hidden patches").argsort(dim=1, stable=True)
    hidden = order < round(share * rows * columns)  # of cells in random order the first: nested as the share grows
    down = torch.arange(height, device=index.device) * rows // height  # (H,) the row of cells of each row of pixels
    across = torch.arange(width, device=index.device) * columns // width
    return hidden.view(-1, 1, rows, columns)[:, :, down[:, None], across]


def make_centre_hole(share: float, height: int, width: int, device: torch.device) -> torch.Tensor:
    """(1, 1, H, W) in 0..1: how much of each pixel is in a hole of the image's proportions and exactly that share.

    A square of a square image. The pixels at its border are in it in part, and become a blend.
    """
    sides = []
    for length in (height, width):
        near = (length - length * share**0.5) / 2
        pixel = torch.arange(length, device=device, dtype=torch.float32)
        sides.append(((pixel + 1).clamp(max=length - near) - pixel.clamp(min=near)).clamp(min=0))
    return (sides[0].unsqueeze(1) * sides[1]).view(1, 1, height, width)


def area_under_curve(shares: Sequence[float], accuracies: Sequence[float]) -> float:
    """The mean accuracy along the curve: its area by the trapezoidal rule, divided by the range of the shares.

    Raises ValueError unless there are as many of both, two at least, and the shares increase.
    """
    steps = [after - before for before, after in itertools.pairwise(shares)]
    if len(shares) != len(accuracies) or not steps or min(steps) <= 0:
        raise ValueError(f"expected two or more increasing shares, each with its accuracy, got {shares}, {accuracies}")
    means = [(before + after) / 2 for before, after in itertools.pairwise(accuracies)]
    return sum(step * mean for step, mean in zip(steps, means, strict=True)) / sum(steps)


def draw_curves(axes, results: list[tuple[str, dict[str, dict[str, list[float]]]]]) -> None:
    """A colour for each classifier, solid for random patches and dashed for the centred hole.

    axes: matplotlib's. results: names, and for each kind the lists `share` (0..1) and `top1` (percent).
    """
    for number, (name, curves) in enumerate(results):
        colour = f"C{number % 10}"
        axes.plot([], [], color=colour, label=name)
        for kind, curve in curves.items():
            percent = [100 * share for share in curve["share"]]
            axes.plot(percent, curve["top1"], LINE_STYLES[kind], color=colour, marker=".")
    for kind in KINDS:
        if any(kind in curves for _, curves in results):
            axes.plot([], [], LINE_STYLES[kind], color="0.4", label=KINDS[kind])
    axes.set(xlabel="hidden (% of the area)", ylabel="top-1 accuracy (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
