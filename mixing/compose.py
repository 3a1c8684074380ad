"""Methods put together: none, one after the other, one drawn for each batch, a part of each batch."""

import math
from contextlib import nullcontext

import torch
from torch.nn import functional as F

from mixing import build_mixer
from mixing.base import Mixer


class NoMix(Mixer):
    """The plain baseline: every batch as it is."""

    def __call__(self, images, targets, source=None):
        self.keep_weight(images, lambda: 1.0)
        return images, targets


class Chain(Mixer):
    """Several mixers one after the other: a hole cut into every image (Cutout), then a method."""

    def __init__(self, mixers: list[Mixer]):
        self.mixers = mixers
        self.default_source = mixers[-1].default_source
        self.wants_mixed_grad = mixers[-1].wants_mixed_grad
        self.mixes_hidden = any(mixer.mixes_hidden for mixer in mixers)

    @property
    def mixed_weight(self) -> float:
        return self.mixers[-1].mixed_weight

    @property
    def batch_size(self) -> int | None:
        return next((mixer.batch_size for mixer in self.mixers if mixer.batch_size), None)

    @property
    def unusable(self) -> torch.Tensor | int:
        return sum(mixer.unusable for mixer in self.mixers)

    def build_source(self, make):
        return self.mixers[-1].build_source(make)

    def check_size(self, height, width):
        for mixer in self.mixers:
            mixer.check_size(height, width)

    def __call__(self, images, targets, source=None):
        for mixer in self.mixers:
            images, targets = mixer(images, targets, source)
        makers = [mixer.make_weight for mixer in self.mixers]
        self.make_weight = None if None in makers else lambda: math.prod(make() for make in makers)
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
        for mixer, own in zip(self.mixers, state["mixers"], strict=True):
            mixer.load_state_dict(own)


class Choice(Chain):
    """One of several methods, drawn afresh for every batch. It takes a list of sources, one for each method."""

    def __init__(self, mixers: list[Mixer]):
        super().__init__(mixers)
        self.default_source = None
        self.wants_mixed_grad = any(mixer.wants_mixed_grad for mixer in mixers)
        self.drawn = 0

    @property
    def mixed_weight(self) -> float:
        return self.mixers[self.drawn].mixed_weight

    def build_source(self, make):
        sources = [mixer.build_source(make) for mixer in self.mixers]
        return sources if any(sources) else None

    def __call__(self, images, targets, source=None):
        self.drawn = int(torch.randint(len(self.mixers), ()))
        mixer = self.mixers[self.drawn]
        mixed, soft = mixer(images, targets, source and source[self.drawn])
        self.make_weight = mixer.make_weight
        return mixed, soft

    def during(self, model):
        return self.mixers[self.drawn].during(model)

    def after_backward(self, mixed_grad):
        self.mixers[self.drawn].after_backward(mixed_grad)


class PartialMix(Chain):
    """Only the last floor(B * share) images of a batch are mixed, among themselves; the share can follow the epochs.

    mix_schedule: `fixed` mix_fraction throughout; `scheduled` a straight ramp from 0 that reaches mix_fraction at
    mix_scheduled_epoch; `delayed` nothing before that epoch. The last mix_off_epoch epochs are never mixed.
    (The options `--prob_mix`, `--mix_schedule` and `--mix_scheduled_epoch` of the SAGE code.)
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
        self.share, self.mixed = mix_fraction, 0

    @property
    def mixed_weight(self) -> float:
        return self.mixers[0].mixed_weight if self.mixed else 1.0

    def build_source(self, make):
        source = super().build_source(make)
        partial = self.mix_fraction < 1 or self.mix_schedule == "scheduled"
        sources = source if isinstance(source, list) else [source]
        # the clean images of the part that is mixed would be trained on twice
        if partial and any(one and one.clean_weight for one in sources):
            raise ValueError(
                "mixing a part of each batch excludes training on the clean images too: add --clean_lam 0, or with "
                "sage --update_ratio 1"
            )
        return source

    def start_epoch(self, epoch, epochs, steps):
        super().start_epoch(epoch, epochs, steps)
        self.share = self.mix_fraction
        if epoch >= epochs - self.mix_off_epoch:
            self.share = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "delayed":
            self.share = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "scheduled":
            self.share *= epoch / self.mix_scheduled_epoch

    def __call__(self, images, targets, source=None):
        self.mixed = int(len(images) * self.share)
        if self.mixed == 0:
            self.keep_weight(images, lambda: 1.0)
            return images, targets
        clean, mixer = len(images) - self.mixed, self.mixers[0]
        mixed, soft = mixer(images[clean:], targets[clean:], source)
        make = self.make_weight = mixer.make_weight
        if clean == 0:
            return mixed, soft
        if make:
            self.make_weight = lambda: F.pad(make(), (0, 0, 0, 0, 0, 0, clean, 0), value=1.0)
        return torch.cat([images[:clean], mixed]), torch.cat([targets[:clean], soft])

    def during(self, model):
        return self.mixers[0].during(model) if self.mixed else nullcontext()

    def after_backward(self, mixed_grad):
        if self.mixed:
            self.mixers[0].after_backward(None if mixed_grad is None else mixed_grad[-self.mixed :])


def compose_mixer(
    names: list[str],
    *,
    method_options: dict[str, dict] | None = None,
    cutout: bool = False,
    mix_fraction: float = 1.0,
    mix_schedule: str = "fixed",
    mix_scheduled_epoch: int = 0,
    mix_off_epoch: int = 0,
    **hyper_parameters,
) -> Mixer:
    """One mixer for the methods `names`: of several, one is drawn for every batch.

    method_options: method -> hyper-parameters of that method alone. hyper_parameters: for every method that has them;
    they come before method_options, and None means not given. cutout: cut holes into the images first. mix_*: see
    PartialMix. Raises ValueError for an unknown method and for a hyper-parameter out of range.
    """
    given = {key: value for key, value in hyper_parameters.items() if value is not None}
    mixers = [build_mixer(name, **{**(method_options or {}).get(name, {}), **given}) for name in names]
    mixer = mixers[0] if len(mixers) == 1 else Choice(mixers)
    if mix_fraction < 1 or mix_off_epoch or mix_schedule != "fixed":
        mixer = PartialMix(mixer, mix_fraction, mix_schedule, mix_scheduled_epoch, mix_off_epoch)
    if cutout and names != ["cutout"]:
        mixer = Chain([build_mixer("cutout", **given), mixer])
    return mixer
