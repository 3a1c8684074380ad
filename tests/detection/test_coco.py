"""Data in COCO format: what is read, what is refused, and figures that equal those of pycocotools."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, same_state

import detect
from detection.coco import read_coco, read_image_set
from detection.dataset import DetectionSet
from detection.load import load_image_sets
from detection.metrics import Detections, GroundTruth, coco_metrics
from detection.options import build_parser
from detection.report import format_predictions
from detection.resolve import resolve_options, scale_schedule
from detection.voc import read_sets
from engine.errors import UserError
from models import build_model

SIZE = (60, 40)  # width, height
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


class Folder:
    """A folder of small images with an annotation file, which a test changes before it is read."""

    def __init__(self, root: Path):
        self.root, self.content = root, {"images": [], "categories": [dict(one) for one in CATEGORIES]}
        self.content["annotations"] = []

    def add_image(self, image_id: int, name: str, **more) -> None:
        """Add an image and its entry. more: further keys of the entry, which replace its size."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (200, 30, 10)).save(path)
        entry = {"id": image_id, "file_name": name, "width": SIZE[0], "height": SIZE[1]} | more
        self.content["images"].append({key: value for key, value in entry.items() if value is not None})

    def add_object(self, image_id: int, category_id: int, bbox: list, **more) -> None:
        """Add an annotation."""
        number = len(self.content["annotations"]) + 1
        entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0}
        self.content["annotations"].append(entry | more)

    def write(self, name: str = "all.json") -> str:
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps(self.content))
        return str(self.root / name)

    def read(self, **options) -> DetectionSet:
        return read_image_set(self.write(), None, **options)[0]


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Two images in subfolders; the second one has a crowd."""
    made = Folder(tmp_path / "data")
    made.add_image(9, "b/two.jpg")
    made.add_image(4, "a/one.png")
    made.add_object(9, 7, [10.5, 4, 20, 30.25], area=300.5)
    made.add_object(9, 3, [0, 0, 60, 40], iscrowd=1, segmentation={"counts": [1, 2], "size": [40, 60]})
    made.add_object(4, 3, [0, 1, 5, 6])
    return made


# ---- What is read ----


def test_images_and_classes_are_in_the_order_of_their_ids(folder):
    image_set = folder.read()
    assert image_set.classes == ["cat", "dog"] and image_set.category_ids == [3, 7]
    assert image_set.names == ["a/one.png", "b/two.jpg"] and image_set.image_ids == [4, 9]
    assert image_set.images == [folder.root / "a/one.png", folder.root / "b/two.jpg"]
    one, two = image_set.targets
    assert one["boxes"].tolist() == [[0, 1, 5, 7]] and one["labels"].tolist() == [1], "COCO counts pixels from 0"
    assert two["boxes"].tolist() == [[10.5, 4, 30.5, 34.25], [0, 0, 60, 40]] and two["labels"].tolist() == [2, 1]
    assert two["difficult"].tolist() == [False, True], "a crowd is ignored like a difficult object"
    assert one["area"].tolist() == [30] and two["area"].tolist() == [300.5, 2400]
    assert image_set.read(1).shape == (3, 40, 60) and not image_set.warnings
    assert "2 test images, 3 objects (1 crowd), 2 classes" in image_set.summary("test")


def test_images_may_be_elsewhere_and_backslashes_separate_folders(folder, tmp_path):
    folder.content["images"][0]["file_name"] = "b\\two.jpg"
    (tmp_path / "json").mkdir()
    path = tmp_path / "json" / "all.json"
    path.write_text(json.dumps(folder.content))
    assert len(read_image_set(str(path), str(folder.root))[0]) == 2
    with pytest.raises(UserError, match=r"all.json: 2 of 2 images missing in .*json: a/one.png; b/two.jpg\nset"):
        read_image_set(str(path), None)


def test_broken_boxes_are_treated_as_in_voc(folder):
    folder.add_object(4, 3, [50, 30, 20.0, 20])  # extends beyond the image
    folder.add_object(4, 3, [50, 30, 10.004, 10.004])  # by rounding only
    folder.add_object(4, 3, [-3, -3, 5, 5])
    for box in ([5, 5, -4, 10], [5, 5, 0, 10], [70, 5, 4, 4], [-9, 5, 4, 4]):
        folder.add_object(4, 7, box)
    folder.add_image(5, "c.jpg")
    image_set = folder.read()
    assert image_set.targets[0]["boxes"].tolist() == [[0, 1, 5, 7], [50, 30, 60, 40], [50, 30, 60, 40], [0, 0, 2, 2]]
    assert len(image_set.targets[0]["area"]) == 4
    assert image_set.warnings == [
        "boxes clipped to their image: 2 (a/one.png)",
        "boxes dropped because they have no area: 4 (a/one.png)",
        "images kept although they have no objects: 1 (c.jpg)",
    ]


@pytest.mark.parametrize("size", [{"width": None, "height": None}, {"width": 0, "height": 0}])
def test_missing_size_is_read_from_the_image(folder, size):
    folder.add_image(5, "c.jpg", **size)
    assert folder.read().sizes == [(40, 60)] * 3


def test_image_of_another_size_and_image_turned_by_its_exif_data(folder):
    exif = Image.Exif()
    exif[0x112] = 6
    folder.add_image(5, "turned.jpg", width=40, height=60)
    Image.new("RGB", SIZE).save(folder.root / "turned.jpg", exif=exif)
    image_set = folder.read()
    assert image_set.sizes[1] == (60, 40) and image_set.read(1).shape == (3, 60, 40)
    folder.add_image(6, "other.jpg", width=50)
    with pytest.raises(UserError, match=r"1 image of another size than annotated: other.jpg \(60 x 40 .* 50 x 40\)\n"):
        folder.read()


def test_limit_reads_only_the_images_that_are_used(folder):
    for number in range(20, 26):
        folder.add_image(number, f"{number}.jpg")
        folder.add_object(number, 7, [1, 1, 5, 5])
    path = folder.write()
    image_set, total = read_image_set(path, None, limit=3)
    assert total == 8 and len(image_set) == 3 and len(image_set.image_ids) == 3
    for name in ("a/one.png", *(f"{number}.jpg" for number in range(20, 26))):
        if name not in image_set.names:
            (folder.root / name).unlink()
    assert read_image_set(path, None, limit=3)[0].names == image_set.names
    train, test = load_image_sets(dataset="coco", train_annotations=None, test_annotations=path, limit=3)
    assert len(train) == 0 and test.warnings == ["--limit 3: only 3 of 8 test images are used"]


# ---- Training and test set ----


def test_classes_of_the_test_set_are_matched_by_name(folder, tmp_path):
    other = Folder(tmp_path / "test")
    other.content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    other.add_image(1, "b/two.jpg")
    Image.new("RGB", SIZE).save(other.root / "b/two.jpg")  # another image of the same name
    other.add_object(1, 1, [1, 1, 5, 5])
    files = {"train_annotations": folder.write(), "test_annotations": other.write()}
    train, test = load_image_sets(dataset="coco", **files)
    assert train.classes == test.classes == ["cat", "dog"] and test.category_ids == [2, 1]
    assert test.targets[0]["labels"].tolist() == [2] and not train.warnings
    empty = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    found = Detections(np.array([[1.0, 2, 4, 6]]), np.array([2]), np.array([0.5]))
    (row,) = format_predictions(test.image_ids, [found], test.classes, test.category_ids)
    assert row == {"image_id": 1, "category_id": 1, "category": "dog", "bbox": [1, 2, 3, 4], "score": 0.5}
    assert format_predictions(test.image_ids, [empty], test.classes, test.category_ids) == []
    other.content["categories"][1]["name"] = "cow"
    other.write()
    with pytest.raises(UserError, match=r"different classes: only .*/all.json has cat, only .*test/all.json has cow\n"):
        load_image_sets(dataset="coco", **files)


def test_images_in_both_sets_are_reported(folder):
    path = folder.write()
    train, _ = load_image_sets(dataset="coco", train_annotations=path, test_annotations=path)
    assert train.warnings == [
        "the training and the test set share 2 images, so the results are too high: a/one.png; b/two.jpg"
    ]


# ---- What is refused ----


def change(*path: str | int, to: object = None) -> Callable:
    """Return a function that sets the value at a path of keys in an annotation file; to None: deletes it."""

    def apply(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        if to is None:
            del content[path[-1]]
        else:
            content[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    "edit, message",
    [
        (change("annotations"), "no list annotations in the file\ngive an annotation file for object detection"),
        (change("categories"), "no list categories in the file"),  # a file of captions
        (change("images", to=[]), "the list images is empty"),
        (change("categories", to=[]), "the list categories is empty"),
        (change("images", 0, to=5), "not an object in braces in 1 of the images: 5\n"),
        (change("images", 0, "id", to=4), "id in images occurs more than once: 4\nmake them unique"),
        (change("images", 0, "id", to="9"), 'id is not a whole number in 1 of the images: {"id": "9", '),
        (change("images", 0, "file_name"), 'no file_name in 1 of the images: {"id": 9, '),
        (change("images", 0, "file_name", to="a/one.png"), "file_name in images occurs more than once: a/one.png"),
        (change("images", 0, "width", to="60"), "width or height is not a number in 1 of the images: "),
        (change("categories", 0, "id", to=3), "id in categories occurs more than once: 3"),
        (change("categories", 0, "name", to="cat"), "name in categories occurs more than once: cat"),
        (change("categories", 0, "name"), 'no name in 1 of the categories: {"id": 7}'),
        (change("annotations", 0, "id", to=2), "id in annotations occurs more than once: 2"),
        (change("annotations", 0, "image_id", to=5), "image_id is not in the list images in 1 of the annot"),
        (change("annotations", 0, "category_id", to=1), "category_id is not in the list categories in 1"),
        (
            change("annotations", 0, "category_id", to=[7]),
            "category_id is not in the list categories in 1",
        ),
        (
            change("annotations", 0, "bbox"),
            "no bbox in 1 of the annotations: .*\ngive an annotation file",
        ),
        (change("annotations", 0, "bbox", to=[1, 2, 3]), "bbox is not four numbers in 1 of the annotations: "),
        (change("annotations", 0, "bbox", to=[1, 2, 3, "4"]), "bbox is not four numbers in 1 of the annotations: "),
        (
            change("annotations", 0, "bbox", to=[1, 2, 3, float("nan")]),
            "bbox is not four numbers in 1 of the annotations: ",
        ),
        (change("annotations", 0, "bbox", to=[1, 2, 3, 10**400]), "bbox is not four numbers in 1 of the annotations: "),
        (change("images", 0, "file_name", to="a" * 300), "1 of 2 images missing in .*: a{300}\nset --images to the"),
        (change("annotations", 0, "area", to="big"), "area is not a number in 1 of the annotations: "),
        (change("annotations", 0, "iscrowd", to=2), "iscrowd is not 0 or 1 in 1 of the annotations: "),
    ],
)
def test_broken_file_error_names_the_entries(folder, edit, message):
    edit(folder.content)
    with pytest.raises(UserError, match=f"all.json: {message}"):
        folder.read()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a JSON file"),
        ('{"images": [', "not a JSON file"),
        ("<annotation></annotation>", "not a JSON file"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]', "a list, such as the detections of --predictions"),
        ("3", "no list images and no list categories and no list annotations"),
    ],
)
def test_file_that_is_not_in_coco_format_is_refused(tmp_path, text, message):
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(UserError, match=rf"all.json: {message}.*\ngive an annotation file for object detection"):
        read_coco(tmp_path / "all.json")
    with pytest.raises(UserError, match="none.json: No such file"):
        read_coco(tmp_path / "none.json")


def test_broken_image_error_names_the_image(folder):
    folder.write()
    (folder.root / "b/two.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="two.jpg: not an image\nreplace it, or remove b/two.jpg from the data set"):
        folder.read()


# ---- Figures ----


def make_random_folder(root: Path, images: int = 12) -> Folder:
    """Make annotations with crowds and with areas that are smaller than those of the boxes, as those of masks are."""
    draw, made = np.random.default_rng(0), Folder(root)
    made.content["categories"] = [{"id": number, "name": f"class {number}"} for number in (2, 5, 90)]
    for image_id in draw.permutation(images).tolist():
        made.add_image(image_id, f"{image_id}.png", width=None, height=None)
        Image.new("L", (200, 200)).save(root / f"{image_id}.png")
        for _ in range(draw.integers(0, 9)):
            (x, y), sides = draw.integers(0, 30, 2).tolist(), draw.choice([10, 34, 40, 140])
            width, height = (sides + draw.integers(0, 4, 2) / 4).tolist()
            area = width * height * draw.uniform(0.4, 1)
            category, crowd = int(draw.choice([2, 5, 90])), int(draw.random() < 0.2)
            made.add_object(image_id, category, [x, y, width, height], area=area, iscrowd=crowd)
    return made


def make_detections(image_set: DetectionSet) -> list[Detections]:
    """Make detections near the objects of each image, some within crowds, with equal scores among them."""
    draw, detections = np.random.default_rng(1), []
    for target in image_set.targets:
        source = draw.integers(0, max(len(target["labels"]), 1), 30 if len(target["labels"]) else 0)
        boxes = target["boxes"].numpy().astype(float)[source] + draw.normal(0, 3, (len(source), 4)).round()
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        detections.append(Detections(boxes, target["labels"].numpy()[source], draw.integers(1, 9, len(source)) / 8))
    return detections


def evaluate_with_pycocotools(annotations: str, predictions: list[dict]) -> list[float]:
    """Return the twelve figures of pycocotools on the annotation file as it is, by the example of the documentation."""
    pytest.importorskip("pycocotools")
    found, names = Path(annotations).with_name("found.json"), {}
    found.write_text(json.dumps(predictions))
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/detection_data.md").read_text(), re.S)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(example.replace("mine/val.json", annotations).replace("found.json", str(found)), names)
    return names["evaluation"].stats.tolist()


def test_figures_equal_those_of_pycocotools_on_the_annotation_file(tmp_path):
    path = make_random_folder(tmp_path).write()
    image_set, _ = read_image_set(path, None)
    assert any(target["difficult"].any() for target in image_set.targets) and not image_set.warnings[1:]
    detections = make_detections(image_set)
    rows = format_predictions(image_set.image_ids, detections, image_set.classes, image_set.category_ids)
    truths = [GroundTruth(*(one[key].numpy() for key in GroundTruth._fields)) for one in image_set.targets]
    areas = [one["area"].numpy() for one in image_set.targets]
    ours = list(coco_metrics(detections, truths, 3, areas=areas).values())
    assert ours == pytest.approx(evaluate_with_pycocotools(path, rows), abs=1e-13)
    assert all(0 < value < 1 for value in ours)
    by_boxes = list(coco_metrics(detections, truths, 3).values())
    assert by_boxes[:3] == ours[:3] and by_boxes[3:6] != ours[3:6], "areas decide about the sizes only"


def convert_voc(data_dir: Path, name: str, path: Path) -> str:
    """Write a set of VOC in COCO format: difficult objects become crowds. Returns the file's name."""
    voc, content = read_sets(data_dir, [name]), {"images": [], "annotations": []}
    for number, (file, (height, width), target) in enumerate(zip(voc.images, voc.sizes, voc.targets, strict=True)):
        content["images"].append({"id": number, "file_name": file.name, "width": width, "height": height})
        for box, label, difficult in zip(*(target[key].tolist() for key in GroundTruth._fields), strict=True):
            sides = [box[2] - box[0], box[3] - box[1]]
            row = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": label}
            row |= {"bbox": box[:2] + sides, "area": sides[0] * sides[1], "iscrowd": int(difficult)}
            content["annotations"].append(row)
    content["categories"] = [{"id": label, "name": name} for label, name in enumerate(voc.classes, 1)]
    path.write_text(json.dumps(content))
    return str(path)


def test_voc_in_coco_format_is_the_same_data(tmp_path):
    from detection.shape_scenes import draw_scenes, export_voc

    export_voc(tmp_path, {"trainval": draw_scenes(8, size=48, seed=2)})
    path = convert_voc(tmp_path, "2007_trainval", tmp_path / "all.json")
    voc = read_sets(tmp_path, ["2007_trainval"])
    coco, _ = read_image_set(path, str(tmp_path / "VOCdevkit/VOC2007/JPEGImages"))
    assert coco.classes == voc.classes and coco.sizes == voc.sizes and coco.images == voc.images
    for one, other in zip(coco.targets, voc.targets, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in GroundTruth._fields)
    assert any(target["difficult"].any() for target in coco.targets)


# ---- detect.py ----


@pytest.mark.parametrize(
    "words, message",
    [
        ("--train_annotations a.json", "--train_annotations: only for data in COCO format; add --dataset coco"),
        ("--dataset coco", "give --train_annotations FILE.json and --test_annotations FILE.json"),
        (
            "--dataset coco --train_annotations a.json",
            "--dataset coco: give --test_annotations FILE.json, an",
        ),
        ("{} --images a b c", "--images: 3 folders; give one, or that of the training and that of the test images"),
        ("{} --download", "--download: not for --dataset coco; unpack"),
        ("{} --use_difficult", "--use_difficult: COCO has no difficult objects; its crowd regions"),
        ("{} --coco_count_difficult", "--coco_count_difficult: COCO has no difficult objects"),
    ],
)
def test_contradicting_options_are_usage_errors(words, message, capsys):
    files = "--dataset coco --train_annotations a.json --test_annotations b.json"
    with pytest.raises(SystemExit) as exit_info:
        detect.main(["--pretrained", *words.format(files).split()])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_recipe_of_coco_never_trains_on_crowds():
    words = "--dataset coco --train_annotations a.json --test_annotations b.json --pretrained --recipe".split()
    for recipe, steps in (("auto", 90_000), ("moco24k", 24_000), ("coco1x", 90_000)):
        parser = build_parser()
        options = resolve_options(parser, parser.read([*words, recipe]), {})
        assert options["use_difficult"] is False and scale_schedule(options, 7393)["iters"] == steps


def test_detector_is_trained_and_evaluated(folder, tmp_path, small_detector, capsys):
    for number in range(3):
        folder.add_image(20 + number, f"{number}.jpg")
        folder.add_object(20 + number, 7, [5, 5, 30, 30])
    path, words = folder.write(), "--min_size 32 --max_size 64 --rois 8 --proposals 20 10 --amp off --device cpu "
    words = (words + "--schedule 9 --warmup_iters 2").split()
    torch.save(build_model("imagenet_resnet18", 10, 64).state_dict(), tmp_path / "backbone.pt")
    data = ["--dataset", "coco", "--train_annotations", path, "--test_annotations", path]
    output = ["--root_dir", str(tmp_path), "--workers", "0", "--score_thr", "0", "--name"]
    start = ["--backbone_checkpoint", str(tmp_path / "backbone.pt"), "--batch_size", "2"]
    trained = detect.main([*data, *start, *words, "--iters", "3", *output, "run"])
    out = capsys.readouterr().out
    assert "5 training images, 5 objects (0 crowd)" in out and "5 test images, 6 objects (1 crowd)" in out
    assert "without crowd objects" in out and "crowd objects: VOC: ignored; COCO: ignored\n" in out
    assert out.index("COCO AP ") < out.index("VOC07 mAP@0.5 (11-point)") and "last epoch: COCO AP" in out
    run, found = tmp_path / "coco" / "frcnn" / "run", tmp_path / "found.json"
    detect.main([*data, *start, *words, "--iters", "2", *output, "stopped"])
    detect.main(["--checkpoint", str(run.parent / "stopped"), "--iters", "3"])
    one, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (run, run.parent / "stopped"))
    assert same_state(one["model"], other["model"]) and one["classes"] == ["cat", "dog"]

    words = ["--frcnn_checkpoint", str(run / "last.pt"), "--evaluate", "--predictions", str(found), "--device", "cpu"]
    evaluated = detect.main([*words, *output, "evaluation", "--limit", "0"])
    assert evaluated["figures"] == trained["figures"] and evaluated["test_set"] == "all.json"
    rows = json.loads(found.read_text())
    assert {row["image_id"] for row in rows} <= {4, 9, 20, 21, 22} and {row["category_id"] for row in rows} <= {3, 7}
    for entry in folder.content["annotations"]:  # pycocotools needs an area
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    expected = evaluate_with_pycocotools(folder.write(), rows)
    ours = [evaluated["figures"][f"COCO {name}"] for name in ("AP", "AP50", "AP75", "AP small", "AP medium")]
    assert [-100 if one is None else one for one in ours] == pytest.approx(
        [100 * one for one in expected[:5]], abs=1e-11
    )
