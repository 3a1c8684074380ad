"""Frozen layers keep weights and statistics, whatever runs them."""

import pytest
import torch
from torch import nn

from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.training.freezing import freeze_layers
from engine.training.loop import train_one_epoch
from engine.training.loss import LOSSES
from engine.training.network_step import StepConfig
from engine.training.optimizer import build_optimizer
from engine.training.small_batches import check_small_batches
from engine.training.state import TrainingState
from mixing import build_mixer
from models import build_model
from saliency import build_source

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def make_loader(count: int = 8, batch_size: int = 4) -> DeviceLoader:
    pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(count) % 2, ["a", "b"], "random pixels")
    return DeviceLoader(images, batch_size, device=torch.device("cpu"), **HALF)


@pytest.mark.parametrize("method", ["sage", "puzzlemix"])
def test_frozen_layers_keep_their_weights_and_statistics(method):
    """SAGE's clean pass runs in training mode, which sets `training` of each layer."""
    torch.manual_seed(0)
    network = build_model("resnet20", 2, 16)
    notes = freeze_layers(network, ["conv1", "bn1", "layer[12]"])
    assert len(notes) == 1 and "batch norm layers with their running statistics" in notes[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = build_optimizer(network, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, no_decay_bn=True)
    mixer = build_mixer(method, clean_lam=1.0) if method == "puzzlemix" else build_mixer(method, update_ratio=0.5)
    loss = LOSSES["ce"]
    source = build_source("gradient", model=network, training_loss=loss, num_images=8, **mixer.gradient_options, **HALF)
    state = TrainingState(network, optimizer, mixer=mixer, source=source)
    train_one_epoch(state, make_loader(), StepConfig(loss, 2), epoch=0)
    for name, value in network.state_dict().items():
        frozen = not name.startswith(("layer3", "linear"))
        assert torch.equal(value, before[name]) == frozen, name
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(map(id, trained)) == {id(one) for one in network.parameters() if one.requires_grad}
    assert not network.bn1.training and network.train().layer3.training and not network.layer1[0].bn1.training


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["conv1", "laye1"],
            r"--freeze laye1 matches no layer or parameter; did you mean layer1\? \(layers: ",
        ),
        (["*"], "no parameter is left to train"),
    ],
)
def test_a_pattern_without_effect_and_one_that_leaves_nothing_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message) as error:
        freeze_layers(build_model("resnet20", 2, 16), patterns)
    assert "\n" not in str(error.value)


def test_patterns_match_layers_and_parameters_as_in_a_shell():
    network = build_model("resnet20", 2, 16)
    assert freeze_layers(network, None) == []
    freeze_layers(network, ["layer?.0", "*.bn2.bias"])
    for name, parameter in network.named_parameters():
        frozen = name.startswith(("layer1.0.", "layer2.0.", "layer3.0.")) or name.endswith(".bn2.bias")
        assert parameter.requires_grad != frozen, name
    assert network.layer1[1].bn2.training, "a layer with a trainable parameter uses the statistics of the batch"


def test_frozen_batch_norm_can_be_trained_with_one_image():
    network = nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    loader = make_loader(5, 2)
    assert len(check_small_batches(network, [(loader, None)])) == 1
    freeze_layers(network, ["1"])
    assert check_small_batches(network, [(loader, 16)]) == []
    network.train()(torch.zeros(1, 3, 16, 16)).sum().backward()
