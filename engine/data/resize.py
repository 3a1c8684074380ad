"""Resize uint8 images as Pillow and torchvision do: separable, anti-aliased, each pass rounded to 8 bits."""

import torch
from torch.nn import functional as F


def resize_pixels(pixels: torch.Tensor, rows: int, columns: int, interpolation: str) -> torch.Tensor:
    """Resize uint8 (B, H, W, 3) to (B, rows, columns, 3). interpolation: `bilinear` or `bicubic`.

    torch's uint8 kernel runs on the CPU only. Other devices round and clamp the floats of each pass, as the kernel
    does, so the results differ by at most two levels of 255.
    """
    if pixels.shape[1:3] == (rows, columns):
        return pixels
    images = pixels.permute(0, 3, 1, 2)  # torch sees this as channels_last: 1.5x faster
    if images.device.type == "cpu":
        images = F.interpolate(images, (rows, columns), mode=interpolation, antialias=True)
    else:
        images = resize_in_passes(images, rows, columns, interpolation)
    return images.permute(0, 2, 3, 1)


def resize_in_passes(images: torch.Tensor, rows: int, columns: int, interpolation: str) -> torch.Tensor:
    """Resize uint8 (B, 3, H, W) to (B, 3, rows, columns) on any device: first the width, then the height."""
    values = images.float()
    for shape in ((images.shape[2], columns), (rows, columns)):
        values = F.interpolate(values, shape, mode=interpolation, antialias=True).round_().clamp_(0, 255)
    return values.to(torch.uint8)
