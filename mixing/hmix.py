"""HMix and GMix: between Mixup and CutMix, by a box in a blended image or by a Gaussian.

Park, Yun and Chun, NeurIPS 2022, arXiv 2208.09913, Sec. 5. The authors' code is a mode of a Mixup and CutMix switch.
"""

import math

import torch

from .base import Mixer
from .ops import (
    append_dims,
    blend,
    blend_pixels,
    box_mask,
    check_probability,
    draw_centers,
    draw_lam,
    draw_partner,
    gaussian_kernel,
    scale_boxes,
)


def hmix_weight(lam: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the weight of the image in each pixel, (B, H, W): 0 in the box, elsewhere such that its mean is lam.

    lam () or (B,); boxes (B, 4), of at most the share 1 - lam of the pixels.
    """
    inside = box_mask(boxes, height, width).squeeze(1)
    outside = lam / (1 - inside.float().mean((1, 2)))  # NaN if there is nothing outside
    return torch.where(inside, 0.0, outside.view(-1, 1, 1))


def gmix_weight(lam: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the weight of the image in each pixel, (B, H, W): a Gaussian at a place for lam < 0.5, else 1 minus it.

    lam () or (B,); rows, columns (B,). The integral of the kernel is the smaller of lam and 1 - lam times H W, of which
    the border cuts off a part.
    """
    area = torch.minimum(lam, 1 - lam).clamp(min=1e-6) * (height * width)
    kernel = gaussian_kernel(rows, columns, area / math.pi, height, width)
    return (append_dims((lam >= 0.5).float(), 2) - kernel).abs()


class HMix(Mixer):
    """A box of the partner is pasted, and outside of it the two images are blended, so that the image has lam in all.

    lam ~ Beta(mixup_alpha, mixup_alpha), and targets follow it. hmix_ratio: area of the box before it is cut at the
    border, relative to 1 - lam; 0 is Mixup, and 1 CutMix with the loss at the border made up for outside of the box.
    One lam and one box per batch, or per image with in_batch. mix_prob: probability that a batch is mixed.
    """

    def __init__(
        self, mixup_alpha: float = 1.0, hmix_ratio: float = 0.5, mix_prob: float = 1.0, in_batch: bool = False
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.hmix_ratio = check_probability("hmix_ratio", hmix_ratio)
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def mix_batch(self, images, targets, source):
        size = images.shape[-2:]
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        boxes = scale_boxes(*draw_centers(images, self.in_batch), ((1 - lam) * self.hmix_ratio).sqrt(), *size)
        weight = hmix_weight(lam, boxes, *size)
        self.set_weight(images, lambda: hmix_weight(lam, boxes, *size), partner)
        return blend_pixels(images, partner, weight.unsqueeze(1)), blend(targets, partner, lam)


class GMix(Mixer):
    """The image that has less shows in a Gaussian at a random place, the other one elsewhere.

    lam ~ Beta(mixup_alpha, mixup_alpha) sets its size. Targets follow the mean weight, which is farther from 0.5 than
    lam, because the border cuts the Gaussian. One lam and one place per batch, or per image with in_batch. mix_prob:
    probability that a batch is mixed.
    """

    def __init__(self, mixup_alpha: float = 1.0, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def mix_batch(self, images, targets, source):
        size = images.shape[-2:]
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        rows, columns = draw_centers(images, self.in_batch)
        weight = gmix_weight(lam, rows, columns, *size)
        self.set_weight(images, lambda: gmix_weight(lam, rows, columns, *size), partner)
        return blend_pixels(images, partner, weight.unsqueeze(1)), blend(targets, partner, weight.mean((1, 2)))
