"""Learning-rate schedules, all stepped once an iteration, so that there is one rule for when to step."""

import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from engine.config.phases import parse_lr_points
from engine.training.step_calendar import StepSchedule


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: str,
    epochs: int,
    calendar: StepSchedule,
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
    """scheduler: multistep, cosine, linear or constant, which change the lr between epochs, or onecycle or points at
    every iteration.

    Warm-up moves at every iteration too. max_lr None: the optimizer's lr is the peak. lr_points: text for read_points;
    in step s of S of an epoch the rate is that at epoch + (s + 1) / S, as in the published three-phase ImageNet code.

    One-cycle is torch's: it moves the momentum too, between 0.95 at both ends and 0.85 at the peak.
    """
    if scheduler == "onecycle":
        return OneCycleLR(
            optimizer,
            max_lr or optimizer.param_groups[0]["lr"],
            total_steps=calendar.first_step(epochs),
            div_factor=div_factor,
            pct_start=pct_start,
            final_div_factor=final_div_factor,
            cycle_momentum=optimizer.param_groups[0]["momentum"] > 0,
        )
    if scheduler == "multistep" and len(gammas) == 1:
        gammas = gammas * len(schedule)
    points = parse_lr_points(lr_points) if scheduler == "points" else None
    warmup_steps = warmup_epochs * calendar.place(0)[2]

    def factor(step: int) -> float:
        epoch, inside, steps = calendar.place(step)
        if points:
            return interpolate_lr(points, epoch + (inside + 1) / steps, before=True) / lr
        warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if scheduler == "multistep":
            return warm * math.prod(gamma for start, gamma in zip(schedule, gammas, strict=True) if epoch >= start)
        if scheduler == "cosine":
            return warm * (1 + math.cos(math.pi * min(1.0, epoch / epochs))) / 2
        if scheduler == "linear":
            return warm * max(0.0, 1 - epoch / epochs)
        return warm

    return LambdaLR(optimizer, factor)


def interpolate_lr(points: Sequence[tuple[float, float]], epoch: float, *, before: bool = False) -> float:
    """The learning rate at a real-valued epoch, on straight lines through (epoch, rate) points.

    Where two points share an epoch the rate jumps: the later one counts there, or the earlier one with before=True.
    """
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left < right and (left <= epoch < right or (before and epoch == right)):
            return low + (high - low) * (epoch - left) / (right - left)
    return points[0][1] if epoch < points[0][0] else points[-1][1]
