"""Print, write and draw the results of all classifiers of a call to evaluate.py."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engine.drawing import tables
from engine.inference.metrics import format_accuracy
from engine.runtime.files import write_atomic, write_json
from engine.runtime.text import format_count
from evaluation import calibration, localization_task, ood, robustness
from evaluation.task_options import TASKS

CALIBRATION_COLUMNS = {  # key -> title and format
    "ece": ("ECE (%)", ".2f"),
    "adaptive_ece": ("adaptive ECE (%)", ".2f"),
    "classwise_ece": ("class-wise ECE (%)", ".2f"),
    "nll": ("NLL", ".4f"),
    "brier": ("Brier score", ".4f"),
    "temperature": ("temperature", ".3f"),
    "after_ece": ("scaled ECE (%)", ".2f"),
    "after_nll": ("scaled NLL", ".4f"),
}


def report_task(
    results: list[dict],
    command: str,
    *,
    task: str,
    topk: list[int],
    output: str | None,
    figure: str | None,
    per_class: bool,
    confusion: str | None,
    dpi: int,
) -> None:
    """Print the tables of a task, write the JSON file and draw the figures."""
    formats = {
        "accuracy": partial(format_accuracies, topk=topk),
        "calibration": format_calibration,
        "ood": format_ood,
        "robustness": robustness.format_report,
        "localization": localization_task.format_report,
    }
    print(formats[task](results))
    if output:
        write_json(Path(output), {"command": command, "results": results})
    if figure and "figure" in TASKS[task]:
        draw_task(task, results, figure, dpi=dpi)
        print(f"written: {figure}")
    if task == "accuracy" and len(results) == 1:
        print_details(results[0], per_class, confusion, dpi=dpi)


def report_card(results: list[dict], command: str, *, seed: int, output: str, figure: str | None, dpi: int) -> None:
    """Print the card and write it as FILE.json, FILE.md, FILE.html and FILE.png, or the file `figure`."""
    from evaluation import card, card_page

    examples = [result.pop("pictures", None) for result in results]  # images and maps do not go into the JSON file
    measured = card.collect_notes(results, seed)
    rows, notes = card.make_rows(results), [*measured, f"`{command}`"]
    print("\n".join([card.format_text(results, rows), *(f"- {note}" for note in notes)]))
    examples = [each for each in examples if each]
    drawing = Path(figure or Path(output).with_suffix(".png"))
    texts = {
        Path(output).with_suffix(".md"): card.format_markdown(results, rows, notes),
        Path(output).with_suffix(".html"): card_page.format_page(results, examples, measured, command),
    }
    write_json(Path(output), {"notes": notes, "results": results})
    for path, text in texts.items():
        write_atomic(path, lambda side, text=text: side.write_text(text, encoding="utf-8"))
    card.draw_page(drawing, results, examples, dpi=dpi)
    print(f"written: {', '.join(map(str, [output, *texts, drawing]))}")


def format_accuracies(results: list[dict], topk: list[int]) -> str:
    """Return a table with a row for each file, and a dash for what a file does not have."""
    columns = {"epoch": ("epoch", "d"), "images": ("images", "d"), "loss": ("loss", ".4f")}
    columns |= {f"top{k}": (f"top-{k}", ".2f") for k in topk}
    columns |= {"ece": ("ECE (%)", ".2f"), "seconds": ("seconds", ".1f")}
    return tables.format_text(results, columns, name="file", title="file")


def format_calibration(results: list[dict]) -> str:
    """Return a table with a row for each classifier, under a line that says how the metrics were computed."""
    first = results[0]
    rows = [result | {f"after_{key}": result["after"][key] for key in ("ece", "nll")} for result in results]
    lines = [
        f"{first['images']:,} images, {first['bins']} bins; scaled: with the temperature, fitted on "
        f"{first['held_out']:,} held-out images",
        tables.format_text(rows, CALIBRATION_COLUMNS),
    ]
    if bound := [result["name"] for result in results if result["temperature_at_bound"]]:
        lines.append(f"note: {calibration.describe_bound(bound)}")
    return "\n".join(lines)


def format_ood(results: list[dict]) -> str:
    """Return a table with a row for each classifier and each set of out-of-distribution images."""
    rows, columns = [], {}
    for result in results:
        for name, found in result["outside"].items():
            row = {"name": f"{result['name']}, {name} ({found['outside']:,})"}
            for score, metrics in found["scores"].items():
                title = ood.SCORE_TITLES[score]
                row |= {f"{score}_auroc": metrics["auroc"], f"{score}_fpr": metrics["fpr95"]}
                columns |= {f"{score}_auroc": (f"{title} AUROC", ".2f"), f"{score}_fpr": (f"{title} FPR95", ".2f")}
            rows.append(row)
    head = f"OOD detection in percent: {results[0]['images']:,} in-distribution test images against each OOD set"
    return f"{head}\n{tables.format_text(rows, columns)}"


def draw_task(task: str, results: list[dict], path: str, *, dpi: int) -> None:
    """Draw the results of a task, a panel for each plot, and save the figure."""
    from matplotlib.figure import Figure

    from engine.drawing import figures
    from evaluation import card

    make_panels = {
        "robustness": robustness.make_panels,
        "calibration": make_calibration_panels,
        "ood": make_ood_panels,
        "localization": card.make_localization_panels,
    }
    panels = make_panels[task]([(card.format_label(result["name"]), result) for result in results])
    columns, height = card.plan_panels(panels, len(results))
    figure = Figure(figsize=(card.PANEL_SIZE[0] * columns, height), layout="constrained")
    card.draw_panels(figure, panels, columns)
    figures.save_figure(figure, path, dpi)


def make_calibration_panels(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """Return reliability diagrams before and after temperature scaling."""
    count = format_count(named[0][1]["images"], "image")
    return [
        (f"before temperature scaling, {count}", partial(calibration.draw_reliability, results=named)),
        (f"after temperature scaling, {count}", partial(calibration.draw_reliability, results=named, after=True)),
    ]


def make_ood_panels(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """Return histograms of the energy score: a panel for each classifier and each set of OOD images."""
    return [
        (f"{name}, OOD: {ood_name}", partial(ood.draw_histogram, result=found, names=("test images", ood_name)))
        for name, result in named
        for ood_name, found in result["outside"].items()
    ]


def print_details(result: dict, per_class: bool, confusion: str | None, *, dpi: int) -> None:
    """Print what is only shown for a single classifier; its accuracy comes last."""
    if per_class:
        print("top-1 accuracy per class (%)")
        width, counts = max(map(len, result["classes"])), map(sum, result["confusion"])
        for name, accuracy, count in zip(result["classes"], result["per_class_top1"], counts, strict=True):
            if count:
                print(f"  {name:{width}}  {accuracy:6.2f}")
    if confusion:
        from engine.drawing import figures

        counts = torch.tensor(result["confusion"])
        title = f"{result['file'] or result['name']}, {format_count(int(counts.sum()), 'image')}"
        figures.draw_confusion(Path(confusion), counts, result["classes"], title, dpi=dpi)
        print(f"written: {confusion}")
    print(format_accuracy(result))
