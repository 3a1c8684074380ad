import csv
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import box_iou

from engine.data.annotation_files import BoxAnnotation
from engine.data.annotations import find_boxes
from engine.data.datasets import load_evaluation
from engine.data.decode import decode_into
from engine.data.image_set import STATISTICS
from engine.data.views import CenterCrop, SquashedView
from evaluation.context import EvalSession
from evaluation.localization import (
    compute_iou,
    compute_map_ious,
    draw_threshold_curves,
    list_thresholds,
    make_centre_box,
    project_boxes,
    scale_maps,
    score_fixed_boxes,
    score_localization,
    smooth_maps,
)
from evaluation.localization_task import build_map_function

SIZES = [(80, 48), (48, 80), (500, 375), (333, 501), (64, 64)]  # width, height
VIEWS = [CenterCrop(32, 32), CenterCrop(28, 32), CenterCrop(224, 256), SquashedView(32), SquashedView(257)]


def box_tensor(*boxes: tuple) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.long).view(-1, 4)


def make_map(height: int, width: int, *boxes: tuple) -> torch.Tensor:
    """Return a map (1, H, W) with boxes y1, y2, x1, x2 filled with a value."""
    heat = torch.zeros(1, height, width)
    for y1, y2, x1, x2, value in boxes:
        heat[0, y1:y2, x1:x2] = value
    return heat


# ---- Boxes in a view ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_box_lies_where_its_pixels_are_shown(tmp_path, view, size):
    width, height = size
    for share in ((0.3, 0.25, 0.62, 0.7), (0.1, 0.4, 0.9, 0.95), (0.0, 0.0, 0.55, 0.6)):
        x0, y0, x1, y1 = (round(part * side) for part, side in zip(share, (width, height) * 2, strict=True))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[y0:y1, x0:x1] = 255
        Image.fromarray(pixels).save(tmp_path / "box.png")
        shown = np.empty((view.size, view.size, 3), np.uint8)
        decode_into(shown, tmp_path / "box.png", view, None)
        rows, columns = (np.flatnonzero((shown[..., 0] > 127).any(axis)) for axis in (1, 0))
        expected = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
        found = view.place_box((x0, y0, x1, y1), width, height)
        assert all(isinstance(side, int) for side in found)
        assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) <= 1, (found, expected)


def test_a_box_is_clipped_and_rounded_towards_zero():
    view = CenterCrop(224, 256)  # 500 x 375 -> 341 x 256, cropped from column 58 and row 16
    assert view.plan(375, 500, None)[1] == (256, 341)
    assert view.place_box((0, 0, 500, 375), 500, 375) == (0, 224, 0, 224)
    assert view.place_box((150, 100, 250, 200), 500, 375) == (52, 120, 44, 112)  # 68.3, 136.5 - 16; 102.3, 170.5 - 58
    assert SquashedView(10).place_box((1, 1, 2, 2), 3, 3) == (3, 6, 3, 6)


def test_boxes_outside_the_crop_are_dropped():
    outside, kept = (0, 0, 20, 48), (10, 10, 60, 30)
    view = CenterCrop(32, 48)  # shows columns 24 to 56, rows 8 to 40
    y1, y2, x1, x2 = view.place_box(outside, 80, 48)
    assert x1 == x2 and 0 <= y1 <= y2 <= 32
    seen = project_boxes([BoxAnnotation([outside, kept], 80, 48), None, BoxAnnotation([outside], 80, 48)], view)
    assert seen[0].tolist() == [[2, 22, 0, 32]] and seen[1] is None
    assert seen[2].shape == (0, 4) and seen[2].dtype == torch.long


def test_the_centred_box():
    assert make_centre_box(32) == (4, 28, 4, 28) and make_centre_box((16, 32)) == (2, 14, 4, 28)
    assert make_centre_box((5, 7), 1.0) == (0, 5, 0, 7)


# ---- IoU ----


def test_boxes_apart_in_both_directions_do_not_overlap():
    assert compute_iou([(0, 10, 0, 10)], [(19, 29, 19, 29)]) == 0
    assert compute_iou([(0, 10, 0, 10)], [(0, 10, 5, 15)]) == 50 / 150
    heat = make_map(30, 30, (0, 10, 0, 10, 1.0))
    largest, best = compute_map_ious(heat, [box_tensor((19, 29, 19, 29))], [0.5])
    assert largest.tolist() == best.tolist() == [[0.0]]


def test_iou_equals_torchvision():
    corners = torch.randint(0, 30, (40, 4))
    boxes = torch.stack([corners[:, 0], corners[:, 0] + corners[:, 1] + 1, corners[:, 2], corners[:, 2] + 7], 1)
    one, other = boxes[:25], boxes[25:]
    theirs = box_iou(one[:, [2, 0, 3, 1]].double(), other[:, [2, 0, 3, 1]].double())
    np.testing.assert_allclose(compute_iou(one.numpy(), other.numpy()), theirs.numpy())


def test_two_regions_and_two_true_boxes():
    """The large weak region only appears below its own value; height and width differ."""
    heat = make_map(20, 30, (0, 10, 0, 10, 0.5), (12, 16, 20, 26, 1.0))
    truth = box_tensor((12, 16, 20, 26), (0, 10, 0, 20))
    largest, best = compute_map_ious(heat, [truth], [0.25, 0.75])
    torch.testing.assert_close(largest, torch.tensor([[0.5, 1.0]]))  # 100 of 200 pixels, then the strong one alone
    torch.testing.assert_close(best, torch.tensor([[1.0, 1.0]]))
    largest, best = compute_map_ious(heat, [truth[1:]], [0.25, 0.75])
    torch.testing.assert_close(best, torch.tensor([[0.5, 0.0]]))


def test_the_threshold_is_strict_and_rounded_down_to_a_level():
    heat = make_map(10, 10, (0, 10, 0, 10, 100 / 255), (2, 4, 2, 4, 200 / 255))
    inner = [box_tensor((2, 4, 2, 4))]
    largest, _ = compute_map_ious(heat, inner, [0.494, 0.4999, 0.5, 0.504, 0.9, 0.999, 1.0])
    # levels 98, 99, 100, 100, 180, 199, 200 of a maximum of 200
    torch.testing.assert_close(largest, torch.tensor([[0.04, 0.04, 1.0, 1.0, 1.0, 1.0, 0.0]]))


def test_the_first_contour_of_largest_area_is_used():
    heat = make_map(20, 20, (1, 5, 1, 5, 1.0), (10, 14, 10, 14, 1.0))
    contours = cv2.findContours((heat[0] > 0).numpy().astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    x, y, width, height = cv2.boundingRect(contours[0])
    assert compute_map_ious(heat, [box_tensor((y, y + height, x, x + width))], [0.5])[0] == 1
    heat = make_map(20, 20, (0, 18, 0, 1, 1.0), (5, 9, 5, 9, 1.0))  # the long line has more pixels, and no area
    assert compute_map_ious(heat, [box_tensor((5, 9, 5, 9))], [0.5])[0] == 1


def compute_with_opencv(heat: np.ndarray, truth: torch.Tensor, th: float) -> tuple[float, float]:
    """The protocol with OpenCV's functions, one contour at a time."""
    level = int(th * heat.max())
    contours = cv2.findContours((heat > level).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    boxes = [cv2.boundingRect(contour) for contour in contours]
    boxes = torch.tensor([(x, y, x + width, y + height) for x, y, width, height in boxes] or [(0, 0, 1, 1)])
    areas = [cv2.contourArea(contour) for contour in contours] or [0]
    best = box_iou(boxes.double(), truth[:, [2, 0, 3, 1]].double()).max(1).values
    return float(best[areas.index(max(areas))]), float(best.max())


def test_all_contours_at_once_equal_single_opencv_calls():
    coarse = torch.rand(6, 1, 9, 12)
    maps = torch.nn.functional.interpolate(coarse, (45, 60), mode="bicubic").squeeze(1).clamp(0, 1)
    maps[3:] *= torch.rand(3, 45, 60)  # thousands of specks
    boxes = [box_tensor((5, 30, 10, 40), (20, 45, 0, 25)), box_tensor((0, 45, 0, 60)), box_tensor((8, 14, 30, 37))] * 2
    thresholds = list_thresholds(0.333)
    largest, best = compute_map_ious(maps, boxes, thresholds)
    heats = (maps * 255).byte().numpy()
    expected = [
        [compute_with_opencv(heat, truth, th) for th in thresholds] for heat, truth in zip(heats, boxes, strict=True)
    ]
    torch.testing.assert_close(torch.stack([largest, best], 2), torch.tensor(expected))
    assert largest.dtype == best.dtype == torch.float32 and largest.std() > 0.01


def test_empty_maps_and_missing_boxes():
    maps = torch.zeros(5, 8, 8)
    maps[1:3] = 0.5
    maps[3] = torch.nan
    boxes = [box_tensor((0, 1, 0, 2)), box_tensor((0, 8, 0, 4)), None, box_tensor((0, 2, 0, 2)), box_tensor()]
    largest, best = compute_map_ious(maps, boxes, [0.0, 0.5])
    assert largest[:, 1].tolist()[:2] == [0.5, 0.5] and largest[3:].tolist() == [[0.25, 0.25], [0.0, 0.0]]
    assert largest[2].isnan().all() and best[2].isnan().all() and not largest[[0, 1, 3, 4]].isnan().any()
    assert compute_map_ious(maps[:0], [], [0.5])[0].shape == (0, 1)
    with pytest.raises(ValueError, match=r"\(5, 8, 8\), 1"):
        compute_map_ious(maps, boxes[:1], [0.5])


# ---- Maps ----


def test_smooth_maps_sums_neighbours():
    maps = torch.zeros(1, 4, 6)
    maps[0, 0, 0], maps[0, 2, 4] = 3.0, 1.0
    sums = smooth_maps(maps)
    assert sums[0, :2, :2].eq(3).all() and sums[0, 1:, 3:].eq(1).all() and sums.sum() == 4 * 3 + 9
    scaled = scale_maps(sums, (20, 30))
    assert scaled.shape == (1, 20, 30) and scaled.min() == 0 and scaled.max() == 1


def test_each_map_is_scaled_by_itself():
    maps = torch.stack([torch.arange(12.0).view(3, 4), -1e-3 * torch.arange(12.0).view(3, 4)])
    scaled = scale_maps(maps, 9)
    assert scaled.amin((1, 2)).tolist() == [0, 0] and scaled.amax((1, 2)).tolist() == [1, 1]
    torch.testing.assert_close(scaled[1], 1 - scaled[0])


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
def test_a_constant_map_becomes_zeros(value):
    assert torch.equal(scale_maps(torch.full((2, 7, 7), value), 100), torch.zeros(2, 100, 100))


# ---- Scores ----


def test_scores_by_hand():
    thresholds = [0.1, 0.2, 0.3]
    largest = torch.tensor([[0.5, 0.9, 0.1], [0.4, 0.8, 0.6], [0.9, 0.4, 0.4], [0.7, 0.6, 0.2], [torch.nan] * 3])
    correct = torch.tensor([True, False, True, False, True])
    scores = score_localization(largest, largest, correct, torch.zeros(5, dtype=torch.bool), thresholds, 0.1)
    assert scores["images"] == 4 and scores["held_images"] == 0
    assert (scores["top1_loc"], scores["gt_known"]) == (50, 75), "an IoU of exactly 0.5 is correct"
    assert (scores["best_top1_loc"], scores["best_top1_loc_th"]) == (50, 0.1)
    assert scores["gt_known_at"] == [75, 75, 25] and scores["thresholds"] == thresholds
    assert (scores["best_gt_known"], scores["best_gt_known_th"]) == (75, 0.1)
    assert scores["max_box_acc_v2"] is None and scores["max_box_acc_v2_at"] is None
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert score_localization(largest, largest, correct, correct, thresholds, 0.3)["gt_known"] == 25
    with pytest.raises(ValueError, match="th must be one of the thresholds, got 0.25"):
        score_localization(largest, largest, correct, correct, thresholds, 0.25)


def test_max_box_accuracy_chooses_thresholds_on_the_held_out_images():
    heldout = torch.tensor([True, True] + [False] * 6)
    best = torch.tensor([[0.75, 0.25], [0.75, 0.2]] + [[0.1, 0.75], [0.6, 0.75]] * 3)
    correct = torch.ones(8, dtype=torch.bool)
    scores = score_localization(best * 0, best, correct, heldout, [0.1, 0.2], 0.1)
    assert [row["th"] for row in scores["max_box_acc_v2_at"]] == [0.1] * 3, (
        "the other images, and all images, would choose 0.2"
    )
    assert [row["accuracy"] for row in scores["max_box_acc_v2_at"]] == [50, 50, 0]
    assert [row["overlap"] for row in scores["max_box_acc_v2_at"]] == [0.3, 0.5, 0.7]
    assert scores["max_box_acc_v2"] == pytest.approx(100 / 3)
    other = best.clone()
    other[2:] = torch.rand(6, 2)
    again = score_localization(best * 0, other, correct, heldout, [0.1, 0.2], 0.1)
    assert [row["th"] for row in again["max_box_acc_v2_at"]] == [0.1] * 3
    assert score_localization(best, best, correct, correct, [0.1, 0.2], 0.1)["max_box_acc_v2"] is None, (
        "no image is left to score"
    )


def test_each_iou_level_has_its_own_threshold():
    choosing = [[0.3, 0.2, 0.2], [0.2, 0.5, 0.2], [0.45, 0.5, 0.7]]
    scored = [[0.3, 0.2, 0.2], [0.2, 0.5, 0.2], [0.3, 0.5, 0.7]]
    best, heldout = torch.tensor(choosing + scored), torch.arange(6) < 3
    rows = score_localization(best, best, heldout, heldout, [0.1, 0.2, 0.3], 0.1)["max_box_acc_v2_at"]
    assert [row["th"] for row in rows] == [0.1, 0.2, 0.3]
    assert [round(row["accuracy"]) for row in rows] == [67, 67, 33], "an IoU of exactly 0.3 or 0.7 counts"


def test_without_boxes_every_score_is_none():
    nothing = torch.full((3, 2), torch.nan)
    flags = torch.tensor([True, False, True])
    scores = score_localization(nothing, nothing, flags, flags, [0.1, 0.2], 0.2)
    assert (scores.pop("images"), scores.pop("held_images"), scores.pop("th")) == (0, 0, 0.2)
    assert len(scores) == 10 and set(scores.values()) == {None}
    axes = Figure().subplots()
    draw_threshold_curves(axes, [("nothing", scores)])
    assert not axes.lines
    assert score_fixed_boxes([None], 32) == {"images": 0, "centre": None, "whole": None}


def test_baselines_by_hand():
    boxes = [box_tensor((4, 28, 4, 28)), None, box_tensor((0, 16, 0, 32)), box_tensor((0, 2, 0, 2), (0, 31, 0, 32))]
    boxes += [box_tensor()]  # outside the crop: counts as a miss
    assert score_fixed_boxes(boxes, 32) == {"images": 4, "centre": 50, "whole": 75}
    assert score_fixed_boxes([box_tensor((0, 8, 0, 16))], (8, 32))["whole"] == 100


def test_the_figure_has_a_line_for_each_classifier():
    largest = torch.rand(20, 3)
    flags = torch.arange(20) % 2 == 0
    scores = score_localization(largest, largest, flags, flags, [0.1, 0.2, 0.3], 0.1)
    axes = Figure().subplots()
    draw_threshold_curves(axes, [("one", scores), ("two", scores)], centred=61.3)
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["one", "two", "centred box"] and lines["centred box"].get_linestyle() == "--"
    assert list(lines["one"].get_ydata()) == scores["gt_known_at"] and lines["two"].get_ydata()[0] > 0
    assert list(lines["one"].get_xdata()) == pytest.approx([10, 20, 30]), "percent, as on the other axis"


# ---- Real images ----


@pytest.mark.data
def test_mobilenet_reaches_its_known_scores(real_data):
    """CAM at 257 pixels, threshold 0.3: 66.3 %; the centred box 61.3 %, the whole image 48.7 %.

    Boxes are rounded to pixels of the stored images here, which changes the score of single images.
    """
    root = real_data / "ilsvrc_val_227"
    image_set = load_evaluation("folder", data_dir=str(root), view=SquashedView(257))
    boxes = project_boxes(find_boxes(image_set, "folder", str(root / "boxes_227.csv")).per_image, image_set.pixels.view)
    simple = score_fixed_boxes(boxes, 257)
    assert simple["images"] == 300 and abs(simple["centre"] - 61.3) < 0.5 and abs(simple["whole"] - 48.7) < 0.5
    with open(root / "boxes_227.csv", newline="") as file:
        classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    labels = torch.tensor([classes[name] for name in image_set.files.names()])
    maps, logits = compute_mobilenet_maps(real_data / "weights" / "mobilenet_v2_imagenet_f16.pt", image_set, labels)
    largest, best = compute_map_ious(scale_maps(maps, 257), boxes, list_thresholds(0.3))
    correct = logits.argmax(1) == labels
    scores = score_localization(largest, best, correct, torch.arange(300) % 2 == 0, list_thresholds(0.3), 0.3)
    assert abs(scores["gt_known"] - 66.3) < 1 and abs(100 * float(correct.float().mean()) - 78) < 0.5
    assert scores["top1_loc"] < scores["gt_known"] <= scores["best_gt_known"] and scores["max_box_acc_v2"] > 60


@torch.no_grad()
def compute_mobilenet_maps(weights: Path, image_set, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return raw class maps (N, 9, 9) of the labels, and logits."""
    network = mobilenet_v2()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    mean, std = (torch.tensor(side).view(3, 1, 1) for side in STATISTICS["imagenet"])
    maps, logits = [], []
    for index in torch.arange(len(image_set)).split(50):
        pixels = image_set.pixels.read(index.tolist())[0].permute(0, 3, 1, 2) / 255
        features = network.features((pixels - mean) / std)
        maps.append(torch.einsum("bchw,bc->bhw", features, network.classifier[1].weight[labels[index]]))
        logits.append(network.classifier(features.mean((2, 3))))
    return torch.cat(maps), torch.cat(logits)


@pytest.mark.parametrize(
    ("average", "method", "expected"), [(1, None, "cam"), (2, None, "gradcam"), (1, "gradcam", "gradcam")]
)
def test_networks_without_cam_are_scored_by_gradcam_with_a_note(capsys, average, method, expected):
    layers = [nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(average), nn.Flatten(), nn.Linear(2 * average**2, 4)]
    network = nn.Sequential(*layers).eval()
    session = EvalSession(torch.device("cpu"))
    context = SimpleNamespace(classifier=SimpleNamespace(network=network), image_size=8, name="net", session=session)
    found, compute_maps = build_map_function(context, method, None, False)
    assert found == expected and compute_maps(torch.rand(1, 3, 8, 8), torch.tensor([1]))[0].shape == (1, 8, 8)
    assert ("note: net: no cam, " in capsys.readouterr().out) == (average == 2)
