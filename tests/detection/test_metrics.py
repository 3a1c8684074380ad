"""Average precision against cases worked out by hand, an exact reference of VOC, and pycocotools."""

import contextlib
import io
import json
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest

from detection.metrics import Detections, GroundTruth, coco_metrics, voc_metrics

SQUARE, FAR = (10, 10, 50, 50), (200, 200, 240, 240)  # boxes of COCO's medium size
NAMES = ["cat", "dog"]


def detect(*rows: tuple) -> Detections:
    """Make the detections of an image from rows of box, label, score."""
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores, float))


def annotate(*rows: tuple) -> GroundTruth:
    """Make the ground truth of an image from rows of box, label and, for a difficult object, True."""
    boxes, labels, difficult = zip(*((*row, False)[:3] for row in rows), strict=True) if rows else ((), (), ())
    return GroundTruth(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(difficult, bool))


def make_ranking(right: str, objects: int) -> tuple[list[Detections], list[GroundTruth]]:
    """Make detections of one class by decreasing score, `+` correct and `-` wrong, one per image; further images hold
    the other objects.
    """
    detections = [detect((SQUARE, 1, 1 - place / 5000)) for place in range(len(right))]
    truths = [annotate((SQUARE, 1)) if sign == "+" else annotate() for sign in right]
    rest = objects - right.count("+")
    return detections + [detect()] * rest, truths + [annotate((SQUARE, 1))] * rest


def class_ap(detections: list[Detections], truths: list[GroundTruth], name: str = "cat") -> tuple[float, float]:
    row = voc_metrics(detections, truths, NAMES)["classes"][name]
    return row["ap07"], row["ap"]


def make_random_set(
    seed: int, images: int = 12, classes: int = 3, objects: int = 8, most: int = 30
) -> tuple[list[Detections], list[GroundTruth]]:
    """Make boxes on whole pixels, of all of COCO's sizes. Most detections are objects of the image, shifted a little.
    There are equal scores (eight values), equal overlaps, duplicates, difficult objects, and images without boxes.
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
        mislabelled = draw.random(count) < 0.15
        named[mislabelled] = draw.integers(1, classes + 1, mislabelled.sum())
        detections.append(Detections(moved, named, draw.integers(1, 9, count) / 8))
    return detections, truths


# ---- VOC by hand ----


def test_perfect_detections_score_one():
    truths = [annotate((SQUARE, 1), (FAR, 2)), annotate((SQUARE, 2))]
    detections = [detect((SQUARE, 1, 0.3), (FAR, 2, 0.9)), detect((SQUARE, 2, 0.1))]
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
    values = coco_metrics(detections, truths, 2)
    assert values["AP"] == values["AP_medium"] == pytest.approx(1) and values["AR_1"] == 1
    assert values["AP_small"] is values["AP_large"] is values["AR_small"] is None


def test_second_detection_of_an_object_is_a_false_positive():
    truths = [annotate((SQUARE, 1), (FAR, 1))]
    detections = [detect((SQUARE, 1, 0.9), ((10, 10, 50, 49), 1, 0.8), (FAR, 1, 0.7))]
    result = voc_metrics(detections, truths, NAMES)
    assert result["curves"]["cat"]["precision"] == pytest.approx([1, 1 / 2, 2 / 3])
    assert result["classes"]["cat"]["ap"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["classes"]["cat"]["ap07"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_score_takes_precedence_over_overlap():
    """At 0.75 the first detection matches nothing, so the second is correct; at 0.5 the first one takes the object."""
    truths = [annotate((SQUARE, 1))]
    result = voc_metrics([detect(((10, 10, 50, 34), 1, 0.9), (SQUARE, 1, 0.8))], truths, NAMES)
    assert result["curves"]["cat"] == {"precision": [1.0, 0.5], "recall": [1.0, 1.0]}
    assert (result["map"], result["ap_75"]) == (1, 0.5)


def test_voc_does_not_fall_back_to_the_next_best_object():
    """VOC compares with the object of the highest overlap, COCO with the best of the unmatched objects."""
    truths = [annotate(((0, 0, 40, 40), 1), ((0, 4, 40, 44), 1))]
    detections = [detect(((0, 0, 40, 40), 1, 0.9), ((0, 1, 40, 41), 1, 0.8))]
    assert class_ap(detections, truths)[1] == 0.5
    assert coco_metrics(detections, truths, 1)["AP50"] == pytest.approx(1)


def test_first_object_wins_among_equal_overlaps():
    truths = [annotate((SQUARE, 1, True), (SQUARE, 1))]
    assert class_ap([detect((SQUARE, 1, 0.9))], truths)[1] == 0
    assert class_ap([detect((SQUARE, 1, 0.9))], [annotate((SQUARE, 1), (SQUARE, 1, True))])[1] == 1


def test_difficult_objects_are_ignored():
    truths = [annotate((SQUARE, 1), (FAR, 1, True))]
    alone = [detect((SQUARE, 1, 0.5))]
    twice = [detect((FAR, 1, 0.9), (FAR, 1, 0.8), (SQUARE, 1, 0.5))]
    assert class_ap(alone, truths) == class_ap(twice, truths) == (1, 1)
    row = voc_metrics(twice, truths, NAMES)["classes"]["cat"]
    assert (row["objects"], row["difficult"], row["detections"]) == (1, 1, 3)
    assert coco_metrics(twice, truths, 1)["AP"] == pytest.approx(1)
    counted = coco_metrics(twice, truths, 1, count_difficult=True)
    assert counted["AR_10"] == 1 and counted["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_missing_a_difficult_object_is_a_false_positive():
    truths = [annotate((SQUARE, 1), (FAR, 1, True))]
    missed = (FAR[0], FAR[1], FAR[0] + 19, FAR[3])  # an IoU of 19/40
    assert class_ap([detect((missed, 1, 0.9), (SQUARE, 1, 0.5))], truths)[1] == 0.5


@pytest.mark.parametrize("right", [1, 3, 6, 7])
def test_eleven_points_include_a_recall_of_exactly_k_tenths(right):
    """In floating point k * 0.1 is more than k / 10 for 3, 6 and 7."""
    detections, truths = make_ranking("+" * right, 10)
    assert class_ap(detections, truths) == (pytest.approx((right + 1) / 11), pytest.approx(right / 10))


def test_area_and_eleven_point_ap_of_a_small_curve():
    """Precision 1, 1/2, 2/3, 1/2, 3/5, 1/2 at recall 1/4, 1/4, 2/4, 2/4, 3/4, 3/4."""
    detections, truths = make_ranking("+-+-+-", 4)
    result = voc_metrics(detections, truths, NAMES)
    assert result["curves"]["cat"]["precision"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5, 1 / 2])
    assert result["curves"]["cat"]["recall"] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    row = result["classes"]["cat"]
    assert row["ap"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert row["ap07"] == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)  # 0 .1 .2, .3 .4 .5, .6 .7, none


def test_precision_is_monotone_in_recall():
    """Interpolation raises the precision at lower recalls: the raw values are 0, 1/2, 2/3."""
    assert class_ap(*make_ranking("-++", 2)) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize("percent", range(50, 100, 5))
def test_iou_equal_to_the_threshold_matches(percent):
    """A box of percent x 1 pixels in one of 100 x 1 matches at thresholds up to percent; one pixel less does not."""
    truths = [annotate(((3, 7, 103, 8), 1))]
    passed = (percent - 45) // 5
    for left_out, thresholds in ((100 - percent, passed), (101 - percent, passed - 1)):
        result = voc_metrics([detect(((3 + left_out, 7, 103, 8), 1, 0.5))], truths, NAMES)
        assert result["ap_50_95"] == pytest.approx(thresholds / 10), left_out
        assert result["map"] == (thresholds > 0) and result["ap_75"] == (thresholds > 5)


def test_touching_boxes_do_not_overlap():
    assert class_ap([detect(((50, 10, 90, 50), 1, 0.9))], [annotate((SQUARE, 1))]) == (0, 0)


def test_boxes_without_area_overlap_nothing():
    flat = (10, 10, 10, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_ap([detect((flat, 1, 0.9), (SQUARE, 1, 0.8))], [annotate((flat, 1), (SQUARE, 1, True))]) == (0, 0)
        for count_difficult in (False, True):
            check_against_cocoeval([detect((flat, 1, 0.9))], [annotate((flat, 1, True), (flat, 1))], 1, count_difficult)


def test_class_without_objects_is_excluded_from_the_means():
    truths = [annotate((SQUARE, 1), (FAR, 2, True))]
    detections = [detect((SQUARE, 1, 0.9), (SQUARE, 2, 0.8))]
    result = voc_metrics(detections, truths, [*NAMES, "cow"])
    assert result["map"] == result["map07"] == result["ap_50_95"] == result["ap_75"] == 1
    nothing = dict.fromkeys(("ap07", "ap", "ap07_75", "ap_75", "ap07_50_95", "ap_50_95"))
    assert result["classes"]["dog"] == {"objects": 0, "difficult": 1, "detections": 1, **nothing}
    assert result["classes"]["cow"] == {"objects": 0, "difficult": 0, "detections": 0, **nothing}
    assert result["curves"]["cow"] == {"precision": [], "recall": []}
    assert coco_metrics(detections, truths, 3)["AP"] == pytest.approx(1)


def test_classes_have_equal_weight():
    truths = [annotate((SQUARE, 1), (FAR, 1), ((0, 100, 40, 140), 2))]
    result = voc_metrics([detect(((0, 100, 40, 140), 2, 0.1))], truths, NAMES)
    assert result["map"] == result["map07"] == result["ap07_75"] == 0.5


def test_detections_in_an_image_without_objects_are_false_positives():
    truths = [annotate(), annotate((SQUARE, 1))]
    assert class_ap([detect((SQUARE, 1, 0.9)), detect((SQUARE, 1, 0.8))], truths)[1] == 0.5
    assert class_ap([detect(), detect((SQUARE, 1, 0.8))], truths)[1] == 1


def test_detections_in_an_image_without_the_class_are_false_positives():
    truths = [annotate((SQUARE, 2)), annotate((SQUARE, 1))]
    detections = [detect((SQUARE, 1, 0.9)), detect((SQUARE, 1, 0.8))]
    assert class_ap(detections, truths)[1] == 0.5
    assert class_ap(detections, truths, "dog") == (0, 0)
    assert coco_metrics(detections, truths, 2)["AP50"] == pytest.approx(0.25)


def test_no_detections_score_zero():
    truths = [annotate((SQUARE, 1)), annotate()]
    result = voc_metrics([detect(), detect()], truths, NAMES)
    assert result["map"] == result["map07"] == 0 and result["classes"]["cat"]["detections"] == 0
    values = coco_metrics([detect(), detect()], truths, 2)
    assert values["AP"] == values["AR_100"] == 0 and values["AP_large"] is None


@pytest.mark.parametrize("images", [0, 2])
def test_metrics_without_objects_are_none(images):
    nothing = [detect()] * images, [annotate()] * images
    assert voc_metrics(*nothing, NAMES)["map"] is None
    assert set(coco_metrics(*nothing, 2).values()) == {None}


def test_equal_scores_keep_the_order_of_images_and_detections():
    truths = [annotate((SQUARE, 1)), annotate((SQUARE, 1))]
    wrong, right = (FAR, 1, 0.5), (SQUARE, 1, 0.5)
    assert voc_metrics([detect(right, wrong), detect(right)], truths, NAMES)["curves"]["cat"]["recall"] == [0.5, 0.5, 1]
    assert voc_metrics([detect(wrong, right), detect(right)], truths, NAMES)["curves"]["cat"]["recall"] == [0, 0.5, 1]


def test_long_curve_is_thinned_without_visible_change():
    signs = np.where(np.random.default_rng(0).random(3000) < np.linspace(1, 0.1, 3000), "+", "-")
    hits = np.cumsum(signs == "+")
    curve = voc_metrics(*make_ranking("".join(signs), int(hits[-1])), NAMES)["curves"]["cat"]
    whole = hits / hits[-1], hits / np.arange(1, 3001)
    assert len(curve["recall"]) == len(curve["precision"]) <= 200
    assert (curve["recall"][0], curve["precision"][0]) == (whole[0][0], whole[1][0])
    assert (curve["recall"][-1], curve["precision"][-1]) == (whole[0][-1], whole[1][-1])
    assert set(zip(curve["recall"], curve["precision"], strict=True)) <= set(zip(*whole, strict=True))
    later = hits > 50
    assert np.abs(np.interp(whole[0], curve["recall"], curve["precision"]) - whole[1])[later].max() < 0.02


def test_result_is_plain_json():
    detections, truths = make_random_set(0)
    detections = [
        Detections(one.boxes.astype("f4"), one.labels.astype("i4"), one.scores.astype("f4")) for one in detections
    ]
    for result in (voc_metrics(detections, truths, ["a", "b", "c", "d"]), coco_metrics(detections, truths, 4)):
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_inputs_are_not_modified():
    detections, truths = make_random_set(1)
    before = [column.copy() for image in (*detections, *truths) for column in image]
    voc_metrics(detections, truths, ["a", "b", "c"])
    coco_metrics(detections, truths, 3)
    after = [column for image in (*detections, *truths) for column in image]
    assert all(map(np.array_equal, before, after))


@pytest.mark.parametrize(
    "detections, truths, message",
    [
        ([detect()], [annotate(), annotate()], "must be of the same images, got 1 and 2 images"),
        ([detect((SQUARE, 3, 0.5))], [annotate()], r"labels must be in 1\.\.2, got 3"),
        ([detect()], [annotate((SQUARE, 0))], r"labels must be in 1\.\.2, got 0"),
        ([detect((SQUARE, 1, float("nan")))], [annotate()], "1 of 1 scores are NaN"),
        (
            [detect((SQUARE, 1, 0.5))._replace(scores=np.ones(2))],
            [annotate()],
            r"image 0: .* got \(1, 4\), \(1,\) and \(2,\)",
        ),
        ([detect()], [annotate()._replace(boxes=np.ones((1, 4)))], r"image 0: .* got \(1, 4\), \(0,\) and \(0,\)"),
    ],
)
def test_inconsistent_inputs_raise(detections, truths, message):
    for measure, classes in ((voc_metrics, NAMES), (coco_metrics, 2)):
        with pytest.raises(ValueError, match=message):
            measure(detections, truths, classes)


# ---- VOC against an exact reference in fractions ----


def exact_iou(one, other) -> Fraction:
    (a, b, c, d), (e, f, g, h) = map(int, one), map(int, other)
    width, height = min(c, g) - max(a, e), min(d, h) - max(b, f)
    if width <= 0 or height <= 0:
        return Fraction(0)
    return Fraction(width * height, (c - a) * (d - b) + (g - e) * (h - f) - width * height)


def reference_voc(detections: list[Detections], truths: list[GroundTruth], label: int, threshold: Fraction):
    """Compute the two APs and the curve of a class by the rule of VOC; None without objects."""
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
        overlaps = [exact_iou(box, other) for other, _, _ in objects[image]]
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
def test_voc_equals_exact_reference(seed):
    detections, truths = make_random_set(seed)
    result = voc_metrics(detections, truths, ["a", "b", "c", "d"])  # class d has no objects
    tables = []
    for label, name in enumerate("abcd", 1):
        slow = [reference_voc(detections, truths, label, Fraction(percent, 100)) for percent in range(50, 100, 5)]
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


# ---- COCO against COCOeval ----

STATS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
STATS += ["AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]


def run_cocoeval(
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
        evaluator = COCOeval(index(truths, "iscrowd"), index(detections, "score"), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def check_against_cocoeval(
    detections: list[Detections], truths: list[GroundTruth], classes: int, count_difficult: bool
) -> list[float]:
    expected = run_cocoeval(detections, truths, classes, count_difficult)
    values = coco_metrics(detections, truths, classes, count_difficult=count_difficult)
    assert list(values) == STATS
    assert [-1 if value is None else value for value in values.values()] == pytest.approx(expected, abs=1e-13)
    return expected


@pytest.mark.parametrize("count_difficult", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_coco_equals_cocoeval(seed, count_difficult):
    expected = check_against_cocoeval(*make_random_set(seed, images=20), 4, count_difficult)
    assert all(0 < value < 1 for value in expected)


@pytest.mark.parametrize("count_difficult", [False, True])
def test_coco_equals_cocoeval_on_crowded_images(count_difficult):
    """There are more than 100 detections per class and image, and many overlapping objects for each."""
    expected = check_against_cocoeval(
        *make_random_set(7, images=6, classes=1, objects=40, most=400), 1, count_difficult
    )
    assert expected[8] < 1


def test_coco_uses_the_first_hundred_detections_per_class_and_image():
    wrong = [(FAR, 1, 0.9)] * 99
    truths = [annotate((SQUARE, 1), (SQUARE, 2))]
    for more, recall in ((0, 1), (1, 0.5)):
        detections = [detect(*wrong, *[(FAR, 1, 0.9)] * more, (SQUARE, 1, 0.8), (SQUARE, 2, 0.1))]
        assert coco_metrics(detections, truths, 2)["AR_100"] == recall
        check_against_cocoeval(detections, truths, 2, False)


def test_coco_takes_the_last_object_among_equal_overlaps():
    """The first detection overlaps both objects equally (38/42) and takes the second one. The next detection overlaps
    that one by 39/41 and the first object by 35/45, so both objects are detected up to 0.75 and one from 0.8 on.
    """
    truths = [annotate(((0, 0, 40, 40), 1), ((4, 0, 44, 40), 1))]
    detections = [detect(((2, 0, 42, 40), 1, 0.9), ((5, 0, 45, 40), 1, 0.8))]
    assert coco_metrics(detections, truths, 1)["AR_10"] == pytest.approx((6 * 2 + 4 * 1) / 20)
    check_against_cocoeval(detections, truths, 1, False)


def test_coco_size_ranges_include_both_ends():
    """32 x 32 is small and medium, 96 x 96 medium and large; unmatched detections of another size are ignored."""
    truths = [annotate(((0, 0, 32, 32), 1), ((100, 0, 196, 96), 1))]
    detections = [detect(((0, 0, 32, 32), 1, 0.5), ((100, 0, 196, 96), 1, 0.4), ((0, 200, 31, 231), 1, 0.9))]
    values = coco_metrics(detections, truths, 1)
    assert [values["AP_medium"], values["AP_large"]] == pytest.approx([1, 1])
    assert values["AP_small"] == pytest.approx(0.5)
    check_against_cocoeval(detections, truths, 1, False)


def test_coco_equals_cocoeval_on_float32_boxes():
    detections, truths = make_random_set(9, images=20)
    draw = np.random.default_rng(9)
    off = [one._replace(boxes=(one.boxes + draw.random(one.boxes.shape) / 2).astype("f4")) for one in detections]
    check_against_cocoeval(off, truths, 3, False)


def test_a_thousand_images_take_seconds():
    """The data is a fifth of VOC2007 test: 1,000 images, 20 classes, 100 detections each."""
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
