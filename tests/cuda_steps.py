"""Steps on the device of fake_cuda.py, built as the scripts build them: what each launches, and what a GPU minds."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from fake_cuda import fake_cuda
from fake_operations import CUDA, FakeCuda, Finding, find_device_mix_up
from torch import nn

import models
import saliency
import saliency.casm.training as casm
from detection.faster_rcnn import DetectorConfig, build_detector, set_trainable_layers
from detection.loader import DetectionLoader
from detection.loop import train_one_epoch as train_detector
from detection.shape_scenes import draw_scenes
from engine.data.augment import Augmentation
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader, Shard
from engine.inference.predict import predict
from engine.training.freezing import freeze_layers
from engine.training.loop import train_one_epoch
from engine.training.loss import build_loss
from engine.training.monitor import EpochMonitor
from engine.training.network_step import StepConfig
from engine.training.optimizer import build_optimizer
from engine.training.sources import SourceBuilder
from engine.training.state import build_training_state, place_network
from engine.training.stopwatch import Stopwatch
from mixing import MIXERS, compose_mixer
from models.stages import StagedNetwork
from saliency.casm.network import CasmNetwork, build_decoder
from saliency.casm.pool import ClassifierPool

PHASES = ("data", "saliency", "mixing", "network")
CLASSES, SIDE = 10, 32
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


class SmallNetwork(StagedNetwork):
    """A classifier of a few layers, where the network does not matter."""

    stages, raw_stem = ("layer1", "layer2"), True

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, bias=False))
        self.layer2 = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False))
        self.linear = nn.Linear(16, CLASSES)

    def stem(self, images):
        return self.conv1(images)


class SmallTransformer(nn.Module):
    """The same with a class token and a layer of fused attention."""

    def __init__(self):
        super().__init__()
        self.class_token, self.patches = nn.Parameter(torch.zeros(1, 1, 16)), nn.Conv2d(3, 16, 8, 8)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head((tokens + mixed)[:, 0])


class LaunchWatch(Stopwatch):
    """Counts launches in place of seconds."""

    def __init__(self, fake: FakeCuda):
        super().__init__(torch.device("cpu"))
        self.fake = fake

    def now(self) -> int:
        return self.fake.launches


class StepDone(Exception):
    """The step that is counted has ended."""


class StepCounter:
    """Counts the launches and the findings of one step, which follows `warm_up` steps that make the constants.

    As a context manager it ends quietly with the step, and it turns a device mix-up into a finding. All steps draw the
    same random numbers on the host, so that they need the same constants.
    """

    def __init__(self, fake: FakeCuda, warm_up: int = 1):
        self.fake, self.warm_up, self.steps = fake, warm_up, 0
        self.watch = LaunchWatch(fake)

    def monitor(self, **options) -> EpochMonitor:
        return EpochMonitor(CUDA, watch=self.watch, after_step=self.end_step, **options)

    def end_step(self, *_) -> None:
        """Note the end of a step. Raises StepDone after the counted one."""
        self.steps += 1
        if self.steps > self.warm_up:
            raise StepDone
        if self.steps == self.warm_up:
            self.watch.host.clear()
            self.fake.findings.clear()
        torch.manual_seed(0)

    @property
    def launches(self) -> dict[str, int]:
        """The launches of each phase of the step."""
        return {phase: int(self.watch.host.get(phase, 0)) for phase in PHASES}

    @property
    def findings(self) -> Counter[Finding]:
        return self.fake.findings

    @property
    def waits(self) -> int:
        return sum(count for finding, count in self.findings.items() if finding.kind == "wait")

    def __enter__(self) -> "StepCounter":
        torch.manual_seed(0)
        return self

    def __exit__(self, kind, error, trace) -> bool:
        if mix_up := find_device_mix_up(error):
            self.findings[mix_up] += 1
        elif error is None:
            raise AssertionError(f"there were only {self.steps} steps")
        return bool(mix_up) or kind is StepDone


def check(counter: StepCounter, places: tuple[str, ...] = (), whats: tuple[str, ...] = ()) -> None:
    """Fail with everything that was found in the step. places, whats: of waits that are there by design."""
    lines = [
        f"{count} x {finding}"
        for finding, count in counter.findings.items()
        if finding.kind != "wait" or finding.place.split(":")[0] not in places and finding.what not in whats
    ]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def make_image_set(count: int) -> ImageSet:
    pixels = torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % CLASSES, [f"class{k}" for k in range(CLASSES)], "random pixels")


SMALL_NETWORKS = {None: SmallNetwork, "transformer": SmallTransformer}


def make_network(name: str | None = None) -> nn.Module:
    """Return a network of the registry or a small one on the fake device."""
    network = SMALL_NETWORKS[name]() if name in SMALL_NETWORKS else models.build_model(name, CLASSES, SIDE)
    return place_network(network, CUDA, channels_last=True, sync_bn=False)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def count_training_step(
    method: str,
    source: str | None = None,
    precision: torch.dtype | None = torch.bfloat16,
    *,
    model: str | None = None,
    images: ImageSet | None = None,
    batch_size: int = 20,
    micro_batches: int = 1,
    augmentation: Augmentation | None = None,
    warm_up: int = 1,
    ema: float = 0.0,
    ema_ramp: bool = False,
    graph_step: bool = False,
    optimizer_options: dict | None = None,
    loss: str = "softmax_bce",
    bce_target_thresh: float | None = None,
    freeze: tuple[str, ...] = (),
    source_options: dict | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
    clean_weight: float | None = None,
    **hyper_parameters,
) -> StepCounter:
    """Count a step of engine.training.loop.train_one_epoch. source: None for the method's own; model: see make_network.

    The other arguments are those of the objects that the step is built from.
    """
    with fake_cuda() as fake:
        images = images or make_image_set((warm_up + 2) * batch_size)
        data = Data(images, images, None, **STATISTICS, image_size=SIDE, warnings=[])
        loader = DeviceLoader(
            images,
            batch_size,
            device=CUDA,
            shuffle=True,
            augmentation=augmentation or Augmentation(4),
            shard=Shard(micro_batches=micro_batches),
            **STATISTICS,
        )
        network = make_network(model)
        freeze_layers(network, freeze)
        options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, **(optimizer_options or {})}
        optimizer = build_optimizer(network, **options)
        options = {"ema": ema, "ema_ramp": ema_ramp, "total_steps": 10, "graph_step": graph_step}
        state = build_training_state(network, optimizer, make_scheduler(optimizer), precision, **options)
        config = StepConfig(
            build_loss(loss, bce_target_thresh), CLASSES, precision, label_smoothing, clip_grad, clean_weight
        )
        hyper_parameters |= {"mix_prob": 1.0, "clean_weight": clean_weight, **STATISTICS}
        mixer = compose_mixer(method.split(), **hyper_parameters)
        options = {"loss": loss, "saliency": source, **(source_options or {})}
        state.set_mixer(mixer, SourceBuilder(saliency.build_source, state, data, config, **options))
        with StepCounter(fake, warm_up) as counter:
            mixer.start_epoch(0, 1, len(loader))
            train_one_epoch(state, loader, config, epoch=0, monitor=counter.monitor())
    return counter


def count_casm_step(*, hp: float, fixed_classifier: bool = False, precision=torch.bfloat16, adversarial: bool = False):
    """Count a step of saliency.casm.training.train_one_epoch."""
    with fake_cuda() as fake:
        classifier = SmallNetwork()
        network = place_network(CasmNetwork(classifier, build_decoder(classifier, 8)), CUDA, True, sync_bn=False)
        rates = {"lr": 0.1, "lr_casme": 0.001, "momentum": 0.9, "weight_decay": 1e-4}
        options = {"fixed_classifier": fixed_classifier, "hp": hp, "precision": precision}
        state = casm.build_casm_state(network, ClassifierPool(3, 2, device=CUDA), **options, **rates)
        loader = DeviceLoader(make_image_set(60), 20, device=CUDA, shuffle=True, **STATISTICS)
        config = casm.StepConfig(hp, 10.0, adversarial, precision)
        with StepCounter(fake) as counter:
            monitor = counter.monitor(stats=casm.CasmStats())
            casm.train_one_epoch(state, loader, config, epoch=0, iterations=3, monitor=monitor)
    return counter


def count_detection_step(precision: torch.dtype | None = torch.bfloat16, clip_grad: float = 1.0) -> StepCounter:
    """Count a step of detection.loop.train_one_epoch on drawn scenes."""
    with fake_cuda() as fake:
        half = (0.5, 0.5, 0.5)
        config = DetectorConfig(half, half, min_size=(64,), max_size=128, rois=16, proposals=(20, 10))
        detector = build_detector("resnet18", CLASSES, config)
        set_trainable_layers(detector, trainable_layers=3)
        place_network(detector, CUDA, channels_last=False, sync_bn=False)
        optimizer = build_optimizer(detector, lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4)
        state = build_training_state(detector, optimizer, make_scheduler(optimizer), precision)
        loader = DetectionLoader(draw_scenes(12, size=64), 4, device=CUDA, shuffle=True, augment="flip")
        with StepCounter(fake) as counter:
            options = {"clip_grad": clip_grad, "monitor": counter.monitor()}
            train_detector(state, loader, epoch=0, steps=3, precision=precision, **options)
    return counter


def count_prediction_step(images: ImageSet | None = None) -> StepCounter:
    """Count a batch of 20 of engine.inference.predict.predict. images: other ones than those in a tensor."""
    with fake_cuda() as fake, StepCounter(fake) as counter:
        loader = DeviceLoader(images or make_image_set(60), 20, device=CUDA, **STATISTICS)
        predict(make_network(), loader, precision=torch.bfloat16, progress=counter.end_step)
    return counter


def count_call(build: Callable[[], Callable[[], object]]) -> StepCounter:
    """Count the second of two calls of the function that build() returns."""
    with fake_cuda() as fake, StepCounter(fake) as counter:
        call = build()
        for _ in range(2):
            call()
            counter.end_step()
    return counter


ROWS: dict[str, dict] = {  # of the table of launches: name -> arguments of count_training_step()
    **{name: {"method": name} for name in MIXERS if name not in ("puzzlemix", "comixup")},
    **{f"comixup {side}": {"method": "comixup", "m_block_num": side} for side in (4, 16)},
    **{f"puzzlemix {side}": {"method": "puzzlemix", "block_num": (side,)} for side in (2, 4, 8, 16)},
}


def count_row(name: str, kernels: str = "auto") -> StepCounter:
    """Count the launches of a row of the table: preactresnet18, batch 100, 32 pixels, bfloat16."""
    return count_training_step(**ROWS[name], model="preactresnet18", batch_size=100, kernels=kernels)
