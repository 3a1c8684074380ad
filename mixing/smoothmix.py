"""SmoothMix: blend in the partner with a weight that falls off from a random place like a Gaussian.

Lee et al., CVPR Workshops 2020. The size of the kernel is that of OpenMixup. Its labels are swapped: it gives the
image the share that the partner has. Here each has its own.
"""

import torch

from .base import Mixer
from .ops import blend, blend_pixels, check_probability, draw_centers, draw_partner, gaussian_kernel

SPREAD = (0.25, 0.5)  # range of the standard deviation, relative to the side of a square image


def smooth_weight(
    rows: torch.Tensor, columns: torch.Tensor, uniform: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return the weight of the image in each pixel, (B, H, W) float32. It is 0 at the given places.

    rows, columns (B,), in pixels; uniform (B,) in [0, 1], from the smallest to the largest kernel. In images that are
    not square, the side of the square of equal area counts.
    """
    sigma = (SPREAD[0] + (SPREAD[1] - SPREAD[0]) * uniform) * (height * width) ** 0.5
    return 1 - gaussian_kernel(rows, columns, 2 * sigma.square(), height, width)


class SmoothMix(Mixer):
    """Targets follow the mean weight, which no lam sets: only the place and the size of the kernel are drawn.

    They are drawn once per batch, or per image with in_batch. mix_prob: probability that a batch is mixed.
    """

    def __init__(self, mix_prob: float = 1.0, in_batch: bool = False):
        self.mix_prob, self.in_batch = check_probability("mix_prob", mix_prob), in_batch

    def mix_batch(self, images, targets, source):
        partner = draw_partner(images)
        rows, columns = (place - 0.5 for place in draw_centers(images, self.in_batch))
        uniform, size = torch.rand(len(rows), device=images.device), images.shape[-2:]
        weight = smooth_weight(rows, columns, uniform, *size)
        self.set_weight(images, lambda: smooth_weight(rows, columns, uniform, *size), partner)
        return blend_pixels(images, partner, weight.unsqueeze(1)), blend(targets, partner, weight.mean((1, 2)))
