"""The contract of a mixing method: `mixed, soft = mixer(images, targets, source)`.

A method subclasses Mixer and implements mix_batch(). It never sees the network: everything it may know about the
images comes from the saliency source that it is given (saliency/base.py). The training step in engine/training/loop.py
makes these calls, in this order:

    mixer.start_epoch(epoch, epochs, steps)         before each epoch
    mixed, soft = mixer(images, targets, source)    for each batch; sets `weight`, `partner` and `mixed_weight`
    with mixer.during(model):
        loss = mixer.mixed_weight * loss_fn(model(mixed), soft)
        loss.backward()
    mixer.after_backward(mixed.grad)                the gradient is None unless wants_mixed_grad is True

To write a method:
* In __init__, check the hyper-parameters and store them, `mix_prob` included.
* Set default_source if the method needs saliency maps. If the default is "gradient", override gradient_options. Set
  keeps_labels, same_weights or label_obstacle if it is not two images that are mixed, pixel by pixel.
* In mix_batch(), draw partners and shares with draw_partner() and draw_lam(), get the maps from compute_saliency(), mix
  with blend() or paste(), and pass the weight map and the partners to set_weight(). Set move_maps if pixels move. The
  functions are in mixing/ops.py.
* Override check_size() if not every image size can be mixed, check_network() if not every network can be trained, and
  state_dict() if the method has state.

Each part has a working default except mix_batch(). mixing/mixup.py is the shortest example, mixing/saliencymix.py the
shortest one with saliency.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .ops import (
    blend,
    check_targets,
    expand_weight,
    find_saliency_share,
    normalize_sum,
    replace_invalid_maps,
)

LABEL_RULES = ("area", "saliency", "mean")
MAP_RULES = ("saliency", "mean")  # those of LABEL_RULES that need saliency maps


class Mixer:
    """Base class of all mixing methods.

    images (B, C, H, W) are normalised floats. targets (B, K) are floats whose rows sum to 1. Neither is modified, and
    the results have the same shapes. source is a saliency source, or a plain function (images, targets) -> saliency
    (B, H, W) >= 0; None if the method needs no saliency.

    Random numbers come from torch's global generators only, so that a seed determines a run: scalars are drawn on the
    CPU, tensors on the device of the images.
    """

    default_source: str | None = None  # name of the source of its paper; None: needs no saliency
    mix_prob: float = 1.0  # probability that a batch is mixed
    mixed_weight: float = 1.0  # factor of the loss of the last mixed batch; SAGE lowers it to update_ratio
    wants_mixed_grad: bool = False  # whether after_backward() needs the gradient with respect to the mixed images
    mixes_hidden: bool = False  # whether during() hooks a stage of the network, which compiling it prevents
    batch_size: int | None = None  # the only batch size the method is designed for, if there is one
    replaced_maps: torch.Tensor | int = 0  # number of all-zero, NaN or infinite saliency maps replaced so far
    weight_fn: Callable[[], torch.Tensor] | None = None  # computes `weight` on request
    partner_fn: Callable[[], torch.Tensor] | None = None  # computes `partner` on request

    label_rule: str | None = None  # set by set_labels(); None: labels are weighted as the method does
    keeps_labels: bool = False  # whether each image keeps its label, whatever the rule
    same_weights: bool = False  # whether a mix has the same weight in all of its pixels, so that all rules agree
    label_obstacle: str | None = None  # why no label rule fits, such as "mixes a hidden layer"
    maps: torch.Tensor | None = None  # saliency (B, H, W) of the batch that is mixed, for a rule of MAP_RULES
    # Turns maps (B, H, W) that each sum to 1 into the parts of the images and of their partners, (own, pasted), that
    # the mixed images show at each pixel: set by mix_batch() where pixels move. None: (maps, maps[partner]). Only sums
    # count: own times `weight`, and pasted times 1 - `weight`, over all pixels.
    move_maps: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def gradient_options(self) -> dict:
        """Keyword arguments of the gradient source: how this method's paper takes the pixel gradient.

        They set, for example, the reduction over channels, the mode of batch norm, and `clean_weight`, the weight of
        the clean loss that is also trained on.
        """
        return {}

    @property
    def weight(self) -> torch.Tensor | None:
        """The weight map of the last batch: the share of images[i] in each pixel of mixed[i].

        (B, 1, H, W) float32 in [0, 1], on the device of the images. The remaining share belongs to the partner, to an
        image of an earlier batch (RecursiveMix), or to nothing inside a hole of Cutout and where SAGE has shifted the
        partner out of the frame. PuzzleMix moves blocks of both images, unless transport is False; its weight is that
        of the mask. ResizeMix shows the whole partner, shrunk, where its weight is 0. Use it to draw a mix or, together
        with `partner`, to mix segmentation masks.

        None if no such map exists: before the first batch, if a hidden layer was mixed (Manifold Mixup), and if more
        than two images were mixed (Co-Mixup).
        """
        return self.weight_fn and self.weight_fn()

    @property
    def partner(self) -> torch.Tensor | None:
        """The partner of each image of the last batch: images[partner[i]] was mixed into images[i].

        (B,) long, on the device of the images. An image that was not mixed with another one is its own partner.

        None if an image has no single partner: before the first batch, if more than two images were mixed (Co-Mixup),
        if the other images are of an earlier batch (RecursiveMix), and in a Chain, where the holes of both images show
        in the mix.
        """
        return self.partner_fn and self.partner_fn()

    def set_weight(
        self, images: torch.Tensor, weight_fn: Callable[[], torch.Tensor | float], partner: torch.Tensor | None
    ) -> None:
        """Set what `weight` and `partner` return for this batch. They are only computed if someone reads them.

        weight_fn() returns the share of the first image: one number, (B,) numbers, or (B or 1, rows, columns) numbers
        for blocks or pixels. It should not keep large tensors alive that the step would free. partner (B,) long; None:
        no image is mixed with another one.
        """
        shape, device = images.shape, images.device
        self.weight_fn = lambda: expand_weight(weight_fn(), shape, device)
        self.partner_fn = lambda: torch.arange(shape[0], device=device) if partner is None else partner

    def set_labels(self, rule: str | None) -> None:
        """Weight the labels of the mixed images by a rule instead of as the method does. None: as the method does.

        * `area`: the share of an image is its mean weight over the pixels.
        * `saliency`: the saliency of the image that its mix shows, relative to that of both images. Each map is scaled
          to sum 1 first. SnapMix, arXiv 2012.04846, with the two weights divided by their sum; also the idea of
          Saliency Grafting, arXiv 2112.08796.
        * `mean`: the mean of the two, as in TransMix, arXiv 2111.09833, but with maps of the images before mixing.

        Images and partners stay as they are. For `saliency` and `mean`, a method that needs no saliency gets the
        default source `gradient`: build the source after this call. Raises ValueError for an unknown rule, and for a
        method that does not mix the labels of two images.
        """
        if rule not in (None, *LABEL_RULES):
            raise ValueError(f"labels must be {', '.join(LABEL_RULES)} or None, got {rule!r}")
        obstacle = "keeps the label of each image" if self.keeps_labels else self.label_obstacle
        if rule and obstacle:
            raise ValueError(
                f"labels {rule}: {type(self).__name__} {obstacle}, so no label rule applies; take a method that "
                "mixes two images pixel by pixel, or leave labels out"
            )
        self.label_rule = None if self.same_weights else rule
        needs_source = self.label_rule in MAP_RULES
        self.default_source = type(self).default_source or ("gradient" if needs_source else None)

    def build_source(self, make_source: Callable):
        """Return the source for this method, or None if it needs no saliency. make_source(mixer) builds a Source."""
        return make_source(self) if self.default_source else None

    def compute_saliency(
        self, source, images: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the source's maps, (B, H, W) float32 >= 0, with invalid maps replaced: see replace_invalid_maps().

        chosen: indices (n,) of the images whose maps are wanted, (n, H, W); None: all. Raises ValueError if source is
        None.
        """
        if source is None:
            name = type(self).__name__
            raise ValueError(
                f"{name} needs a saliency source as its third argument: mixer(images, targets, source); its default "
                f"source is {self.default_source}"
            )
        if chosen is not None and self.label_rule in MAP_RULES:  # labels need the maps of all images
            return self.replace_invalid_maps(source(images, targets))[chosen]
        if chosen is None:
            return self.replace_invalid_maps(source(images, targets))
        saliency = source(images[chosen], targets[chosen]) if source.per_image else source(images, targets)[chosen]
        return self.replace_invalid_maps(saliency)

    def replace_invalid_maps(self, saliency: torch.Tensor) -> torch.Tensor:
        """Return saliency (B, H, W) as float32, with a uniform map in place of each that is all zero, NaN or infinite.

        The number of replacements is added to `replaced_maps` without waiting for the device.
        """
        saliency, invalid = replace_invalid_maps(saliency.detach().float())
        self.replaced_maps = self.replaced_maps + invalid.sum()
        if self.label_rule in MAP_RULES:
            self.maps = saliency
        return saliency

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, source=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images (B, C, H, W) and soft targets (B, K).

        With probability 1 - mix_prob the batch is returned unchanged. Raises ValueError if targets holds class indices.
        """
        check_targets(targets)
        self.mixed_weight = 1.0
        if torch.rand(()) >= self.mix_prob:
            self.set_weight(images, lambda: 1.0, partner=None)
            return images, targets
        source = as_source(source)
        mixed, soft = self.mix_batch(images, targets, source)
        if self.label_rule:
            soft = self.weigh_labels(images, targets, source)
        self.move_maps = None
        return mixed, soft

    def mix_batch(self, images: torch.Tensor, targets: torch.Tensor, source) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix one batch: the method itself. It must call set_weight(), or set weight_fn and partner_fn.

        They are None where the batch has no weight map, or no single partner for each image.
        """
        raise NotImplementedError

    def weigh_labels(self, images: torch.Tensor, targets: torch.Tensor, source) -> torch.Tensor:
        """Return the soft targets (B, K) of the batch just mixed by the rule of set_labels()."""
        weight, partner = self.weight.squeeze(1), self.partner
        share = weight.mean((1, 2))
        if self.label_rule in MAP_RULES:
            if self.maps is None:  # the method has not asked for them; a source is called once for each batch
                self.compute_saliency(source, images, targets)
            maps, self.maps = normalize_sum(self.maps), None
            own, pasted = self.move_maps(maps) if self.move_maps else (maps, maps[partner])
            shown = (weight * own).sum((1, 2)), ((1 - weight) * pasted).sum((1, 2))
            by_saliency = find_saliency_share(*shown, share)
            share = by_saliency if self.label_rule == "saliency" else (share + by_saliency) / 2
        return blend(targets, partner, share)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming sizes that work, if images of height x width pixels cannot be mixed."""

    def check_network(self, model: torch.nn.Module) -> None:
        """Raise ValueError, naming networks that work, if the method cannot train `model`."""

    def during(self, model: torch.nn.Module) -> AbstractContextManager:
        """Return the context manager in which the mixed batch passes through `model`, forward and backward."""
        return nullcontext()

    def after_backward(self, mixed_grad: torch.Tensor | None) -> None:
        """Use the gradient of the loss with respect to the mixed images, (B, C, H, W). RL-Mix computes its reward here.

        Called after the backward pass of every batch. mixed_grad is None unless wants_mixed_grad is True.
        """

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Prepare for epoch `epoch` (the first is 0) of `epochs`, which has `steps` batches."""

    def __getstate__(self) -> dict:
        """Return what pickle and copy.deepcopy() keep: all but `weight` and `partner` of the last batch."""
        return self.__dict__ | {"weight_fn": None, "partner_fn": None}

    def state_dict(self) -> dict:
        """Return the state that a resumed run needs: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict() returned."""


class FunctionSource:
    """A function or other callable (images, targets) -> saliency as a source that offers nothing else."""

    clean_weight, per_image, logits, has_gradient = 0.0, False, None, False

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.function(images, targets)

    def points(self, saliency: torch.Tensor) -> None:
        return None


def as_source(source):
    """Wrap what is called like a source but is none, such as a function; return a source, and None, unchanged."""
    return source if source is None or hasattr(source, "points") else FunctionSource(source)
