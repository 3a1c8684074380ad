"""Manifold Mixup: apply Mixup to the images or to a hidden layer.

Verma et al., ICML 2019, arXiv 1806.05236, Sec. 2. The layer is drawn uniformly for each batch from the input and the
outputs of the first two stages, the set that Puzzle Mix, Co-Mixup and SAGE use. Gradients flow through both images of a
pair.
"""

from contextlib import contextmanager

import torch

from .base import Mixer
from .ops import blend, check_probability, draw_lam, draw_partner

DEPTHS = 3  # the images and the outputs of the first two stages


class ManifoldMixup(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), drawn once per batch, or per image with in_batch.

    mix_prob: probability that a batch is mixed.
    """

    mixes_hidden = True
    label_obstacle = "mixes a hidden layer"

    def __init__(self, mixup_alpha: float = 2.0, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must not be negative, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)
        self.depth, self.lam = 0, None  # depth 0: mix the images; k: the output of stage k

    def __call__(self, images, targets, source=None):
        self.depth = 0
        return super().__call__(images, targets, source)

    def mix_batch(self, images, targets, source):
        self.depth = int(torch.randint(DEPTHS, ()))
        self.lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        self.set_weight(images, lambda lam=self.lam: lam, partner)
        if self.depth:
            self.weight_fn = None
            return images, blend(targets, partner, self.lam)
        return blend(images, partner, self.lam), blend(targets, partner, self.lam)

    def check_network(self, model):
        stages = getattr(model, "stages", None)  # timm uses this name for a module, too
        if not isinstance(stages, tuple) or len(stages) < DEPTHS - 1:
            raise ValueError(
                f"manifold mixes the output of a stage, and {type(model).__name__} names no stages: use mixup, or a "
                "network with `stages`, the names of its stages as a tuple, such as a ResNet"
            )

    @contextmanager
    def during(self, model):
        """Mix the output of stage `depth` of `model`, which names its stages in `model.stages`, a tuple.

        The forward hook is removed even if an error occurs. Raises ValueError for a network without stages.
        """
        if self.depth == 0:
            yield
            return
        self.check_network(model)
        stage = model.get_submodule(model.stages[self.depth - 1])
        handle = stage.register_forward_hook(lambda module, inputs, hidden: self.mix_hidden(hidden))
        try:
            yield
        finally:
            handle.remove()

    def mix_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix the last len(partner) rows of hidden (B, ...) with each other; the earlier images are not mixed."""
        partner = self.partner
        num_clean = len(hidden) - len(partner)
        mixed = blend(hidden[num_clean:], partner, self.lam)
        return torch.cat([hidden[:num_clean], mixed]) if num_clean else mixed
