"""The card of several classifiers: one table and one page of figures with everything that was measured of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from engine.drawing import figures, tables
from evaluation import calibration, localization, localization_task, ood, robustness

Panel = tuple[str, Callable]  # a title, and a function that draws on axes
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
    "best_gt_known": "the same at its best threshold",
    "max_box_acc_v2": "MaxBoxAccV2",
}


class Row(NamedTuple):
    """One measure in the table."""

    title: str
    values: list[float | None]  # of each classifier
    spec: str  # their format
    sign: int  # 1 where higher is better, -1 where lower is, else 0

    def format_cells(self, mark: str = "") -> list[str]:
        """The cells; those of the best of several classifiers between two marks."""
        texts = ["-" if value is None else format(value, self.spec) for value in self.values]
        known = [value for value in self.values if value is not None]
        if not mark or not self.sign or len(known) < 2:
            return [self.title, *texts]
        best = format(max(known) if self.sign > 0 else min(known), self.spec)
        return [self.title, *(f"{mark}{text}{mark}" if text == best else text for text in texts)]


def make_rows(results: list[dict]) -> list[Row]:
    """The table, one row per measure, in the order of the tasks' own tables."""
    first, rows = results[0], []

    def add(title: str, sign: int, *keys: str, spec: str = ".2f") -> None:
        rows.append(Row(title, [get_nested(result, keys) for result in results], spec, sign))

    for k in (1, 5):
        add(f"top-{k} (%)", 1, "accuracy", f"top{k}")
    for key, (title, spec) in CALIBRATION_ROWS.items():
        add(title, -1, "calibration", key, spec=spec)
    add("temperature", 0, "calibration", "temperature")
    add("ECE after temperature scaling (%)", -1, "calibration", "after", "ece")
    for title in get_nested(first, ("robustness", "attacks")) or ():
        add(f"{title} (%)", 1, "robustness", "attacks", title)
    corrupted_by = get_nested(first, ("robustness", "corrupted_by"))
    add(f"mean accuracy, {corrupted_by} corruptions (%)", 1, "robustness", "corruption_mean")
    add("mCE (%)", -1, "robustness", "mce", spec=".1f")
    for kind, title in robustness.AREAS.items():
        add(f"mean accuracy, occluded by {title} (%)", 1, "robustness", f"area_{kind}")
    for name in get_nested(first, ("ood", "outside")) or ():
        for score in ood.SCORES:
            add(f"AUROC against {name}, {score} (%)", 1, "ood", "outside", name, "scores", score, "auroc")
            add(f"FPR95 against {name}, {score} (%)", -1, "ood", "outside", name, "scores", score, "fpr95")
    for name in get_nested(first, ("localization", "backgrounds")) or ():
        behind = "" if name == "clean" else f", background {name}"
        for key, title in LOCALIZATION_ROWS.items():
            add(f"{title}{behind} (%)", 1, "localization", "backgrounds", name, key)
    return [row for row in rows if any(value is not None for value in row.values)]


def get_nested(result: dict, keys: tuple[str, ...]):
    """result[keys[0]][keys[1]]...; None where one is missing."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def format_text(results: list[dict], rows: list[Row]) -> str:
    """The table for a terminal: a row for each measure, a column for each classifier."""
    return tables.align_columns([["", *(result["name"] for result in results)], *(row.format_cells() for row in rows)])


def format_markdown(results: list[dict], rows: list[Row], notes: list[str]) -> str:
    """The table with the best of several in bold, and the notes."""
    cells = [["", *(result["name"] for result in results)], *(row.format_cells("**") for row in rows)]
    table = tables.format_markdown(cells)
    return "\n".join([table, "", *(f"- {note}" for note in notes)]) + "\n"


def collect_notes(results: list[dict], seed: int) -> list[str]:
    """How the figures came about, a line each: what a reader of the card must know."""
    first = results[0]
    notes = [f"{first['dataset']}: {first['accuracy']['images']:,} test images; accuracy of all of them"]
    if found := first.get("calibration"):
        notes.append(
            f"calibration: {found['bins']} bins; temperature fitted on {found['held_out']:,} held-out test images, "
            f"figures of the other {found['images']:,}"
        )
        if bound := [result["name"] for result in results if result["calibration"]["temperature_at_bound"]]:
            notes.append(f"no temperature within {calibration.TEMPERATURES} fits {', '.join(bound)}")
    if found := first.get("robustness"):
        notes.append(f"robustness: {found['images']:,} images from all over the test set, accuracies in percent")
        notes += robustness.list_notes(found)
    for name, found in (get_nested(first, ("ood", "outside")) or {}).items():
        notes.append(f"against {name}: {found['inside']:,} test images told from {found['outside']:,} others")
    if found := first.get("localization"):
        baselines, th = found["baselines"], next(iter(found["backgrounds"].values()))["th"]
        notes.append(
            f"localisation: boxes of {found['maps']} maps at {th:g} of the maximum, right from an overlap of 0.5 on; "
            f"{baselines['images']:,} images; a centred box of 3/4 side gets {baselines['centre']:.2f} %"
        )
        notes += localization_task.describe_noise(found)
        notes.append("MaxBoxAccV2: thresholds chosen on the held-out images, accuracy of the others")
    else:
        notes.append(f"no localisation: {first['dataset']} comes without true boxes, and --annotation_path gives none")
    return [*notes, f"seed {seed}"]


def draw_page(path: Path | str, results: list[dict], pictures: list[dict], title: str) -> None:
    """Everything on one page. pictures: of each classifier `images` uint8 (n, H, W, 3), the same for all but for their
    size, `maps` (n, H, W) in 0..1 and `titles`, n texts.
    """
    panels, columns = make_panels([(result["name"], result) for result in results]), 3
    lines = 1 + len(pictures) if pictures else 0
    heights = [3.8 * -(-len(panels) // columns), 1.9 * lines]
    figure = Figure(figsize=(5.2 * columns, sum(heights) + 0.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights) if lines else (figure, None)
    draw_panels(above, panels, columns)
    if lines:
        draw_examples(below, pictures, [result["name"] for result in results])
    figure.suptitle(title)
    figures.save_figure(figure, path)


def draw_panels(area, panels: list[Panel], columns: int) -> None:
    """The panels in rows of `columns` on a figure or subfigure of Matplotlib."""
    grid = area.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.set_title("\n".join(filter(None, (title, axes.get_title()))), fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")


def format_label(name: str, limit: int = 32) -> str:
    """A name as a label of Matplotlib, which reads $ as mathematics and hides what begins with an underscore; a long
    one, such as a path, without its middle.
    """
    name = name if len(name) <= limit else f"{name[: limit // 2 - 1]}\u2026{name[-limit // 2 :]}"
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def make_panels(named: list[tuple[str, dict]]) -> list[Panel]:
    """What can be drawn of all results."""
    named = [(format_label(name), result) for name, result in named]
    first, panels = named[0][1], []
    if "robustness" in first:
        panels += robustness.make_panels([(name, result["robustness"]) for name, result in named])
    if "calibration" in first:
        own = [(name, result["calibration"]) for name, result in named]
        panels.append(("calibration", partial(calibration.draw_reliability, results=own)))
    for outside in get_nested(first, ("ood", "outside")) or ():
        curves = [(name, result["ood"]["outside"][outside]["scores"]["energy"]) for name, result in named]
        panels.append((f"told from {format_label(outside)} by energy", partial(ood.draw_roc, curves=curves)))
    if "localization" in first:
        found = [(name, result["localization"]) for name, result in named]
        for title, panel in make_localization_panels(found):
            panels.append((", ".join(filter(None, ("localisation", title))), panel))
    return panels


def make_localization_panels(named: list[tuple[str, dict]]) -> list[Panel]:
    """A panel for each background."""
    panels, first = [], named[0][1]
    for background in first["backgrounds"]:
        curves = [(name, result["backgrounds"][background]) for name, result in named]
        draw = partial(localization.draw_threshold_curves, results=curves, centred=first["baselines"]["centre"])
        panels.append(("" if background == "clean" else f"background {background}", draw))
    return panels


def draw_examples(figure, pictures: list[dict], names: list[str]) -> None:
    """The images side by side; below, a row for each classifier: its maps, and what it takes the images for."""
    grid = figure.subplots(1 + len(names), len(pictures[0]["images"]), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image in zip(grid[0], pictures[0]["images"], strict=True):
        axes.imshow(image)
    for row, shown, name in zip(grid[1:], pictures, names, strict=True):
        row[0].set_ylabel(format_label(name, 22), fontsize=9)
        for axes, image, heatmap, title in zip(row, shown["images"], shown["maps"], shown["titles"], strict=True):
            axes.imshow(figures.overlay_heatmap(image, heatmap))
            axes.set_title(format_label(title, 26), fontsize=8)
