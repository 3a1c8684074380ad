"""Mixup: blend two images with one weight.

Zhang et al., ICLR 2018, arXiv 1710.09412, Sec. 2: x = lam x_i + (1 - lam) x_j, and the same for the labels.
"""

from .base import Mixer
from .ops import blend, check_probability, draw_lam, draw_partner


class Mixup(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), drawn once per batch, or per image with in_batch.

    mix_prob: probability that a batch is mixed.
    """

    same_weights = True

    def __init__(self, mixup_alpha: float = 1.0, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must not be negative, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def mix_batch(self, images, targets, source):
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        self.set_weight(images, lambda: lam, partner)
        return blend(images, partner, lam), blend(targets, partner, lam)
