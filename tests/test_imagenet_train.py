"""imagenet_train.py on a few small pictures: phases, recipes, copies, resume, and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, same_state

import evaluate
import imagenet_train
from engine.config import legacy_options, resolve, unused_options
from engine.data.datasets import load_data
from engine.data.loader import DeviceLoader
from engine.data.resize_copies import find_copies
from engine.errors import Terminated, UserError
from engine.training import loop
from engine.training.optimizer import split_norm_parameters
from engine.training.run import Run
from models import build_model
from saliency.casm.source import CASM

PHASES = "1:small:16:0.3:8,3:large:24:0.5:4,4:large:24:0.5:4"
POINTS = "0:0.01,1:0.02,1:0.01,4:0.001"


def pictures(folder: Path, classes: str = "abc", train: int = 6, val: int = 3, side: int = 40) -> Path:
    """train/<class>/ and val/<class>/ of noisy pictures, each class of its own colour."""
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
def place(tmp_path_factory) -> Path:
    """Pictures, and their copies with shorter sides 20 and 32."""
    folder = pictures(tmp_path_factory.mktemp("set"))
    words = ["--data_dir", folder, "--resize_to", "20", "32", "--resize_dest", folder.parent / "copies"]
    imagenet_train.main([str(word) for word in words])
    return folder


def command(place: Path, root: Path, *words, name: str = "run") -> list[str]:
    given = ["--recipe", "fast100", "--dataset", "folder", "--model", "resnet18", "--data_dir", place]
    given += ["--data_small", place.parent / "copies" / "20", "--data_large", place.parent / "copies" / "32"]
    given += ["--image_size", 24, "--phases", PHASES, "--lr_points", POINTS, "--workers", 0, "--no_progress"]
    given += ["--root_dir", root, "--name", name, "--device", "cpu", "--amp", "off", *words]
    return [str(word) for word in given]


def last(root: Path, name: str = "run") -> dict:
    return torch.load(root / "folder" / "imagenet_resnet18" / name / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run of three phases in one go: its folder, and what batches the mixer was handed."""
    root = tmp_path_factory.mktemp("runs")
    imagenet_train.main(command(place, root, "--method", "puzzlemix", "--block_num", "2", name="whole"))
    return root


def test_the_phases_follow_each_other_in_one_process(whole, place):
    run = whole / "folder" / "imagenet_resnet18" / "whole"
    assert {"phase_1.pt", "phase_2.pt", "phase_3.pt", "last.pt", "best.pt", "curves.png"} <= set(os.listdir(run))
    assert torch.load(run / "phase_2.pt", weights_only=True)["epoch"] == 3
    saved = last(whole, "whole")
    assert saved["step"] == 3 + 3 * 5  # 18 images in batches of 8, then of 4
    rates = [row["lr"] for row in saved["history"]]  # of the first step of each epoch
    assert rates == pytest.approx([0.01 + 0.01 / 3, 0.01 - 0.003 / 5, 0.007 - 0.003 / 5, 0.004 - 0.003 / 5])
    text = (run / "log.txt").read_text()
    assert "phase 1: up to epoch 1, small images, 16-pixel crops of at least 30 % of the area, batch size 8" in text


def test_evaluation_is_of_the_centre_and_equal_everywhere(whole, place, capsys):
    run = whole / "folder" / "imagenet_resnet18" / "whole"
    (result,) = evaluate.main(["--model_path", str(run / "last.pt"), "--workers", "0", "--device", "cpu"])
    row = last(whole, "whole")["history"][-1]
    assert result["top1"] == pytest.approx(row["test_top1"]) and result["loss"] == pytest.approx(row["test_loss"])
    assert result["images"] == 9 and last(whole, "whole")["config"]["eval_resize"] == 27
    again = imagenet_train.main(["--evaluate", "--checkpoint", str(run), "--workers", "0", "--device", "cpu"])
    assert again["loss"] == pytest.approx(row["test_loss"])


@pytest.mark.parametrize("steps", [2, 3, 6, 13])
def test_stopped_in_any_phase_it_ends_with_the_same_weights(whole, place, tmp_path, monkeypatch, steps):
    """In the middle of the first phase, at its end, and in the middle of the second and the third."""
    update, done = loop.optimizer_step, []

    def counted(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", counted)
    with pytest.raises(Terminated):
        imagenet_train.main(command(place, tmp_path, "--method", "puzzlemix", "--block_num", "2"))
    assert last(tmp_path)["step"] == steps
    monkeypatch.undo()
    imagenet_train.main(command(place, tmp_path, "--method", "puzzlemix", "--block_num", "2", "--checkpoint", "auto"))
    one, other = last(whole, "whole"), last(tmp_path)
    for key in ("model", "optimizer", "scheduler", "rng", "step"):
        assert same_state(one[key], other[key]), key


def test_sigterm_to_all_processes_at_once_leaves_the_image_workers_at_work(place, tmp_path):
    """As a scheduler sends it. The run still finishes its step, keeps where it is, and leaves no process behind."""
    words = command(place, tmp_path, "--workers", 2, "--phases", "400:original:16:0.3:8", "--lr_points", "0:0.1,400:0")
    process = subprocess.Popen(
        [sys.executable, "imagenet_train.py", *words],
        **{"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
        start_new_session=True,
    )
    run = tmp_path / "folder" / "imagenet_resnet18" / "run"
    while not (run / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM: " in errors and "Traceback" not in errors, errors
    assert last(tmp_path)["inside"]
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the workers of the group go with their parent
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_a_phase_has_its_own_crop_batch_and_clean_term(place, tmp_path, monkeypatch):
    seen = []
    train_one_epoch = loop.train_one_epoch

    def looked(state, batches, *args, **kwargs):
        batch = next(batches.epoch(0))
        seen.append((tuple(batch.images.shape), state.source.clean_weight, str(batches.image_set.origin)))
        batches.close()
        return train_one_epoch(state, batches, *args, **kwargs)

    monkeypatch.setattr("engine.training.loop.train_one_epoch", looked)
    imagenet_train.main(command(place, tmp_path, "--method", "puzzlemix", "--block_num", "2", "--log_off"))
    assert [shape for shape, _, _ in seen] == [(8, 3, 16, 16)] + [(4, 3, 24, 24)] * 3
    assert [weight for _, weight, _ in seen] == [1, 1, 1, 0]
    assert "copies/20" in seen[0][2] and "copies/32" in seen[1][2]


def test_rlmix_keeps_its_agent_as_long_as_the_batch_stays(place, tmp_path, monkeypatch):
    """The policy is as wide as the batch: 8 in the first phase, 4 in the others."""
    agents = []

    def looked(self, row, *args, **kwargs):
        agents.append(self.state.mixer.agent)
        return kept(self, row, *args, **kwargs)

    kept = Run.end_epoch
    monkeypatch.setattr(Run, "end_epoch", looked)
    words = ["--method", "rlmix", "--num_patches", "4", "--agent_trajectory_size", "50"]
    imagenet_train.main(command(place, tmp_path, *words))
    sizes = [agent.sizes["batch"] for agent in agents]
    assert sizes == [8, 4, 4, 4]
    assert agents[1] is agents[2] and agents[3] is not agents[2]
    assert last(tmp_path)["method"][0]["steps"] > 5, "what was learned in the second phase is kept in the third"


def test_trained_masks_guide_every_phase(place, tmp_path, casm_file, monkeypatch):
    seen, before = [], CASM.__call__

    def looked(self, images, targets):
        seen.append(tuple(images.shape[-2:]))
        return before(self, images, targets)

    monkeypatch.setattr(CASM, "__call__", looked)
    words = ["--method", "saliencymix", "--mix_prob", "1", "--saliency", "casm", "--casm", casm_file]
    imagenet_train.main(command(place, tmp_path, *words))
    assert set(seen) == {(16, 16), (24, 24)}, "of the crops of the phases"


def settled(*words: str) -> dict:
    parser = imagenet_train.build_parser()
    typed, _ = legacy_options.translate_legacy(parser.read([str(word) for word in words]))
    return resolve.resolve_options(parser, typed, {})


def test_recipes_are_the_published_ones():
    options = settled()
    wanted = {"epochs": 300, "batch_size": 256, "lr": 0.1, "schedule": [75, 150, 225], "weight_decay": 1e-4}
    wanted |= {"color_jitter": 0.4, "lighting": 0.1, "crop_size": 224, "eval_resize": 256, "min_scale": 0.08}
    wanted |= {"model": "imagenet_resnet50", "no_decay_bn": False, "zero_init": False}
    assert {key: options[key] for key in wanted} == wanted and not options["phases"]
    assert settled("--method", "cutmix")["method_options"]["cutmix"] == {"mix_prob": 1.0}

    options = settled("--recipe", "fast100", "--method", "rmix")
    wanted = {"epochs": 100, "batch_size": 1024, "no_decay_bn": True, "zero_init": True, "color_jitter": 0.0}
    assert {key: options[key] for key in wanted} == wanted
    assert options["method_options"]["rmix"]["patches_per_side"] == (2, 4)
    clean = [resolve.get_phase_options(options, n)["method_options"]["puzzlemix"]["clean_lam"] for n in range(3)]
    assert clean == [1, 1, 0]
    assert settled("--recipe", "none", "--epochs", 3, "--batch_size", 8, "--lr", 0.1)["scheduler"] == "constant"


def test_what_follows_from_an_option_is_not_kept_against_a_new_value():
    """--config hands on every option of an earlier run, those that were filled in too."""
    parser = imagenet_train.build_parser()
    saved = settled("--recipe", "fast100", "--image_size", 96)
    again = resolve.resolve_options(parser, {"image_size": 64, "phases": "2:small:64:0.1:32"}, saved)
    assert (again["crop_size"], again["eval_resize"], again["epochs"], again["batch_size"]) == (64, 73, 2, 32)
    assert resolve.resolve_options(parser, {}, saved) == saved


def test_options_that_nothing_reads_are_named():
    typed = {"data_small": "x", "crop_padding": 4, "min_scale": 0.2, "trad_augment": False}
    notes = unused_options.collect_image_notes(settled("--trad_augment", "false", "--min_scale", 0.2), typed)
    assert notes == ["no effect in this run: --data_small, --crop_padding, --min_scale"]
    assert unused_options.collect_image_notes(settled(), {}) == []


def test_typed_phases_say_how_long_the_run_is():
    options = settled("--phases", "2:small:64:0.1:32,5:large:96:0.2:16")
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
def test_contradictions_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        imagenet_train.main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_wrong_folders_are_named(place, tmp_path):
    flat = pictures(tmp_path / "flat")
    for path in list((flat / "val").rglob("*.jpg")):
        path.rename(flat / "val" / f"{path.parent.name}{path.name}")
    for name in "abc":
        (flat / "val" / name).rmdir()
    with pytest.raises(UserError, match=r"images outside class folders \(9\).*\n.*--val_labels FILE"):
        imagenet_train.main(command(place, tmp_path, "--data_dir", flat))
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{path.name} {path.name[0]}\n" for path in (flat / "val").iterdir()))
    words = ["--data_dir", flat, "--val_labels", labels, "--phases", "1:original:16:0.3:8", "--lr_points", "0:0.1,1:0"]
    imagenet_train.main(command(place, tmp_path, *words, "--log_off"))

    fewer = pictures(tmp_path / "fewer", classes="ab")
    for path in (fewer / "train").rglob("*.jpg"):
        path.rename(path.with_name(f"other{path.name}"))
    with pytest.raises(
        UserError, match=r"--data_small .*: the copies are not of the 12 images .*; a/other0.jpg is missing"
    ):
        imagenet_train.main(command(place, tmp_path, "--data_dir", fewer))
    with pytest.raises(
        UserError, match=r"--data_small .*typo: no train/<class>/\*.jpg in it\nmake the copies with --resize_to"
    ):
        imagenet_train.main(command(place, tmp_path, "--data_small", tmp_path / "typo"))
    with pytest.raises(UserError, match="imagenet has 1000 classes, .* has 2\n.*--num_classes 2"):
        imagenet_train.main(command(place, tmp_path, "--data_dir", fewer, "--dataset", "imagenet"))


def test_images_without_a_copy_are_left_out_or_named(place, tmp_path, capsys):
    """An image that cannot be read has no copy; what stands beside it must not take its label."""
    more = pictures(tmp_path / "more", train=7)
    words = ["--data_dir", more, "--phases", "1:small:16:0.3:8", "--lr_points", "0:0.1,1:0", "--log_off"]
    with pytest.raises(UserError, match=r"--data_small .*: no copy of a/6.jpg and 2 more\n.*--on_bad_image skip"):
        imagenet_train.main(command(place, tmp_path, *words))
    imagenet_train.main(command(place, tmp_path, *words, "--on_bad_image", "skip"))
    assert "left out because they have no copy: 3" in capsys.readouterr().out
    data = load_data("folder", data_dir=str(more), on_bad_image="skip")
    copies = find_copies(data, {"small": str(place.parent / "copies" / "20"), "large": None})
    assert len(copies["small"]) == len(copies["original"]) == 18 and copies["large"] is data.train
    for part in copies.values():
        assert [Path(file).parent.name for file in part.pixels.files] == ["abc"[label] for label in part.labels]


def test_pictures_and_plain_crops_have_the_size_of_the_phase(place, tmp_path, monkeypatch):
    """Block methods divide the crop, not the image; without augmentation the centre is trained on."""
    words = ["--method", "puzzlemix", "--block_num", "2", "--image_size", 27, "--vis_epoch", 1]
    words += ["--trad_augment", "false", "--phases", "1:original:16:0.3:8", "--lr_points", "0:0.1,1:0"]
    seen, read = [], DeviceLoader.epoch

    def looked(self, *args, **kwargs):
        for batch in read(self, *args, **kwargs):
            seen.append((self.shuffle, batch.images.shape[-1], batch.box))
            yield batch

    monkeypatch.setattr(DeviceLoader, "epoch", looked)
    imagenet_train.main(command(place, tmp_path, *words))
    assert {(size, box) for shuffled, size, box in seen if shuffled} == {(16, None)}
    assert list((tmp_path / "folder" / "imagenet_resnet18" / "run" / "vis").glob("*.png"))


def test_batch_norm_does_not_decay_where_it_shall_not():
    model = build_model("imagenet_resnet18", 3, 64)
    others, norms = split_norm_parameters(model)
    assert norms["weight_decay"] == 0 and len(norms["params"]) == 40 and all(one.dim() == 1 for one in norms["params"])
    assert len(others["params"]) + 40 == len(list(model.parameters())) and "weight_decay" not in others


@pytest.mark.data
def test_real_images_train_in_phases_with_workers(real_data, tmp_path):
    words = ["--dataset", "tiny-imagenet", "--data_dir", real_data, "--num_classes", "20", "--limit", "64"]
    words += ["--workers", "2", "--phases", "1:original:32:0.3:32,2:original:48:0.3:16", "--lr_points", "0:0.1,2:0"]
    words += ["--image_size", "48", "--method", "rmix", "--recipe", "fast100", "--model", "resnet18", "--log_off"]
    result = imagenet_train.main([str(word) for word in words])
    assert result["epochs"] == 2
