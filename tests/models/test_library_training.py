"""Every classifier of torchvision, and a few of timm: a training step with R-Mix, an evaluation, an activation map.

One network of each family runs by default, on small images; the others need --slow.
"""

import pytest
import torch
import torchvision

from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader
from engine.training.evaluate import evaluate_held_out
from engine.training.loop import train_one_epoch
from engine.training.loss import LOSSES
from engine.training.network_step import StepConfig
from engine.training.optimizer import build_optimizer
from engine.training.sources import SourceBuilder
from engine.training.state import build_training_state
from mixing import compose_mixer
from models import build_model
from saliency import build_source
from saliency.cam import ActivationMaps

CLASSES = 5
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
SIZES = {"alexnet": 64, "inception_v3": 80, "maxvit_t": 224, "vit_h_14": 112}  # others: 32
MODEL_ARGS = {"vgg11": {"init_weights": False}}  # saves seconds
FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"]
FAMILIES += ["inception_v3", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"]
FAMILIES += ["regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t"]
FAMILIES += ["swin_v2_t", "vgg11", "vit_b_32"]
ALL = torchvision.models.list_models(module=torchvision.models)
TORCHVISION = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4, "depth": 2, "drop_path_rate": 0.1},
    "convnext_atto": {"patch_size": 2, "drop_path_rate": 0.1},
    "resnet10t": {},
    "swin_tiny_patch4_window7_224": {"patch_size": 2, "window_size": 4, "depths": [1, 1, 1, 1]},
}


def make_images(count: int, size: int) -> ImageSet:
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % CLASSES, [f"class{k}" for k in range(CLASSES)], "random pixels")


def run_everything(name: str, size: int, model_args: dict) -> None:
    """Train for one step with R-Mix and evaluate; an activation map is drawn or refused in one line."""
    torch.manual_seed(0)
    images = make_images(4, size)
    data = Data(images, images, None, **STATISTICS, image_size=size, warnings=[])
    loader = DeviceLoader(images, 4, device=torch.device("cpu"), shuffle=True, **STATISTICS)
    network = build_model(name, CLASSES, size, model_args=model_args)
    head = list(network.parameters())[-2:]
    before = [parameter.detach().clone() for parameter in head]
    optimizer = build_optimizer(network, lr=1e-4, momentum=0.0, nesterov=False, weight_decay=0.0)
    state = build_training_state(network, optimizer, None, None)
    mixer = compose_mixer(["rmix"], **STATISTICS)
    config = StepConfig(LOSSES["ce"], CLASSES, None)
    state.set_mixer(mixer, SourceBuilder(build_source, state, data, config, loss="ce", saliency=None))
    mixer.start_epoch(0, 1, 1)
    row = train_one_epoch(state, loader, config, epoch=0)
    assert row["images"] == 4 and 0 < row["train_loss"] < 20
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not all(map(torch.equal, before, head))
    scores = evaluate_held_out(state, {"test": DeviceLoader(images, 4, device=loader.device, **STATISTICS)}, bar=False)
    assert torch.isfinite(torch.tensor(scores["test_loss"]))
    batch = torch.randn(1, 3, size, size)
    try:
        maps = ActivationMaps(network, "gradcam")(batch, torch.tensor([1]))
    except ValueError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert maps.shape[0] == 1 and maps.dim() == 3 and maps.isfinite().all()


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_classifier_of_torchvision_trains(name):
    run_everything(f"torchvision:{name}", SIZES.get(name, 32), MODEL_ARGS.get(name, {}))


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_train(name):
    pytest.importorskip("timm")
    run_everything(f"timm:{name}", 32, TIMM[name])


def test_the_families_are_names_of_torchvision():
    assert set(FAMILIES) <= set(ALL) and len(ALL) >= 80
