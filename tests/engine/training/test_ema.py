"""The ramp of the decay of the weight average."""

import math

import pytest
import torch
from torch import nn

from engine.training.ema import ModelEma

STEPS = 40


def test_the_ramp_equals_the_momentum_of_openmixup_step_by_step():
    """CosineScheduleHook(end_momentum=0.999999, adjust_scope=[0.1, 1.0], warming_up="constant") after base 0.999."""
    network = nn.Linear(3, 2, dtype=torch.float64)
    average = ModelEma(network, 0.999, STEPS)
    expected, decays = network.weight.detach().clone(), []
    for step in range(STEPS):
        with torch.no_grad():
            network.weight += torch.randn_like(network.weight)
        momentum = 0.999
        if step >= int(0.1 * STEPS):
            momentum = 0.999999 - (0.999999 - 0.999) * (math.cos(math.pi * step / STEPS) + 1) / 2
        decays.append(average.get_decay())
        average.update(network)
        expected = momentum * expected + (1 - momentum) * network.weight.detach()
        assert decays[-1] == pytest.approx(momentum, abs=1e-12)
        torch.testing.assert_close(average.module.weight, expected, atol=1e-6, rtol=0)
    assert decays[:4] == [0.999] * 4 and decays == sorted(decays) and average.get_decay() == pytest.approx(0.999999)


def test_without_a_ramp_the_decay_is_constant():
    average = ModelEma(nn.Linear(3, 2), 0.9)
    for _ in range(3):
        average.update(nn.Linear(3, 2))
        assert average.get_decay() == 0.9
