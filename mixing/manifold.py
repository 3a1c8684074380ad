"""Manifold Mixup: Mixup of the images or of a hidden layer.

Verma et al., ICML 2019, arXiv 1806.05236, Sec. 2: the layer is drawn for each batch, uniformly from the input and the
outputs of the first two stages (the set of the Puzzle Mix family of codes). Gradients flow through both branches.
"""

from contextlib import contextmanager

import torch

from mixing.base import Mixer
from mixing.ops import blend, check_probability, draw_lam, draw_partner


class ManifoldMixup(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), one a batch, or one an image with in_batch. mix_prob: chance that a batch
    is mixed.
    """

    mixes_hidden = True

    def __init__(self, mixup_alpha: float = 2.0, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must not be negative, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)
        self.depth, self.partner, self.lam = 0, None, None

    def __call__(self, images, targets, source=None):
        self.depth = 0
        return super().__call__(images, targets, source)

    def mix_batch(self, images, targets, source):
        self.depth = int(torch.randint(3, ()))
        self.lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        self.partner = draw_partner(images)
        if self.depth:
            self.make_weight = None
            return images, blend(targets, self.partner, self.lam)
        self.keep_weight(images, lambda lam=self.lam: lam)
        return blend(images, self.partner, self.lam), blend(targets, self.partner, self.lam)

    @contextmanager
    def during(self, model):
        """Mix the output of stage `depth` of `model`, which names its stages in `model.stages`; the hook goes even on
        an error.
        """
        if self.depth == 0:
            yield
            return
        stage = model.get_submodule(model.stages[self.depth - 1])
        handle = stage.register_forward_hook(lambda module, inputs, hidden: self.mix_hidden(hidden))
        try:
            yield
        finally:
            handle.remove()

    def mix_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (B, ...): the last len(partner) rows are mixed among themselves, the rows before them stay (see
        PartialMix).
        """
        clean = len(hidden) - len(self.partner)
        mixed = blend(hidden[clean:], self.partner, self.lam)
        return torch.cat([hidden[:clean], mixed]) if clean else mixed
