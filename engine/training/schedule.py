"""Learning-rate schedules. All are stepped once per optimizer step."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from engine.config.phases import parse_lr_points


class StepSchedule:
    """Converts between optimizer steps and epochs in a run whose phases may have different numbers of steps per epoch.

    phases: (end epoch, steps per epoch) of each phase, in order. The last phase continues beyond its end.
    """

    def __init__(self, phases: Sequence[tuple[int, int]]):
        self.phases = list(phases)

    def first_step(self, epoch: int) -> int:
        """Return the first step of an epoch, which is also the number of steps before it."""
        before, begin = 0, 0
        for end, steps in self.phases[:-1]:
            before += (min(epoch, end) - min(epoch, begin)) * steps
            begin = end
        return before + max(0, epoch - begin) * self.phases[-1][1]

    def locate(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, the position of the step in that epoch, and the number of steps in that epoch."""
        begin = 0
        for end, steps in self.phases[:-1]:
            if step < (end - begin) * steps:
                break
            step -= (end - begin) * steps
            begin = end
        else:
            steps = self.phases[-1][1]
        return begin + step // steps, step % steps, steps


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    /,
    steps: StepSchedule,
    *,
    scheduler: str,
    epochs: int,
    schedule: list[int],
    gammas: list[float],
    warmup_epochs: float,
    lr: float,
    lr_points: str | None,
    max_lr: float | None,
    div_factor: float,
    pct_start: float,
    final_div_factor: float,
    min_lr: float = 0.0,
    warmup_lr: float | None = None,
) -> LRScheduler:
    """Return the learning-rate schedule. The keyword-only parameters are the options of the same names.

    scheduler: `multistep`, `cosine`, `linear` and `constant` change the learning rate between epochs; `cosine_step`,
    `onecycle`, `points` and the warm-up change it at every step. max_lr: peak of one-cycle; None: lr. One-cycle is
    torch's OneCycleLR, which also cycles the momentum or the first beta: 0.95 at both ends, 0.85 at the peak. The rates
    of all parameter groups keep their ratios.
    """
    if scheduler == "onecycle":
        total_steps = steps.first_step(epochs)
        if pct_start * total_steps == 1:  # torch would divide by the length of the rise, 0 steps
            pct_start *= 1 + 1e-9
        return OneCycleLR(
            optimizer,
            [(max_lr or lr) * (group["lr"] / lr) for group in optimizer.param_groups],
            total_steps=total_steps,
            div_factor=div_factor,
            pct_start=pct_start,
            final_div_factor=final_div_factor,
            cycle_momentum="betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0,
        )
    if scheduler == "points":
        return LambdaLR(optimizer, make_points_factor(steps, parse_lr_points(lr_points), lr))
    warmup_steps, start = warmup_epochs * steps.locate(0)[2], warmup_lr and warmup_lr / lr
    gammas = gammas * len(schedule) if len(gammas) == 1 else gammas
    decay = make_decay_factor(steps, scheduler, epochs, list(zip(schedule, gammas, strict=False)), min_lr / lr)

    def factor(step: int) -> float:
        if step >= warmup_steps:
            return decay(step)
        warm = (step + 1) / warmup_steps if start is None else start + (1 - start) * step / warmup_steps
        return min(1.0, warm) * (1.0 if scheduler == "cosine_step" else decay(step))

    return LambdaLR(optimizer, factor)


def make_decay_factor(
    steps: StepSchedule, scheduler: str, epochs: int, drops: Sequence[tuple[int, float]], floor: float
) -> Callable[[int], float]:
    """Return the function step -> learning rate relative to its highest value, without the warm-up.

    drops: (epoch, factor) pairs of `multistep`, whose rate never falls below the floor; the others end at it.
    `cosine_step` equals timm's CosineLRScheduler, where the warm-up replaces the first steps of the cosine.
    """
    total_steps = steps.first_step(epochs)

    def factor(step: int) -> float:
        epoch = steps.locate(step)[0]
        if scheduler == "multistep":
            return max(floor, math.prod(gamma for start, gamma in drops if epoch >= start))
        if scheduler == "linear":
            return floor + (1 - floor) * max(0.0, 1 - epoch / epochs)
        if scheduler in ("cosine", "cosine_step"):
            done = epoch / epochs if scheduler == "cosine" else step / total_steps
            return floor + (1 - floor) * ((1 + math.cos(math.pi * min(1.0, done))) / 2)
        return 1.0

    return factor


def make_points_factor(steps: StepSchedule, points: Sequence[tuple[float, float]], lr: float) -> Callable[[int], float]:
    """Return the function step -> learning rate relative to lr, for a schedule through `points`.

    Step s of the S steps of an epoch has the rate at epoch + (s + 1) / S, as in the published three-phase ImageNet
    code.
    """

    def factor(step: int) -> float:
        epoch, within, count = steps.locate(step)
        return interpolate_lr(points, epoch + (within + 1) / count, before=True) / lr

    return factor


def interpolate_lr(points: Sequence[tuple[float, float]], epoch: float, *, before: bool = False) -> float:
    """Return the learning rate at a real-valued epoch, interpolated linearly between (epoch, rate) points.

    Two points at the same epoch are a jump: there the later point holds or, with before=True, the earlier one.
    """
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left < right and (left <= epoch < right or (before and epoch == right)):
            return low + (high - low) * (epoch - left) / (right - left)
    return points[0][1] if epoch < points[0][0] else points[-1][1]
