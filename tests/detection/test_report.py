"""Results of a detector: what is printed, saved and drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection import metrics, report
from detection.dataset import DetectionSet
from detection.metrics import Detections, GroundTruth
from detection.shape_scenes import draw_scenes
from detection.voc import CLASSES, read_sets
from engine.drawing.boxes import DrawnBox

SETTINGS = {"score_thr": 0.05, "nms_thr": 0.5, "max_dets": 100, "min_size": (480, 600), "max_size": 1000}
VOC_VALUES = {  # distinct fractions, as voc_metrics() returns them
    "map07": 0.7671,
    "map": 0.782,
    "ap07_50_95": 0.4821,
    "ap_50_95": 0.4902,
    "ap07_75": 0.521,
    "ap_75": 0.5305,
}
COCO_VALUES = {"AP": 0.485, "AP50": 0.779, "AP75": 0.528, "AP_small": None, "AP_medium": 0.353, "AP_large": 0.552}
COCO_VALUES |= {"AR_1": 0.401, "AR_10": 0.554, "AR_100": 0.576, "AR_small": None, "AR_medium": 0.457, "AR_large": 0.648}


def make_result(classes: list[str] = CLASSES, images: int = 4952, test_set: str = "2007_test", **more) -> dict:
    """Summarize made-up metrics: 10 objects per class, none of the second, only difficult ones of the third."""
    table = {}
    for number, name in enumerate(classes):
        row = {"objects": 10, "difficult": 2, "detections": 1234, "ap07": number / 30, "ap": (number + 0.5) / 30}
        table[name] = row | {"ap07_50_95": number / 60, "ap_50_95": number / 50}
    for name, difficult in zip(classes[1:3], (0, 4), strict=True):
        empty = {"objects": 0, "difficult": difficult, "detections": 0}
        table[name] = empty | dict.fromkeys(("ap07", "ap", "ap07_50_95", "ap_50_95"))
    voc = VOC_VALUES | {"classes": table, "curves": {name: {"precision": [], "recall": []} for name in classes}}
    return report.summarize(voc, COCO_VALUES, images, dataset="voc", test_set=test_set, **SETTINGS, **more)


def make_detections(image_set: DetectionSet, seed: int = 0) -> tuple[list[Detections], list[GroundTruth]]:
    """Make detections near most of the objects, and two random ones per image."""
    draws, detections, truths = np.random.default_rng(seed), [], []
    for target, (height, width) in zip(image_set.targets, image_set.sizes, strict=True):
        truth = GroundTruth(*(target[key].numpy() for key in ("boxes", "labels", "difficult")))
        kept = draws.random(len(truth.boxes)) < 0.8
        corner = draws.random((2, 2)) * (width / 2, height / 2)
        boxes = np.concatenate(
            [truth.boxes[kept] + draws.normal(0, 3, (kept.sum(), 4)), np.hstack([corner, corner + 20])]
        )
        labels = np.concatenate([truth.labels[kept], draws.integers(1, len(image_set.classes) + 1, 2)])
        detections.append(Detections(boxes.astype("f4"), labels, draws.random(len(labels)).astype("f4")))
        truths.append(truth)
    return detections, truths


def count_colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(2**24))


# ---- Metrics ----


def test_metrics_are_in_percent_under_full_names():
    figures = make_result()["figures"]
    assert figures == pytest.approx(
        {
            "VOC07 mAP@0.5 (11-point)": 76.71,
            "VOC mAP@0.5 (area)": 78.2,
            "VOC AP@[.5:.95] (11-point)": 48.21,
            "VOC AP50 (11-point)": 76.71,
            "VOC AP75 (11-point)": 52.1,
            "VOC AP@[.5:.95] (area)": 49.02,
            "VOC AP50 (area)": 78.2,
            "VOC AP75 (area)": 53.05,
            "COCO AP": 48.5,
            "COCO AP50": 77.9,
            "COCO AP75": 52.8,
            "COCO AP small": None,
            "COCO AP medium": 35.3,
            "COCO AP large": 55.2,
            "COCO AR@1": 40.1,
            "COCO AR@10": 55.4,
            "COCO AR@100": 57.6,
            "COCO AR small": None,
            "COCO AR medium": 45.7,
            "COCO AR large": 64.8,
        }
    )


def test_summary_is_strict_json_with_settings_and_protocol_but_without_curves():
    image_set = draw_scenes(6)
    detections, truths = make_detections(image_set)
    voc, coco = (
        metrics.voc_metrics(detections, truths, image_set.classes),
        metrics.coco_metrics(detections, truths, 10, count_difficult=True),
    )
    result = report.summarize(
        voc, coco, 6, dataset="shapes", test_set="2007_test", **SETTINGS, coco_count_difficult=True
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "curves" not in json.dumps(result) and result["unit"] == "percent"
    assert result["settings"] == SETTINGS | {"coco_count_difficult": True, "min_size": 600}
    assert result["protocol"]["difficult objects in COCO's figures"] == "counted like all others"
    assert (
        result["figures"][report.MAIN_METRIC] == 100 * voc["map07"]
        and result["figures"]["COCO AR@10"] == 100 * coco["AR_10"]
    )
    name, row = max(voc["classes"].items(), key=lambda item: item[1]["ap"] or 0)
    assert row["ap"] > 0 and result["classes"][name] == {
        "objects": row["objects"],
        "difficult": row["difficult"],
        "detections": row["detections"],
        "AP@0.5 (11-point)": 100 * row["ap07"],
        "AP@0.5 (area)": 100 * row["ap"],
        "AP@[.5:.95] (11-point)": 100 * row["ap07_50_95"],
        "AP@[.5:.95] (area)": 100 * row["ap_50_95"],
    }


def test_printed_lines_have_order_and_names():
    lines = report.format_result(make_result())
    assert lines[:2] == [
        "VOC07 mAP@0.5 (11-point)  76.71  <- the number to compare with papers",
        "VOC mAP@0.5 (area)        78.20",
    ]
    assert lines[2].split() == "class objects difficult detections AP (11-point) AP (area)".split()
    table = [line.split() for line in lines[3:23]]
    assert [row[0] for row in table] == CLASSES
    assert table[3] == ["boat", "10", "2", "1,234", "10.00", "11.67"]
    assert table[1] == ["bicycle", "0", "0", "0", "-", "-"]
    assert lines[23].startswith("excluded from the means") and lines[23].endswith(": bicycle; bird")
    assert [line.split("  ")[0] for line in lines[24:28]] == [
        "VOC AP@[.5:.95] (11-point)",
        "VOC AP@[.5:.95] (area)",
        "COCO AP",
        "COCO AR@1",
    ]
    assert lines[24].split()[2:] == "(11-point) 48.21 AP50 76.71 AP75 52.10".split() + (
        "<- as in papers on self-supervised learning".split()
    )
    assert lines[25].split()[2:] == "(area) 49.02 AP50 78.20 AP75 53.05".split()
    assert lines[26].split()[1:] == "AP 48.50 AP50 77.90 AP75 52.80 small - medium 35.30 large 55.20".split()
    assert lines[27].split()[1:] == "AR@1 40.10 AR@10 55.40 AR@100 57.60 small - medium 45.70 large 64.80".split()
    assert "COCO: ignored (treated as crowds)" in lines[28] and "4,952 images" in lines[30]
    assert lines[29].endswith("score above 0.05, NMS at IoU 0.5; shorter side 600, longer side up to 1000 pixels")
    assert len(lines) == 31 and max(map(len, lines)) <= 120


def test_line_on_difficult_objects_depends_on_coco_count_difficult():
    assert any("COCO: counted" in line for line in report.format_result(make_result(coco_count_difficult=True)))


@pytest.mark.parametrize(
    "given, at, more",
    [
        ({}, "(11-point)", ""),
        ({"images": 170}, "(11-point)", ", which use all 4,952 images of 2007_test"),
        ({"test_set": "2012_val", "images": 5823}, "(area)", ""),
        ({"test_set": "shapes"}, None, None),
        ({"classes": ["a", "b", "c"]}, None, None),  # a devkit with custom classes
    ],
)
def test_marked_metric_follows_the_rule_of_the_test_set(given, at, more):
    marked = [line for line in report.format_result(make_result(**given)) if "<-" in line]
    if at is None:
        assert not marked
    else:
        assert len(marked) == 2 and all(at in line for line in marked)
        assert marked[0].endswith(f"<- the number to compare with papers{more}")


def test_missing_metrics_are_printed_as_dashes():
    voc = metrics.voc_metrics([], [], CLASSES)
    result = report.summarize(voc, metrics.coco_metrics([], [], 20), 0, dataset="voc", test_set="2007_test", **SETTINGS)
    lines = report.format_result(result)
    assert lines[0].split()[2:4] == ["(11-point)", "-"]
    assert json.loads(json.dumps(result, allow_nan=False))["figures"]["COCO AP"] is None


# ---- Predictions ----


def test_predictions_have_full_precision():
    detections = Detections(np.array([[1.1, 2.0, 11.0, 7.5]], "f4"), np.array([2]), np.array([0.1], "f4"))
    empty = Detections(np.empty((0, 4)), np.empty(0, int), np.empty(0))
    rows = json.loads(
        json.dumps(report.format_predictions(["a", "b"], [empty, detections], ["cat", "dog"]), allow_nan=False)
    )
    left = float(np.float32(1.1))
    assert rows == [
        {
            "image_id": "b",
            "category_id": 2,
            "category": "dog",
            "score": float(np.float32(0.1)),
            "bbox": [left, 2.0, 11.0 - left, 5.5],
        }
    ]


def test_predictions_require_a_name_per_image():
    with pytest.raises(ValueError):
        report.format_predictions(["a"], [], CLASSES)


def test_pycocotools_reads_predictions():
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    image_set = draw_scenes(10)
    detections, truths = make_detections(image_set)
    objects = coco.COCO()
    annotations = [
        {"image_id": name, "category_id": int(label), "iscrowd": int(hard), "area": metrics.box_area(box[None])[0]}
        | {"bbox": [*box[:2], *(box[2:] - box[:2])]}
        for name, truth in zip(image_set.names, truths, strict=True)
        for box, label, hard in zip(truth.boxes.astype(float), truth.labels, truth.difficult, strict=True)
    ]
    objects.dataset = {
        "images": [{"id": name} for name in image_set.names],
        "categories": [{"id": label} for label in range(1, 11)],
        "annotations": [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)],
    }
    objects.createIndex()
    measured = evaluation.COCOeval(
        objects, objects.loadRes(report.format_predictions(image_set.names, detections, image_set.classes)), "bbox"
    )
    for step in (measured.evaluate, measured.accumulate, measured.summarize):
        step()
    ours = metrics.coco_metrics(detections, truths, 10)
    assert ours["AP"] > 0.05 and [ours["AP"], ours["AR_100"]] == pytest.approx([measured.stats[0], measured.stats[8]])


# ---- Plots and images ----


def test_training_curves_show_the_logged_columns(tmp_path, recwarn):
    history = [{"epoch": epoch, "loss": 2 / epoch, "loss_classifier": 1 / epoch, "lr": 0.1} for epoch in (1, 2, 3)]
    report.draw_training_curves(tmp_path / "loss.png", history, "a")
    history[2] |= {"map07": 70.0, "map": 71.0, "coco_ap": 30.0, "ema_map07": None}
    report.draw_training_curves(tmp_path / "both.png", history, "a")
    report.draw_training_curves(tmp_path / "none.png", [{"epoch": 1, "loss": None}], "a")
    assert not recwarn.list
    assert count_colours(tmp_path / "both.png") > 100
    with Image.open(tmp_path / "loss.png") as one, Image.open(tmp_path / "both.png") as two:
        assert 1.9 < two.width / one.width < 2.1
    assert not (tmp_path / "none.png").exists()


def test_each_class_with_objects_has_a_panel(tmp_path):
    image_set = draw_scenes(8)
    voc = metrics.voc_metrics(*make_detections(image_set), [*image_set.classes, "none of $these_"])
    report.draw_precision_recall_curves(tmp_path / "curves.png", voc)
    assert count_colours(tmp_path / "curves.png") > 100
    panels, title = report.build_precision_recall_panels(voc, max_panels=4)
    table = {name: row for name, row in voc["classes"].items() if row["objects"]}
    most = sorted((row["objects"] for row in table.values()), reverse=True)[:4]
    names = [heading.split()[0] for heading, *_ in panels]
    assert sorted((table[name]["objects"] for name in names), reverse=True) == most
    assert f"the 4 of {len(table)} classes with the most objects" in title
    row, curve = table[names[0]], voc["curves"][names[0]]
    heading = f"{names[0]}  {100 * row['ap07']:.1f} / {100 * row['ap']:.1f}"
    assert panels[0] == (heading, curve["recall"], curve["precision"])


def test_no_curves_are_drawn_without_objects(tmp_path):
    report.draw_precision_recall_curves(tmp_path / "curves.png", metrics.voc_metrics([], [], CLASSES))
    assert not (tmp_path / "curves.png").exists()


def test_drawn_images_are_spread_over_the_set(tmp_path):
    image_set = draw_scenes(10)
    read, shown = image_set.read, []
    image_set.read = lambda index: shown.append(index) or read(index)
    detections, truths = make_detections(image_set)
    pages = report.draw_detections(tmp_path / "vis", image_set, detections, truths, count=6)
    assert pages == [tmp_path / "vis" / "page_01.png", tmp_path / "vis" / "page_02.png"]
    assert shown == [0, 2, 4, 5, 7, 9] and count_colours(pages[0]) > 1000
    assert (
        len(report.draw_detections(tmp_path, image_set, detections, truths, count=99, dpi=30)) == 3 and len(shown) == 16
    )
    assert report.draw_detections(tmp_path, image_set, detections, truths, count=0) == []


def summarize_boxes(drawn: list[DrawnBox]) -> list[tuple]:
    return [(one.text, one.dashed, one.error, one.box) for one in drawn]


def test_errors_are_marked():
    """Cats at 0, 40 and (difficult) 80, a dog at 120. The first cat is detected twice, the dog as a cat."""
    at = [[x, 10.0, x + 30.0, 40.0] for x in (0.0, 40.0, 80.0, 120.0)]
    truth = GroundTruth(np.array(at), np.array([1, 1, 1, 2]), np.array([False, False, True, False]))
    boxes = np.array([at[0], at[0], at[2], at[3], at[1]])
    detections = Detections(boxes, np.array([1, 1, 1, 1, 1]), np.array([0.7, 0.9, 0.6, 0.8, 0.4]))
    left, right, counts = report.mark_errors(detections, truth, ["cat", "dog"], threshold=0.5)
    assert summarize_boxes(left) == [
        ("cat", False, False, at[0]),
        ("cat", False, True, at[1]),
        ("cat", True, False, at[2]),
        ("dog", False, True, at[3]),
    ]
    assert summarize_boxes(right) == [  # the most confident one comes last, so that it is drawn on top
        ("cat 0.60", True, False, at[2]),
        ("cat 0.70", False, True, at[0]),
        ("cat 0.80", False, True, at[3]),
        ("cat 0.90", False, False, at[0]),
    ]
    assert counts == "detected 1 of 3, false positives: 2"
    left, _, _ = report.mark_errors(detections, truth, ["cat", "dog"], threshold=0.4)  # a score of 0.4 is included
    assert summarize_boxes(left)[1] == ("cat", False, False, at[1])


def test_detected_object_is_the_one_with_the_highest_overlap():
    truth = GroundTruth(np.array([[0.0, 0.0, 40.0, 40.0], [0.0, 8.0, 40.0, 48.0]]), np.array([1, 1]), np.zeros(2, bool))
    detections = Detections(truth.boxes[1:] + 1, np.array([1]), np.array([0.9]))
    left, _, _ = report.mark_errors(detections, truth, ["cat"], threshold=0.5)
    assert [box.error for box in left] == [True, False]


def test_images_with_nan_are_drawn(tmp_path):
    image_set = draw_scenes(2)
    images = [torch.full((3, *size), float("nan")) for size in image_set.sizes]
    report.draw_batches(
        tmp_path / "a.png",
        [{"names": image_set.names, "images": images, "targets": image_set.targets}],
        image_set.classes,
    )
    assert count_colours(tmp_path / "a.png") > 100


def test_draw_detections_rejects_another_number_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"one entry per image \(1\), got 0 and 0"):
        report.draw_detections(tmp_path, draw_scenes(1).take([0]), [], [], count=1)


def test_class_colours_differ_and_none_is_red():
    colours = np.array(report.choose_class_colours(20))
    apart = np.abs(colours[:, None] - colours).sum(-1) + 9 * np.eye(20)
    assert apart.min() > 0.1 and report.choose_class_colours(5) == report.choose_class_colours(20)[:5]
    red, green, blue = colours.T
    assert not ((red > 0.6) & (np.maximum(green, blue) < 0.35)).any()


@pytest.mark.data
def test_real_images_are_drawn(tmp_path, real_data):
    image_set = read_sets(real_data / "VOCdevkit", ["2007_test"]).take(range(2))
    detections, truths = make_detections(image_set)
    (page,) = report.draw_detections(tmp_path, image_set, detections, truths, count=2)
    assert count_colours(page) > 10_000
