"""CASM training: decoder, loss, pool, training step and the train command."""

import argparse
import contextlib
import copy
import datetime
import io
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from support import GOLDEN, hold_lock, same_state
from torch import nn
from torch.nn import functional as F

import evaluate as evaluate_script
import train as train_script
from engine.data.datasets import load_data
from engine.data.loader import Batch
from engine.errors import Terminated, UserError
from engine.runtime.checkpoint import read_checkpoint, save_checkpoint
from engine.runtime.claim import release_claims
from engine.training import NonFiniteLoss, run_folder
from models import MODELS, build_model
from models.stages import StagedNetwork
from saliency.casm import run_files
from saliency.casm.commands import train as casm_train
from saliency.casm.network import (
    CasmNetwork,
    MaskDecoder,
    build_decoder,
    find_casm_files,
    get_feature_channels,
    load_casm,
)
from saliency.casm.options import PRESETS, get_preset
from saliency.casm.pool import ClassifierPool, compute_snapshot_megabytes
from saliency.casm.setup import build_loaders, fill_from_data, list_accuracy_notes, list_mask_notes, list_pool_notes
from saliency.casm.training import (
    MAX_DECODER_GRAD_NORM,
    StepConfig,
    build_casm_state,
    count_iterations,
    decay_lr,
    masker_loss,
    set_learning_rates,
    train_one_epoch,
    train_step,
)

CASES = json.loads((GOLDEN / "casm.json").read_text())


def ramp(count: int, *shape: int) -> torch.Tensor:
    """Return 0, 1, ... as float64 along one of several dimensions: ramp(5, 1, -1, 1)."""
    return torch.arange(count, dtype=torch.float64).view(shape)


# ---- Decoder ----


def build_golden_decoder() -> tuple[MaskDecoder, list[torch.Tensor], dict]:
    case, expect = CASES["decoder"][0]["case"], CASES["decoder"][0]["expect"]
    channels, grid = [64, *case["in_planes"]], case["grid"]
    decoder, features = MaskDecoder(channels).double(), []
    for k, (count, side) in enumerate(zip(channels, (grid, grid, grid // 2, grid // 4, grid // 8), strict=True)):
        place = 0.05 * ramp(count, 1, -1, 1, 1) + 0.4 * ramp(side, 1, 1, -1, 1) + 0.23 * ramp(side, 1, 1, 1, -1)
        features.append(torch.sin(place + 0.9 * k + ramp(2, -1, 1, 1, 1)))
    with torch.no_grad():
        for k, (lateral, count) in enumerate(zip(decoder.laterals, case["in_planes"], strict=True), 1):
            weight = case["wl"] * torch.sin(1 + 0.7 * ramp(64, -1, 1, 1, 1) + 0.3 * ramp(count, 1, -1, 1, 1) + k)
            lateral.conv.weight.copy_(weight)
        place = 0.11 * ramp(320, 1, -1, 1, 1) + 0.5 * ramp(3, 1, 1, -1, 1) - 0.3 * ramp(3, 1, 1, 1, -1)
        decoder.final.weight.copy_(case["wf"] * torch.cos(place))
        decoder.final.bias.fill_(case["bias"])
    return decoder, features, expect


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_decoder_matches_the_golden_masks(mode):
    decoder, features, expect = build_golden_decoder()
    masks, expected = decoder.train(mode == "train")(features, (32, 32)), expect[mode]
    assert list(masks.shape) == expected["shape"]
    assert sum(p.numel() for p in decoder.parameters()) == expect["parameters"]
    for found, name in ((masks.mean(), "mean"), (masks.min(), "min"), (masks.max(), "max")):
        assert found.item() == pytest.approx(expected[name], abs=1e-6)
    for image, row, column, value in expected["samples"]:
        assert masks[image, 0, row, column].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("lateral_zero", [False, True])
def test_decoder_equals_one_convolution_over_all_upsampled_maps(lateral_zero):
    decoder = MaskDecoder([5, 6, 7], width=4, lateral_zero=lateral_zero).double()
    features = [torch.randn(3, 5, 9, 11), torch.randn(3, 6, 9, 11), torch.randn(3, 7, 4, 5)]
    features = [maps.double() for maps in features]
    deeper = features if lateral_zero else features[1:]
    levels = [] if lateral_zero else [features[0]]
    for lateral, maps in zip(decoder.laterals, deeper, strict=True):
        levels.append(F.interpolate(lateral(maps), (9, 11), mode="bilinear", align_corners=False))
    expected = torch.sigmoid(decoder.final(torch.cat(levels, 1)))
    torch.testing.assert_close(decoder.predict_on_grid(features), expected)
    enlarged = decoder(features, (18, 22))
    assert (
        torch.equal(enlarged, expected.to(enlarged.dtype).repeat_interleave(2, 2).repeat_interleave(2, 3))
        or (enlarged - expected.repeat_interleave(2, 2).repeat_interleave(2, 3)).abs().max() < 1e-12
    )


def test_decoder_of_resnet50_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = build_model("imagenet_resnet50", 1000, 224)
        logits, features = network.forward_features(torch.empty(1, 3, 224, 224))
        decoder = MaskDecoder([maps.shape[1] for maps in features])
        assert decoder(features, (224, 224)).shape == (1, 1, 224, 224)
    assert logits.shape == (1, 1000)
    assert [tuple(maps.shape[1:]) for maps in features] == [
        *[(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    ]
    assert sum(p.numel() for p in decoder.parameters()) == 249_153


def test_decoder_is_initialized_with_the_published_std():
    decoder = MaskDecoder([64, 256, 512, 1024, 2048])
    assert decoder.final.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert decoder.laterals[1].conv.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "preactresnet18", "wrn16_8", "resnext29_4_24"])
def test_every_architecture_returns_features_for_a_decoder(name):
    network = build_model(name, 7, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, features = network.forward_features(images)
    assert torch.equal(logits, network(images)) and len(features) == len(network.stages) + 1
    assert [maps.shape[1] for maps in features] == get_feature_channels(network)
    masks, again = CasmNetwork(network, build_decoder(network)).eval()(images)
    assert masks.shape == (2, 1, 32, 32) and masks.min() >= 0 and masks.max() <= 1 and torch.equal(again, logits)
    stem = features[0]
    assert network.raw_stem == bool(stem.min() < 0), "a first feature map without ReLU needs its own lateral"
    assert build_decoder(network).lateral_zero == network.raw_stem


def test_get_feature_channels_does_not_change_the_network():
    network = build_model("resnet20", 5, 32).train()
    before = copy.deepcopy(network.state_dict())
    get_feature_channels(network)
    assert network.training and same_state(before, network.state_dict())


# ---- Loss ----


@pytest.mark.parametrize("number", range(len(CASES["loss"])))
def test_loss_and_gradients_match_the_golden_file(number):
    case, expect = CASES["loss"][number]["case"], CASES["loss"][number]["expect"]
    sample, kind, side = ramp(case["n"], -1, 1), ramp(case["classes"], 1, -1), case["size"]
    clean = case["amp"] * torch.sin(case["a"] * sample + case["b"] * kind + case["phase"])
    masked = (case["amp_m"] * torch.cos(case["am"] * sample + case["bm"] * kind)).requires_grad_()
    place = 0.9 * ramp(case["n"], -1, 1, 1, 1) + 0.4 * ramp(side, 1, 1, -1, 1) + 0.7 * ramp(side, 1, 1, 1, -1)
    masks = (0.5 + 0.5 * torch.sin(place)).requires_grad_()
    form = {key: case[key] for key in ("lambda_r", "adversarial")}
    loss = masker_loss(clean, masked, torch.tensor(case["targets"]), masks, **form)
    names = {"area": "regulariser", "main": "main", "total": "total", "masked_loss": "masked_cross_entropy"}
    for ours, theirs in names.items():
        assert loss[ours].item() == pytest.approx(expect[theirs], abs=1e-6)
    assert loss["correct"].int().tolist() == expect["correct_on_clean"]
    assert loss["mistaken"].int().tolist() == expect["mistaken_on_masked"]
    assert loss["confused"].int().tolist() == expect["confused"]
    of_masks, of_logits = torch.autograd.grad(loss["total"], [masks, masked])
    expected = torch.tensor(expect["grad_mask_per_pixel"], dtype=torch.float64).view(-1, 1, 1, 1)
    torch.testing.assert_close(of_masks, expected.expand_as(of_masks), atol=1e-6, rtol=0)
    row = torch.tensor(expect["grad_masked_logits_row0"], dtype=torch.float64)
    torch.testing.assert_close(of_logits[0], row, atol=1e-6, rtol=0)
    assert float(of_logits.norm()) == pytest.approx(expect["grad_masked_logits_norm"], abs=1e-6)


def test_only_confused_images_pay_for_their_mask_area():
    clean = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    masked = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    masks = torch.full((3, 1, 4, 4), 0.25).requires_grad_()
    loss = masker_loss(clean, masked, torch.zeros(3, dtype=torch.long), masks, lambda_r=8.0)
    assert loss["area"].item() == pytest.approx(-8 * 0.75 / 3)
    (gradient,) = torch.autograd.grad(loss["area"], masks)
    assert gradient[0].eq(8 / (3 * 16)).all() and gradient[1:].eq(0).all()


# ---- Presets and schedules ----


@pytest.mark.parametrize("case", CASES["reproduce"], ids=lambda case: f"{case['preset']}-{case['adversarial']}")
def test_presets_match_the_published_program(case):
    assert get_preset(case["preset"], case["adversarial"]) == case["expect"]


def test_iterations_and_learning_rates_match_the_published_program():
    for case in CASES["iterations"]:
        assert count_iterations(case["batches_in_loader"], case["pot"]) == case["expect_iterations"]
    for case in CASES["learning_rate"]:
        assert decay_lr(case["base"], case["epoch"], case["every"]) == pytest.approx(case["expect"], abs=1e-12)


@pytest.mark.parametrize("number", range(len(CASES["history"])))
def test_snapshots_are_taken_as_in_the_published_program(number):
    case, expect = CASES["history"][number]["case"], CASES["history"][number]["expect"]
    pool, events = ClassifierPool(case["f_size"], case["smf"]), []
    classifier = nn.Linear(1, 1)
    for epoch in range(case["epochs"]):
        for iteration in range(case["iterations_per_epoch"]):
            if case["hp"] > 0 and pool.is_due(iteration):
                pool.add(classifier)
                events.append([epoch, iteration])
    assert events == expect["events"] and len(pool) == expect["final_size"]


def test_snapshots_are_copies_and_a_full_pool_replaces_random_ones():
    pool, classifier = ClassifierPool(3, 1), nn.BatchNorm1d(2)
    for value in range(20):
        classifier.weight.data.fill_(value)
        classifier.running_mean.fill_(-value)
        pool.add(classifier)
    values = {float(snapshot[0][0]) for snapshot in pool.snapshots}
    assert len(pool) == 3 and len(values) == 3 and 19.0 in values, "snapshots are copies of the weights"
    assert not values & {0.0, 1.0, 2.0}, "every snapshot was replaced"
    past_classifier, seen = nn.BatchNorm1d(2).requires_grad_(False), set()
    for _ in range(40):
        pool.load_random(past_classifier)
        assert past_classifier.running_mean[0] == -past_classifier.weight[0]
        seen.add(float(past_classifier.weight[0]))
    assert seen == values
    assert classifier.weight.data[0] == 19
    assert compute_snapshot_megabytes(classifier) == pytest.approx((4 * 4 * 2 + 8) / 1e6)


# ---- Training step ----


def build_tiny_state(**options) -> tuple:
    """Return the training state of a tiny network, images (6, 3, 8, 8) and labels."""
    network = CasmNetwork(TinyNetwork(), MaskDecoder([4, 6], width=5))
    settings = {"fixed_classifier": False, "hp": 0.5, "lr": 0.1, "lr_casme": 0.01, "momentum": 0.9}
    settings |= {"weight_decay": 1e-4, "precision": None} | options
    state = build_casm_state(network, ClassifierPool(30, 5), **settings)
    network.train()
    network.classifier.train(state.train_classifier)
    return state, torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])


class TinyNetwork(StagedNetwork):
    """A small network."""

    raw_stem = False

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward_features(self, images):
        first = F.relu(self.bn1(self.conv1(images)))
        second = F.relu(self.bn2(self.conv2(first)))
        return self.fc(second.mean((2, 3))), [first, second]

    def forward(self, images):
        return self.forward_features(images)[0]


def count_updates(state, images, labels, hp: float) -> dict:
    """Run one step. Return the number of updates of classifier, decoder and batch norm statistics, and what changed."""
    steps = {"classifier": 0, "decoder": 0}
    state.optimizer.register_step_post_hook(lambda *_: steps.update(classifier=steps["classifier"] + 1))
    state.decoder_optimizer.register_step_post_hook(lambda *_: steps.update(decoder=steps["decoder"] + 1))
    before = copy.deepcopy(state.network.state_dict())
    train_step(state, images, labels, StepConfig(hp, lambda_r=10.0), iteration=0)
    after = state.network.state_dict()
    seen = after["classifier.bn1.num_batches_tracked"] - before["classifier.bn1.num_batches_tracked"]
    changed = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    return steps | {"statistics": int(seen), "changed": changed}


def test_classifier_is_updated_twice_unless_a_snapshot_classifies_the_masked_images():
    both = {"classifier", "decoder"}
    found = count_updates(*build_tiny_state(hp=0.0), hp=0.0)
    assert found == {"classifier": 2, "decoder": 1, "statistics": 2, "changed": both}
    found = count_updates(*build_tiny_state(hp=1.0), hp=1.0)
    assert found == {"classifier": 1, "decoder": 1, "statistics": 1, "changed": both}


def test_a_fixed_classifier_keeps_its_weights_and_batch_norm_statistics():
    found = count_updates(*build_tiny_state(fixed_classifier=True, hp=0.5), hp=0.5)
    assert found == {"classifier": 0, "decoder": 1, "statistics": 0, "changed": {"decoder"}}


def test_a_snapshot_is_the_classifier_after_its_clean_update_and_does_not_change():
    state, images, labels = build_tiny_state(hp=1.0)
    train_step(state, images, labels, StepConfig(1.0, 10.0), iteration=0)
    kept = [one.clone() for one in state.pool.snapshots[0]]
    assert all(map(torch.equal, kept, state.network.classifier.state_dict().values()))
    train_step(state, images, labels, StepConfig(1.0, 10.0), iteration=1)
    assert all(map(torch.equal, kept, state.pool.snapshots[0])) and len(state.pool) == 1


@pytest.mark.parametrize("hp", [0.0, 1.0])
@pytest.mark.parametrize("adversarial", [False, True])
def test_step_matches_a_plain_implementation_with_both_gradients_computed_first(hp, adversarial):
    state, images, labels = build_tiny_state(hp=hp)
    plain = copy.deepcopy(state.network)
    train_step(state, images, labels, StepConfig(hp, 10.0, adversarial=adversarial), iteration=0)

    classifier, decoder = plain.classifier, plain.decoder
    sgd = torch.optim.SGD(classifier.parameters(), 0.1, 0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(decoder.parameters(), 0.01, weight_decay=1e-4)
    logits, features = classifier.forward_features(images)
    F.cross_entropy(logits, labels).backward()
    sgd.step()
    past_classifier = copy.deepcopy(classifier).eval() if hp else classifier
    masks = decoder([maps.detach() for maps in features], (8, 8))
    masked = past_classifier(images * (1 - masks))
    loss = masker_loss(logits.detach(), masked, labels, masks, lambda_r=10.0, adversarial=adversarial)
    sgd.zero_grad()
    expected = torch.autograd.grad(loss["total"], list(decoder.parameters()), retain_graph=True)
    if not hp:
        loss["masked_loss"].backward()
        sgd.step()
    for parameter, gradient in zip(decoder.parameters(), expected, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(decoder.parameters(), 10.0)
    adam.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state.network.state_dict()[key], value, msg=key)


def test_a_batch_of_one_image_can_be_trained_on():
    state, images, labels = build_tiny_state()
    found = train_step(state, images[:1], labels[:1], StepConfig(0.5, 10.0), iteration=0)
    assert found["masks"].shape == (1, 1, 8, 8) and all(value.isfinite().all() for value in found.values())


def test_decoder_gradients_are_clipped():
    state, images, labels = build_tiny_state(hp=0.0)
    train_step(state, images, labels, StepConfig(0.0, 1e7), iteration=0)
    norm = torch.stack([parameter.grad.norm() for parameter in state.network.decoder.parameters()]).norm()
    assert norm.item() == pytest.approx(MAX_DECODER_GRAD_NORM, rel=1e-3)


class FakeLoader:
    """A loader that records which epochs were requested."""

    device = torch.device("cpu")

    def __init__(self, images, labels, count: int = 5):
        self.batch, self.count, self.epochs = Batch(images, labels, torch.arange(len(labels)), None), count, []

    def __len__(self):
        return self.count

    def epoch(self, number: int = 0, start: int = 0):
        self.epochs.append(number)
        return iter([self.batch] * (self.count - start))


def test_an_epoch_uses_its_own_batches_and_learning_rates():
    state, images, labels = build_tiny_state()
    loader = FakeLoader(images, labels)
    set_learning_rates(state, 5, lr=0.5, lr_casme=0.25, lrde=2)
    train_one_epoch(state, loader, StepConfig(hp=0.5, lambda_r=10.0), epoch=5, iterations=3)
    assert loader.epochs == [5]
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    assert state.decoder_optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    assert {int(one["step"]) for one in state.decoder_optimizer.state.values()} == {3}
    assert state.decoder_optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_a_nan_loss_stops_training():
    state, images, labels = build_tiny_state()
    state.network.decoder.final.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="step 0"):
        train_one_epoch(state, FakeLoader(images, labels), StepConfig(hp=0.5, lambda_r=1.0), epoch=0, iterations=5)


def test_only_training_images_are_shuffled_and_augmented(class_folders):
    options = {"crop_padding": None, "pot": None, "batch_size": 8}
    shapes = load_data("shapes", limit=40)
    fill_from_data(options, shapes)
    assert options["crop_padding"] == 2 and options["pot"] == 1.0
    settings = {"batch_size": 8, "crop_padding": 2, "seed": 0, "workers": 0}
    train_loader, test_loader, subset_loader = build_loaders(shapes, torch.device("cpu"), **settings)
    first, second = (next(train_loader.epoch(number)) for number in (0, 1))
    assert first.index.tolist() != second.index.tolist() and first.index.tolist() != list(range(8))
    assert first.flip.any() and first.shift.abs().sum() > 0
    plain = next(test_loader.epoch())
    assert plain.index.tolist() == list(range(8)) and plain.flip is None
    assert len(subset_loader.image_set) == 40
    folders = load_data("folder", data_dir=str(class_folders), image_size=32)
    batch = next(build_loaders(folders, torch.device("cpu"), **settings)[0].epoch())
    assert (batch.box[:, 1] - batch.box[:, 0] < 1).any(), "image files are read with random crops"


# ---- Warnings ----


def test_warnings_name_degenerate_masks_weak_classifiers_and_unfilled_pools():
    row = {"val_avg_mask": 0.3, "confused": 20.0}
    assert list_mask_notes(row, 10.0) == []
    assert "lower --lambda-r (10)" in list_mask_notes(row | {"val_avg_mask": 0.001}, 10.0)[0]
    assert "raise --lambda-r" in list_mask_notes(row | {"val_avg_mask": 0.97}, 10.0)[0]
    assert "--lambda-r" not in list_mask_notes({"val_avg_mask": 0.97, "confused": 0.0}, 10.0)[0], (
        "the area term has no gradient then"
    )
    assert "turned no correct prediction into a wrong one" in list_mask_notes(row | {"confused": 0.0}, 10.0)[0]
    assert (
        len(list_accuracy_notes(80.0, 10)) == 1
        and "warning: chance level is 10.0 %" in list_accuracy_notes(20.0, 10)[1]
    )
    assert len(list_accuracy_notes(90.0, 2)) == 1 and len(list_accuracy_notes(51.0, 2)) == 2
    (note,) = list_pool_notes(ClassifierPool(30, 100), 102.4, epochs=60, iterations=2003)
    assert "up to 30 of 30" in note and "3,072 MB in host memory" in note
    short = [(100, 60, 10, "--smf 10"), (2, 10, 3, "--smf 1"), (1, 9, 3, "more --epochs")]
    for smf, epochs, iterations, remedy in short:
        note = list_pool_notes(ClassifierPool(30, smf), 1.0, epochs=epochs, iterations=iterations)[1]
        assert note.endswith(f"--smf {smf} does not fill the pool in this run; {remedy} would")
        if remedy.startswith("--smf"):
            pool = ClassifierPool(30, int(remedy.split()[1]))
            assert len(list_pool_notes(pool, 1.0, epochs=epochs, iterations=iterations)) == 1, "the remedy works"


# ---- The train command ----


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, small_network) -> str:
    """The checkpoint of a classifier trained on shapes for one epoch."""
    from support import shapes_command

    root = tmp_path_factory.mktemp("classifier")
    train_script.main(shapes_command(root, name="base", epochs=1))
    return str(root / "shapes" / "resnet20" / "base" / "last.pt")


def build_command(root, classifier: str, *words: str, name: str = "map") -> list[str]:
    return [
        *("--classifier", classifier, "--casms-path", str(root), "--name", name, "--limit", "40", "--batch-size", "13"),
        *("--epochs", "2", "--pot", "1", "--smf", "2", "--no-progress", "--device", "cpu", *words),
    ]


TIMING_COLUMNS = {"seconds", "images_per_second", "peak_memory_mb"}  # columns that differ from run to run


def assert_same_run(one: Path, other: Path) -> None:
    """Check that weights, optimizers, random states, pool and history are equal bit for bit."""
    runs = [read_checkpoint(folder / "map.chk", kind="casm") for folder in (one, other)]
    for key in ("model", "decoder", "optimizer", "decoder_optimizer", "rng", "step"):
        assert same_state(*(run[key] for run in runs)), key
    pools = [torch.load(folder / run["pool"]) for folder, run in zip((one, other), runs, strict=True)]
    assert same_state(*pools) and len(pools[0]) > 2
    rows = [[{key: row[key] for key in row.keys() - TIMING_COLUMNS} for row in run["history"]] for run in runs]
    assert rows[0] == rows[1] and [row["epoch"] for row in rows[0]] == [1, 2, 3]
    assert sorted(path.name for path in other.iterdir()) == RUN_FILES


RUN_FILES = ["map.chk", "map.log", "map.png", "map.pool_003.pt", "map_masks.png"]
RUN_OPTIONS = ["--reproduce", "L100", "--epochs", "3", "--print-freq", "1"]


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory, classifier) -> Path:
    """The folder of an uninterrupted run of three epochs with four iterations each."""
    root = tmp_path_factory.mktemp("uninterrupted_run")
    casm_train.main(build_command(root, classifier, *RUN_OPTIONS))
    return root


class ActionOnLine(io.StringIO):
    """A text stream that calls `action` when a line that begins with `start` is written."""

    def __init__(self, start: str, action):
        super().__init__()
        self.start, self.action = start, action

    def write(self, text: str) -> int:
        if text.startswith(self.start):
            self.action()
        return super().write(text)


def resume_run(folder: Path) -> dict:
    return casm_train.main(["--resume", str(folder / "map.chk"), "--epochs", "3", "--device", "cpu"])


def test_a_killed_run_resumes_bit_for_bit(tmp_path, classifier, uninterrupted_run):
    casm_train.main(build_command(tmp_path, classifier, *RUN_OPTIONS, "--epochs", "1"))
    half = read_checkpoint(tmp_path / "map.chk", kind="casm")
    assert resume_run(tmp_path)["epoch"] == 3
    assert_same_run(uninterrupted_run, tmp_path)
    assert not same_state(half["decoder"], read_checkpoint(uninterrupted_run / "map.chk", kind="casm")["decoder"])


@pytest.mark.parametrize(("epoch", "iteration"), [(1, 2), (2, 3)])
def test_a_run_stopped_within_an_epoch_ends_with_the_same_weights(
    epoch, iteration, tmp_path, classifier, uninterrupted_run, capsys
):
    before = signal.getsignal(signal.SIGTERM)
    stdout = ActionOnLine(f"epoch {epoch}/3 {iteration}/4", lambda: os.kill(os.getpid(), signal.SIGTERM))
    message = f"^{iteration} steps into the epoch; resume with --resume {tmp_path / 'map.chk'}"
    with pytest.raises(Terminated, match=message), contextlib.redirect_stdout(stdout):
        casm_train.main(build_command(tmp_path, classifier, *RUN_OPTIONS))
    assert signal.getsignal(signal.SIGTERM) is before
    saved = read_checkpoint(tmp_path / "map.chk", kind="casm")
    assert saved["step"] == 4 * (epoch - 1) + iteration and len(saved["history"]) == epoch - 1
    assert [path.name for path in tmp_path.glob("*.pool_*")] == [saved["pool"]]
    assert load_casm(tmp_path / "map.chk").epoch == epoch - 1, "the checkpoint can be loaded for its masks"
    resume_run(tmp_path)
    assert f"note: epoch {epoch} resumes after {iteration} of its 4 steps" in capsys.readouterr().out
    assert_same_run(uninterrupted_run, tmp_path)


def test_a_kill_between_writing_pool_and_checkpoint_loses_nothing(tmp_path, classifier, uninterrupted_run, monkeypatch):
    def save(path, content):
        if path.name == "map.chk" and content["epoch"] == 2:
            raise KeyboardInterrupt
        save_checkpoint(path, content)

    monkeypatch.setattr(run_files, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt):
        casm_train.main(build_command(tmp_path, classifier, *RUN_OPTIONS))
    monkeypatch.undo()
    assert {path.name for path in tmp_path.glob("*.pool_*")} == {"map.pool_001.pt", "map.pool_002.pt"}
    assert read_checkpoint(tmp_path / "map.chk", kind="casm")["pool"] == "map.pool_001.pt"
    resume_run(tmp_path)
    assert_same_run(uninterrupted_run, tmp_path)


def test_checkpoints_of_the_version_that_saved_only_between_epochs_resume(tmp_path, classifier, uninterrupted_run):
    casm_train.main(build_command(tmp_path, classifier, *RUN_OPTIONS, "--epochs", "2"))
    saved = torch.load(tmp_path / "map.chk")
    saved["rng"] = saved["rng"][0]
    for key in ("step", "best", "before", "inside"):
        del saved[key]
    torch.save(saved, tmp_path / "map.chk")
    resume_run(tmp_path)
    assert_same_run(uninterrupted_run, tmp_path)


def test_a_nonfinite_loss_saves_its_batch_and_weights(tmp_path, classifier):
    with pytest.raises(
        UserError, match="\nstart another run with a lower --lr-casme or --lr( or --amp off)?$"
    ) as caught:
        casm_train.main(build_command(tmp_path, classifier, "--lr", "1e30", "--print-freq", "1"))
    assert "current lr 1e+30; the weights" in str(caught.value) and "loss scale" not in str(caught.value)
    evidence = torch.load(tmp_path / "map_nonfinite.pt")
    assert len(evidence["index"]) == 13 and evidence["step"] <= evidence["weights_of_step"] < 4


def test_log_has_the_published_columns(tmp_path, classifier):
    casm_train.main(build_command(tmp_path, classifier, "--reproduce", "F", "--log-path", str(tmp_path / "logs")))
    options, titles, *rows = (tmp_path / "logs" / "map.log").read_text().splitlines()
    assert "lambda_r=2.5, " in options and "fixed_classifier=True" in options and "hp=0.0" in options
    assert titles.split()[:6] == ["epoch", "seconds", "accuracy_train", "accuracy_val"] + [
        "masked_accuracy_train",
        "masked_accuracy_val",
    ]
    assert len(rows) == 2 and all(len(row.split()) == len(titles.split()) == 14 for row in rows)
    assert (tmp_path / "logs" / "map.png").exists() and not list(tmp_path.glob("*.pool_*"))


def test_typed_options_override_the_preset(tmp_path, classifier, capsys):
    casm_train.main(build_command(tmp_path, classifier, "--reproduce", "f", "--lambda-r", "4"))
    saved = read_checkpoint(tmp_path / "map.chk", kind="casm")
    assert same_state(saved["model"], read_checkpoint(classifier)["model"])
    assert saved["config"]["lambda_r"] == 4 and saved["config"]["dataset"] == "shapes"
    assert "warning: chance level is 10.0 %" in capsys.readouterr().out


def test_a_run_is_not_overwritten_and_changed_options_are_refused(tmp_path, classifier):
    casm_train.main(build_command(tmp_path, classifier, "--epochs", "1"))
    with pytest.raises(UserError, match="--resume .*--overwrite"):
        casm_train.main(build_command(tmp_path, classifier))
    with pytest.raises(UserError, match="--lambda_r  10.0  ->  3.0"):
        casm_train.main(["--resume", str(tmp_path / "map.chk"), "--lambda-r", "3"])
    casm_train.main(build_command(tmp_path, classifier, "--epochs", "1", "--overwrite", "--lambda-r", "3"))
    assert read_checkpoint(tmp_path / "map.chk", kind="casm")["config"]["lambda_r"] == 3
    for path in tmp_path.glob("*.pool_*"):
        path.unlink()
    with pytest.raises(UserError, match="is missing: it holds the past classifiers"):
        casm_train.main(["--resume", str(tmp_path / "map.chk"), "--epochs", "2"])


def test_casm_and_classifier_checkpoints_are_told_apart(tmp_path, classifier, capsys):
    casm_train.main(build_command(tmp_path, classifier, "--epochs", "1"))
    with pytest.raises(UserError, match="a checkpoint of a saliency-map network"):
        train_script.main(["--checkpoint", str(tmp_path / "map.chk")])
    with pytest.raises(UserError, match="a checkpoint of a classifier"):
        casm_train.main(["--resume", classifier])
    with pytest.raises(UserError, match="holds no mask decoder"):
        load_casm(classifier)
    evaluate_script.main(["--model_path", str(tmp_path / "map.chk"), "--limit", "40", "--device", "cpu"])
    assert "Top-1 Accuracy" in capsys.readouterr().out, "the classifier of a CASM checkpoint can be evaluated"


def test_classifier_and_data_must_have_the_same_classes(tmp_path, classifier, class_folders):
    with pytest.raises(UserError, match="its classes .* are not those of the data"):
        casm_train.main(
            [*build_command(tmp_path, classifier), "--dataset", "folder", str(class_folders), "--image_size", "32"]
        )
    with pytest.raises(SystemExit):
        casm_train.main(["--casms-path", str(tmp_path)])


@pytest.fixture
def class_folders(tmp_path):
    import numpy as np
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{number}.png")
    return tmp_path / "data"


def test_training_on_an_image_folder(tmp_path, class_folders):
    network = build_model("imagenet_resnet18", 2, 64)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    words = ["--classifier", str(tmp_path / "net.pt"), "--image-size", "64", "--workers", "0", "--epochs", "1"]
    words += ["--batch-size", "5", "--pot", "1", "--casms-path", str(tmp_path), "--name", "m", "--device", "cpu"]
    words += ["--upsample", "bilinear"]
    casm_train.main([str(class_folders), *words])
    saved = load_casm(tmp_path / "m.chk")
    assert saved.network.decoder.upsample == "bilinear"
    assert saved.options["model"] == "imagenet_resnet18" and saved.classes == ["cat", "dog"] and saved.image_size == 64
    assert saved.name == "m" and saved.mean == (0.485, 0.456, 0.406)
    assert find_casm_files([str(tmp_path)]) == [tmp_path / "m.chk"]


def test_checkpoints_of_the_published_program_load(tmp_path):
    network = build_model("imagenet_resnet50", 1000, 224)
    decoder = build_decoder(network)
    nn.init.normal_(decoder.laterals[2].bn.running_mean)
    names = {}
    for key, value in decoder.state_dict().items():
        part, *rest = key.split(".")
        if part == "final":
            names[f"final.0.{rest[0]}"] = value
        else:
            names[f"conv1x1_{int(rest[0]) + 1}.{('conv', 'bn').index(rest[1])}.{rest[2]}"] = value
    assert len(names) == 26
    args = argparse.Namespace(upsample="bilinear", data="/somewhere")
    content = {"epoch": 3, "state_dict_classifier": network.state_dict(), "state_dict_decoder": names, "args": args}
    torch.save(content, tmp_path / "old.chk")
    saved = load_casm(tmp_path / "old.chk")
    assert saved.network.decoder.upsample == "bilinear", "the upsampling mode is read from the file"
    images = torch.randn(1, 3, 64, 64)
    expected = MaskDecoder(get_feature_channels(network), upsample="bilinear")
    expected.load_state_dict(decoder.state_dict())
    masks = CasmNetwork(network, expected).eval()(images)[0]
    torch.testing.assert_close(saved.network(images)[0], masks)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(name, tmp_path, classifier):
    row = casm_train.main(build_command(tmp_path, classifier, "--reproduce", name, "--epochs", "1", "--limit", "20"))
    assert all(value is None or math.isfinite(value) for value in row.values())


def test_all_networks_have_stages():
    for name in MODELS:
        with torch.device("meta"):
            network = build_model(name, 3, 32)
        assert network.stages and hasattr(network, network.last_layer), name


@pytest.mark.slow
def test_pool_lowers_the_localization_error_on_shapes(tmp_path):
    """The documented result: the localization error is well below that of preset F and of a central box."""
    from saliency.casm.commands import score

    words = [
        "--dataset",
        "shapes",
        "--method",
        "none",
        "--name",
        "base",
        "--root_dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    train_script.main([*words, "--vis_epoch", "0", "--no_progress"])
    words = ["--classifier", str(tmp_path / "shapes/resnet20/base"), "--casms-path", str(tmp_path), "--device", "cpu"]
    words += ["--epochs", "5", "--batch-size", "64", "--no_progress"]
    casm_train.main([*words, "--reproduce", "L100", "--smf", "10", "--lr", "0.01", "--name", "l100"])
    casm_train.main([*words, "--reproduce", "F", "--name", "f"])
    results = score.main(["--casms-path", str(tmp_path), "--toy", "--device", "cpu"])
    errors = {one["name"]: one["LE"] for one in results}
    assert errors["l100"] < 0.7 * errors["f"] and errors["l100"] < 0.8 * errors["center"]


def test_a_last_batch_of_one_image_is_skipped_if_batch_norm_cannot_use_it(tmp_path, class_folders):
    network = build_model("imagenet_resnet18", 2, 32)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    words = [str(class_folders), "--classifier", str(tmp_path / "net.pt"), "--image-size", "32", "--workers", "0"]
    words += ["--epochs", "1", "--casms-path", str(tmp_path), "--device", "cpu", "--no_progress"]
    casm_train.main([*words, "--batch-size", "5", "--name", "a"])
    assert read_checkpoint(tmp_path / "a.chk", kind="casm")["decoder_optimizer"]["state"][0]["step"] == 1
    with pytest.raises(UserError, match="use a larger --batch_size"):
        casm_train.main([*words, "--batch-size", "1", "--name", "b"])


def test_two_runs_never_share_a_checkpoint(tmp_path, classifier, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    (tmp_path / "map.chk").write_bytes(Path(classifier).read_bytes())
    for words in ((), ("--overwrite",), ("--resume", "auto"), ("--resume", str(tmp_path / "map.chk"))):
        with hold_lock(tmp_path / ".map.chk.lock"), pytest.raises(UserError, match="map.chk is in use: process 1 on"):
            casm_train.main(build_command(tmp_path, classifier, *words))
    options = {"casms_path": tmp_path, "reproduce": "l100", "name": None, "overwrite": False}
    with hold_lock(tmp_path / ".l100_20260102-030405.chk.lock"):
        path = run_folder.claim_new_folder(options, run_files.locate_casm_runs, run_files.CasmFolder)
    assert path == tmp_path / "l100_20260102-030405-2.chk"
    release_claims()


def test_overwrite_deletes_nothing_if_the_new_run_cannot_start(tmp_path, classifier):
    casm_train.main(build_command(tmp_path, classifier, "--epochs", "1"))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="no folder"):
        casm_train.main([str(tmp_path / "gone"), *build_command(tmp_path, classifier, "--overwrite")])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_resumes_only_on_its_own_data(tmp_path, classifier):
    casm_train.main(build_command(tmp_path, classifier, "--epochs", "1"))
    content = torch.load(tmp_path / "map.chk")
    others = {"classes": content["classes"][::-1]}, {"images": content["images"] + 1}
    for changed, message in zip(others, ("the classes of the run .* are not those of", "was trained on"), strict=True):
        torch.save(content | changed, tmp_path / "map.chk")
        with pytest.raises(UserError, match=message):
            casm_train.main(["--resume", str(tmp_path / "map.chk"), "--epochs", "2", "--device", "cpu"])


def test_a_network_without_stages_is_refused_in_one_line(tmp_path):
    file = tmp_path / "net.pt"
    torch.save(build_model("torchvision:squeezenet1_1", 10, 32).state_dict(), file)
    words = ["--dataset", "shapes", "--limit", "20", "--device", "cpu", "--casms-path", str(tmp_path), "--name", "a"]
    words += ["--classifier", str(file), "--arch", "torchvision:squeezenet1_1"]
    with pytest.raises(UserError, match=r"torchvision:squeezenet1_1 has no stages .*\ntrain a decoder for a network"):
        casm_train.main(words)


def test_errors_explain_files_that_are_no_casm_checkpoints(tmp_path, casm_file):
    weights = build_model("resnet20", 10).state_dict()
    broken = {
        "config": {**torch.load(casm_file), "config": {}},
        "decoder": {"state_dict_classifier": weights, "state_dict_decoder": {"foo": torch.zeros(1)}},
    }
    for name, what in broken.items():
        torch.save(what, tmp_path / f"{name}.chk")
        with pytest.raises(UserError, match="not a CASM checkpoint of this or of the published program"):
            load_casm(tmp_path / f"{name}.chk")


@pytest.mark.gpu
@pytest.mark.parametrize("hp", [0.0, 0.5])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_step_does_not_synchronize_with_the_gpu(hp, pinned):
    device = torch.device("cuda", 0)
    network = CasmNetwork(TinyNetwork(), MaskDecoder([4, 6], width=5)).to(device)
    pool = ClassifierPool(3, 2, "cpu" if pinned else device, pinned=pinned)
    settings = {"fixed_classifier": False, "hp": hp, "lr": 0.1, "lr_casme": 0.01, "momentum": 0.9}
    state = build_casm_state(network, pool, **settings, weight_decay=1e-4, precision=torch.bfloat16)
    images, labels = torch.randn(6, 3, 8, 8, device=device), torch.arange(6, device=device) % 3
    config = StepConfig(hp, lambda_r=10.0, precision=torch.bfloat16)
    for iteration in range(3):  # the first steps create optimizer buffers
        train_step(state, images, labels, config, iteration=iteration)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(6):
            train_step(state, images, labels, config, iteration=iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for snapshot in pool.state_dict():
        assert all(one.isfinite().all() for one in snapshot if one.is_floating_point())


@pytest.mark.gpu
@pytest.mark.parametrize("words", [["--amp", "fp16"], ["--amp", "bf16", "--pool-device", "host"], ["--deterministic"]])
def test_training_on_a_gpu_resumes(words, tmp_path, classifier):
    given = [*build_command(tmp_path / "a", classifier, "--reproduce", "L100"), *words, "--device", "cuda"]
    casm_train.main(given)
    casm_train.main(
        [*build_command(tmp_path / "b", classifier, "--reproduce", "L100", "--epochs", "1"), *words, "--device", "cuda"]
    )
    casm_train.main(["--resume", str(tmp_path / "b" / "map.chk"), "--epochs", "2", "--device", "cuda"])
    one, other = (read_checkpoint(tmp_path / part / "map.chk", kind="casm") for part in "ab")
    assert one["history"][-1]["epoch"] == other["history"][-1]["epoch"] == 2
    assert not words[0] == "--deterministic" or same_state(one["decoder"], other["decoder"])
