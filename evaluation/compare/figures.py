"""The figures of a comparison: accuracy over epochs, training time and cost, with the spread over the seeds."""

from pathlib import Path

from matplotlib.figure import Figure

from engine.drawing import figures
from evaluation.card import format_label
from evaluation.compare.comparison import Comparison
from evaluation.compare.groups import Group
from evaluation.compare.metrics import Metric
from evaluation.compare.statistics import get_mean_curve

# colours that colour-blind readers can distinguish, by Okabe and Ito, Color Universal Design (2008)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = "os^Dv*P"  # no two of the first 28 groups share both colour and marker
ZOOM = 0.75  # of the longest run: the second panel shows the epochs after it
MIN_ZOOM_EPOCHS = 12  # in shorter runs the second panel would show hardly a line


def draw_comparison(comparison: Comparison, folder: Path, file_type: str, *, dpi: int) -> list[Path]:
    """Draw the metric over epochs and over training time, and the last epoch over what a run costs. Returns the files.

    A line is the mean of a group's finished runs, the band around it one standard deviation. Each run that is not
    finished is a thin line of its own. The last figure needs a finished run.
    """
    drawn = {"curves": make_axis_figure(comparison, "epoch"), "time": make_axis_figure(comparison, "minutes")}
    if comparison.baseline:
        drawn["cost"] = make_cost_figure(comparison)
    paths = [folder / f"{name}.{file_type}" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        figures.save_figure(figure, path, dpi)
    return paths


def make_cost_figure(comparison: Comparison) -> Figure:
    """Return the last epoch of each group over its training time relative to that of the baseline, with the standard
    deviation of both over the seeds. Groups without a finished run are left out.
    """
    pairs = list(zip(comparison.groups, comparison.figures, strict=True))
    base = next(own.minutes.mean for group, own in pairs if group is comparison.baseline)
    figure = Figure(figsize=(6.4, 4.2 + 0.1 * len(pairs)), layout="constrained")
    axes = figure.subplots()
    for number, (group, own) in enumerate(pairs):
        if group.finished:
            style = {"color": choose_style(number)["color"], "marker": MARKERS[number // len(COLOURS) % len(MARKERS)]}
            label = format_label(f"{group.label} (n = {own.last.n})", 60)
            spread = {"xerr": (own.minutes.std or 0) / base, "yerr": own.last.std or 0}
            axes.errorbar(
                own.minutes.mean / base, own.last.mean, label=label, linestyle="", elinewidth=0.8, **spread, **style
            )
    axes.set(
        xlabel=f"training time relative to {comparison.baseline.label}", ylabel=f"{comparison.metric.title}, last epoch"
    )
    axes.grid(alpha=0.3)
    add_legend(figure)
    return figure


def make_axis_figure(comparison: Comparison, axis: str) -> Figure:
    """Return the metric over `axis`, epoch or minutes. The last epochs of long runs have a panel of their own."""
    longest = max((run.epoch for group in comparison.groups for run in group.runs), default=0)
    starts = [0, int(ZOOM * longest)] if axis == "epoch" and longest >= MIN_ZOOM_EPOCHS else [0]
    rows = -(-len(comparison.groups) // 2)
    figure = Figure(figsize=(6.4 * len(starts), 4.2 + 0.2 * rows * (len(comparison.groups) > 4)), layout="constrained")
    for axes, start in zip(figure.subplots(1, len(starts), squeeze=False)[0], starts, strict=True):
        for number, group in enumerate(comparison.groups):
            draw_group(axes, group, comparison.metric, axis, choose_style(number), start)
        label = "epoch" if axis == "epoch" else "training time (minutes, without evaluation)"
        axes.set(xlabel=label, ylabel=comparison.metric.title)
        axes.grid(alpha=0.3)
        if axis == "epoch":
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if start:
            axes.set_title(f"from epoch {start + 1}", fontsize=10)
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Add one legend for all panels below them."""
    drawn = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= zip(labels, handles, strict=True)
    if drawn:
        columns = int(10 * figure.get_size_inches()[0]) // (8 + max(map(len, drawn)))
        place = {"loc": "outside lower center", "ncols": max(1, min(len(drawn), columns))}
        figure.legend(list(drawn.values()), list(drawn), frameon=False, fontsize=8, **place)


def choose_style(number: int) -> dict:
    """Return colour and line style of a group: no two of the first 28 are alike."""
    turn, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": LINE_STYLES[turn % len(LINE_STYLES)]}


def draw_group(axes, group: Group, metric: Metric, axis: str, style: dict, start: int) -> None:
    """Draw the mean of the finished runs with its band, and the other runs as thin lines, after epoch `start`."""
    count = f"n = {len(group.finished)}"
    label = format_label(f"{group.label} ({count})", 60)
    points = [point for point in get_mean_curve(group.finished, metric) if point.epoch > start]
    if points:
        x, mean = [getattr(point, axis) for point in points], [point.spread.mean for point in points]
        axes.plot(x, mean, label=label, marker="." if len(points) < 40 else None, **style)
        if points[0].spread.std is not None:
            std = [point.spread.std for point in points]
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    for run in group.unfinished:
        own = [point for point in get_mean_curve([run], metric) if point.epoch > start]
        name = format_label(f"{group.label}, seed {run.seed} ({run.describe_status()})", 60)
        x, y = [getattr(point, axis) for point in own], [point.spread.mean for point in own]
        if own:
            axes.plot(x, y, label=name, marker="." if len(own) < 40 else None, linewidth=0.8, alpha=0.7, **style)
