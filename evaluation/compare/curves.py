"""The interactive curves of a page: their data and controls. curves.js draws them, curves.css is their style."""

import math
from collections.abc import Sequence

from evaluation.compare.comparison import Comparison
from evaluation.compare.figures import choose_style
from evaluation.compare.groups import Group
from evaluation.compare.metrics import METRICS, Metric
from evaluation.compare.runs import Run
from evaluation.compare.statistics import get_mean_curve
from evaluation.html import Html, to_html

OTHERS = (  # what a log has besides the metrics that can be compared
    Metric("train_acc", "training accuracy (%; with mixed labels it reads low)"),
    Metric("train_loss", "training loss"),
    Metric("test_loss", "test loss"),
    Metric("valid_loss", "validation loss"),
    Metric("lr", "learning rate"),
)
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "star")  # one after the other, so that two groups of
SHAPES = {  # one colour differ in shape; centred, six units wide
    "circle": "M3,0A3,3 0 1 1 -3,0A3,3 0 1 1 3,0Z",
    "square": "M-2.8,-2.8H2.8V2.8H-2.8Z",
    "triangle": "M0,-3.6L3.5,2.6H-3.5Z",
    "diamond": "M0,-4L4,0L0,4L-4,0Z",
    "cross": "M-3.4,-1.1H-1.1V-3.4H1.1V-1.1H3.4V1.1H1.1V3.4H-1.1V1.1H-3.4Z",
    "star": "M0,-4.2L1.1,-1.4H4L1.7,0.5L2.5,3.5L0,1.8L-2.5,3.5L-1.7,0.5L-4,-1.4H-1.1Z",
}
MAX_POINTS = 500  # of a curve: there are no more pixels
RANGES = {"0": "all epochs", "0.5": "the last half", "0.75": "the last quarter", "0.9": "the last tenth"}


def collect_curves(comparison: Comparison) -> dict:
    """Return what curves.js draws.

    metrics: titles, the compared one first. groups: label, colour and shape of each, and its lines: the mean of the
    finished runs, and each run that is not finished. curves: of a line, one for each metric, or None: epoch, minutes,
    mean and std, as lists; std is None for a single run.
    """
    shown = [comparison.metric, *(metric for metric in METRICS.values() if metric != comparison.metric), *OTHERS]
    runs = [run for group in comparison.groups for run in group.runs]
    shown = [metric for metric in shown if any(metric.column in row for run in runs for row in run.history)]
    groups = [
        {"label": group.label, "colour": colour, "shape": SHAPES[shape], "lines": collect_lines(group, shown)}
        for group, (colour, shape) in zip(comparison.groups, map(choose_mark, range(len(runs))), strict=False)
    ]
    return {"metrics": [metric.title for metric in shown], "groups": groups}


def choose_mark(number: int) -> tuple[str, str]:
    """Return the colour and the shape of the marks of a group."""
    return choose_style(number)["color"], MARKERS[number % len(MARKERS)]


def collect_lines(group: Group, shown: list[Metric]) -> list[dict]:
    """Return the lines of a group: name, whether it is a mean, and a curve for each metric."""
    sets = [(f"n = {len(group.finished)}", True, group.finished)] if group.finished else []
    sets += [(f"seed {run.seed}, {run.describe_status()}", False, [run]) for run in group.unfinished]
    return [
        {"name": name, "mean": mean, "curves": [collect_curve(runs, metric) for metric in shown]}
        for name, mean, runs in sets
    ]


def collect_curve(runs: Sequence[Run], metric: Metric) -> dict | None:
    """Return the columns of a curve, with at most about MAX_POINTS points; None if the runs do not log the metric."""
    points = get_mean_curve(runs, metric)
    step = -(-len(points) // MAX_POINTS) or 1
    points = points[::-1][::step][::-1]  # from the end, so that the last epoch is always there
    if not points:
        return None
    spreads = [point.spread for point in points]
    return {
        "epoch": [point.epoch for point in points],
        "minutes": [round_digits(point.minutes) for point in points],
        "mean": [round_digits(spread.mean) for spread in spreads],
        "std": [round_digits(spread.std) for spread in spreads] if spreads[0].std is not None else None,
    }


def round_digits(value: float) -> float | None:
    """Return the value with six digits, more than a page shows; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def draw_swatch(number: int) -> Html:
    """Return a short piece of the line of a group, with its mark."""
    colour, shape = choose_mark(number)
    return Html(
        f'<svg class="swatch" viewBox="-12 -5 24 10" style="--line:{colour}" aria-hidden="true">'
        f'<path class="line" d="M-12,0H12"/><path class="mark" d="{SHAPES[shape]}"/></svg>'
    )


def build_chart(comparison: Comparison, data: dict, picture: Html) -> Html:
    """Return the controls, the place and the legend of the curves. picture: what is shown without JavaScript."""
    controls = [
        build_select("metric", "Curve", dict(enumerate(data["metrics"]))),
        build_select("axis", "against", {"epoch": "epochs", "minutes": "training time"}),
        build_select("range", "of", RANGES),
        '<span class="buttons"><button type="button" id="all">all groups</button>'
        '<button type="button" id="none">no group</button></span>',
    ]
    legend = [
        f'<button type="button" aria-pressed="true" data-group="{number}">{draw_swatch(number)}'
        f"<span>{to_html(describe_lines(group))}</span></button>"
        for number, group in enumerate(comparison.groups)
    ]
    return Html(
        f'<div id="chart" hidden><div class="controls">{"".join(controls)}</div>\n'
        '<div class="plot"><svg id="curves" tabindex="0" role="img"></svg><div class="tip" hidden></div></div>\n'
        f'<div class="legend" role="group" aria-label="Groups, shown or hidden">{"".join(legend)}</div>\n'
        '<p class="unseen" aria-live="polite"></p></div>\n'
        f"<noscript>{picture}</noscript>"
    )


def describe_lines(group: Group) -> str:
    """Return the entry of a group in the legend."""
    texts = [f"n = {len(group.finished)}"] if group.finished else []
    texts += [f"seed {run.seed} {run.describe_status()}" for run in group.unfinished]
    return f"{group.label} ({'; '.join(texts)})"


def build_select(name: str, title: str, choices: dict) -> str:
    """Return a list to choose from. choices: value -> text."""
    options = "".join(f'<option value="{value}">{to_html(text)}</option>' for value, text in choices.items())
    return f'<label>{title} <select id="{name}">{options}</select></label>'
