"""Views: which part of an image is cut out, and the size it is resized to."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

Box = tuple[int, int, int, int]  # y1, y2, x1, x2, half-open


class FixedView:
    """A view that shows the same pixels of an image whenever it is asked: where a box of that image comes to lie."""

    def place_box(self, box: tuple[int, int, int, int], width: int, height: int) -> Box:
        """Where the box x0, y0, x1, y1 of an image of width x height pixels lies in the pixels that are cut out of it.

        Clipped to these, and cut to whole pixels towards zero; a box that the view does not show comes back empty.
        """
        _, (rows, columns) = self.plan(height, width, None)
        down, across = center_offset(self.size, rows, columns)
        x0, y0, x1, y1 = box
        seen = [y * rows // height - down for y in (y0, y1)] + [x * columns // width - across for x in (x0, x1)]
        return tuple(min(max(side, 0), self.size) for side in seen)


def center_offset(size: int, rows: int, columns: int) -> tuple[int, int]:
    """First row and column of the centre of size x size."""
    return (rows - size) // 2, (columns - size) // 2


@dataclass(frozen=True)
class CenterCrop(FixedView):
    """The shorter side resized to `resize`, then the centre of `size` x `size`."""

    size: int
    resize: int
    # of the size wanted, that reduced decoding leaves at least: 2 keeps evaluation within 0.8 of 255 on average of
    # full decoding (1 would be 2)
    margin: ClassVar[int] = 2

    def __post_init__(self):
        if self.resize < self.size:
            raise ValueError(f"a centre of {self.size} pixels does not fit into a side of {self.resize}")

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """The part of the image that is needed, and the rows and columns it is resized to."""
        scale = self.resize / min(height, width)
        return (0, height, 0, width), (max(self.size, round(height * scale)), max(self.size, round(width * scale)))


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop: a share of the area in [min_scale, max_scale], an aspect ratio in [3/4, 4/3]."""

    size: int
    min_scale: float = 0.08
    max_scale: float = 1.0
    margin: ClassVar[int] = 1  # never to be enlarged again

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """As CenterCrop.plan(). draws: one sample's of engine.data.sample_rng.draw_crop_numbers()."""
        for share, shape, down, across in draws.tolist():
            area = height * width * (self.min_scale + (self.max_scale - self.min_scale) * share)
            ratio = (4 / 3) ** (2 * shape - 1)  # uniform in its logarithm
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
                return (top, top + h, left, left + w), (self.size, self.size)
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
        return (top, top + h, left, left + w), (self.size, self.size)


@dataclass(frozen=True)
class SquashedView(FixedView):
    """The whole image squeezed into `resize` x `resize`, whatever its shape, then the centre of `size` x `size`.

    resize None: `size` itself.
    """

    size: int
    resize: int | None = None
    margin: ClassVar[int] = 2  # as for CentreView

    def plan(self, height: int, width: int, draws: torch.Tensor | None) -> tuple[Box, tuple[int, int]]:
        """The whole image, and the rows and columns it is resized to."""
        side = self.resize or self.size
        return (0, height, 0, width), (side, side)


View = CenterCrop | RandomCrop | SquashedView
