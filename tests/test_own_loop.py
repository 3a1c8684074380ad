"""docs/own_loop.md: its examples run with the installed package, in a plain loop, one like timm's, and Lightning."""

import copy
import logging
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
from support import ROOT, same_state
from torch import nn
from torch.nn import functional as F

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "own_loop.md").read_text(), flags=re.M)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@pytest.fixture
def run(installed_package, monkeypatch):
    """Return a function that runs the examples of a section of the page and returns their names.

    number: only this example. names: that it finds.
    """
    monkeypatch.syspath_prepend(installed_package)

    def run_examples(title: str, number: int | None = None, **names) -> dict:
        (section,) = [section for section in SECTIONS if section.startswith(title)]
        blocks = re.findall(r"```python\n(.*?)```", section, re.S)
        for block in blocks if number is None else [blocks[number]]:
            exec(block, names)
        return names

    return run_examples


def draw_spots(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise with a spot in one of two colours, the classes: (B, 3, 32, 32) and (B,)."""
    images, labels = 0.3 * torch.randn(count, 3, 32, 32), torch.arange(count) % 2
    images[labels == 0, 0, 10:22, 10:22] += 3
    images[labels == 1, 2, 10:22, 10:22] += 3
    return images, labels


def small_network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 10)]
    return nn.Sequential(*layers)


@torch.no_grad()
def measure_accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def add_gradients(model: nn.Module, *passes) -> list[torch.Tensor]:
    """Return the parameter gradients of the sum of weight * cross-entropy; passes: weight, images, soft targets."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    for weight, images, soft in passes:
        (weight * F.cross_entropy(model(images), soft)).backward()
    return [parameter.grad for parameter in model.parameters()]


def record_mixes(mixer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a list to which each call of the mixer adds its mixed images and soft targets."""
    mixes, mix_batch = [], mixer.mix_batch
    mixer.mix_batch = lambda *batch: mixes.append(mix_batch(*batch)) or mixes[-1]
    return mixes


def test_the_plain_loop_runs(run):
    names = run("A plain loop")
    assert not torch.equal(names["mixed"], names["images"])
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    assert names["mixer"].__class__.__module__.startswith("saliency_mixing."), "the repository was imported"


def test_the_plain_loop_runs_with_several_methods(run):
    names = run("Several methods", model=small_network())
    mixer, source = names["mixer"], names["source"]
    assert source[0] is None and source[1].clean_weight == pytest.approx(1 - mixer.mixers[1].mixers[1].update_ratio)
    weights = set()
    for seed in range(6):
        torch.manual_seed(seed)
        mixed, _ = mixer(torch.randn(4, 3, 32, 32), torch.eye(10)[:4], source)
        assert (mixed == 0).any(), "Cutout has cut a hole"
        weights.add(mixer.mixed_weight)
    assert weights == {1.0, mixer.mixers[1].mixers[1].update_ratio}
    with pytest.raises(ValueError, match="Choice needs a list of sources, one for each method; .*build_source"):
        mixer(torch.randn(4, 3, 32, 32), torch.eye(10)[:4], source[1])


def train_like_timm(
    model: nn.Module, batches, loss_fn, mixup_fn, *, lr=0.05, accumulate=1, precision=None, scaler=None, layout=None
) -> torch.optim.Optimizer:
    """Train for one epoch in the order of timm's train_one_epoch: mix, forward, backward, step, zero the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    optimizer.zero_grad()
    model.train()
    for number, (input, target) in enumerate(batches, 1):
        input, target = mixup_fn(input, target)
        if layout:
            input = input.contiguous(memory_format=layout)
        with torch.autocast("cpu", precision) if precision else nullcontext():
            loss = loss_fn(model(input), target) / accumulate
        update = number % accumulate == 0 or number == len(batches)
        if scaler:
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=update)
        else:
            loss.backward()
            if update:
                optimizer.step()
        if update and lr:
            optimizer.zero_grad()
    return optimizer


def build_resnet() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet10t", num_classes=10, channels=(8, 16, 24, 32), stem_width=8)


def split_batches(images: torch.Tensor, labels: torch.Tensor, size: int = 16) -> list:
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_the_vit_of_timm_trains_with_the_functions_of_the_page(run):
    pytest.importorskip("timm")
    names = run("timm")
    assert len(names["model"].blocks) == 12 and names["model"].patch_embed.num_patches == 64
    before = copy.deepcopy(names["model"].state_dict())
    images, labels = draw_spots(7)
    train_like_timm(names["model"], split_batches(images, labels, 4), names["train_loss_fn"], names["mixup_fn"])
    after = names["model"].state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not any(torch.equal(before[key], after[key]) for key in ("head.weight", "patch_embed.proj.weight"))


@pytest.mark.parametrize("method", ["SAGE", "PuzzleMix"])
def test_a_resnet_of_timm_learns_with_the_functions_of_the_page(run, method):
    model = build_resnet()
    import saliency_mixing

    options = {"mean": MEAN, "std": STD} if method == "PuzzleMix" else {}
    names = run("timm", 1, model=model, mixer=getattr(saliency_mixing, method)(**options))
    images, labels = draw_spots(47)
    assert measure_accuracy(model, images, labels) < 0.6
    for _ in range(3):
        train_like_timm(model, split_batches(images, labels), names["train_loss_fn"], names["mixup_fn"])
    assert measure_accuracy(model, *draw_spots(64)) > 0.95


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_channels_last_and_a_scaler(run, precision):
    model = build_resnet().to(memory_format=torch.channels_last)
    from saliency_mixing import RMix
    from timm.utils import NativeScaler

    names = run("timm", 1, model=model, mixer=RMix())
    names["source"].precision = precision
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    model.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype == precision))
    options = {"precision": precision, "layout": torch.channels_last, "accumulate": 2}
    images, labels = draw_spots(15)
    images = images.contiguous(memory_format=torch.channels_last)
    scaler = NativeScaler(device="cpu")
    train_like_timm(
        model, split_batches(images, labels, 5), names["train_loss_fn"], names["mixup_fn"], scaler=scaler, **options
    )
    assert len(seen) == 12 and all(seen), "both passes of each batch"
    assert names["source"](images, F.one_hot(labels, 10).float()).amax((1, 2)).min() > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_clean_loss_survives_a_loop_like_timm_s(run, accumulate):
    pytest.importorskip("timm")
    model = small_network()
    import saliency_mixing

    class Mixer(saliency_mixing.SAGE):
        @property
        def gradient_options(self):
            options = super().gradient_options
            options["clean_weight"] /= accumulate  # as the page says
            return options

    names = run("timm", 1, model=model, mixer=Mixer(update_ratio=0.7))
    mixes = record_mixes(names["mixer"])
    images, labels = draw_spots(6)
    batches = split_batches(images, labels, 6 // accumulate)
    train_like_timm(model, batches, names["train_loss_fn"], names["mixup_fn"], lr=0.0, accumulate=accumulate)
    clean = [(0.3 / accumulate, x, F.one_hot(y, 10).float()) for x, y in batches]
    expected = add_gradients(model, *clean, *((0.7 / accumulate, *mix) for mix in mixes))
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_a_mixer_that_mixes_nothing_leaves_a_loop_like_timm_s_unchanged(run):
    pytest.importorskip("timm")
    states = []
    for mixes in (True, False):
        torch.manual_seed(3)
        model, batches = small_network(), split_batches(*draw_spots(20), size=8)
        from saliency_mixing import PuzzleMix

        names = run("timm", 1, model=model, mixer=PuzzleMix(mean=MEAN, std=STD, mix_prob=0.0))
        plain = lambda input, target: (input, F.one_hot(target, 10).float())  # noqa: E731
        optimizer = train_like_timm(
            model, batches, names["train_loss_fn"], names["mixup_fn"] if mixes else plain, accumulate=2
        )
        states.append([model.state_dict(), optimizer.state_dict()["state"]])
    assert same_state(*states)


@pytest.fixture
def fit(monkeypatch):
    """Return a function that trains with a real lightning.Trainer and returns it."""
    lightning = pytest.importorskip("lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    warnings.simplefilter("ignore")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    def train(module, images, labels, *, batch_size=16, checkpoint=None, **options):
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size)
        trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, **quiet | options)
        trainer.fit(module, loader, loader, ckpt_path=checkpoint)
        return trainer

    return train


def test_the_module_of_the_page_learns_in_lightning(run, fit):
    names = run("PyTorch Lightning")
    images, labels = draw_spots(47)
    from saliency_mixing import SaliencyMix, static_source

    for precision, mixer in (("32-true", names["mixer"]), ("bf16-mixed", SaliencyMix(mix_prob=1.0))):
        module = names["Classifier"](small_network(), mixer)
        if precision == "bf16-mixed":
            module.source = static_source(MEAN, STD)
        trainer = fit(module, images, labels, max_epochs=5, precision=precision)
        assert trainer.global_step == 15 and trainer.callback_metrics["accuracy"] > 0.95
        accuracy = measure_accuracy(module.model, images, labels)
        assert trainer.callback_metrics["accuracy"] == pytest.approx(accuracy), "validation sees the images as they are"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_only_manual_optimisation_keeps_the_clean_loss_in_lightning(run, fit, precision):
    names = run("PyTorch Lightning")
    images, labels = draw_spots(6)
    from saliency_mixing import SAGE

    for cls, clean_weight in (("ManualClassifier", 0.3), ("Classifier", 0.0)):
        model = small_network()
        module = names[cls](model, SAGE(update_ratio=0.7))
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.0)
        mixes, found, parameters = record_mixes(module.mixer), [], list(model.parameters())
        module.on_before_optimizer_step = lambda _, found=found, own=parameters: found.extend(one.grad for one in own)
        fit(module, images, labels, max_epochs=1, precision=precision, num_sanity_val_steps=0)
        passes = [(clean_weight, images, F.one_hot(labels, 10).float()), (0.7, *mixes[0])]
        tolerance = {"rtol": 0.1, "atol": 0.01} if precision == "bf16-mixed" else {}
        expected = add_gradients(model, *(one for one in passes if one[0]))
        torch.testing.assert_close(found, expected, **tolerance)


def test_a_mixer_that_mixes_nothing_leaves_lightning_unchanged(run, fit):
    names = run("PyTorch Lightning")
    from saliency_mixing import RMix

    class Plain(names["Classifier"]):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), F.one_hot(batch[1], 10).float())

    states = []
    for cls in (names["Classifier"], Plain):
        torch.manual_seed(3)
        module, (images, labels) = cls(small_network(), RMix(mix_prob=0.0)), draw_spots(40)
        fit(module, images, labels, max_epochs=2, accumulate_grad_batches=2)
        states.append(module.state_dict())
    assert same_state(*states)


def test_rl_mix_resumes_exactly_in_lightning(run, fit, tmp_path):
    names = run("The two methods", **run("PyTorch Lightning"))
    from lightning.pytorch.callbacks import ModelCheckpoint
    from saliency_mixing import RLMix

    class Seeded(names["RLMixClassifier"]):
        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(self.global_step)  # Lightning does not save the state of the random generators

    images, labels = draw_spots(48)
    states = []
    for checkpoint in (None, tmp_path / "epoch=0.ckpt"):
        torch.manual_seed(len(states))
        agent = {"agent_trajectory_size": 2, "agent_batch_size": 2, "agent_epochs": 1}
        module = Seeded(small_network(), RLMix(random_patches=(8,), num_patches=4, **agent))
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        options = {"enable_checkpointing": True, "callbacks": [saver], "max_epochs": 2}
        fit(module, images, labels, checkpoint=checkpoint, **options)
        states.append([module.state_dict(), module.mixer.state_dict()])
    assert same_state(*states) and states[0][1]["steps"] == 6


def test_masks_are_mixed_as_the_images_are(run):
    kinds = set()
    for seed in range(8):
        torch.manual_seed(seed)
        names = run("Segmentation masks", 0)
        mixer, images, masks = names["mixer"], names["images"], names["masks"]
        own = (names["mixed"] == images).all(1)  # pixels that the image shows, not its partner
        assert (own | (names["mixed"] == images[mixer.partner]).all(1)).all()
        masks[:, 0, 0] = torch.where(own[:, 0, 0], names["masks"][:, 0, 0], 255)
        expected = torch.where(own, masks, masks[mixer.partner])
        pasted = run("Segmentation masks", 1, **names)["pasted"]
        assert torch.equal(pasted, expected)
        assert torch.equal(names["soft"].argmax(1)[pasted < 255], pasted[pasted < 255])
        assert names["loss"].isfinite()
        kinds.add(bool(own.all()))
    assert kinds == {True, False}, "some batches are not mixed"


def test_masks_as_further_channels_are_mixed_as_the_images_are(run):
    names = run("Segmentation masks", 0)
    from saliency_mixing import CoMixup

    names["classes"] = names["images"].abs()
    names["images"] = names["classes"] - 0.5  # so that a mixed mask is known from the mixed colours
    names = run("Segmentation masks", 2, **names)
    assert names["mixer"].offset.any(), "SAGE has shifted an image"
    missing = names["mixed"] + 0.5 - names["soft"]  # where SAGE has shifted the partner out, there is no class
    assert missing.min() > -1e-5 and missing.max() < 0.5 + 1e-5 and missing.abs().min() < 1e-5

    together = torch.cat([names["images"], names["classes"]], 1)
    targets, source = torch.eye(8), lambda both, targets: names["source"](both[:, :3], targets)
    both, _ = CoMixup(clean_lam=0)(together, targets, source)
    assert not torch.equal(both, together)
    torch.testing.assert_close(both[:, :3], both[:, 3:] - 0.5)
