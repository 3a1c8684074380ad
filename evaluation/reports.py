"""What evaluate.py prints, writes and draws of the results of all classifiers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from engine.drawing import tables
from engine.inference.metrics import format_accuracy
from engine.runtime.files import write_atomic, write_json
from evaluation import calibration, localization_task, ood, robustness
from evaluation.options import TASKS

CALIBRATION = {  # of the table: key -> title and format
    **{"ece": ("ECE (%)", ".2f"), "adaptive_ece": ("adaptive", ".2f"), "classwise_ece": ("class-wise", ".2f")},
    **{"nll": ("NLL", ".4f"), "brier": ("Brier", ".4f"), "temperature": ("temperature", ".3f")},
    **{"after_ece": ("ECE after", ".2f"), "after_nll": ("NLL after", ".4f")},
}


def report(task: str, results: list[dict], options: dict) -> None:
    """Print the tables, write the JSON and draw the picture. Pictures leave the results: JSON has none."""
    pictures = [result.pop("pictures", None) for result in results]
    if task == "card":
        return report_card(results, pictures, options)
    text = {
        "accuracy": lambda: report_accuracy(results, options["topk"]),
        "calibration": lambda: report_calibration(results),
        "ood": lambda: report_ood(results),
        "robustness": lambda: robustness.report(results),
        "localization": lambda: localization_task.report(results),
    }
    print(text[task]())
    if options["output"]:
        write_json(Path(options["output"]), {"command": options["command"], "results": results})
    if options["figure"] and "figure" in TASKS[task]:
        draw_task(task, results, options["figure"])
        print(f"written: {options['figure']}")
    if task == "accuracy" and len(results) == 1:
        print_details(results[0], options)


def report_accuracy(results: list[dict], topk: list[int]) -> str:
    """A row a file; what a file does not have shows as a dash."""
    columns = {"epoch": ("epoch", "d"), "images": ("images", "d"), "loss": ("loss", ".4f")}
    columns |= {f"top{k}": (f"top-{k}", ".2f") for k in topk}
    columns |= {"ece": ("ECE (%)", ".2f"), "seconds": ("seconds", ".1f")}
    return tables.format_text(results, columns, name="file", title="file")


def report_calibration(results: list[dict]) -> str:
    first = results[0]
    rows = [result | {f"after_{key}": result["after"][key] for key in ("ece", "nll")} for result in results]
    lines = [
        f"{first['images']:,} images, {first['bins']} bins; temperature fitted on {first['held_out']:,} other ones",
        tables.format_text(rows, CALIBRATION),
    ]
    bound = [result["name"] for result in results if result["temperature_at_bound"]]
    if bound:
        lines.append(
            f"note: no temperature in its bounds fits {', '.join(bound)}: nearly all held-out images are right"
        )
    return "\n".join(lines)


def report_ood(results: list[dict]) -> str:
    rows, columns = [], {}
    for result in results:
        for name, found in result["outside"].items():
            row = {"name": f"{result['name']} against {name} ({found['outside']:,})"}
            for score, figures in found["scores"].items():
                row |= {f"{score}_auroc": figures["auroc"], f"{score}_fpr": figures["fpr95"]}
                columns |= {f"{score}_auroc": (f"{score} AUROC", ".2f"), f"{score}_fpr": ("FPR95", ".2f")}
            rows.append(row)
    head = f"{results[0]['images']:,} images inside, told from images outside; percent"
    return f"{head}\n{tables.format_text(rows, columns)}"


def draw_task(task: str, results: list[dict], path: str) -> None:
    from matplotlib.figure import Figure

    from engine.drawing import figures
    from evaluation import card

    named = [(card.readable_size(result["name"]), result) for result in results]
    panels = {
        "robustness": robustness.panels,
        "calibration": panels_of_calibration,
        "ood": panels_of_ood,
        "localization": card.has_backgrounds,
    }[task](named)
    columns = min(len(panels), 4)
    figure = Figure(figsize=(5.2 * columns, 4.6 * -(-len(panels) // columns)), layout="constrained")
    card.layout_page(figure, panels, columns)
    figures.save_figure(figure, Path(path))


def panels_of_calibration(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    return [
        ("as it is", partial(calibration.draw_reliability, results=named)),
        ("after temperature scaling", partial(calibration.draw_reliability, results=named, after=True)),
    ]


def panels_of_ood(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """How the energy is distributed: a panel for each classifier and each set from outside."""
    return [
        (f"{name} against {outside}", partial(ood.draw, result=found, names=("the test images", outside)))
        for name, result in named
        for outside, found in result["outside"].items()
    ]


def report_card(results: list[dict], pictures: list[dict | None], options: dict) -> None:
    """The card: printed, and as FILE.json, FILE.md and FILE.png."""
    from evaluation import card

    rows, notes = card.make_rows(results), [*card.collect_notes(results, options), f"`{options['command']}`"]
    print("\n".join([card.format_cell(results, rows), *(f"- {note}" for note in notes)]))
    output = Path(options["output"])
    page = Path(options["figure"] or output.with_suffix(".png"))
    text = card.format_markdown(results, rows, notes)
    write_json(output, {"notes": notes, "results": results})
    write_atomic(output.with_suffix(".md"), lambda side: side.write_text(text, encoding="utf-8"))
    card.page(page, results, [one for one in pictures if one], notes[0].partition(";")[0])
    print(f"written: {output}, {output.with_suffix('.md')}, {page}")


def print_details(result: dict, options: dict) -> None:
    """What is shown of a single classifier only; its accuracy comes last."""
    if options["per_class"]:
        width = max(map(len, result["classes"]))
        for name, accuracy, count in zip(
            result["classes"], result["per_class_top1"], map(sum, result["confusion"]), strict=True
        ):
            if count:
                print(f"  {name:{width}}  {accuracy:6.2f}")
    if options["confusion"]:
        from engine.drawing import figures

        title = f"{Path(result['file']).name}: percent of each true class"
        figures.draw_confusion(Path(options["confusion"]), torch.tensor(result["confusion"]), result["classes"], title)
        print(f"confusion drawn in {options['confusion']}")
    print(format_accuracy(result))
