"""--clean_weight: the loss of the unmixed batch is added for every method, where it can in the pass of the source."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import saliency
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader
from engine.training.loop import profile_steps, train_one_epoch
from engine.training.loss import LOSSES, smooth_labels
from engine.training.network_step import StepConfig
from engine.training.optimizer import build_optimizer
from engine.training.sources import SourceBuilder
from engine.training.state import TrainingState, build_training_state
from mixing import compose_mixer

STATISTICS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
WEIGHT, SMOOTHING, RATE = 0.5, 0.1, 0.1
PIXELS = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
IMAGES = ImageSet(PIXELS, torch.arange(10) % 4, ["a", "b", "c", "d"], "random pixels")
CASES = {  # name -> methods, source, options, passes over the network that train it
    "none": ("none", None, {}, 1),
    "a batch that the method leaves unmixed": ("mixup", None, {"mix_prob": 0.0}, 1),
    "an epoch without mixing": ("puzzlemix", None, {"mix_off_epoch": 1}, 1),
    "mixup": ("mixup", None, {}, 2),
    "cutout": ("cutout", None, {"cutout_length": 4}, 2),
    "a part of the batch": ("mixup", None, {"mix_fraction": 0.4}, 2),
    "saliencymix": ("saliencymix", None, {}, 2),
    "saliencymix by the gradient": ("saliencymix", "gradient", {}, 2),
    "puzzlemix": ("puzzlemix", None, {"block_num": (2,)}, 2),
    "comixup": ("comixup", None, {"m_block_num": 2}, 2),
    "sage": ("sage", None, {"update_ratio": 0.7}, 2),
    "rmix": ("rmix", None, {"random_patches": (4,)}, 2),
    "rmix by Grad-CAM": ("rmix", "gradcam", {"random_patches": (4,)}, 2),
    "sage by the bank": ("sage", "bank", {}, 2),
    "one of two": ("mixup puzzlemix", None, {"block_num": (2,)}, 2),
}


class Network(nn.Sequential):
    stages = ("0", "3")

    def __init__(self):
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class RecordedLoss:
    """A loss that records the targets of the passes from which parameters get a gradient."""

    def __init__(self, network: nn.Module):
        self.network, self.targets = network, []

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.network[0].weight.requires_grad:
            self.targets.append(targets.clone())
        return LOSSES["ce"](logits, targets)


def make_state(methods: str, source: str | None, config: StepConfig, **options) -> TrainingState:
    network = config.loss_fn.network
    optimizer = build_optimizer(network, lr=RATE, momentum=0.0, nesterov=False, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = build_training_state(network, optimizer, scheduler)
    options = {"mix_prob": 1.0, **options, "clean_weight": config.clean_weight}
    mixer = compose_mixer(methods.split(), **options, **STATISTICS)
    data = Data(IMAGES, IMAGES, None, **STATISTICS, image_size=8, warnings=[])
    state.set_mixer(mixer, SourceBuilder(saliency.build_source, state, data, config, loss="ce", saliency=source))
    return state


def make_config() -> StepConfig:
    torch.manual_seed(0)
    network = Network()
    return StepConfig(RecordedLoss(network), 4, label_smoothing=SMOOTHING, clean_weight=WEIGHT)


def make_loader() -> DeviceLoader:
    return DeviceLoader(IMAGES, 10, device=torch.device("cpu"), shuffle=True, **STATISTICS)


def train_a_step(case: str) -> tuple[StepConfig, nn.Module, list[torch.Tensor]]:
    """Train one step. Returns the configuration, the network before it, and the images of the passes that train."""
    methods, source, options, _ = CASES[case]
    config = make_config()
    state = make_state(methods, source, config, **options)
    before, images = copy.deepcopy(state.model), []

    def record(network, arguments):
        if network.training and network[0].weight.requires_grad:
            images.append(arguments[0].detach().clone())

    state.model.register_forward_pre_hook(record)
    state.mixer.start_epoch(0, 1, 1)
    torch.manual_seed(3)
    train_one_epoch(state, make_loader(), config, epoch=0)
    return config, before, images


@pytest.mark.parametrize("case", CASES)
def test_a_step_follows_the_mixed_loss_and_the_weighted_loss_of_the_unmixed_batch(case):
    """With the loss and the smoothed labels of the run, in one pass for each of the two."""
    config, before, images = train_a_step(case)
    targets, batch = config.loss_fn.targets, next(make_loader().epoch(0))
    assert len(images) == len(targets) == CASES[case][3]
    clean = smooth_labels(F.one_hot(batch.labels, 4).float(), SMOOTHING)
    weights = [WEIGHT, 1.0] if len(images) == 2 else [1.0]
    assert torch.equal(images[0], batch.images) and torch.allclose(targets[0], clean)
    losses = [weight * LOSSES["ce"](before(x), y) for weight, x, y in zip(weights, images, targets, strict=True)]
    sum(losses).backward()
    for (name, moved), start in zip(config.loss_fn.network.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(moved, start - RATE * start.grad, atol=1e-6, rtol=1e-4, msg=f"{case}: {name}")


def test_no_hidden_layer_of_the_unmixed_batch_is_mixed():
    config = make_config()
    state, hooked = make_state("manifold", None, config), []
    stages = [state.model.get_submodule(name) for name in state.model.stages]
    state.model.register_forward_pre_hook(lambda *_: hooked.append(sum(len(one._forward_hooks) for one in stages)))
    for epoch in range(6):
        train_one_epoch(state, make_loader(), config, epoch=epoch)
        assert hooked[-2:] == [0, state.mixer.depth > 0]
    assert 1 in hooked


def test_the_loss_that_is_reported_is_that_of_the_mixed_images():
    config = make_config()
    state = make_state("mixup", None, config)
    before, seen = copy.deepcopy(state.model), []
    state.model.register_forward_pre_hook(lambda network, arguments: seen.append(arguments[0].clone()))
    row = train_one_epoch(state, make_loader(), config, epoch=0)
    assert row["train_loss"] == pytest.approx(LOSSES["ce"](before(seen[1]), config.loss_fn.targets[1]).item(), rel=1e-5)


def test_the_bank_learns_from_the_mixed_batch_alone():
    def learn(clean_weight: float | None) -> torch.Tensor:
        config = make_config()
        if clean_weight is None:
            config = StepConfig(config.loss_fn, 4, label_smoothing=SMOOTHING)
        state = make_state("rmix", "bank", config, random_patches=(4,))
        torch.manual_seed(3)
        state.mixer.start_epoch(0, 1, 1)
        train_one_epoch(state, make_loader(), config, epoch=0)
        return state.source.maps

    torch.testing.assert_close(learn(WEIGHT), learn(None))


def test_a_gradient_source_cannot_train_on_the_unmixed_images_of_a_part_of_the_batch():
    with pytest.raises(ValueError, match="only part of each batch .* add --clean_weight 0"):
        make_state("puzzlemix", None, make_config(), block_num=(2,), mix_fraction=0.5)


def test_weight_0_turns_off_the_loss_that_a_method_adds_itself():
    config = StepConfig(RecordedLoss(Network()), 4, clean_weight=0.0)
    for method in ("comixup", "sage"):
        assert make_state(method, None, config).source.clean_weight == 0
    assert make_state("comixup", None, config).source.mode == "eval"


@pytest.mark.parametrize(("case", "clean"), [("mixup", True), ("puzzlemix", False), ("none", False)])
def test_the_profile_has_a_row_for_a_pass_of_the_unmixed_batch_alone(case, clean):
    methods, source, options, _ = CASES[case]
    config = make_config()
    table = profile_steps(make_state(methods, source, config, **options), make_loader(), config, steps=2)
    assert ("clean" in table) == clean
