"""CutMix: paste a random box of a partner image at the same position.

Yun et al., ICCV 2019, arXiv 1905.04899, Sec. 3.1. One box per batch, as in the authors' code; per_sample draws one for
each image.
"""

import torch

from .base import Mixer
from .ops import box_mask, center_boxes, check_probability, clip_boxes, draw_lam, draw_partner, paste


def center_boxes_real(
    rows: torch.Tensor, columns: torch.Tensor, lam: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return boxes as center_boxes() does, but with real centres in [0, n) and real sides.

    Only the clipped edges are truncated to whole pixels. Puzzle Mix, Co-Mixup and SAGE run CutMix in this form.
    """
    half = (1.0 - lam).sqrt() / 2
    return clip_boxes(rows, columns, height * half, width * half, height, width).long()


class CutMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), drawn once per batch.

    per_sample: draw a box for each image. in_batch: draw lam for each image too. mix_prob: probability that a batch is
    mixed. cutmix_box: `integer` box edges (the original code) or `real` ones (the codes of Puzzle Mix, Co-Mixup and
    SAGE).
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        mix_prob: float = 0.5,
        per_sample: bool = False,
        in_batch: bool = False,
        cutmix_box: str = "integer",
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        if cutmix_box not in ("integer", "real"):
            raise ValueError(f"cutmix_box must be integer or real, got {cutmix_box!r}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)
        self.per_sample, self.cutmix_box = per_sample or in_batch, cutmix_box

    def mix_batch(self, images, targets, source):
        height, width = images.shape[-2:]
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        num_boxes = len(images) if self.per_sample else 1
        rows = torch.rand(num_boxes, device=images.device) * height
        columns = torch.rand(num_boxes, device=images.device) * width
        if self.cutmix_box == "integer":
            boxes = center_boxes(rows.long(), columns.long(), lam, height, width)
        else:
            boxes = center_boxes_real(rows, columns, lam, height, width)
        self.set_weight(images, lambda: ~box_mask(boxes, height, width).squeeze(1), partner)
        return paste(images, targets, partner, boxes)
