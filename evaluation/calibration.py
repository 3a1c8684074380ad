"""Calibration: whether a classifier is right as often as it is confident, before and after temperature scaling.

Guo et al., "On calibration of modern neural networks", ICML 2017, arXiv 1706.04599; Nixon et al., "Measuring
calibration in deep learning", 2019, arXiv 1904.01685. The confidence is the probability of the predicted class, the
first of the highest logits. Everywhere logits are (N, K) and labels (N,) long on the same device, and all is computed
in float64; functions raise ValueError for no images, for logits that are not finite and for labels that are no class.
"""

import math

import torch
from torch.nn import functional as F

from engine.inference.metrics import validate_logits

TEMPERATURES = (0.05, 20.0)  # bounds of the temperature
MIN_COUNT = 10  # images below which the accuracy of a bin says little
CHUNK_SIZE = 2**22  # probabilities of images x classes that are binned at a time: 32 MB


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error (ECE), 0..1: mean over `bins` equal bins of |confidence - accuracy|, weighted by their
    share.

    Guo et al., Eq. 3; bins are (lower, upper].
    """
    confidence, correct = confidence_and_correct(logits, labels)
    gap = bin_sums(bin_index(confidence, bins), confidence - correct, bins)
    return float(gap.abs().sum() / len(labels))


def adaptive_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """The same with bins that hold equally many images, 0..1: by its rank in confidence, image i of N is in bin
    floor(i bins / N).

    The binning is that of Nguyen and O'Connor, EMNLP 2015; Nixon et al., Sec. 3.2, say what equal widths hide: nearly
    all images in the last bin. Of the predicted class alone: not the ACE of Nixon et al., which is of all classes. Each
    of several equal confidences counts as right in their mean, so that the order of the images does not matter; with
    fewer images than bins each is a bin of its own.
    """
    confidence, correct = confidence_and_correct(logits, labels)
    values, index, count = confidence.unique(return_inverse=True, return_counts=True)
    correct = (bin_sums(index, correct, len(values)) / count)[index]
    rank = torch.arange(len(labels), device=labels.device)
    gap = bin_sums(rank * check_bins(bins) // len(labels), (confidence - correct)[index.argsort()], bins)
    return float(gap.abs().sum() / len(labels))


def classwise_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """Mean over the classes of the calibration error of the probability of each, all images counting, 0..1.

    The static calibration error (SCE) of Nixon et al.; classwise-ECE of Kull et al., NeurIPS 2019, arXiv 1910.12656,
    Sec. 2. Equal bins (lower, upper]; 0 is in the first. Small wherever there are many classes, most being improbable
    everywhere: to be compared at the same number of classes only.
    """
    logits = validate_logits(logits, labels)
    images, classes = logits.shape
    first = torch.arange(classes, device=logits.device) * bins  # bin of each class
    gap = logits.new_zeros(classes * bins)
    rows = max(1, CHUNK_SIZE // classes)
    for chunk, true in zip(logits.split(rows), labels.split(rows), strict=True):
        probability = chunk.softmax(1)
        index = bin_index(probability, bins) + first
        gap.index_add_(0, index.flatten(), probability.flatten())
        gap.index_add_(0, index.gather(1, true.unsqueeze(1)).flatten(), gap.new_full((len(true),), -1.0))
    return float(gap.abs().sum() / (images * classes))


def reliability_table(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> dict[str, list]:
    """What a reliability diagram shows (Guo et al., Sec. 2): of each of the bins of calibration_error() the mean
    confidence and the accuracy, 0..1, None where it is empty, and the count of images; and the bins + 1 edges.
    """
    confidence, correct = confidence_and_correct(logits, labels)
    index = bin_index(confidence, bins)
    counts = bin_sums(index, torch.ones_like(confidence), bins).tolist()
    table = {"edges": [edge / bins for edge in range(bins + 1)]}
    for name, values in (("confidence", confidence), ("accuracy", correct)):
        sums = bin_sums(index, values, bins).tolist()
        table[name] = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    return table | {"count": [int(count) for count in counts]}


def confidence_and_correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) the highest probability, and (N,) 1 where its class is the label; float64."""
    logits = validate_logits(logits, labels)
    return logits.softmax(1).amax(1), (logits.argmax(1) == labels).double()


def bin_index(probability: torch.Tensor, bins: int) -> torch.Tensor:
    """Which of `bins` equal bins (lower, upper] of 0..1 holds each probability, counted from 0; 0 is in the first."""
    return (probability * check_bins(bins)).ceil().long().clamp(1, bins) - 1


def check_bins(bins: int) -> int:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return bins


def bin_sums(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """(size,) of the values (N,) those added up that have the same index (N,)."""
    return values.new_zeros(size).index_add_(0, index, values)


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the images, in nats."""
    return float(F.cross_entropy(validate_logits(logits, labels), labels))


def brier_score(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Squared differences of the probabilities from 1 for the true class and 0 for the others, summed over the classes
    and averaged over the images, 0..2.

    Brier, Monthly Weather Review 78(1), 1950, Eq. 2; other codes average over the classes as well.
    """
    difference = validate_logits(logits, labels).softmax(1)
    difference.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(difference[:, :1]))
    return float(difference.square().sum(1).mean())


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T whose logits / T have the least negative log-likelihood (Guo et al., Sec. 4.2), to a billionth.

    Found in 1 / T, in which the likelihood is convex, by Newton's method inside a bracket that is halved (in its
    logarithm) when a step leaves it. A result equal to either of TEMPERATURES means that beyond it lies a better one:
    with every image right the best is 0, with every image worse than chance it is infinite. 1 where none matters.
    """
    logits = validate_logits(logits, labels)
    # over the true class: so that a slope keeps its sign however small it is
    lead = logits - logits.gather(1, labels.unsqueeze(1))

    def slope(inverse: float) -> list[float]:
        """First and second derivative of the negative log-likelihood with respect to 1 / T."""
        probability = (inverse * lead).softmax(1)
        mean = (probability * lead).sum(1)
        variance = (probability * (lead - mean.unsqueeze(1)).square()).sum(1)
        return torch.stack([mean.mean(), variance.mean()]).tolist()

    low, high = (1 / bound for bound in reversed(TEMPERATURES))
    first, last = slope(low)[0], slope(high)[0]
    if first == last == 0:
        return 1.0
    if first >= 0:
        return TEMPERATURES[1]
    if last <= 0:
        return TEMPERATURES[0]
    inverse = 1.0
    for _ in range(100):
        first, second = slope(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / max(second, 1e-300)
        before, inverse = inverse, step if low <= step <= high else math.sqrt(low * high)
        if abs(inverse - before) < 1e-9 * before:
            break
    return 1 / inverse


def measure_calibration(logits: torch.Tensor, labels: torch.Tensor, heldout: torch.Tensor, bins: int = 15) -> dict:
    """All metrics above, before and, under `after`, with the temperature; plain numbers, ready for JSON.

    heldout (N,) bool: the images on which the temperature is fitted; all metrics are of the others, `images` in number.
    In percent: ece, adaptive_ece, classwise_ece, accuracy (which no temperature changes), mean_confidence.
    temperature_at_bound: see fit_temperature(). Raises ValueError where no image is held out, or no other left.
    """
    logits, heldout = validate_logits(logits, labels), heldout.to(logits.device)
    if heldout.shape != labels.shape or heldout.dtype != torch.bool:
        raise ValueError(f"held must be {len(labels)} bools, got {heldout.dtype} of {tuple(heldout.shape)}")
    count = int(heldout.sum())
    if not 0 < count < len(labels):
        raise ValueError(
            f"a temperature is fitted on some images and judged on others: {count} of {len(labels)} are held"
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
    confidence, correct = confidence_and_correct(logits, labels)
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


def draw_reliability(axes, results: list[tuple[str, dict]], after: bool = False) -> None:
    """A reliability diagram of results of measure_calibration(), (name, result) each: accuracy against confidence.

    One classifier: a bar for each bin and its gap to the mean confidence, pale where the bin holds fewer than MIN_COUNT
    images, and above it a histogram of the confidences. Several: a line each, whose dots grow with the share of the
    images. after: with the temperature.
    """
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, zorder=3)
    for name, result in results:
        shown = result["after"] if after else result
        label = f"{name}: ECE {shown['ece']:.2f} %"
        (draw_bars if len(results) == 1 else draw_line)(axes, shown["reliability"], label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.legend(fontsize=8, loc="upper left", framealpha=0.85, edgecolor="none").set_zorder(5)


def list_filled_bins(table: dict[str, list]) -> list[tuple]:
    """Left edges, accuracies, confidences and counts of the bins that hold images."""
    rows = zip(table["edges"][:-1], table["accuracy"], table["confidence"], table["count"], strict=True)
    return list(zip(*(row for row in rows if row[-1]), strict=True))


def draw_bars(axes, table: dict[str, list], label: str) -> None:
    left, accuracy, confidence, count = list_filled_bins(table)
    size = {"width": 1 / len(table["count"]), "align": "edge", "linewidth": 0.6}
    solid = {"color": "tab:blue", "edgecolor": "white", **size}
    hatched = {"color": "none", "edgecolor": "tab:red", "hatch": "////", **size}
    axes.bar(0, 0, label=label, **solid)  # for the legend
    axes.bar(0, 0, label="gap", **hatched)
    for x, height, mean, images in zip(left, accuracy, confidence, count, strict=True):
        alpha = 0.3 if images < MIN_COUNT else None
        axes.bar(x, height, alpha=alpha, **solid)
        axes.bar(x, mean - height, bottom=height, alpha=alpha, **hatched)
    above = axes.inset_axes([0, 1.03, 1, 0.18], sharex=axes)
    above.bar(left, count, color="0.6", edgecolor="white", **size)
    above.set(yscale="log", ylim=(0.5, None))  # so that a single image shows
    above.yaxis.set_major_formatter("{x:g}")
    above.yaxis.set_minor_formatter("")
    above.tick_params(labelbottom=False, labelsize=7)
    above.spines[["top", "right"]].set_visible(False)
    above.set_ylabel("images", fontsize=8)


def draw_line(axes, table: dict[str, list], label: str) -> None:
    _, accuracy, confidence, count = list_filled_bins(table)
    (line,) = axes.plot(confidence, accuracy, linewidth=1.2, label=label)
    area = [8 + 80 * images / sum(count) for images in count]
    axes.scatter(confidence, accuracy, area, color=line.get_color(), zorder=4, clip_on=False)
