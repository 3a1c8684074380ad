import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from engine.drawing.figures import save_figure
from evaluation.ood import (
    SCORES,
    auroc,
    compute_fpr_at_tpr,
    draw_histogram,
    draw_roc,
    energy,
    histogram,
    max_logit,
    measure_ood,
    msp,
    roc_curve,
)


def make_scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_random_pair(grid: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ID and OOD scores in random numbers; with a grid they have few values, so that many are equal."""
    id_scores, ood_scores = (torch.randn(int(count)) for count in torch.randint(1, 40, (2,)))
    id_scores = id_scores + 0.7
    return (id_scores, ood_scores) if grid is None else ((id_scores * grid).round(), (ood_scores * grid).round())


# ---- Scores ----


def test_scores_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log() + torch.tensor([[3.0], [-1.0]])
    torch.testing.assert_close(msp(logits), make_scores(0.5, 0.8), atol=1e-6, rtol=0)
    torch.testing.assert_close(energy(logits), make_scores(3, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(max_logit(logits), make_scores(3 + math.log(0.5), math.log(0.8) - 1), atol=1e-6, rtol=0)
    pair = torch.tensor([[2.0, 0.0]])
    assert float(energy(pair, 2.0)) == pytest.approx(2 * math.log(math.e + 1))
    assert float(energy(pair, 1e-3)) == pytest.approx(2.0), "large logits do not overflow"


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_confident_prediction_scores_higher_than_an_uncertain_one(name):
    confident, uncertain = SCORES[name](torch.tensor([[8.0, 0.0, 1.0], [0.5, 0.4, 0.3]]))
    assert confident > uncertain


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float64(name, dtype):
    logits = (5 * torch.randn(50, 7)).to(dtype)
    found = SCORES[name](logits)
    assert found.dtype == torch.float64 and torch.equal(found, SCORES[name](logits.double()))


def test_confident_predictions_are_still_distinguished():
    near, far = msp(torch.tensor([[20.0, 0.0], [25.0, 0.0]]))
    assert near < far, "both are 1 in float32"


# ---- AUROC and FPR ----


def test_auroc_by_hand():
    assert auroc(make_scores(2, 3), make_scores(0, 1)) == 1 and auroc(make_scores(0, 1), make_scores(2, 3)) == 0
    assert auroc(make_scores(1, 1, 1), make_scores(1, 1)) == 0.5
    assert auroc(make_scores(1, 3), make_scores(1, 2, 0)) == (0.5 + 0 + 1 + 3) / 6


def test_the_threshold_is_an_id_score_and_accepts_equal_scores():
    id_scores = torch.arange(20.0)  # 95 percent of 20 are 19: the threshold is 1
    assert compute_fpr_at_tpr(id_scores, make_scores(0.5, 0.999, 1.0, 7.0)) == 0.5
    assert compute_fpr_at_tpr(id_scores, make_scores(0.5, 0.999, 1.0, 7.0), tpr=1) == 1
    assert compute_fpr_at_tpr(id_scores[:19], make_scores(0.0, 0.5, 1.0, 7.0)) == 1, "95 percent of 19 are all 19"
    assert compute_fpr_at_tpr(torch.arange(100.0), torch.arange(100.0), tpr=0.07) == 0.07, (
        "0.07 * 100 exceeds 7 in floating point"
    )
    assert compute_fpr_at_tpr(make_scores(1, 1, 1), make_scores(1, 0)) == 0.5
    assert compute_fpr_at_tpr(id_scores, make_scores(25.0, -1.0), tpr=1e-12) == 0.5, "at least one image is accepted"


@pytest.mark.parametrize("grid", [None, 1, 3])
def test_auroc_and_fpr_equal_a_comparison_of_all_pairs(grid):
    for _ in range(40):
        id_scores, ood_scores = make_random_pair(grid)
        pairs = id_scores.unsqueeze(1) - ood_scores
        wins = (pairs > 0).double() + 0.5 * (pairs == 0).double()
        assert auroc(id_scores, ood_scores) == pytest.approx(float(wins.mean()), abs=1e-14)
        for tpr in (0.5, 0.8, 0.95, 1.0):
            enough = [t for t in id_scores.tolist() if sum(v >= t for v in id_scores.tolist()) >= tpr * len(id_scores)]
            share = sum(v >= max(enough) for v in ood_scores.tolist()) / len(ood_scores)
            assert compute_fpr_at_tpr(id_scores, ood_scores, tpr) == pytest.approx(share, abs=1e-14)


@pytest.mark.parametrize("grid", [None, 3])
def test_auroc_equals_torchmetrics(grid):
    oracle = pytest.importorskip("torchmetrics").functional.classification.binary_auroc
    id_scores, ood_scores = 0.5 + 0.1 * torch.randn(3000), 0.4 + 0.1 * torch.randn(2000)
    if grid:
        id_scores, ood_scores = (10 * id_scores).round() / 10, (10 * ood_scores).round() / 10
    both = torch.cat([id_scores, ood_scores]).clamp(0, 1).double()
    expected = float(oracle(both, (torch.arange(5000) < 3000).long()))
    assert auroc(both[:3000], both[3000:]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_scores_of_two_dtypes_are_compared(dtype):
    id_scores, ood_scores = make_scores(2, 3), make_scores(0, 2)
    assert auroc(id_scores.to(dtype), ood_scores) == auroc(id_scores, ood_scores.to(dtype)) == 0.875
    assert compute_fpr_at_tpr(id_scores.to(dtype), ood_scores) == 0.5
    many = (9 * torch.randn(5000)).to(dtype)
    assert histogram(many, many) == histogram(many.double(), many.double())


def test_the_number_of_pairs_does_not_overflow():
    id_scores, ood_scores = torch.arange(70_000), torch.arange(70_000) - 70_000
    assert auroc(id_scores, ood_scores) == 1 and compute_fpr_at_tpr(id_scores, ood_scores) == 0


# ---- Curves and histograms ----


@pytest.mark.parametrize("grid", [None, 1, 3])
def test_the_roc_runs_over_corners_of_the_exact_curve(grid):
    for _ in range(20):
        id_scores, ood_scores = make_random_pair(grid)
        curve = roc_curve(id_scores, ood_scores)
        points = list(zip(curve["fpr"], curve["tpr"], strict=True))
        assert points[0] == (0, 0) and points[-1] == (1, 1) and len(points) <= 101
        assert points == sorted(set(points))
        thresholds = torch.cat([id_scores, ood_scores]).unique().flip(0).tolist()
        corners = {
            (float((ood_scores >= t).double().mean()), float((id_scores >= t).double().mean())) for t in thresholds
        }
        assert set(points) <= corners | {(0.0, 0.0)}
        if len(corners) < 20:  # few enough that all are kept
            steps = zip(points, points[1:], strict=False)
            area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in steps)
            assert area == pytest.approx(auroc(id_scores, ood_scores), abs=0.02)


def test_a_long_roc_is_thinned_and_keeps_its_area():
    id_scores, ood_scores = torch.randn(20_000) + 1, torch.randn(20_000)
    curve = roc_curve(id_scores, ood_scores)
    assert 90 <= len(curve["fpr"]) <= 101
    area = float(torch.trapezoid(torch.tensor(curve["tpr"]), torch.tensor(curve["fpr"])))
    assert area == pytest.approx(auroc(id_scores, ood_scores), abs=1e-3)
    assert len(roc_curve(id_scores, ood_scores, points=11)["fpr"]) <= 11


def test_a_perfect_roc_keeps_its_corner():
    curve = roc_curve(torch.arange(1000.0) + 5000, torch.arange(1000.0))
    assert (0, 1) in zip(curve["fpr"], curve["tpr"], strict=True)


@pytest.mark.parametrize(
    "id_scores, ood_scores",
    [
        (torch.randn(50), torch.randn(70) - 2),
        (torch.ones(3), torch.ones(2)),
        (torch.zeros(3), torch.zeros(1)),
        (torch.tensor([1e30]), torch.tensor([-1e30, 0.0])),
    ],
)
def test_histograms_count_every_image(id_scores, ood_scores):
    table = histogram(id_scores, ood_scores, 8)
    edges = table["edges"]
    assert len(edges) == 9 and edges == sorted(edges)
    for name, values in (("inside", id_scores), ("outside", ood_scores)):
        counts = [height * (edges[1] - edges[0]) * len(values) for height in table[name]]
        assert sum(counts) == pytest.approx(len(values))
        assert max(abs(count - round(count)) for count in counts) < 1e-3


def test_histogram_by_hand():
    table = histogram(make_scores(0, 1, 3.9), make_scores(4, 2), 4)
    assert table["edges"] == [0, 1, 2, 3, 4]
    assert table["inside"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3]) and table["outside"] == [0, 0, 0.5, 0.5]


# ---- All metrics ----


def test_metrics_are_plain_numbers_in_percent():
    id_logits, ood_logits = 3 * torch.randn(80, 5), torch.randn(60, 5)
    result = measure_ood(id_logits, ood_logits)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["inside"], result["outside"], set(result["scores"])) == (80, 60, {"msp", "energy", "max_logit"})
    for name, score in SCORES.items():
        shown = result["scores"][name]
        assert shown["auroc"] == 100 * auroc(score(id_logits), score(ood_logits)) > 60
        assert shown["fpr95"] == 100 * compute_fpr_at_tpr(score(id_logits), score(ood_logits))


@pytest.mark.gpu
def test_metrics_agree_on_gpu_and_cpu():
    id_logits, ood_logits = 3 * torch.randn(5000, 10), torch.randn(3000, 10)
    here, there = measure_ood(id_logits, ood_logits), measure_ood(id_logits.cuda(), ood_logits.cuda())
    for name, shown in here["scores"].items():
        assert there["scores"][name]["auroc"] == pytest.approx(shown["auroc"], abs=1e-6)
        assert there["scores"][name]["fpr95"] == pytest.approx(shown["fpr95"], abs=0.05)
        assert len(there["scores"][name]["roc"]["fpr"]) == len(shown["roc"]["fpr"])


def test_one_image_of_each_is_enough():
    result = measure_ood(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.1]]))
    assert all(shown["auroc"] == 100 and shown["fpr95"] == 0 for shown in result["scores"].values())


# ---- Errors ----


@pytest.mark.parametrize("name", sorted(SCORES))
def test_invalid_logits_are_refused(name):
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[3, 0] = float("nan"), float("-inf")
    with pytest.raises(ValueError, match="NaN or infinite for 2 of 4 images"):
        SCORES[name](logits)
    for empty in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3)):
        with pytest.raises(ValueError, match="at least one image"):
            SCORES[name](empty)


@pytest.mark.parametrize("function", [auroc, compute_fpr_at_tpr, roc_curve, histogram])
def test_invalid_scores_are_refused(function):
    for pair, name in (((make_scores(), make_scores(1)), "ID"), ((make_scores(1), make_scores()), "OOD")):
        with pytest.raises(ValueError, match=f"^{name} scores must be .* at least one"):
            function(*pair)
    with pytest.raises(ValueError, match="1 of 2 OOD scores are NaN or infinite"):
        function(make_scores(1), make_scores(1, float("nan")))
    with pytest.raises(ValueError, match="2 of 2 ID scores are NaN or infinite"):
        function(make_scores(math.inf, math.nan), make_scores(1))


def test_empty_sets_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        measure_ood(torch.zeros(2, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, math.nan])
def test_an_invalid_true_positive_rate_is_refused(tpr):
    with pytest.raises(ValueError, match="tpr must be above 0"):
        compute_fpr_at_tpr(make_scores(1), make_scores(1), tpr)


def test_energy_needs_a_positive_temperature():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        energy(torch.zeros(1, 2), 0)


# ---- Figures ----


def test_figures_are_drawn_from_the_json_alone(tmp_path):
    result = json.loads(json.dumps(measure_ood(4 * torch.randn(200, 5), torch.randn(100, 5))))
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_histogram(left, result, "max_logit", names=("ours", "theirs"))
    draw_roc(right, list(result["scores"].items()))
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["ours (200)", "theirs (100)"]
    assert left.get_xlabel() == "max logit" and f"{result['scores']['max_logit']['auroc']:.2f}" in left.get_title()
    assert len(right.lines) == 1 + len(SCORES)
    assert list(right.lines[1].get_ydata()) == [100 * rate for rate in result["scores"]["msp"]["roc"]["tpr"]]
    assert right.get_xlim() == right.get_ylim() == (0, 100), "percent, as on all axes"
    save_figure(figure, tmp_path / "ood.png")
    assert (tmp_path / "ood.png").stat().st_size > 5000
