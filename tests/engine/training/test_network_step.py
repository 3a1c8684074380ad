"""--graph_step: a captured network step trains as the eager one does. Without a GPU, a FakeGraphs stands in."""

import copy

import pytest
import torch
from fake_graphs import FakeGraphs
from support import same_state
from torch import nn

import saliency
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader, Shard
from engine.training import network_step
from engine.training.loop import train_one_epoch
from engine.training.loss import LOSSES
from engine.training.network_step import StepConfig
from engine.training.optimizer import build_optimizer
from engine.training.sources import SourceBuilder
from engine.training.state import TrainingState, build_training_state
from mixing import compose_mixer
from saliency.bank import Bank

STATISTICS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
HYPER_PARAMETERS = {"puzzlemix": {"block_num": (2,)}, "comixup": {"m_niter": 1}, "rlmix": {"num_patches": 4}}
PIXELS = torch.randint(0, 256, (6 * 8 + 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
IMAGES = ImageSet(PIXELS, torch.arange(len(PIXELS)) % 4, ["a", "b", "c", "d"], "random pixels")


def make_network() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
    network = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    network.stages = ("0", "2")  # manifold mixup needs some
    return network


def make_state(
    method: str,
    source: str | None = None,
    *,
    graph_step: bool,
    device: str = "cpu",
    precision: torch.dtype | None = None,
    kernels: str = "auto",
    clean_weight: float | None = None,
) -> TrainingState:
    network = make_network().to(device)
    optimizer = build_optimizer(network, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"ema": 0.9, "graph_step": graph_step, "kernels": kernels}
    state = build_training_state(network, optimizer, scheduler, precision, **options)
    data = Data(IMAGES, IMAGES, None, **STATISTICS, image_size=16, warnings=[])
    mixer = compose_mixer([method], clean_weight=clean_weight, **STATISTICS, **HYPER_PARAMETERS.get(method, {}))
    config = StepConfig(LOSSES["ce"], 4, precision, clean_weight=clean_weight)
    state.set_mixer(mixer, SourceBuilder(saliency.build_source, state, data, config, loss="ce", saliency=source))
    return state


def train(
    state: TrainingState, epochs: int = 2, micro_batches: int = 1, precision: torch.dtype | None = None, **config
) -> list[dict]:
    """Train for epochs of six batches and a smaller one. Returns the results of each epoch."""
    shard, results = Shard(micro_batches=micro_batches), []
    loader = DeviceLoader(IMAGES, 8, device=state.device, shuffle=True, shard=shard, **STATISTICS)
    config = StepConfig(LOSSES["ce"], 4, precision, **config)
    torch.manual_seed(1)
    for epoch in range(epochs):
        state.mixer.start_epoch(epoch, epochs, len(loader))
        results.append(train_one_epoch(state, loader, config, epoch=epoch))
        if isinstance(state.source, Bank):
            continue
        with state.preserve_state():  # as the drawing of a mixed batch does
            images, labels, *_ = next(loader.epoch())
            state.mixer(images, torch.eye(4, device=state.device)[labels], state.source)
    return results


def compare(method: str, device: str = "cpu", precision: torch.dtype | None = None, **options) -> TrainingState:
    """Train with a captured and an eager step, to the same checkpoint. Returns the first state."""
    own = {"device": device, "precision": precision, "clean_weight": options.get("clean_weight")}
    state, eager = (make_state(method, graph_step=flag, **own) for flag in (True, False))
    assert train(state, precision=precision, **options) == train(eager, precision=precision, **options)
    assert same_state(state.state_dict(), eager.state_dict())
    assert not state.list_step_notes() and not state.graphs.take_notes()
    return state


@pytest.mark.parametrize("method", ["none", "cutmix", "puzzlemix", "rmix", "comixup", "sage"])
def test_a_captured_step_trains_as_the_eager_one(monkeypatch, method):
    fake = FakeGraphs(monkeypatch)
    compare(method, label_smoothing=0.1)
    graphs = 1 if method in ("none", "cutmix") else 2  # the other methods also take gradients of the clean images
    assert fake.captures == graphs and fake.replays >= graphs * (2 * 6 - 3), "the smaller last batch is eager"


def test_gradients_of_micro_batches_and_clean_images_add_up(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    compare("comixup", micro_batches=2, clip_grad=0.5)
    assert fake.captures == 2


@pytest.mark.parametrize(("method", "captures"), [("mixup", 1), ("puzzlemix", 2)])
def test_the_pass_over_the_unmixed_batch_replays_the_graph_of_the_step(monkeypatch, method, captures):
    fake = FakeGraphs(monkeypatch)
    compare(method, clean_weight=0.5, label_smoothing=0.1)
    assert fake.captures == captures and fake.replays >= 2 * (2 * 6 - 3)


def test_a_gradient_scaler_is_captured(monkeypatch):
    FakeGraphs(monkeypatch)
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: copy.deepcopy(scaler))
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(network_step, "autocast", lambda device, precision: bfloat16)
    assert compare("none", precision=torch.float16, clip_grad=1.0).scaler.get_scale() > scaler.get_scale()


@pytest.mark.parametrize(
    "method, source, reason",
    [
        ("manifold", None, "manifold mixup hooks a layer of the network"),
        ("rlmix", None, "rlmix needs the gradient at the mixed images"),
        ("rmix", "bank", "the source learns from the gradient at the images"),
    ],
)
def test_a_step_that_cannot_be_captured_is_eager_with_a_note(monkeypatch, method, source, reason):
    fake = FakeGraphs(monkeypatch)
    state = make_state(method, source, graph_step=True)
    assert state.list_step_notes() == [f"--graph_step has no effect: {reason}"]
    train(state, epochs=1)
    assert fake.captures == (2 if source else 0), "the bank itself is captured"


def test_kernels_torch_captures_no_step(monkeypatch):
    fake = FakeGraphs(monkeypatch)
    state = make_state("saliencymix", graph_step=True, kernels="torch")
    assert state.list_step_notes() == ["--graph_step has no effect: --kernels torch does without CUDA graphs"]
    train(state, epochs=1)
    assert fake.captures == 0


def test_without_cuda_a_note_says_that_the_option_has_no_effect():
    state = make_state("none", graph_step=True)
    assert state.list_step_notes() == ["--graph_step has no effect: a CUDA graph needs a CUDA device, and this is cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["none", "cutmix", "rmix", "comixup", "sage"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
def test_a_captured_step_trains_as_the_eager_one_on_cuda(monkeypatch, method, precision):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert len(compare(method, "cuda", precision).captured_step.recordings) == 1


@pytest.mark.gpu
def test_a_captured_step_needs_no_more_memory_from_epoch_to_epoch():
    state = make_state("cutmix", graph_step=True, device="cuda")
    train(state)
    before = torch.cuda.memory_allocated()
    train(state, epochs=3)
    assert torch.cuda.memory_allocated() <= before + 2**16
