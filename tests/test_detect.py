"""End-to-end tests of detect.py on a few drawn scenes."""

import csv
import datetime
import functools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support import hold_lock, run_in_two_processes, use_small_detector

import detect
from detection.evaluate import locate_evaluations
from detection.metrics import Detections, GroundTruth, voc_metrics
from detection.options import build_parser
from detection.recipes import RECIPES
from detection.resolve import resolve_options, scale_schedule
from detection.run import build_scheduler
from engine.errors import Terminated, UserError
from engine.runtime.claim import release_claims
from engine.training import run_folder
from models import build_model

pytestmark = pytest.mark.usefixtures("small_detector", "small_network")
TINY = "--dataset shapes --limit 6 --batch_size 2 --min_size 64 --max_size 128 --rois 8 --proposals 20 10 --amp off"
LOSSES = ["loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "imagenet_resnet18.pt"
    torch.save(build_model("imagenet_resnet18", 10, 64).state_dict(), path)
    return str(path)


@pytest.fixture
def run(tmp_path, backbone):
    """A function that calls detect.py with a few small images and returns the run folder and the result."""

    def call(*words: str, name: str = "run", start: bool = True) -> tuple:
        initial = ["--backbone_checkpoint", backbone] if start else []
        output = ["--root_dir", str(tmp_path), "--name", name, "--device", "cpu", "--workers", "0"]
        result = detect.main([*initial, *TINY.split(), *output, *words])
        return tmp_path / "shapes" / "frcnn" / name, result

    return call


@pytest.fixture(scope="module")
def detector(tmp_path_factory, backbone) -> str:
    """The checkpoint of a detector that was trained for two steps."""
    root = tmp_path_factory.mktemp("detector")
    words = ["--iters", "2", "--root_dir", str(root), "--name", "one", "--device", "cpu"]
    detect.main(["--backbone_checkpoint", backbone, *TINY.split(), *words])
    return str(root / "shapes" / "frcnn" / "one" / "last.pt")


def load_weights(folder) -> dict[str, torch.Tensor]:
    """Load weights, momentum and weight average of a run."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    momentum = {f"momentum {key}": one["momentum_buffer"] for key, one in saved["optimizer"]["state"].items()}
    return {**saved["model"], **momentum, **{f"ema {key}": value for key, value in (saved["ema"] or {}).items()}}


def read_log(folder) -> list[dict]:
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def assert_same_runs(one, other) -> None:
    """Assert that two run folders have the same weights and log, bit for bit."""
    first, second = load_weights(one), load_weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for row, same in zip(read_log(one), read_log(other), strict=True):
        for key in (*LOSSES, "iteration", "lr", "map07"):
            assert row[key] == same[key], key


def test_run_writes_log_plots_results_and_checkpoint(run, tmp_path, capsys):
    folder, result = run("--iters", "3", "--vis", "2", "--predictions", str(tmp_path / "all.json"), "--ema", "0.5")
    files = {path.name for path in folder.iterdir()}
    assert {"last.pt", "best.pt", "log.csv", "log.txt", "config.json", "curves.png", "results.json"} <= files
    assert {"precision_recall.png", "vis"} <= files and (folder / "vis" / "page_01.png").is_file()
    (row,) = read_log(folder)
    assert row["epoch"] == "1" and row["iteration"] == "3" and row["ema_map07"]
    terms = [float(row[key]) for key in LOSSES]
    assert all(np.isfinite(terms)) and terms[0] == pytest.approx(sum(terms[1:]), rel=1e-4)
    out = capsys.readouterr().out
    names = ("VOC07 mAP@0.5 (11-point)", "VOC mAP@0.5 (area)", "VOC AP@[.5:.95]", "COCO AP")
    order = [out.index(name, out.index(names[0])) for name in names]
    assert order == sorted(order)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(result))
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert saved["kind"] == "detector" and saved["step"] == 3 and saved["config"]["model"] == "resnet18"
    assert saved["backbone"]["model"] == "imagenet_resnet18" and saved["mean"] == [0.485, 0.456, 0.406]
    assert len(json.loads((tmp_path / "all.json").read_text())) == sum(
        one["detections"] for one in result["classes"].values()
    )


def test_run_resumed_within_an_epoch_equals_the_uninterrupted_run(run):
    same = ("--schedule", "4", "--warmup_iters", "2", "--norm", "bn", "--augment", "ssd", "--eval_every", "0")
    full, _ = run("--iters", "5", *same, name="full")
    stopped, _ = run("--iters", "4", *same, name="stopped")  # inside the second epoch, which has three steps
    resumed = detect.main(["--checkpoint", str(stopped / "last.pt"), "--iters", "5"])
    assert resumed["iterations"] == 5
    assert_same_runs(full, stopped)


def test_run_resumed_after_sigterm_and_kill_equals_the_uninterrupted_run(run, monkeypatch):
    import detection.loop
    import detection.run

    full, _ = run("--iters", "3", "--ema", "0.9", name="full")
    original, done = detection.loop.optimizer_step, []

    def stop_after_update(*args, **kwargs):
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(detection.loop, "optimizer_step", stop_after_update)
    with pytest.raises(Terminated, match="2 steps into the epoch; resume with --checkpoint .*last.pt"):
        run("--iters", "3", "--ema", "0.9", "--save_iters", "2", name="stopped")
    monkeypatch.undo()
    folder = full.parent / "stopped"
    assert torch.load(folder / "previous.pt", weights_only=True)["step"] == 2, "--save_iters saved it too"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(detection.run, "evaluate", killed)
    again = ("--iters", "3", "--checkpoint", "auto")
    with pytest.raises(KeyboardInterrupt):
        run(*again, name="stopped", start=False)
    monkeypatch.undo()
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3, "the run is saved before the evaluation"
    run(*again, name="stopped", start=False)
    assert_same_runs(full, folder)


def test_best_epoch_is_chosen_by_voc07_map(run, monkeypatch):
    import detection.run

    original, figures = detection.run.evaluate, iter([(0.3, 0.4), (0.2, 0.9)])

    def with_given_metrics(*args, **kwargs):
        evaluated = original(*args, **kwargs)
        evaluated.voc["map07"], evaluated.voc["map"] = next(figures)
        return evaluated

    monkeypatch.setattr(detection.run, "evaluate", with_given_metrics)
    _, result = run("--iters", "4", "--eval_every", "1", "--log_off")
    assert result["best"] == {"value": 30.0, "epoch": 1, "split": "test"}
    assert result["figures"]["VOC07 mAP@0.5 (11-point)"] == 20.0, "the figures are those of the last epoch"


def test_evaluate_equals_the_last_row_of_the_log(run, backbone, tmp_path):
    folder, trained = run("--iters", "3", "--ema", "0.5", "--lr", "0.02")
    saved, name = torch.load(folder / "last.pt", weights_only=True), "layer4.1.conv2.weight"
    average, initial = saved["ema"][f"backbone.body.{name}"], torch.load(backbone)[name]
    assert not torch.equal(average, initial) and not torch.equal(average, saved["model"][f"backbone.body.{name}"])
    words = ["--frcnn_checkpoint", str(folder / "last.pt"), "--evaluate", "--limit", "6", "--device", "cpu"]
    words += ["--dataset", "shapes", "--root_dir", str(tmp_path), "--predictions", str(tmp_path / "all.json")]
    evaluated = detect.main(words)
    assert evaluated["settings"] == trained["settings"]
    assert evaluated["figures"] == trained["figures"] and evaluated["classes"] == trained["classes"]
    assert evaluated["detector"] == str(folder / "last.pt")
    averaged = detect.main([*words, "--averaged", "--log_off"])
    assert averaged["figures"]["VOC07 mAP@0.5 (11-point)"] == pytest.approx(
        float(read_log(folder)[-1]["ema_map07"]), rel=1e-4
    )


def test_saved_detections_give_the_same_metrics(run, tmp_path):
    from detection.load import load_image_sets

    _, result = run("--iters", "2", "--predictions", str(tmp_path / "all.json"), "--score_thr", "0", "--log_off")
    _, test = load_image_sets(dataset="shapes", limit=6)
    results = {name: [] for name in test.names}
    for one in json.loads((tmp_path / "all.json").read_text()):
        x, y, width, height = one["bbox"]
        results[one["image_id"]].append(((x, y, x + width, y + height), one["category_id"], one["score"]))
        assert test.classes[one["category_id"] - 1] == one["category"]
    lists = [
        Detections(*(np.array(column) for column in zip(*some, strict=True)))
        if some
        else Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        for some in results.values()
    ]
    truths = [GroundTruth(*(target[key].numpy() for key in GroundTruth._fields)) for target in test.targets]
    again = voc_metrics(lists, truths, test.classes)
    assert 100 * again["map"] == pytest.approx(result["figures"]["VOC mAP@0.5 (area)"], abs=1e-9)
    assert sum(len(some) for some in results.values()) > 0


def test_detector_runs_and_evaluations_take_a_folder_of_their_own(run, tmp_path, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return datetime.datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_folder, "datetime", Clock)
    options = {"root_dir": tmp_path, "dataset": "voc", "recipe": "paper", "name": None, "overwrite": False}
    parent = tmp_path / "voc" / "frcnn"
    with hold_lock(parent / "evaluate_20260102-030405" / ".lock"):
        folder = run_folder.claim_new_folder(options, locate_evaluations, run_folder.RunFolder)
    assert folder == parent / "evaluate_20260102-030405-2"
    release_claims()
    with hold_lock(tmp_path / "shapes" / "frcnn" / "two" / ".lock"), pytest.raises(UserError, match="two is in use"):
        run("--iters", "1", name="two")


def test_finished_run_is_evaluated_again(run, capsys):
    folder, first = run("--iters", "1")
    before = load_weights(folder)
    again = detect.main(["--checkpoint", str(folder)])
    assert "this run is already finished; evaluated again" in capsys.readouterr().out
    assert again["figures"] == first["figures"] and len(read_log(folder)) == 1
    assert all(torch.equal(value, before[key]) for key, value in load_weights(folder).items())


def test_training_can_start_from_another_detector(run, detector, tmp_path, capsys):
    content = torch.load(detector, weights_only=True)["model"]
    bare = {key: value for key, value in content.items() if "box_predictor" not in key}
    bare |= {"roi_heads.box_predictor.cls_score.weight": torch.zeros(4, 1024)}
    bare |= {"roi_heads.box_predictor.cls_score.bias": torch.zeros(4)}
    bare |= {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(16, 1024)}
    bare |= {"roi_heads.box_predictor.bbox_pred.bias": torch.zeros(16)}
    torch.save(bare, tmp_path / "bare.pt")
    words = ("--frcnn_checkpoint", str(tmp_path / "bare.pt"), "--iters", "1")
    run(*words, "--lr", "1e-30", "--log_off", start=False)
    assert "has 3 classes without names: the predictor of the 10 classes" in capsys.readouterr().out
    with pytest.raises(UserError, match="bare.pt: a detector for 3 classes, but the data has 10"):
        run(*words, "--evaluate", start=False)


def test_pretrained_loads_torchvision_weights(run, monkeypatch, capsys):
    import detection.initialize

    monkeypatch.setattr(
        detection.initialize, "download_weights", lambda url: build_model("imagenet_resnet18", 1000, 224).state_dict()
    )
    run("--pretrained", "--model", "resnet18", "--iters", "1", "--log_off", start=False)
    printed = capsys.readouterr().out
    assert "imagenet_resnet18 from https://download.pytorch.org/models/resnet18-f37072fd.pth" in printed
    assert ": 1 step (" in printed and " 1 steps" not in printed

    def offline(url):
        raise ValueError("cannot download")

    monkeypatch.setattr(detection.initialize, "download_weights", offline)
    with pytest.raises(
        UserError, match="--pretrained: cannot download, or name a classifier with --backbone_checkpoint"
    ):
        run("--pretrained", start=False)
    with pytest.raises(UserError, match="--model wrn28_10: no pretrained weights\n--pretrained has .* resnet18"):
        run("--pretrained", "--model", "wrn28_10", start=False)


def test_micro_batches_make_one_step(run, capsys):
    run("--iters", "3", "--accumulate", "2", "--log_off")
    assert "3 steps (1.0 epochs of 3 steps)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--batch_size 2: the total .* divisible by 1 process x --accumulate 4 = 4"):
        run("--iters", "3", "--accumulate", "4")


def test_nonfinite_loss_error_names_and_saves_the_images(run, tmp_path):
    with pytest.raises(UserError) as caught:
        run("--iters", "6", "--lr", "1e30", "--warmup_iters", "0", "--clip_grad", "0")
    text = str(caught.value)
    assert (
        "became NaN or infinite at step 2, current lr 1e+30" in text
        and "scenes/2-0000" in text
        and "loss_classifier" in text
    )
    folder = tmp_path / "shapes" / "frcnn" / "run"
    kept = torch.load(folder / "nonfinite.pt", weights_only=True)
    (batch,) = kept["batches"]
    assert len(batch["images"]) == len(batch["names"]) == 2 and batch["targets"][0]["boxes"].shape[1] == 4
    assert (folder / "nonfinite.png").stat().st_size > 10_000


def test_resume_with_fewer_steps_than_made_raises(detector):
    with pytest.raises(UserError, match="--iters 1: the run has already made 2 steps\ngive a larger number"):
        detect.main(["--checkpoint", detector, "--iters", "1"])
    assert torch.load(detector, weights_only=True)["step"] == 2


def test_difficult_objects_are_trained_on_only_with_use_difficult(run, monkeypatch, capsys):
    import detection.load

    original = detection.load.load_image_sets

    @functools.wraps(original)  # its parameters select the options that are passed
    def with_difficult(**options):
        train, test = original(**options)
        for target in train.targets:
            target["difficult"][:1] = True
        return train, test

    monkeypatch.setattr(detection.load, "load_image_sets", with_difficult)
    for use_difficult, counts in (("true", "10 objects (6 difficult)"), ("false", "4 objects (0 difficult)")):
        run("--iters", "1", "--log_off", "--use_difficult", use_difficult)
        assert f"6 training images, {counts}" in capsys.readouterr().out


def test_forced_options_apply_to_a_resumed_run(run, monkeypatch, capsys):
    import detection.load

    folder, _ = run("--iters", "1")
    words = ("--checkpoint", str(folder), "--iters", "2")
    detect.main([*words, "--momentum", "0.5", "--force_config", "--score_thr", "0.2"])
    assert torch.load(folder / "last.pt", weights_only=True)["optimizer"]["param_groups"][0]["momentum"] == 0.5
    assert "--score_thr changed: the best epoch is chosen among the epochs from here on" in capsys.readouterr().out
    original = detection.load.load_image_sets
    fewer = functools.wraps(original)(lambda **options: [part.take(range(5)) for part in original(**options)])
    monkeypatch.setattr(detection.load, "load_image_sets", fewer)
    with pytest.raises(UserError, match="was trained on 6 images of 10 classes, but .* 5 images of 10\npass its data"):
        detect.main(["--checkpoint", str(folder), "--iters", "3"])


def test_config_of_another_script_is_rejected(run, detector, shapes_run):
    import train

    config = shapes_run("--limit", "64", epochs=1) / "config.json"
    with pytest.raises(UserError, match="this is the config.json of a classifier run; expected one of a detector run"):
        run("--config", str(config))
    mine = detector.replace("last.pt", "config.json")
    with pytest.raises(UserError, match="this is the config.json of a detector run; expected one of a classifier run"):
        train.main(["--config", mine])
    _, result = run("--config", mine, "--frcnn_checkpoint", detector, "--log_off", start=False)
    assert result["iterations"] == 2, "the typed initial weights replace the backbone of the file"


def test_unwritable_predictions_path_is_a_usage_error(run, tmp_path, capsys):
    for path, message in (
        (tmp_path, "this is a folder; give the name of a file"),
        (tmp_path / "no" / "a.json", "does not exist"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run("--iters", "1", "--predictions", str(path))
        assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_options_without_effect_are_reported(run, detector, capsys):
    run("--iters", "1", "--epochs", "9", "--log_off", "--vis", "3", "--test_set", "2007_val")
    out = capsys.readouterr().out
    assert "no effect in this run: --epochs, --name, --test_set, --vis, --workers" in out
    detect.main(["--checkpoint", detector, "--backbone_checkpoint", "another.pt"])
    assert "no effect in this run: --backbone_checkpoint" in capsys.readouterr().out
    assert torch.load(detector, weights_only=True)["config"]["backbone_checkpoint"] != "another.pt"


def test_evaluation_uses_the_recorded_options_unless_typed(run, detector, tmp_path):
    common = ["--frcnn_checkpoint", detector, "--evaluate", "--log_off", "--device", "cpu"]
    with pytest.raises(UserError, match="PASCAL VOC not found"):
        detect.main([*common, "--data_dir", str(tmp_path)])  # then --dataset is voc, not the recorded shapes
    with pytest.raises(UserError, match="--neck c5: .*last.pt has the neck fpn\nomit --neck"):
        detect.main([*common, "--limit", "2", "--neck", "c5"])
    with pytest.raises(UserError, match="--model resnet50: .*last.pt holds resnet18"):
        detect.main([*common, "--model", "resnet50"])
    output = ["--root_dir", str(tmp_path), "--name", "run"]
    run("--iters", "1")
    with pytest.raises(UserError, match="run already holds a training run\nchoose another --name for the evaluation"):
        detect.main([*common[:-3], *output, "--overwrite", "--limit", "2"])


def test_run_folder_without_best_pt_error_names_last_pt(run, detector, tmp_path):
    (tmp_path / "last.pt").symlink_to(detector)
    with pytest.raises(UserError, match="contains no best.pt; give a checkpoint file, such as .*last.pt"):
        run("--frcnn_checkpoint", str(tmp_path), start=False)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--evaluate", "--evaluate: needs a detector; give --frcnn_checkpoint FILE"),
        ("", "no initial weights: give --backbone_checkpoint FILE"),
        (
            "--pretrained --backbone_checkpoint a.pt",
            "--backbone_checkpoint and --pretrained: each sets the initial weights",
        ),
        ("--pretrained --trainable_layers 6", "--trainable_layers 6: at most 5"),
        ("--pretrained --min_size 800 --max_size 600", "--min_size 800 exceeds --max_size 600"),
        (
            "--pretrained --recipe moco",
            "(choose from auto, paper, replication, moco24k, fpn18k, coco1x, shapes)",
        ),
        ("--backbone_chekpoint a.pt", "unknown option --backbone_chekpoint; did you mean --backbone_checkpoint?"),
        ("--averaged --pretrained", "--averaged: needs a file"),
        ("--stem random --frcnn_checkpoint a.pt", "--stem random: only for a classifier"),
        ("--pretrained --gammas 0.1 0.2", "--gammas: 2 factors for 1 drop of --schedule"),
    ],
)
def test_contradicting_options_are_usage_errors(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        detect.main(words.split())
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_checkpoint_of_another_kind_error_names_the_right_option(run, detector, backbone, tmp_path):
    import evaluate
    import train

    with pytest.raises(UserError, match="this is a detector; expected a classifier\n.*--frcnn_checkpoint"):
        evaluate.main(["--model_path", detector, "--dataset", "shapes"])
    with pytest.raises(UserError, match=r"a checkpoint of a detector \(from detect.py\)\nexpected one of a classifier"):
        train.main(["--checkpoint", detector])
    with pytest.raises(UserError, match="this is a detector; expected a classifier"):
        run("--backbone_checkpoint", detector, start=False)
    with pytest.raises(
        UserError, match="this is not a detector .*\nuse classifiers with detect.py --backbone_checkpoint"
    ):
        run("--frcnn_checkpoint", backbone, start=False)
    with pytest.raises(UserError, match="nowhere.pt: no such file"):
        run("--frcnn_checkpoint", str(tmp_path / "nowhere.pt"), start=False)


def test_resume_with_other_options_raises(detector):
    with pytest.raises(UserError, match="the saved run has other options.*\n  --lr +0.02 +->  0.5"):
        detect.main(["--checkpoint", detector, "--lr", "0.5"])
    with pytest.raises(UserError, match="--neck: the saved state would not fit"):
        detect.main(["--checkpoint", detector, "--neck", "c5", "--force_config"])


def resolve(*words: str) -> dict:
    """Resolve the options of a new run with --pretrained."""
    parser = build_parser()
    return resolve_options(parser, parser.read([*words, "--pretrained"]), {})


def test_recipes_have_the_published_values():
    steps = {8: 2069, 16: 1035}  # batch size -> steps per epoch on the 16,551 images of 2007 and 2012
    table = {
        "paper": (8, 0.004, 41_000, [33_000], 5e-4, 1000, "fpn", 3, "frozen", False, [600], 1000),
        "replication": (8, 0.004, 14 * 2069, [10 * 2069], 5e-4, 1000, "c5", 3, "frozen", True, [600], 1000),
        "moco24k": (16, 0.02, 24_000, [18_000, 22_000], 1e-4, 100, "fpn", 5, "syncbn", True, None, 1333),
        "fpn18k": (16, 0.02, 18_000, [12_000, 16_000], 1e-4, 100, "fpn", 3, "frozen", True, None, 1333),
    }
    keys = ("batch_size", "lr", "iters", "schedule", "weight_decay", "warmup_iters", "neck", "trainable_layers", "norm")
    keys += ("use_difficult", "min_size", "max_size")
    for name, expected in table.items():
        options = resolve("--recipe", name)
        options |= scale_schedule(options, steps[options["batch_size"]])
        multi_scale = list(range(480, 801, 32))
        assert [options[key] for key in keys] == [multi_scale if value is None else value for value in expected], name
        assert options["augment"] == "flip" and options["momentum"] == 0.9
    assert resolve()["recipe"] == "paper" and resolve("--dataset", "shapes")["recipe"] == "shapes"


def test_schedule_scales_with_the_length_of_the_run():
    options = resolve("--epochs", "10")
    assert scale_schedule(options, 41) == {"iters": 410, "schedule": [330], "warmup_iters": 41}
    assert scale_schedule(resolve("--iters", "82000"), 2069) == {
        "iters": 82_000,
        "schedule": [66_000],
        "warmup_iters": 1000,
    }
    typed = resolve("--iters", "100", "--epochs", "3", "--schedule", "90", "--warmup_iters", "7")
    assert scale_schedule(typed, 10) == {"iters": 100, "schedule": [90], "warmup_iters": 7}


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        ("--iters 100", 10),
        ("--dataset shapes --iters 100", 50),
        ("--dataset shapes --iters 30", 50),
        ("--dataset shapes --iters 100 --lr 0.01", 25),
        ("--dataset shapes --iters 100 --lr 0.1", 50),
        ("--recipe fpn18k --iters 600", 60),
    ],
)
def test_a_shortened_warmup_rises_no_faster_than_is_known_to_train(words, warmup):
    assert scale_schedule(resolve(*words.split()), 41)["warmup_iters"] == warmup


def test_lr_scales_with_the_batch_size_only_with_scale_lr():
    assert resolve("--batch_size", "2")["lr"] == 0.004
    assert resolve("--batch_size", "2", "--scale_lr")["lr"] == pytest.approx(0.001)
    assert resolve("--batch_size", "2", "--scale_lr", "--lr", "0.3")["lr"] == 0.3
    assert RECIPES["paper"]["lr"] == 0.004


def test_lr_warms_up_from_a_thousandth_and_drops_at_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 2.0)
    scheduler = build_scheduler(optimizer, schedule=[6, 8], gammas=[0.1], warmup_iters=4)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rising = [2 * (1e-3 + (1 - 1e-3) * step / 4) for step in range(4)]
    assert rates == pytest.approx([*rising, 2, 2, 0.2, 0.2, 0.02])


def test_exported_scenes_can_be_trained_on(tmp_path, backbone, capsys):
    detect.main(["--export_shapes", str(tmp_path / "set"), "--limit", "3"])
    assert "--train_sets 2007_trainval" in capsys.readouterr().out
    words = ["--data_dir", str(tmp_path / "set"), "--train_sets", "2007_trainval", "--iters", "1", "--log_off"]
    words += ["--backbone_checkpoint", backbone, "--workers", "2", *TINY.split()[2:]]
    result = detect.main([*words, "--batch_size", "1", "--device", "cpu"])
    assert result["images"] == 3 and set(result["classes"]) >= {"disc", "bow"}


def test_pictures_have_the_detections_of_the_evaluation(detector, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in Path(detector).parent.iterdir()}
    detect.main(["--export_shapes", "set", "--limit", "2"])
    common = ["--frcnn_checkpoint", detector, "--device", "cpu", "--score_thr", "0.1"]
    detect.main([*common, "--evaluate", "--limit", "2", "--log_off", "--predictions", "evaluated.json"])
    evaluated = json.loads(Path("evaluated.json").read_text())
    stems = [Path(row["image_id"]).name for row in evaluated]
    files = [f"set/VOCdevkit/VOC2007/JPEGImages/{stem}.png" for stem in dict.fromkeys(stems)]
    content = detect.main([*common, "--image_path", *files, "--predictions", "found.json"])
    names = {row["id"]: Path(row["file_name"]).stem for row in content["images"]}
    keys = ("category_id", "category", "bbox", "score")
    found = [(names[row["image_id"]], *(row[key] for key in keys)) for row in content["annotations"]]
    assert found == [(stem, *(row[key] for key in keys)) for stem, row in zip(stems, evaluated, strict=True)] and found
    assert {path.name for path in Path("detect_output").iterdir()} == {f"{stem}_detections.png" for stem in stems}
    assert {path: path.stat().st_mtime_ns for path in Path(detector).parent.iterdir()} == before
    capsys.readouterr()
    assert not detect.main([*common[:-2], "--image_path", files[0]])["annotations"], "an untrained one is not confident"
    assert "0 detections with a score above 0.5 in 0 of 1 picture" in capsys.readouterr().out


@pytest.mark.data
def test_number_of_workers_does_not_change_training_on_real_images(real_data, backbone, tmp_path):
    small = TINY.split()[4:]
    words = ["--data_dir", str(real_data), "--train_sets", "2007_train", "--test_set", "2007_val", "--limit", "6"]
    words += ["--iters", "4", "--batch_size", "2", "--augment", "ssd", "--root_dir", str(tmp_path), "--device", "cpu"]
    for workers in ("0", "2"):
        name = ["--name", f"by{workers}", "--workers", workers, "--backbone_checkpoint", backbone]
        detect.main([*words, *small, *name])
    assert_same_runs(*(tmp_path / "voc" / "frcnn" / f"by{workers}" for workers in (0, 2)))


def train_in_two_processes(ports) -> dict:
    """Train in two processes, without and with an interruption; compare DDP gradients with the mean of local ones."""
    import detection.loop as loop
    from detection.faster_rcnn import DetectorConfig, build_detector, set_trainable_layers
    from engine.runtime import distributed

    use_small_detector()
    folder, weights_file = os.environ["RUNS_OF_THIS_TEST"].split(os.pathsep)
    results, ports = {}, iter(ports)
    output = ["--root_dir", folder, "--device", "cpu", "--workers", "0", "--backbone_checkpoint", weights_file]

    def run_detect(name: str, *words: str) -> dict | None:
        os.environ["MASTER_PORT"] = str(next(ports))
        return detect.main([*output, *TINY.split(), "--norm", "bn", "--iters", "6", "--name", name, *words])

    results["result"] = run_detect("full")
    update, done = loop.optimizer_step, []

    def stop_after_update(*args, **kwargs):  # SIGTERM to the second process in its fourth step; both stop a step later
        done.append(update(*args, **kwargs))
        if len(done) == 4 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.optimizer_step = stop_after_update
    try:
        run_detect("interrupted")
        results["message"] = "never stopped"
    except Terminated as stopped:
        results["message"] = str(stopped)
    loop.optimizer_step = update
    distributed.shut_down_processes()
    run_detect("interrupted", "--checkpoint", "auto")

    os.environ["MASTER_PORT"] = str(next(ports))
    distributed.init_processes(torch.device("cpu"), 60)
    torch.manual_seed(1)
    config = DetectorConfig(mean=(0, 0, 0), std=(1, 1, 1), min_size=(64,), rois=8, proposals=(20, 1000))
    model = build_detector("resnet18", 3, config)
    set_trainable_layers(model, trainable_layers=2)
    torch.manual_seed(10 + distributed.rank())
    boxes = torch.tensor([[4.0, 8, 40, 50], [10, 2, 30, 30]])[: 2 - distributed.rank()]
    batch = [torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}]
    gradients = []
    for network in (model, distributed.wrap_ddp(model)):
        model.zero_grad()
        torch.manual_seed(20 + distributed.rank())  # for the sampling of proposals
        sum(network.train()(*batch).values()).backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.requires_grad])
    local, shared = gradients
    results["difference"] = max(
        float((distributed.all_reduce_sum(one) / 2 - other).abs().max())
        for one, other in zip(local, shared, strict=True)
    )
    results["largest"] = max(float(one.abs().max()) for one in shared)
    distributed.shut_down_processes()
    return results


@pytest.fixture(scope="module")
def two_process_runs(tmp_path_factory, backbone):
    folder = tmp_path_factory.mktemp("two")
    os.environ["RUNS_OF_THIS_TEST"] = f"{folder}{os.pathsep}{backbone}"
    return folder / "shapes" / "frcnn", run_in_two_processes(train_in_two_processes, folder, num_ports=4)


def test_ddp_gradients_are_the_mean_of_the_local_gradients(two_process_runs):
    _, results = two_process_runs
    assert results["difference"] <= 1e-6 * max(1, results["largest"]) and results["largest"] > 0


def test_two_processes_resume_exactly_and_evaluate_each_image_once(two_process_runs):
    folder, results = two_process_runs
    assert "2 steps into the epoch" in results["message"]
    assert_same_runs(folder / "full", folder / "interrupted")
    result = results["result"]
    assert result["images"] == 6
    one = evaluate_alone(folder / "full" / "last.pt")
    assert one["figures"] == result["figures"] and one["classes"] == result["classes"]


def evaluate_alone(path) -> dict:
    return detect.main(
        "--dataset shapes --limit 6 --evaluate --log_off --device cpu --frcnn_checkpoint".split() + [str(path)]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_detector_trains_on_gpu_and_evaluates_as_on_cpu(run, amp):
    folder, _ = run("--iters", "4", "--amp", amp, "--device", "cuda", "--score_thr", "0")
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 4
    words = "--dataset shapes --limit 6 --evaluate --log_off --score_thr 0 --frcnn_checkpoint".split()
    there, here = (detect.main([*words, str(folder), "--device", device])["figures"] for device in ("cuda", "cpu"))
    assert all(there[name] == pytest.approx(here[name], abs=0.5) for name in here if here[name] is not None)


@pytest.mark.gpu
def test_deterministic_gpu_run_resumes_exactly(run):
    words = ("--device", "cuda", "--deterministic", "--schedule", "4", "--warmup_iters", "2")
    full, _ = run("--iters", "5", *words, name="full")
    stopped, _ = run("--iters", "4", *words, name="stopped")
    detect.main(["--checkpoint", str(stopped / "last.pt"), "--iters", "5"])
    assert_same_runs(full, stopped)
