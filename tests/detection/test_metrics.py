import contextlib
import io
import json
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest

from detection.metrics import Detections, GroundTruth, coco_metrics, voc_metrics

SQUARE, FAR = (10, 10, 50, 50), (200, 200, 240, 240)  # of medium size for COCO
NAMES = ["cat", "dog"]


def found(*rows: tuple) -> Detections:
    """Rows of box, label, score."""
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores, float))


def truth(*rows: tuple) -> GroundTruth:
    """Rows of box, label and, if it is, True for difficult."""
    boxes, labels, difficult = zip(*((*row, False)[:3] for row in rows), strict=True) if rows else ((), (), ())
    return GroundTruth(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(difficult, bool))


def cats(right: str, objects: int) -> tuple[list[Detections], list[GroundTruth]]:
    """Detections of one class by falling score, `+` right and `-` wrong, each in an image of its own; then images with
    the rest of the objects.
    """
    detections = [found((SQUARE, 1, 1 - place / 5000)) for place in range(len(right))]
    truths = [truth((SQUARE, 1)) if sign == "+" else truth() for sign in right]
    rest = objects - right.count("+")
    return detections + [found()] * rest, truths + [truth((SQUARE, 1))] * rest


def ap(detections: list[Detections], truths: list[GroundTruth], name: str = "cat") -> tuple[float, float]:
    row = voc_metrics(detections, truths, NAMES)["classes"][name]
    return row["ap07"], row["ap"]


def random_set(
    seed: int, images: int = 12, classes: int = 3, objects: int = 8, most: int = 30
) -> tuple[list[Detections], list[GroundTruth]]:
    """Boxes on whole pixels, of all of COCO's sizes. Most detections are an object of the image, moved a little; there
    are equal scores (of eight), equal overlaps, twins, difficult objects, images without either.
    """
    draw = np.random.default_rng(seed)
    detections, truths = [], []
    for _ in range(images):
        number = draw.integers(0, objects + 1) * draw.integers(0, 4).clip(0, 1)
        corner = draw.integers(0, 20, (number, 2))
        sides = draw.choice([8, 20, 32, 40, 96, 110], (number, 1)) + draw.integers(0, 4, (number, 2)) * 2
        boxes = np.concatenate([corner, corner + sides], 1).astype(float)
        if number > 1:
            boxes[0] = boxes[1]
        labels = draw.integers(1, classes + 1, number)
        truths.append(GroundTruth(boxes, labels, draw.random(number) < 0.3))
        count = draw.integers(0, most + 1) * draw.integers(0, 4).clip(0, 1)
        if number:
            source = draw.integers(0, number, count)
            drift = np.round(draw.normal(0, 0.07, (count, 4)) * np.tile(sides, 2)[source])
            moved, named = boxes[source] + drift * draw.integers(0, 2, (count, 1)), labels[source].copy()
        else:
            moved, named = np.tile([0.0, 0.0, 30.0, 30.0], (count, 1)), draw.integers(1, classes + 1, count)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        elsewhere = draw.random(count) < 0.15
        named[elsewhere] = draw.integers(1, classes + 1, elsewhere.sum())
        detections.append(Detections(moved, named, draw.integers(1, 9, count) / 8))
    return detections, truths


# VOC by hand


def test_perfect_boxes_are_worth_one():
    truths = [truth((SQUARE, 1), (FAR, 2)), truth((SQUARE, 2))]
    detections = [found((SQUARE, 1, 0.3), (FAR, 2, 0.9)), found((SQUARE, 2, 0.1))]
    result = voc_metrics(detections, truths, NAMES)
    assert all(result[key] == 1 for key in ("map07", "map", "ap07_50_95", "ap_50_95", "ap07_75", "ap_75"))
    assert result["classes"]["dog"] == {
        "objects": 2,
        "difficult": 0,
        "detections": 2,
        "ap07": 1.0,
        "ap": 1.0,
        "ap07_75": 1.0,
        "ap_75": 1.0,
        "ap07_50_95": 1.0,
        "ap_50_95": 1.0,
    }
    assert result["curves"]["dog"] == {"precision": [1.0, 1.0], "recall": [0.5, 1.0]}
    figures = coco_metrics(detections, truths, 2)
    assert figures["AP"] == figures["AP_medium"] == pytest.approx(1) and figures["AR_1"] == 1
    assert figures["AP_small"] is figures["AP_large"] is figures["AR_small"] is None


def test_a_second_detection_of_an_object_is_false():
    truths = [truth((SQUARE, 1), (FAR, 1))]
    detections = [found((SQUARE, 1, 0.9), ((10, 10, 50, 49), 1, 0.8), (FAR, 1, 0.7))]
    result = voc_metrics(detections, truths, NAMES)
    assert result["curves"]["cat"]["precision"] == pytest.approx([1, 1 / 2, 2 / 3])
    assert result["classes"]["cat"]["ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["classes"]["cat"]["ap07"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_the_better_box_does_not_win_over_the_better_score():
    """At 0.75 the first claims nothing, so the second is right; at 0.5 the first has the object."""
    truths = [truth((SQUARE, 1))]
    result = voc_metrics([found(((10, 10, 50, 34), 1, 0.9), (SQUARE, 1, 0.8))], truths, NAMES)
    assert result["curves"]["cat"] == {"precision": [1.0, 0.5], "recall": [1.0, 1.0]}
    assert (result["map"], result["ap_75"]) == (1, 0.5)


def test_an_object_that_is_found_already_is_not_replaced_by_the_next_best():
    """VOC compares with the one most overlapped, COCO with the best of those left."""
    truths = [truth(((0, 0, 40, 40), 1), ((0, 4, 40, 44), 1))]
    detections = [found(((0, 0, 40, 40), 1, 0.9), ((0, 1, 40, 41), 1, 0.8))]
    assert ap(detections, truths)[1] == 0.5
    assert coco_metrics(detections, truths, 1)["AP50"] == pytest.approx(1)


def test_of_equal_overlaps_the_first_object_is_meant():
    truths = [truth((SQUARE, 1, True), (SQUARE, 1))]
    assert ap([found((SQUARE, 1, 0.9))], truths)[1] == 0
    assert ap([found((SQUARE, 1, 0.9))], [truth((SQUARE, 1), (SQUARE, 1, True))])[1] == 1


def test_a_difficult_object_counts_neither_way():
    truths = [truth((SQUARE, 1), (FAR, 1, True))]
    alone = [found((SQUARE, 1, 0.5))]
    twice = [found((FAR, 1, 0.9), (FAR, 1, 0.8), (SQUARE, 1, 0.5))]
    assert ap(alone, truths) == ap(twice, truths) == (1, 1)
    row = voc_metrics(twice, truths, NAMES)["classes"]["cat"]
    assert (row["objects"], row["difficult"], row["detections"]) == (1, 1, 3)
    assert coco_metrics(twice, truths, 1)["AP"] == pytest.approx(1)
    counted = coco_metrics(twice, truths, 1, count_difficult=True)
    assert counted["AR_10"] == 1 and counted["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_detection_that_misses_a_difficult_object_is_false():
    truths = [truth((SQUARE, 1), (FAR, 1, True))]
    missed = (FAR[0], FAR[1], FAR[0] + 19, FAR[3])  # an overlap of 19/40
    assert ap([found((missed, 1, 0.9), (SQUARE, 1, 0.5))], truths)[1] == 0.5


@pytest.mark.parametrize("right", [1, 3, 6, 7])
def test_eleven_points_take_a_recall_of_exactly_k_tenths(right):
    """k * 0.1 is more than k / 10 for 3, 6 and 7."""
    detections, truths = cats("+" * right, 10)
    assert ap(detections, truths) == (pytest.approx((right + 1) / 11), pytest.approx(right / 10))


def test_area_and_eleven_points_of_a_small_curve():
    """Precision 1, 1/2, 2/3, 1/2, 3/5, 1/2 at recall 1/4, 1/4, 2/4, 2/4, 3/4, 3/4."""
    detections, truths = cats("+-+-+-", 4)
    result = voc_metrics(detections, truths, NAMES)
    assert result["curves"]["cat"]["precision"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5, 1 / 2])
    assert result["curves"]["cat"]["recall"] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    row = result["classes"]["cat"]
    assert row["ap"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert row["ap07"] == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)  # 0 .1 .2, .3 .4 .5, .6 .7, none


def test_precision_never_rises_with_recall():
    """A late good stretch lifts what comes before: 0, 1/2, 2/3."""
    assert ap(*cats("-++", 2)) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("percent", range(50, 100, 5))
def test_an_overlap_that_is_exactly_the_threshold_is_enough(percent):
    """One of percent x 1 in one of 100 x 1: it is right at the thresholds up to it, and one pixel less is not."""
    truths = [truth(((3, 7, 103, 8), 1))]
    passed = (percent - 45) // 5
    for left_out, thresholds in ((100 - percent, passed), (101 - percent, passed - 1)):
        result = voc_metrics([found(((3 + left_out, 7, 103, 8), 1, 0.5))], truths, NAMES)
        assert result["ap_50_95"] == pytest.approx(thresholds / 10), left_out
        assert result["map"] == (thresholds > 0) and result["ap_75"] == (thresholds > 5)


def test_touching_boxes_do_not_overlap():
    assert ap([found(((50, 10, 90, 50), 1, 0.9))], [truth((SQUARE, 1))]) == (0, 0)


def test_boxes_without_area_overlap_nothing():
    flat = (10, 10, 10, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ap([found((flat, 1, 0.9), (SQUARE, 1, 0.8))], [truth((flat, 1), (SQUARE, 1, True))]) == (0, 0)
        for count_difficult in (False, True):
            same_as_cocoeval([found((flat, 1, 0.9))], [truth((flat, 1, True), (flat, 1))], 1, count_difficult)


def test_a_class_without_objects_leaves_the_means():
    truths = [truth((SQUARE, 1), (FAR, 2, True))]
    detections = [found((SQUARE, 1, 0.9), (SQUARE, 2, 0.8))]
    result = voc_metrics(detections, truths, [*NAMES, "cow"])
    assert result["map"] == result["map07"] == result["ap_50_95"] == result["ap_75"] == 1
    nothing = dict.fromkeys(("ap07", "ap", "ap07_75", "ap_75", "ap07_50_95", "ap_50_95"))
    assert result["classes"]["dog"] == {"objects": 0, "difficult": 1, "detections": 1, **nothing}
    assert result["classes"]["cow"] == {"objects": 0, "difficult": 0, "detections": 0, **nothing}
    assert result["curves"]["cow"] == {"precision": [], "recall": []}
    assert coco_metrics(detections, truths, 3)["AP"] == pytest.approx(1)


def test_classes_weigh_the_same_however_many_objects_they_have():
    truths = [truth((SQUARE, 1), (FAR, 1), ((0, 100, 40, 140), 2))]
    result = voc_metrics([found(((0, 100, 40, 140), 2, 0.1))], truths, NAMES)
    assert result["map"] == result["map07"] == result["ap07_75"] == 0.5


def test_an_image_without_objects_still_has_false_detections():
    truths = [truth(), truth((SQUARE, 1))]
    assert ap([found((SQUARE, 1, 0.9)), found((SQUARE, 1, 0.8))], truths)[1] == 0.5
    assert ap([found(), found((SQUARE, 1, 0.8))], truths)[1] == 1


def test_an_image_without_the_class_still_has_false_detections_of_it():
    truths = [truth((SQUARE, 2)), truth((SQUARE, 1))]
    detections = [found((SQUARE, 1, 0.9)), found((SQUARE, 1, 0.8))]
    assert ap(detections, truths)[1] == 0.5
    assert ap(detections, truths, "dog") == (0, 0)
    assert coco_metrics(detections, truths, 2)["AP50"] == pytest.approx(0.25)


def test_no_detections_are_worth_nothing():
    truths = [truth((SQUARE, 1)), truth()]
    result = voc_metrics([found(), found()], truths, NAMES)
    assert result["map"] == result["map07"] == 0 and result["classes"]["cat"]["detections"] == 0
    figures = coco_metrics([found(), found()], truths, 2)
    assert figures["AP"] == figures["AR_100"] == 0 and figures["AP_large"] is None


@pytest.mark.parametrize("images", [0, 2])
def test_nothing_to_find_is_no_figure(images):
    nothing = [found()] * images, [truth()] * images
    assert voc_metrics(*nothing, NAMES)["map"] is None
    assert set(coco_metrics(*nothing, 2).values()) == {None}


def test_equal_scores_go_by_the_order_of_images_and_detections():
    truths = [truth((SQUARE, 1)), truth((SQUARE, 1))]
    wrong, right = (FAR, 1, 0.5), (SQUARE, 1, 0.5)
    assert voc_metrics([found(right, wrong), found(right)], truths, NAMES)["curves"]["cat"]["recall"] == [0.5, 0.5, 1]
    assert voc_metrics([found(wrong, right), found(right)], truths, NAMES)["curves"]["cat"]["recall"] == [0, 0.5, 1]


def test_a_long_curve_is_cut_and_looks_the_same():
    signs = np.where(np.random.default_rng(0).random(3000) < np.linspace(1, 0.1, 3000), "+", "-")
    hits = np.cumsum(signs == "+")
    curve = voc_metrics(*cats("".join(signs), int(hits[-1])), NAMES)["curves"]["cat"]
    whole = hits / hits[-1], hits / np.arange(1, 3001)
    assert len(curve["recall"]) == len(curve["precision"]) <= 200
    assert (curve["recall"][0], curve["precision"][0]) == (whole[0][0], whole[1][0])
    assert (curve["recall"][-1], curve["precision"][-1]) == (whole[0][-1], whole[1][-1])
    assert set(zip(curve["recall"], curve["precision"], strict=True)) <= set(zip(*whole, strict=True))
    later = hits > 50
    assert np.abs(np.interp(whole[0], curve["recall"], curve["precision"]) - whole[1])[later].max() < 0.02


def test_the_result_is_plain_json():
    detections, truths = random_set(0)
    detections = [
        Detections(one.boxes.astype("f4"), one.labels.astype("i4"), one.scores.astype("f4")) for one in detections
    ]
    for result in (voc_metrics(detections, truths, ["a", "b", "c", "d"]), coco_metrics(detections, truths, 4)):
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_input_is_left_alone():
    detections, truths = random_set(1)
    before = [column.copy() for image in (*detections, *truths) for column in image]
    voc_metrics(detections, truths, ["a", "b", "c"])
    coco_metrics(detections, truths, 3)
    after = [column for image in (*detections, *truths) for column in image]
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize(
    "detections, truths, message",
    [
        ([found()], [truth(), truth()], "detections of 1 images and objects of 2"),
        ([found((SQUARE, 3, 0.5))], [truth()], r"labels must lie in 1\.\.2, got 3"),
        ([found()], [truth((SQUARE, 0))], r"labels must lie in 1\.\.2, got 0"),
        ([found((SQUARE, 1, float("nan")))], [truth()], "1 of 1 scores are NaN"),
        ([found((SQUARE, 1, 0.5))._replace(scores=np.ones(2))], [truth()], r"image 0: .* \(1, 4\), \(1,\) and \(2,\)"),
        ([found()], [truth()._replace(boxes=np.ones((1, 4)))], r"image 0: .* got \(1, 4\), \(0,\) and \(0,\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(detections, truths, message):
    for measure, classes in ((voc_metrics, NAMES), (coco_metrics, 2)):
        with pytest.raises(ValueError, match=message):
            measure(detections, truths, classes)


# VOC against the rule, in whole numbers


def exact_overlap(one, other) -> Fraction:
    (a, b, c, d), (e, f, g, h) = map(int, one), map(int, other)
    width, height = min(c, g) - max(a, e), min(d, h) - max(b, f)
    if width <= 0 or height <= 0:
        return Fraction(0)
    return Fraction(width * height, (c - a) * (d - b) + (g - e) * (h - f) - width * height)


def slow_voc(detections: list[Detections], truths: list[GroundTruth], label: int, threshold: Fraction):
    """None without objects, else the two APs and the curve."""
    rows = [
        (-score, image, place, box)
        for image, one in enumerate(detections)
        for place, (box, own, score) in enumerate(zip(*one, strict=True))
        if own == label
    ]
    objects = [[row for row in zip(*one, strict=True) if row[1] == label] for one in truths]
    positives = sum(not difficult for rows in objects for _, _, difficult in rows)
    if not positives:
        return None
    claimed, right, seen, curve = set(), 0, 0, []
    for _, image, _, box in sorted(rows, key=lambda row: row[:3]):
        overlaps = [exact_overlap(box, other) for other, _, _ in objects[image]]
        best = overlaps.index(max(overlaps)) if overlaps else None
        if best is not None and overlaps[best] >= threshold:
            if objects[image][best][2]:
                continue
            right += (image, best) not in claimed
            claimed.add((image, best))
        seen += 1
        curve.append((Fraction(right, positives), Fraction(right, seen)))
    eleven = sum(max((p for r, p in curve if r >= Fraction(k, 10)), default=0) for k in range(11)) / Fraction(11)
    area, before = Fraction(0), Fraction(0)
    for place, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[place:])
        before = recall
    return float(eleven), float(area), [(float(r), float(p)) for r, p in curve]


@pytest.mark.parametrize("seed", range(6))
def test_voc_is_what_the_rule_says(seed):
    detections, truths = random_set(seed)
    result = voc_metrics(detections, truths, ["a", "b", "c", "d"])  # of d there is nothing
    tables = []
    for label, name in enumerate("abcd", 1):
        slow = [slow_voc(detections, truths, label, Fraction(percent, 100)) for percent in range(50, 100, 5)]
        row, curve = result["classes"][name], result["curves"][name]
        if slow[0] is None:
            assert row["ap"] is row["ap07_50_95"] is None
            continue
        eleven, area = [one[0] for one in slow], [one[1] for one in slow]
        expected = [eleven[0], area[0], np.mean(eleven), np.mean(area)]
        assert [row[key] for key in ("ap07", "ap", "ap07_50_95", "ap_50_95")] == pytest.approx(expected, abs=1e-12)
        assert list(zip(curve["recall"], curve["precision"], strict=True)) == slow[0][2]
        tables.append([*expected, eleven[5], area[5]])
    assert len(tables) == 3 and 0.05 < tables[0][1] < 0.99
    means = [result[key] for key in ("map07", "map", "ap07_50_95", "ap_50_95", "ap07_75", "ap_75")]
    assert means == pytest.approx(np.mean(tables, 0), abs=1e-12)


# COCO against COCOeval

STATS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
STATS += ["AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]


def cocoeval(
    detections: list[Detections], truths: list[GroundTruth], classes: int, count_difficult: bool
) -> list[float]:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def index(images: list, mark: str) -> COCO:
        rows = []
        for image, one in enumerate(images):
            for box, label, extra in zip(*one, strict=True):
                x0, y0, x1, y1 = map(float, box)
                row = {"id": len(rows) + 1, "image_id": image, "category_id": int(label)}
                row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                rows.append(row | {mark: int(extra and not count_difficult) if mark == "iscrowd" else float(extra)})
        api = COCO()
        categories = [{"id": label} for label in range(1, classes + 1)]
        api.dataset = {"images": [{"id": i} for i in range(len(images))], "annotations": rows, "categories": categories}
        api.createIndex()
        return api

    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(index(truths, "iscrowd"), index(detections, "score"), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def same_as_cocoeval(
    detections: list[Detections], truths: list[GroundTruth], classes: int, count_difficult: bool
) -> list[float]:
    expected = cocoeval(detections, truths, classes, count_difficult)
    figures = coco_metrics(detections, truths, classes, count_difficult=count_difficult)
    assert list(figures) == STATS
    assert [-1 if figure is None else figure for figure in figures.values()] == pytest.approx(expected, abs=1e-13)
    return expected


@pytest.mark.parametrize("count_difficult", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_coco_equals_cocoeval(seed, count_difficult):
    expected = same_as_cocoeval(*random_set(seed, images=20), 4, count_difficult)
    assert all(0 < value < 1 for value in expected)


@pytest.mark.parametrize("count_difficult", [False, True])
def test_coco_equals_cocoeval_on_crowded_images(count_difficult):
    """More than 100 detections of a class in an image, and many objects for each to choose from."""
    expected = same_as_cocoeval(*random_set(7, images=6, classes=1, objects=40, most=400), 1, count_difficult)
    assert expected[8] < 1


def test_coco_takes_the_first_hundred_of_a_class_in_an_image():
    wrong = [(FAR, 1, 0.9)] * 99
    truths = [truth((SQUARE, 1), (SQUARE, 2))]
    for more, recall in ((0, 1), (1, 0.5)):
        detections = [found(*wrong, *[(FAR, 1, 0.9)] * more, (SQUARE, 1, 0.8), (SQUARE, 2, 0.1))]
        assert coco_metrics(detections, truths, 2)["AR_100"] == recall
        same_as_cocoeval(detections, truths, 2, False)


def test_coco_takes_the_last_of_equal_overlaps():
    """The first detection lies halfway between both objects (38/42) and takes the second. The next overlaps that by
    39/41 and the first by 35/45, so the two find two objects up to 0.75 and one from 0.8 on.
    """
    truths = [truth(((0, 0, 40, 40), 1), ((4, 0, 44, 40), 1))]
    detections = [found(((2, 0, 42, 40), 1, 0.9), ((5, 0, 45, 40), 1, 0.8))]
    assert coco_metrics(detections, truths, 1)["AR_10"] == pytest.approx((6 * 2 + 4 * 1) / 20)
    same_as_cocoeval(detections, truths, 1, False)


def test_coco_counts_both_ends_of_a_size():
    """32 x 32 is small and medium, 96 x 96 medium and large; a detection of another size that misses is left out."""
    truths = [truth(((0, 0, 32, 32), 1), ((100, 0, 196, 96), 1))]
    detections = [found(((0, 0, 32, 32), 1, 0.5), ((100, 0, 196, 96), 1, 0.4), ((0, 200, 31, 231), 1, 0.9))]
    figures = coco_metrics(detections, truths, 1)
    assert [figures["AP_medium"], figures["AP_large"]] == pytest.approx([1, 1])
    assert figures["AP_small"] == pytest.approx(0.5)
    same_as_cocoeval(detections, truths, 1, False)


def test_coco_equals_cocoeval_on_single_precision_off_the_grid():
    detections, truths = random_set(9, images=20)
    draw = np.random.default_rng(9)
    off = [one._replace(boxes=(one.boxes + draw.random(one.boxes.shape) / 2).astype("f4")) for one in detections]
    same_as_cocoeval(off, truths, 3, False)


def test_a_thousand_images_take_seconds():
    """A fifth of the 5,000 images of VOC2007 test, 20 classes, 100 detections each."""
    draw = np.random.default_rng(0)
    detections, truths = [], []
    for _ in range(1000):
        corner = draw.random((3, 2)) * 300
        boxes, labels = np.concatenate([corner, corner + 20 + draw.random((3, 2)) * 180], 1), draw.integers(1, 21, 3)
        truths.append(GroundTruth(boxes, labels, draw.random(3) < 0.1))
        source = draw.integers(0, 3, 100)
        moved, named = boxes[source] + draw.normal(0, 10, (100, 4)), labels[source]
        detections.append(
            Detections(moved, np.where(draw.random(100) < 0.3, named, draw.integers(1, 21, 100)), draw.random(100))
        )
    start = time.process_time()
    voc_metrics(detections, truths, [str(label) for label in range(20)])
    coco_metrics(detections, truths, 20)
    assert time.process_time() - start < 4
