"""Out-of-distribution (OOD) detection: how well a score of the logits separates test images from images of other data.

Scores are higher for in-distribution (ID) images, those of the data set that the classifier was trained on. ID is the
positive class, as in Liu et al., NeurIPS 2020, arXiv 2010.03759. With OOD as the positive class, as in other papers,
AUROC is the same and FPR95 differs. All results are computed in float64.
"""

import math

import torch

from engine.drawing.figures import list_colours, place_legend
from engine.inference.metrics import validate_logits

HISTOGRAM_BINS, ROC_POINTS = 50, 101


def msp(logits: torch.Tensor) -> torch.Tensor:
    """Return the maximum softmax probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136)."""
    return validate_logits(logits).softmax(1).amax(1)


def energy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return T log sum exp(logits / T), the negative free energy (Liu et al., Eq. 4)."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature * (validate_logits(logits) / temperature).logsumexp(1)


def max_logit(logits: torch.Tensor) -> torch.Tensor:
    """Return the highest logit (Hendrycks et al., ICML 2022, arXiv 1911.11132)."""
    return validate_logits(logits).amax(1)


SCORES = {"msp": msp, "energy": energy, "max_logit": max_logit}
SCORE_TITLES = {"msp": "MSP", "energy": "energy", "max_logit": "max logit"}


def auroc(id_scores: torch.Tensor, ood_scores: torch.Tensor) -> float:
    """Return the area under the ROC curve, 0..1: the probability that an ID image scores higher than an OOD image.

    It is the Mann-Whitney U statistic divided by N M, exact, with ties counting one half, in O((N + M) log M). Raises
    ValueError for an empty set and for scores that are NaN or infinite.
    """
    id_scores, ood_scores = check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD").sort().values
    lower = torch.searchsorted(ood_scores, id_scores).sum()
    lower_or_equal = torch.searchsorted(ood_scores, id_scores, right=True).sum()
    return int(lower + lower_or_equal) / (2 * len(id_scores) * len(ood_scores))


def compute_fpr_at_tpr(id_scores: torch.Tensor, ood_scores: torch.Tensor, tpr: float = 0.95) -> float:
    """Return the fraction of OOD images accepted as ID, 0..1, when at least `tpr` of the ID images are accepted.

    The threshold is the ceil(tpr N)-th highest ID score, not a quantile between two scores; images that score exactly
    the threshold are accepted. Raises ValueError as auroc() does, and for a tpr outside (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be above 0 and at most 1, got {tpr}")
    id_scores, ood_scores = check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD")
    accepted = max(1, math.ceil(tpr * len(id_scores) - 1e-9))  # 1e-9: in floating point 0.07 * 100 exceeds 7
    return float((ood_scores >= id_scores.topk(accepted).values[-1]).double().mean())


def roc_curve(id_scores: torch.Tensor, ood_scores: torch.Tensor, points: int = ROC_POINTS) -> dict[str, list[float]]:
    """Return fpr and tpr from (0, 0) to (1, 1): at most `points` corners of the exact curve, evenly spaced along it."""
    scores = torch.cat([check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD")])
    values, rank = scores.unique(return_inverse=True)
    rates = [  # fraction of the OOD and of the ID images that score at least each value
        torch.bincount(ranks, minlength=len(values)).flip(0).cumsum(0).double() / len(ranks)
        for ranks in (rank[len(id_scores) :], rank[: len(id_scores)])
    ]
    fpr, tpr = (torch.cat([rate.new_zeros(1), rate]) for rate in rates)
    spaced = torch.linspace(0, 2, points, dtype=torch.float64, device=fpr.device)
    corners = torch.searchsorted(fpr + tpr, spaced).clamp(max=len(values)).unique()
    return {"fpr": fpr[corners].tolist(), "tpr": tpr[corners].tolist()}


def histogram(id_scores: torch.Tensor, ood_scores: torch.Tensor, bins: int = HISTOGRAM_BINS) -> dict[str, list[float]]:
    """Return the densities of the ID scores (`inside`) and the OOD scores (`outside`) over the same bins of equal
    width, each with integral 1, and the bins + 1 `edges`.
    """
    id_scores, ood_scores = check_scores(id_scores, "ID"), check_scores(ood_scores, "OOD")
    low = min(float(id_scores.min()), float(ood_scores.min()))
    high = max(float(id_scores.max()), float(ood_scores.max()))
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # all scores are equal, up to rounding
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins
    table = {"edges": [low + step * width for step in range(bins + 1)]}
    for name, scores in (("inside", id_scores), ("outside", ood_scores)):
        counts = torch.bincount(((scores - low) / width).long().clamp(0, bins - 1), minlength=bins)
        table[name] = (counts / (len(scores) * width)).tolist()
    return table


def check_scores(scores: torch.Tensor, name: str) -> torch.Tensor:
    """Return scores (N,) in float64. Raise ValueError if there are none, or if they are NaN or infinite."""
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} scores must be (N,) with at least one image, got {tuple(scores.shape)}")
    bad = len(scores) - int(scores.isfinite().sum())
    if bad:
        raise ValueError(f"{bad} of {len(scores)} {name} scores are NaN or infinite")
    return scores.double()


def measure_ood(id_logits: torch.Tensor, ood_logits: torch.Tensor) -> dict:
    """Return the metrics of every score for ID logits (N, K) and OOD logits (M, K), ready for JSON.

    `inside` and `outside`: the numbers of ID and OOD images. `scores`: for each score auroc and fpr95 in percent,
    roc_curve() and histogram(). Raises ValueError for no images and for logits that are NaN or infinite.
    """
    metrics = {}
    for name, score in SCORES.items():
        pair = score(id_logits), score(ood_logits)
        metrics[name] = {"auroc": 100 * auroc(*pair), "fpr95": 100 * compute_fpr_at_tpr(*pair)}
        metrics[name] |= {"roc": roc_curve(*pair), "histogram": histogram(*pair)}
    return {"inside": len(id_logits), "outside": len(ood_logits), "scores": metrics}


def draw_histogram(axes, result: dict, score: str = "energy", names: tuple[str, str] = ("ID", "OOD")) -> None:
    """Draw the distributions of one score for ID and OOD images, from a result of measure_ood()."""
    shown = result["scores"][score]
    table = shown["histogram"]
    for key, name, colour in zip(("inside", "outside"), names, ("tab:blue", "tab:orange"), strict=True):
        axes.stairs(table[key], table["edges"], fill=True, alpha=0.45, color=colour, label=f"{name} ({result[key]})")
        axes.stairs(table[key], table["edges"], color=colour, linewidth=1)
    axes.set(xlabel=SCORE_TITLES[score], ylabel="density", xlim=(table["edges"][0], table["edges"][-1]))
    axes.set_title(f"AUROC {shown['auroc']:.2f} %, FPR at 95 % TPR {shown['fpr95']:.2f} %", fontsize=9)
    place_legend(axes)


def draw_roc(axes, curves: list[tuple[str, dict]]) -> None:
    """Draw ROC curves in percent, a (name, result of measure_ood() for one score) pair each."""
    axes.plot([0, 100], [0, 100], color="0.4", linestyle="--", linewidth=1)
    for colour, (name, shown) in zip(list_colours(len(curves)), curves, strict=True):
        fpr, tpr = ([100 * rate for rate in shown["roc"][key]] for key in ("fpr", "tpr"))
        axes.plot(fpr, tpr, label=f"{name}: AUROC {shown['auroc']:.2f} %", color=colour)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.set(xlabel="false positive rate (%, OOD accepted)", ylabel="true positive rate (%, ID accepted)")
    place_legend(axes)
