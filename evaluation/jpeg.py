"""JPEG compression as batched tensor operations."""

import math
from functools import lru_cache

import torch
from torch.nn import functional as F

from evaluation.image_ops import BatchRNG, to_grayscale, to_levels

LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)  # ITU-T T.81, table K.1
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)  # table K.2


def jpeg_compression(pixels: torch.Tensor, strength: int, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Apply JPEG's transform and quantisation, with chroma at half resolution, at the published qualities.

    The result is what a decoder shows, to within about one level. strength: libjpeg's quality, 1 to 100.
    """
    height, width = pixels.shape[-2:]
    padded = F.pad(to_levels(pixels), (0, -width % 16, 0, height % 2), mode="replicate")
    red, _, blue = padded.split(1, 1)
    luma = to_grayscale(padded)
    chroma = torch.cat([(blue - luma) / 1.772, (red - luma) / 1.402], 1).round()  # Cb and Cr, centred on 0
    luma = quantize_blocks(luma.round() - 128, LUMA, strength) + 128
    chroma = quantize_blocks(round_half_up(F.avg_pool2d(chroma, 2)), CHROMA, strength)
    blue, red = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False).split(1, 1)
    blue, red = 1.772 * blue, 1.402 * red
    green = -(0.114 * blue + 0.299 * red) / 0.587
    return (luma + torch.cat([red, green, blue], 1))[..., :height, :width] / 255


def round_half_up(values: torch.Tensor) -> torch.Tensor:
    """Round to integers, halves up; the margin makes values that miss a half by float error count as halves."""
    return (values + 0.5 + 1e-4).floor()


def quantize_blocks(plane: torch.Tensor, table: tuple, quality: int) -> torch.Tensor:
    """Apply the 8 x 8 DCT, quantise, and invert it. plane: integers -128..127 (B, C, H, W) -> the same."""
    size = plane.shape[2:]
    plane = F.pad(plane, (0, -size[1] % 8, 0, -size[0] % 8), mode="replicate")
    count, channels, height, width = plane.shape
    steps = make_quantization_steps(table, quality, plane.device).unsqueeze(2)
    position = torch.arange(8, device=plane.device)
    cosines = (position.unsqueeze(1) * (2 * position + 1) * (math.pi / 16)).cos() / 2  # (frequency, position)
    cosines = torch.cat([cosines[:1] / math.sqrt(2), cosines[1:]])
    blocks = plane.view(count, channels, height // 8, 8, width // 8, 8).permute(3, 5, 0, 1, 2, 4).flatten(2)
    coefficients = dct_blocks(blocks, cosines) / steps
    coefficients = round_half_up(coefficients.abs()) * coefficients.sign() * steps
    blocks = dct_blocks(coefficients, cosines.T).round().clamp(-128, 127)
    blocks = blocks.view(8, 8, count, channels, height // 8, width // 8).permute(2, 3, 4, 0, 5, 1)
    return blocks.reshape(plane.shape)[..., : size[0], : size[1]]


@lru_cache(maxsize=32)
def make_quantization_steps(table: tuple, quality: int, device: torch.device) -> torch.Tensor:
    """Return the quantisation steps (8, 8) of a libjpeg quality, made once per device: a copy would wait."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality  # scale of the table, as in libjpeg
    return torch.tensor(table).mul(percent).add(50).div(100, rounding_mode="floor").clamp(1, 255).to(device)


def dct_blocks(blocks: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return matrix @ block @ matrix.T for blocks (8, 8, N), summed term by term."""
    rows = sum(matrix[:, k].view(8, 1, 1) * blocks[k] for k in range(8))
    return sum(matrix[:, k].view(1, 8, 1) * rows[:, k : k + 1] for k in range(8))
