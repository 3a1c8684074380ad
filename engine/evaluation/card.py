"""The card of several classifiers: one table and one page of figures with everything that was measured of them."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from engine import draw
from engine.evaluation import calibration, localization, ood, robustness

Row = tuple[
    str, list[float | None], str, int
]  # title, a value a classifier, format, and +1 where more is better, or -1


def rows_of(results: list[dict]) -> list[Row]:
    """What the table says, one row a measure, in the order of the results' own tables."""

    def row(title: str, form: str, sign: int, *keys) -> Row:
        return title, [dig(result, keys) for result in results], form, sign

    first = results[0]
    rows = [row("top-1 (%)", ".2f", 1, "accuracy", "top1"), row("top-5 (%)", ".2f", 1, "accuracy", "top5")]
    for key, title in (("nll", "negative log-likelihood"), ("brier", "Brier score")):
        rows.append(row(title, ".4f", -1, "calibration", key))
    for key, title in (
        ("ece", "ECE (%)"),
        ("adaptive_ece", "adaptive ECE (%)"),
        ("classwise_ece", "class-wise ECE (%)"),
    ):
        rows.append(row(title, ".2f", -1, "calibration", key))
    rows.append(row("temperature", ".2f", 0, "calibration", "temperature"))
    rows.append(row("ECE after temperature scaling (%)", ".2f", -1, "calibration", "after", "ece"))
    rows += [
        row(f"{title} (%)", ".2f", 1, "robustness", "attacks", title)
        for title in dig(first, ("robustness", "attacks")) or ()
    ]
    made = dig(first, ("robustness", "corrupted_by"))
    rows.append(row(f"mean accuracy, {made} corruptions (%)", ".2f", 1, "robustness", "corruption_mean"))
    rows.append(row("mCE (%)", ".1f", -1, "robustness", "mce"))
    for kind, title in robustness.AREAS.items():
        rows.append(row(f"mean accuracy, occluded by {title} (%)", ".2f", 1, "robustness", f"area_{kind}"))
    for name in dig(first, ("ood", "outside")) or ():
        for score in ood.SCORES:
            keys = ("ood", "outside", name, "scores", score)
            rows.append(row(f"AUROC against {name}, {score} (%)", ".2f", 1, *keys, "auroc"))
            rows.append(row(f"FPR95 against {name}, {score} (%)", ".2f", -1, *keys, "fpr95"))
    for name in dig(first, ("localization", "backgrounds")) or ():
        behind = "" if name == "clean" else f", background {name}"
        for key, title in (
            ("top1_loc", "top-1 localisation"),
            ("gt_known", "GT-known localisation"),
            ("best_gt_known", "the same at its best threshold"),
            ("max_box_acc_v2", "MaxBoxAccV2"),
        ):
            rows.append(row(f"{title}{behind} (%)", ".2f", 1, "localization", "backgrounds", name, key))
    return [one for one in rows if any(value is not None for value in one[1])]


def dig(result: dict, keys: tuple):
    """What stands under these keys, one below the other; None where one is missing."""
    for key in keys:
        result = result.get(key) if isinstance(result, dict) else None
    return result


def markdown(results: list[dict], rows: list[Row], notes: list[str]) -> str:
    """A row a measure, a column a classifier; the best of several in bold."""
    lines = [
        f"| | {' | '.join(result['name'].replace('|', '/') for result in results)} |",
        "|---|" + "---:|" * len(results),
    ]
    for title, values, form, sign in rows:
        best = max((sign * value for value in values if value is not None), default=None)
        cells = []
        for value in values:
            text = "-" if value is None else format(value, form)
            bold = value is not None and sign and len(results) > 1 and format(sign * best * sign, form) == text
            cells.append(f"**{text}**" if bold else text)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def text(results: list[dict], rows: list[Row]) -> str:
    """The same for a terminal."""
    body = [["", *(result["name"] for result in results)]]
    body += [
        [title, *("-" if value is None else format(value, form) for value in values)] for title, values, form, _ in rows
    ]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in body
    )


def notes_of(results: list[dict], options: dict) -> list[str]:
    """How the figures came about, a line each: what a reader of the report must know."""
    first = results[0]
    notes = [f"{first['dataset']}: {first['accuracy']['images']:,} test images; top-1 and top-5 of all of them"]
    if found := first.get("calibration"):
        notes.append(
            f"calibration: {found['bins']} bins; temperature fitted on {found['held_out']:,} held-out test images, "
            f"figures of the other {found['images']:,}"
        )
    if found := first.get("robustness"):
        notes.append(f"robustness: {found['images']:,} images from all over the test set, accuracies in percent")
        if levels := {level for row in found.get("corruptions", {}).values() for level in row}:
            own = (
                "made by this project's generators, not the published files"
                if found["corrupted_by"] == "built-in"
                else ""
            )
            notes.append(
                f"corruptions: {len(found['corruptions'])} kinds, severities {', '.join(map(str, sorted(levels)))}"
                + (f"; {own}" if own else "")
            )
    if found := first.get("localization"):
        base = found["baselines"]
        notes.append(
            f"localisation: boxes of {found['method']} maps at {options['th']:g} of the maximum, right from an overlap "
            f"of 0.5 on; {base['images']:,} images; a centred box of 3/4 side gets {base['centre']:.2f} %"
        )
        notes.append("MaxBoxAccV2: thresholds chosen on the held-out images, accuracy of the others")
    return [*notes, f"seed {options['seed']}"]


def page(path: Path | str, results: list[dict], pictures: list[dict], title: str) -> None:
    """Everything drawn on one page. pictures: of each classifier `images` uint8 (n, H, W, 3), the same for all, `maps`
    (n, H, W) in 0..1 and `titles`, n texts.
    """
    panels = panels_of([(result["name"], result) for result in results])
    columns = 3
    lines = 1 + len(pictures) if pictures else 0
    heights = [3.8 * -(-len(panels) // columns), 1.9 * lines]
    figure = Figure(figsize=(5.2 * columns, sum(heights) + 0.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights) if lines else (figure, None)
    grid = above.subplots(-(-len(panels) // columns), columns, squeeze=False)
    for axes, (name, panel) in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.set_title(f"{name}: {axes.get_title()}" if axes.get_title() else name, fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    if lines:
        maps_below(below, pictures, [result["name"] for result in results])
    figure.suptitle(title)
    draw.save(figure, path)


def panels_of(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """What can be drawn of all results, each a title and a function of the axes."""
    first, panels = named[0][1], []
    if all("robustness" in result for _, result in named):
        panels += robustness.panels([(name, result["robustness"]) for name, result in named])
    if all("calibration" in result for _, result in named):
        own = [(name, result["calibration"]) for name, result in named]
        panels.append(("calibration", lambda axes: calibration.draw(axes, own)))
    for outside in dig(first, ("ood", "outside")) or ():
        curves = [(name, result["ood"]["outside"][outside]["scores"]["energy"]) for name, result in named]
        panels.append((f"told from {outside} by energy", lambda axes, curves=curves: ood.draw_roc(axes, curves)))
    if all("localization" in result for _, result in named):
        shown = [(name, next(iter(result["localization"]["backgrounds"].values()))) for name, result in named]
        centred = first["localization"]["baselines"]["centre"]
        panels.append(("localisation", lambda axes: localization.draw(axes, shown, centred)))
    return panels


def maps_below(figure, pictures: list[dict], names: list[str]) -> None:
    """Images side by side; below, a row a classifier: where it looks, and what it takes them for."""
    images = pictures[0]["images"]
    grid = figure.subplots(1 + len(names), len(images), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, image in zip(grid[0], images, strict=True):
        axes.imshow(image)
    for line, one, name in zip(grid[1:], pictures, names, strict=True):
        line[0].set_ylabel(draw.short(name), fontsize=9)
        for axes, image, heat, text in zip(line, images, one["maps"], one["titles"], strict=True):
            axes.imshow(draw.overlaid(image, heat))
            axes.set_title(draw.short(text), fontsize=8)
