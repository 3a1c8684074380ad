"""The card of several classifiers as a page: its table, its figures, its images, and what lies behind the means."""

from matplotlib.figure import Figure

from engine.drawing import figures
from engine.drawing.heatmaps import overlay_heatmap
from engine.runtime.text import format_count
from evaluation import card
from evaluation.html import (
    MISSING,
    Html,
    build_page,
    embed_figure,
    embed_image,
    make_figure,
    make_grid,
    make_list,
    make_paragraph,
    make_section,
    make_table,
    to_html,
)
from evaluation.robustness import mean_or_none

ARROWS = {1: "\u00a0\u2191", -1: "\u00a0\u2193", 0: ""}  # what the better direction of a metric is
MAX_SIDE = 224  # pixels of an example


def format_page(results: list[dict], examples: list[dict], notes: list[str], command: str) -> str:
    """Return the page. results, examples: as for card.draw_page(); notes: on how the numbers were computed."""
    images = format_count(results[0]["accuracy"]["images"], "test image")
    sections = [
        make_paragraph(f"Data set: {results[0]['dataset']}, {images}"),
        make_section("Results", format_metrics(results)),
        make_section("Figures", *draw_panels(results)),
    ]
    if examples:
        sections.append(make_section("Activation maps", *show_examples(results, examples)))
    if "corruptions" in results[0].get("robustness", {}):
        sections.append(make_section("Accuracy under each corruption", format_corruptions(results), closed=True))
    sections += [
        make_section("Accuracy of each class", format_classes(results), closed=True),
        make_section("How it was measured", make_list(notes), Html(f"<p><code>{to_html(command)}</code></p>")),
        make_section("Classifiers", format_files(results), closed=True),
    ]
    return build_page(f"Card of {format_count(len(results), 'classifier')}", sections)


def name_columns(results: list[dict], *titles: str) -> list[str]:
    """Return the header of a table with a column for each classifier after those of the titles."""
    return [*titles, *(result["name"] for result in results)]


def format_metrics(results: list[dict]) -> Html:
    """Return the table of the card. Its rows are different metrics, so that it does not sort."""
    rows = []
    for row in card.make_rows(results):
        title, *cells = row.format_cells(lambda best: Html(f'<span class="best">{best}</span>'))
        rows.append([title + ARROWS[row.sign], *cells])
    best = "; the best value of a row has a star" if len(results) > 1 else ""
    caption = f"Higher is better for \u2191, lower is better for \u2193{best}."
    return make_table([name_columns(results, "metric"), *rows], caption, sortable=False)


def draw_panels(results: list[dict]) -> list[Html]:
    """Return a picture for each panel of the card."""
    pictures = []
    for title, panel in card.make_panels([(result["name"], result) for result in results]):
        columns, height = card.plan_panels([(title, panel)], len(results))
        figure = Figure(figsize=(card.PANEL_SIZE[0], height), layout="constrained")
        card.draw_panels(figure, [(title, panel)], columns)
        pictures.append(Html(f"<figure>{embed_figure(figure, title)}</figure>"))
    return [make_grid(pictures)] if pictures else []


def show_examples(results: list[dict], examples: list[dict]) -> list[Html]:
    """Return the images and, for each classifier, its maps over them with its predictions."""
    first = [make_figure(embed_image(image, f"image {k}", MAX_SIDE), f"image {k}") for k, image in number(examples[0])]
    parts = [
        make_paragraph(
            "The class that each classifier predicts, its probability, and the activation map of that class, "
            "each from its lowest to its highest value."
        ),
        make_grid(first, "thumbnails"),
    ]
    for result, shown in zip(results, examples, strict=True):
        pictures = []
        for (k, image), heatmap, title in zip(number(shown), shown["maps"], shown["titles"], strict=True):
            title += ", constant map" if figures.is_constant(heatmap) else ""
            overlay = embed_image(overlay_heatmap(image, heatmap), f"activation map of image {k}", MAX_SIDE)
            pictures.append(make_figure(overlay, title))
        parts += [Html(f"<h3>{to_html(result['name'])}</h3>"), make_grid(pictures, "thumbnails")]
    return parts


def number(shown: dict) -> list[tuple[int, object]]:
    """Return the images of an example with their numbers, from 1."""
    return list(enumerate(shown["images"], 1))


def format_corruptions(results: list[dict]) -> Html:
    """Return a table with a row for each corruption and severity, and one for each mean over the severities."""
    rows, tables = [], [result["robustness"]["corruptions"] for result in results]
    for kind, severities in tables[0].items():
        means = [mean_or_none(list(table[kind].values())) for table in tables]
        rows.append([kind, "mean", *map(format_percent, means)])
        rows += [[kind, str(level), *(format_percent(table[kind][level]) for table in tables)] for level in severities]
    return make_table([name_columns(results, "corruption", "severity"), *rows], "Top-1 accuracy (%)")


def format_classes(results: list[dict]) -> Html:
    """Return a table with a row for each class that has test images."""
    own = [result["accuracy"] for result in results]
    rows = [
        [name, f"{count:,}", *(format_percent(one["per_class_top1"][k]) for one in own)]
        for k, (name, count) in enumerate(zip(own[0]["classes"], own[0]["class_images"], strict=True))
        if count
    ]
    return make_table([name_columns(results, "class", "images"), *rows], "Top-1 accuracy (%)")


def format_percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def format_files(results: list[dict]) -> Html:
    """Return a table of the files that were evaluated, and of the epochs that they hold."""
    rows = [[one["name"], one["file"] or MISSING, str(one["accuracy"]["epoch"] or MISSING)] for one in results]
    return make_table([["classifier", "file", "epoch"], *rows], "The files that were evaluated")
