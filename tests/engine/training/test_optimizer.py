"""The fused optimizer step needs equal memory formats of parameter, gradient and momentum."""

import copy

import pytest
import torch
from torch import nn

from engine.training.optimizer import build_optimizer, load_optimizer_state
from models import build_model

OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Run a training step on random images."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    device = next(network.parameters()).device
    optimizer.zero_grad()
    network(images.to(device, memory_format=torch.channels_last)).square().sum().backward()
    optimizer.step()


def get_strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides of all dimensions whose stride matters."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def build_small_network() -> nn.Module:
    """Return a network with 1x1 and depthwise convolutions."""
    convolutions = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1, 2)
    return nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(900, 2))


@pytest.mark.parametrize(
    "name, device",
    [("small", "cpu"), *(pytest.param(f"{kind}resnet50", "cuda", marks=pytest.mark.gpu) for kind in ("", "imagenet_"))],
)
def test_gradient_and_momentum_have_the_strides_of_their_parameter(name, device):
    """With 1x1 convolutions, too, where the strides of channels_last are ambiguous."""
    network = build_small_network() if name == "small" else build_model(name, 10, 32)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(network, **OPTIONS)
    step(network, optimizer, 0)
    for parameter in network.parameters():
        for other in (parameter.grad, optimizer.state[parameter]["momentum_buffer"]):
            assert get_strides(other) == get_strides(parameter)
    load_optimizer_state(optimizer, copy.deepcopy(optimizer.state_dict()))
    step(network, optimizer, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("formats", [("channels_last", "contiguous_format"), ("contiguous_format", "channels_last")])
def test_a_restored_momentum_takes_the_memory_format_of_its_parameter(formats, device):
    before, after = (getattr(torch, name) for name in formats)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2)).to(device)
    weights = []
    for now in (before, after):
        current = copy.deepcopy(network).to(memory_format=before)
        optimizer = build_optimizer(current, **OPTIONS)
        step(current, optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        current = current.to(memory_format=now)
        resumed = build_optimizer(current, **OPTIONS)
        load_optimizer_state(resumed, saved)
        step(current, resumed, 1)
        weights.append(current[0].weight.detach().clone())
    torch.testing.assert_close(*weights)
