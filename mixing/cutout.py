"""Cutout: cut a square hole into every image.

DeVries and Taylor, arXiv 1708.04552, Sec. 3. The centre may be any pixel, so a hole can reach beyond the border. Holes
are filled with 0 after normalisation, the mean colour. Labels stay the same. Only training images get holes.
"""

import torch

from .base import Mixer
from .ops import box_mask


def hole_mask(rows: torch.Tensor, columns: torch.Tensor, length: int, height: int, width: int) -> torch.Tensor:
    """Return masks (B, 1, H, W) bool, True inside the holes.

    Each hole is a square with side 2 (length // 2) around a pixel; rows and columns are (B, holes).
    """
    half = length // 2
    boxes = torch.stack([rows - half, rows + half, columns - half, columns + half], dim=-1)  # (B, holes, 4)
    return box_mask(boxes.flatten(0, 1), height, width).view(len(rows), -1, height, width).any(1, keepdim=True)


def erase(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, length: int) -> torch.Tensor:
    """Return images (B, C, H, W) with zeros inside the holes of hole_mask()."""
    holes = hole_mask(rows, columns, length, *images.shape[-2:])
    return torch.where(holes, 0.0, images)  # masked_fill would not keep the memory format


class Cutout(Mixer):
    """Cuts n_holes square holes with a side of cutout_length pixels into each image."""

    keeps_labels = True

    def __init__(self, cutout_length: int = 16, n_holes: int = 1):
        if cutout_length < 1 or n_holes < 1:
            raise ValueError(f"cutout_length and n_holes must be at least 1, got {cutout_length} and {n_holes}")
        self.cutout_length, self.n_holes = cutout_length, n_holes

    def __call__(self, images, targets, source=None):
        shape, size, device = (len(images), self.n_holes), images.shape[-2:], images.device
        rows = torch.randint(size[0], shape, device=device)
        columns = torch.randint(size[1], shape, device=device)
        self.set_weight(images, lambda: ~hole_mask(rows, columns, self.cutout_length, *size).squeeze(1), partner=None)
        return erase(images, rows, columns, self.cutout_length), targets
