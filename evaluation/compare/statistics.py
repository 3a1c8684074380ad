"""The figures of runs and of groups of runs: accuracies, their spread over seeds, and differences by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from engine.inference.metrics import summarize_values
from engine.training.console import MEDIAN_EPOCHS
from evaluation.compare.groups import Group
from evaluation.compare.metrics import METRICS, Metric
from evaluation.compare.runs import Run

CONFIDENCE = 0.95  # of the intervals


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation of the sample (n - 1; None for a single value) and number of some values."""

    mean: float
    std: float | None
    n: int

    def format(self, digits: int = 2) -> str:
        return f"{self.mean:.{digits}f}" + (f" +- {self.std:.{digits}f}" if self.std is not None else "")


@dataclass(frozen=True)
class RunFigures:
    """The figures of a run. last, best, median: of the metric at the last evaluated epoch, at the best epoch, and over
    the last ten evaluated epochs. best_split: the images on which the best epoch was chosen, valid or test.
    peak_memory_mb: None where the log has none.
    """

    last: float
    best: float
    best_epoch: int
    best_split: str
    median: float
    minutes: float
    images_per_second: float
    peak_memory_mb: float | None


@dataclass(frozen=True)
class GroupFigures:
    """The figures of a group: spread over its finished runs, None without any. peak_memory_mb: the highest."""

    last: Spread | None
    best: Spread | None
    best_split: str | None
    median: Spread | None
    minutes: Spread | None
    images_per_second: Spread | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class PairedDifference:
    """The last epoch of a group minus that of the baseline, by seed.

    by_seed: seed -> difference, of the seeds that both have finished. spread: of these. interval: the 95 % confidence
    interval of their mean, None for fewer than two. unpaired: seeds that only one of the two has finished.
    """

    label: str
    baseline: str
    by_seed: dict[int, float]
    spread: Spread | None
    interval: tuple[float, float] | None
    unpaired: list[int]


@dataclass(frozen=True)
class CurvePoint:
    """The metric of a group after an epoch, and the mean time of training until then."""

    epoch: int
    minutes: float
    spread: Spread


def spread(values: Sequence[float]) -> Spread | None:
    """Return the spread of the values, None if there are none."""
    return Spread(**summarize_values(values)) if values else None


def get_curve(run: Run, metric: Metric) -> dict[int, float]:
    """Return epoch -> value of the metric, for the epochs that were evaluated."""
    return {row["epoch"]: row[metric.column] for row in run.history if metric.column in row}


def get_minutes(run: Run) -> list[float]:
    """Return the minutes of training up to the end of each epoch."""
    total, minutes = 0.0, []
    for row in run.history:
        total += row["seconds"] / 60
        minutes.append(total)
    return minutes


def get_mean_curve(runs: Sequence[Run], metric: Metric) -> list[CurvePoint]:
    """Return the spread of the metric over the runs, at the epochs that all of them have evaluated."""
    curves, minutes = [get_curve(run, metric) for run in runs], [get_minutes(run) for run in runs]
    epochs = sorted(set.intersection(*map(set, curves))) if runs else []
    return [
        CurvePoint(
            epoch, statistics.fmean(own[epoch - 1] for own in minutes), spread([curve[epoch] for curve in curves])
        )
        for epoch in epochs
    ]


def measure_run(run: Run, metric: Metric) -> RunFigures:
    """Return the figures of a run, which has evaluated at least one epoch.

    The best epoch is the first of the best ones on the validation images, or without these on the test images.
    """
    curve, validation = get_curve(run, metric), get_curve(run, METRICS["valid_top1"])
    chosen = {epoch: value for epoch, value in (validation or curve).items() if epoch in curve}
    best_epoch = max(chosen, key=chosen.get)
    seconds = sum(row["seconds"] for row in run.history)
    images = sum(row["seconds"] * row["images_per_second"] for row in run.history)
    values = list(curve.values())
    return RunFigures(
        last=values[-1],
        best=curve[best_epoch],
        best_epoch=best_epoch,
        best_split="valid" if validation else "test",
        median=statistics.median(values[-MEDIAN_EPOCHS:]),
        minutes=seconds / 60,
        images_per_second=images / seconds,
        peak_memory_mb=max((row["peak_memory_mb"] for row in run.history if "peak_memory_mb" in row), default=None),
    )


def measure_group(group: Group, metric: Metric) -> GroupFigures:
    """Return the figures of a group, from its finished runs."""
    runs = [measure_run(run, metric) for run in group.finished]
    keys = ("last", "best", "median", "minutes", "images_per_second")
    return GroupFigures(
        best_split=" and ".join(sorted({run.best_split for run in runs})) or None,
        peak_memory_mb=max((run.peak_memory_mb for run in runs if run.peak_memory_mb), default=None),
        **{key: spread([getattr(run, key) for run in runs]) for key in keys},
    )


def compare_with_baseline(group: Group, baseline: Group, metric: Metric) -> PairedDifference:
    """Return the differences of the last epoch, group minus baseline, between runs of the same seed."""
    ours, theirs = ({run.seed: measure_run(run, metric).last for run in one.finished} for one in (group, baseline))
    return pair_by_seed(group.label, ours, baseline.label, theirs)


def pair_by_seed(label: str, ours: dict[int, float], baseline: str, theirs: dict[int, float]) -> PairedDifference:
    """Return the differences, ours minus theirs, of the seeds that both have. ours, theirs: seed -> accuracy."""
    by_seed = {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}
    found, interval = spread(list(by_seed.values())), None
    if len(by_seed) > 1:
        half = t_quantile(len(by_seed) - 1, (1 + CONFIDENCE) / 2) * found.std / math.sqrt(found.n)
        interval = (found.mean - half, found.mean + half)
    return PairedDifference(label, baseline, by_seed, found, interval, sorted(ours.keys() ^ theirs.keys()))


def t_quantile(freedom: int, probability: float) -> float:
    """Return the quantile of Student's t distribution, for a probability above 0.5. freedom: degrees of freedom."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(100):  # bisection, to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, freedom: int) -> float:
    """Return the probability that a value of Student's t distribution is below t >= 0.

    For a whole number of degrees of freedom it is a finite sum: Abramowitz and Stegun, Handbook of Mathematical
    Functions (1964), equations 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 0.5 + ((angle + total) / math.pi if odd else total / 2)
