"""The card of several classifiers: one table and one page of figures with everything that was measured of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from engine.drawing import figures, tables
from evaluation import calibration, localization, localization_task, ood, robustness

CardPanel = tuple[str, Callable]  # a title, and a function that draws on axes
CALIBRATION = {  # key of the results -> title and format
    "nll": ("negative log-likelihood", ".4f"),
    "brier": ("Brier score", ".4f"),
    "ece": ("ECE (%)", ".2f"),
    "adaptive_ece": ("adaptive ECE (%)", ".2f"),
    "classwise_ece": ("class-wise ECE (%)", ".2f"),
}
LOCALIZATION = {
    "top1_loc": "top-1 localisation",
    "gt_known": "GT-known localisation",
    "best_gt_known": "the same at its best threshold",
    "max_box_acc_v2": "MaxBoxAccV2",
}


class Row(NamedTuple):
    """A line of the table."""

    title: str
    values: list[float | None]  # of each classifier
    form: str
    sign: int  # 1 where more is better, -1 where less is, else 0

    def cells(self, mark: str = "") -> list[str]:
        """Texts; those of the best of several classifiers between two marks."""
        texts = ["-" if value is None else format(value, self.form) for value in self.values]
        known = [value for value in self.values if value is not None]
        if not mark or not self.sign or len(known) < 2:
            return [self.title, *texts]
        best = format(max(known) if self.sign > 0 else min(known), self.form)
        return [self.title, *(f"{mark}{text}{mark}" if text == best else text for text in texts)]


def make_rows(results: list[dict]) -> list[Row]:
    """What the table says, one row a measure, in the order of the results' own tables."""
    first, rows = results[0], []

    def add(title: str, sign: int, *keys: str, form: str = ".2f") -> None:
        rows.append(Row(title, [get_nested(result, keys) for result in results], form, sign))

    for k in (1, 5):
        add(f"top-{k} (%)", 1, "accuracy", f"top{k}")
    for key, (title, form) in CALIBRATION.items():
        add(title, -1, "calibration", key, form=form)
    add("temperature", 0, "calibration", "temperature")
    add("ECE after temperature scaling (%)", -1, "calibration", "after", "ece")
    for title in get_nested(first, ("robustness", "attacks")) or ():
        add(f"{title} (%)", 1, "robustness", "attacks", title)
    made = get_nested(first, ("robustness", "corrupted_by"))
    add(f"mean accuracy, {made} corruptions (%)", 1, "robustness", "corruption_mean")
    add("mCE (%)", -1, "robustness", "mce", form=".1f")
    for kind, title in robustness.AREAS.items():
        add(f"mean accuracy, occluded by {title} (%)", 1, "robustness", f"area_{kind}")
    for name in get_nested(first, ("ood", "outside")) or ():
        for score in ood.SCORES:
            add(f"AUROC against {name}, {score} (%)", 1, "ood", "outside", name, "scores", score, "auroc")
            add(f"FPR95 against {name}, {score} (%)", -1, "ood", "outside", name, "scores", score, "fpr95")
    for name in get_nested(first, ("localization", "backgrounds")) or ():
        behind = "" if name == "clean" else f", background {name}"
        for key, title in LOCALIZATION.items():
            add(f"{title}{behind} (%)", 1, "localization", "backgrounds", name, key)
    return [row for row in rows if any(value is not None for value in row.values)]


def get_nested(result: dict, keys: tuple[str, ...]):
    """What stands under these keys, one below the other; None where one is missing."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def format_cell(results: list[dict], rows: list[Row]) -> str:
    """A row a measure, a column a classifier, for a terminal."""
    return tables.align_columns([["", *(result["name"] for result in results)], *(row.cells() for row in rows)])


def format_markdown(results: list[dict], rows: list[Row], notes: list[str]) -> str:
    """The same as a report, the best of several in bold."""
    table = tables.format_markdown([["", *(result["name"] for result in results)], *(row.cells("**") for row in rows)])
    return "\n".join([table, "", *(f"- {note}" for note in notes)]) + "\n"


def collect_notes(results: list[dict], options: dict) -> list[str]:
    """How the figures came about, a line each: what a reader of the report must know."""
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
        notes += robustness.notes(found)
    for name, found in (get_nested(first, ("ood", "outside")) or {}).items():
        notes.append(f"against {name}: {found['inside']:,} test images told from {found['outside']:,} others")
    if found := first.get("localization"):
        base = found["baselines"]
        notes.append(
            f"localisation: boxes of {found['maps']} maps at {options['th']:g} of the maximum, right from an overlap "
            f"of 0.5 on; {base['images']:,} images; a centred box of 3/4 side gets {base['centre']:.2f} %"
        )
        notes += [
            *localization_task.noise_note(found),
            "MaxBoxAccV2: thresholds chosen on the held-out images, accuracy of the others",
        ]
    else:
        notes.append(f"no localisation: {first['dataset']} comes without true boxes, and --annotation_path gives none")
    return [*notes, f"seed {options['seed']}"]


def page(path: Path | str, results: list[dict], pictures: list[dict], title: str) -> None:
    """Everything drawn on one page. pictures: of each classifier `images` uint8 (n, H, W, 3), which are the same, maybe
    in other sizes, `maps` (n, H, W) in 0..1 and `titles`, n texts.
    """
    panels, columns = make_panels([(result["name"], result) for result in results]), 3
    lines = 1 + len(pictures) if pictures else 0
    heights = [3.8 * -(-len(panels) // columns), 1.9 * lines]
    figure = Figure(figsize=(5.2 * columns, sum(heights) + 0.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights) if lines else (figure, None)
    layout_page(above, panels, columns)
    if lines:
        count_below_baseline(below, pictures, [result["name"] for result in results])
    figure.suptitle(title)
    figures.save_figure(figure, path)


def layout_page(area, panels: list[CardPanel], columns: int) -> None:
    """The panels on a figure of matplotlib's, or a part of one, so many in a row."""
    grid = area.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, (title, panel) in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.set_title("\n".join(filter(None, (title, axes.get_title()))), fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")


def readable_size(name: str, most: int = 32) -> str:
    """As a label of matplotlib's, which reads $ as mathematics and hides what begins with an underscore; a long one, as
    of a path, without its middle.
    """
    name = name if len(name) <= most else f"{name[: most // 2 - 1]}\u2026{name[-most // 2 :]}"
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def make_panels(named: list[tuple[str, dict]]) -> list[CardPanel]:
    """What can be drawn of all results."""
    named = [(readable_size(name), result) for name, result in named]
    first, panels = named[0][1], []
    if "robustness" in first:
        panels += robustness.panels([(name, result["robustness"]) for name, result in named])
    if "calibration" in first:
        own = [(name, result["calibration"]) for name, result in named]
        panels.append(("calibration", partial(calibration.draw_reliability, results=own)))
    for outside in get_nested(first, ("ood", "outside")) or ():
        curves = [(name, result["ood"]["outside"][outside]["scores"]["energy"]) for name, result in named]
        panels.append((f"told from {readable_size(outside)} by energy", partial(ood.draw_roc, curves=curves)))
    if "localization" in first:
        found = [(name, result["localization"]) for name, result in named]
        panels += [
            (f"localisation, {title}" if title else "localisation", one) for title, one in has_backgrounds(found)
        ]
    return panels


def has_backgrounds(named: list[tuple[str, dict]]) -> list[CardPanel]:
    """A panel of localisation for each background."""

    def panel(background: str) -> Callable:
        curves = [(name, result["backgrounds"][background]) for name, result in named]
        return partial(localization.draw_examples, results=curves, centred=first["baselines"]["centre"])

    first = named[0][1]
    return [("" if one == "clean" else f"background {one}", panel(one)) for one in first["backgrounds"]]


def count_below_baseline(figure, pictures: list[dict], names: list[str]) -> None:
    """Images side by side; below, a row a classifier: where it looks, and what it takes them for."""
    grid = figure.subplots(1 + len(names), len(pictures[0]["images"]), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image in zip(grid[0], pictures[0]["images"], strict=True):
        axes.imshow(image)
    for line, one, name in zip(grid[1:], pictures, names, strict=True):
        line[0].set_ylabel(readable_size(name, 22), fontsize=9)
        for axes, image, heat, text in zip(line, one["images"], one["maps"], one["titles"], strict=True):
            axes.imshow(figures.overlay_heatmap(image, heat))
            axes.set_title(readable_size(text, 26), fontsize=8)
