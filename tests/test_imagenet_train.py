"""imagenet_train.py on a few small images: phases, recipes, resized copies, resume, and errors."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import NARROW_RESNET18, same_state, start_script

import evaluate
import imagenet_train
import models
from engine.config import legacy_options, resolve, unused_options
from engine.data.datasets import load_data
from engine.data.loader import DeviceLoader
from engine.data.resize_copies import find_copies
from engine.errors import Terminated, UserError
from engine.training import loop
from engine.training.optimizer import find_undecayed, group_parameters
from engine.training.run import Run
from models import build_model
from saliency.casm.source import CASM

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
PHASES = "1:small:16:0.3:8,3:large:24:0.5:4,4:large:24:0.5:4"
POINTS = "0:0.01,1:0.02,1:0.01,4:0.001"


def write_dataset(folder: Path, classes: str = "abc", train: int = 6, val: int = 3, side: int = 40) -> Path:
    """Write train/<class>/ and val/<class>/ with noise images, each class in its own colour."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(0, 100, (side, side + 8, 3))
                pixels[..., number % 3] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{image}.jpg")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Folder of a dataset, with copies of shorter sides 20 and 32 beside it."""
    folder = write_dataset(tmp_path_factory.mktemp("set"))
    words = ["--data_dir", folder, "--resize_to", "20", "32", "--resize_dest", folder.parent / "copies"]
    imagenet_train.main([str(word) for word in words])
    return folder


def build_command(dataset: Path, root: Path, *words, name: str = "run") -> list[str]:
    given = ["--recipe", "fast100", "--dataset", "folder", "--model", "resnet18", "--data_dir", dataset]
    given += ["--data_small", dataset.parent / "copies" / "20", "--data_large", dataset.parent / "copies" / "32"]
    given += ["--image_size", 24, "--phases", PHASES, "--lr_points", POINTS, "--workers", 0, "--no_progress"]
    given += ["--root_dir", root, "--name", name, "--device", "cpu", "--amp", "off", *words]
    return [str(word) for word in given]


def load_last(root: Path, name: str = "run") -> dict:
    return torch.load(root / "folder" / "imagenet_resnet18" / name / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Root folder of an uninterrupted run of three phases, named whole."""
    root = tmp_path_factory.mktemp("runs")
    imagenet_train.main(build_command(dataset, root, "--method", "puzzlemix", "--block_num", "2", name="whole"))
    return root


def test_all_phases_run_in_one_process(whole, dataset):
    run = whole / "folder" / "imagenet_resnet18" / "whole"
    assert {"phase_1.pt", "phase_2.pt", "phase_3.pt", "last.pt", "best.pt", "curves.png"} <= set(os.listdir(run))
    assert torch.load(run / "phase_2.pt", weights_only=True)["epoch"] == 3
    saved = load_last(whole, "whole")
    assert saved["step"] == 3 + 3 * 5  # 18 images in batches of 8, then of 4
    rates = [row["lr"] for row in saved["history"]]  # at the first step of each epoch
    assert rates == pytest.approx([0.01 + 0.01 / 3, 0.01 - 0.003 / 5, 0.007 - 0.003 / 5, 0.004 - 0.003 / 5])
    text = (run / "log.txt").read_text()
    assert "phase 1: up to epoch 1, small images, 16-pixel crops of at least 30 % of the area, batch size 8" in text


def test_evaluation_uses_the_centre_crop_in_both_scripts(whole, dataset, capsys):
    run = whole / "folder" / "imagenet_resnet18" / "whole"
    (result,) = evaluate.main(["--model_path", str(run / "last.pt"), "--workers", "0", "--device", "cpu"])
    row = load_last(whole, "whole")["history"][-1]
    assert result["top1"] == pytest.approx(row["test_top1"]) and result["loss"] == pytest.approx(row["test_loss"])
    assert result["images"] == 9 and load_last(whole, "whole")["config"]["eval_resize"] == 27
    again = imagenet_train.main(["--evaluate", "--checkpoint", str(run), "--workers", "0", "--device", "cpu"])
    assert again["loss"] == pytest.approx(row["test_loss"])


@pytest.mark.parametrize("steps", [2, 3, 6, 13])
def test_a_run_stopped_in_any_phase_ends_with_the_same_weights(whole, dataset, tmp_path, monkeypatch, steps):
    """Stopped in the middle of the first phase, at its end, and in the middle of the second and of the third."""
    update, done = loop.optimizer_step, []

    def step_and_stop(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", step_and_stop)
    with pytest.raises(Terminated):
        imagenet_train.main(build_command(dataset, tmp_path, "--method", "puzzlemix", "--block_num", "2"))
    assert load_last(tmp_path)["step"] == steps
    monkeypatch.undo()
    imagenet_train.main(
        build_command(dataset, tmp_path, "--method", "puzzlemix", "--block_num", "2", "--checkpoint", "auto")
    )
    one, other = load_last(whole, "whole"), load_last(tmp_path)
    for key in ("model", "optimizer", "scheduler", "rng", "step"):
        assert same_state(one[key], other[key]), key


def train_narrow_network(command: list[str]) -> None:
    models.MODELS["imagenet_resnet18"] = NARROW_RESNET18
    imagenet_train.main(command)


def test_sigterm_to_the_process_group_saves_the_run_and_leaves_no_process(dataset, tmp_path):
    """A scheduler sends SIGTERM to all processes. The workers ignore it, so the run can finish its step and save."""
    words = build_command(
        dataset, tmp_path, "--workers", 2, "--phases", "400:original:16:0.3:8", "--lr_points", "0:0.1,400:0"
    )
    process = start_script(partial(train_narrow_network, words), tmp_path / "errors")
    run = tmp_path / "folder" / "imagenet_resnet18" / "run"
    while not (run / "last.pt").exists() and process.is_alive():
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 143 and "stopped by SIGTERM: " in errors and "Traceback" not in errors, errors
    assert load_last(tmp_path)["inside"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the workers exit with their parent
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_each_phase_has_its_own_crop_batch_size_and_clean_loss(dataset, tmp_path, monkeypatch):
    seen = []
    train_one_epoch = loop.train_one_epoch

    def record_batch(state, batches, *args, **kwargs):
        batch = next(batches.epoch(0))
        seen.append((tuple(batch.images.shape), state.source.clean_weight, str(batches.image_set.origin)))
        batches.close()
        return train_one_epoch(state, batches, *args, **kwargs)

    monkeypatch.setattr("engine.training.loop.train_one_epoch", record_batch)
    imagenet_train.main(build_command(dataset, tmp_path, "--method", "puzzlemix", "--block_num", "2", "--log_off"))
    assert [shape for shape, _, _ in seen] == [(8, 3, 16, 16)] + [(4, 3, 24, 24)] * 3
    assert [weight for _, weight, _ in seen] == [1, 1, 1, 0]
    assert "copies/20" in seen[0][2] and "copies/32" in seen[1][2]


def test_rlmix_keeps_its_agent_while_the_batch_size_stays(dataset, tmp_path, monkeypatch):
    """The policy depends on the batch size: 8 in the first phase, 4 in the others."""
    agents = []

    def record_agent(self, row, *args, **kwargs):
        agents.append(self.state.mixer.agent)
        return end_epoch(self, row, *args, **kwargs)

    end_epoch = Run.end_epoch
    monkeypatch.setattr(Run, "end_epoch", record_agent)
    words = ["--method", "rlmix", "--num_patches", "4", "--agent_trajectory_size", "50"]
    imagenet_train.main(build_command(dataset, tmp_path, *words))
    sizes = [agent.sizes["batch"] for agent in agents]
    assert sizes == [8, 4, 4, 4]
    assert agents[1] is agents[2] and agents[3] is not agents[2]
    assert load_last(tmp_path)["method"][0]["steps"] > 5, "the third phase keeps what the agent learned in the second"


def test_casm_masks_are_used_in_every_phase(dataset, tmp_path, casm_file, monkeypatch):
    seen, compute_masks = [], CASM.__call__

    def record_size(self, images, targets):
        seen.append(tuple(images.shape[-2:]))
        return compute_masks(self, images, targets)

    monkeypatch.setattr(CASM, "__call__", record_size)
    words = ["--method", "saliencymix", "--mix_prob", "1", "--saliency", "casm", "--casm", casm_file]
    imagenet_train.main(build_command(dataset, tmp_path, *words))
    assert set(seen) == {(16, 16), (24, 24)}, "masks must have the size of the crops"


def resolve_command(*words: str) -> dict:
    parser = imagenet_train.build_parser()
    typed, _ = legacy_options.translate_legacy(parser.read([str(word) for word in words]))
    return resolve.resolve_options(parser, typed, {})


def test_recipes_have_the_published_values():
    options = resolve_command()
    expected = {"epochs": 300, "batch_size": 256, "lr": 0.1, "schedule": [75, 150, 225], "weight_decay": 1e-4}
    expected |= {"color_jitter": 0.4, "lighting": 0.1, "crop_size": 224, "eval_resize": 256, "min_scale": 0.08}
    expected |= {"model": "imagenet_resnet50", "no_decay_bn": False, "zero_init": False}
    assert {key: options[key] for key in expected} == expected and not options["phases"]
    assert resolve_command("--method", "cutmix")["method_options"]["cutmix"] == {"mix_prob": 1.0}

    options = resolve_command("--recipe", "fast100", "--method", "rmix")
    expected = {"epochs": 100, "batch_size": 1024, "no_decay_bn": True, "zero_init": True, "color_jitter": 0.0}
    assert {key: options[key] for key in expected} == expected
    assert options["method_options"]["rmix"]["patches_per_side"] == (2, 4)
    clean = [resolve.get_phase_options(options, n)["method_options"]["puzzlemix"]["clean_lam"] for n in range(3)]
    assert clean == [1, 1, 0]
    assert resolve_command("--recipe", "none", "--epochs", 3, "--batch_size", 8, "--lr", 0.1)["scheduler"] == "constant"


def test_options_derived_from_a_retyped_option_are_not_taken_from_the_config():
    """--config contains all options of an earlier run, including those that were not typed."""
    parser = imagenet_train.build_parser()
    saved = resolve_command("--recipe", "fast100", "--image_size", 96)
    again = resolve.resolve_options(parser, {"image_size": 64, "phases": "2:small:64:0.1:32"}, saved)
    assert (again["crop_size"], again["eval_resize"], again["epochs"], again["batch_size"]) == (64, 73, 2, 32)
    assert resolve.resolve_options(parser, {}, saved) == saved


def test_unused_options_are_listed():
    typed = {"data_small": "x", "crop_padding": 4, "min_scale": 0.2, "trad_augment": False}
    options = resolve_command("--trad_augment", "false", "--min_scale", 0.2)
    notes = unused_options.collect_run_notes(options, typed, {}, 100)
    assert notes == ["no effect in this run: --crop_padding, --data_small, --min_scale"]
    assert unused_options.collect_run_notes(resolve_command(), {}, {}, 100) == []


def test_typed_phases_set_the_number_of_epochs():
    options = resolve_command("--phases", "2:small:64:0.1:32,5:large:96:0.2:16")
    assert options["epochs"] == 5 and options["batch_size"] == 32


@pytest.mark.parametrize(
    "words, message",
    [
        (["--phases", "5:small:64:0.1:32,3:large:96:0.2:16"], "end epochs must increase, but 3 follows 5"),
        (["--phases", "5:tiny:64:0.1:32"], "'5:tiny:64:0.1:32': expected end:folder:crop:min_scale:batch"),
        (["--recipe", "fast100", "--epochs", "3"], "--epochs 3: --phases ends at epoch 100"),
        (["--recipe", "fast100", "--batch_size", "64"], "--batch_size: set by --phases for each phase"),
        (["--recipe", "fast100", "--lr", "0.1"], "--lr: --lr_points sets the learning rates"),
        (["--lr_points", "0:1,2:0"], "--lr_points has no effect with --scheduler multistep"),
        (["--scheduler", "points", "--lr_points", "3:1,2:0"], "epochs must be in order, but 2 follows 3"),
        (["--scheduler", "points"], "needs --lr_points"),
        (["--recipe", "none", "--lr", "1"], "--recipe none does not set --epochs --batch_size; give a value"),
        (["--resize_to", "160"], "--resize_to needs --resize_dest"),
        (["--resize_dest", "copies"], "used only with --resize_to"),
        (["--recipe", "fast100", "--scheduler", "multistep"], "--scheduler multistep needs --schedule"),
        (["--pretrained", "--init_from", "x.pt"], "give one of them"),
        (["--model", "preactresnet18"], "choose from imagenet_resnet18"),
        (["--dataset", "cifar10"], "choose from imagenet, tiny-imagenet, folder"),
    ],
)
def test_contradictions_are_usage_errors_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        imagenet_train.main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_errors_name_wrong_folders(dataset, tmp_path):
    flat = write_dataset(tmp_path / "flat")
    for path in list((flat / "val").rglob("*.jpg")):
        path.rename(flat / "val" / f"{path.parent.name}{path.name}")
    for name in "abc":
        (flat / "val" / name).rmdir()
    with pytest.raises(UserError, match=r"images outside class folders \(9\).*\n.*--val_labels FILE"):
        imagenet_train.main(build_command(dataset, tmp_path, "--data_dir", flat))
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{path.name} {path.name[0]}\n" for path in (flat / "val").iterdir()))
    words = ["--data_dir", flat, "--val_labels", labels, "--phases", "1:original:16:0.3:8", "--lr_points", "0:0.1,1:0"]
    imagenet_train.main(build_command(dataset, tmp_path, *words, "--log_off"))

    fewer = write_dataset(tmp_path / "fewer", classes="ab")
    for path in (fewer / "train").rglob("*.jpg"):
        path.rename(path.with_name(f"other{path.name}"))
    with pytest.raises(
        UserError, match=r"--data_small .*: the copies are not of the 12 images .*; a/other0.jpg is missing"
    ):
        imagenet_train.main(build_command(dataset, tmp_path, "--data_dir", fewer))
    with pytest.raises(
        UserError, match=r"--data_small .*typo: no train/<class>/\*.jpg in it\nmake the copies with --resize_to"
    ):
        imagenet_train.main(build_command(dataset, tmp_path, "--data_small", tmp_path / "typo"))
    with pytest.raises(UserError, match="imagenet has 1000 classes, .* has 2\n.*--num_classes 2"):
        imagenet_train.main(build_command(dataset, tmp_path, "--data_dir", fewer, "--dataset", "imagenet"))


def test_images_without_a_copy_are_errors_or_skipped(dataset, tmp_path, capsys):
    """An image that cannot be read has no copy. The other images must keep their labels."""
    more = write_dataset(tmp_path / "more", train=7)
    words = ["--data_dir", more, "--phases", "1:small:16:0.3:8", "--lr_points", "0:0.1,1:0", "--log_off"]
    with pytest.raises(UserError, match=r"--data_small .*: no copy of a/6.jpg and 2 more\n.*--on_bad_image skip"):
        imagenet_train.main(build_command(dataset, tmp_path, *words))
    imagenet_train.main(build_command(dataset, tmp_path, *words, "--on_bad_image", "skip"))
    assert "left out because they have no copy: 3" in capsys.readouterr().out
    data = load_data("folder", data_dir=str(more), on_bad_image="skip")
    copies = find_copies(data, {"small": str(dataset.parent / "copies" / "20"), "large": None})
    assert len(copies["small"]) == len(copies["original"]) == 18 and copies["large"] is data.train
    for part in copies.values():
        assert [Path(file).parent.name for file in part.pixels.files] == ["abc"[label] for label in part.labels]


def test_training_images_have_the_crop_size_of_the_phase(dataset, tmp_path, monkeypatch):
    """Block methods divide the crop and not the image. Without augmentation the crop is the centre."""
    words = ["--method", "puzzlemix", "--block_num", "2", "--image_size", 27, "--vis_epoch", 1]
    words += ["--trad_augment", "false", "--phases", "1:original:16:0.3:8", "--lr_points", "0:0.1,1:0"]
    seen, load_epoch = [], DeviceLoader.epoch

    def record_epoch(self, *args, **kwargs):
        for batch in load_epoch(self, *args, **kwargs):
            seen.append((self.shuffle, batch.images.shape[-1], batch.box))
            yield batch

    monkeypatch.setattr(DeviceLoader, "epoch", record_epoch)
    imagenet_train.main(build_command(dataset, tmp_path, *words))
    assert {(size, box) for shuffled, size, box in seen if shuffled} == {(16, None)}
    assert list((tmp_path / "folder" / "imagenet_resnet18" / "run" / "vis").glob("*.png"))


def test_batch_norm_parameters_can_be_exempt_from_weight_decay():
    model = build_model("imagenet_resnet18", 3, 64)
    undecayed = find_undecayed(model, no_decay_bn=True, no_decay_1d=False)
    others, norms = group_parameters(model, undecayed, lr=0.1, weight_decay=1e-4)
    assert (
        norms["weight_decay"] == 0
        and len(norms["params"]) == 40
        and all(parameter.dim() == 1 for parameter in norms["params"])
    )
    assert len(others["params"]) + 40 == len(list(model.parameters())) and "weight_decay" not in others


@pytest.mark.data
def test_tiny_imagenet_trains_in_phases_with_workers(real_data, tmp_path):
    words = ["--dataset", "tiny-imagenet", "--data_dir", real_data, "--num_classes", "20", "--limit", "64"]
    words += ["--workers", "2", "--phases", "1:original:32:0.3:32,2:original:48:0.3:16", "--lr_points", "0:0.1,2:0"]
    words += ["--image_size", "48", "--method", "rmix", "--recipe", "fast100", "--model", "resnet18", "--log_off"]
    result = imagenet_train.main([str(word) for word in words])
    assert result["epochs"] == 2
