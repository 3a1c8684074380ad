"""Detection in pictures of the user, by a detector that sees class 3 everywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detect
from detection import pictures
from detection.faster_rcnn import DetectorConfig, build_detector
from detection.initialize import InitialWeights
from detection.metrics import Detections
from engine.drawing.boxes import PICTURE_SIDE, DrawnBox, draw_box_picture
from engine.errors import UserError

CLASSES = ["cat", "dog", "car"]


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory, small_detector) -> str:
    """A bare state dict of a detector with 90 classes, as torchvision's, whose scores for class 3 are the highest."""
    torch.manual_seed(0)
    weights = build_detector("resnet18", 90, DetectorConfig((0.5,) * 3, (0.5,) * 3)).state_dict()
    weights["roi_heads.box_predictor.cls_score.bias"][3] = 8.0
    path = tmp_path_factory.mktemp("detector") / "bare.pt"
    torch.save(weights, path)
    return str(path)


@pytest.fixture
def run(detector_file, tmp_path):
    """A function that detects in pictures: it calls detect.py and returns what --predictions holds."""

    def call(*words, file: str = detector_file) -> dict:
        small = "--min_size 32 --max_size 64 --proposals 9 9 --max_dets 4 --device cpu --dpi 20".split()
        output = ["--output", str(tmp_path / "out"), *map(str, words)]
        return detect.main(["--frcnn_checkpoint", file, *small, *output])

    return call


def write_picture(path: Path, size=(24, 16), mode: str = "RGB", **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    picture = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    picture.save(path, **settings)
    return path


def write_turned(path: Path) -> tuple[Path, np.ndarray]:
    """Write a picture 20 x 30 as a phone stores it, turned, with EXIF orientation 6. Returns it and its pixels."""
    upright = np.random.RandomState(1).randint(0, 256, (30, 20, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(path, exif=exif)
    return path, upright


# ---- One command ----


def test_pictures_of_all_kinds_are_drawn_and_listed(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for name, mode in {"grey.png": "L", "palette.png": "P", "deep.png": "I;16", "clear.png": "RGBA"}.items():
        write_picture(folder / name, mode=mode)
    write_picture(folder / "print.jpg", mode="CMYK")
    write_picture(folder / "dot.png", size=(1, 1))
    write_picture(folder / "strip.png", size=(60, 2))
    content = run("--image_path", folder, "--predictions", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == content
    names = [Path(row["file_name"]).stem for row in content["images"]]
    assert names == ["clear", "deep", "dot", "grey", "palette", "print", "strip"]
    assert {(row["width"], row["height"]) for row in content["images"]} == {(24, 16), (1, 1), (60, 2)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}_detections.png" for name in names}
    assert {row["category"] for row in content["annotations"]} == {"car"}, "90 classes have COCO's names"
    sizes = {row["id"]: (row["width"], row["height"]) for row in content["images"]}
    for row in content["annotations"]:
        (x, y, width, height), (wide, high) = row["bbox"], sizes[row["image_id"]]
        assert 0 <= x and 0 <= y and x + width <= wide + 1e-3 and y + height <= high + 1e-3 and row["score"] > 0.5
    printed = capsys.readouterr().out
    count = sum(row["image_id"] == 1 for row in content["annotations"])
    assert f"{folder / 'clear.png'}  {count} detection" in printed and "bare.pt does not name its 90 classes" in printed
    assert f"{len(content['annotations'])} detections with a score above 0.5 in 7 of 7 pictures" in printed


def test_picture_is_turned_upright_before_detection(run, tmp_path):
    turned, upright = write_turned(tmp_path / "phone.png")
    Image.fromarray(upright).save(tmp_path / "upright.png")
    content = run("--image_path", turned, tmp_path / "upright.png")
    assert [(row["width"], row["height"]) for row in content["images"]] == [(20, 30)] * 2
    first, second = ([row["bbox"] for row in content["annotations"] if row["image_id"] == number] for number in (1, 2))
    assert first == second and first
    drawn = [np.asarray(Image.open(tmp_path / "out" / f"{name}_detections.png")) for name in ("phone", "upright")]
    assert np.array_equal(*drawn) and drawn[0].shape[0] > drawn[0].shape[1]


def test_threshold_and_resolution_are_respected(run, tmp_path, capsys):
    picture = write_picture(tmp_path / "a.png")
    assert not run("--image_path", picture, "--score_thr", "0.9999")["annotations"]
    printed = capsys.readouterr().out
    assert (
        f"{picture}  no detections  " in printed
        and "0 detections with a score above 0.9999 in 0 of 1 picture" in printed
    )
    plain = Image.open(tmp_path / "out" / "a_detections.png")
    assert plain.size == pytest.approx((PICTURE_SIDE * 20 / 110, PICTURE_SIDE * 20 / 110 * 16 / 24), abs=1)
    run("--image_path", picture, "--dpi", "40", "--figure_format", "pdf")
    assert (tmp_path / "out" / "a_detections.pdf").read_bytes().startswith(b"%PDF")


def test_detections_are_a_coco_file(run, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    run("--image_path", write_picture(tmp_path / "a.png"), "--predictions", tmp_path / "all.json")
    loaded = coco.COCO(str(tmp_path / "all.json"))
    assert loaded.getAnnIds(imgIds=[1], catIds=loaded.getCatIds(["car"]))


# ---- Bad input ----


def test_bad_picture_is_named_or_skipped_and_the_others_are_kept(run, tmp_path, capsys):
    good, broken = write_picture(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png"
    broken.write_bytes(good.read_bytes()[:200])
    thin = write_picture(tmp_path / "in" / "c.png", size=(90, 1))
    with pytest.raises(UserError, match="an image cannot be read: .*b.png.*\n.*--on_bad_image skip"):
        run("--image_path", tmp_path / "in")
    assert (tmp_path / "out" / "a_detections.png").exists()
    with pytest.raises(UserError, match=r"c.png \(90 x 1 pixels\): --max_size 64 leaves less .*\ncrop the picture, or"):
        run("--image_path", thin)
    content = run("--image_path", tmp_path / "in", "--on_bad_image", "skip")
    assert [row["file_name"] for row in content["images"]] == [str(good)]
    printed = capsys.readouterr().out
    assert f"note: skipped: {broken}: " in printed and f"note: skipped: {thin} (90 x 1 pixels)" in printed
    with pytest.raises(UserError, match="--image_path: 1 image found, but none can be used"):
        run("--image_path", broken, "--on_bad_image", "skip")


def test_users_files_are_never_replaced(run, tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("a.jpg", "a.png", "b/A.png"):
        write_picture(folder / name)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    words = ["--image_path", folder, folder / "b", "--output", folder]
    run(*words)
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.glob("*_detections.png"))) == 3, "pictures of the same name get different files"
    with pytest.raises(UserError, match=r"--output .*: .*_detections.png is one of the pictures and would be replaced"):
        run(*words[:2], *words[3:], "--image_path", folder, folder / f"{'a.jpg'}_detections.png")
    with pytest.raises(UserError, match="--output .*a.png: must be a folder"):
        run("--image_path", folder / "a.jpg", "--output", folder / "a.png")
    for path in (folder / "a.png", write_json(tmp_path / "mine.json", {"images": []})):
        with pytest.raises(SystemExit):
            run("--image_path", folder / "a.jpg", "--predictions", path)
        assert f"--predictions {path}: this file was not written by --predictions" in capsys.readouterr().err
    (tmp_path / "empty.json").touch()  # as mktemp makes one
    run("--image_path", folder / "a.jpg", "--predictions", tmp_path / "empty.json", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "empty.json").read_text())["images"]


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_wrong_paths_are_explained(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--image_path .*empty: no images in this folder\n"):
        run("--image_path", tmp_path / "empty")
    picture = write_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="--output .*: .*a.png is a file, not a folder; choose another path"):
        run("--image_path", picture, "--output", picture / "out")
    torch.save({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, tmp_path / "net.pt")
    with pytest.raises(UserError, match="this is not a detector .*\nuse classifiers with .*, evaluate.py or cam.py"):
        run("--image_path", picture, file=str(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--image_path a.png", "--image_path: needs a detector; give --frcnn_checkpoint RUN"),
        ("--image_path a.png --frcnn_checkpoint a.pt --evaluate", "--evaluate: not with --image_path"),
        ("--image_path a.png --pretrained --checkpoint auto", "--checkpoint, --pretrained: not with --image_path"),
    ],
)
def test_other_tasks_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        detect.main(words.split())
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_options_without_effect_are_noted(run, tmp_path, capsys):
    run("--image_path", write_picture(tmp_path / "a.png"), "--lr", "0.1", "--vis", "3", "--dataset", "shapes")
    assert "note: no effect in this run: --dataset, --lr, --vis\n" in capsys.readouterr().out


# ---- Parts ----


def test_classes_get_names(tmp_path):
    known = InitialWeights("resnet18", (0,) * 3, (1,) * 3, path="run", classes=CLASSES, num_classes=3)
    unnamed = InitialWeights("resnet18", (0,) * 3, (1,) * 3, path="bare.pt", num_classes=3)
    assert pictures.name_classes(known, None) == (known, [])
    named, notes = pictures.name_classes(unnamed, None)
    assert named.classes == ["class 1", "class 2", "class 3"]
    assert notes == ["bare.pt does not name its 3 classes; name them with --labels FILE"]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert pictures.name_classes(known, str(tmp_path / "names.txt"))[0].classes == ["a", "b", "c"]
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="--labels .*: 2 names, but bare.pt has 3 classes\nwrite one name per line"):
        pictures.name_classes(unnamed, str(tmp_path / "names.txt"))
    coco = pictures.COCO_NAMES
    assert (len(coco), len(set(coco))) == (90, 90) and coco[0] == "person" and coco[89] == "toothbrush"


def test_line_of_a_picture_has_the_most_confident_classes():
    some = Detections(np.zeros((4, 4)), np.array([2, 3, 2, 1]), np.array([0.9, 0.8, 0.7, 0.6]))
    assert pictures.describe_objects(some, CLASSES) == "4 detections: 2 dog 0.90, 1 car 0.80, 1 cat 0.60"
    many = Detections(np.zeros((7, 4)), np.arange(1, 8), np.linspace(0.9, 0.6, 7))
    assert pictures.describe_objects(many, list("abcdefg")).endswith("1 e 0.70, 2 more classes")
    drawn = pictures.make_boxes(some, CLASSES)
    assert [box.text for box in drawn] == ["cat 0.60", "dog 0.70", "car 0.80", "dog 0.90"], "the best one is on top"
    assert drawn[1].colour == drawn[3].colour != drawn[2].colour


@pytest.mark.parametrize("size", [(300, 200), (200, 3), (3, 200)])
def test_boxes_lie_where_they_are_and_labels_on_the_page(tmp_path, size):
    width, height = size
    picture = np.full((height, width, 3), 128, np.uint8)
    blue = (0.0, 0.0, 1.0)
    box = [0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]
    draw_box_picture(tmp_path / "a.png", picture, [DrawnBox(box, "a", blue)], dpi=110)
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    scale = PICTURE_SIDE / max(size)
    margin = max(0, (drawn.shape[0] - scale * height) / 2), max(0, (drawn.shape[1] - scale * width) / 2)
    rows, columns = np.nonzero(np.abs(drawn - (0, 0, 255)).sum(2) < 60)
    spans = (rows, 1, margin[0]), (columns, 0, margin[1])
    for found, axis, shift in spans:
        assert found.max() == pytest.approx(scale * box[axis + 2] + shift, abs=8)
    assert drawn.shape[0] >= 80 and drawn.shape[1] >= 80
