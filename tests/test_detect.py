"""detect.py from end to end, on a few drawn scenes."""

import csv
import functools
import json
import os
import signal

import numpy as np
import pytest
import torch
from torchvision.models.detection import faster_rcnn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

import detect
from detection.metrics import Detections, GroundTruth, voc_metrics
from detection.options import build_parser
from detection.recipes import RECIPES
from detection.resolve import resolve_options, scale_schedule
from detection.run import build_scheduler
from engine.errors import Terminated, UserError
from models import build_model

TINY = "--dataset shapes --limit 6 --batch_size 2 --min_size 64 --max_size 128 --rois 8 --proposals 20 10 --amp off"
LOSSES = ["loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]


class SmallHead(TwoMLPHead):
    """Half of a detector's weights are those between 7x7 features and 1024: without them tests write half as much."""

    def __init__(self, in_channels: int, representation_size: int):
        super().__init__(in_channels, 32)
        self.fc7 = torch.nn.Linear(32, representation_size)


@pytest.fixture(scope="module", autouse=True)
def small_head():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster_rcnn, "TwoMLPHead", SmallHead)
        yield


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "imagenet_resnet18.pt"
    torch.save(build_model("imagenet_resnet18", 10, 64).state_dict(), path)
    return str(path)


@pytest.fixture
def run(tmp_path, backbone):
    """A function that calls detect.py with few small images; the folder of the run and what it returned."""

    def call(*words: str, name: str = "run", start: bool = True) -> tuple:
        begin = ["--backbone_checkpoint", backbone] if start else []
        place = ["--root_dir", str(tmp_path), "--name", name, "--device", "cpu", "--workers", "0"]
        result = detect.main([*begin, *TINY.split(), *place, *words])
        return tmp_path / "shapes" / "frcnn" / name, result

    return call


@pytest.fixture(scope="module")
def detector(tmp_path_factory, backbone) -> str:
    """The file of a detector that has made two steps."""
    root = tmp_path_factory.mktemp("detector")
    words = ["--iters", "2", "--root_dir", str(root), "--name", "one", "--device", "cpu"]
    detect.main(["--backbone_checkpoint", backbone, *TINY.split(), *words])
    return str(root / "shapes" / "frcnn" / "one" / "last.pt")


def weights(folder) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / "last.pt", weights_only=True)
    momentum = {f"momentum {key}": one["momentum_buffer"] for key, one in saved["optimizer"]["state"].items()}
    return {**saved["model"], **momentum, **{f"ema {key}": value for key, value in (saved["ema"] or {}).items()}}


def rows(folder) -> list[dict]:
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def assert_same(one, other) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for row, same in zip(rows(one), rows(other), strict=True):
        for key in (*LOSSES, "iteration", "lr", "map07"):
            assert row[key] == same[key], key


def test_a_run_leaves_numbers_pictures_and_a_file_that_says_what_it_is(run, tmp_path, capsys):
    folder, result = run("--iters", "3", "--vis", "2", "--predictions", str(tmp_path / "all.json"), "--ema", "0.5")
    files = {path.name for path in folder.iterdir()}
    assert {"last.pt", "best.pt", "log.csv", "log.txt", "config.json", "curves.png", "results.json"} <= files
    assert {"precision_recall.png", "vis"} <= files and (folder / "vis" / "page_01.png").is_file()
    (row,) = rows(folder)
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


def test_a_run_that_goes_on_inside_an_epoch_is_the_run_it_would_have_been(run):
    same = ("--schedule", "4", "--warmup_iters", "2", "--norm", "bn", "--augment", "ssd", "--eval_every", "0")
    whole, _ = run("--iters", "5", *same, name="whole")
    stopped, _ = run("--iters", "4", *same, name="stopped")  # inside the second epoch, which has three steps
    resumed = detect.main(["--checkpoint", str(stopped / "last.pt"), "--iters", "5"])
    assert resumed["iterations"] == 5
    assert_same(whole, stopped)


def test_sigterm_and_saves_between_lose_nothing(run, monkeypatch):
    import detection.loop
    import detection.run

    whole, _ = run("--iters", "3", "--ema", "0.9", name="whole")
    original, done = detection.loop.optimizer_step, []

    def counted(*args, **kwargs):
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(detection.loop, "optimizer_step", counted)
    with pytest.raises(Terminated, match="2 steps into the epoch; resume with --checkpoint .*last.pt"):
        run("--iters", "3", "--ema", "0.9", "--save_iters", "2", name="stopped")
    monkeypatch.undo()
    folder = whole.parent / "stopped"
    assert torch.load(folder / "previous.pt", weights_only=True)["step"] == 2, "saved by --save_iters too"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(detection.run, "evaluate", killed)
    again = ("--iters", "3", "--checkpoint", "auto")
    with pytest.raises(KeyboardInterrupt):
        run(*again, name="stopped", start=False)
    monkeypatch.undo()
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3, "saved before the evaluation"
    run(*again, name="stopped", start=False)
    assert_same(whole, folder)


def test_the_best_epoch_is_that_of_the_figure_papers_compare(run, monkeypatch):
    import detection.run

    original, figures = detection.run.evaluate, iter([(0.3, 0.4), (0.2, 0.9)])

    def told(*args, **kwargs):
        judged = original(*args, **kwargs)
        judged.voc["map07"], judged.voc["map"] = next(figures)
        return judged

    monkeypatch.setattr(detection.run, "evaluate", told)
    _, result = run("--iters", "4", "--eval_every", "1", "--log_off")
    assert result["best"] == {"value": 30.0, "epoch": 1, "split": "test"}
    assert result["figures"]["VOC07 mAP@0.5 (11-point)"] == 20.0, "of the last epoch"


def test_evaluate_gives_the_last_row_of_the_log(run, backbone, tmp_path):
    folder, trained = run("--iters", "3", "--ema", "0.5", "--lr", "0.02")
    saved, name = torch.load(folder / "last.pt", weights_only=True), "layer4.1.conv2.weight"
    average, begin = saved["ema"][f"backbone.body.{name}"], torch.load(backbone)[name]
    assert not torch.equal(average, begin) and not torch.equal(average, saved["model"][f"backbone.body.{name}"])
    words = ["--frcnn_checkpoint", str(folder / "last.pt"), "--evaluate", "--limit", "6", "--device", "cpu"]
    words += ["--dataset", "shapes", "--root_dir", str(tmp_path), "--predictions", str(tmp_path / "all.json")]
    judged = detect.main(words)
    assert judged["figures"] == trained["figures"] and judged["classes"] == trained["classes"]
    assert judged["detector"] == str(folder / "last.pt")
    averaged = detect.main([*words, "--averaged", "--log_off"])
    assert averaged["figures"]["VOC07 mAP@0.5 (11-point)"] == pytest.approx(
        float(rows(folder)[-1]["ema_map07"]), rel=1e-4
    )


def test_dumped_detections_give_the_same_numbers(run, tmp_path):
    from detection.load import load_image_sets

    _, result = run("--iters", "2", "--predictions", str(tmp_path / "all.json"), "--score_thr", "0", "--log_off")
    _, test = load_image_sets(dataset="shapes", limit=6)
    found = {name: [] for name in test.names}
    for one in json.loads((tmp_path / "all.json").read_text()):
        x, y, width, height = one["bbox"]
        found[one["image_id"]].append(((x, y, x + width, y + height), one["category_id"], one["score"]))
        assert test.classes[one["category_id"] - 1] == one["category"]
    lists = [
        Detections(*(np.array(column) for column in zip(*some, strict=True)))
        if some
        else Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        for some in found.values()
    ]
    truths = [GroundTruth(*(target[key].numpy() for key in GroundTruth._fields)) for target in test.targets]
    again = voc_metrics(lists, truths, test.classes)
    assert 100 * again["map"] == pytest.approx(result["figures"]["VOC mAP@0.5 (area)"], abs=1e-9)
    assert sum(len(some) for some in found.values()) > 0


def test_a_finished_run_is_evaluated_again(run, capsys):
    folder, first = run("--iters", "1")
    before = weights(folder)
    again = detect.main(["--checkpoint", str(folder)])
    assert "this run was finished already; evaluated again" in capsys.readouterr().out
    assert again["figures"] == first["figures"] and len(rows(folder)) == 1
    assert all(torch.equal(value, before[key]) for key, value in weights(folder).items())


def test_training_starts_from_another_detector(run, detector, tmp_path, capsys):
    content = torch.load(detector, weights_only=True)["model"]
    bare = {key: value for key, value in content.items() if "box_predictor" not in key}
    bare |= {"roi_heads.box_predictor.cls_score.weight": torch.zeros(4, 1024)}
    bare |= {"roi_heads.box_predictor.cls_score.bias": torch.zeros(4)}
    bare |= {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(16, 1024)}
    bare |= {"roi_heads.box_predictor.bbox_pred.bias": torch.zeros(16)}
    torch.save(bare, tmp_path / "bare.pt")
    words = ("--frcnn_checkpoint", str(tmp_path / "bare.pt"), "--iters", "1")
    run(*words, "--lr", "0", "--log_off", start=False)
    assert "is for 3 classes: the predictor starts anew, for 10" in capsys.readouterr().out
    with pytest.raises(UserError, match="bare.pt: a detector for 3 classes; the data has 10"):
        run(*words, "--evaluate", start=False)


def test_the_baseline_starts_from_torchvisions_weights(run, monkeypatch, capsys):
    import detection.initialize

    monkeypatch.setattr(
        detection.initialize, "download_weights", lambda url: build_model("imagenet_resnet18", 1000, 224).state_dict()
    )
    run("--pretrained", "--model", "resnet18", "--iters", "1", "--log_off", start=False)
    assert (
        "on imagenet_resnet18 from https://download.pytorch.org/models/resnet18-f37072fd.pth" in capsys.readouterr().out
    )

    def offline(url):
        raise ValueError("cannot download")

    monkeypatch.setattr(detection.initialize, "download_weights", offline)
    with pytest.raises(
        UserError, match="--pretrained: cannot download, or give a classifier with --backbone_checkpoint"
    ):
        run("--pretrained", start=False)
    with pytest.raises(UserError, match="--model wrn28_10: there are no ready weights of it\nthere are of resnet18"):
        run("--pretrained", "--model", "wrn28_10", start=False)


def test_a_batch_in_pieces_is_one_step(run, capsys):
    run("--iters", "3", "--accumulate", "2", "--log_off")
    assert "3 steps (1.0 epochs of 3)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--batch_size 2: the total .* divisible by 1 process x --accumulate 4 = 4"):
        run("--iters", "3", "--accumulate", "4")


def test_a_loss_that_is_no_number_names_the_images_and_keeps_them(run, tmp_path):
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


def test_a_run_is_not_cut_behind_where_it_stands(detector):
    with pytest.raises(UserError, match="--iters 1: the run has made 2 steps\ngive more, or leave it out"):
        detect.main(["--checkpoint", detector, "--iters", "1"])
    assert torch.load(detector, weights_only=True)["step"] == 2


def test_objects_marked_difficult_are_trained_on_only_if_asked_for(run, monkeypatch, capsys):
    import detection.load

    original = detection.load.load_image_sets

    @functools.wraps(original)  # whose parameters say which options it is given
    def with_difficult(**options):
        train, test = original(**options)
        for target in train.targets:
            target["difficult"][:1] = True
        return train, test

    monkeypatch.setattr(detection.load, "load_image_sets", with_difficult)
    for asked, objects in (("true", "10 objects (6 difficult)"), ("false", "4 objects (0 difficult)")):
        run("--iters", "1", "--log_off", "--use_difficult", asked)
        assert f"train: 6 images with {objects}" in capsys.readouterr().out


def test_what_is_forced_on_a_run_that_goes_on_counts(run, monkeypatch, capsys):
    import detection.load

    folder, _ = run("--iters", "1")
    words = ("--checkpoint", str(folder), "--iters", "2")
    detect.main([*words, "--momentum", "0.5", "--force_config", "--score_thr", "0.2"])
    assert torch.load(folder / "last.pt", weights_only=True)["optimizer"]["param_groups"][0]["momentum"] == 0.5
    assert "--score_thr changed: the best epoch is sought anew" in capsys.readouterr().out
    original = detection.load.load_image_sets
    fewer = functools.wraps(original)(lambda **options: [part.take(range(5)) for part in original(**options)])
    monkeypatch.setattr(detection.load, "load_image_sets", fewer)
    with pytest.raises(UserError, match="was trained on 6 images of 10 classes, here are 5 of 10\nname its data"):
        detect.main(["--checkpoint", str(folder), "--iters", "3"])


def test_options_of_another_script_are_refused(run, detector, shapes_run):
    import train

    config = shapes_run("--limit", "64", epochs=1) / "config.json"
    with pytest.raises(UserError, match="this is the config.json of a classifier run; expected one of a detector run"):
        run("--config", str(config))
    mine = detector.replace("last.pt", "config.json")
    with pytest.raises(UserError, match="this is the config.json of a detector run; expected one of a classifier run"):
        train.main(["--config", mine])
    _, result = run("--config", mine, "--frcnn_checkpoint", detector, "--log_off", start=False)
    assert result["iterations"] == 2, "what is typed takes the place of the backbone in the file"


def test_a_place_for_detections_that_cannot_be_written_ends_before_the_work(run, tmp_path, capsys):
    for place, message in (
        (tmp_path, "this is a folder; give the name of a file"),
        (tmp_path / "no" / "a.json", "does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("--iters", "1", "--predictions", str(place))
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_has_no_effect_is_told(run, detector, capsys):
    run("--iters", "1", "--epochs", "9", "--log_off", "--vis", "3", "--test_set", "2007_val")
    out = capsys.readouterr().out
    assert "without effect here: --epochs, --name, --test_set, --vis, --workers" in out
    detect.main(["--checkpoint", detector, "--backbone_checkpoint", "another.pt"])
    assert "without effect here: --backbone_checkpoint" in capsys.readouterr().out
    assert torch.load(detector, weights_only=True)["config"]["backbone_checkpoint"] != "another.pt"


def test_what_a_detectors_file_says_serves_unless_it_is_typed(run, detector, tmp_path):
    common = ["--frcnn_checkpoint", detector, "--evaluate", "--log_off", "--device", "cpu"]
    with pytest.raises(UserError, match="PASCAL VOC not found"):
        detect.main([*common, "--data_dir", str(tmp_path)])  # of VOC, though it was trained on drawn scenes
    with pytest.raises(UserError, match="--neck c5: .*last.pt has the neck fpn\nleave it out"):
        detect.main([*common, "--limit", "2", "--neck", "c5"])
    with pytest.raises(UserError, match="--model resnet50: .*last.pt holds resnet18"):
        detect.main([*common, "--model", "resnet50"])
    place = ["--root_dir", str(tmp_path), "--name", "run"]
    run("--iters", "1")
    with pytest.raises(UserError, match="run already holds a run"):
        detect.main([*common[:-3], *place, "--overwrite", "--limit", "2"])


def test_a_run_folder_without_a_best_epoch_names_its_last(run, detector, tmp_path):
    (tmp_path / "last.pt").symlink_to(detector)
    with pytest.raises(UserError, match="contains no best.pt; give a checkpoint file, such as .*last.pt"):
        run("--frcnn_checkpoint", str(tmp_path), start=False)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--evaluate", "--evaluate needs --frcnn_checkpoint FILE"),
        ("", "--backbone_checkpoint FILE: which classifier shall be the backbone?"),
        (
            "--pretrained --backbone_checkpoint a.pt",
            "--backbone_checkpoint and --pretrained both say what to start from",
        ),
        ("--pretrained --trainable_layers 6", "--trainable_layers 6: a ResNet has a stem and 4 stages"),
        ("--pretrained --min_size 800 --max_size 600", "--min_size 800 is more than --max_size 600"),
        (
            "--pretrained --recipe moco",
            "(choose from auto, paper, replication, moco24k, fpn18k, shapes)",
        ),
        ("--backbone_chekpoint a.pt", "unknown option --backbone_chekpoint; did you mean --backbone_checkpoint?"),
        ("--averaged --pretrained", "--averaged: of which file?"),
        ("--stem random --frcnn_checkpoint a.pt", "--stem random: it says how a classifier becomes a backbone"),
        ("--pretrained --gammas 0.1 0.2", "--gammas has 2 factors for the 1 drops of --schedule"),
    ],
)
def test_a_contradiction_is_a_usage_error(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        detect.main(words.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_files_of_the_other_kind_are_refused_with_the_right_option(run, detector, backbone, tmp_path):
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


def test_options_that_would_make_it_another_run_are_refused(detector):
    with pytest.raises(UserError, match="the saved run has other options.*\n  --lr +0.02 +->  0.5"):
        detect.main(["--checkpoint", detector, "--lr", "0.5"])
    with pytest.raises(UserError, match="--neck: the saved state would not fit"):
        detect.main(["--checkpoint", detector, "--neck", "c5", "--force_config"])


def settled(*words: str) -> dict:
    parser = build_parser()
    return resolve_options(parser, parser.read([*words, "--pretrained"]), {})


def test_recipes_are_the_published_ones():
    steps = {8: 2069, 16: 1035}  # of an epoch of the 16,551 images of 2007 and 2012
    table = {
        "paper": (8, 0.004, 41_000, [33_000], 5e-4, 1000, "fpn", 3, "frozen", False, [600], 1000),
        "replication": (8, 0.004, 14 * 2069, [10 * 2069], 5e-4, 1000, "c5", 3, "frozen", True, [600], 1000),
        "moco24k": (16, 0.02, 24_000, [18_000, 22_000], 1e-4, 100, "fpn", 5, "syncbn", True, None, 1333),
        "fpn18k": (16, 0.02, 18_000, [12_000, 16_000], 1e-4, 100, "fpn", 3, "frozen", True, None, 1333),
    }
    keys = ("batch_size", "lr", "iters", "schedule", "weight_decay", "warmup_iters", "neck", "trainable_layers", "norm")
    keys += ("use_difficult", "min_size", "max_size")
    for name, wanted in table.items():
        options = settled("--recipe", name)
        options |= scale_schedule(options, steps[options["batch_size"]])
        multi_scale = list(range(480, 801, 32))
        assert [options[key] for key in keys] == [multi_scale if value is None else value for value in wanted], name
        assert options["augment"] == "flip" and options["momentum"] == 0.9
    assert settled()["recipe"] == "paper" and settled("--dataset", "shapes")["recipe"] == "shapes"


def test_a_shorter_run_keeps_the_shape_of_its_recipe():
    options = settled("--epochs", "10")
    assert scale_schedule(options, 41) == {"iters": 410, "schedule": [330], "warmup_iters": 41}
    assert scale_schedule(settled("--iters", "82000"), 2069) == {
        "iters": 82_000,
        "schedule": [66_000],
        "warmup_iters": 1000,
    }
    typed = settled("--iters", "100", "--epochs", "3", "--schedule", "90", "--warmup_iters", "7")
    assert scale_schedule(typed, 10) == {"iters": 100, "schedule": [90], "warmup_iters": 7}


def test_lr_follows_the_batch_only_when_asked_to():
    assert settled("--batch_size", "2")["lr"] == 0.004
    assert settled("--batch_size", "2", "--scale_lr")["lr"] == pytest.approx(0.001)
    assert settled("--batch_size", "2", "--scale_lr", "--lr", "0.3")["lr"] == 0.3
    assert RECIPES["paper"]["lr"] == 0.004


def test_the_rate_rises_from_a_thousandth_and_drops_at_its_iterations():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 2.0)
    scheduler = build_scheduler(optimizer, schedule=[6, 8], gammas=[0.1], warmup_iters=4)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rising = [2 * (1e-3 + (1 - 1e-3) * step / 4) for step in range(4)]
    assert rates == pytest.approx([*rising, 2, 2, 0.2, 0.2, 0.02])


def test_scenes_are_written_in_the_layout_of_voc(tmp_path, backbone, capsys):
    detect.main(["--export_shapes", str(tmp_path / "set"), "--limit", "3"])
    assert "--train_sets 2007_trainval" in capsys.readouterr().out
    words = ["--data_dir", str(tmp_path / "set"), "--train_sets", "2007_trainval", "--iters", "1", "--log_off"]
    words += ["--backbone_checkpoint", backbone, "--workers", "2", *TINY.split()[2:]]
    result = detect.main([*words, "--batch_size", "1", "--device", "cpu"])
    assert result["images"] == 3 and set(result["classes"]) >= {"disc", "bow"}


@pytest.mark.data
def test_workers_change_nothing_on_real_images(real_data, backbone, tmp_path):
    small = TINY.split()[4:]
    words = ["--data_dir", str(real_data), "--train_sets", "2007_train", "--test_set", "2007_val", "--limit", "6"]
    words += ["--iters", "4", "--batch_size", "2", "--augment", "ssd", "--root_dir", str(tmp_path), "--device", "cpu"]
    for workers in ("0", "2"):
        name = ["--name", f"by{workers}", "--workers", workers, "--backbone_checkpoint", backbone]
        detect.main([*words, *small, *name])
    assert_same(*(tmp_path / "voc" / "frcnn" / f"by{workers}" for workers in (0, 2)))


def in_two(ports) -> dict:
    """Gradients of two processes beside the mean of the local ones; runs whole and in parts, and what they found."""
    import detection.loop as loop
    from detection.faster_rcnn import DetectorConfig, build_detector, set_learning
    from engine.runtime import distributed

    faster_rcnn.TwoMLPHead = SmallHead
    folder, weights_file = os.environ["RUNS_OF_THIS_TEST"].split(os.pathsep)
    found, ports = {}, iter(ports)
    place = ["--root_dir", folder, "--device", "cpu", "--workers", "0", "--backbone_checkpoint", weights_file]

    def go(name: str, *words: str) -> dict | None:
        os.environ["MASTER_PORT"] = str(next(ports))
        return detect.main([*place, *TINY.split(), "--norm", "bn", "--iters", "6", "--name", name, *words])

    found["result"] = go("whole")
    update, done = loop.optimizer_step, []

    def counted(*args, **kwargs):  # SIGTERM to the second process within its fourth step, which both see a step later
        done.append(update(*args, **kwargs))
        if len(done) == 4 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.optimizer_step = counted
    try:
        go("parts")
        found["message"] = "never stopped"
    except Terminated as stopped:
        found["message"] = str(stopped)
    loop.optimizer_step = update
    distributed.shut_down_processes()
    go("parts", "--checkpoint", "auto")

    os.environ["MASTER_PORT"] = str(next(ports))
    distributed.init_processes(torch.device("cpu"), 60)
    torch.manual_seed(1)
    config = DetectorConfig(mean=(0, 0, 0), std=(1, 1, 1), min_size=(64,), rois=8, proposals=(20, 1000))
    model = build_detector("resnet18", 3, config)
    set_learning(model, trainable_layers=2)
    torch.manual_seed(10 + distributed.rank())
    boxes = torch.tensor([[4.0, 8, 40, 50], [10, 2, 30, 30]])[: 2 - distributed.rank()]
    batch = [torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)}]
    gradients = []
    for network in (model, distributed.wrap_ddp(model)):
        model.zero_grad()
        torch.manual_seed(20 + distributed.rank())  # of the proposals that are sampled
        sum(network.train()(*batch).values()).backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.requires_grad])
    local, shared = gradients
    found["apart"] = max(
        float((distributed.all_reduce_sum(one) / 2 - other).abs().max())
        for one, other in zip(local, shared, strict=True)
    )
    found["largest"] = max(float(one.abs().max()) for one in shared)
    distributed.shut_down_processes()
    return found


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, backbone):
    from support import run_in_two_processes

    folder = tmp_path_factory.mktemp("two")
    os.environ["RUNS_OF_THIS_TEST"] = f"{folder}{os.pathsep}{backbone}"
    return folder / "shapes" / "frcnn", run_in_two_processes(in_two, folder, meetings=4)


def test_gradients_of_two_processes_are_the_mean_of_the_local_ones(of_two):
    _, found = of_two
    assert found["apart"] <= 1e-6 * max(1, found["largest"]) and found["largest"] > 0


def test_two_processes_go_on_exactly_and_count_every_image_once(of_two):
    folder, found = of_two
    assert "2 steps into the epoch" in found["message"]
    assert_same(folder / "whole", folder / "parts")
    result = found["result"]
    assert result["images"] == 6
    one = evaluate_alone(folder / "whole" / "last.pt")
    assert one["figures"] == result["figures"] and one["classes"] == result["classes"]


def evaluate_alone(path) -> dict:
    return detect.main(
        "--dataset shapes --limit 6 --evaluate --log_off --device cpu --frcnn_checkpoint".split() + [str(path)]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_detector_trains_on_a_gpu_and_is_judged_there_as_on_a_cpu(run, amp):
    folder, _ = run("--iters", "4", "--amp", amp, "--device", "cuda", "--score_thr", "0")
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 4
    words = "--dataset shapes --limit 6 --evaluate --log_off --score_thr 0 --frcnn_checkpoint".split()
    there, here = (detect.main([*words, str(folder), "--device", device])["figures"] for device in ("cuda", "cpu"))
    assert all(there[name] == pytest.approx(here[name], abs=0.5) for name in here if here[name] is not None)


@pytest.mark.gpu
def test_a_deterministic_run_goes_on_exactly_on_a_gpu(run):
    words = ("--device", "cuda", "--deterministic", "--schedule", "4", "--warmup_iters", "2")
    whole, _ = run("--iters", "5", *words, name="whole")
    stopped, _ = run("--iters", "4", *words, name="stopped")
    detect.main(["--checkpoint", str(stopped / "last.pt"), "--iters", "5"])
    assert_same(whole, stopped)
