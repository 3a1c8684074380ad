"""Boxes, points and metrics of masks."""

import functools
import json
import math

import cv2
import numpy as np
import pytest
import torch
from support import GOLDEN
from torch.nn import functional as F

from saliency.casm.boxes import BINARIZE_RULES, binarize, find_centroids, find_largest_components, find_rectangles
from saliency.casm.metrics import (
    MaskStatistics,
    average_scores,
    choose_plot_batches,
    compute_saliency_metric,
    crop_rectangles,
    map_box_to_crop,
    score_box,
    score_image,
)

CASES = json.loads((GOLDEN / "casm.json").read_text())
SIDE = 224


@functools.cache
def build_mask(name: str) -> torch.Tensor:
    """Return a mask (224, 224) float32 by the formulas in the README field of the golden file."""
    spec = CASES["masks"][name]["spec"]
    row, column = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    if spec["kind"] == "const":
        mask = np.full((SIDE, SIDE), spec["value"])
    elif spec["kind"] == "rects":
        mask = np.full((SIDE, SIDE), spec["base"])
        for rect in spec["rects"]:
            mask[rect["y0"] : rect["y1"], rect["x0"] : rect["x1"]] = rect["v"]
    elif spec["kind"] == "gauss":
        mask = np.full((SIDE, SIDE), spec.get("base", 0.0))
        for bump in spec["bumps"]:
            squares = ((row - bump["cy"]) / bump["sy"]) ** 2 + ((column - bump["cx"]) / bump["sx"]) ** 2
            mask += bump["amp"] * np.exp(-squares / 2)
        mask = mask.clip(0, 1)
    elif spec["kind"] == "mod":
        mask = (spec["a"] * row + spec["b"] * column) % spec["p"] / (spec["p"] - 1)
    else:
        i, j = np.mgrid[:56, :56].astype(np.float64)
        wave = spec["a"] * np.sin(spec["f"] * i + spec["p"]) * np.cos(spec["g"] * j)
        logits = wave - spec["b"] * ((i - spec["ci"]) ** 2 + (j - spec["cj"]) ** 2) / 56**2
        mask = (1 / (1 + np.exp(-logits))).repeat(4, 0).repeat(4, 1)
    return torch.from_numpy(mask.astype(np.float32))


@functools.cache
def compute_results() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return name -> (selected pixels, largest component, its rectangle, point), with all masks in one batch."""
    masks = torch.stack([build_mask(name) for name in CASES["masks"]])
    binary = binarize(masks)
    parts = zip(binary, find_largest_components(binary), find_rectangles(binary), find_centroids(masks), strict=True)
    return dict(zip(CASES["masks"], parts, strict=True))


def get_rectangle(name: str) -> list[int]:
    return compute_results()[name][2].tolist()


def find_components_with_opencv(binary: torch.Tensor) -> torch.Tensor:
    """Return what find_largest_components() must return, computed image by image."""
    expected = torch.zeros_like(binary)
    for image, result in zip(binary.numpy(), expected, strict=True):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(image.astype(np.uint8), connectivity=4)
        if count > 1:
            sizes = stats[labels, cv2.CC_STAT_AREA] * image
            result |= torch.from_numpy(labels == labels.flat[sizes.argmax()])
    return expected


def matches_opencv(binary: torch.Tensor) -> bool:
    return torch.equal(find_largest_components(binary), find_components_with_opencv(binary))


def draw_spiral(height: int, width: int) -> torch.Tensor:
    """Draw a path one pixel wide from a corner to the center, with one pixel of background between its turns."""
    image = torch.zeros(height, width, dtype=torch.bool)
    (y, x), (dy, dx) = (0, 0), (0, 1)
    image[0, 0] = True

    def free(y, x):
        return 0 <= y < height and 0 <= x < width and not image[y, x]

    for _ in range(height * width):
        ahead = free(y + dy, x + dx)
        beyond = (y + 2 * dy, x + 2 * dx)
        if ahead and (free(*beyond) or not (0 <= beyond[0] < height and 0 <= beyond[1] < width)):
            y, x = y + dy, x + dx
            image[y, x] = True
        else:
            dy, dx = dx, -dy
            if not (free(y + dy, x + dx) and free(y + 2 * dy, x + 2 * dx)):
                break
    return image


def draw_snake(height: int, width: int) -> torch.Tensor:
    """Draw rows that are joined at alternating ends."""
    image = torch.zeros(height, width, dtype=torch.bool)
    image[::2] = True
    image[1::4, -1] = True
    image[3::4, 0] = True
    return image


def draw_comb(height: int, width: int) -> torch.Tensor:
    """Draw columns on the last row: a component with the maximum number of runs."""
    image = torch.zeros(height, width, dtype=torch.bool)
    image[:, ::2] = True
    image[-1] = True
    return image


def draw_checkerboard(height: int, width: int) -> torch.Tensor:
    return (torch.arange(height).unsqueeze(1) + torch.arange(width)) % 2 == 0


def draw_sieve(height: int, width: int) -> torch.Tensor:
    """Draw as many single-pixel holes as fit, each linked to the one next to it."""
    image = torch.ones(height, width, dtype=torch.bool)
    image[1:-1:2, 1:-1:2] = False
    return image


def draw_slats(height: int, width: int) -> torch.Tensor:
    """Draw slanted holes from edge to edge: the hole to the left of a hole's first pixel starts higher on the right."""
    row, column = torch.arange(height).unsqueeze(1), torch.arange(width)
    image = (row + column) % 3 != 0
    image[0], image[-1], image[:, 0], image[:, -1] = True, True, True, True
    return image


def draw_rings(height: int, width: int) -> torch.Tensor:
    """Draw nested rings: holes that contain other components."""
    row, column = torch.arange(height).unsqueeze(1), torch.arange(width)
    depth = torch.minimum(torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column))
    return depth % 2 == 0


PATTERNS = [draw_spiral, draw_snake, draw_comb, draw_checkerboard, draw_sieve, draw_slats, draw_rings]


def mirror_and_invert(image: torch.Tensor) -> torch.Tensor:
    """Return the four mirror images of a pattern and of its complement."""
    mirrored = torch.stack([image, image.flip(0), image.flip(1), image.flip(0, 1)])
    return torch.cat([mirrored, ~mirrored])


@pytest.mark.parametrize("name", CASES["masks"])
def test_rectangles_match_the_authors_code(name):
    expected = CASES["masks"][name]["expect"]
    assert abs(build_mask(name).double().sum() - expected["checksum_sum"]) < 0.01
    binary, component, rectangle, _ = compute_results()[name]
    least, most = expected["binary_count_range"]
    assert least <= binary.sum() <= most
    least, most = expected["component_area_range"]
    assert least <= component.sum() <= most
    assert rectangle.tolist() == (expected["rect"] or [0, 0, 0, 0])


@pytest.mark.parametrize("name", CASES["points"])
def test_points_match_the_golden_file(name):
    expected, point = CASES["points"][name], compute_results()[name][3]
    if expected is None:
        assert point.isnan().all()
    else:
        torch.testing.assert_close(point, torch.tensor(expected), rtol=0, atol=0.05)


@pytest.mark.parametrize("index", range(len(CASES["score"])))
def test_image_scores_match_the_authors_code(index):
    case, expected = CASES["score"][index]["case"], CASES["score"][index]["expect"]
    boxes = [
        map_box_to_crop(box, case["width"], case["height"], break_ratio=case["break_ratio"]) for box in case["boxes"]
    ]
    assert [list(box) for box in boxes] == expected["resized_boxes"]
    mask, rectangle = build_mask(case["mask"]), get_rectangle(case["mask"])
    single = [score_box(mask, rectangle, box) for box in boxes]
    assert [score["f1"] for score in single] == pytest.approx(expected["f1_per_box"], abs=2e-5)
    assert [score["iou"] for score in single] == pytest.approx(expected["iou_per_box"], abs=1e-6)
    assert [score["hit"] for score in single] == expected["hit_per_box"]
    scores = score_image(mask, rectangle, boxes, case["correct"])
    assert [scores["F1"], scores["F1a"]] == pytest.approx([expected["F1"], expected["F1a"]], abs=2e-5)
    assert [scores["LE"], scores["OM"]] == [expected["LE"], expected["OM"]]
    best = max(single, key=lambda score: score["f1"])
    assert (scores["precision"], scores["recall"]) == (best["precision"], best["recall"])


def test_dataset_scores_are_means_over_images():
    rows = []
    for case in (entry["case"] for entry in CASES["score"]):
        boxes = [
            map_box_to_crop(box, case["width"], case["height"], break_ratio=case["break_ratio"])
            for box in case["boxes"]
        ]
        rows.append(score_image(build_mask(case["mask"]), get_rectangle(case["mask"]), boxes, case["correct"]))
    means = average_scores(rows)
    assert {name: means[name] for name in CASES["score_aggregate"]} == pytest.approx(CASES["score_aggregate"], abs=2e-5)
    assert means["recall"] == pytest.approx(np.mean([row["recall"] for row in rows]))


@pytest.mark.parametrize("index", range(len(CASES["statistics"])))
def test_batch_statistics_match_the_authors_code(index):
    case = CASES["statistics"][index]
    statistics = MaskStatistics()
    statistics.add(torch.stack([build_mask(name) for name in case["masks"]]))
    means = statistics.means()
    assert means == pytest.approx(case["expect"], abs=1e-4)
    assert means["tv"] == pytest.approx(case["expect"]["tv"], abs=1e-6)


@pytest.mark.parametrize("index", range(len(CASES["resize_box"])))
def test_box_coordinates_are_truncated_toward_zero(index):
    case = CASES["resize_box"][index]
    box = map_box_to_crop(case["box"], case["width"], case["height"], 224, case["break_ratio"])
    assert list(box) == case["expect"] and all(type(side) is int for side in box)


def test_no_rounding_error_shifts_the_short_side():
    assert map_box_to_crop((25, 0, 400, 0), 400, 500)[0] == 14  # (scale * 400 - 224) / 2 is 1e-14, and would make it 13
    assert map_box_to_crop((0, 25, 0, 400), 500, 400)[1] == 14


def test_boxes_map_to_crops_of_any_size():
    assert map_box_to_crop((0, 0, 100, 50), 100, 50, size=32) == (-16, 0, 48, 32)
    assert map_box_to_crop((0, 0, 50, 100), 50, 100, size=32) == (0, -16, 32, 48)
    assert map_box_to_crop((25, 10, 50, 20), 100, 50, size=32, break_ratio=True) == (8, 6, 16, 12)


def test_saliency_metric_matches_the_golden_file():
    cases = [entry["case"] for entry in CASES["saliency_metric"]]
    areas = torch.tensor([case["rect_area"] for case in cases], dtype=torch.float64) / SIDE**2
    result = compute_saliency_metric(areas, torch.tensor([case["p_target"] for case in cases], dtype=torch.float64))
    for name, recorded in (("SM", "SM"), ("SM1", "area_term"), ("SM2", "probability_term")):
        expected = [entry["expect"][recorded] for entry in CASES["saliency_metric"]]
        assert result[name].tolist() == pytest.approx(expected, abs=1e-6)


def test_saliency_metric_is_finite_for_probability_zero():
    assert compute_saliency_metric(torch.ones(1), torch.zeros(1))["SM"].isfinite().all()
    assert compute_saliency_metric(torch.tensor([1.5]), torch.ones(1))["SM1"] == 0  # clamped to the area of the image


@pytest.mark.parametrize("index", range(len(CASES["plot_batches"])))
def test_plot_batches_match_the_authors_code(index):
    case = CASES["plot_batches"][index]
    np.random.seed(1)
    assert choose_plot_batches(case["batches"], case["plots"], case["seed"]) == case["expect"]
    assert np.random.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)  # the global state did not advance
    assert sorted(choose_plot_batches(case["batches"], 0)) == list(range(case["batches"]))
    assert choose_plot_batches(3, 16, 5) == choose_plot_batches(3, -1, 5)


@pytest.mark.parametrize("height, width", [(4, 4), (2, 7), (7, 2), (3, 5), (5, 3), (1, 12), (12, 1)])
def test_largest_component_matches_opencv_for_all_small_images(height, width):
    numbers = torch.arange(1 << height * width).unsqueeze(1)
    assert matches_opencv((numbers >> torch.arange(height * width) & 1).bool().view(-1, height, width))


@pytest.mark.parametrize("height, width", [(5, 5), (8, 8), (7, 12), (16, 16), (9, 31), (32, 32), (33, 17), (64, 64)])
def test_largest_component_matches_opencv_for_noise(height, width):
    for density in (0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.9):
        assert matches_opencv(torch.rand(120, height, width) < density), density


@pytest.mark.parametrize("picture", PATTERNS)
@pytest.mark.parametrize(
    "height, width", [(8, 8), (16, 16), (31, 31), (32, 32), (33, 33), (64, 64), (20, 50), (15, 64), (5, 200)]
)
def test_largest_component_matches_opencv_for_long_contours_and_holes(picture, height, width):
    assert matches_opencv(mirror_and_invert(picture(height, width)))
    assert matches_opencv(mirror_and_invert(picture(width, height).T))


def test_patterns_have_their_properties():
    assert find_largest_components(draw_spiral(32, 32).unsqueeze(0)).sum() == draw_spiral(32, 32).sum() > 500
    assert find_largest_components(draw_snake(32, 32).unsqueeze(0)).sum() == draw_snake(32, 32).sum() > 500
    assert find_largest_components(draw_checkerboard(32, 32).unsqueeze(0)).sum() == 1
    assert (~draw_sieve(33, 33)).sum() == 256


def test_components_do_not_cross_images_of_a_batch():
    binary = torch.ones(3, 4, 5, dtype=torch.bool)
    binary[1] = False
    assert torch.equal(find_largest_components(binary), binary)
    noise = torch.rand(20, 6, 9) < 0.6
    assert torch.equal(
        find_largest_components(noise), torch.cat([find_largest_components(image[None]) for image in noise])
    )


def test_diagonal_pixels_are_not_connected_and_ties_go_to_the_first_component():
    binary = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool().unsqueeze(0)
    assert find_rectangles(binary).tolist() == [[1, 3, 0, 2]]  # two components of three pixels: the upper one
    binary[0, 2, 0] = False
    assert find_rectangles(binary).tolist() == [[2, 4, 2, 4]]


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 6, 10), (2, 1, 7), (2, 7, 1), (3, 1, 1), (0, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_dtypes_and_tight_boxes(shape, dtype):
    masks = torch.rand(shape).to(dtype)
    kept = masks.clone()
    for rule in BINARIZE_RULES:
        binary = binarize(masks, rule)
        assert binary.dtype == torch.bool and binary.shape == shape
        component = find_largest_components(binary)
        assert component.dtype == torch.bool and component.shape == shape and not (component & ~binary).any()
        boxes = find_rectangles(binary)
        assert boxes.dtype == torch.long and boxes.shape == (shape[0], 4)
        for part, (y1, y2, x1, x2) in zip(component, boxes.tolist(), strict=True):
            assert part.sum() == part[y1:y2, x1:x2].sum()
            edges = part[y1:y2, x1:x2]
            assert not part.any() or all(edge.any() for edge in (edges[0], edges[-1], edges[:, 0], edges[:, -1]))
    points = find_centroids(masks)
    assert points.dtype == torch.float32 and points.shape == (shape[0], 2)
    assert torch.equal(masks, kept)


def test_masks_without_an_object_have_no_box_or_centroid():
    zeros, ones = torch.zeros(2, 6, 9), torch.ones(2, 6, 9)
    assert not binarize(zeros).any() and binarize(ones).all()
    assert not binarize(zeros, "mean").any() and not binarize(ones, "mean").any()
    assert find_rectangles(binarize(zeros)).tolist() == [[0, 0, 0, 0]] * 2
    assert find_rectangles(binarize(ones)).tolist() == [[0, 6, 0, 9]] * 2
    assert not find_largest_components(binarize(zeros)).any()
    assert find_centroids(zeros).isnan().all() and find_centroids(ones).isnan().all()
    ones[:, 2, 3] += 5e-5
    assert find_centroids(ones).isnan().all()  # a rounding error is no object
    broken = torch.rand(1, 6, 9)
    broken[0, 2, 3] = math.nan
    assert not any(binarize(broken, rule).any() for rule in BINARIZE_RULES)
    assert binarize(-torch.rand(1, 6, 9)).shape == binarize(5 * torch.rand(1, 6, 9)).shape  # no index out of range


def test_percentile_rule_keeps_as_many_pixels_as_the_mask_has_mass():
    masks = torch.rand(8, 40, 30) ** torch.arange(1, 9).view(-1, 1, 1)
    kept = binarize(masks).sum((1, 2)) / 1200
    torch.testing.assert_close(kept, masks.mean((1, 2)), rtol=0, atol=1 / 1200)


def test_float64_and_negative_maps_have_centroids():
    maps = torch.full((1, 10, 20), -3.0, dtype=torch.float64)
    maps[0, 2:5, 8:16] = 40.0
    maps[0, 8:, :2] = 90.0
    torch.testing.assert_close(find_centroids(maps), torch.tensor([[3.0, 11.5]]))


@pytest.mark.gpu
def test_gpu_results_match_the_cpu():
    masks = F.interpolate(torch.rand(40, 1, 12, 12), (48, 40), mode="bilinear").squeeze(1)
    masks = torch.cat([masks, torch.rand(40, 48, 40)])
    images, device = torch.rand(80, 3, 48, 40), "cuda"
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            device_masks, boxes = masks.to(device), find_rectangles(binarize(masks)).to(device)
            device_images = images.to(device)
            torch.cuda.set_sync_debug_mode("error")
            MaskStatistics().add(device_masks)
            found = [
                binarize(device_masks),
                find_rectangles(binarize(device_masks)),
                find_centroids(device_masks),
                crop_rectangles(device_images, boxes),
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.use_deterministic_algorithms(False)
        binary = binarize(masks)
        expected = [
            binary,
            find_rectangles(binary),
            find_centroids(masks),
            crop_rectangles(images, find_rectangles(binary)),
        ]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other)


def test_errors_name_the_wrong_argument():
    with pytest.raises(ValueError, match="percentile, mean, got 'median'"):
        binarize(torch.rand(1, 4, 4), "median")
    for function in (binarize, find_centroids):
        with pytest.raises(ValueError, match=r"\(4, 4\)"):
            function(torch.rand(4, 4))
    with pytest.raises(ValueError, match=r"\(2, 0, 4\)"):
        binarize(torch.rand(2, 0, 4))
    for function in (find_largest_components, find_rectangles):
        with pytest.raises(ValueError, match="float32"):
            function(torch.rand(1, 4, 4))
        with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
            function(torch.ones(1, 1, 4, 4).bool())
    with pytest.raises(ValueError, match="an image without boxes has no scores"):
        score_image(torch.rand(4, 4), (0, 1, 0, 1), [], True)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        score_box(torch.rand(1, 4, 4), (0, 1, 0, 1), (0, 0, 1, 1))
    with pytest.raises(ValueError, match="0x5"):
        map_box_to_crop((0, 0, 1, 1), 0, 5)
    with pytest.raises(ValueError, match="no scores"):
        average_scores([])
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        MaskStatistics().add(torch.rand(4, 4))
    with pytest.raises(ValueError, match="add"):
        MaskStatistics().means()
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        crop_rectangles(torch.rand(2, 3, 4, 4), torch.zeros(3, 4, dtype=torch.long))


def test_scores_of_a_wide_mask_match_a_hand_calculation():
    mask = torch.zeros(4, 10)
    mask[1:3, 6:10] = 0.5  # the mass is 4, of which 2 is inside the box
    scores = score_box(mask, (1, 3, 6, 10), (8, 0, 12, 4))  # half of the box lies outside the mask
    expected = {"precision": 2 / 4, "recall": 2 / 16, "f1": 0.2, "iou": 4 / (8 + 16 - 4), "hit": 0}
    assert scores == pytest.approx(expected, abs=1e-6)
    assert score_box(mask, torch.tensor([1, 3, 6, 10]), (6, 1, 10, 2)) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "iou": 0.5, "hit": 0}, abs=1e-6
    )  # an IoU of exactly 0.5 is no hit
    assert not any(score_box(mask, (0, 4, 0, 10), (10, 0, 14, 4)).values())  # outside the mask
    assert not any(score_box(mask, (0, 4, 0, 10), (3, 1, 3, 4)).values())  # a box without width
    right = score_image(mask, (1, 3, 6, 10), [(0, 0, 2, 2), (6, 1, 10, 3)], correct=True)
    wrong = score_image(mask, (1, 3, 6, 10), [(0, 0, 2, 2), (6, 1, 10, 3)], correct=False)
    assert (right["LE"], right["OM"], wrong["LE"], wrong["OM"]) == (0, 0, 0, 1)
    assert right["F1"] == pytest.approx(2 / 3, abs=1e-6) and right["F1a"] == pytest.approx(1 / 3, abs=1e-6)
    assert (right["precision"], right["recall"]) == pytest.approx((1.0, 0.5), abs=1e-6)


def test_statistics_are_weighted_by_the_number_of_images():
    first, second, single = torch.rand(5, 6, 4), torch.rand(2, 6, 4), torch.rand(1, 6, 4)
    parts = []
    for masks in (first, second, single):
        statistics = MaskStatistics()
        statistics.add(masks)
        parts.append(statistics.means())
    assert parts[2]["std_mask"] is None
    assert parts[0]["std_mask"] == pytest.approx(first.mean((1, 2)).std().item())
    together = MaskStatistics()
    for masks in (first, second, single):
        together.add(masks)
    means = together.means()
    assert means["std_mask"] == pytest.approx((5 * parts[0]["std_mask"] + 2 * parts[1]["std_mask"]) / 7)
    for name in ("avg_mask", "entropy", "tv"):
        assert means[name] == pytest.approx(np.average([part[name] for part in parts], weights=[5, 2, 1]))


def test_statistics_match_a_hand_calculation():
    statistics = MaskStatistics()
    statistics.add(torch.tensor([[[0.0, 1.0], [0.5, 0.25]]]))
    expected = {"avg_mask": 0.4375, "entropy": (0.5 + 0.5) / 4, "tv": (1 + 0.0625) / 2 + (0.25 + 0.5625) / 2}
    assert statistics.means() == {"std_mask": None} | {name: pytest.approx(value) for name, value in expected.items()}
    thin = MaskStatistics()
    thin.add(torch.tensor([[[0.0, 1.0, 1.0]]]))
    assert thin.means()["tv"] == pytest.approx(0.5)  # there are no vertical neighbors


@pytest.mark.parametrize("height, width", [(12, 12), (9, 16)])
def test_crops_match_a_bicubic_resize(height, width):
    boxes = [[0, height, 0, width], [2, 7, 3, 4], [4, 5, 0, 8], [3, 9, 1, 6], [0, 0, 0, 0], [height - 1, height, 2, 5]]
    images = torch.randn(len(boxes), 3, height, width)
    found = crop_rectangles(images, torch.tensor(boxes))
    for image, (y1, y2, x1, x2), result in zip(images, boxes, found, strict=True):
        if y2 == 0:
            assert not result.any()
            continue
        part = image[None, :, y1:y2, x1:x2]
        expected = F.interpolate(part, (height, width), mode="bicubic", align_corners=False)
        torch.testing.assert_close(result[None], expected, rtol=0, atol=2e-5)
