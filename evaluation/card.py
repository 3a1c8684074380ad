"""The card of several classifiers: one table and one page of figures with all of their results."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from matplotlib.figure import Figure

from engine.drawing import figures, tables
from engine.drawing.heatmaps import overlay_heatmap
from engine.inference.metrics import list_unreadable
from engine.runtime.text import format_count
from evaluation import calibration, localization, localization_task, occlusion, ood, robustness

Panel = tuple[str, Callable]  # title with the number of images, and a function that draws on Matplotlib axes
PANEL_SIZE = (4.4, 3.6)  # inches
TITLE_WIDTH = 50  # characters in a line of a panel's title
CALIBRATION_ROWS = {  # key of a result -> title and format
    "nll": ("negative log-likelihood", ".4f"),
    "brier": ("Brier score", ".4f"),
    "ece": ("ECE (%)", ".2f"),
    "adaptive_ece": ("adaptive ECE (%)", ".2f"),
    "classwise_ece": ("class-wise ECE (%)", ".2f"),
}
LOCALIZATION_ROWS = {
    "top1_loc": "top-1 localisation",
    "gt_known": "GT-known localisation",
    "best_gt_known": "GT-known localisation, best threshold",
    "max_box_acc_v2": "MaxBoxAccV2",
}


class Row(NamedTuple):
    """One metric of the table."""

    title: str
    values: list[float | None]  # one per classifier
    spec: str  # format of the values
    sign: int  # 1: higher is better, -1: lower is better, 0: neither

    def format_cells(self, mark: Callable[[str], str] | None = None) -> list[str]:
        """Return the title and the formatted values; `mark` formats the best of several values once more."""
        texts = ["-" if value is None else format(value, self.spec) for value in self.values]
        known = [value for value in self.values if value is not None]
        if mark is None or not self.sign or len(known) < 2:
            return [self.title, *texts]
        best = format(max(known) if self.sign > 0 else min(known), self.spec)
        return [self.title, *(mark(text) if text == best else text for text in texts)]


def make_rows(results: list[dict]) -> list[Row]:
    """Return the table, one row per metric, in the order of the tasks' own tables."""
    first, rows = results[0], []

    def add(title: str, sign: int, *keys: str, spec: str = ".2f") -> None:
        rows.append(Row(title, [get_nested(result, keys) for result in results], spec, sign))

    for k in (1, 5):
        add(f"top-{k} accuracy (%)", 1, "accuracy", f"top{k}")
    for key, (title, spec) in CALIBRATION_ROWS.items():
        add(title, -1, "calibration", key, spec=spec)
    add("temperature", 0, "calibration", "temperature")
    add("ECE after temperature scaling (%)", -1, "calibration", "after", "ece")
    for title in get_nested(first, ("robustness", "attacks")) or ():
        add(f"accuracy under {title} (%)", 1, "robustness", "attacks", title)
    corrupted_by = get_nested(first, ("robustness", "corrupted_by"))
    add(f"mean accuracy, {corrupted_by} corruptions (%)", 1, "robustness", "corruption_mean")
    add("mCE (%)", -1, "robustness", "mce", spec=".1f")
    for kind, title in occlusion.KINDS.items():
        add(f"mean accuracy, occlusion by {title} (%)", 1, "robustness", f"area_{kind}")
    for name in get_nested(first, ("ood", "outside")) or ():
        for score, title in ood.SCORE_TITLES.items():
            add(f"OOD AUROC on {name}, {title} (%)", 1, "ood", "outside", name, "scores", score, "auroc")
            add(f"OOD FPR95 on {name}, {title} (%)", -1, "ood", "outside", name, "scores", score, "fpr95")
    for name in get_nested(first, ("localization", "backgrounds")) or ():
        background = "" if name == "clean" else f", {localization_task.BACKGROUND_TITLES[name]}"
        for key, title in LOCALIZATION_ROWS.items():
            add(f"{title}{background} (%)", 1, "localization", "backgrounds", name, key)
    return [row for row in rows if any(value is not None for value in row.values)]


def get_nested(result: dict, keys: tuple[str, ...]):
    """Return result[keys[0]][keys[1]]..., or None if a key is missing."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def format_text(results: list[dict], rows: list[Row]) -> str:
    """Return the table for a terminal: a row for each metric, a column for each classifier."""
    return tables.align_columns([["", *(result["name"] for result in results)], *(row.format_cells() for row in rows)])


def format_markdown(results: list[dict], rows: list[Row], notes: list[str]) -> str:
    """Return the table in Markdown, the best of several values in bold, under a heading and followed by the notes."""
    cells = [["", *(result["name"] for result in results)], *(row.format_cells("**{}**".format) for row in rows)]
    table = tables.format_markdown(cells)
    heading = f"# Card of {format_count(len(results), 'classifier')} on {results[0]['dataset']}"
    return "\n".join([heading, "", table, "", *(f"- {note}" for note in notes)]) + "\n"


def collect_notes(results: list[dict], seed: int) -> list[str]:
    """Return one line for each thing that a reader must know about how the numbers were computed."""
    first = results[0]
    notes = [f"{first['dataset']}: {first['accuracy']['images']:,} test images; accuracy is measured on all of them"]
    notes += list_unreadable(first["accuracy"], {"unreadable": "test"})
    if found := first.get("calibration"):
        notes.append(
            f"calibration: {found['bins']} bins; the temperature is fitted on {found['held_out']:,} held-out test "
            f"images, the metrics are computed on the other {found['images']:,}"
        )
        if bound := [result["name"] for result in results if result["calibration"]["temperature_at_bound"]]:
            notes.append(calibration.describe_bound(bound))
    if found := first.get("robustness"):
        notes.append(f"robustness: top-1 accuracy on {found['images']:,} images spread over the test set")
        notes += robustness.list_notes(found)
    for name, found in (get_nested(first, ("ood", "outside")) or {}).items():
        notes.append(
            f"OOD detection on {name}: {found['inside']:,} test images (in-distribution) against {found['outside']:,} "
            "out-of-distribution images"
        )
    if found := first.get("localization"):
        baselines, th = found["baselines"], next(iter(found["backgrounds"].values()))["th"]
        notes.append(
            f"localisation: {baselines['images']:,} images; boxes around {found['maps']} maps thresholded at {th:g} of "
            "their maximum, correct from an IoU of 0.5; a centred box of 3/4 of the side scores "
            f"{baselines['centre']:.2f} %"
        )
        notes += localization_task.describe_noise(found)
        named = [{"name": result["name"], **result["localization"]} for result in results]
        notes += localization_task.describe_constant_maps(named)
        notes.append("MaxBoxAccV2: thresholds are chosen on the held-out images, accuracy is measured on the others")
    else:
        notes.append(f"no localisation: {first['dataset']} has no ground-truth boxes; give them with --annotation_path")
    return [*notes, f"seed {seed}"]


def draw_page(path: Path | str, results: list[dict], examples: list[dict], *, dpi: int = figures.DPI) -> None:
    """Draw all results on one page and save it. Each panel says on how many images it rests.

    examples: for each classifier `images` uint8 (n, H, W, 3), the same images for all but for their size, `maps`
    (n, H, W) in 0..1 and `titles`, n texts.
    """
    panels = make_panels([(result["name"], result) for result in results])
    columns, *heights = plan_panels(panels, len(results))
    width = PANEL_SIZE[0] * columns
    if examples:
        side = min(width / len(examples[0]["images"]), 3.0)
        heights.append(side + (side + 0.25) * len(examples) + 0.6)
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    top, *bottom = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    draw_panels(top, panels, columns)
    if examples:
        draw_examples(bottom[0], examples, [result["name"] for result in results])
    figure.suptitle(results[0]["dataset"])
    figures.save_figure(figure, path, dpi)


def plan_panels(panels: list[Panel], count: int) -> tuple[int, float]:
    """Return the number of columns, and the height in inches, of the panels of `count` classifiers."""
    columns = figures.choose_columns(len(panels), 4)
    legend = 0.17 * (count + 1) if count > 4 else 0.2
    return columns, (PANEL_SIZE[1] + legend) * -(-len(panels) // columns)


def draw_panels(area, panels: list[Panel], columns: int) -> None:
    """Draw the panels in rows of `columns` on a Matplotlib figure or subfigure."""
    grid = area.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.set_title("\n".join(filter(None, (fill(title, TITLE_WIDTH), axes.get_title()))), fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")


def format_label(name: str, limit: int = 32) -> str:
    """Return a name, shortened, as a Matplotlib label.

    Matplotlib reads $ as mathematics and hides labels that begin with an underscore.
    """
    name = figures.shorten(name, limit)
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def make_panels(named: list[tuple[str, dict]]) -> list[Panel]:
    """Return a panel for everything that can be drawn of the results."""
    named = [(format_label(name), result) for name, result in named]
    first, panels = named[0][1], []
    if "robustness" in first:
        panels += robustness.make_panels([(name, result["robustness"]) for name, result in named])
    if "calibration" in first:
        own = [(name, result["calibration"]) for name, result in named]
        title = f"calibration, {format_count(own[0][1]['images'], 'image')}"
        panels.append((title, partial(calibration.draw_reliability, results=own)))
    for ood_name in get_nested(first, ("ood", "outside")) or ():
        curves = [(name, result["ood"]["outside"][ood_name]["scores"]["energy"]) for name, result in named]
        title = f"OOD detection, energy, {describe_ood(ood_name, first['ood']['outside'][ood_name])}"
        panels.append((title, partial(ood.draw_roc, curves=curves)))
    if "localization" in first:
        found = [(name, result["localization"]) for name, result in named]
        for title, panel in make_localization_panels(found):
            panels.append((f"localisation, {title}", panel))
    return panels


def describe_ood(name: str, found: dict) -> str:
    """Return what a plot of OOD detection rests on. name: of the OOD images. found: a result of measure_ood()."""
    return f"{found['inside']:,} test and {found['outside']:,} {format_label(name)} images"


def make_localization_panels(named: list[tuple[str, dict]]) -> list[Panel]:
    """Return a panel for each background."""
    panels, first = [], named[0][1]
    for background in first["backgrounds"]:
        curves = [(name, result["backgrounds"][background]) for name, result in named]
        draw = partial(localization.draw_threshold_curves, results=curves, centred=first["baselines"]["centre"])
        count = format_count(curves[0][1]["images"], "image")
        panels.append((", ".join(filter(None, (localization_task.BACKGROUND_TITLES[background], count))), draw))
    return panels


def draw_examples(figure, examples: list[dict], names: list[str]) -> None:
    """Draw the images side by side and, below them, a row for each classifier with its maps and predictions."""
    grid = figure.subplots(1 + len(names), len(examples[0]["images"]), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image in zip(grid[0], examples[0]["images"], strict=True):
        axes.imshow(image)
    for row, shown, name in zip(grid[1:], examples, names, strict=True):
        row[0].set_ylabel(format_label(name, 22), fontsize=9)
        for axes, image, heatmap, title in zip(row, shown["images"], shown["maps"], shown["titles"], strict=True):
            axes.imshow(overlay_heatmap(image, heatmap))
            title += ", constant map" if figures.is_constant(heatmap) else ""
            axes.set_title(format_label(title, 34), fontsize=8)
    label = "activation map of the predicted class, each from its lowest to its highest value"
    figures.add_colour_bar(figure, grid, label, location="bottom")
