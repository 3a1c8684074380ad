"""Where an optimizer step falls in a run, and the learning rate there. Schedules are stepped once an iteration."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from engine.config.phases import parse_lr_points


class StepSchedule:
    """Where an optimizer step falls, in a run whose phases may have different numbers of steps an epoch.

    phases: (last epoch, steps an epoch) of each, in order. After its end the last phase goes on.
    """

    def __init__(self, phases: Sequence[tuple[int, int]]):
        self.phases = list(phases)

    def first_step(self, epoch: int) -> int:
        """How many steps come before `epoch`."""
        before, begin = 0, 0
        for end, steps in self.phases[:-1]:
            before += (min(epoch, end) - min(epoch, begin)) * steps
            begin = end
        return before + max(0, epoch - begin) * self.phases[-1][1]

    def locate(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, its number in the epoch, and how many steps that epoch has."""
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
    """The learning-rate schedule. The parameters by name are the options of these names.

    scheduler: multistep, cosine, linear or constant, which change the rate between epochs, or onecycle or points, which
    change it at every iteration; warm-up does so too. max_lr None: lr is the peak.
    One-cycle is torch's: it moves the momentum too, between 0.95 at both ends and 0.85 at the peak.
    """
    if scheduler == "onecycle":
        return OneCycleLR(
            optimizer,
            max_lr or lr,
            total_steps=steps.first_step(epochs),
            div_factor=div_factor,
            pct_start=pct_start,
            final_div_factor=final_div_factor,
            cycle_momentum=optimizer.param_groups[0]["momentum"] > 0,
        )
    if scheduler == "points":
        return LambdaLR(optimizer, points_factor(steps, parse_lr_points(lr_points), lr))
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


def points_factor(steps: StepSchedule, points: Sequence[tuple[float, float]], lr: float) -> Callable[[int], float]:
    """Of each step, the rate on the points relative to lr: in step s of S of an epoch the rate is that at
    epoch + (s + 1) / S, as in the published three-phase ImageNet code.
    """

    def factor(step: int) -> float:
        epoch, within, count = steps.locate(step)
        return interpolate_lr(points, epoch + (within + 1) / count, before=True) / lr

    return factor


def interpolate_lr(points: Sequence[tuple[float, float]], epoch: float, *, before: bool = False) -> float:
    """The learning rate at a real-valued epoch, on straight lines through (epoch, rate) points.

    Where two points share an epoch the rate jumps: the later one counts there, or the earlier one with before=True.
    """
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left < right and (left <= epoch < right or (before and epoch == right)):
            return low + (high - low) * (epoch - left) / (right - left)
    return points[0][1] if epoch < points[0][0] else points[-1][1]
