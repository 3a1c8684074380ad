"""Define views: the part of an image that is cropped, and the size it is resized to."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

Box = tuple[int, int, int, int]  # y1, y2, x1, x2, half-open


class FixedView:
    """A view that always shows the same part of an image, so that boxes can be mapped into it."""

    def place_box(self, box: tuple[int, int, int, int], width: int, height: int) -> Box:
        """Map the box x0, y0, x1, y1 of an image of width x height pixels to y1, y2, x1, x2 in pixels of the view.

        The result is rounded down and clipped to the view. A box outside the view becomes empty.
        """
        _, (rows, columns) = self.plan(height, width, None)
        down, across = center_offset(self.size, rows, columns)
        x0, y0, x1, y1 = box
        seen = [y * rows // height - down for y in (y0, y1)] + [x * columns // width - across for x in (x0, x1)]
        return tuple(min(max(side, 0), self.size) for side in seen)


def center_offset(size: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the first row and column of the size x size centre crop of rows x columns pixels."""
    return (rows - size) // 2, (columns - size) // 2


@dataclass(frozen=True)
class CenterCrop(FixedView):
    """Resize the shorter side to `resize`, then crop the centre of `size` x `size`."""

    size: int
    resize: int
    interpolation: str = "bilinear"  # or bicubic
    # Reduced decoding keeps at least this multiple of the target size. With 2, evaluation images differ from fully
    # decoded ones by 0.8 of 255 on average (with 1, by 2).
    margin: ClassVar[int] = 2

    def __post_init__(self):
        if self.resize < self.size:
            raise ValueError(f"a centre crop of {self.size} pixels does not fit into an image resized to {self.resize}")

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """Return the box y1, y2, x1, x2 to read, and the rows and columns to resize it to."""
        scale = self.resize / min(height, width)
        return (0, height, 0, width), (max(self.size, round(height * scale)), max(self.size, round(width * scale)))


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop: area fraction in [min_scale, max_scale], aspect ratio in [3/4, 4/3]."""

    size: int
    min_scale: float = 0.08
    max_scale: float = 1.0
    interpolation: str = "bilinear"
    margin: ClassVar[int] = 1  # reduced decoding must not make enlarging necessary

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """Return box and size as CenterCrop.plan() does. draws: one row of sample_rng.draw_crop_numbers()."""
        for share, shape, down, across in draws.tolist():
            area = height * width * (self.min_scale + (self.max_scale - self.min_scale) * share)
            ratio = (4 / 3) ** (2 * shape - 1)  # log-uniform
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
                return (top, top + h, left, left + w), (self.size, self.size)
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
        return (top, top + h, left, left + w), (self.size, self.size)


@dataclass(frozen=True)
class SquashedView(FixedView):
    """Resize the image to `resize` x `resize`, ignoring its aspect ratio, then crop the centre of `size` x `size`.

    resize None: the same as size, so nothing is cropped.
    """

    size: int
    resize: int | None = None
    interpolation: str = "bilinear"
    margin: ClassVar[int] = 2  # see CenterCrop

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """Return the box of the whole image, and the rows and columns to resize it to."""
        side = self.resize or self.size
        return (0, height, 0, width), (side, side)


View = CenterCrop | RandomCrop | SquashedView
