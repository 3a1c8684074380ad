"""Detect objects in the user's own pictures: draw what is found and write it to a file. No annotations are needed."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights

from detection.evaluate import build_finished_detector, load_finished_detector
from detection.initialize import InitialWeights
from detection.load import is_too_elongated
from detection.loop import detect
from detection.metrics import Detections
from detection.report import choose_class_colours, format_predictions, to_rows
from detection.resolve import describe_unused_options
from engine.config.select import select_kwargs
from engine.data.class_names import read_titles
from engine.data.listing import IMAGE_EXTENSIONS
from engine.data.pictures import find_images, iter_images, print_line, unique_stems
from engine.drawing.boxes import DrawnBox, draw_box_picture
from engine.errors import UserError
from engine.runtime.device import setup_backends
from engine.runtime.distributed import world_size
from engine.runtime.files import check_output_folder, find_overwritten, write_atomic
from engine.runtime.progress import Progress, use_progress_bar
from engine.runtime.text import format_count
from engine.training.start import start_processes

SCORE_THRESHOLD = 0.5  # unless --score_thr is typed: the 0.05 of an evaluation draws many wrong boxes
MAX_CLASSES = 5  # named in the line of a picture
COCO_NAMES = [  # of the classes of torchvision's detectors; ten of the numbers are not used
    name if name != "N/A" else f"unused {label}"
    for label, name in enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
][1:]


class FoundObjects(NamedTuple):
    """The detections in a picture."""

    file: Path
    width: int  # of the upright picture, in pixels
    height: int
    detections: Detections


def detect_in_pictures(typed: dict, options: dict) -> dict:
    """Detect objects in the pictures of --image_path with --frcnn_checkpoint, draw them, and write --predictions.

    Returns the content of that file: see format_file(). The parameters are the typed options and all options.
    """
    device = start_processes(options["device"], options["timeout"])
    if world_size() > 1:
        raise UserError("--image_path: runs in a single process\nstart the command without torchrun")
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    files = find_images(options["image_path"], "--image_path")
    outputs = choose_outputs(files, **select_kwargs(options, choose_outputs))

    # ---- Detector ----
    initial, options = load_finished_detector({"score_thr": SCORE_THRESHOLD} | typed, options)
    options["score_thr"] = typed.get("score_thr", SCORE_THRESHOLD)
    initial, notes = name_classes(initial, options["labels"])
    detector, build_notes = build_finished_detector(initial, initial.classes, options, device)
    for note in [*notes, *build_notes, *describe_unused_options(options, typed)]:
        print_line(f"note: {note}")

    # ---- Pictures ----
    found = []
    with Progress("detecting", len(files), bar=use_progress_bar(options["no_progress"]), lines=False) as progress:
        for file, picture in iter_fitting_images(files, **select_kwargs(options, iter_fitting_images)):
            detections = detect_in_picture(detector, picture, device)
            draw_box_picture(outputs[file], picture, make_boxes(detections, initial.classes), dpi=options["dpi"])
            found.append(FoundObjects(file, *picture.shape[1::-1], detections))
            print_line(f"{file}  {describe_objects(detections, initial.classes)}  {outputs[file]}")
            progress(len(found))
    if not found:
        raise UserError(f"--image_path: {format_count(len(files), 'image')} found, but none can be used")

    # ---- Results ----
    content = format_file(found, initial.classes)
    print_line(summarize(content, **select_kwargs(options, summarize)))
    if options["predictions"]:
        text = json.dumps(content)
        write_atomic(Path(options["predictions"]), lambda side: side.write_text(text, encoding="utf-8"))
        print_line(f"wrote all detections to {options['predictions']}")
    return content


# ---- Input and output ----


def choose_outputs(files: list[Path], *, output: str, figure_format: str) -> dict[Path, Path]:
    """Return the file to draw for each picture. output: a folder. Raises UserError if a picture would be replaced."""
    folder = Path(output)
    if folder.suffix.lower() in IMAGE_EXTENSIONS | {".pdf", ".svg"}:
        raise UserError(f"--output {output}: must be a folder; each picture is drawn there as PICTURE_detections.png")
    check_output_folder(folder, f"--output {output}")
    stems = unique_stems(files)
    outputs = {file: folder / f"{stem}_detections.{figure_format}" for file, stem in zip(files, stems, strict=True)}
    if same := find_overwritten(outputs.values(), files):
        raise UserError(
            f"--output {output}: {same} is one of the pictures and would be replaced; choose another folder"
        )
    return outputs


def iter_fitting_images(files: list[Path], *, on_bad_image: str, max_size: int) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each file with its image, upright: RGB uint8 (H, W, 3).

    An unreadable or too elongated one raises UserError if on_bad_image is `stop`; with `skip` a note is printed.
    """
    for file, picture in iter_images(files, on_bad_image):
        height, width = picture.shape[:2]
        if not is_too_elongated((height, width), max_size):
            yield file, picture
            continue
        problem = (
            f"{file} ({width} x {height} pixels): --max_size {max_size} leaves less than a pixel of its shorter side"
        )
        if on_bad_image == "stop":
            raise UserError(f"{problem}\ncrop the picture, or skip such pictures with --on_bad_image skip")
        print_line(f"note: skipped: {problem}")


# ---- Detector ----


def name_classes(initial: InitialWeights, labels: str | None) -> tuple[InitialWeights, list[str]]:
    """Return the detector with a name for each class, and a note if its file does not name them.

    labels: file of class names. Files with torchvision's 90 classes have the names of COCO's categories.
    """
    classes, count, notes = initial.classes, initial.num_classes, []
    if labels:
        classes = read_titles(labels, "labels", count, initial.path)
    elif not classes and count == len(COCO_NAMES):
        classes = COCO_NAMES
        notes = [f"{initial.path} does not name its {count} classes; they are assumed to be COCO's (set --labels)"]
    elif not classes:
        classes = [f"class {label}" for label in range(1, count + 1)]
        notes = [f"{initial.path} does not name its {format_count(count, 'class')}; name them with --labels FILE"]
    return replace(initial, classes=classes), notes


def detect_in_picture(detector: FasterRCNN, picture: np.ndarray, device: torch.device) -> Detections:
    """Return the detections in an image uint8 (H, W, 3), the most confident one first."""
    image = torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    return detect(detector.eval(), [image.to(device).float().div_(255)])[0]


# ---- Results ----


def make_boxes(detections: Detections, classes: Sequence[str]) -> list[DrawnBox]:
    """Return the boxes to draw. They come by increasing score, so that the most confident one is drawn on top."""
    colours = choose_class_colours(len(classes))
    return [
        DrawnBox(box, f"{classes[label - 1]} {score:.2f}", colours[label - 1])
        for box, label, score in to_rows(*detections)
    ][::-1]


def describe_objects(detections: Detections, classes: Sequence[str]) -> str:
    """Describe the detections as `3 detections: 2 dog 0.98, 1 car 0.60`, with the highest score of each class."""
    if not len(detections.labels):
        return "no detections"
    best = {}
    for _, label, score in to_rows(*detections):
        best[label] = max(score, best.get(label, 0.0))
    counts = Counter(detections.labels.tolist())
    texts = [
        f"{counts[label]} {classes[label - 1]} {best[label]:.2f}"
        for label in sorted(best, key=lambda label: -best[label])
    ]
    more = [f"{len(texts) - MAX_CLASSES} more classes"] if len(texts) > MAX_CLASSES else []
    return f"{format_count(len(detections.labels), 'detection')}: {', '.join(texts[:MAX_CLASSES] + more)}"


def format_file(found: list[FoundObjects], classes: Sequence[str]) -> dict:
    """Return all detections in COCO's format, which pycocotools and labelling tools read.

    The keys are `info`, `images` (id, file_name, width, height), `categories` (id, name) and `annotations`, which are
    the rows of format_predictions() with image_id as in `images`. A bbox is x, y, width, height in pixels of the
    upright picture.
    """
    numbers = range(1, len(found) + 1)
    rows = format_predictions(numbers, [one.detections for one in found], classes)
    for number, row in enumerate(rows, 1):
        row |= {"id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
    return {
        "info": {"description": "detections of detect.py --image_path"},
        "images": [
            {"id": number, "file_name": str(one.file), "width": one.width, "height": one.height}
            for number, one in zip(numbers, found, strict=True)
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes, 1)],
        "annotations": rows,
    }


def summarize(content: dict, *, output: str, score_thr: float) -> str:
    """Return the last line: the number of detections, and of pictures with and without them."""
    filled = {row["image_id"] for row in content["annotations"]}
    count, total = format_count(len(content["annotations"]), "detection"), len(content["images"])
    return (
        f"{count} with a score above {score_thr:g} in {len(filled):,} of {format_count(total, 'picture')}; drawings in "
        f"{output}"
    )
