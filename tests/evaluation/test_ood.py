import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from engine.drawing.figures import save_figure
from evaluation.ood import (
    SCORES,
    auroc,
    draw_histogram,
    draw_roc,
    energy,
    fpr_at,
    histogram,
    max_logit,
    measure_ood,
    msp,
    roc_curve,
)


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_pair(grid: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of random counts, on few values if a grid is given, so that many are equal."""
    inside, outside = (torch.randn(int(count)) for count in torch.randint(1, 40, (2,)))
    inside = inside + 0.7
    return (inside, outside) if grid is None else ((inside * grid).round(), (outside * grid).round())


# scores


def test_scores_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log() + torch.tensor([[3.0], [-1.0]])
    torch.testing.assert_close(msp(logits), scores(0.5, 0.8), atol=1e-6, rtol=0)
    torch.testing.assert_close(energy(logits), scores(3, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(max_logit(logits), scores(3 + math.log(0.5), math.log(0.8) - 1), atol=1e-6, rtol=0)
    pair = torch.tensor([[2.0, 0.0]])
    assert float(energy(pair, 2.0)) == pytest.approx(2 * math.log(math.e + 1))
    assert float(energy(pair, 1e-3)) == pytest.approx(2.0), "large logits do not overflow"


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_clear_image_scores_higher_than_a_vague_one(name):
    clear, vague = SCORES[name](torch.tensor([[8.0, 0.0, 1.0], [0.5, 0.4, 0.3]]))
    assert clear > vague


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_logits_are_scored_in_float64(name, kind):
    logits = (5 * torch.randn(50, 7)).to(kind)
    found = SCORES[name](logits)
    assert found.dtype == torch.float64 and torch.equal(found, SCORES[name](logits.double()))


def test_sure_images_are_still_told_apart():
    near, far = msp(torch.tensor([[20.0, 0.0], [25.0, 0.0]]))
    assert near < far, "both are 1 in float32"


# AUROC and FPR


def test_auroc_by_hand():
    assert auroc(scores(2, 3), scores(0, 1)) == 1 and auroc(scores(0, 1), scores(2, 3)) == 0
    assert auroc(scores(1, 1, 1), scores(1, 1)) == 0.5
    assert auroc(scores(1, 3), scores(1, 2, 0)) == (0.5 + 0 + 1 + 3) / 6


def test_the_threshold_is_an_inside_score_and_keeps_its_equals():
    inside = torch.arange(20.0)  # 95 percent of 20 are 19: the threshold is 1
    assert fpr_at(inside, scores(0.5, 0.999, 1.0, 7.0)) == 0.5
    assert fpr_at(inside, scores(0.5, 0.999, 1.0, 7.0), tpr=1) == 1
    assert fpr_at(inside[:19], scores(0.0, 0.5, 1.0, 7.0)) == 1, "of 19 all are needed"
    assert fpr_at(torch.arange(100.0), torch.arange(100.0), tpr=0.07) == 0.07, "whose product is a little above 7"
    assert fpr_at(scores(1, 1, 1), scores(1, 0)) == 0.5
    assert fpr_at(inside, scores(25.0, -1.0), tpr=1e-12) == 0.5, "one image is kept at least"


@pytest.mark.parametrize("grid", [None, 1, 3])
def test_auroc_and_fpr_equal_all_pairs_compared(grid):
    for _ in range(40):
        inside, outside = random_pair(grid)
        pairs = inside.unsqueeze(1) - outside
        wins = (pairs > 0).double() + 0.5 * (pairs == 0).double()
        assert auroc(inside, outside) == pytest.approx(float(wins.mean()), abs=1e-14)
        for tpr in (0.5, 0.8, 0.95, 1.0):
            enough = [t for t in inside.tolist() if sum(v >= t for v in inside.tolist()) >= tpr * len(inside)]
            share = sum(v >= max(enough) for v in outside.tolist()) / len(outside)
            assert fpr_at(inside, outside, tpr) == pytest.approx(share, abs=1e-14)


@pytest.mark.parametrize("grid", [None, 3])
def test_auroc_is_torchmetrics(grid):
    oracle = pytest.importorskip("torchmetrics").functional.classification.binary_auroc
    inside, outside = 0.5 + 0.1 * torch.randn(3000), 0.4 + 0.1 * torch.randn(2000)
    if grid:
        inside, outside = (10 * inside).round() / 10, (10 * outside).round() / 10
    both = torch.cat([inside, outside]).clamp(0, 1).double()
    expected = float(oracle(both, (torch.arange(5000) < 3000).long()))
    assert auroc(both[:3000], both[3000:]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.int64])
def test_scores_of_two_kinds_are_compared(kind):
    inside, outside = scores(2, 3), scores(0, 2)
    assert auroc(inside.to(kind), outside) == auroc(inside, outside.to(kind)) == 0.875
    assert fpr_at(inside.to(kind), outside) == 0.5
    many = (9 * torch.randn(5000)).to(kind)
    assert histogram(many, many) == histogram(many.double(), many.double())


def test_counts_of_pairs_do_not_overflow():
    inside, outside = torch.arange(70_000), torch.arange(70_000) - 70_000
    assert auroc(inside, outside) == 1 and fpr_at(inside, outside) == 0


# what is kept for drawing


@pytest.mark.parametrize("grid", [None, 1, 3])
def test_the_roc_runs_over_corners_of_the_exact_curve(grid):
    for _ in range(20):
        inside, outside = random_pair(grid)
        curve = roc_curve(inside, outside)
        points = list(zip(curve["fpr"], curve["tpr"], strict=True))
        assert points[0] == (0, 0) and points[-1] == (1, 1) and len(points) <= 101
        assert points == sorted(set(points))
        thresholds = torch.cat([inside, outside]).unique().flip(0).tolist()
        corners = {(float((outside >= t).double().mean()), float((inside >= t).double().mean())) for t in thresholds}
        assert set(points) <= corners | {(0.0, 0.0)}
        if len(corners) < 20:  # so few that all are kept
            steps = zip(points, points[1:], strict=False)
            area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in steps)
            assert area == pytest.approx(auroc(inside, outside), abs=0.02)


def test_a_long_roc_is_short_and_close():
    inside, outside = torch.randn(20_000) + 1, torch.randn(20_000)
    curve = roc_curve(inside, outside)
    assert 90 <= len(curve["fpr"]) <= 101
    area = float(torch.trapezoid(torch.tensor(curve["tpr"]), torch.tensor(curve["fpr"])))
    assert area == pytest.approx(auroc(inside, outside), abs=1e-3)
    assert len(roc_curve(inside, outside, points=11)["fpr"]) <= 11


def test_a_perfect_roc_has_its_corner():
    curve = roc_curve(torch.arange(1000.0) + 5000, torch.arange(1000.0))
    assert (0, 1) in zip(curve["fpr"], curve["tpr"], strict=True)


@pytest.mark.parametrize(
    "inside, outside",
    [
        (torch.randn(50), torch.randn(70) - 2),
        (torch.ones(3), torch.ones(2)),
        (torch.zeros(3), torch.zeros(1)),
        (torch.tensor([1e30]), torch.tensor([-1e30, 0.0])),
    ],
)
def test_histograms_hold_every_image(inside, outside):
    table = histogram(inside, outside, 8)
    edges = table["edges"]
    assert len(edges) == 9 and edges == sorted(edges)
    for name, values in (("inside", inside), ("outside", outside)):
        counts = [height * (edges[1] - edges[0]) * len(values) for height in table[name]]
        assert sum(counts) == pytest.approx(len(values))
        assert max(abs(count - round(count)) for count in counts) < 1e-3


def test_histogram_by_hand():
    table = histogram(scores(0, 1, 3.9), scores(4, 2), 4)
    assert table["edges"] == [0, 1, 2, 3, 4]
    assert table["inside"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3]) and table["outside"] == [0, 0, 0.5, 0.5]


# everything


def test_measure_is_plain_numbers_in_percent():
    inside, outside = 3 * torch.randn(80, 5), torch.randn(60, 5)
    result = measure_ood(inside, outside)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["inside"], result["outside"], set(result["scores"])) == (80, 60, {"msp", "energy", "max_logit"})
    for name, score in SCORES.items():
        shown = result["scores"][name]
        assert shown["auroc"] == 100 * auroc(score(inside), score(outside)) > 60
        assert shown["fpr95"] == 100 * fpr_at(score(inside), score(outside))


@pytest.mark.gpu
def test_measure_on_a_gpu_is_measure_on_the_host():
    inside, outside = 3 * torch.randn(5000, 10), torch.randn(3000, 10)
    here, there = measure_ood(inside, outside), measure_ood(inside.cuda(), outside.cuda())
    for name, shown in here["scores"].items():
        assert there["scores"][name]["auroc"] == pytest.approx(shown["auroc"], abs=1e-6)
        assert there["scores"][name]["fpr95"] == pytest.approx(shown["fpr95"], abs=0.05)
        assert len(there["scores"][name]["roc"]["fpr"]) == len(shown["roc"]["fpr"])


def test_one_image_of_each_is_enough():
    result = measure_ood(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.1]]))
    assert all(shown["auroc"] == 100 and shown["fpr95"] == 0 for shown in result["scores"].values())


# what is refused


@pytest.mark.parametrize("name", sorted(SCORES))
def test_logits_that_cannot_be_scored_are_refused(name):
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[3, 0] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match="NaN or infinite for 2 of 4 images"):
        SCORES[name](logits)
    for empty in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3)):
        with pytest.raises(ValueError, match="at least one image"):
            SCORES[name](empty)


@pytest.mark.parametrize("function", [auroc, fpr_at, roc_curve, histogram])
def test_scores_that_cannot_be_compared_are_refused(function):
    for pair, name in (((scores(), scores(1)), "inside"), ((scores(1), scores()), "outside")):
        with pytest.raises(ValueError, match=f"{name} must be .* at least one"):
            function(*pair)
    with pytest.raises(ValueError, match="1 of 2 outside scores are not finite"):
        function(scores(1), scores(1, float("nan")))
    with pytest.raises(ValueError, match="2 of 2 inside scores are not finite"):
        function(scores(math.inf, math.nan), scores(1))


def test_empty_sets_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        measure_ood(torch.zeros(2, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, math.nan])
def test_a_share_that_cannot_be_kept_is_refused(tpr):
    with pytest.raises(ValueError, match="tpr must be above 0"):
        fpr_at(scores(1), scores(1), tpr)


def test_energy_needs_a_positive_temperature():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        energy(torch.zeros(1, 2), 0)


# pictures


def test_pictures_are_drawn_from_the_json_alone(tmp_path):
    result = json.loads(json.dumps(measure_ood(4 * torch.randn(200, 5), torch.randn(100, 5))))
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_histogram(left, result, "max_logit", names=("ours", "theirs"))
    draw_roc(right, list(result["scores"].items()))
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["ours (200)", "theirs (100)"]
    assert left.get_xlabel() == "max logit" and f"{result['scores']['max_logit']['auroc']:.2f}" in left.get_title()
    assert len(right.lines) == 1 + len(SCORES)
    assert list(right.lines[1].get_ydata()) == result["scores"]["msp"]["roc"]["tpr"]
    save_figure(figure, tmp_path / "ood.png")
    assert (tmp_path / "ood.png").stat().st_size > 5000
