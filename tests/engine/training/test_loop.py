"""Training steps: losses, schedules, metrics, and the loop itself."""

import copy
import math
import warnings

import pytest
import torch
from support import write_image
from torch import nn
from torch.nn import functional as F

from engine.config.phases import parse_lr_points, parse_phases
from engine.config.recipes import IMAGENET_RECIPES
from engine.data.augment import Augmentation
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader
from engine.data.views import CenterCrop
from engine.inference.metrics import confusion_matrix, topk_correct
from engine.inference.predict import compute_scores, predict
from engine.training.console import describe_methods, describe_run, format_epoch, summarize_history
from engine.training.evaluate import evaluate_held_out
from engine.training.loop import profile_steps, train_one_epoch
from engine.training.loss import LOSSES, smooth_labels
from engine.training.monitor import EpochMonitor
from engine.training.network_step import StepConfig
from engine.training.running_sums import NonFiniteLoss
from engine.training.schedule import StepSchedule, build_scheduler, interpolate_lr
from engine.training.state import TrainingState
from mixing import build_mixer
from mixing.base import Mixer
from mixing.compose import NoMix
from saliency.base import Source
from saliency.gradient import Gradient

CPU = torch.device("cpu")


def test_soft_cross_entropy_equals_the_two_term_loss():
    logits, labels, partner, lam = (
        torch.randn(6, 4).double(),
        torch.arange(6) % 4,
        torch.randperm(6),
        torch.rand(6, 1).double(),
    )
    targets = F.one_hot(labels, 4).double()
    two_terms = (lam.flatten() * F.cross_entropy(logits, labels, reduction="none")).mean()
    two_terms += ((1 - lam.flatten()) * F.cross_entropy(logits, labels[partner], reduction="none")).mean()
    mixed = LOSSES["ce"](logits, (lam * targets + (1 - lam) * targets[partner]).float())
    torch.testing.assert_close(mixed.double(), two_terms, atol=1e-6, rtol=1e-6)


def test_softmax_bce_equals_a_hand_computed_value_and_clamps_the_logarithm():
    logits, targets = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.25, 0.75]])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) * 2 / 2  # both classes give the same two terms
    assert LOSSES["softmax_bce"](logits, targets).item() == pytest.approx(expected, rel=1e-6)
    sure, wrong = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert LOSSES["softmax_bce"](sure, wrong).item() == pytest.approx(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert LOSSES["softmax_bce"](logits.bfloat16(), targets).dtype == torch.float32


def test_label_smoothing_equals_torch():
    logits, labels = torch.randn(5, 7), torch.arange(5)
    ours = LOSSES["ce"](logits, smooth_labels(F.one_hot(labels, 7).float(), 0.2))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.2))


# ---- Schedules ----

SCHEDULE_OPTIONS = {
    "schedule": [2, 4],
    "gammas": [0.1],
    "warmup_epochs": 0.0,
    "max_lr": None,
    "lr": 1.0,
    "lr_points": None,
    "div_factor": 25.0,
    "pct_start": 0.3,
}


def record_lrs(name: str, epochs: int = 6, steps: int = 2, **options) -> list[float]:
    """Return the learning rate of every step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
    options = SCHEDULE_OPTIONS | {"final_div_factor": 1e4} | options
    scheduler = build_scheduler(
        optimizer, scheduler=name, epochs=epochs, steps=StepSchedule([(epochs, steps)]), **options
    )
    seen = []
    for _ in range(epochs * steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_epoch_schedules_change_between_epochs():
    assert record_lrs("multistep") == pytest.approx([1] * 4 + [0.1] * 4 + [0.01] * 4)
    assert record_lrs("multistep", gammas=[0.5, 0.2]) == pytest.approx([1] * 4 + [0.5] * 4 + [0.1] * 4)
    assert record_lrs("linear", epochs=4, steps=1) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert record_lrs("cosine", epochs=2, steps=2) == pytest.approx([1, 1, 0.5, 0.5])
    assert record_lrs("constant", epochs=2) == [1.0] * 4
    assert record_lrs("constant", epochs=3, warmup_epochs=1.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_the_three_phase_schedule_has_the_published_learning_rates(network_golden):
    """The values were recorded at real-valued epochs, where a boundary belongs to the later phase. Training never gets
    there, since each step has the rate at its end.
    """
    recipe = IMAGENET_RECIPES["fast100"]
    points, phases = parse_lr_points(recipe["lr_points"]), parse_phases(recipe["phases"])
    for epoch, rate in zip(network_golden["imagenet_epoch"], network_golden["imagenet_lr"], strict=True):
        assert interpolate_lr(points, float(epoch)) == pytest.approx(float(rate), rel=1e-6), epoch
    assert interpolate_lr(points, 15, before=True) == 0.125 and interpolate_lr(points, 15) == 0.2
    assert [phase.end for phase in phases] == [15, 40, 100] and [phase.crop for phase in phases] == [128, 224, 224]


def test_points_schedule_changes_at_every_step_of_phases_with_different_lengths():
    """The first epoch has two steps, the second four. Each step has the rate at its end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 2.0)
    step_schedule = StepSchedule([(1, 2), (2, 4)])
    options = SCHEDULE_OPTIONS | {"final_div_factor": 1e4, "lr": 2.0, "lr_points": "0:0,1:1,1:10,2:2"}
    scheduler = build_scheduler(optimizer, scheduler="points", epochs=2, steps=step_schedule, **options)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.5, 1, 8, 6, 4, 2])
    assert [step_schedule.first_step(epoch) for epoch in range(4)] == [0, 2, 6, 10]
    places = [step_schedule.locate(step) for step in (0, 1, 2, 5, 6)]
    assert places == [
        (0, 0, 2),
        (0, 1, 2),
        (1, 0, 4),
        (1, 3, 4),
        (2, 0, 4),
    ]


def test_one_cycle_with_a_rise_of_no_steps_starts_at_its_initial_rate():
    """torch's own OneCycleLR divides by zero here."""
    rates = record_lrs("onecycle", epochs=2, steps=2, pct_start=0.25)
    assert rates == pytest.approx([0.04, 0.75, 0.25, 4e-6], abs=1e-5)


def test_one_cycle_matches_the_published_schedule(network_golden):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.2, momentum=0.9, nesterov=True)
    options = SCHEDULE_OPTIONS | {"lr": 0.2, "max_lr": 0.29947526988779305, "div_factor": 100.0}
    options["final_div_factor"] = 1e4
    scheduler = build_scheduler(
        optimizer, scheduler="onecycle", epochs=300, steps=StepSchedule([(300, 500)]), **options
    )
    optimizer.step()
    wanted = dict(zip(network_golden["onecycle_step"].tolist(), range(100), strict=False))
    for step in range(150_000):
        if step in wanted:
            group = optimizer.param_groups[0]
            assert group["lr"] == pytest.approx(network_golden["onecycle_lr"][wanted[step]], rel=1e-9)
            assert group["momentum"] == pytest.approx(network_golden["onecycle_momentum"][wanted[step]], rel=1e-9)
        if step > max(wanted):
            break
        if step < 149_999:
            scheduler.step()


# ---- Metrics ----


def test_topk_counts_labels_among_the_k_highest_logits():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    assert topk_correct(logits, torch.tensor([0, 0, 0]), (1, 2, 3)).tolist() == [1, 2, 3]
    result = compute_scores(logits, torch.tensor([0, 0, 0]), (1, 2, 5))
    assert result["top1"] == pytest.approx(100 / 3) and "top5" not in result
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor([0, 0, 0])).item())


def test_confusion_matrix_rows_are_true_classes():
    assert confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]), 2).tolist() == [[1, 1], [0, 1]]


# ---- The loop ----


def make_loader_and_model(count: int = 12) -> tuple[DeviceLoader, nn.Module]:
    part = ImageSet(
        torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8), torch.arange(count) % 3, list("abc"), "here"
    )
    loader = DeviceLoader(part, 5, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3, shuffle=True, seed=1)
    return loader, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def train(model, loader, mixer=None, source=None, *, lr=0.0, epoch=0, loss_fn=LOSSES["ce"], monitor=None, **config):
    """Train for one epoch, or max_steps of it, with SGD."""
    steps = {"max_steps": config.pop("max_steps", None), "monitor": monitor}
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=config.pop("momentum", 0.0))
    state = TrainingState(model, optimizer, mixer=mixer or NoMix(), source=source)
    return train_one_epoch(state, loader, StepConfig(loss_fn, 3, **config), epoch=epoch, **steps)


class Brightness(Source):
    def __call__(self, images, targets):
        return images.abs().mean(1)


def test_an_epoch_equals_plain_sgd_on_the_mixed_batches():
    loader, model = make_loader_and_model()
    reference = make_loader_and_model()[1]
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(4)
    result = train(model, loader, build_mixer("mixup"), lr=0.1, momentum=0.9)
    torch.manual_seed(4)
    mixer, losses = build_mixer("mixup"), []
    for batch in loader.epoch(0):
        mixed, soft = mixer(batch.images, F.one_hot(batch.labels, 3).float())
        loss = F.cross_entropy(reference(mixed), soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(soft))
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[key]), key
    assert result["train_loss"] == pytest.approx(sum(losses) / 12, rel=1e-6) and result["images"] == 12


class RecordingMixer(Mixer):
    """Records what the loop passes to a method that needs the gradient at the mixed images and weights its loss."""

    wants_mixed_grad, mixed_weight = True, 0.5
    default_source = "any"

    def __call__(self, images, targets, source):
        self.saliency = source(images, targets)
        return images * 1.0, targets

    def after_backward(self, mixed_grad):
        self.grad = mixed_grad


def test_the_loop_passes_gradients_to_the_mixer_and_applies_its_loss_weight():
    loader, model = make_loader_and_model()
    mixer, monitor = RecordingMixer(), EpochMonitor(CPU)
    result = train(model, loader, mixer, Brightness(), max_steps=1, monitor=monitor)
    assert mixer.grad.shape == (5, 3, 8, 8) and mixer.grad.abs().sum() > 0 and mixer.saliency.shape == (5, 8, 8)
    plain = train(model, loader, max_steps=1)
    assert result["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5), "the reported loss must be unweighted"
    halves = mixer.grad
    mixer.mixed_weight = 1.0
    train(model, loader, mixer, Brightness(), max_steps=1)
    torch.testing.assert_close(mixer.grad, 2 * halves)
    assert {"data", "mixing", "saliency", "network"} == monitor.watch.seconds().keys()


def test_a_nan_loss_is_reported_with_its_step_and_images():
    loader, model = make_loader_and_model()

    def loss_fn(logits, targets):
        calls.append(1)
        return logits.mean() * (float("nan") if len(calls) == 2 else 1.0)

    calls = []
    with pytest.raises(NonFiniteLoss) as error:
        train(model, loader, lr=0.1, epoch=2, loss_fn=loss_fn)
    assert error.value.step == 2 * 3 + 1
    assert torch.equal(error.value.index, list(loader.epoch(2))[1].index)


def test_clip_grad_limits_the_gradient_norm():
    loader, model = make_loader_and_model()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, loader, lr=1.0, max_steps=1, clip_grad=0.01)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_ema_update_uses_the_decay_and_copies_integer_buffers():
    from engine.training.ema import ModelEma

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = ModelEma(model, 0.75)
    before = average.module[0].weight.clone()
    with torch.no_grad():
        model[0].weight += 4
        model[1].running_mean += 8
        model[1].num_batches_tracked += 3
    average.update(model)
    torch.testing.assert_close(average.module[0].weight, before + 1)
    assert average.module[1].running_mean.tolist() == [2, 2] and average.module[1].num_batches_tracked == 3


def test_predict_leaves_the_network_unchanged_and_keeps_image_order():
    loader, model = make_loader_and_model()
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits, labels = predict(model, loader)  # in the order of the images, not of the loader
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert logits.shape == (12, 3) and len(labels) == 12 and not logits.requires_grad
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(batch.images) for batch in loader.epoch()])
    expected = expected[torch.cat([batch.index for batch in loader.epoch()]).argsort()]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # in float32, whatever the precision of training


def test_an_unreadable_image_is_left_out_of_the_evaluation_in_training(tmp_path):
    """Before: the four broken files of a class counted as their neighbours, 75 % instead of 50 %."""
    for number in range(8):
        write_image(tmp_path / f"{number}.png", 200 * (number % 2), size=(8, 8))
    for number in range(4, 8):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    files = FileList(tmp_path, [f"{number}.png" for number in range(8)])
    test = ImageSet(ImageFiles(files, CenterCrop(8, 8), "skip"), torch.arange(8) // 4, ["a", "b"], "there", files=files)
    loader = DeviceLoader(test, 3, device=CPU, mean=(0.0,) * 3, std=(1.0,) * 3)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 2))
    nn.init.zeros_(model[2].bias)
    model[2].weight.data = torch.tensor([[0.0, 0, 1], [1.0, 0, 0]])  # bright in red: class b
    state = TrainingState(model, torch.optim.SGD(model.parameters(), 0.1))
    row = evaluate_held_out(state, {"test": loader}, bar=False)
    assert row["test_top1"] == 50 and row["test_unreadable"] == 4
    row |= {"epoch": 1, "lr": 0.1, "train_loss": 0.0, "train_acc": 0.0, "seconds": 1.0, "images_per_second": 1.0}
    assert "4 test files cannot be read: left out" in format_epoch(row, 1, {"method": ["none"], "loss": "ce"})
    assert summarize_history([row], {})["test_unreadable"] == 4


def test_the_median_names_the_epochs_it_is_of():
    rows = [{"epoch": n, "seconds": 1.0} | ({} if n % 10 else {"test_top1": float(n)}) for n in range(1, 121)]
    result = summarize_history(rows, {})
    assert result["median_of_last_ten_top1"] == 75 and result["last_ten_epochs"] == list(range(30, 121, 10))
    assert summarize_history(rows[:20], {})["last_ten_epochs"] == [10, 20]


def test_the_line_of_a_run_names_the_arguments_of_the_network_and_what_is_added_to_the_loss():
    part = make_loader_and_model()[0].image_set
    data = Data(part, part, None, (0.5,) * 3, (0.5,) * 3, image_size=8, warnings=[])
    options = {
        "model": "timm:vit",
        "model_args": {"img_size": 8, "drop_path_rate": 0.1},
        "dropout": 0.0,
        "recipe": "deit",
    }
    options |= {"epochs": 1, "batch_size": 4, "optimizer": "adamw", "scheduler": "cosine", "lr": 1e-3, "max_lr": None}
    options |= {"method_weights": None, "labels": None}
    options |= {"lr_points": None, "weight_decay": 0.05, "loss": "ce", "label_smoothing": 0.1, "seed": 0}
    lines, _ = describe_run(data, method=["mixup"], clean_weight=1.0, **options)
    assert "model timm:vit with img_size 8 and drop_path_rate 0.1, recipe deit" in lines[-1]
    assert "loss ce with label smoothing 0.1 + 1 x that of the unmixed batch, no" in lines[-1]
    lines, _ = describe_run(data, method=["none"], clean_weight=1.0, **{**options, "label_smoothing": 0.0})
    assert "loss ce, no" in lines[-1]
    options |= {"method_weights": [2.0, 0.5], "labels": "mean"}
    lines, _ = describe_run(data, method=["mixup", "cutmix"], clean_weight=None, **options)
    assert lines[-1].startswith("method mixup cutmix with weights 2 0.5, label rule mean, model timm:vit")


def test_hyper_parameters_are_described_where_they_change():
    first = {"none": {}, "puzzlemix": {"block_num": (2, 4), "clean_lam": 1.0, "transport": True, "off": None}}
    last = {**first, "puzzlemix": {**first["puzzlemix"], "clean_lam": 0.0}}
    assert describe_methods([first, first, last]) == [
        "puzzlemix: block_num 2 4, clean_lam 1, transport true",
        "puzzlemix in phase 3: block_num 2 4, clean_lam 0, transport true",
    ]


def test_losses_that_cannot_be_compared_are_named():
    row = {"epoch": 1, "lr": 0.1, "train_loss": 0.0, "train_acc": 0.0, "seconds": 1.0, "images_per_second": 1.0}
    row |= {"test_loss": 4.6}
    line = format_epoch(row, 1, {"method": ["none"], "loss": "softmax_bce"})
    assert "train loss (BCE) 0.0000" in line and "test loss (cross-entropy) 4.6000" in line
    assert "test loss 4.6000" in format_epoch(row, 1, {"method": ["none"], "loss": "ce"})


def test_profile_steps_times_every_part():
    loader, model = make_loader_and_model()
    state = TrainingState(model, torch.optim.SGD(model.parameters(), 0.1), mixer=NoMix())
    table = profile_steps(state, loader, StepConfig(LOSSES["ce"], 3), steps=4)
    assert table["network"] > 0 and table["data"] > 0 and table["saliency"] == 0


def test_a_learning_source_gets_the_gradient_at_the_unmixed_images():
    """It gets d loss / d images through the mixing, and the coverage: the weight of each pixel in the mixed images."""
    loader, model = make_loader_and_model()

    class Learner(Source):
        learns = True

        def start_batch(self, batch):
            self.batch = batch

        def __call__(self, images, targets):
            return torch.ones(len(images), 8, 8)

        def after_backward(self, image_grad, coverage):
            self.grad, self.coverage = image_grad.clone(), coverage.clone()

    class Swap(Mixer):
        default_source = "any"

        def __call__(self, images, targets, source):
            source(images, targets)
            return torch.cat([images[1:2], images[1:2], 0.25 * images[2:]]), targets

    learner = Learner()
    train(model, loader, Swap(), learner, max_steps=1)
    assert learner.coverage[:, 0, 0, 0].tolist() == [0.0, 2.0, 0.25, 0.25, 0.25]
    assert learner.grad[0].eq(0).all() and learner.grad[1:].flatten(1).abs().sum(1).gt(0).all()
    assert len(learner.batch.loaded_index) == 5


def test_the_clean_gradient_is_part_of_the_step():
    """SAGE: a step follows (1 - rho) times the clean gradient plus rho times the mixed gradient."""
    loader, model = make_loader_and_model()
    reference = make_loader_and_model()[1]
    reference.load_state_dict(model.state_dict())
    mixer = build_mixer("sage", update_ratio=0.6)
    source = Gradient(model, **mixer.gradient_options, training_loss=LOSSES["softmax_bce"])
    torch.manual_seed(3)
    train(model, loader, mixer, source, lr=0.1, loss_fn=LOSSES["softmax_bce"], max_steps=1)
    batch = next(loader.epoch(0))
    targets = F.one_hot(batch.labels, 3).float()
    torch.manual_seed(3)
    still = Gradient(
        copy.deepcopy(reference), **{**mixer.gradient_options, "clean_weight": 0.0}, training_loss=LOSSES["softmax_bce"]
    )
    mixed, soft = mixer(batch.images, targets, still)
    loss_fn = LOSSES["softmax_bce"]
    loss = 0.4 * loss_fn(reference(batch.images), targets) + 0.6 * loss_fn(reference(mixed), soft)
    loss.backward()
    for (name, moved), start in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(moved, start - 0.1 * start.grad, atol=1e-6, rtol=1e-4, msg=name)


METHODS = ["none", "mixup", "manifold", "cutmix", "saliencymix", "cutout"]
METHODS += ["puzzlemix", "comixup", "sage", "rmix", "rlmix", "puzzlemix bank", "sage fine_grained"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_step_never_synchronises_with_the_gpu(method, precision):
    from models import build_model
    from saliency import build_source

    device = torch.device("cuda")
    part = ImageSet(
        torch.randint(0, 256, (96, 32, 32, 3), dtype=torch.uint8), torch.arange(96) % 3, list("abc"), "here"
    )
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    loader = DeviceLoader(part, 16, device=device, shuffle=True, augmentation=Augmentation(4), **statistics)
    model = build_model("resnet20", 3).to(device, memory_format=torch.channels_last)
    name, _, wanted = method.partition(" ")
    mixer = build_mixer(name, mix_prob=1.0, **statistics)
    scaler = torch.amp.GradScaler("cuda") if precision is torch.float16 else None
    source = mixer.build_source(
        lambda one: build_source(
            wanted or one.default_source,
            **{**statistics, "model": model, "num_images": 96, "device": device, "precision": precision},
            **{"scaler": scaler, "training_loss": LOSSES["softmax_bce"], **one.gradient_options},
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    state = TrainingState(model, optimizer, mixer=mixer, source=source, scaler=scaler)
    config = StepConfig(LOSSES["ce"], 3, precision)
    for epoch in range(3):  # by then every shape that depends on a draw, such as the number of blocks, has occurred
        train_one_epoch(state, loader, config, epoch=epoch)

    def count_syncs(steps: int) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                train_one_epoch(state, loader, config, epoch=1, max_steps=steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(seen)

    assert count_syncs(6) == count_syncs(2), "only the ends of an epoch may synchronise"
