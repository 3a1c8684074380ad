"""Batched image operations that several corruptions share."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.data import sample_rng


@dataclass(frozen=True)
class BatchRNG:
    """Random numbers for the images of a batch, for one corruption at one severity."""

    index: torch.Tensor  # (B,) positions in the data set
    seed: int
    purpose: str
    device: torch.device

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """Return float32 (B, *shape) in [0, 1). Draws of different names are independent."""
        purpose = f"{self.purpose}/{name}"
        return sample_rng.uniform(self.index, shape, seed=self.seed, purpose=purpose, device=self.device)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Return float32 (B, *shape) with mean 0 and standard deviation 1."""
        purpose = f"{self.purpose}/{name}"
        return sample_rng.normal(self.index, shape, seed=self.seed, purpose=purpose, device=self.device)


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """Round pixels in 0..1 to the levels k / 255 of an 8-bit image."""
    return to_levels(pixels) / 255


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels in 0..1 to integers 0..255, still float32."""
    return (pixels * 255).round().clamp(0, 255)


def pad_reflect(images: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """Add `width` values at both ends of `dim`, mirrored with the edge repeated, as often as needed."""
    size = images.shape[dim]
    index = torch.arange(-width, size + width, device=images.device).remainder(2 * size)
    return images.index_select(dim, torch.minimum(index, 2 * size - 1 - index))


def weighted_sum(images: torch.Tensor, dim: int, weights: list[float]) -> torch.Tensor:
    """Correlate along `dim` with an odd number of weights; the size stays."""
    padded, size = pad_reflect(images, dim, len(weights) // 2), images.shape[dim]
    out = torch.zeros_like(images)
    for offset, weight in enumerate(weights):
        out.add_(padded.narrow(dim, offset, size), alpha=weight)
    return out


def gaussian_kernel(sigma: float, radius: int) -> list[float]:
    """Return 2 * radius + 1 weights of a Gaussian that sum to 1."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def gaussian_blur(images: torch.Tensor, sigma: float, truncate: float) -> torch.Tensor:
    """Blur images (B, C, H, W) with a Gaussian of sigma pixels, cut off at `truncate` sigmas."""
    weights = gaussian_kernel(sigma, int(truncate * sigma + 0.5))
    return weighted_sum(weighted_sum(images, 2, weights), 3, weights)


def motion_smear(images: torch.Tensor, radius: float, sigma: float, angle: torch.Tensor) -> torch.Tensor:
    """Smear every pixel of (B, C, H, W) one way, with half a Gaussian of sigma pixels over 2 * radius + 1 pixels.

    angle (B, H, W) or (B, 1, 1): the direction in which a pixel gathers, in radians, rounded to whole pixels; beyond
    the border the edge is repeated. With one angle per image this is ImageMagick's motion blur.
    """
    height, width = images.shape[-2:]
    weights = gaussian_kernel(sigma, 2 * math.ceil(radius))
    weights = weights[len(weights) // 2 :]
    row, column = torch.arange(height, device=angle.device).unsqueeze(1), torch.arange(width, device=angle.device)
    down, across = angle.sin(), angle.cos()
    flat, out = images.flatten(2), torch.zeros_like(images).flatten(2)
    for step, weight in enumerate(weights):
        rows = (row + (step * down).round()).clamp(0, height - 1)
        columns = (column + (step * across).round()).clamp(0, width - 1)
        index = (rows * width + columns).long().flatten(1)
        out.add_(gather_pixels(flat, index), alpha=weight / sum(weights))
    return out.view_as(images)


def gather_pixels(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather flat (B, C, N) at index (B, N), the same for all channels."""
    return flat.gather(2, index.unsqueeze(1).expand_as(flat))


def zoom_image(images: torch.Tensor, factor: float, height: int, width: int) -> torch.Tensor:
    """Enlarge the centre of (B, C, ...) `factor` times, bilinear with aligned corners, to (B, C, height, width)."""
    crop = [math.ceil(size / factor) for size in (height, width)]
    top, left = ((size - part) // 2 for size, part in zip(images.shape[-2:], crop, strict=True))
    middle = images[..., top : top + crop[0], left : left + crop[1]]
    size = [round(part * factor) for part in crop]
    large = F.interpolate(middle, size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[..., top : top + height, left : left + width]


def prefix_sums(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sums of the first 0, 1, ... values along `dim`, int32, which are exact in any order."""
    zero = torch.zeros_like(values.narrow(dim, 0, 1))
    return torch.cat([zero, values.cumsum(dim, dtype=torch.int32)], dim)


def draw_plasma_fractal(rng: BatchRNG, height: int, width: int, decay: float) -> torch.Tensor:
    """Return noise (B, 1, H, W) in 0..1 of every scale down to a pixel, by the diamond-square algorithm.

    It runs on a torus whose side is a power of two. Each halving of the scale divides the added noise by `decay`.
    """
    field = torch.zeros(len(rng.index), 1, 1, 1, device=rng.device)
    for octave in range(math.ceil(math.log2(max(height, width)))):
        noise = (2 * rng.uniform(f"octave {octave}", 3, *field.shape[2:]) - 1) * decay**-octave
        row_pairs, column_pairs = field + field.roll(-1, 3), field + field.roll(-1, 2)
        middle = (row_pairs + row_pairs.roll(-1, 2)) / 4 + noise[:, :1]  # the square step
        right = (row_pairs + middle + middle.roll(1, 2)) / 4 + noise[:, 1:2]  # the diamond step
        under = (column_pairs + middle + middle.roll(1, 3)) / 4 + noise[:, 2:]
        upper, lower = torch.stack([field, right], 4).flatten(3), torch.stack([under, middle], 4).flatten(3)
        field = torch.stack([upper, lower], 3).flatten(2, 3)  # twice the resolution
    field = field[..., :height, :width]
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low)


def to_grayscale(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luma (B, 1, H, W) of JPEG (ITU-R BT.601)."""
    red, green, blue = pixels.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
