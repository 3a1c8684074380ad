"""AttentiveMix: keep the most salient cells of each image, and show its partner in all others.

Walawalkar et al., "Attentive CutMix: an enhanced data augmentation approach for deep learning based image
classification", ICASSP 2020, arXiv 2003.13048. There a fixed number of cells is kept; AttentiveMix+, the form of the
OpenMixup library, draws it, as here by default. In both, the attention is the last feature map of a network trained on
ImageNet. Here it is the mean over each cell of the map of any saliency source.
"""

import torch

from .base import Mixer
from .ops import (
    blend,
    blend_pixels,
    block_means,
    check_at_least,
    check_divides,
    check_probability,
    draw_lam,
    draw_partner,
    upsample_blocks,
)


def choose_cells(attention: torch.Tensor, count: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return which cells are among the `count` most attended ones of their image: (B, rows, columns) bool.

    attention (B, rows, columns); count () or (B,). order (B, rows * columns): a permutation of the cells of each image;
    of equally attended ones, those that come first in it are chosen.
    """
    shuffled = attention.flatten(1).gather(1, order)
    ranked = order.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))  # most attended first
    is_chosen = torch.arange(order.shape[1], device=order.device) < (count.unsqueeze(1) if count.dim() else count)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, ranked, is_chosen.expand_as(ranked)).view_as(attention)


def count_cells(lam: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Return how many of num_cells cells a share lam of them is, rounded down, at least 1: () or (B,) long."""
    return (num_cells * lam).long().clamp(1, num_cells)


class AttentiveMix(Mixer):
    """The image shows in the cells in which it is most salient, and its partner in all others.

    num_patches: cells along a side. top_k: cells that show the image; None: a share lam ~ Beta(mixup_alpha,
    mixup_alpha) of all cells, rounded down, at least one, drawn once per batch, or per image with in_batch. The weight
    of its target is top_k relative to all cells. Equally salient cells are chosen at random. mix_prob: probability that
    a batch is mixed. Raises ValueError for images that the cells do not divide.
    """

    default_source = "cam"

    def __init__(
        self,
        mixup_alpha: float = 2.0,
        num_patches: int = 8,
        top_k: int | None = None,
        in_batch: bool = False,
        mix_prob: float = 1.0,
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        check_at_least("num_patches", num_patches, 1)
        if top_k is not None and not 1 <= top_k <= num_patches**2:
            raise ValueError(f"top_k must be one of the 1 to {num_patches**2} cells of num_patches, got {top_k}")
        self.mixup_alpha, self.num_patches, self.top_k, self.in_batch = mixup_alpha, num_patches, top_k, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def check_size(self, height, width):
        check_divides("num_patches", self.num_patches, height, width)

    def mix_batch(self, images, targets, source):
        self.check_size(*images.shape[-2:])
        side = self.num_patches
        count = self.draw_count(images)
        partner = draw_partner(images)
        order = torch.rand(len(images), side**2, device=images.device).argsort(1)
        saliency = self.compute_saliency(source, images, targets)
        mask = choose_cells(block_means(saliency, side, side), count, order)
        self.set_weight(images, lambda: mask, partner)
        mixed = blend_pixels(images, partner, upsample_blocks(mask, *images.shape[-2:]))
        return mixed, blend(targets, partner, count.float() / side**2)

    def draw_count(self, images: torch.Tensor) -> torch.Tensor:
        """Return the number of cells that show the image: () long on the CPU or, with in_batch, (B,) on the device."""
        if self.top_k is not None:
            return torch.tensor(self.top_k)
        return count_cells(draw_lam(self.mixup_alpha, images, self.in_batch), self.num_patches**2)
