"""train.py as a user runs it: every method, the run folder, resuming a run exactly, and errors."""

import csv
import datetime
import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeGraphs
from support import hold_lock, same_state, shapes_command, start_script, train_small_network, write_class_folders

import engine.config.select
import engine.training.run_folder
import evaluate
import train
from engine.drawing import figures
from engine.errors import Terminated, UserError
from engine.training import loop
from mixing import MIXERS

pytestmark = pytest.mark.usefixtures("small_network")
METHODS = [*sorted(MIXERS), "cutmix saliencymix manifold", "mixup --cutout --cutout_length 8"]
METHODS += ["puzzlemix sage --saliency bank", "puzzlemix --adv_p 0.5 --clean_lam 1 --saliency gradient"]
METHODS += [
    "rlmix --agent_trajectory_size 3 --agent_batch_size 2 --saliency fine_grained",
    "sage --saliency_size 16 --update_ratio 1",
    "saliencymix sage --clean_weight 0.5 --method_weights 1 2",
    "cutmix --labels saliency --saliency bank",
]
TIMES = {"seconds", "images_per_second", "mixing_seconds", "saliency_seconds", "peak_memory_mb"}


def split_method(text: str) -> tuple[str, list[str]]:
    """Split "method --option value" into the method and the words of its options."""
    method, *options = text.split(" --")
    return method, [word for option in options for word in ("--" + option).split()]


def load_checkpoint(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / name, weights_only=True)


def read_log(run: Path) -> list[dict]:
    """Return the rows of log.csv without the columns that hold times."""
    with open(run / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def same_run(a: Path, b: Path) -> bool:
    """Return whether weights, optimizer, schedule, random states and log rows are equal, bit for bit."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    keys = ("model", "optimizer", "scheduler", "scaler", "ema", "method", "rng", "epoch", "step", "best")
    return all(same_state(one[key], two[key]) for key in keys) and read_log(a) == read_log(b)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(shapes_run, tmp_path, method):
    method, options = split_method(method)
    whole = shapes_run(*options, "--save_every", "1", method=method)
    part = stop_copy(whole, "epoch_001.pt")
    (part / "log.csv").write_text((part / "log.csv").read_text() + "9,9,9\n")
    random.random(), torch.rand(5)
    assert shapes_run(*options, "--checkpoint", "auto", name="part", method=method) == part
    assert same_run(whole, part)
    assert len(read_log(whole)) == 2 and load_checkpoint(whole)["epoch"] == 2


def stop_copy(whole: Path, checkpoint: str) -> Path:
    """Copy a run as if it had stopped when this checkpoint was written, and return the copy."""
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    (part / checkpoint).replace(part / "last.pt")
    return part


@pytest.mark.parametrize(
    "options",
    [
        "--ema 0.9 --clip_grad 1 --warmup_epochs 0.5 --scheduler cosine",
        "--scheduler multistep --schedule 2 --gammas 0.1 --loss bce --recipe puzzle --model resnet20 --amp off",
        "--valid_labels_per_class 2 --labels_per_class 5 --mix_off_epoch 1 --mix_fraction 0.5 --limit 40",
        "--auto_augment rand --rand_augment_std 0.5 --random_erasing 0.5 --crop_padding_mode reflect --workers 2",
        "--auto_augment trivial --min_scale 0.5 --interpolation bicubic --workers 0",
    ],
)
def test_all_training_state_is_resumed_exactly(shapes_run, options):
    whole = shapes_run(*options.split(), "--save_every", "1", method="cutmix", epochs=3)
    part = stop_copy(whole, "epoch_002.pt")
    shapes_run(*options.split(), "--checkpoint", str(part / "last.pt"), name="part", method="cutmix", epochs=3)
    assert same_run(whole, part)


SMALL_TRANSFORMER = "timm:vit_tiny_patch16_224 --model_args img_size=16 patch_size=4 depth=2 embed_dim=24 num_heads=3"
SMALL_TRANSFORMER += " drop_path_rate=0.2"
MODERN = "--warmup_epochs 1 --warmup_lr 1e-5 --min_lr 1e-4 --lr 0.001 --ema_ramp --loss sigmoid_bce --clip_grad 1"


@pytest.mark.parametrize(
    ("method", "optimizer", "model"),
    [
        ("recursivemix", "adamw --bce_target_thresh 0.2 --freeze conv1 bn1 layer1 --ema 0.9", "resnet20"),
        ("cutmix", "timm:lamb --betas 0.8 0.95 --layer_decay 0.7 --label_smoothing 0.1", SMALL_TRANSFORMER),
    ],
)
def test_a_run_with_another_optimizer_stopped_within_an_epoch_resumes_exactly(
    shapes_run, monkeypatch, method, optimizer, model
):
    if "timm" in optimizer:
        pytest.importorskip("timm")
    words = f"--scheduler cosine_step {MODERN} --optimizer {optimizer} --model {model}".split()
    run, update, done = shapes_run(*words, method=method, name="whole"), loop.optimizer_step, []
    (whole,) = run.parents[1].glob("*/whole")  # below the name of the network

    def step_and_stop(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "optimizer_step", step_and_stop)
    with pytest.raises(Terminated):
        shapes_run(*words, method=method, name="part")
    monkeypatch.undo()
    part = whole.with_name("part")
    assert load_checkpoint(part)["step"] == 4
    shapes_run(*words, "--checkpoint", "auto", method=method, name="part")
    assert same_run(whole, part)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_run_resumes_exactly_with_any_number_of_workers(tmp_path, workers):
    write_class_folders(tmp_path / "set")
    command = ["--dataset", "folder", "--data_dir", str(tmp_path / "set"), "--image_size", "32", "--model", "resnet20"]
    command += [
        "--batch_size",
        "4",
        "--method",
        "saliencymix",
        "--trad_augment",
        "--root_dir",
        str(tmp_path),
        "--no_progress",
    ]
    train.main([*command, "--epochs", "2", "--name", "whole", "--workers", "0"])
    train.main([*command, "--epochs", "2", "--name", "part", "--workers", workers, "--save_every", "1"])
    whole, part = (tmp_path / "folder" / "resnet20" / name for name in ("whole", "part"))
    train.main([*command, "--checkpoint", str(part / "epoch_001.pt"), "--workers", workers])
    assert same_run(whole, part)


def run_and_kill(command: list[str], seconds: float, when=lambda: False) -> int:
    """Run train.py, kill it as soon as when() holds or after so many seconds, and return its exit code."""
    process = start_script(partial(train_small_network, command))
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive() and not when():
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode


def test_a_run_killed_during_a_save_resumes_exactly(shapes_run, tmp_path):
    whole = shapes_run(method="saliencymix", epochs=3)
    run = whole.parent / "killed"
    command = shapes_command(tmp_path, "--checkpoint", "auto", name="killed", method="saliencymix", epochs=3)
    assert run_and_kill(command, 60, when=lambda: any(run.glob(".last.pt.part*"))) == -signal.SIGKILL
    first = load_checkpoint(run)["epoch"] if (run / "last.pt").exists() else 0
    run_and_kill(command, 60, when=lambda: any(run.glob(".last.pt.part*")) and (run / "last.pt").exists())
    second = load_checkpoint(run)["epoch"] if (run / "last.pt").exists() else 0
    assert first <= second
    train.main(command)
    assert same_run(whole, run) and not list(run.glob(".*"))


@pytest.mark.parametrize("method", ["sage", "rlmix", "puzzlemix saliencymix --saliency bank"])
def test_drawing_mixed_batches_does_not_change_the_training(shapes_run, monkeypatch, method):
    """Mixing a batch to draw it runs the network in training mode, and the agent of rlmix."""
    method, options = split_method(method)
    plain, drawn = shapes_run(*options, method=method), []
    monkeypatch.setattr(figures, "draw_mixed_batch", lambda path, *args, **kwargs: drawn.append(path))
    shown = shapes_run(*options, "--vis_epoch", "1", name="shown", method=method)
    assert same_run(plain, shown) and len(set(drawn)) == 2


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("rmix", "--method rlmix"),
        ("rmix", "--method rmix sage"),
        ("rmix", "--saliency bank"),
        ("rmix --saliency bank", "--limit 40"),
        ("rlmix", "--num_action 5"),
    ],
)
def test_saved_state_of_another_method_is_refused(shapes_run, first, then):
    run = shapes_run("--scheduler", "constant", *first.split()[1:], method=first.split()[0], epochs=1)
    with pytest.raises(UserError, match="does not fit|would not fit"):
        train.main(["--checkpoint", str(run), "--epochs", "2", "--force_config", *then.split()])


# ---- Run folder ----


def test_the_run_folder_is_complete(shapes_run):
    run = shapes_run("--vis_epoch", "2", "--save_every", "2", "--wandb_key", "secret", method="saliencymix")
    names = {
        "best.pt",
        "config.json",
        "curves.png",
        "epoch_002.pt",
        "last.pt",
        "log.csv",
        "log.txt",
        "previous.pt",
        "result.json",
    }
    assert {path.name for path in run.iterdir()} == names | {"vis"}
    assert [path.name for path in (run / "vis").iterdir()] == ["epoch_002_saliencymix.png"]
    config, result = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    assert (
        config["options"]["method"] == ["saliencymix"]
        and config["options"]["lr"] == 0.1
        and config["versions"]["torch"]
    )
    values = {"mixup_alpha": 1.0, "mix_prob": 0.5, "saliency_scope": "sample", "in_batch": False}
    assert config["hyper_parameters"] == {"saliencymix": values}
    line = "saliencymix: mixup_alpha 1, mix_prob 0.5, saliency_scope sample, in_batch false\n"
    assert line in (run / "log.txt").read_text()
    assert "secret" not in (run / "config.json").read_text() and "wandb_key" not in load_checkpoint(run)["config"]
    assert result["epochs"] == 2 and result["last_top1"] == float(f"{load_checkpoint(run)['history'][-1]['test_top1']}")
    saved = load_checkpoint(run)
    assert (
        saved["format"] == 2
        and saved["num_classes"] == 10
        and saved["classes"][0] == "disc"
        and saved["image_size"] == 16
    )
    assert saved["best"]["split"] == "test" and saved["best"]["value"] == max(r["test_top1"] for r in saved["history"])


def test_vis_epoch_does_not_change_the_run(shapes_run):
    assert same_run(shapes_run(method="cutmix"), shapes_run("--vis_epoch", "1", name="drawn", method="cutmix"))


def test_mixed_batches_are_drawn_augmented(shapes_run, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw_mixed_batch", lambda path, images, **kwargs: drawn.append(images))
    for words in ("--trad_augment false", "--min_scale 0.3", "--trad_augment false --random_erasing 1"):
        shapes_run("--vis_epoch", "1", *words.split(), name=f"run{len(drawn)}", epochs=1)
    plain, cropped, erased = drawn
    assert not (plain == cropped).flatten(1).all(1).any() and 0.5 < (plain == erased).float().mean() < 0.99


def test_log_off_writes_nothing(shapes_run, tmp_path):
    shapes_run("--log_off", "--vis_epoch", "1")
    assert not list(tmp_path.iterdir())


def test_config_repeats_a_run(shapes_run, tmp_path):
    run = shapes_run("--lr", "0.03", method="mixup")
    train.main(["--config", str(run / "config.json"), "--name", "again"])
    assert same_state(load_checkpoint(run)["model"], load_checkpoint(run.parent / "again")["model"])
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(UserError, match="not the config.json"):
        train.main(["--config", str(tmp_path / "c.json")])


def test_a_run_is_not_overwritten_by_accident(shapes_run):
    run = shapes_run(epochs=1)
    with pytest.raises(UserError, match=r"already holds a run\n.*--checkpoint auto --name run.*--overwrite"):
        shapes_run(epochs=1)
    before = load_checkpoint(run)
    (run / "vis").mkdir()
    old = [run / name for name in ("epoch_007.pt", "curves.pdf", "vis/epoch_007_none.png")]
    for file in old:
        file.write_bytes(b"of the earlier run")
    shapes_run("--overwrite", "--seed", "5", epochs=1)
    assert not same_state(load_checkpoint(run)["model"], before["model"])
    assert [file for file in old if file.exists()] == []


def test_auto_without_a_name_takes_the_newest_run_of_the_method(tmp_path):
    command = [word for word in shapes_command(tmp_path, method="mixup", epochs=1) if word not in ("--name", "run")]
    train.main([*command, "--checkpoint", "auto"])
    train.main([*command, "--checkpoint", "auto"])
    runs = list((tmp_path / "shapes" / "resnet20").iterdir())
    assert len(runs) == 1 and runs[0].name.startswith("mixup_")


# ---- Resume ----


def test_changed_options_are_refused_and_listed(shapes_run):
    run = shapes_run(method="cutmix")
    with pytest.raises(
        UserError,
        match=r"\n  --batch_size +20  ->  10\n  --lr +0.1  ->  0.5\n.*--batch_size --lr cannot change even with",
    ):
        train.main(["--checkpoint", str(run), "--lr", "0.5", "--batch_size", "10"])
    for force in ([], ["--force_config"]):
        with pytest.raises(UserError, match="--epochs: the one-cycle schedule"):
            train.main(["--checkpoint", str(run), "--epochs", "5", *force])
    with pytest.raises(UserError, match="--recipe  shapes  ->  rmix"):
        train.main(["--checkpoint", str(run), "--recipe", "rmix"])
    with pytest.raises(UserError, match="--model: the saved state would not fit"):
        train.main(["--checkpoint", str(run), "--model", "resnet32", "--force_config"])


def test_options_newer_than_the_run_are_refused_too(shapes_run):
    run = shapes_run(epochs=1)
    saved = load_checkpoint(run)
    del saved["config"]["auto_augment"], saved["config"]["min_scale"]
    torch.save(saved, run / "last.pt")
    with pytest.raises(UserError, match=r"--auto_augment  none  ->  rand\n  --min_scale     None  ->  0.5"):
        train.main(["--checkpoint", str(run), "--auto_augment", "rand", "--min_scale", "0.5"])
    train.main(["--checkpoint", str(run), "--auto_augment", "none"])


def test_forced_options_are_checked_together(shapes_run, capsys):
    run = shapes_run("--scheduler", "constant", method="manifold", epochs=1)
    with pytest.raises(SystemExit):
        train.main(["--checkpoint", str(run), "--compile", "--force_config"])
    assert "compiled networks ignore hooks" in capsys.readouterr().err


def test_forced_options_are_used(shapes_run):
    run = shapes_run("--scheduler", "multistep", "--schedule", "1", "--gammas", "0.5", epochs=1)
    forced = ["--lr", "0.02", "--weight_decay", "0.003", "--method", "mixup", "--epochs", "2", "--force_config"]
    train.main(["--checkpoint", str(run), "--no_progress", *forced])
    saved = load_checkpoint(run)
    group = saved["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], saved["config"]["method"]) == (0.01, 0.003, ["mixup"])
    assert saved["history"][1]["lr"] == 0.01 and saved["images"] == 48


def test_a_forced_number_of_steps_keeps_the_learning_rate_of_the_epoch(shapes_run, capsys):
    """Schedules count steps: at another batch size they would be read at another epoch."""
    run = shapes_run("--scheduler", "cosine", epochs=2)
    rate = load_checkpoint(run)["history"][1]["lr"]
    for size in ("10", "48"):  # 5 steps per epoch and 1 step, before 3
        train.main(["--checkpoint", str(run / "previous.pt"), "--batch_size", size, "--force_config", "--log_off"])
        output = capsys.readouterr().out
        assert "note: the number of steps per epoch changes; the learning rate continues" in output
        assert f"epoch 2/2  lr {rate:.4g}" in output


def test_a_one_cycle_schedule_for_other_steps_is_refused_at_the_start(shapes_run):
    run = shapes_run(epochs=2)
    with pytest.raises(UserError, match=r"fixed for 6 steps, but this data and number of processes give 8\n"):
        train.main(["--checkpoint", str(run / "previous.pt"), "--limit", "80", "--force_config", "--log_off"])


def test_epochs_may_be_added_with_schedules_other_than_onecycle(shapes_run):
    run = shapes_run("--scheduler", "constant", epochs=1)
    train.main(["--checkpoint", str(run), "--epochs", "2", "--no_progress"])
    assert load_checkpoint(run)["epoch"] == 2 and len(read_log(run)) == 2


def test_resuming_a_finished_run_evaluates_it_again(shapes_run, capsys):
    run = shapes_run(epochs=1)
    before = load_checkpoint(run)
    capsys.readouterr()
    result = train.main(["--checkpoint", str(run), "--no_progress"])
    assert "already finished; evaluated again: test loss" in capsys.readouterr().out and same_state(
        load_checkpoint(run), before
    )
    assert result["last_top1"] == before["history"][-1]["test_top1"]


def test_a_damaged_checkpoint_is_an_error_and_not_a_fresh_start(shapes_run):
    run = shapes_run()
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:5000])
    log = (run / "log.csv").read_text()
    with pytest.raises(UserError, match=r"last.pt \(5000 bytes\) is damaged.*\n.*--checkpoint .*previous.pt"):
        shapes_run("--checkpoint", "auto")
    assert (run / "log.csv").read_text() == log
    shapes_run("--checkpoint", str(run / "previous.pt"))
    assert load_checkpoint(run)["epoch"] == 2


def test_a_copied_checkpoint_resumes_in_the_folder_of_its_dataset(shapes_run, tmp_path):
    run = shapes_run("--scheduler", "constant", method="cutmix", epochs=1)
    (tmp_path / "copy.pt").write_bytes((run / "last.pt").read_bytes())
    root = tmp_path / "new"
    words = ["--checkpoint", str(tmp_path / "copy.pt"), "--epochs", "2", "--no_progress", "--root_dir", str(root)]
    train.main(words)
    [made] = (root / "shapes" / "resnet20").iterdir()
    assert made.name.startswith("cutmix_") and load_checkpoint(made)["epoch"] == 2
    with pytest.raises(UserError, match="already holds a run"):
        train.main([*words, "--name", made.name])


def test_runs_of_the_same_second_get_different_folders(tmp_path, monkeypatch):
    """Also if the first has written nothing yet: two runs started by one script shared a folder."""

    class Clock:
        @staticmethod
        def now():
            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(engine.training.run_folder, "datetime", Clock)
    folder = tmp_path / "shapes" / "resnet20"
    command = [word for word in shapes_command(tmp_path, epochs=1) if word not in ("--name", "run")]
    with hold_lock(folder / "none_20260102-030405" / ".lock"):
        train.main(command)
        train.main(command)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"none_20260102-030405{end}" for end in ("", "-2", "-3")]
    assert not list(folder.glob("*-[23]/.*")) and len(list(folder.glob("*/last.pt"))) == 2


def test_a_run_that_is_in_use_is_not_resumed_replaced_or_started_again(shapes_run, tmp_path):
    """A doubled --checkpoint auto, and the same --name twice."""
    run = shapes_run("--scheduler", "constant", epochs=1)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused = r"run is in use: process 1 on there writes to it\n.*delete .*run/.lock$"
    for words in (["--checkpoint", "auto"], ["--checkpoint", str(run / "best.pt")], ["--overwrite"], []):
        with hold_lock(run / ".lock"), pytest.raises(UserError, match=refused):
            shapes_run(*words, "--scheduler", "constant", epochs=2)
    with hold_lock(run.parent / "young" / ".lock"), pytest.raises(UserError, match="young is in use"):
        shapes_run(name="young")  # before its first checkpoint
    kept = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    assert kept == before
    shapes_run("--checkpoint", "auto", "--scheduler", "constant", epochs=2)  # with the file that a killed run leaves
    assert load_checkpoint(run)["epoch"] == 2 and not (run / ".lock").exists()


def test_auto_without_a_run_says_where_it_looked(shapes_run, tmp_path, capsys):
    shapes_run(name="mixed_1", epochs=1)
    capsys.readouterr()
    shapes_run("--checkpoint", "auto", name="mixde_1", epochs=1)
    out, parent = capsys.readouterr().out, tmp_path / "shapes" / "resnet20"
    assert f"note: --checkpoint auto: A NEW RUN STARTS, for there is none to resume at {parent / 'mixde_1'}; " in out
    assert f"runs in {parent}: mixed_1; did you mean mixed_1?\n" in out
    with pytest.raises(UserError, match=r"no run to evaluate at .*; a run of this name is in .*mixed_1\n"):
        train.main(f"--evaluate --dataset cifar10 --root_dir {tmp_path} --checkpoint auto --name mixed_1".split())


def test_leftovers_of_another_run_do_not_stay_beside_a_new_one(shapes_run, tmp_path):
    run = tmp_path / "shapes" / "resnet20" / "run"
    run.mkdir(parents=True)
    for name in ("best.pt", "result.json", ".last.pt.part-1-0123abcd", "notes.md"):
        (run / name).write_text("of a run that was killed in its first save")
    (run / "log.csv").write_text("epoch,loss\n")
    shapes_run("--scheduler", "constant", epochs=1)
    assert load_checkpoint(run)["epoch"] == 1 and (run / "notes.md").exists()
    assert torch.load(run / "best.pt")["epoch"] == 1 and not list(run.glob(".*"))
    (run / "last.pt").unlink()
    with pytest.raises(UserError, match=r"last.pt is missing\nresume it with --checkpoint .*best.pt, or replace"):
        shapes_run(epochs=1)
    shapes_run("--checkpoint", str(run / "best.pt"), "--scheduler", "constant", epochs=2)
    assert load_checkpoint(run)["epoch"] == 2
    log = (run / "log.csv").read_bytes()
    for file in run.glob("*.pt"):
        file.unlink()
    with pytest.raises(UserError, match=r"last.pt is missing\nchoose another --name, or replace"):
        shapes_run(epochs=1)
    assert (run / "log.csv").read_bytes() == log, "the log of a finished run outlives its checkpoints"


def test_several_methods_report_their_saliency_time(shapes_run):
    run = shapes_run("--mix_prob", "1", method="saliencymix saliencymix", epochs=1)
    assert load_checkpoint(run)["history"][0]["saliency_seconds"] > 0


def test_evaluating_a_foreign_file_needs_a_dataset(tmp_path, capsys):
    from models import build_model

    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(SystemExit):
        train.main(["--evaluate", "--checkpoint", str(tmp_path / "foreign.pt")])
    assert "--dataset" in capsys.readouterr().err


def test_a_run_without_last_pt_is_not_restarted(shapes_run):
    run = shapes_run("--save_every", "1")
    (run / "last.pt").unlink()
    kept = {path.name for path in run.iterdir()}
    with pytest.raises(UserError, match=r"last.pt is missing\nresume .*--checkpoint .*previous.pt.*--overwrite"):
        shapes_run("--save_every", "1", "--checkpoint", "auto")
    assert {path.name for path in run.iterdir()} == kept


def test_init_from_loads_the_weights(shapes_run, few_shapes, capsys):
    run = shapes_run(epochs=1)
    start = ["--init_from", str(run / "best.pt"), "--lr", "1e-30", "--weight_decay", "0", "--scheduler", "constant"]
    tuned = shapes_run(*start, "--num_classes", "4", name="tuned", epochs=1)
    assert "last layer is newly initialised" in capsys.readouterr().out
    assert torch.equal(load_checkpoint(tuned)["model"]["conv1.weight"], load_checkpoint(run)["model"]["conv1.weight"])
    assert train.main(["--checkpoint", str(tuned), "--no_progress"])["epochs"] == 1, (
        "a resumed run does not read --init_from again"
    )
    assert load_checkpoint(tuned)["model"]["linear.weight"].shape == (4, 64)


# ---- Errors during a run ----


def test_ctrl_c_keeps_the_last_checkpoint(shapes_run, tmp_path):
    run = tmp_path / "shapes" / "resnet20" / "run"
    command = shapes_command(tmp_path, epochs=500)
    process = start_script(partial(train_small_network, command), tmp_path / "errors")
    while not (run / "last.pt").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert (
        process.exitcode == 130
        and "Traceback" not in errors
        and f"resume with --checkpoint {run / 'last.pt'}" in errors
    )
    assert (
        load_checkpoint(run)["epoch"] == len(read_log(run)) or load_checkpoint(run)["epoch"] == len(read_log(run)) + 1
    )


def test_a_nonfinite_loss_stops_the_run_and_saves_the_batch(shapes_run, tmp_path):
    with pytest.raises(UserError, match=r"NaN or infinite at step \d+ .*lr .*\n.*--clip_grad"):
        shapes_run("--lr", "1e18", "--scheduler", "constant", "--amp", "off", epochs=3)
    evidence = torch.load(tmp_path / "shapes" / "resnet20" / "run" / "nonfinite.pt", weights_only=True)
    assert evidence["index"].numel() > 0 and "conv1.weight" in evidence["model"]


def test_a_full_disk_is_reported_and_keeps_the_old_checkpoint(shapes_run, monkeypatch):
    run = shapes_run("--scheduler", "constant", epochs=1)
    before = (run / "last.pt").read_bytes()
    real = torch.save

    def full(content, file, **kwargs):
        real({"half": 1}, file)
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left.*\nthe old file is intact"):
        train.main(["--checkpoint", str(run), "--epochs", "2", "--no_progress"])
    assert (run / "last.pt").read_bytes() == before and not list(run.glob(".*"))


def test_drop_last_refuses_a_batch_larger_than_the_dataset(shapes_run):
    with pytest.raises(UserError, match="--batch_size 100: larger than the 48 training images"):
        shapes_run("--batch_size", "100", "--drop_last")


@pytest.mark.parametrize(("flag", "package"), [("--use_wandb", "wandb"), ("--use_tensorboard", "tensorboard")])
def test_missing_optional_packages_are_named(shapes_run, monkeypatch, flag, package):
    for name in (package, "torch.utils.tensorboard") if package == "tensorboard" else (package,):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        shapes_run(flag)


def test_notes_list_options_without_effect(shapes_run, capsys):
    shapes_run("--mixup_alpha", "0.3", "--saliency_scope", "batch", method="mixup", epochs=1)
    assert "note: no effect with --method mixup: --saliency_scope\n" in capsys.readouterr().out
    shapes_run("--scheduler", "multistep", "--schedule", "50", name="b", epochs=1)
    assert "the learning rate never drops" in capsys.readouterr().out


def test_list_models(capsys):
    train.main(["--list_models"])
    assert "resnext29_4_24" in capsys.readouterr().out


def test_profile_prints_the_time_of_each_part(tmp_path, capsys):
    train.main([*shapes_command(tmp_path, method="saliencymix"), "--profile", "3"])
    out = capsys.readouterr().out
    assert all(part in out for part in ("data", "saliency", "mixing", "network")) and not list(tmp_path.iterdir())


# ---- Agreement of the results ----


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_evaluation_agrees_with_the_log(shapes_run, capsys, amp):
    run = shapes_run("--ema", "0.8", "--amp", amp, epochs=1)
    row = load_checkpoint(run)["history"][-1]
    once = train.main(["--evaluate", "--checkpoint", str(run), "--limit", "48"])
    [result] = evaluate.main(["--model_path", str(run / "last.pt")])
    assert once["top1"] == result["top1"] == row["test_top1"] and result["loss"] == pytest.approx(
        row["test_loss"], rel=1e-6
    )
    [averaged] = evaluate.main(["--model_path", str(run), "--ema"])
    assert averaged["top1"] == row["ema_top1"]


def test_a_resumed_run_rewrites_the_whole_log(shapes_run, monkeypatch):
    """A kill between writing the checkpoint and writing the log loses no row."""
    whole = shapes_run(epochs=2)
    part = shapes_run("--save_every", "1", name="part", epochs=2)
    (part / "log.csv").unlink()
    train.main(["--checkpoint", str(part / "epoch_001.pt"), "--no_progress"])
    assert read_log(part) == read_log(whole)
    assert engine.config.select.select_kwargs({"a": 1, "b": 2}, ["a", "c"]) == {"a": 1}


def test_a_run_with_captured_graphs_resumes_exactly_as_an_eager_one(shapes_run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fake = FakeGraphs(patch)
        whole = shapes_run("--batch_size", "8", "--graph_step", "--save_every", "1", method="saliencymix")
    assert fake.captures == 2, "the network's step and the maps"
    assert "CUDA graph" not in capsys.readouterr().out
    part = stop_copy(whole, "epoch_001.pt")
    train.main(["--checkpoint", str(part), "--no_progress"])
    assert "note: --graph_step has no effect: a CUDA graph needs a CUDA device" in capsys.readouterr().out
    assert same_run(whole, part)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(shapes_run):
    whole = shapes_run("--compile", method="rmix", epochs=2)
    part = shapes_run("--compile", "--save_every", "1", name="part", method="rmix", epochs=2)
    shapes_run("--checkpoint", str(part / "epoch_001.pt"), name="part", method="rmix", epochs=2)
    assert same_run(whole, part)
    assert "conv1.weight" in load_checkpoint(whole)["model"]


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*METHODS, "cutmix --amp fp16 --ema 0.9", "saliencymix --saliency_legacy_float"])
def test_a_deterministic_cuda_run_resumes_exactly(shapes_run, method):
    method, options = split_method(method)
    options += ["--device", "cuda", "--deterministic"]
    whole = shapes_run(*options, method=method, epochs=2)
    part = shapes_run(*options, "--save_every", "1", name="part", method=method, epochs=2)
    shapes_run("--checkpoint", str(part / "epoch_001.pt"), "--device", "cuda", name="part", method=method, epochs=2)
    assert same_run(whole, part)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_and_cpu_evaluations_agree(shapes_run, amp):
    run = shapes_run("--device", "cuda", "--amp", amp, "--limit", "500", method="saliencymix", epochs=3)
    results = [evaluate.main(["--model_path", str(run), "--device", device])[0] for device in ("cuda", "cpu")]
    assert results[0]["top1"] == pytest.approx(results[1]["top1"], abs=0.21)  # one image of 500
