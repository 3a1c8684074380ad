"""Classify pictures that the user names: evaluate.py --predict a.jpg folder --model_path RUN."""

import csv
import io
from functools import partial
from pathlib import Path

import torch

from engine.data.datasets import get_default_view
from engine.data.pictures import explain_unreadable, find_images, make_picture_set, print_line
from engine.drawing.tables import align_columns
from engine.inference.classifier import Classifier
from engine.inference.metrics import rank_classes, validate_logits
from engine.runtime.distributed import check_same_value
from engine.runtime.files import write_atomic, write_json
from engine.runtime.text import format_count
from evaluation.context import EvalContext, EvalSession
from evaluation.loading import prepare_inputs
from evaluation.options import CSV_COLUMNS, DESCRIPTION

MAX_LINES = 60  # of the table on the screen
MAX_NAMES = 20  # of unreadable pictures on the screen; --output names all


def find_pictures(predict: list[str]) -> list[Path]:
    """Return the pictures that --predict names. Raises UserError if there are none."""
    files = find_images(predict, "--predict")
    check_same_value("pictures", {"count": len(files)}, "use the same copy of the pictures on every machine")
    return files


def build_picture_context(
    classifier: Classifier,
    files: list[Path],
    session: EvalSession,
    *,
    image_size: int,
    eval_resize: int | None,
    interpolation: str,
    on_bad_image: str,
    norm: str | None,
    class_list: str | None,
) -> EvalContext:
    """Return the classifier with the pictures, seen as the test images of a data set of folders.

    The parameters by name are options; class_list names the classes of a file that does not.
    """
    if class_list and not classifier.classes:
        classifier.set_titles(class_list, "class_list")
    view = get_default_view("folder", image_size, eval_resize, interpolation)
    pictures = session.cached(f"{view}", lambda: make_picture_set(files, view, on_bad_image, "--predict"))
    context = EvalContext(classifier, pictures, "folder", torch.empty(0, dtype=torch.long), session)
    prepare_inputs(context, norm)
    if not classifier.titles:
        session.note(f"{classifier.path} stores no class names; showing their numbers (--class_list FILE names them)")
    return context


def predict_pictures(context: EvalContext, topk: list[int]) -> dict:
    """Return the most probable classes of each picture, as many as the largest of `topk`, and the unreadable pictures.

    With several processes only the main one gets the predictions.
    """
    with context.named_errors():
        logits, positions, seconds = context.predict()
    if not len(positions):
        return {}
    ranking = rank_classes(logits)[:, : max(topk)]
    probabilities = validate_logits(logits).softmax(1).gather(1, ranking)
    files = context.image_set.files.names()
    predictions = []
    for position, *columns in zip(positions.tolist(), ranking.tolist(), probabilities.tolist(), strict=True):
        top = [
            {"index": index, "class": context.classifier.title(index), "probability": probability}
            for index, probability in zip(*columns, strict=True)
        ]
        predictions.append({"file": files[position], "top": top})
    read = set(positions.tolist())
    result = {"name": context.name, "file": context.classifier.path, "image_size": context.image_size}
    result |= {"seconds": seconds, "unreadable": [name for at, name in enumerate(files) if at not in read]}
    return result | {"predictions": predictions}


def report_predictions(results: list[dict], command: str, *, output: str | None) -> None:
    """Print the predictions of all classifiers, and write them as FILE.json and FILE.csv."""
    print_line(format_predictions(results))
    for result in results:
        count, size = len(result["predictions"]), result["image_size"]
        seconds = f"{result['seconds']:.1f} s"
        print(f"{result['name']}: {format_count(count, 'picture')} of {size} x {size} pixels in {seconds}")
    if unreadable := list({name: None for result in results for name in result["unreadable"]}):
        for name in unreadable[:MAX_NAMES]:
            print_line(f"note: skipped: {explain_unreadable(Path(name))}")
    if output:
        path, text = Path(output), format_csv(results)
        write_json(path, {"description": DESCRIPTION, "command": command, "results": results})
        write_atomic(path.with_suffix(".csv"), partial(write_text, text=text))
        print(f"written: {path}, {path.with_suffix('.csv')}")


def write_text(path: Path, text: str) -> None:
    """Write text. Bytes of a file name that are not text become \\udcNN, as in JSON."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def format_predictions(results: list[dict]) -> str:
    """Return a table with a line for each picture and rank and a column for each classifier, at most MAX_LINES."""
    tops = [{one["file"]: one["top"] for one in result["predictions"]} for result in results]
    files = list({file: None for top in tops for file in top})
    ranks = max(len(classes) for top in tops for classes in top.values())
    shown = files[: max(MAX_LINES // ranks, 1)]
    rows = [["picture", "rank", *(result["name"] for result in results)]]
    for file in shown:
        for rank in range(ranks):
            found = [top.get(file, [])[rank : rank + 1] for top in tops]  # empty beyond the number of classes
            cells = ["".join(f"{one['probability']:7.2%}  {one['class']}" for one in column) for column in found]
            rows.append([file if rank == 0 else "", str(rank + 1), *cells])
    lines = [align_columns(rows, left={0, *range(2, len(rows[0]))})]
    if more := len(files) - len(shown):
        lines.append(f"... and {format_count(more, 'more picture')}; --output FILE.json writes all")
    return "\n".join(lines)


def format_csv(results: list[dict]) -> str:
    """Return a CSV with a line for each classifier, picture and rank."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for result in results:
        for one in result["predictions"]:
            for rank, found in enumerate(one["top"], 1):
                writer.writerow([one["file"], result["name"], rank, found["class"], found["probability"]])
    return text.getvalue()
