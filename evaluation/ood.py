"""Out-of-distribution detection: whether a score of the logits tells familiar images from those of another set.

Scores are higher the more familiar an image is. Inside: images of the data set the classifier learned; outside: those
of another one. The inside is the positive class, as in Liu et al., NeurIPS 2020, arXiv 2010.03759; with the outside
positive, as others have it, AUROC is the same and fpr_at() is another number. All in float64.
"""

import math

import torch

from engine.inference.metrics import validate_logits

HISTOGRAM_BINS, ROC_POINTS = 50, 101


def msp(logits: torch.Tensor) -> torch.Tensor:
    """The highest probability (Hendrycks and Gimpel, ICLR 2017, arXiv 1610.02136)."""
    return validate_logits(logits).softmax(1).amax(1)


def energy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T log sum exp(logits / T), the negative free energy (Liu et al., Eq. 4)."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature * (validate_logits(logits) / temperature).logsumexp(1)


def max_logit(logits: torch.Tensor) -> torch.Tensor:
    """The highest logit (Hendrycks et al., ICML 2022, arXiv 1911.11132)."""
    return validate_logits(logits).amax(1)


SCORES = {"msp": msp, "energy": energy, "max_logit": max_logit}


def auroc(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """Area under the ROC curve, 0..1: how often an inside image scores higher than an outside one, equal scores
    counting a half.

    Mann and Whitney's U divided by N M, exact, in O((N + M) log M). Raises ValueError for an empty set and for scores
    that are not finite.
    """
    inside, outside = check_scores(inside, "inside"), check_scores(outside, "outside").sort().values
    below = torch.searchsorted(outside, inside).sum()
    not_above = torch.searchsorted(outside, inside, right=True).sum()
    return int(below + not_above) / (2 * len(inside) * len(outside))


def fpr_at(inside: torch.Tensor, outside: torch.Tensor, tpr: float = 0.95) -> float:
    """Share of the outside images taken for inside ones, 0..1, where at least the share `tpr` of the inside is kept.

    The threshold is the ceil(tpr N)-th highest inside score, itself kept: no quantile between two scores. An outside
    score equal to it is taken for inside. Raises ValueError as auroc() does, and for a tpr not in (0, 1].
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be above 0 and at most 1, got {tpr}")
    inside, outside = check_scores(inside, "inside"), check_scores(outside, "outside")
    kept = max(1, math.ceil(tpr * len(inside) - 1e-9))  # 0.07 * 100 is a little more than 7
    return float((outside >= inside.topk(kept).values[-1]).double().mean())


def roc_curve(inside: torch.Tensor, outside: torch.Tensor, points: int = ROC_POINTS) -> dict[str, list[float]]:
    """fpr and tpr, at most `points` each, from (0, 0) to (1, 1): corners of the exact curve, evenly spaced along it."""
    scores = torch.cat([check_scores(inside, "inside"), check_scores(outside, "outside")])
    values, rank = scores.unique(return_inverse=True)
    at_least = [
        torch.bincount(ranks, minlength=len(values)).flip(0).cumsum(0).double() / len(ranks)
        for ranks in (rank[len(inside) :], rank[: len(inside)])
    ]
    fpr, tpr = (torch.cat([share.new_zeros(1), share]) for share in at_least)
    spaced = torch.linspace(0, 2, points, dtype=torch.float64, device=fpr.device)
    corners = torch.searchsorted(fpr + tpr, spaced).clamp(max=len(values)).unique()
    return {"fpr": fpr[corners].tolist(), "tpr": tpr[corners].tolist()}


def histogram(inside: torch.Tensor, outside: torch.Tensor, bins: int = HISTOGRAM_BINS) -> dict[str, list[float]]:
    """The densities of both over the same bins of equal width, each of integral 1, and the bins + 1 edges."""
    inside, outside = check_scores(inside, "inside"), check_scores(outside, "outside")
    low, high = min(float(inside.min()), float(outside.min())), max(float(inside.max()), float(outside.max()))
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # all the same, up to rounding
        low, high = low - 0.5, high + 0.5
    width = (high - low) / bins
    table = {"edges": [low + step * width for step in range(bins + 1)]}
    for name, scores in (("inside", inside), ("outside", outside)):
        counts = torch.bincount(((scores - low) / width).long().clamp(0, bins - 1), minlength=bins)
        table[name] = (counts / (len(scores) * width)).tolist()
    return table


def check_scores(scores: torch.Tensor, name: str) -> torch.Tensor:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must be (N,) scores of at least one image, got {tuple(scores.shape)}")
    broken = len(scores) - int(scores.isfinite().sum())
    if broken:
        raise ValueError(f"{broken} of {len(scores)} {name} scores are not finite: NaN or infinite")
    return scores.double()


def measure_ood(inside_logits: torch.Tensor, outside_logits: torch.Tensor) -> dict:
    """Logits (N, K) and (M, K) -> plain numbers, ready for JSON: the counts `inside` and `outside`, and under `scores`
    of each score auroc and fpr95 in percent, roc_curve() and histogram().

    Raises ValueError for no images and for logits that are not finite.
    """
    metrics = {}
    for name, score in SCORES.items():
        inside, outside = score(inside_logits), score(outside_logits)
        metrics[name] = {"auroc": 100 * auroc(inside, outside), "fpr95": 100 * fpr_at(inside, outside)}
        metrics[name] |= {"roc": roc_curve(inside, outside), "histogram": histogram(inside, outside)}
    return {"inside": len(inside_logits), "outside": len(outside_logits), "scores": metrics}


def draw_histogram(axes, result: dict, score: str = "energy", names: tuple[str, str] = ("inside", "outside")) -> None:
    """How one score is distributed inside and outside, from a result of measure_ood(); its metrics in the title."""
    shown = result["scores"][score]
    table = shown["histogram"]
    for key, name, colour in zip(("inside", "outside"), names, ("tab:blue", "tab:orange"), strict=True):
        axes.stairs(table[key], table["edges"], fill=True, alpha=0.45, color=colour, label=f"{name} ({result[key]})")
        axes.stairs(table[key], table["edges"], color=colour, linewidth=1)
    axes.set(xlabel=score.replace("_", " "), ylabel="density", xlim=(table["edges"][0], table["edges"][-1]))
    axes.set_title(f"AUROC {shown['auroc']:.2f} %, FPR at 95 % TPR {shown['fpr95']:.2f} %", fontsize=9)
    axes.legend(frameon=False, fontsize=8)


def draw_roc(axes, curves: list[tuple[str, dict]]) -> None:
    """ROC curves, (name, what measure_ood() gives for a score) each: scores of a classifier, or classifiers."""
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    for name, shown in curves:
        axes.plot(shown["roc"]["fpr"], shown["roc"]["tpr"], label=f"{name}: AUROC {shown['auroc']:.2f} %")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="outside images kept", ylabel="inside images kept")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
