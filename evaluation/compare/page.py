"""A comparison as a page: tables that sort, curves to switch on and off, and the mixed images of each run."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from engine.runtime.text import format_count
from evaluation.compare import tables
from evaluation.compare.comparison import Comparison, describe_groups
from evaluation.compare.curves import build_chart, collect_curves, draw_swatch
from evaluation.compare.figures import make_axis_figure
from evaluation.compare.runs import FINISHED, Run
from evaluation.compare.statistics import PairedDifference
from evaluation.html import (
    Html,
    build_page,
    embed_figure,
    embed_image,
    make_figure,
    make_list,
    make_paragraph,
    make_section,
    make_table,
    to_html,
)

CURVES = tuple(Path(__file__).with_name(f"curves.{kind}") for kind in ("css", "js"))
IMAGE_SIDES = (1200, 900, 640, 480)  # pixels of mixed images; the first with which all fit into MAX_IMAGE_BYTES counts
MAX_IMAGE_BYTES = 3_500_000


def format_page(comparison: Comparison, command: str) -> str:
    """Return the page. command: that made it."""
    label = make_labeller(comparison)
    curves = collect_curves(comparison)
    picture = embed_figure(make_axis_figure(comparison, "epoch"), f"{comparison.metric.title} over epochs")
    sections = [*make_summary(comparison), make_section("Results", make_results(comparison, label))]
    if curves["metrics"]:
        sections.append(make_section("Curves", build_chart(comparison, curves, picture)))
    if comparison.differences:
        sections.append(make_section("Differences by seed", make_differences(comparison, label)))
    if pictures := list(show_mixed_images(comparison)):
        sections.append(make_section("Mixed images", *pictures))
    if comparison.option_differences:
        header, *rows = tables.make_option_rows(comparison)
        table = make_table(
            [["option", *map(label, header[1:])], *rows], "Options with the same value in all groups are not listed."
        )
        sections.append(make_section("Options that differ", table))
    sections.append(make_section("Runs", make_runs(comparison, label)))
    if comparison.left_out:
        lines = [f"{one.path}: {one.reason}" for one in comparison.left_out]
        sections.append(make_section("Left out", make_list(lines)))
    sections.append(make_section("How it was made", Html(f"<p><code>{to_html(command)}</code></p>"), closed=True))
    title = f"Comparison of {describe_groups(comparison.groups)}"
    return build_page(title, sections, parts=CURVES if curves["metrics"] else CURVES[:1], data=curves)


def make_labeller(comparison: Comparison) -> Callable[[str], Html]:
    """Return a function that puts the mark of a group in the curves before its label."""
    marks = {group.label: draw_swatch(number) for number, group in enumerate(comparison.groups)}
    return lambda label: Html(f"{marks[label]}\u00a0{to_html(label)}")


def make_summary(comparison: Comparison) -> list[Html]:
    """Return what the numbers are, what is not fair, and which runs are not finished."""
    parts = [
        make_paragraph(
            f"{comparison.groups[0].options['dataset']}: {comparison.metric.title}. Mean ± standard deviation of the "
            "sample (n - 1) over n finished runs that differ in their seed only."
        )
    ]
    unfinished = [run for group in comparison.groups for run in group.unfinished]
    if unfinished:
        count = f"{format_count(len(unfinished), 'run')} {'is' if len(unfinished) == 1 else 'are'}"
        parts.append(make_paragraph(f"{count} not finished: in no mean, but as dashed lines in the curves."))
    return [*parts, *([make_list(comparison.warnings, "warnings")] if comparison.warnings else [])]


def tidy(row: list[str]) -> list[str]:
    """Return the cells of a table with a real plus-minus sign."""
    return [cell.replace(" +- ", " ± ") for cell in row]


def make_results(comparison: Comparison, label: Callable[[str], Html]) -> Html:
    """Return the table of the groups."""
    header, *rows = tables.make_group_rows(comparison)
    marked = []
    for group, (_, *cells) in zip(comparison.groups, rows, strict=True):
        name = label(group.label)
        if group is comparison.baseline and comparison.differences:
            name = Html(f'{name} <span class="baseline">baseline</span>')
        status = [make_badge(cells.pop())] if group.unfinished else []
        marked.append([name, *tidy(cells), *status])
    return make_table([["group", *header[1:]], *marked], "A click on a column's title sorts the table.")


def make_badge(text: str) -> Html:
    return Html(f'<span class="badge">{to_html(text)}</span>')


def make_runs(comparison: Comparison, label: Callable[[str], Html]) -> Html:
    """Return the table of the runs; those that are not finished are marked."""
    header, *rows = tables.make_run_rows(comparison)
    marked = [
        [folder, label(name), seed, status if status == FINISHED else make_badge(status), *cells]
        for folder, name, seed, status, *cells in rows
    ]
    return make_table([header, *marked], "All runs, with the epoch of the best value in brackets.")


# ---- Differences ----


def make_differences(comparison: Comparison, label: Callable[[str], Html]) -> Html:
    """Return the table of the differences with a drawing of each, all on one scale."""
    header, *rows = tables.make_difference_rows(comparison.differences)
    ticks = choose_ticks(comparison.differences)
    marked = [
        [label(one.label), draw_interval(one, ticks), *tidy(cells)]
        for one, (_, *cells) in zip(comparison.differences, rows, strict=True)
    ]
    drawing = Html("difference and interval")
    footer = [Html(""), draw_scale(ticks), *[""] * (len(header) - 1)]
    caption = (
        f"The {tables.describe_differences(comparison)}. Large dot: the mean, filled if its interval excludes 0; line: "
        "the interval; small dots: the seeds."
    )
    return make_table([["group", drawing, *header[1:]], *marked], caption, footer=footer)


def choose_ticks(differences: list[PairedDifference]) -> list[float]:
    """Return the ticks of a scale that holds 0 and all intervals and seeds: three to six at round values."""
    values = [0.0, *(value for one in differences for value in (*one.by_seed.values(), *(one.interval or ())))]
    width = (max(values) - min(values)) or 1.0
    power = 10 ** math.floor(math.log10(width / 4))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if width / step <= 4)
    first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
    return [step * tick for tick in range(first, max(last, first + 1) + 1)]


def make_scale(ticks: list[float]) -> Callable[[float], str]:
    """Return a function from a difference to its place, from left to right."""
    return lambda value: f"{100 * (value - ticks[0]) / (ticks[-1] - ticks[0]):.2f}%"


def draw_interval(one: PairedDifference, ticks: list[float]) -> Html:
    """Draw the mean, the interval and the seeds of a difference."""
    place = make_scale(ticks)
    shapes = [f'<line class="zero" x1="{place(0)}" x2="{place(0)}" y1="-6" y2="30"/>']
    if one.interval:
        low, high = map(place, one.interval)
        shapes.append(f'<line class="range" x1="{low}" x2="{high}" y1="12" y2="12"/>')
        shapes += [f'<line class="range" x1="{x}" x2="{x}" y1="8" y2="16"/>' for x in (low, high)]
    shapes += [f'<circle class="seed" cx="{place(value)}" cy="12" r="2.5"/>' for value in one.by_seed.values()]
    if one.spread:
        clear = one.interval and (one.interval[0] > 0 or one.interval[1] < 0)
        kind = "mean" if clear else "mean unclear"
        shapes.append(f'<circle class="{kind}" cx="{place(one.spread.mean)}" cy="12" r="5"/>')
    return Html(f'<svg class="interval" aria-hidden="true">{"".join(shapes)}</svg>')


def draw_scale(ticks: list[float]) -> Html:
    """Draw the scale below the intervals."""
    place = make_scale(ticks)
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    shapes = [
        f'<line class="range" x1="{place(tick)}" x2="{place(tick)}" y1="0" y2="4"/>'
        f'<text x="{place(tick)}" y="17">{tick:{"+" if round(tick, 9) else ""}.{digits}f}</text>'
        for tick in ticks
    ]
    return Html(f'<svg class="interval" aria-hidden="true">{"".join(shapes)}</svg>')


# ---- Mixed images ----


def show_mixed_images(comparison: Comparison) -> Iterator[Html]:
    """Yield the last mixed batch that each run has drawn, by group."""
    drawn = [[run for run in group.runs if run.mixed_images] for group in comparison.groups]
    if not any(drawn):
        return
    pictures = embed_mixed_batches(drawn)
    left_out = sum(map(len, drawn)) - len(pictures)
    note = f" {format_count(left_out, 'run')} are left out, since the page would be too large." if left_out else ""
    yield make_paragraph(f"The last mixed batch that each run has drawn (--vis_epoch).{note}")
    for number, (group, runs) in enumerate(zip(comparison.groups, drawn, strict=True)):
        shown = [pictures[run.folder] for run in runs if run.folder in pictures]
        if shown:
            title = f"<h3>{draw_swatch(number)}\u00a0{to_html(group.label)}</h3>"
            yield Html(f'{title}<div class="runs">{"".join(shown)}</div>')


def embed_mixed_batches(drawn: list[list[Run]]) -> dict[Path, Html]:
    """Return folder -> figure: of all runs at the first of IMAGE_SIDES that fits into MAX_IMAGE_BYTES, otherwise of the
    first run of each group. drawn: the runs with such pictures, by group.
    """
    everything, first = [run for runs in drawn for run in runs], [runs[0] for runs in drawn if runs]
    for runs, side in [*((everything, side) for side in IMAGE_SIDES), (first, IMAGE_SIDES[-1])]:
        pictures = {run.folder: embed_mixed_batch(run, side) for run in runs}
        if sum(map(len, pictures.values())) <= MAX_IMAGE_BYTES:
            break
    return pictures


def embed_mixed_batch(run: Run, side: int) -> Html:
    """Return the last mixed batch of a run, at most `side` pixels wide. A PDF or a damaged file is named instead."""
    path = run.mixed_images[-1]
    epoch = next((part for part in re.findall(r"\d+", path.stem)), "")
    caption = f"seed {run.seed}, epoch {int(epoch)}" if epoch else f"seed {run.seed}"
    try:
        with Image.open(path) as image:
            return make_figure(embed_image(image, f"mixed images, {caption}", side), caption)
    except OSError:  # also what PIL raises for a file that is not an image
        return make_figure(make_paragraph(f"not an image that a page can show: {path}"), caption)
