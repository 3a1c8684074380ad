"""Augment a batch on the device: shifted crops, horizontal flips, colour jitter and PCA lighting.

auto_augment.py and erasing.py have what comes after crop and flip, and after normalisation.

Every colour change is affine in the colour of a pixel, and none is clamped (as in the published CutMix code for
ImageNet). All colour changes of an image therefore combine into one 3x4 matrix that depends only on the mean colour of
the image, and the pixels are read once. Constants are written as Python numbers, because a tensor of constants would
have to be copied to the device.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.data.views import RandomCrop

GREY = (0.299, 0.587, 0.114)  # luma weights of ITU-R BT.601; they add up to 1
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class AutoAugment:
    """A policy of torchvision that changes each image at random; see engine.data.auto_augment."""

    policy: str  # rand or trivial; the numbers are those of rand
    ops: int = 2  # operations on an image
    magnitude: float = 9.0  # 0 to 10, where 10 is the strongest
    std: float = 0.0  # standard deviation of the magnitude
    prob: float = 1.0  # of each operation
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images: a crop, a horizontal flip with probability 0.5, a policy, and colours."""

    crop_padding: int = 0  # pixels added on each side before a crop of the original size
    view: RandomCrop | None = None  # resized crop; replaces crop_padding and the view of image files
    color_jitter: float = 0.0  # brightness, contrast and saturation are scaled by 1 - color_jitter to 1 + color_jitter
    lighting: float = 0.0  # standard deviation of a shift along the principal colours of ImageNet
    crop_padding_mode: str = "constant"  # the added pixels are black, or `reflect`
    crop_and_flip: bool = True
    auto: AutoAugment | None = None
    erasing: float = 0.0  # probability that a rectangle of an image is erased

    @property
    def needs_reading(self) -> bool:
        """Whether images are changed one by one where they are read, not as batches on the device."""
        return self.view is not None or self.auto is not None

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw the random numbers for `count` images: name -> (..., count), on the CPU."""
        drawn = {}
        if self.crop_and_flip and self.view is None:
            reach = self.crop_padding
            drawn["shift"] = torch.randint(-reach, reach + 1, (2, count), generator=generator)
        if self.crop_and_flip:
            drawn["flip"] = torch.rand(count, generator=generator) < 0.5
        if self.color_jitter:
            drawn["factors"] = 1 + self.color_jitter * (2 * torch.rand(3, count, generator=generator) - 1)
        if self.lighting:
            drawn["strength"] = self.lighting * torch.randn(3, count, generator=generator)
        return drawn

    def describe(self) -> str:
        """Return a phrase for the log."""
        crop = "random resized crop" if self.view else "random crop"
        parts = [f"{crop} and flip"] if self.crop_and_flip else []
        if auto := self.auto:
            magnitude = f"{auto.magnitude:g}{f' +- {auto.std:g}' if auto.std else ''}"
            chance = f" with probability {auto.prob:g}" if auto.prob < 1 else ""
            rand = f"RandAugment ({auto.ops} of magnitude {magnitude}{chance})"
            parts.append("TrivialAugment" if auto.policy == "trivial" else rand)
        return ", ".join(parts + ([f"random erasing {self.erasing:g}"] if self.erasing else []))


def build_augmentation(
    size: int,
    *,
    trad_augment: bool,
    crop_padding: int | None,
    crop_padding_mode: str,
    min_scale: float | None,
    auto_augment: str,
    rand_augment_ops: int,
    rand_augment_magnitude: float,
    rand_augment_std: float,
    rand_augment_prob: float,
    random_erasing: float,
    interpolation: str,
    color_jitter: float = 0.0,
    lighting: float = 0.0,
) -> Augmentation | None:
    """Return the augmentation that the options of these names ask for, or None. size: of the crops, in pixels.

    min_scale None: crops of padded images. Without trad_augment only the policy and the erasing are left.
    """
    strength = (rand_augment_ops, rand_augment_magnitude, rand_augment_std, rand_augment_prob)
    later = {
        "auto": AutoAugment(auto_augment, *strength, interpolation) if auto_augment != "none" else None,
        "erasing": random_erasing,
    }
    if not trad_augment:
        return Augmentation(crop_and_flip=False, **later) if any(later.values()) else None
    colors = {"color_jitter": color_jitter, "lighting": lighting}
    if min_scale is not None:
        return Augmentation(view=RandomCrop(size, min_scale, interpolation=interpolation), **colors, **later)
    return Augmentation(crop_padding, crop_padding_mode=crop_padding_mode, **colors, **later)


def crop_and_flip_drawn(
    pixels: torch.Tensor, index: torch.Tensor | None, drawn: dict[str, torch.Tensor], mode: str
) -> torch.Tensor:
    """Return the images `index` (B,) of pixels uint8 (N, H, W, 3), shifted and flipped as drawn: (B, H, W, 3).

    index None: all images. drawn: of these images, see Augmentation.draw(). mode: see crop_and_flip().
    """
    shift, flip = drawn.get("shift"), drawn.get("flip")
    if shift is not None:
        index = torch.arange(len(pixels), device=pixels.device) if index is None else index
        return crop_and_flip(pixels, index, *shift, flip, mode)
    pixels = pixels if index is None else pixels.index_select(0, index)
    return pixels if flip is None else torch.where(flip.view(-1, 1, 1, 1), pixels.flip(2), pixels)


def crop_and_flip(
    pixels: torch.Tensor,
    index: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    flip: torch.Tensor,
    mode: str = "constant",
) -> torch.Tensor:
    """Return the images `index` (B,) of pixels uint8 (N, H, W, 3), shifted and possibly flipped: (B, H, W, 3).

    top, left (B,): first row and column of the crop, from -padding to +padding. flip (B,) bool: whether to flip the
    image horizontally. mode: pixels outside the image are black (`constant`) or mirrored at its border (`reflect`).
    """
    height, width = pixels.shape[1:3]
    rows = torch.arange(height, device=pixels.device) + top.unsqueeze(1)  # (B, H)
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(flip.unsqueeze(1), columns.flip(0), columns) + left.unsqueeze(1)  # (B, W)
    if mode == "reflect":
        rows, columns = reflect(rows, height), reflect(columns, width)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    columns = columns.clamp(0, width - 1).unsqueeze(1)
    position = (index.unsqueeze(1) * height + rows.clamp(0, height - 1)).unsqueeze(2) * width + columns  # (B, H, W)
    picked = pixels.view(-1, 3).index_select(0, position.flatten()).view(*position.shape, 3)
    return picked if mode == "reflect" else picked * inside.unsqueeze(3)


def reflect(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Mirror positions outside 0..count - 1 at the first and last one, which are not repeated."""
    period = max(2 * (count - 1), 1)
    positions = positions.remainder(period)
    return torch.minimum(positions, period - positions)


def identity_color_matrix(count: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the identity colour map (B, 3, 4): one row per output channel; columns are red, green, blue, constant."""
    return torch.eye(3, 4, device=device).expand(count, 3, 4)


def compose_color_matrix(images: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Combine all colour changes in `drawn` into an affine map (B, 3, 4) of colours in 0..1, or None if there are none.

    images (B, 3, H, W) in 0..255.
    """
    affine = compose_jitter(images.mean((2, 3)) / 255, drawn["factors"]) if "factors" in drawn else None
    if "strength" not in drawn:
        return affine
    return add_lighting(
        identity_color_matrix(len(images), images.device) if affine is None else affine, drawn["strength"]
    )


def compose_jitter(mean: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Combine brightness, contrast and saturation jitter, each x -> base + factor (x - base), into a map (B, 3, 4).

    base is 0 for brightness, the mean grey of the image for contrast, and the grey of the pixel for saturation. mean
    (B, 3): mean colour of each image. factors (3, B), in this order. The published code applies the three in a random
    order for each image, but without clamping they commute: saturation keeps every grey value, and brightness scales
    all of them.
    """
    brightness, contrast, saturation = factors.view(3, -1, 1, 1)
    red, green, blue = GREY
    mean_grey = red * mean[:, 0] + green * mean[:, 1] + blue * mean[:, 2]  # (B,)
    colours = torch.eye(3, 4, device=mean.device)
    # (4,): grey of a pixel, as a map
    grey = torch.stack([share * colours[row] for row, share in enumerate(GREY)]).sum(0)
    saturated = saturation * colours + (1 - saturation) * grey  # (B, 3, 4)
    constant = F.pad((1 - contrast) * mean_grey.view(-1, 1, 1), (3, 0))  # (B, 1, 4)
    return brightness * (contrast * saturated + constant)


def add_lighting(affine: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Append to `affine` (B, 3, 4) a shift by strength (3, B) along the principal colours of ImageNet."""
    first, second, third = (value * along for value, along in zip(EIGENVALUES, strength, strict=True))
    shift = torch.stack([a * first + b * second + c * third for a, b, c in EIGENVECTORS], 1)  # (B, 3)
    return affine + F.pad(shift.unsqueeze(2), (3, 0))


def apply_colors(images: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Apply the colour maps `affine` (B, 3, 4) to images (B, 3, H, W) and keep their memory layout.

    The sum is written out because a matrix product would be rounded to ten bits where TF32 is allowed.
    """
    red, green, blue, constant = affine[..., None, None].unbind(2)  # each (B, 3, 1, 1)
    out = torch.addcmul(constant, images[:, :1], red, out=torch.empty_like(images))
    return out.addcmul_(images[:, 1:2], green).addcmul_(images[:, 2:], blue)
