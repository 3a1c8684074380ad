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
) -> LRScheduler:
    """Return the learning-rate schedule. The keyword-only parameters are the options of the same names.

    scheduler: `multistep`, `cosine`, `linear` and `constant` change the learning rate between epochs; `onecycle`,
    `points` and the warm-up change it at every step. max_lr: peak of one-cycle; None: lr. One-cycle is torch's
    OneCycleLR, which also cycles the momentum: 0.95 at both ends, 0.85 at the peak.
    """
    if scheduler == "onecycle":
        total_steps = steps.first_step(epochs)
        if pct_start * total_steps == 1:  # torch would divide by the length of the rise, 0 steps
            pct_start *= 1 + 1e-9
        return OneCycleLR(
            optimizer,
            max_lr or lr,
            total_steps=total_steps,
            div_factor=div_factor,
            pct_start=pct_start,
            final_div_factor=final_div_factor,
            cycle_momentum=optimizer.param_groups[0]["momentum"] > 0,
        )
    if scheduler == "points":
        return LambdaLR(optimizer, make_points_factor(steps, parse_lr_points(lr_points), lr))
    warmup_steps = warmup_epochs * steps.locate(0)[2]
    gammas = gammas * len(schedule) if len(gammas) == 1 else gammas

    def factor(step: int) -> float:
        epoch = steps.locate(step)[0]
        warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if scheduler == "multistep":
            return warm * math.prod(gamma for start, gamma in zip(schedule, gammas, strict=True) if epoch >= start)
        if scheduler == "cosine":
            return warm * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
        if scheduler == "linear":
            return warm * max(0.0, 1 - epoch / epochs)
        return warm

    return LambdaLR(optimizer, factor)


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
