"""Image corruptions computed on the device: noise, blur, weather and digital, 15 corruptions at five severities.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
arXiv 1903.12261, Sec. 4.1 and Appendix B. Names, ideas and strengths are the paper's. Images whose shorter side is
below 96 pixels get the strengths of CIFAR-10-C, larger ones those of ImageNet-C; lengths in pixels are scaled by
side / 32 and side / 224. The implementation is this project's own, and each function says where it differs. Accuracies
therefore compare classifiers with each other, but not with published tables. Some published steps do not increase the
strength: snow is denser at severity 2 than at 3, glass_blur of CIFAR-10-C blurs at 3 what it scatters at 2, and
elastic_transform trades shift for distortion.

The random numbers of an image depend only on the seed, the corruption, the severity and its position in the data set.
All operations are gathers, shifts and elementwise arithmetic. The last bits of a convolution or a matrix product would
depend on the batch size, and on CUDA on TF32, and rounding or thresholding would make the difference visible.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional as F

from engine.errors import suggest_closest
from evaluation.image_ops import (
    BatchRNG,
    draw_plasma_fractal,
    gather_pixels,
    gaussian_blur,
    gaussian_kernel,
    motion_smear,
    pad_reflect,
    prefix_sums,
    quantize,
    to_grayscale,
    to_levels,
    weighted_sum,
    zoom_image,
)
from evaluation.jpeg import jpeg_compression

SEVERITIES = (1, 2, 3, 4, 5)
MIN_IMAGENET_SIDE = 96  # smallest shorter side, in pixels, that gets the strengths of ImageNet-C


@torch.no_grad()
def corrupt(pixels: torch.Tensor, name: str, severity: int, index: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Apply the corruption `name` of CORRUPTIONS: return new float32 images (B, 3, H, W) on the 256 levels k / 255.

    pixels (B, 3, H, W) in 0..1, H and W at least 8, are first rounded to these levels. severity: 1 to 5. index (B,):
    positions in the data set, which determine the random numbers. Raises ValueError for other arguments.
    """
    if name not in CORRUPTIONS:
        closest = suggest_closest(str(name), CORRUPTIONS)
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {name!r}{closest}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of 1, 2, 3, 4, 5, got {severity!r}")
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < 8:
        raise ValueError(f"pixels must be (B, 3, H, W) with H and W of at least 8, got {tuple(pixels.shape)}")
    if index.shape != pixels.shape[:1]:
        raise ValueError(f"index must have one position for each of {len(pixels)} images, got {tuple(index.shape)}")
    side = min(pixels.shape[-2:])
    large = side >= MIN_IMAGENET_SIDE
    strength = STRENGTHS[name][large][severity - 1]
    rng = BatchRNG(index, seed, f"{name}/{severity}", pixels.device)
    clean = quantize(pixels.float()).contiguous()  # so that the memory format cannot change the order of arithmetic
    return quantize(CORRUPTIONS[name](clean, strength, side / (224 if large else 32), rng))


def gaussian_noise(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Add normal noise to every value; as published. strength: standard deviation."""
    return pixels + strength * rng.normal("noise", *pixels.shape[1:])


def shot_noise(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Replace every value by an exact Poisson count; as published. strength: mean count of a value of 1."""
    chance = (rng.uniform("count", *pixels.shape[1:]) * 2**24).long()
    thresholds = compute_poisson_thresholds(strength, pixels.device)
    level = to_levels(pixels).long()
    index = torch.searchsorted(thresholds.flatten(), level * 2**24 + chance, right=True)
    return (index - level * thresholds.shape[1]) / strength


@lru_cache(maxsize=16)
def compute_poisson_thresholds(strength: float, device: torch.device) -> torch.Tensor:
    """Return int64 (256, K): for each level, 2^24 times (the level + the probability of at most k counts).

    All rows together are one sorted list, in which the position of a uniform draw gives the count. This is inverse
    transform sampling, exact to 2^-24. K = strength is enough, since K or more counts are white anyway.
    """
    mean = torch.linspace(0, strength, 256, dtype=torch.float64).unsqueeze(1)
    count = torch.arange(strength, dtype=torch.float64)
    at_most = torch.special.gammaincc(count + 1, mean)  # the cumulative distribution function
    return ((at_most + torch.arange(256).unsqueeze(1)) * 2**24).long().to(device)


def impulse_noise(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Set single values to 0 or 1; as published. strength: fraction of the values that are replaced."""
    chance = rng.uniform("value", *pixels.shape[1:])
    return pixels.masked_fill(chance < strength / 2, 0).masked_fill(chance >= 1 - strength / 2, 1)


def defocus_blur(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Average over a disk with a softened edge; as published except for reflection at the border.

    strength: radius of the disk, and standard deviation of the Gaussian that softens it, in pixels. The disk is a stack
    of rows, each the difference of two prefix sums.
    """
    radius, soft = scale * strength[0], scale * strength[1]
    reach, (height, width) = int(radius), pixels.shape[-2:]
    sums = prefix_sums(pad_reflect(pad_reflect(to_levels(pixels).int(), 2, reach), 3, reach), 3)
    total, count = torch.zeros_like(pixels, dtype=torch.int32), 0
    for row in range(-reach, reach + 1):
        half = int(math.sqrt(radius**2 - row**2))
        line = sums.narrow(2, reach + row, height)
        total += line.narrow(3, reach + half + 1, width) - line.narrow(3, reach - half, width)
        count += 2 * half + 1
    edge = gaussian_kernel(soft, math.ceil(scale * (1 if strength[0] <= 8 else 2)))
    return weighted_sum(weighted_sum(total / (255 * count), 2, edge), 3, edge)


def glass_blur(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Displace pixels at random between two Gaussian blurs; one normal displacement replaces the published swaps.

    strength: standard deviation of the blur and largest swap in pixels, and number of rounds. In a published round
    every pixel in turn is swapped with one up to `swap` away, so that some move far. A normal displacement with
    standard deviation 0.55 (swap + 1) sqrt(rounds) changes images as much on average, to within a tenth (measured on
    CIFAR-10 and ImageNet at all severities).
    """
    sigma, swap, rounds = strength
    height, width = pixels.shape[-2:]
    shift = rng.normal("shift", 2, height, width) * (0.55 * (swap + 1) * math.sqrt(rounds) * scale)
    rows = shift[:, 0].round().long() + torch.arange(height, device=pixels.device).unsqueeze(1)
    columns = shift[:, 1].round().long() + torch.arange(width, device=pixels.device)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    soft = gaussian_blur(pixels, scale * sigma, 4.0)
    return gaussian_blur(gather_pixels(soft.flatten(2), index.flatten(1)).view_as(soft), scale * sigma, 4.0)


def motion_blur(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Smear along one direction at up to 45 degrees, one-sided Gaussian; as published.

    strength: radius and standard deviation in pixels.
    """
    angle = (rng.uniform("angle", 1, 1) - 0.5) * (math.pi / 2)
    return motion_smear(pixels, scale * strength[0], scale * strength[1], angle)


def zoom_blur(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Average enlargements about the centre; as published. strength: their number, and the step between them."""
    count, step = strength
    total = pixels.clone()
    for zoom in range(count):
        total += zoom_image(pixels, 1 + zoom * step, *pixels.shape[-2:])
    return total / (count + 1)


def snow(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Whiten the image and add flakes: enlarged noise above a threshold, smeared both ways along a steep line; as
    published.

    strength: mean and standard deviation of the noise, its enlargement, threshold, radius and standard deviation of the
    smear, and the fraction of the image that is not whitened.
    """
    mean, std, zoom, threshold, radius, sigma, keep = strength
    height, width = pixels.shape[-2:]
    zoom = max(1.0, scale * zoom)
    noise = rng.normal("flakes", 1, math.ceil(height / zoom), math.ceil(width / zoom))
    flakes = zoom_image(mean + std * noise, zoom, height, width)
    flakes = flakes.masked_fill(flakes < threshold, 0).clamp(max=1)
    angle = (rng.uniform("angle", 1, 1) - 1.5) * (math.pi / 2)  # -135 to -45 degrees
    flakes = motion_smear(flakes, scale * radius, scale * sigma, angle)
    white = torch.maximum(pixels, 1.5 * to_grayscale(pixels) + 0.5)
    return keep * pixels + (1 - keep) * white + flakes + flakes.flip(2, 3)


def frost(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Blend the image with ice, with the published weights; the ice is generated, not cut from photographs.

    strength: weights of the image and of the ice.
    """
    return strength[0] * pixels + strength[1] * draw_ice(rng, *pixels.shape[-2:])


def draw_ice(rng: BatchRNG, height: int, width: int) -> torch.Tensor:
    """Return bluish ice (B, 3, H, W) in 0..1.

    Fine and coarse feathers grow along random curved lines and at 60 degrees to them, with varying thickness.
    """
    thick = ((draw_plasma_fractal(rng, height, width, 2.0) - 0.25) * 2).clamp(0, 1)
    bend = rng.uniform("bend", 1, 3, 3) * (2 * math.pi)
    length = max(1.5, min(height, width) / 56)
    feather = torch.zeros_like(thick)
    for cell in (1, 3):
        size = math.ceil(height / cell), math.ceil(width / cell)
        seeds = rng.uniform(f"seeds {cell}", 1, *size) ** 8
        angle = F.interpolate(bend, size, mode="bicubic", align_corners=True).squeeze(1)
        grown = torch.maximum(*(motion_smear(seeds, length, length, angle + turn) for turn in (0.0, math.pi / 3)))
        feather = torch.maximum(feather, F.interpolate(grown, (height, width), mode="bilinear", align_corners=False))
    bright = (0.2 + 0.5 * thick + (0.06 + 0.24 * thick) * (5 * feather - 1.2)).clamp(0, 1)
    return torch.cat([bright**1.2, bright, bright**0.85], 1)


def fog(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Add a plasma fractal and rescale the sum; as published.

    strength: height of the fractal, and the factor by which each finer octave is lower.
    """
    height, decay = strength
    brightest = pixels.amax((1, 2, 3), keepdim=True)
    return (pixels + height * draw_plasma_fractal(rng, *pixels.shape[-2:], decay)) * (brightest / (brightest + height))


def brightness(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Raise the HSV value, keeping hue and saturation; as published. strength: added to the value."""
    value = pixels.amax(1, keepdim=True)
    raised = (value + strength).clamp(max=1)
    return torch.where(value > 0, pixels * (raised / value.clamp(min=1 / 255)), raised)


def contrast(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Move values towards the image's mean colour; as published. strength: fraction of the distance that stays."""
    total = to_levels(pixels).long().sum((2, 3), keepdim=True)  # integers, so that the order of the sum cannot matter
    mean = total / (255 * pixels.shape[2] * pixels.shape[3])
    return (pixels - mean) * strength + mean


def elastic_transform(pixels: torch.Tensor, strength: tuple, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Apply a random affine map and a smooth random displacement; as published, but in a single resampling.

    strength: height and smoothness (sigma) of the displacement, and how far the affine map moves three corners of a
    centred square, in pixels.
    """
    height, width = pixels.shape[-2:]
    high, sigma, reach = (scale * value for value in strength)
    down = torch.arange(height, device=pixels.device).view(1, 1, -1, 1) - (height - 1) / 2
    across = torch.arange(width, device=pixels.device).view(1, 1, 1, -1) - (width - 1) / 2
    half = min(height, width) // 3
    first, middle, last = ((2 * rng.uniform("corners", 3, 2, 1, 1) - 1) * reach).unbind(1)  # (B, 2, 1, 1) each
    shift = middle + (down + half) / (2 * half) * (first - middle) + (across - half) / (2 * half) * (middle - last)
    if high:
        cell = max(1, int(sigma / 4))  # one draw per cell is enough for such a smooth field
        field = 2 * rng.uniform("field", 2, math.ceil(height / cell), math.ceil(width / cell)) - 1
        field = gaussian_blur(field, sigma / cell, 3.0) * (high / cell)
        shift = shift + F.interpolate(field, (height, width), mode="bilinear", align_corners=False)
    rows, columns = (down + shift[:, :1]) * (2 / height), (across + shift[:, 1:]) * (2 / width)
    grid = torch.stack([columns.squeeze(1), rows.squeeze(1)], 3)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def pixelate(pixels: torch.Tensor, strength: float, scale: float, rng: BatchRNG) -> torch.Tensor:
    """Average over boxes of pixels; as published. strength: fraction of the rows and of the columns that is left."""
    whole = to_levels(pixels).int()
    for dim in (3, 2):  # columns first and rounding in between, as in Pillow
        size = whole.shape[dim]
        cells = max(1, int(size * strength))
        cell = (2 * torch.arange(size, device=pixels.device) + 1) * cells // (2 * size)  # the cell of each pixel
        first = (2 * size * cell + cells) // (2 * cells)
        after = (2 * size * (cell + 1) + cells) // (2 * cells)
        sums = prefix_sums(whole, dim)
        count = (after - first).view([-1 if axis == dim else 1 for axis in range(4)])
        total = sums.index_select(dim, after) - sums.index_select(dim, first)
        whole = ((2 * total + count) // (2 * count)).int()
    return whole / 255


FAMILIES = {  # each maps (pixels, strength, scale, rng) to pixels that are neither clipped nor rounded
    "noise": (gaussian_noise, shot_noise, impulse_noise),
    "blur": (defocus_blur, glass_blur, motion_blur, zoom_blur),
    "weather": (snow, frost, fog, brightness),
    "digital": (contrast, elastic_transform, pixelate, jpeg_compression),
}
CORRUPTIONS: dict[str, Callable] = {each.__name__: each for family in FAMILIES.values() for each in family}
STRENGTHS = {  # at the five severities: those of CIFAR-10-C and of ImageNet-C, from the authors' code
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (
        ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
        ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    ),
    "snow": (
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (  # ImageNet-C: fractions of 244 pixels, a slip for 224 that is in the published images
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
    ),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
