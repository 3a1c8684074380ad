import json
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from engine.drawing.figures import save_figure
from evaluation.calibration import (
    TEMPERATURES,
    adaptive_calibration_error,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    draw_reliability,
    fit_temperature,
    measure_calibration,
    merge_small_bins,
    negative_log_likelihood,
    reliability_table,
)

ERRORS = [calibration_error, adaptive_calibration_error, classwise_calibration_error]
METRICS = {"ece", "adaptive_ece", "classwise_ece", "nll", "brier", "accuracy", "mean_confidence", "reliability"}


def make_logits(*confidence: float) -> torch.Tensor:
    """Return logits of two classes, of which the first has this probability."""
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first.log(), (1 - first).log()], 1)


def make_calibrated(tenths: tuple[int, ...] = (6, 7, 8, 9), each: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels whose accuracy equals their confidence, n tenths, exactly; two classes."""
    logits = make_logits(*(n / 10 for n in tenths)).repeat_interleave(10 * each, 0)
    labels = torch.cat([(torch.arange(10) >= n).long().repeat(each) for n in tenths])
    return logits, labels


def make_random_case(images: int = 400, classes: int = 5, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = spread * torch.randn(images, classes)
    return logits, torch.multinomial(logits.softmax(1), 1).squeeze(1)


# ---- Calibration errors ----


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.95, 0.85, 0.85, 0.65])
    logits = torch.stack([confidence.log(), (1 - confidence).log()], 1)
    labels = torch.tensor([0, 0, 1, 1])  # bins of 0.1: (0.6, 0.7] wrong; (0.8, 0.9] half correct; (0.9, 1] correct
    expected = (0.65 + abs(0.85 * 2 - 1) + abs(0.95 - 1)) / 4
    assert calibration_error(logits, labels, 10) == pytest.approx(expected, abs=1e-6)


def test_a_bin_includes_its_upper_edge():
    logits, labels = torch.tensor([[0.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 1])  # confidences of 0.5 and 0.525
    assert reliability_table(logits, labels, 2)["count"] == [1, 1]
    assert reliability_table(100 * torch.eye(3), torch.arange(3), 4)["count"] == [0, 0, 0, 3], "1 is in the last bin"


def test_adaptive_bins_hold_equally_many_images():
    logits, labels = make_logits(0.9, 0.6, 0.8, 0.7), torch.tensor([0, 1, 1, 0])
    expected = (abs(0.6 + 0.7 - 1) + abs(0.8 + 0.9 - 1)) / 4
    assert adaptive_calibration_error(logits, labels, 2) == pytest.approx(expected, abs=1e-12)
    five = make_logits(0.9, 0.6, 0.8, 0.7, 0.95), torch.tensor([0, 1, 1, 0, 0])  # bins of 3 and 2
    expected = (abs(0.6 + 0.7 + 0.8 - 1) + abs(0.9 + 0.95 - 2)) / 5
    assert adaptive_calibration_error(*five, 2) == pytest.approx(expected, abs=1e-12)


def test_adaptive_bins_do_not_depend_on_the_order_of_equal_confidences():
    logits, labels = make_logits(0.8, 0.8, 0.8, 0.8), torch.tensor([0, 0, 0, 1])
    for turn in range(4):
        assert adaptive_calibration_error(logits, labels.roll(turn), 2) == pytest.approx(0.05, abs=1e-12)


def test_each_of_fewer_images_than_bins_is_a_bin():
    logits, labels = make_logits(0.9, 0.6), torch.tensor([0, 1])
    assert adaptive_calibration_error(logits, labels, 15) == pytest.approx((0.1 + 0.6) / 2, abs=1e-12)


def test_classwise_error_is_the_mean_over_the_classes():
    probability = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    labels = torch.tensor([0, 1, 2])
    first, second = abs(0.7 + 0.6 - 1) + 0.1, abs(0.2 + 0.3 + 0.1 - 1)  # two bins: up to 0.5 and above
    third = abs(0.1 + 0.1) + abs(0.8 - 1)
    expected = (first + second + third) / 3 / 3
    assert classwise_calibration_error(probability.log(), labels, 2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("images, classes", [(303, 4), (70_000, 64)])
def test_classwise_error_equals_each_class_computed_alone(images, classes):
    """Also for more probabilities than are binned at a time."""
    logits, labels = make_random_case(images, classes)
    expected = 0.0
    for number, probability in enumerate(logits.double().softmax(1).unbind(1)):
        difference = probability - (labels == number).double()
        for low in range(7):
            inside = (probability > low / 7) & (probability <= (low + 1) / 7)
            expected += float(difference[inside].sum().abs()) / images / classes
    assert classwise_calibration_error(logits, labels, 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("error", ERRORS)
def test_a_calibrated_classifier_has_no_error(error):
    logits, labels = make_calibrated()
    assert error(logits, labels, 4) == pytest.approx(0, abs=1e-12)
    assert error(3 * logits, labels, 4) > 0.05


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_dtype_are_computed_in_float64(error, dtype):
    logits, labels = make_random_case()
    assert error(logits.to(dtype), labels) == error(logits.to(dtype).double(), labels)


def test_confidences_that_float32_rounds_to_one_are_distinguished():
    logits = torch.tensor([[18.0, 0.0], [30.0, 0.0]])
    assert adaptive_calibration_error(logits, torch.tensor([0, 0]), 2) > 5e-9


def test_reliability_table_has_none_for_empty_bins():
    table = reliability_table(make_logits(0.9, 0.95, 0.6), torch.tensor([0, 1, 0]), 4)
    assert table["edges"] == [0, 0.25, 0.5, 0.75, 1] and table["count"] == [0, 0, 1, 2]
    assert table["confidence"] == [None, None, pytest.approx(0.6), pytest.approx(0.925)]
    assert table["accuracy"] == [None, None, 1.0, 0.5]


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_torchmetrics(bins):
    oracle = pytest.importorskip("torchmetrics").functional.classification.multiclass_calibration_error
    for spread in (0.5, 2.0, 8.0):
        logits, labels = make_random_case(2000, 10, spread)
        logits = 1.3 * logits.double()
        expected = float(oracle(logits.softmax(1), labels, 10, n_bins=bins, norm="l1"))
        assert calibration_error(logits, labels, bins) == pytest.approx(expected, abs=5e-6), (
            "torchmetrics sums in float32"
        )


# ---- Proper scores ----


def test_proper_scores_by_hand():
    logits, labels = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log(), torch.tensor([0, 2])
    nll = -(math.log(0.7) + math.log(0.25)) / 2
    assert negative_log_likelihood(logits, labels) == pytest.approx(nll, abs=1e-6)
    brier = (0.3**2 + 0.2**2 + 0.1**2 + 0.5**2 + 0.25**2 + 0.75**2) / 2
    assert brier_score(logits, labels) == pytest.approx(brier, abs=1e-6)
    assert brier_score(100 * torch.eye(2), torch.tensor([1, 0])) == pytest.approx(2), "the maximum"


# ---- Temperature ----


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 15.0])
def test_a_known_temperature_is_found_exactly(scale):
    logits, labels = make_calibrated()
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale, rel=1e-8)


def test_a_known_temperature_is_found_from_sampled_labels():
    logits, labels = make_random_case(20_000, 10)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 2.0, 50.0, 1000.0])
@pytest.mark.parametrize("wrong", [0.02, 0.5])
def test_no_other_temperature_is_better(spread, wrong):
    logits = spread * torch.randn(60, 4)
    labels = torch.where(torch.rand(60) < wrong, torch.randint(4, (60,)), logits.argmax(1))
    best = fit_temperature(logits, labels)
    assert TEMPERATURES[0] <= best <= TEMPERATURES[1]
    least = negative_log_likelihood(logits.double() / best, labels)
    for other in torch.logspace(math.log10(0.05), math.log10(20), 300, dtype=torch.float64).tolist():
        assert least <= negative_log_likelihood(logits.double() / other, labels) * (1 + 1e-12)


@pytest.mark.parametrize("outlier", [1e3, 1e6])
def test_an_outlier_does_not_mislead_the_search(outlier):
    logits, labels = make_calibrated()
    logits = torch.cat([5 * logits, torch.tensor([[outlier, 0.0]])])
    best = fit_temperature(logits, torch.cat([labels, torch.tensor([1])]))
    assert best == TEMPERATURES[1] or best > 5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_temperature_without_an_optimum_ends_at_a_bound(scale):
    logits = scale * torch.tensor([[2.0, 0, 0], [0, 0.5, -1]])
    right, wrong = logits.argmax(1), logits.argmin(1)
    for count in (1, 2):
        assert fit_temperature(logits[:count], right[:count]) == TEMPERATURES[0]
        assert fit_temperature(logits[:count], wrong[:count]) == TEMPERATURES[1]


@pytest.mark.parametrize("logits", [torch.zeros(5, 3), torch.randn(5, 1), torch.tensor([[1e6, 0.0]])])
def test_temperature_without_effect_is_one(logits):
    assert fit_temperature(logits, torch.zeros(len(logits)).long()) == 1


# ---- All metrics ----


def test_metrics_are_computed_on_the_images_that_are_not_held_out():
    logits, labels = make_random_case(500, 6)
    logits, heldout = 4 * logits, torch.arange(500) % 5 == 0
    result = measure_calibration(logits, labels, heldout, 12)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    temperature = result["temperature"]
    assert temperature == fit_temperature(logits[heldout], labels[heldout]) and not result["temperature_at_bound"]
    assert (result["images"], result["held_out"], result["bins"]) == (400, 100, 12)
    for shown, divisor in ((result, 1.0), (result["after"], temperature)):
        rest, own = logits[~heldout].double() / divisor, labels[~heldout]
        probability = rest.softmax(1)
        assert shown["ece"] == 100 * calibration_error(rest, own, 12)
        assert shown["adaptive_ece"] == 100 * adaptive_calibration_error(rest, own, 12)
        assert shown["classwise_ece"] == 100 * classwise_calibration_error(rest, own, 12)
        assert shown["nll"] == pytest.approx(float(F.cross_entropy(rest, own)))
        assert shown["brier"] == pytest.approx(float((probability - F.one_hot(own, 6)).square().sum(1).mean()))
        assert shown["accuracy"] == pytest.approx(100 * float((rest.argmax(1) == own).double().mean()))
        assert shown["mean_confidence"] == pytest.approx(100 * float(probability.amax(1).mean()))
        assert sum(shown["reliability"]["count"]) == 400 and len(shown["reliability"]["edges"]) == 13
    assert result["accuracy"] == result["after"]["accuracy"]
    assert result["after"]["ece"] < result["ece"] and result["after"]["nll"] < result["nll"]
    assert set(result["after"]) == METRICS


@pytest.mark.gpu
def test_metrics_agree_on_gpu_and_cpu():
    logits, labels = make_random_case(3000, 10)
    heldout = torch.arange(3000) % 3 == 0
    here, there = (
        measure_calibration(logits, labels, heldout),
        measure_calibration(logits.cuda(), labels.cuda(), heldout),
    )
    for key in METRICS - {"reliability"}:
        assert there[key] == pytest.approx(here[key], rel=1e-9)
        assert there["after"][key] == pytest.approx(here["after"][key], rel=1e-7)
    assert there["temperature"] == pytest.approx(here["temperature"], rel=1e-8)
    assert there["reliability"]["count"] == here["reliability"]["count"]


def test_labels_of_scored_images_do_not_change_the_temperature():
    logits, labels = make_random_case(200)
    heldout = torch.arange(200) < 50
    other = torch.where(heldout, labels, (labels + 1) % 5)
    one, two = measure_calibration(logits, labels, heldout), measure_calibration(logits, other, heldout)
    assert one["temperature"] == two["temperature"] and one["ece"] != two["ece"]


def test_a_temperature_at_its_bound_is_reported():
    logits = torch.randn(20, 3)
    heldout = torch.arange(20) < 10
    result = measure_calibration(logits, logits.argmax(1), heldout)
    assert (result["temperature"], result["temperature_at_bound"]) == (0.05, True)
    json.dumps(result, allow_nan=False)


def test_logits_that_hardly_differ_keep_their_predicted_class():
    logits = torch.tensor([[0.0, 1e-20], [0.0, 1e-20], [1e-20, 0.0]])
    result = measure_calibration(logits, torch.tensor([1, 1, 0]), torch.tensor([True, False, False]))
    assert result["accuracy"] == result["after"]["accuracy"] == 100, "their probabilities are equal"


# ---- Errors ----

ALL = [*ERRORS, reliability_table, negative_log_likelihood, brier_score, fit_temperature]


@pytest.mark.parametrize("function", ALL)
def test_invalid_logits_and_labels_are_refused(function):
    logits, labels = make_random_case(6, 3)
    with pytest.raises(ValueError, match="at least one image"):
        function(logits[:0], labels[:0])
    broken = logits.clone()
    broken[1, 0], broken[4] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="NaN or infinite for 2 of 6 images"):
        function(broken, labels)
    with pytest.raises(ValueError, match=r"0\.\.2, got 0 to 3"):
        function(logits, torch.tensor([0, 1, 2, 3, 0, 0]))
    with pytest.raises(ValueError, match=r"0\.\.2, got -1"):
        function(logits, torch.tensor([0, 1, 2, -1, 0, 0]))
    for wrong in (labels[:5], labels.float(), labels.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"labels must be torch.long of shape \(6,\)"):
            function(logits, wrong)


@pytest.mark.parametrize("function", [*ERRORS, reliability_table])
def test_zero_bins_are_refused(function):
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        function(*make_random_case(6, 3), 0)


def test_some_images_must_be_held_out_and_some_left():
    logits, labels = make_random_case(6, 3)
    for heldout, count in ((torch.zeros(6), 0), (torch.ones(6), 6)):
        with pytest.raises(ValueError, match=f"heldout selects {count} of 6 images"):
            measure_calibration(logits, labels, heldout.bool())
    for heldout in (torch.ones(5).bool(), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="heldout must be 6 bools"):
            measure_calibration(logits, labels, heldout)


# ---- Figure ----


@pytest.mark.parametrize("after", [False, True])
def test_one_classifier_is_drawn_as_bars_and_several_as_lines(tmp_path, after):
    logits, labels = make_random_case(300)
    heldout = torch.arange(300) < 60
    results = [(name, measure_calibration(scale * logits, labels, heldout)) for name, scale in (("a", 3.0), ("b", 0.5))]
    for count in (1, 2):
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        draw_reliability(axes, json.loads(json.dumps(results[:count])), after=after)
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        for (name, result), text in zip(results[:count], texts, strict=False):
            ece = (result["after"] if after else result)["ece"]
            assert text == f"{name}: ECE {ece:.2f} %"
        assert len(axes.child_axes) == (1 if count == 1 else 0), "the histogram of the confidences"
        assert len(axes.lines) == (1 if count == 1 else 3)
        table = (results[0][1]["after"] if after else results[0][1])["reliability"]
        if count == 1:
            right = [100 * one for one in table["accuracy"] if one is not None]
            assert [bar.get_height() for bar in axes.patches[2::2]] == right
        else:
            right = [accuracy for _, accuracy, _ in merge_small_bins(table)]
            assert list(axes.lines[1].get_ydata()) == right
        assert axes.get_xlim() == axes.get_ylim() == (0, 100), "percent, as on all axes"
        save_figure(figure, tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 5000


def test_the_line_rests_on_groups_of_enough_images():
    table = {"edges": [0, 0.2, 0.4, 0.6, 0.8, 1], "count": [1, 0, 9, 20, 2]}
    table |= {"accuracy": [0.0, None, 1.0, 0.5, 0.0], "confidence": [0.1, None, 0.5, 0.7, 0.9]}
    first, last = merge_small_bins(table)
    assert first == pytest.approx((46, 90, 10)), "an accuracy of 0 in a bin of one image is no point of its own"
    assert last == pytest.approx((100 * (20 * 0.7 + 2 * 0.9) / 22, 100 * 10 / 22, 22))
    assert merge_small_bins(table, 1000) == [pytest.approx((100 * 20.4 / 32, 100 * 19 / 32, 32))]


def test_a_single_image_is_drawn():
    result = measure_calibration(
        torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]), torch.tensor([True, False])
    )
    figure = Figure()
    draw_reliability(figure.subplots(), [("a", result)])
    draw_reliability(figure.subplots(), [("a", result), ("b", result)], after=True)
    figure.canvas.draw()
