"""GridMix: paste the partner's pixels inside a grid of small boxes.

Baek et al., Pattern Recognition 109, 107594, 2021. The grid is drawn as in OpenMixup. The labels of patches, the
second part of the paper, are left out.
"""

import math

import torch

from .base import Mixer
from .ops import blend, check_probability, draw_lam, draw_partner


def grid_mask(
    lam: torch.Tensor,
    holes: torch.Tensor,
    hole_aspect: torch.Tensor,
    grid_area: torch.Tensor,
    grid_aspect: torch.Tensor,
    place: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """Return masks (B, 1, H, W) bool, True where the partner shows.

    lam (B,): holes cover the share 1 - lam of their cells, but for rounding. holes (B,): cells along the width of the
    grid; hole_aspect (B,): height of a cell relative to its width. grid_area (B,): area of the grid relative to that of
    the image; grid_aspect (B,): its height relative to its width. place (B, 2): row and column of its corner, from 0,
    the first possible one, to 1, the last. A grid that is larger than the image is cut at the borders.
    """
    grid_width = ((height * width * grid_area).floor() / grid_aspect).sqrt().floor()
    grid_height = (grid_width * grid_aspect).floor()
    top = ((height - grid_height) * place[:, 0]).trunc()
    left = ((width - grid_width) * place[:, 1]).trunc()
    cell_width = (grid_width / holes).ceil()
    cell_height = (cell_width * hole_aspect).floor()
    side = (1 - lam).sqrt()
    rows = inside_holes(height, top, grid_height, cell_height, side)
    columns = inside_holes(width, left, grid_width, cell_width, side)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)


def inside_holes(size: int, start, length, cell, side) -> torch.Tensor:
    """Return which of `size` pixels lie in the holes along one dimension, (B, size) bool.

    start, length (B,): of the grid; cell (B,): length of a cell; side (B,): of a hole relative to its cell.
    """
    hole = (cell * side).floor().clamp(min=1).minimum(cell - 1).unsqueeze(1)
    offset = torch.arange(size, device=start.device) - start.unsqueeze(1)
    in_grid = (offset >= 0) & (offset < length.unsqueeze(1))
    return in_grid & (offset.remainder(cell.clamp(min=1).unsqueeze(1)) < hole)


class GridMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha); targets follow the area, of which the partner has less than 1 - lam.

    grid_holes, hole_aspect, grid_area, grid_aspect: ranges of the uniform draws of grid_mask(). All is drawn once per
    batch, or per image with in_batch. mix_prob: probability that a batch is mixed. Holes leave at least one pixel of
    their cell, so that in cells of one pixel there are none. check_size() raises ValueError for images in which no cell
    could have a hole.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.2,
        grid_holes: tuple[int, int] = (2, 6),
        hole_aspect: tuple[float, float] = (1.0, 1.0),
        grid_area: tuple[float, float] = (0.5, 1.0),
        grid_aspect: tuple[float, float] = (0.5, 2.0),
        mix_prob: float = 1.0,
        in_batch: bool = False,
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        if grid_holes[0] < 1 or grid_holes[1] < grid_holes[0]:
            raise ValueError(f"grid_holes must be two ascending numbers of at least 1, got {tuple(grid_holes)}")
        for name, (low, high) in {
            "hole_aspect": hole_aspect,
            "grid_area": grid_area,
            "grid_aspect": grid_aspect,
        }.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two ascending positive numbers, got {(low, high)}")
        if grid_area[1] > 1:
            raise ValueError(f"grid_area must be at most 1, got {grid_area}")
        self.mixup_alpha, self.grid_holes, self.hole_aspect = mixup_alpha, tuple(grid_holes), tuple(hole_aspect)
        self.grid_area, self.grid_aspect, self.in_batch = tuple(grid_area), tuple(grid_aspect), in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def check_size(self, height, width):
        largest = int(math.sqrt(height * width * self.grid_area[1] / self.grid_aspect[0]))  # width of a grid
        cell_width = math.ceil(largest / self.grid_holes[0])
        cell_height = int(cell_width * self.hole_aspect[1])
        if min(cell_height, cell_width) < 2:
            raise ValueError(
                f"grid_holes: at {height}x{width} pixels the largest cell has {cell_height}x{cell_width}: too few "
                "for a hole, so nothing is mixed; take fewer grid_holes, a larger hole_aspect or a smaller grid_aspect"
            )

    def mix_batch(self, images, targets, source):
        partner = draw_partner(images)
        mask = self.draw_mask(images)
        self.set_weight(images, lambda: ~mask.squeeze(1), partner)
        lam = 1.0 - mask.flatten(1).float().mean(1)
        return torch.where(mask, images[partner], images), blend(targets, partner, lam)

    def draw_mask(self, images: torch.Tensor) -> torch.Tensor:
        """Return grid_mask() of random draws."""
        number, device = len(images) if self.in_batch else 1, images.device
        lam = draw_lam(self.mixup_alpha, images[:number], per_image=True)
        low, high = self.grid_holes
        holes = torch.randint(low, high + 1, (number,), device=device)
        ranges = (self.hole_aspect, self.grid_area, self.grid_aspect)
        draws = [low + (high - low) * torch.rand(number, device=device) for low, high in ranges]
        return grid_mask(lam, holes, *draws, torch.rand(number, 2, device=device), *images.shape[-2:])
