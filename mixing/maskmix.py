"""MaskMix: replace random cells of a grid by those of a partner image.

Zhao et al., "MixPro", ICLR 2023, arXiv 2304.12043: its images. The authors' code draws one share per batch, rounds it
up to whole cells, and draws the cells of each image. Its labels, which blend the area with the attention inside of the
cells by the similarity of the prediction and the label, need the pass of the mixed batch and are left out: targets
follow the area.
"""

import torch

from .base import Mixer
from .ops import blend, check_at_least, check_divides, check_probability, draw_lam, draw_partner, upsample_blocks


def draw_cells(order: torch.Tensor, lam: torch.Tensor, cells: int) -> torch.Tensor:
    """Return which cells of a grid show the image, (B, cells, cells) bool: the ceil(lam N) lowest of its N numbers.

    order (B, N): distinct random numbers; lam () or (B,).
    """
    rank = order.argsort(1).argsort(1)
    count = (lam * order.shape[1]).ceil()
    return (rank < (count.unsqueeze(1) if count.dim() else count)).unflatten(1, (cells, cells))


class MaskMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), drawn once per batch, or per image with in_batch.

    num_patches: cells per side. The paper makes a cell a multiple of the network's patches: 56 pixels for DeiT-S at 224
    pixels, 4 cells per side. mix_prob: probability that a batch is mixed. Raises ValueError for images that the cells
    do not divide.
    """

    def __init__(self, mixup_alpha: float = 1.0, num_patches: int = 4, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        check_at_least("num_patches", num_patches, 2)
        self.mixup_alpha, self.num_patches = mixup_alpha, num_patches
        self.mix_prob, self.in_batch = check_probability("mix_prob", mix_prob), in_batch

    def check_size(self, height, width):
        check_divides("num_patches", self.num_patches, height, width)

    def mix_batch(self, images, targets, source):
        self.check_size(*images.shape[-2:])
        lam, partner = draw_lam(self.mixup_alpha, images, self.in_batch), draw_partner(images)
        order = torch.rand(len(images), self.num_patches**2, device=images.device)
        mask = draw_cells(order, lam, self.num_patches)
        self.set_weight(images, lambda: mask, partner)
        mixed = torch.where(upsample_blocks(mask, *images.shape[-2:]), images, images[partner])
        return mixed, blend(targets, partner, mask.float().mean((1, 2)))
