"""Learning-rate schedules against those of torch and timm, step by step."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from engine.training.optimizer import build_optimizer
from engine.training.schedule import StepSchedule, build_scheduler

OPTIONS = {"schedule": [2, 4], "gammas": [0.1], "warmup_epochs": 0.0, "lr_points": None, "max_lr": None}
OPTIONS |= {"lr": 0.1, "div_factor": 25.0, "pct_start": 0.3, "final_div_factor": 1e4}
EPOCHS, STEPS = 6, 5


def make_optimizer(name: str = "sgd", scales: tuple[float, ...] = (1.0, 0.25)) -> torch.optim.Optimizer:
    """Return an optimizer whose parameter groups have 0.1 times these learning rates."""
    optimizer = build_optimizer(
        nn.Linear(2, 1, bias=False), lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, optimizer=name
    )
    optimizer.param_groups[0]["lr"] = 0.1 * scales[0]
    for scale in scales[1:]:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1 * scale})
    return optimizer


def record(optimizer: torch.optim.Optimizer, scheduler, key: str = "lr", every: int = 1) -> list[tuple]:
    """Return a value of each parameter group at every step. every: steps of the optimizer per step of the scheduler."""
    seen = []
    for step in range(EPOCHS * STEPS):
        seen.append(tuple(group[key] for group in optimizer.param_groups))
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return seen


def build(optimizer: torch.optim.Optimizer, name: str, **options):
    return build_scheduler(
        optimizer, StepSchedule([(EPOCHS, STEPS)]), scheduler=name, epochs=EPOCHS, **OPTIONS | options
    )


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_cosine_step_equals_the_schedule_of_timm(warmup_epochs):
    schedulers = pytest.importorskip("timm.scheduler")
    rate = {"min_lr": 0.01, "warmup_lr": 0.001 if warmup_epochs else None}
    own = make_optimizer()
    seen = record(own, build(own, "cosine_step", warmup_epochs=warmup_epochs, **rate))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    options = {"lr_min": 0.01, "warmup_t": warmup_epochs * STEPS, "warmup_lr_init": 0.001, "t_in_epochs": False}
    theirs = schedulers.CosineLRScheduler(other, EPOCHS * STEPS, **options)
    for step, (rate, small) in enumerate(seen):
        theirs.step_update(step)
        assert rate == pytest.approx(other.param_groups[0]["lr"], abs=1e-6, rel=1e-6), step
        assert small == pytest.approx(0.25 * rate), "the rates of all groups keep their ratios"


@pytest.mark.parametrize(("name", "every"), [("cosine", STEPS), ("cosine_step", 1)])
def test_cosine_equals_that_of_torch_with_a_final_rate(name, every):
    own, other = make_optimizer(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    seen = record(own, build(own, name, min_lr=0.05))
    theirs = record(other, CosineAnnealingLR(other, EPOCHS * STEPS // every, eta_min=0.05), every=every)
    assert [rate for rate, _ in seen] == pytest.approx([rate for (rate,) in theirs], abs=1e-6)
    assert seen[0][0] == 0.1


def test_the_floor_bounds_multistep_and_is_the_end_of_linear():
    own = make_optimizer()
    seen = record(own, build(own, "multistep", min_lr=0.005))
    assert [seen[epoch * STEPS][0] for epoch in range(EPOCHS)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.005, 0.005])
    own = make_optimizer()
    seen = record(own, build(own, "linear", min_lr=0.04))
    assert [seen[epoch * STEPS][0] for epoch in range(EPOCHS)] == pytest.approx([0.1, 0.09, 0.08, 0.07, 0.06, 0.05])


def test_the_warm_up_begins_at_its_own_rate_or_one_step_above_zero():
    for warmup_lr, expected in ((None, [0.02, 0.04, 0.06, 0.08, 0.1]), (0.05, [0.05, 0.06, 0.07, 0.08, 0.09])):
        own = make_optimizer()
        seen = record(own, build(own, "constant", warmup_epochs=1, warmup_lr=warmup_lr))
        assert [rate for rate, _ in seen[: STEPS + 1]] == pytest.approx([*expected, 0.1])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_cycle_moves_momentum_or_the_first_beta_as_torch_does(name):
    key = "betas" if name == "adamw" else "momentum"
    own, other, rates = make_optimizer(name), make_optimizer(name), make_optimizer(name)
    total = EPOCHS * STEPS
    seen = record(own, build(own, "onecycle"), key)
    theirs = record(other, OneCycleLR(other, [0.1, 0.025], total_steps=total, div_factor=25.0), key)
    assert seen == theirs and len(set(seen)) > total / 2
    for rate, small in record(rates, build(rates, "onecycle")):
        assert small == pytest.approx(rate / 4)


def test_one_cycle_leaves_optimizers_without_momentum_alone():
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], 0.1)
    rates = [rate for (rate,) in record(optimizer, build(optimizer, "onecycle"))]
    assert rates[0] == pytest.approx(0.1 / 25) and max(rates) == pytest.approx(0.1) and rates[-1] < 1e-6
