"""Optimizers against those of torch and timm, their state, and the memory formats that a fused step needs."""

import copy
import sys

import pytest
import torch
from support import same_state
from torch import nn

from engine.training.optimizer import build_optimizer, find_undecayed, load_optimizer_state
from engine.training.schedule import StepSchedule, build_scheduler
from engine.training.state import TrainingState, build_training_state, get_plain_scheduler_state
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


def build_transformer(**options) -> nn.Module:
    """Return a small ViT of timm for images of 32 pixels."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 2} | options
    options |= {"qkv_bias": False}  # the gradient of a bias of the keys is nothing but rounding errors
    return timm.create_model("vit_tiny_patch16_224", **options)


def list_settings(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Return the learning rate and the weight decay of each parameter."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = optimizer.param_groups
    return {
        names[id(one)]: (group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in groups
        for one in group["params"]
    }


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_adamw_and_its_parameter_groups_equal_those_of_timm_step_by_step(layer_decay):
    timm = pytest.importorskip("timm.optim")
    own, other = build_transformer(), build_transformer()
    options = {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.95), "eps": 1e-7, "layer_decay": layer_decay}
    ours = build_optimizer(own, optimizer="adamw", momentum=0.9, nesterov=True, no_decay_1d=True, **options)
    theirs = timm.create_optimizer_v2(other, "adamw", **options)
    one, two = list_settings(own, ours), list_settings(other, theirs)
    assert one.keys() == two.keys()
    assert [pair for name in one for pair in one[name]] == pytest.approx([pair for name in one for pair in two[name]])
    for group in theirs.param_groups:
        group["lr"] *= group.get("lr_scale", 1.0)  # as timm's schedules do
    for seed in range(5):
        step(own, ours, seed)
        step(other, theirs, seed)
        for (name, one), two in zip(own.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_adamw_equals_that_of_torch_step_by_step():
    own = nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(800, 2))
    other = copy.deepcopy(own)
    ours = build_optimizer(own, optimizer="adamw", **OPTIONS | {"lr": 0.001})
    theirs = torch.optim.AdamW(other.parameters(), 0.001, weight_decay=1e-4, foreach=False)
    for seed in range(10):
        step(own, ours, seed)
        step(other, theirs, seed)
        for one, two in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_torchvision_transformers_have_no_decay_on_tokens_positions_and_one_dimension():
    from torchvision.models import SwinTransformer, VisionTransformer

    vit = VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=2)
    swin = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=2)
    for network in (vit, swin):
        undecayed = set(find_undecayed(network, no_decay_bn=False, no_decay_1d=True))
        decayed = [name for name, _ in network.named_parameters() if name not in undecayed]
        assert all(name.endswith("weight") for name in decayed), decayed
        assert "features.0.0.weight" in decayed or "conv_proj.weight" in decayed
    assert find_undecayed(swin, no_decay_bn=False, no_decay_1d=False) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "timm:lam"}, "did you mean lamb"),
        ({"optimizer": "timm:foo_adamw"}, "no such optimizer"),
        ({"optimizer": "timm:adahessian"}, "second derivatives"),
        ({"optimizer": "timm:fusedadam"}, "CUDA required"),
        ({"optimizer": "timm:adan", "betas": [0.9, 0.99]}, "takes 3 of them"),
        ({"optimizer": "adamw", "betas": [0.9]}, "takes 2 of them"),
        ({"layer_decay": 0.5}, "take --model timm:NAME"),
    ],
)
def test_what_cannot_be_built_is_named_in_one_line(options, message):
    pytest.importorskip("timm")
    if torch.cuda.is_available() and "fused" in options.get("optimizer", ""):
        pytest.skip("CUDA is there")
    with pytest.raises(ValueError, match=message) as error:
        build_optimizer(build_small_network(), **OPTIONS | options)
    assert "\n" not in str(error.value)


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ValueError, match="--optimizer timm:lamb needs the package timm: pip install timm"):
        build_optimizer(build_small_network(), **OPTIONS | {"optimizer": "timm:lamb"})


OPTIMIZERS = ["sgd", "adamw", "timm:lamb", "timm:lion", "timm:adan", "timm:adafactorbv", "timm:lookahead_adamw"]


@pytest.mark.parametrize("scheduler", ["cosine_step", "onecycle"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, pytest.param("timm:kron", marks=pytest.mark.slow), "layer decay"])
def test_a_resumed_optimizer_goes_on_exactly(name, scheduler, tmp_path):
    network = build_transformer() if name == "layer decay" else build_small_network()
    options = {"optimizer": "adamw", "layer_decay": 0.5} if name == "layer decay" else {"optimizer": name}
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    state = build_state(network, scheduler, **options)
    for seed in range(7):  # lookahead has synchronised once
        step(network, state.optimizer, seed)
        state.scheduler.step()
    saved = {"optimizer": state.optimizer.state_dict(), "scheduler": get_plain_scheduler_state(state.scheduler)}
    torch.save(saved, tmp_path / "saved.pt")
    resumed = build_state(copy.deepcopy(network), scheduler, **options)
    resumed.load_optimizer(torch.load(tmp_path / "saved.pt", weights_only=True))
    for one in (state, resumed):
        torch.manual_seed(0)
        for seed in range(7, 14):
            step(one.model, one.optimizer, seed)
            one.scheduler.step()
    assert same_state(state.model.state_dict(), resumed.model.state_dict())
    assert same_state(state.optimizer.state_dict(), resumed.optimizer.state_dict())


def build_state(network: nn.Module, scheduler: str = "cosine_step", **options) -> TrainingState:
    optimizer = build_optimizer(network, **OPTIONS | {"lr": 0.01, "no_decay_1d": True} | options)
    options = {"schedule": [], "gammas": [0.1], "warmup_epochs": 1, "lr_points": None, "max_lr": None, "lr": 0.01}
    options |= {"div_factor": 25.0, "pct_start": 0.3, "final_div_factor": 1e4, "epochs": 5}
    steps = StepSchedule([(5, 4)])
    return build_training_state(network, optimizer, build_scheduler(optimizer, steps, scheduler=scheduler, **options))


def test_a_resumed_optimizer_has_the_hyper_parameters_of_today(tmp_path):
    network = build_small_network()
    state = build_state(network, optimizer="adamw")
    step(network, state.optimizer, 0)
    state.scheduler.step()
    saved = {"optimizer": state.optimizer.state_dict(), "scheduler": get_plain_scheduler_state(state.scheduler)}
    today = build_state(network, optimizer="adamw", betas=[0.5, 0.6], eps=1e-3, weight_decay=0.3)
    today.load_optimizer(saved)
    decayed, others = today.optimizer.param_groups
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.5, 0.6), 1e-3, 0.3)
    assert others["weight_decay"] == 0 and others["betas"] == (0.5, 0.6)
