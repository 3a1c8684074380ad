"""The contract of a mixing method: `mixed, soft = mixer(images, targets, source)`.

A method subclasses Mixer and implements mix_batch(). The training step of engine/training/loop.py calls, in this order:

    start_epoch()                                         before every epoch
    mixed, soft = mixer(images, targets, source)          per batch; afterwards `weight` and `mixed_weight` are known
    with mixer.during(model): loss = mixed_weight * loss_fn(model(mixed), soft); backward
    after_backward(mixed.grad)                            with the gradient if wants_mixed_grad, otherwise with None

and state_dict() for a checkpoint.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType, MethodType

import torch

from mixing.ops import check_targets, expand_weight, replace_unusable


class Mixer:
    """A mixing method.

    images (B, C, H, W) are normalised floats and targets (B, K) floats whose rows sum to 1; neither is changed, and the
    results have the same shapes. source: a saliency.base.Source, or a plain function (images, targets) -> saliency
    (B, H, W) >= 0, which has maps and nothing else; it may be None where default_source is None. Random numbers come
    from torch's global generators: scalars from that of the CPU, tensors from that of the images' device.
    """

    default_source: str | None = None  # name of the source that the method was published with; None: needs no saliency
    mix_prob: float = 1.0  # chance that a batch is mixed
    mixed_weight: float = 1.0  # weight of the loss of the last mixed batch
    wants_mixed_grad: bool = False  # whether after_backward() reads the gradient at the mixed images
    mixes_hidden: bool = False  # whether it hooks a stage of the network, which a compiled network ignores
    batch_size: int | None = None  # the only batch size the method is designed for, if there is one
    unusable: torch.Tensor | int = 0  # number of saliency maps so far that were all zero or not finite
    make_weight: Callable[[], torch.Tensor] | None = None  # makes `weight` when it is asked for

    @property
    def gradient_options(self) -> dict:
        """How a gradient source takes the pixel gradient for this method: parameters of saliency.gradient.Gradient."""
        return {}

    @property
    def weight(self) -> torch.Tensor | None:
        """(B, 1, H, W) float32 in [0, 1] on the images' device: the share of images[i] at each pixel of the last
        mixed[i]. The rest shows the partner or, in a hole of Cutout and where SAGE shifted the partner out of the
        frame, nothing. PuzzleMix moves blocks of both images; its weight is that of the mask.

        None where no such map exists: before the first batch, where a hidden layer was mixed (Manifold Mixup), and
        where more than two images were mixed (Co-Mixup).
        """
        return self.make_weight and self.make_weight()

    def keep_weight(self, images: torch.Tensor, make: Callable[[], torch.Tensor | float]) -> None:
        """Have make() give the weight when it is asked for: one share, (B,) shares, or masks (B or 1, rows, columns) of
        blocks or pixels. It should hold no reference to large tensors that the step would free.
        """
        shape, device = images.shape, images.device
        self.make_weight = lambda: expand_weight(make(), shape, device)

    def build_source(self, make: Callable):
        """The source of this method, or None if it needs no saliency. make(mixer) builds one Source."""
        return make(self) if self.default_source else None

    def compute_saliency(self, source, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, H, W) float32 >= 0: the maps of the source, without those that say nothing."""
        return self.replace_unusable(source(images, targets))

    def replace_unusable(self, saliency: torch.Tensor) -> torch.Tensor:
        """saliency (B, H, W) as float32, with a uniform map for each that is all zero or not finite. Those are counted
        in `unusable`, without waiting for the device.
        """
        saliency, unusable = replace_unusable(saliency.detach().float())
        self.unusable = self.unusable + unusable.sum()
        return saliency

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, source=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises ValueError for targets that are labels."""
        check_targets(targets)
        self.mixed_weight = 1.0
        if torch.rand(()) >= self.mix_prob:
            self.keep_weight(images, lambda: 1.0)
            return images, targets
        return self.mix_batch(images, targets, as_source(source))

    def mix_batch(self, images: torch.Tensor, targets: torch.Tensor, source) -> tuple[torch.Tensor, torch.Tensor]:
        """The method itself, for a batch that is to be mixed; it calls keep_weight()."""
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with the remedy, if images of this size in pixels cannot be mixed."""

    def during(self, model: torch.nn.Module) -> AbstractContextManager:
        """The context of the forward pass of the mixed batch."""
        return nullcontext()

    def after_backward(self, mixed_grad: torch.Tensor | None) -> None:
        """Called after the backward pass of the mixed batch, with its pixel gradient if wants_mixed_grad."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Called before epoch number `epoch` (from 0) of `epochs`, which has `steps` batches."""

    def state_dict(self) -> dict:
        """The state that must survive a resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict() returned."""


class FunctionSource:
    """A plain function as a source: it has maps, and the defaults of saliency.base.Source for the rest."""

    clean_weight, logits, has_gradient = 0.0, None, False

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.function(images, targets)

    def points(self, saliency: torch.Tensor) -> None:
        return None


def as_source(source):
    """A source as methods read it: a plain function gets the missing members, everything else must have them."""
    return FunctionSource(source) if isinstance(source, (FunctionType, MethodType, partial)) else source
