"""SaliencyMix: paste the patch around the most salient pixel of a partner image.

Uddin et al., ICLR 2021, arXiv 2006.01791, Sec. 3.1-3.2. One box per image, as in the text. The authors' code uses one
box for the whole batch, that of the first partner: saliency_scope="batch". A source whose points() returns a position
overrides the maximum of the map.
"""

import torch

from .base import Mixer
from .ops import box_mask, center_boxes, check_probability, draw_lam, draw_partner, paste


def find_peaks(saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2: return the row and column, each (B,), of the first maximum of saliency (B, H, W) in row-major order."""
    first = saliency.flatten(1).argmax(1)
    return first // saliency.shape[-1], first % saliency.shape[-1]


class SaliencyMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), drawn once per batch, or per image with in_batch.

    mixup_alpha 1.0 is the uniform draw of the paper. mix_prob: probability that a batch is mixed. saliency_scope:
    `sample` (one box for each image) or `batch` (one for all).
    """

    default_source = "fine_grained"

    def __init__(
        self, mixup_alpha: float = 1.0, mix_prob: float = 0.5, saliency_scope: str = "sample", in_batch: bool = False
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        if saliency_scope not in ("sample", "batch"):
            raise ValueError(f"saliency_scope must be sample or batch, got {saliency_scope!r}")
        if in_batch and saliency_scope == "batch":
            raise ValueError("in_batch draws one lam per image: it needs saliency_scope sample")
        self.mixup_alpha, self.in_batch, self.saliency_scope = mixup_alpha, in_batch, saliency_scope
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def mix_batch(self, images, targets, source):
        height, width = images.shape[-2:]
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        if self.saliency_scope == "batch":
            saliency = self.compute_saliency(source, images, targets, chosen=partner[:1])
        else:
            saliency = self.compute_saliency(source, images, targets)[partner]
        rows, columns = source.points(saliency) or find_peaks(saliency)
        boxes = center_boxes(rows, columns, lam, height, width)
        self.set_weight(images, lambda: ~box_mask(boxes, height, width).squeeze(1), partner)
        return paste(images, targets, partner, boxes)
