"""Augmentation of a batch on the device: shifted crops, mirror images, colour jitter and PCA lighting.

Every change of colour is affine in the colour of a pixel, and none is clamped (as in the published CutMix code for
ImageNet). So whatever is drawn for an image comes down to one 3x4 matrix, computed from its mean colour alone, and the
pixels are read once. Constants stand in the arithmetic as plain numbers: a tensor of them would have to be copied to
the device.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.data.views import RandomCrop

GREY = (0.299, 0.587, 0.114)  # adds up to 1
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random: a crop, a mirror image for one in two, and colours."""

    crop_padding: int = 0  # black pixels on each side, out of which a crop of the image's own size is taken
    view: RandomCrop | None = None  # crop of image files, in place of crop_padding and of their own view
    color_jitter: float = 0.0  # brightness, contrast and saturation are scaled by 1 - color_jitter to 1 + color_jitter
    lighting: float = 0.0  # standard deviation along the principal colours of ImageNet

    def draw(self, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The random numbers of `count` images, each (..., count), on the host."""
        drawn = {}
        if self.view is None:
            reach = self.crop_padding
            drawn["shift"] = torch.randint(-reach, reach + 1, (2, count), generator=generator)
        drawn["flip"] = torch.rand(count, generator=generator) < 0.5
        if self.color_jitter:
            drawn["factors"] = 1 + self.color_jitter * (2 * torch.rand(3, count, generator=generator) - 1)
        if self.lighting:
            drawn["strength"] = self.lighting * torch.randn(3, count, generator=generator)
        return drawn


def crop_and_flip(
    pixels: torch.Tensor, index: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor
) -> torch.Tensor:
    """Images `index` (B,) of pixels uint8 (N, H, W, 3), each shifted and maybe mirrored: (B, H, W, 3).

    top, left (B,): first row and column of the crop, from -padding to +padding; what lies outside the image is black.
    flip (B,) bool: left and right are exchanged.
    """
    height, width = pixels.shape[1:3]
    rows = torch.arange(height, device=pixels.device) + top.unsqueeze(1)  # (B, H)
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(flip.unsqueeze(1), columns.flip(0), columns) + left.unsqueeze(1)  # (B, W)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    columns = columns.clamp(0, width - 1).unsqueeze(1)
    position = (index.unsqueeze(1) * height + rows.clamp(0, height - 1)).unsqueeze(2) * width + columns  # (B, H, W)
    picked = pixels.view(-1, 3).index_select(0, position.flatten()).view(*position.shape, 3)
    return picked * inside.unsqueeze(3)


def identity_color_matrix(count: int, device: torch.device | None = None) -> torch.Tensor:
    """The affine map (B, 3, 4) that changes nothing: a row for each new colour, columns red, green, blue, constant."""
    return torch.eye(3, 4, device=device).expand(count, 3, 4)


def compose_color_matrix(images: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The affine map (B, 3, 4), of colours in 0..1, of all changes of colour in `drawn`; None if there are none.

    images (B, 3, H, W) in 0..255.
    """
    affine = color_jitter(images.mean((2, 3)) / 255, drawn["factors"]) if "factors" in drawn else None
    if "strength" not in drawn:
        return affine
    return add_lighting(
        identity_color_matrix(len(images), images.device) if affine is None else affine, drawn["strength"]
    )


def color_jitter(mean: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The affine map (B, 3, 4) of three steps x -> base + factor (x - base).

    base: 0 for brightness, the mean grey of the image for contrast, the grey of the pixel for saturation. mean (B, 3):
    mean colour of each image; factors (3, B), in this order. The published code puts the three in a random order for
    each image, but unclamped they commute: saturation leaves every grey as it is, and brightness scales them all.
    """
    brightness, contrast, saturation = factors.view(3, -1, 1, 1)
    red, green, blue = GREY
    mean_grey = red * mean[:, 0] + green * mean[:, 1] + blue * mean[:, 2]  # (B,)
    colours = torch.eye(3, 4, device=mean.device)
    grey = torch.stack([share * colours[row] for row, share in enumerate(GREY)]).sum(0)  # (4,): of a pixel, as a map
    saturated = saturation * colours + (1 - saturation) * grey  # (B, 3, 4)
    constant = F.pad((1 - contrast) * mean_grey.view(-1, 1, 1), (3, 0))  # (B, 1, 4)
    return brightness * (contrast * saturated + constant)


def add_lighting(affine: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """`affine` (B, 3, 4) followed by a shift along the principal colours of ImageNet, strength (3, B) along each."""
    first, second, third = (value * along for value, along in zip(EIGENVALUES, strength, strict=True))
    shift = torch.stack([a * first + b * second + c * third for a, b, c in EIGENVECTORS], 1)  # (B, 3)
    return affine + F.pad(shift.unsqueeze(2), (3, 0))


def apply_colors(images: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) with each colour replaced by affine (B, 3, 4) of it, in the same memory layout.

    Written out, not as a matrix product: that would round to ten bits where TF32 is allowed.
    """
    red, green, blue, constant = affine[..., None, None].unbind(2)  # each (B, 3, 1, 1)
    out = torch.addcmul(constant, images[:, :1], red, out=torch.empty_like(images))
    return out.addcmul_(images[:, 1:2], green).addcmul_(images[:, 2:], blue)
