"""Combine methods: mix nothing, chain two methods, draw a method for each batch, or mix only a part of each batch."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch.nn import functional as F

from . import build_mixer, collect_hyper_parameters
from .base import Mixer


class NoMix(Mixer):
    """The baseline without mixing: every batch is returned unchanged."""

    keeps_labels = True

    def __call__(self, images, targets, source=None):
        self.set_weight(images, lambda: 1.0, partner=None)
        return images, targets


class Chain(Mixer):
    """Several mixers, applied one after the other: Cutout, then a method. The last one gets the gradients."""

    def __init__(self, mixers: list[Mixer]):
        self.mixers = mixers
        self.wants_mixed_grad = mixers[-1].wants_mixed_grad
        self.mixes_hidden = any(mixer.mixes_hidden for mixer in mixers)

    @property
    def default_source(self) -> str | None:
        return self.mixers[-1].default_source

    @property
    def gradient_options(self):
        return self.mixers[-1].gradient_options

    @property
    def mixed_weight(self) -> float:
        return self.mixers[-1].mixed_weight

    @property
    def batch_size(self) -> int | None:
        return next((mixer.batch_size for mixer in self.mixers if mixer.batch_size), None)

    @property
    def replaced_maps(self) -> torch.Tensor | int:
        return sum(mixer.replaced_maps for mixer in self.mixers)

    def set_labels(self, rule):
        self.mixers[-1].set_labels(rule)

    def build_source(self, make_source):
        return self.mixers[-1].build_source(make_source)

    def check_size(self, height, width):
        for mixer in self.mixers:
            mixer.check_size(height, width)

    def check_network(self, model):
        for mixer in self.mixers:
            mixer.check_network(model)

    def __call__(self, images, targets, source=None):
        for mixer in self.mixers:
            images, targets = mixer(images, targets, source)
        weight_fns = [mixer.weight_fn for mixer in self.mixers]
        self.weight_fn = None if None in weight_fns else lambda: math.prod(weight_fn() for weight_fn in weight_fns)
        return images, targets

    def during(self, model):
        return self.mixers[-1].during(model)

    def after_backward(self, mixed_grad):
        self.mixers[-1].after_backward(mixed_grad)

    def start_epoch(self, epoch, epochs, steps):
        for mixer in self.mixers:
            mixer.start_epoch(epoch, epochs, steps)

    def state_dict(self):
        return {"mixers": [mixer.state_dict() for mixer in self.mixers]}

    def load_state_dict(self, state):
        for mixer, mixer_state in zip(self.mixers, state["mixers"], strict=True):
            mixer.load_state_dict(mixer_state)


class Choice(Chain):
    """One of several methods, drawn for each batch.

    weights: a number >= 0 for each method, proportional to the probability with which it is drawn; None: all are equal.
    It takes a list of sources, one for each method, as its build_source() returns it.
    """

    default_source = None  # each method has its own

    def __init__(self, mixers: list[Mixer], weights: Sequence[float] | None = None):
        super().__init__(mixers)
        self.weights = None if weights is None else check_method_weights(weights, len(mixers))
        self.wants_mixed_grad = any(mixer.wants_mixed_grad for mixer in mixers)
        self.drawn = 0  # index of the method that mixed the last batch

    @property
    def mixed_weight(self) -> float:
        return self.mixers[self.drawn].mixed_weight

    def set_labels(self, rule):
        """Set the rule of each method. Those that keep the label of each image do so under every rule."""
        for mixer in [one for one in self.mixers if not one.keeps_labels] or self.mixers:
            mixer.set_labels(rule)

    def build_source(self, make_source):
        sources = [mixer.build_source(make_source) for mixer in self.mixers]
        return sources if any(sources) else None

    def __call__(self, images, targets, source=None):
        if source is not None and not isinstance(source, (list, tuple)):
            raise ValueError(
                "Choice needs a list of sources, one for each method; this builds it: "
                "mixer.build_source(lambda one: gradient_source(model, **one.gradient_options))"
            )
        self.drawn = self.draw_method()
        mixer = self.mixers[self.drawn]
        mixed, soft = mixer(images, targets, source and source[self.drawn])
        self.weight_fn, self.partner_fn = mixer.weight_fn, mixer.partner_fn
        return mixed, soft

    def draw_method(self) -> int:
        """Return the index of the method that mixes the next batch."""
        if self.weights is None:
            return int(torch.randint(len(self.mixers), ()))
        *bounds, total = accumulate(self.weights)
        return bisect_right(bounds, total * float(torch.rand(())))

    def during(self, model):
        return self.mixers[self.drawn].during(model)

    def after_backward(self, mixed_grad):
        self.mixers[self.drawn].after_backward(mixed_grad)


def check_method_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return the weights of `count` methods. Raises ValueError if they are no probabilities up to a factor."""
    text = " ".join(f"{weight:g}" for weight in weights)
    if count == 1:
        raise ValueError(
            f"method_weights {text}: there is only one method to draw; leave them out, or give more methods"
        )
    if len(weights) != count:
        raise ValueError(f"method_weights {text}: there are {count} methods; give {count} weights, one for each method")
    if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(f"method_weights {text}: give finite numbers of at least 0, and one of them above 0")
    return tuple(weights)


class PartialMix(Chain):
    """Mixes the last floor(B * fraction) images of each batch with each other and leaves the others unchanged.

    mix_schedule sets the fraction: `fixed` is mix_fraction in every epoch; `scheduled` is a linear ramp from 0 to
    mix_fraction at epoch mix_scheduled_epoch; `delayed` is 0 before that epoch. The last mix_off_epoch epochs are not
    mixed. These are the options `--prob_mix`, `--mix_schedule` and `--mix_scheduled_epoch` of the SAGE code.
    """

    def __init__(
        self,
        mixer: Mixer,
        mix_fraction: float = 1.0,
        mix_schedule: str = "fixed",
        mix_scheduled_epoch: int = 0,
        mix_off_epoch: int = 0,
    ):
        super().__init__([mixer])
        if not 0.0 <= mix_fraction <= 1.0:
            raise ValueError(f"mix_fraction must lie between 0 and 1, got {mix_fraction}")
        self.mix_fraction, self.mix_schedule = mix_fraction, mix_schedule
        self.mix_scheduled_epoch, self.mix_off_epoch = mix_scheduled_epoch, mix_off_epoch
        self.fraction = mix_fraction  # of this epoch
        self.num_mixed = 0  # images mixed in the last batch

    @property
    def mixed_weight(self) -> float:
        return self.mixers[0].mixed_weight if self.num_mixed else 1.0

    def build_source(self, make_source):
        source = super().build_source(make_source)
        partial = self.mix_fraction < 1 or self.mix_schedule == "scheduled"
        sources = source if isinstance(source, list) else [source]
        # the clean loss covers only the images that are mixed, so these would be trained on twice and the others once
        if partial and any(part and part.clean_weight for part in sources):
            raise ValueError(
                "a method that mixes only part of each batch cannot also train on the unmixed images in the pass of "
                "its saliency source: add --clean_weight 0 (in your own loop: clean_lam=0, or update_ratio=1 for SAGE)"
            )
        return source

    def start_epoch(self, epoch, epochs, steps):
        super().start_epoch(epoch, epochs, steps)
        self.fraction = self.mix_fraction
        if epoch >= epochs - self.mix_off_epoch:
            self.fraction = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "delayed":
            self.fraction = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "scheduled":
            self.fraction *= epoch / self.mix_scheduled_epoch

    def __call__(self, images, targets, source=None):
        self.num_mixed = int(len(images) * self.fraction)
        if self.num_mixed == 0:
            self.set_weight(images, lambda: 1.0, partner=None)
            return images, targets
        num_clean, mixer = len(images) - self.num_mixed, self.mixers[0]
        mixed, soft = mixer(images[num_clean:], targets[num_clean:], source)
        weight_fn, partner_fn = self.weight_fn, self.partner_fn = mixer.weight_fn, mixer.partner_fn
        if num_clean == 0:
            return mixed, soft
        if weight_fn:
            self.weight_fn = lambda: F.pad(weight_fn(), (0, 0, 0, 0, 0, 0, num_clean, 0), value=1.0)
        if partner_fn:
            self.partner_fn = lambda: prepend_unmixed(partner_fn(), num_clean)
        return torch.cat([images[:num_clean], mixed]), torch.cat([targets[:num_clean], soft])

    def during(self, model):
        return self.mixers[0].during(model) if self.num_mixed else nullcontext()

    def after_backward(self, mixed_grad):
        if self.num_mixed:
            self.mixers[0].after_backward(None if mixed_grad is None else mixed_grad[-self.num_mixed :])


def prepend_unmixed(partner: torch.Tensor, count: int) -> torch.Tensor:
    """Return the partners of a batch with `count` unmixed images before those that partner (n,) refers to."""
    return torch.cat([torch.arange(count, device=partner.device), partner + count])


def compose_mixer(
    names: list[str],
    *,
    method_options: dict[str, dict] | None = None,
    method_weights: Sequence[float] | None = None,
    cutout: bool = False,
    clean_weight: float | None = None,
    labels: str | None = None,
    mix_fraction: float = 1.0,
    mix_schedule: str = "fixed",
    mix_scheduled_epoch: int = 0,
    mix_off_epoch: int = 0,
    **hyper_parameters,
) -> Mixer:
    """Build one mixer from the methods `names`; with several, one is drawn for each batch.

    hyper_parameters go to every method that has them; None means "use the default". method_options: method -> defaults
    for that method alone, which hyper_parameters override. method_weights: see Choice. cutout: first cut holes into the
    images. clean_weight: the weight that the training step gives the loss of the unmixed batch, in place of clean_lam
    and update_ratio of the methods; None: as the method has it. labels: rule of Mixer.set_labels(). mix_*: see
    PartialMix. Raises ValueError for an unknown method, for weights or a hyper-parameter out of range, and for a label
    rule that does not fit a method.
    """
    for_all = {"method_options": method_options, "cutout": cutout, "clean_weight": clean_weight}
    values = collect_hyper_parameters(names, **for_all, **hyper_parameters)
    mixers = [build_mixer(name, **{**hyper_parameters, **values[name]}) for name in names]
    mixer = mixers[0] if len(mixers) == 1 and method_weights is None else Choice(mixers, method_weights)
    mixer.set_labels(labels)
    if mix_fraction < 1 or mix_off_epoch or mix_schedule != "fixed":
        mixer = PartialMix(mixer, mix_fraction, mix_schedule, mix_scheduled_epoch, mix_off_epoch)
    if cutout and names != ["cutout"]:
        mixer = Chain([build_mixer("cutout", **values["cutout"]), mixer])
    return mixer
