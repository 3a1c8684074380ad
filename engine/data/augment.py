"""Colour augmentation of a batch on the device: jitter of brightness, contrast and saturation, and PCA lighting.

Each of them is affine in the colour of a pixel, and none is clamped (as in the published CutMix code for ImageNet). So
whatever is drawn for an image comes down to one 3x4 matrix, found from its mean colour alone, and the pixels are gone
through once. Constants stand in the arithmetic as plain numbers: a tensor of them would be a copy to the device.
"""

import torch
from torch.nn import functional as F

GREY = (0.299, 0.587, 0.114)  # adds up to 1
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def identity_colors(count: int, device: torch.device | None = None) -> torch.Tensor:
    """The affine map (B, 3, 4) that changes nothing: a row for each new colour, columns red, green, blue, constant."""
    return torch.eye(3, 4, device=device).expand(count, 3, 4)


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
