"""Calibration: how well confidence matches accuracy, before and after temperature scaling.

Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv 1706.04599; Nixon et al., "Measuring
calibration in deep learning", 2019, arXiv 1904.01685. The confidence is the probability of the predicted class, which
is the first of the highest logits. Everywhere logits are (N, K) and labels (N,) long on the same device, and all
results are computed in float64. Functions raise ValueError for no images, for logits that are NaN or infinite, and for
labels outside 0..K-1.
"""

import math

import torch
from torch.nn import functional as F

from engine.drawing.figures import list_colours, place_legend
from engine.inference.metrics import validate_logits

TEMPERATURES = (0.05, 20.0)  # limits of the fitted temperature
MIN_COUNT = 10  # bins with fewer images are drawn pale, as their accuracy is uncertain
CHUNK_SIZE = 2**22  # probabilities (images x classes) that are binned at a time: 32 MB


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (ECE), 0..1: the mean of |confidence - accuracy| over `bins` bins of equal
    width, weighted by the fraction of images in each.

    Guo et al., Eq. 3; bins are (lower, upper].
    """
    confidence, correct = compute_confidence_and_correct(logits, labels)
    gap = bin_sums(assign_bins(confidence, bins), confidence - correct, bins)
    return float(gap.abs().sum() / len(labels))


def adaptive_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the ECE, 0..1, with bins that hold equally many images: image i of N, ranked by confidence, is in bin
    floor(i bins / N).

    The binning is that of Nguyen and O'Connor, EMNLP 2015. Nixon et al., Sec. 3.2, explain why: with equal widths
    nearly all images fall into the last bin. Only the predicted class counts, unlike in the ACE of Nixon et al., which
    covers all classes. Images of equal confidence all count with their mean accuracy, so that their order does not
    matter. With fewer images than bins, each image is a bin.
    """
    confidence, correct = compute_confidence_and_correct(logits, labels)
    values, index, count = confidence.unique(return_inverse=True, return_counts=True)
    correct = (bin_sums(index, correct, len(values)) / count)[index]
    rank = torch.arange(len(labels), device=labels.device)
    gap = bin_sums(rank * check_bins(bins) // len(labels), (confidence - correct)[index.argsort()], bins)
    return float(gap.abs().sum() / len(labels))


def classwise_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Return the mean over all classes of the calibration error of the class's probability on all images, 0..1.

    The static calibration error (SCE) of Nixon et al.; classwise-ECE of Kull et al., NeurIPS 2019, arXiv 1910.12656,
    Sec. 2. Bins of equal width (lower, upper]; 0 is in the first. The value is small whenever there are many classes,
    since most have a low probability for every image: compare it only at the same number of classes.
    """
    logits = validate_logits(logits, labels)
    images, classes = logits.shape
    first = torch.arange(classes, device=logits.device) * bins  # index of the first bin of each class
    gap = logits.new_zeros(classes * bins)
    chunk_size = max(1, CHUNK_SIZE // classes)
    for chunk, targets in zip(logits.split(chunk_size), labels.split(chunk_size), strict=True):
        probability = chunk.softmax(1)
        index = assign_bins(probability, bins) + first
        gap.index_add_(0, index.flatten(), probability.flatten())
        gap.index_add_(0, index.gather(1, targets.unsqueeze(1)).flatten(), gap.new_full((len(targets),), -1.0))
    return float(gap.abs().sum() / (images * classes))


def reliability_table(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, list]:
    """Return the content of a reliability diagram (Guo et al., Sec. 2) with the bins of calibration_error().

    `confidence` and `accuracy`: means over each bin, 0..1, None for an empty bin. `count`: images in each bin. `edges`:
    the bins + 1 edges.
    """
    confidence, correct = compute_confidence_and_correct(logits, labels)
    index = assign_bins(confidence, bins)
    counts = bin_sums(index, torch.ones_like(confidence), bins).tolist()
    table = {"edges": [edge / bins for edge in range(bins + 1)]}
    for name, values in (("confidence", confidence), ("accuracy", correct)):
        sums = bin_sums(index, values, bins).tolist()
        table[name] = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    return table | {"count": [int(count) for count in counts]}


def compute_confidence_and_correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the highest probability (N,), and 1 where its class is the label (N,); float64."""
    logits = validate_logits(logits, labels)
    return logits.softmax(1).amax(1), (logits.argmax(1) == labels).double()


def assign_bins(probability: torch.Tensor, bins: int) -> torch.Tensor:
    """Return the index of the bin that holds each probability, for `bins` equal bins (lower, upper] of 0..1."""
    return (probability * check_bins(bins)).ceil().long().clamp(1, bins) - 1


def check_bins(bins: int) -> int:
    """Return `bins`; raise ValueError if it is below 1."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return bins


def bin_sums(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """Return (size,) sums: the values (N,) with the same index (N,) are added up."""
    return values.new_zeros(size).index_add_(0, index, values)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the mean negative log-likelihood per image, in nats."""
    return float(F.cross_entropy(validate_logits(logits, labels), labels))


def brier_score(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the Brier score, 0..2: the squared differences between the probabilities and the one-hot label, summed
    over the classes and averaged over the images.

    Brier, Monthly Weather Review 78(1), 1950, Eq. 2; some implementations also average over the classes.
    """
    difference = validate_logits(logits, labels).softmax(1)
    difference.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(difference[:, :1]))
    return float(difference.square().sum(1).mean())


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the T for which logits / T have the lowest negative log-likelihood (Guo et al., Sec. 4.2), to 1e-9.

    The likelihood is convex in 1 / T, which is found by Newton's method inside a bracket; a step that leaves the
    bracket is replaced by its geometric mean. A result equal to one of TEMPERATURES means that the optimum lies beyond
    it: it is 0 if every image is classified correctly, and infinite if the classifier is worse than chance on every
    image. Returns 1 if the temperature has no effect.
    """
    logits = validate_logits(logits, labels)
    # relative to the true class, so that the derivative keeps its sign however small it is
    margin = logits - logits.gather(1, labels.unsqueeze(1))

    def compute_derivatives(inverse: float) -> list[float]:
        """Return the first and second derivative of the negative log-likelihood with respect to 1 / T."""
        probability = (inverse * margin).softmax(1)
        mean = (probability * margin).sum(1)
        variance = (probability * (margin - mean.unsqueeze(1)).square()).sum(1)
        return torch.stack([mean.mean(), variance.mean()]).tolist()

    low, high = (1 / bound for bound in reversed(TEMPERATURES))
    first, last = compute_derivatives(low)[0], compute_derivatives(high)[0]
    if first == last == 0:
        return 1.0
    if first >= 0:
        return TEMPERATURES[1]
    if last <= 0:
        return TEMPERATURES[0]
    inverse = 1.0
    for _ in range(100):
        first, second = compute_derivatives(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / max(second, 1e-300)
        before, inverse = inverse, step if low <= step <= high else math.sqrt(low * high)
        if abs(inverse - before) < 1e-9 * before:
            break
    return 1 / inverse


def measure_calibration(logits: torch.Tensor, labels: torch.Tensor, heldout: torch.Tensor, bins: int = 15) -> dict:
    """Return all metrics, before temperature scaling and, under `after`, with it; plain numbers, ready for JSON.

    heldout (N,) bool: the images on which the temperature is fitted; the metrics are computed on the other `images`
    images. In percent: ece, adaptive_ece, classwise_ece, accuracy (which no temperature changes), mean_confidence.
    temperature_at_bound: see fit_temperature(). Raises ValueError if no image is held out or no other is left.
    """
    logits, heldout = validate_logits(logits, labels), heldout.to(logits.device)
    if heldout.shape != labels.shape or heldout.dtype != torch.bool:
        raise ValueError(f"heldout must be {len(labels)} bools, got {heldout.dtype} of {tuple(heldout.shape)}")
    count = int(heldout.sum())
    if not 0 < count < len(labels):
        raise ValueError(
            f"heldout selects {count} of {len(labels)} images; at least one is needed to fit the temperature, and one "
            "more to evaluate it"
        )
    temperature = fit_temperature(logits[heldout], labels[heldout])
    logits, labels = logits[~heldout], labels[~heldout]
    return compute_metrics(logits, labels, bins) | {
        "temperature": temperature,
        "temperature_at_bound": temperature in TEMPERATURES,
        "after": compute_metrics(logits / temperature, labels, bins),
        "bins": bins,
        "images": len(labels),
        "held_out": count,
    }


def compute_metrics(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> dict:
    """Return the metrics that measure_calibration() reports before and after temperature scaling."""
    confidence, correct = compute_confidence_and_correct(logits, labels)
    return {
        "ece": 100 * calibration_error(logits, labels, bins),
        "adaptive_ece": 100 * adaptive_calibration_error(logits, labels, bins),
        "classwise_ece": 100 * classwise_calibration_error(logits, labels, bins),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(logits, labels),
        "accuracy": 100 * float(correct.mean()),
        "mean_confidence": 100 * float(confidence.mean()),
        "reliability": reliability_table(logits, labels, bins),
    }


def describe_bound(names: list[str]) -> str:
    """Return the note on classifiers whose fitted temperature is one of TEMPERATURES."""
    low, high = TEMPERATURES
    return f"the best temperature of {', '.join(names)} lies outside {low:g} to {high:g}; the nearer limit is used"


def draw_reliability(axes, results: list[tuple[str, dict]], after: bool = False) -> None:
    """Draw a reliability diagram, accuracy against confidence in percent, of (name, result of measure_calibration()).

    One classifier: a bar for each bin and its gap to the mean confidence, pale if the bin holds fewer than MIN_COUNT
    images, and a histogram of the confidences above. Several: one line each through merge_small_bins(), with dots that
    grow with the fraction of the images. after: with temperature scaling.
    """
    axes.plot([0, 100], [0, 100], color="0.4", linestyle="--", linewidth=1, zorder=3)
    for colour, (name, result) in zip(list_colours(len(results)), results, strict=True):
        shown = result["after"] if after else result
        style = {"label": f"{name}: ECE {shown['ece']:.2f} %", "color": colour}
        (draw_bars if len(results) == 1 else draw_line)(axes, shown["reliability"], **style)
    groups = "" if len(results) == 1 else f", in groups of at least {MIN_COUNT} images"
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel=f"confidence (%){groups}", ylabel="accuracy (%)")
    place_legend(axes)
    axes.get_legend().set_zorder(5)


def list_filled_bins(table: dict[str, list]) -> list[tuple]:
    """Return (left edge, accuracy, confidence, count) of the bins that hold images; all but the count in percent."""
    rows = zip(table["edges"][:-1], table["accuracy"], table["confidence"], table["count"], strict=True)
    return [(*(100 * value for value in values), count) for *values, count in rows if count]


def merge_small_bins(table: dict[str, list], least: int = MIN_COUNT) -> list[tuple[float, float, int]]:
    """Return (confidence, accuracy, count) of neighbouring bins, merged until each group holds `least` images.

    The accuracy of one or two images is 0 or 100 % by chance. If all bins together hold fewer, there is one group.
    """
    groups = []
    for _, accuracy, confidence, count in list_filled_bins(table):
        if not groups or sum(count for _, _, count in groups[-1]) >= least:
            groups.append([])
        groups[-1].append((confidence, accuracy, count))
    if len(groups) > 1 and sum(count for _, _, count in groups[-1]) < least:
        groups[-2:] = [groups[-2] + groups[-1]]
    merged = []
    for group in groups:
        total = sum(count for _, _, count in group)
        merged.append((*(sum(row[key] * row[2] for row in group) / total for key in (0, 1)), total))
    return merged


def draw_bars(axes, table: dict[str, list], label: str, color) -> None:
    """Draw the bins of one classifier as bars, with a histogram of the confidences above."""
    size = {"width": 100 / len(table["count"]), "align": "edge", "linewidth": 0.6}
    solid = {"color": color, "edgecolor": "white", **size}
    hatched = {"color": "none", "edgecolor": "tab:red", "hatch": "////", **size}
    axes.bar(0, 0, label=label, **solid)  # for the legend
    axes.bar(0, 0, label="gap", **hatched)
    bins = list_filled_bins(table)
    for x, height, mean, images in bins:
        alpha = 0.3 if images < MIN_COUNT else None
        axes.bar(x, height, alpha=alpha, **solid)
        axes.bar(x, mean - height, bottom=height, alpha=alpha, **hatched)
    inset = axes.inset_axes([0, 1.03, 1, 0.18], sharex=axes)
    inset.bar([left for left, *_ in bins], [count for *_, count in bins], color="0.6", edgecolor="white", **size)
    inset.set(yscale="log", ylim=(0.5, None))  # below 1, so that a bin with a single image is visible
    inset.yaxis.set_major_formatter("{x:g}")
    inset.yaxis.set_minor_formatter("")
    inset.tick_params(labelbottom=False, labelsize=7)
    inset.spines[["top", "right"]].set_visible(False)
    inset.set_ylabel("images", fontsize=8)


def draw_line(axes, table: dict[str, list], label: str, color) -> None:
    """Draw the bins of one of several classifiers as a line."""
    confidence, accuracy, count = zip(*merge_small_bins(table), strict=True)
    axes.plot(confidence, accuracy, linewidth=1.2, label=label, color=color)
    area = [8 + 80 * images / sum(count) for images in count]
    axes.scatter(confidence, accuracy, area, color=color, zorder=4, clip_on=False)
