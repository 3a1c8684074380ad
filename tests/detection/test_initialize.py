"""Initial weights of a detector: classes are matched by name, and what a file was made with is its default."""

import re
from argparse import Namespace

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from detection.faster_rcnn import DetectorConfig, build_detector
from detection.initialize import InitialWeights, build_initialized_detector, match_classes, read_detector

HALF = (0.5, 0.5, 0.5)
CONFIG = DetectorConfig(HALF, HALF, min_size=(64,), max_size=128, rois=16, proposals=(20, 10))


def make_initial(classes: list[str], count: int = 0) -> InitialWeights:
    """Return a detector for these classes, or for `count` classes without names."""
    count = count or len(classes)
    weights = build_detector("resnet18", count, CONFIG).state_dict()
    return InitialWeights(
        "resnet18", HALF, HALF, weights, True, "a.pt", classes, num_classes=count, options={"neck": "fpn"}
    )


# ---- Classes ----


def test_predictor_of_another_detector_is_taken_over_by_name():
    initial = make_initial(["cat", "dog", "gnu"])
    options = {"stem": "embed", "norm": "frozen", "trainable_layers": 3, "evaluate": False}
    detector, notes = build_initialized_detector(initial, ["gnu", "cow", "cat"], CONFIG, **options)
    saved = initial.weights["roi_heads.box_predictor.cls_score.weight"]
    rows = detector.roi_heads.box_predictor.cls_score.weight
    assert [bool((row == saved).all(1).any()) for row in rows] == [True, True, False, True]
    assert torch.equal(rows[[0, 1, 3]], saved[[0, 3, 1]])
    assert notes == [
        "a.pt: the predictor is taken over for 2 of the 3 classes of this data, by name; that of cow starts from "
        "random weights"
    ]


@pytest.mark.parametrize(
    "saved, count, rows, note",
    [
        (["cat", "dog"], 2, {0: 0, 1: 1, 2: 2}, None),
        (["dog", "cat"], 2, {0: 0, 1: 2, 2: 1}, "for 2 of the 2 classes of this data, by name"),
        (
            ["gnu", "cow"],
            2,
            {},
            "a.pt has 2 other classes: the predictor of the 2 classes of this data starts from random",
        ),
        ([], 2, {0: 0, 1: 1, 2: 2}, "a.pt does not name its classes; .* in the same order \\(cat; dog\\)"),
        ([], 7, {}, "a.pt has 7 classes without names: the predictor of the 2 classes of this data starts from random"),
    ],
)
def test_classes_are_matched_by_name(saved, count, rows, note):
    initial = InitialWeights("resnet18", HALF, HALF, path="a.pt", classes=saved, num_classes=count)
    found, notes = match_classes(initial, ["cat", "dog"])
    assert found == rows and len(notes) == (note is not None)
    assert not notes or re.search(note, notes[0])


# ---- What a file was made with ----


def save_detector(path, config: dict | None = None) -> str:
    """Save a detector as torchvision's reference script does or, with the options of its run, as ours."""
    with torch.device("meta"):
        shapes = build_detector("resnet18", 2, CONFIG).state_dict()
    weights = {key: torch.zeros(()).expand(value.shape) for key, value in shapes.items()}  # a small file
    if config:
        more = {"format": 2, "kind": "detector", "config": config, "classes": ["cat", "dog"], "mean": HALF, "std": HALF}
        torch.save({"model": weights, **more}, path)
    else:
        torch.save(
            {"model": weights, "optimizer": {}, "lr_scheduler": {}, "args": Namespace(lr=0.02), "epoch": 25}, path
        )
    return str(path)


def test_a_file_of_torchvision_s_reference_script_is_evaluated_at_its_size(tmp_path):
    initial = read_detector(save_detector(tmp_path / "model_25.pth"))
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert initial.options["min_size"] == list(theirs.transform.min_size) == [800]
    assert initial.options["max_size"] == theirs.transform.max_size == 1333
    kept = theirs.rpn.pre_nms_top_n(), theirs.rpn.post_nms_top_n()  # in training mode
    assert kept == (initial.options["proposals"][0],) * 2
    kept = theirs.eval().rpn.pre_nms_top_n(), theirs.rpn.post_nms_top_n()
    assert kept == (initial.options["proposals"][1],) * 2


def test_a_file_of_ours_is_evaluated_with_its_settings(tmp_path):
    recorded = {"neck": "fpn", "min_size": [320, 400], "max_size": 500, "proposals": [90, 80], "score_thr": 0.3}
    recorded |= {"nms_thr": 0.4, "max_dets": 7, "coco_count_difficult": True}
    data = {"dataset": "voc", "data_dir": "there", "test_set": "2007_val"}
    initial = read_detector(save_detector(tmp_path / "last.pt", recorded | data))
    assert initial.options == recorded and initial.data == data
