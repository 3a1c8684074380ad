"""evaluate.py --predict: pictures that the user names, seen as the test images of the classifier."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from support import write_image

import evaluate
import models
from engine.errors import UserError
from engine.inference.classifier import load_classifier
from engine.runtime.checkpoint import FORMAT
from evaluation.context import EvalContext
from explanation.explainer import make_cam_explainer
from models import build_model

CLASSES = ["bird", "cat", "dog"]
PARTS = ["--device", "cpu", "--workers", "0"]


def write_classifier(path: Path, classes: list[str] = CLASSES, **options) -> str:
    """Write a checkpoint of a random resnet20 that is sure of its classes. options: of its run."""
    torch.manual_seed(len(classes))
    network = build_model("resnet20", len(classes), 32)
    network.linear.weight.data *= 20
    config = {"model": "resnet20", "dataset": "folder", "image_size": 32} | options
    content = {"format": FORMAT, "epoch": 1, "config": config, "model": network.state_dict(), "classes": classes}
    content |= {"num_classes": len(classes), "image_size": config["image_size"] or 32}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}, path)
    return str(path)


def write_photo(path: Path, width: int = 60, height: int = 40, orientation: int = 1) -> None:
    """Write a picture whose corners differ. orientation: in its EXIF data; the stored pixels are turned by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.RandomState(width + height).randint(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
    image.save(path, exif=exif)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set of three classes with pictures of several shapes."""
    for number, name in enumerate(CLASSES):
        write_photo(tmp_path / "data" / "val" / name / "0.jpg", 150 + 7 * number, 240)
        write_photo(tmp_path / "data" / "val" / name / "1.png", 300, 180 + number)
    write_photo(tmp_path / "data" / "val" / "dog" / "phone.jpg", 280, 200, orientation=6)
    return tmp_path / "data"


def get_probabilities(result: dict) -> torch.Tensor:
    """Return the probabilities of each picture in the order of the classes, (N, K)."""
    rows = [{one["index"]: one["probability"] for one in picture["top"]} for picture in result["predictions"]]
    return torch.tensor([[row[k] for k in sorted(row)] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    "options, size, resize",
    [
        ({}, 32, 32),
        ({"dataset": "cifar10", "image_size": None}, 32, 32),
        ({"image_size": 100, "eval_resize": 120, "interpolation": "bicubic"}, 100, 120),
    ],
    ids=["train.py", "cifar", "imagenet_train.py"],
)
def test_pictures_are_seen_as_the_test_images_of_a_folder(folder, tmp_path, monkeypatch, options, size, resize):
    path, measured, predict = write_classifier(tmp_path / "c.pt", **options), [], EvalContext.predict

    def record(context, *args, **kwargs):
        measured.append((context.view, *predict(context, *args, **kwargs)))
        return measured[-1][1:]

    monkeypatch.setattr(EvalContext, "predict", record)
    words = ["--model_path", path, "--batch_size", "4", *PARTS]
    [accuracy] = evaluate.main([*words, "--dataset", "folder", "--data_dir", str(folder)])
    [result] = evaluate.main([*words, "--predict", *(str(folder / "val" / name) for name in CLASSES)])
    (view, logits, labels, _), (own_view, own_logits, *_) = measured
    assert (own_view.size, own_view.resize) == (size, resize) and own_view == view
    assert torch.equal(own_logits, logits)
    assert torch.equal(get_probabilities(result), logits.double().softmax(1))
    predicted = torch.tensor([CLASSES.index(one["top"][0]["class"]) for one in result["predictions"]])
    assert 100 * float((predicted == labels).double().mean()) == pytest.approx(accuracy["top1"])
    settings = {"method": ["gradcam"], "layer": None, "target_class": ["predicted"], "batch_size": 1}
    settings |= {"image_size": None, "resize": "keep", "device": torch.device("cpu"), "precision": None}
    assert make_cam_explainer(load_classifier(path, models), **settings).view == own_view


def test_exif_orientation_is_applied(tmp_path):
    path = write_classifier(tmp_path / "c.pt")
    write_photo(tmp_path / "a.png", 90, 40)
    write_photo(tmp_path / "b.png", 90, 40, orientation=6)
    [result] = evaluate.main(["--model_path", path, "--predict", str(tmp_path), *PARTS])
    one, other = get_probabilities(result)
    assert torch.equal(one, other)


def test_classifiers_of_other_sizes_and_classes_share_a_table(tmp_path, capsys):
    paths = [write_classifier(tmp_path / "three.pt"), write_classifier(tmp_path / "two.pt", ["no", "yes"])]
    for name in ("a/x.png", "b/x.png"):
        write_photo(tmp_path / name)
    words = ["--predict", str(tmp_path / "a"), str(tmp_path / "b/x.png"), "--output", str(tmp_path / "out.json")]
    results = evaluate.main(["--model_path", *paths, *words, "--topk", "7", *PARTS, "--dataset", "shapes"])
    out = capsys.readouterr().out
    assert "note: options without effect in this call: --dataset\n" in out
    table = [line for line in out.splitlines() if line.startswith(("picture", str(tmp_path), " "))]
    assert table[0].split() == ["picture", "rank", "three", "two"] and len(table) == 1 + 2 * 3
    first = results[0]["predictions"][0]
    assert table[1].split()[:3] == [f"{tmp_path}/a/x.png", "1", f"{first['top'][0]['probability']:.2%}"]
    assert [len(result["predictions"][0]["top"]) for result in results] == [3, 2], "all classes, no more"
    assert sum(one["probability"] for one in first["top"]) == pytest.approx(1)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["results"] == results and "--predict" in written["command"]
    assert written["description"] == "predictions of evaluate.py --predict"
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 2 * (3 + 2) and {row["classifier"] for row in rows} == {"three", "two"}
    top = first["top"][1]
    assert rows[1] == {
        "file": f"{tmp_path}/a/x.png",
        "classifier": "three",
        "rank": "2",
        "class": top["class"],
        "probability": str(top["probability"]),
    }
    evaluate.main(["--model_path", paths[0], *words, *PARTS])  # replaces its own output


def test_long_table_is_cut(tmp_path, capsys):
    path = write_classifier(tmp_path / "c.pt")
    for number in range(23):
        write_image(tmp_path / "pictures" / f"{number:02}.png", number)
    evaluate.main(["--model_path", path, "--predict", str(tmp_path / "pictures"), *PARTS])
    out = capsys.readouterr().out
    assert "19.png" in out and "20.png" not in out
    assert "\n... and 3 more pictures; --output FILE.json writes all\nc: 23 pictures of 32 x 32 pixels in " in out


def test_unreadable_pictures_stop_or_are_named_and_counted(tmp_path, capsys):
    path, broken = write_classifier(tmp_path / "c.pt"), ["empty.jpg", "text.jpg"]
    for name in ("a.png", "z.png", os.fsdecode(b"\xff.png")):
        write_photo(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "empty.jpg").write_bytes(b"")
    (tmp_path / "pictures" / "text.jpg").write_text("no picture")
    words = ["--model_path", path, "--predict", str(tmp_path / "pictures"), *PARTS, "-b", "2"]
    with pytest.raises(UserError, match=r"empty.jpg: the file is empty\n.*--on_bad_image skip"):
        evaluate.main(words)
    output = tmp_path / "out.json"
    [result] = evaluate.main([*words, "--on_bad_image", "skip", "--output", str(output)])
    found = [Path(one["file"]).name for one in result["predictions"]]
    assert found == ["a.png", "z.png", os.fsdecode(b"\xff.png")]
    assert [Path(name).name for name in result["unreadable"]] == broken
    out = capsys.readouterr().out
    for name, reason in zip(broken, ("the file is empty", "not an image"), strict=True):
        assert f"note: skipped: {tmp_path / 'pictures' / name}: {reason}\n" in out
    assert json.loads(output.read_text())["results"] == [result]
    assert "\\udcff.png,c,1," in output.with_suffix(".csv").read_text(encoding="utf-8")


def test_names_of_classes_come_from_a_list_if_the_file_has_none(tmp_path, capsys):
    torch.save(build_model("resnet20", 2).state_dict(), tmp_path / "bare.pt")
    write_photo(tmp_path / "a.png")
    words = ["--model_path", str(tmp_path / "bare.pt"), "--predict", str(tmp_path / "a.png"), *PARTS]
    [result] = evaluate.main(words)
    assert {one["class"] for one in result["predictions"][0]["top"]} == {"0", "1"}
    out = capsys.readouterr().out
    assert "does not store the size of its training images; using 32 pixels (--image_size changes it)" in out
    assert "using imagenet (--norm changes it)" in out and "--class_list FILE names them" in out
    (tmp_path / "names.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    [result] = evaluate.main([*words, "--class_list", str(tmp_path / "names.txt"), "--norm", "half"])
    assert {one["class"] for one in result["predictions"][0]["top"]} == {"tench, Tinca tinca", "goldfish"}
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(UserError, match=r"--class_list .*: 3 names, but bare has 2 classes"):
        evaluate.main([*words, "--class_list", str(tmp_path / "names.txt")])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "card"], "--predict: cannot be combined with --task; give one of them"),
        (["--info"], "--predict: cannot be combined with --info; give one of them"),
        (["--output", "{}/a.png"], "--output {}/a.png: --predict writes JSON, with .csv next to it"),
    ],
)
def test_contradictions_are_usage_errors(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        evaluate.main(["--model_path", "m", "--predict", "p", *(word.format(tmp_path) for word in words)])
    assert message.format(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty", "--predict {}/empty: no images in this folder"),
        ("missing.jpg", "--predict {}/missing.jpg: no such file"),
        ("https://example.org/a.jpg", "--predict https://example.org/a.jpg: URLs are not opened; download the file"),
    ],
)
def test_missing_pictures_are_explained_before_a_network_is_loaded(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    picture = name if "://" in name else str(tmp_path / name)
    with pytest.raises(UserError) as error:
        evaluate.main(["--model_path", "missing.pt", "--predict", picture, *PARTS])
    assert str(error.value).startswith(message.format(tmp_path))


@pytest.mark.parametrize("ending, text", [("json", '{"images": []}'), ("csv", "name,age\n"), ("json", "[]")])
def test_files_of_others_are_not_replaced(tmp_path, capsys, ending, text):
    file = tmp_path / f"mine.{ending}"
    file.write_text(text)
    with pytest.raises(SystemExit):
        evaluate.main(["--model_path", "m", "--predict", "p", "--output", str(tmp_path / "mine.json")])
    assert f"{file}: this file was not written by --output; choose another name" in capsys.readouterr().err
    assert file.read_text() == text


def test_detectors_are_refused(tmp_path):
    write_photo(tmp_path / "a.png")
    words = ["--predict", str(tmp_path / "a.png"), *PARTS, "--model_path"]
    content = {"format": FORMAT, "kind": "detector", "model": {"rpn.head.weight": torch.zeros(1)}}
    torch.save(content, tmp_path / "detector.pt")
    with pytest.raises(UserError, match=r"this is a detector; .*\n.*detect.py --frcnn_checkpoint .* --image_path"):
        evaluate.main([*words, str(tmp_path / "detector.pt")])
