import functools
import json
import math

import cv2
import numpy as np
import pytest
import torch
from support import GOLDEN
from torch.nn import functional as F

from saliency.casm.boxes import RULES, binarize, find_centroids, find_largest_components, find_rectangles
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

RECORDED = json.loads((GOLDEN / "casm.json").read_text())
SIDE = 224


@functools.cache
def golden_mask(name: str) -> torch.Tensor:
    """float32 (224, 224), by the formulas of the file's README."""
    spec = RECORDED["masks"][name]["spec"]
    row, column = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    if spec["kind"] == "const":
        mask = np.full((SIDE, SIDE), spec["value"])
    elif spec["kind"] == "rects":
        mask = np.full((SIDE, SIDE), spec["base"])
        for part in spec["rects"]:
            mask[part["y0"] : part["y1"], part["x0"] : part["x1"]] = part["v"]
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
def golden_results() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """name -> selected pixels, their largest component, its rectangle, the point: all masks in one batch."""
    masks = torch.stack([golden_mask(name) for name in RECORDED["masks"]])
    binary = binarize(masks)
    parts = zip(binary, find_largest_components(binary), find_rectangles(binary), find_centroids(masks), strict=True)
    return dict(zip(RECORDED["masks"], parts, strict=True))


def rectangle_of(name: str) -> list[int]:
    return golden_results()[name][2].tolist()


def by_opencv(binary: torch.Tensor) -> torch.Tensor:
    """What find_largest_components has to give, image by image."""
    expected = torch.zeros_like(binary)
    for image, result in zip(binary.numpy(), expected, strict=True):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(image.astype(np.uint8), connectivity=4)
        if count > 1:
            sizes = stats[labels, cv2.CC_STAT_AREA] * image
            result |= torch.from_numpy(labels == labels.flat[sizes.argmax()])
    return expected


def agree(binary: torch.Tensor) -> bool:
    return torch.equal(find_largest_components(binary), by_opencv(binary))


def spiral(height: int, width: int) -> torch.Tensor:
    """One path a pixel wide from a corner to the middle, a pixel of background between its turns."""
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


def snake(height: int, width: int) -> torch.Tensor:
    """Rows joined at alternating ends."""
    image = torch.zeros(height, width, dtype=torch.bool)
    image[::2] = True
    image[1::4, -1] = True
    image[3::4, 0] = True
    return image


def comb(height: int, width: int) -> torch.Tensor:
    """Teeth on the last row: the most runs that a component can have."""
    image = torch.zeros(height, width, dtype=torch.bool)
    image[:, ::2] = True
    image[-1] = True
    return image


def checkerboard(height: int, width: int) -> torch.Tensor:
    return (torch.arange(height).unsqueeze(1) + torch.arange(width)) % 2 == 0


def sieve(height: int, width: int) -> torch.Tensor:
    """Single holes wherever they fit, each to be tied to the one beside it."""
    image = torch.ones(height, width, dtype=torch.bool)
    image[1:-1:2, 1:-1:2] = False
    return image


def slats(height: int, width: int) -> torch.Tensor:
    """Slanted holes from edge to edge: the one before a hole's first pixel begins higher up on the right."""
    row, column = torch.arange(height).unsqueeze(1), torch.arange(width)
    image = (row + column) % 3 != 0
    image[0], image[-1], image[:, 0], image[:, -1] = True, True, True, True
    return image


def rings(height: int, width: int) -> torch.Tensor:
    """Ring within ring: holes that hold other components."""
    row, column = torch.arange(height).unsqueeze(1), torch.arange(width)
    depth = torch.minimum(torch.minimum(row, height - 1 - row), torch.minimum(column, width - 1 - column))
    return depth % 2 == 0


PICTURES = [spiral, snake, comb, checkerboard, sieve, slats, rings]


def turned(image: torch.Tensor) -> torch.Tensor:
    """The four ways to mirror it, and the same four of its complement."""
    mirrored = torch.stack([image, image.flip(0), image.flip(1), image.flip(0, 1)])
    return torch.cat([mirrored, ~mirrored])


@pytest.mark.parametrize("name", RECORDED["masks"])
def test_the_rectangle_of_a_mask_is_that_of_the_authors_code(name):
    expected = RECORDED["masks"][name]["expect"]
    assert abs(golden_mask(name).double().sum() - expected["checksum_sum"]) < 0.01
    binary, component, rectangle, _ = golden_results()[name]
    least, most = expected["binary_count_range"]
    assert least <= binary.sum() <= most
    least, most = expected["component_area_range"]
    assert least <= component.sum() <= most
    assert rectangle.tolist() == (expected["rect"] or [0, 0, 0, 0])


@pytest.mark.parametrize("name", RECORDED["points"])
def test_the_point_of_a_mask_is_the_recorded_one(name):
    expected, point = RECORDED["points"][name], golden_results()[name][3]
    if expected is None:
        assert point.isnan().all()
    else:
        torch.testing.assert_close(point, torch.tensor(expected), rtol=0, atol=0.05)


@pytest.mark.parametrize("index", range(len(RECORDED["score"])))
def test_the_scores_of_an_image_are_those_of_the_authors_code(index):
    case, expected = RECORDED["score"][index]["case"], RECORDED["score"][index]["expect"]
    boxes = [
        map_box_to_crop(box, case["width"], case["height"], break_ratio=case["break_ratio"]) for box in case["boxes"]
    ]
    assert [list(box) for box in boxes] == expected["resized_boxes"]
    mask, rectangle = golden_mask(case["mask"]), rectangle_of(case["mask"])
    single = [score_box(mask, rectangle, box) for box in boxes]
    assert [score["f1"] for score in single] == pytest.approx(expected["f1_per_box"], abs=2e-5)
    assert [score["iou"] for score in single] == pytest.approx(expected["iou_per_box"], abs=1e-6)
    assert [score["hit"] for score in single] == expected["hit_per_box"]
    scores = score_image(mask, rectangle, boxes, case["correct"])
    assert [scores["F1"], scores["F1a"]] == pytest.approx([expected["F1"], expected["F1a"]], abs=2e-5)
    assert [scores["LE"], scores["OM"]] == [expected["LE"], expected["OM"]]
    best = max(single, key=lambda score: score["f1"])
    assert (scores["precision"], scores["recall"]) == (best["precision"], best["recall"])


def test_the_scores_of_a_dataset_are_plain_means():
    rows = []
    for case in (entry["case"] for entry in RECORDED["score"]):
        boxes = [
            map_box_to_crop(box, case["width"], case["height"], break_ratio=case["break_ratio"])
            for box in case["boxes"]
        ]
        rows.append(score_image(golden_mask(case["mask"]), rectangle_of(case["mask"]), boxes, case["correct"]))
    means = average_scores(rows)
    assert {name: means[name] for name in RECORDED["score_aggregate"]} == pytest.approx(
        RECORDED["score_aggregate"], abs=2e-5
    )
    assert means["recall"] == pytest.approx(np.mean([row["recall"] for row in rows]))


@pytest.mark.parametrize("index", range(len(RECORDED["statistics"])))
def test_the_statistics_of_a_batch_are_those_of_the_authors_code(index):
    case = RECORDED["statistics"][index]
    statistics = MaskStatistics()
    statistics.add(torch.stack([golden_mask(name) for name in case["masks"]]))
    means = statistics.means()
    assert means == pytest.approx(case["expect"], abs=1e-4)
    assert means["tv"] == pytest.approx(case["expect"]["tv"], abs=1e-6)


@pytest.mark.parametrize("index", range(len(RECORDED["resize_box"])))
def test_a_box_is_cut_towards_zero_in_the_crop(index):
    case = RECORDED["resize_box"][index]
    box = map_box_to_crop(case["box"], case["width"], case["height"], 224, case["break_ratio"])
    assert list(box) == case["expect"] and all(type(side) is int for side in box)


def test_the_short_side_is_not_shifted_by_a_rounding_crumb():
    assert map_box_to_crop((25, 0, 400, 0), 400, 500)[0] == 14  # (scale * 400 - 224) / 2 is 1e-14, and would make it 13
    assert map_box_to_crop((0, 25, 0, 400), 500, 400)[1] == 14


def test_a_box_can_be_mapped_to_a_crop_of_another_size():
    assert map_box_to_crop((0, 0, 100, 50), 100, 50, size=32) == (-16, 0, 48, 32)
    assert map_box_to_crop((0, 0, 50, 100), 50, 100, size=32) == (0, -16, 32, 48)
    assert map_box_to_crop((25, 10, 50, 20), 100, 50, size=32, break_ratio=True) == (8, 6, 16, 12)


def test_the_saliency_metric_is_the_recorded_one():
    cases = [entry["case"] for entry in RECORDED["saliency_metric"]]
    areas = torch.tensor([case["rect_area"] for case in cases], dtype=torch.float64) / SIDE**2
    result = compute_saliency_metric(areas, torch.tensor([case["p_target"] for case in cases], dtype=torch.float64))
    for name, recorded in (("SM", "SM"), ("SM1", "area_term"), ("SM2", "probability_term")):
        expected = [entry["expect"][recorded] for entry in RECORDED["saliency_metric"]]
        assert result[name].tolist() == pytest.approx(expected, abs=1e-6)


def test_an_impossible_class_keeps_the_saliency_metric_finite():
    assert compute_saliency_metric(torch.ones(1), torch.zeros(1))["SM"].isfinite().all()
    assert compute_saliency_metric(torch.tensor([1.5]), torch.ones(1))["SM1"] == 0  # no more than the image


@pytest.mark.parametrize("index", range(len(RECORDED["plot_batches"])))
def test_the_batches_to_plot_are_those_of_the_authors_code(index):
    case = RECORDED["plot_batches"][index]
    np.random.seed(1)
    assert choose_plot_batches(case["batches"], case["plots"], case["seed"]) == case["expect"]
    assert np.random.randint(1 << 30) == np.random.RandomState(1).randint(1 << 30)  # the global draws stay put
    assert sorted(choose_plot_batches(case["batches"], 0)) == list(range(case["batches"]))
    assert choose_plot_batches(3, 16, 5) == choose_plot_batches(3, -1, 5)


@pytest.mark.parametrize("height, width", [(4, 4), (2, 8), (8, 2), (3, 5), (5, 3), (1, 12), (12, 1)])
def test_every_small_picture_has_the_component_opencv_finds(height, width):
    numbers = torch.arange(1 << height * width).unsqueeze(1)
    assert agree((numbers >> torch.arange(height * width) & 1).bool().view(-1, height, width))


@pytest.mark.parametrize("height, width", [(5, 5), (8, 8), (7, 12), (16, 16), (9, 31), (32, 32), (33, 17), (64, 64)])
def test_noise_around_percolation_has_the_component_opencv_finds(height, width):
    for density in (0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.9):
        assert agree(torch.rand(120, height, width) < density), density


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    "height, width", [(8, 8), (16, 16), (31, 31), (32, 32), (33, 33), (64, 64), (20, 50), (15, 64), (5, 200)]
)
def test_the_longest_contours_and_holes_are_followed_to_their_ends(picture, height, width):
    assert agree(turned(picture(height, width)))
    assert agree(turned(picture(width, height).T))


def test_the_pictures_are_what_they_are_named():
    assert find_largest_components(spiral(32, 32).unsqueeze(0)).sum() == spiral(32, 32).sum() > 500
    assert find_largest_components(snake(32, 32).unsqueeze(0)).sum() == snake(32, 32).sum() > 500
    assert find_largest_components(checkerboard(32, 32).unsqueeze(0)).sum() == 1
    assert (~sieve(33, 33)).sum() == 256


def test_images_of_a_batch_do_not_touch_each_other():
    binary = torch.ones(3, 4, 5, dtype=torch.bool)
    binary[1] = False
    assert torch.equal(find_largest_components(binary), binary)
    noise = torch.rand(20, 6, 9) < 0.6
    assert torch.equal(
        find_largest_components(noise), torch.cat([find_largest_components(image[None]) for image in noise])
    )


def test_diagonal_contact_does_not_join_and_the_first_of_equals_wins():
    binary = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool().unsqueeze(0)
    assert find_rectangles(binary).tolist() == [[1, 3, 0, 2]]  # of three pixels each, the one that begins higher
    binary[0, 2, 0] = False
    assert find_rectangles(binary).tolist() == [[2, 4, 2, 4]]


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 6, 10), (2, 1, 7), (2, 7, 1), (3, 1, 1), (0, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract(shape, dtype):
    masks = torch.rand(shape).to(dtype)
    kept = masks.clone()
    for rule in RULES:
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


def test_masks_without_an_object():
    zeros, ones = torch.zeros(2, 6, 9), torch.ones(2, 6, 9)
    assert not binarize(zeros).any() and binarize(ones).all()
    assert not binarize(zeros, "mean").any() and not binarize(ones, "mean").any()
    assert find_rectangles(binarize(zeros)).tolist() == [[0, 0, 0, 0]] * 2
    assert find_rectangles(binarize(ones)).tolist() == [[0, 6, 0, 9]] * 2
    assert not find_largest_components(binarize(zeros)).any()
    assert find_centroids(zeros).isnan().all() and find_centroids(ones).isnan().all()
    ones[:, 2, 3] += 5e-5
    assert find_centroids(ones).isnan().all()  # a rounding crumb is no object
    broken = torch.rand(1, 6, 9)
    broken[0, 2, 3] = math.nan
    assert not any(binarize(broken, rule).any() for rule in RULES)
    assert binarize(-torch.rand(1, 6, 9)).shape == binarize(5 * torch.rand(1, 6, 9)).shape  # no index out of range


def test_the_percentile_keeps_as_many_pixels_as_the_mask_has_mass():
    masks = torch.rand(8, 40, 30) ** torch.arange(1, 9).view(-1, 1, 1)
    kept = binarize(masks).sum((1, 2)) / 1200
    torch.testing.assert_close(kept, masks.mean((1, 2)), rtol=0, atol=1 / 1200)


def test_a_float64_and_a_negative_map_have_centroids():
    maps = torch.full((1, 10, 20), -3.0, dtype=torch.float64)
    maps[0, 2:5, 8:16] = 40.0
    maps[0, 8:, :2] = 90.0
    torch.testing.assert_close(find_centroids(maps), torch.tensor([[3.0, 11.5]]))


def test_nothing_asks_the_device(monkeypatch):
    masks = torch.rand(3, 9, 14)
    expected = find_centroids(masks), find_rectangles(binarize(masks))

    def asked(*args, **kwargs):
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "nonzero", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    found = find_centroids(masks), find_rectangles(binarize(masks))
    statistics = MaskStatistics()
    statistics.add(masks)
    crop_rectangles(masks.unsqueeze(1), found[1])
    for rule in RULES:  # a tensor without numbers cannot be asked at all
        shapes = find_rectangles(binarize(masks.to("meta"), rule)).shape, find_centroids(masks.to("meta")).shape
        assert shapes == ((3, 4), (3, 2))
    MaskStatistics().add(masks.to("meta"))
    assert crop_rectangles(masks.unsqueeze(1).to("meta"), found[1].to("meta")).shape == (3, 1, 9, 14)
    monkeypatch.undo()
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
def test_boxes_and_points_on_the_gpu_are_those_of_the_cpu():
    masks = F.interpolate(torch.rand(40, 1, 12, 12), (48, 40), mode="bilinear").squeeze(1)
    masks = torch.cat([masks, torch.rand(40, 48, 40)])
    images, device = torch.rand(80, 3, 48, 40), "cuda"
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            there, boxes = masks.to(device), find_rectangles(binarize(masks)).to(device)
            images_there = images.to(device)
            torch.cuda.set_sync_debug_mode("error")
            MaskStatistics().add(there)
            found = [
                binarize(there),
                find_rectangles(binarize(there)),
                find_centroids(there),
                crop_rectangles(images_there, boxes),
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


def test_wrong_calls_say_what_came():
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
    with pytest.raises(ValueError, match="leave it out"):
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


def test_scores_of_a_wide_mask_by_hand():
    mask = torch.zeros(4, 10)
    mask[1:3, 6:10] = 0.5  # 4 in all, 2 of them inside the box
    scores = score_box(mask, (1, 3, 6, 10), (8, 0, 12, 4))  # half of the box lies outside
    expected = {"precision": 2 / 4, "recall": 2 / 16, "f1": 0.2, "iou": 4 / (8 + 16 - 4), "hit": 0}
    assert scores == pytest.approx(expected, abs=1e-6)
    assert score_box(mask, torch.tensor([1, 3, 6, 10]), (6, 1, 10, 2)) == pytest.approx(
        {"precision": 0.5, "recall": 0.5, "f1": 0.5, "iou": 0.5, "hit": 0}, abs=1e-6
    )  # exactly one half is no hit
    assert not any(score_box(mask, (0, 4, 0, 10), (10, 0, 14, 4)).values())  # beside the image
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


def test_statistics_of_a_mask_by_hand():
    statistics = MaskStatistics()
    statistics.add(torch.tensor([[[0.0, 1.0], [0.5, 0.25]]]))
    expected = {"avg_mask": 0.4375, "entropy": (0.5 + 0.5) / 4, "tv": (1 + 0.0625) / 2 + (0.25 + 0.5625) / 2}
    assert statistics.means() == {"std_mask": None} | {name: pytest.approx(value) for name, value in expected.items()}
    thin = MaskStatistics()
    thin.add(torch.tensor([[[0.0, 1.0, 1.0]]]))
    assert thin.means()["tv"] == pytest.approx(0.5)  # there are no vertical neighbours


@pytest.mark.parametrize("height, width", [(12, 12), (9, 16)])
def test_crops_are_those_of_a_bicubic_resize(height, width):
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
