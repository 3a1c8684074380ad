"""Read images that are in a tensor as image files are read: random resized crops, in worker processes."""

from typing import ClassVar

import torch

from engine.data.resize import resize_pixels
from engine.data.sample_rng import draw_crop_numbers
from engine.data.views import RandomCrop


class ImageTensor:
    """Images uint8 (N, H, W, 3) with a random crop, or without one. Workers share the memory of the tensor."""

    remedy: ClassVar[str] = ""  # these images are always readable

    def __init__(self, pixels: torch.Tensor, view: RandomCrop | None):
        self.pixels, self.view = pixels, view

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Read a batch; see engine.data.image_files.ImageFiles.read()."""
        indices = torch.tensor(index, dtype=torch.long)
        if self.view is None:
            return self.pixels[indices], indices, None
        height, width = self.pixels.shape[1:3]
        crops, boxes = [], []
        for position, draws in zip(index, draw_crop_numbers(seed, epoch, index), strict=True):
            (y1, y2, x1, x2), (rows, columns) = self.view.plan(height, width, draws)
            part = self.pixels[position, y1:y2, x1:x2].unsqueeze(0)
            crops.append(resize_pixels(part, rows, columns, self.view.interpolation))
            boxes.append([y1 / height, y2 / height, x1 / width, x2 / width])
        return torch.cat(crops), indices, torch.tensor(boxes)
