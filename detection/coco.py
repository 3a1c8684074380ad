"""Read data in COCO format: a JSON file with the lists `images`, `categories` and `annotations`, and its image files.

Format and evaluation: Lin et al., "Microsoft COCO", ECCV 2014, arXiv 1405.0312, and pycocotools. A box is x, y, width,
height in continuous pixel coordinates. The classes are the categories in the order of their ids, which may have gaps.
The images are in the order of their ids, as in pycocotools, where this order decides among equal scores.

A crowd region (`iscrowd`) has the flag `difficult` here: coco_metrics() then treats it as pycocotools does. The area
of an object, which decides whether it is small, medium or large, is the `area` of its annotation.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detection.annotation import Annotation, build_image_set, read_image_header
from detection.dataset import DetectionSet, choose_spread, format_first_names
from engine.errors import UserError
from engine.runtime.text import format_count

LISTS = ("images", "categories", "annotations")
REMEDY = "give an annotation file for object detection, such as instances_train2017.json"


@dataclass
class CocoFile:
    """The content of an annotation file. The lists about images are in the order of the image ids."""

    classes: list[str]
    category_ids: list[int]
    image_ids: list[int]
    names: list[str]  # file_name of each image, with forward slashes
    annotations: list[Annotation]


def read_image_set(
    annotations: str | None,
    images: str | None,
    *,
    limit: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> tuple[DetectionSet, int]:
    """Read a data set in COCO format. Returns it, and the number of all images in the file.

    annotations: the annotation file; None: the set is empty. images: the folder that `file_name` of an image is
    relative to; None: that of the file. limit: read only N images, spread over the classes; 0: all. Only headers of
    images are read. Raises UserError, which names the file, for missing or broken files.
    """
    if annotations is None:
        return DetectionSet([], [], [], [], [], "no annotations"), 0
    path = Path(annotations)
    folder = Path(images) if images else path.parent
    coco = read_coco(path)
    chosen = choose_spread([one.labels for one in coco.annotations], limit or len(coco.names))
    columns = coco.names, coco.annotations, coco.image_ids
    names, objects, ids = ([column[index] for index in chosen] for column in columns)
    files = [folder / name for name in names]
    check_files(path, folder, names, files)
    items = progress(list(zip(files, names, strict=True)), desc=f"reading headers for {path.name}", unit="image")
    headers = [read_image_header(file, name) for file, name in items]
    image_set = build_image_set(coco.classes, names, files, headers, objects, str(path))
    more = {"image_ids": ids, "category_ids": coco.category_ids, "flag": "crowd"}
    return replace(image_set, **more), len(coco.names)


def check_files(path: Path, folder: Path, names: list[str], files: list[Path]) -> None:
    """Raise UserError, with their number and the first names, if image files are missing."""
    missing = [name for name, file in zip(names, files, strict=True) if not os.path.isfile(file)]  # never raises
    if missing:
        raise UserError(
            f"{path}: {len(missing):,} of {format_count(len(names), 'image')} missing in {folder}: "
            f"{format_first_names(missing)}\nset --images to the folder that their file_name is relative to, add the "
            "files, or remove these images from the annotation file"
        )


# ---- Annotation file ----


def read_coco(path: Path) -> CocoFile:
    """Read and check an annotation file. Raises UserError, with the file and the entries, if it is broken."""
    content = read_content(path)
    check_ids(path, "categories", content["categories"])
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    classes = [entry.get("name") for entry in categories]
    reject_entries(path, "categories", [one for one in categories if not is_text(one.get("name"))], "no name")
    reject_repeated(path, "name in categories", classes)
    check_ids(path, "images", content["images"])
    images = sorted(content["images"], key=lambda entry: entry["id"])
    reject_entries(path, "images", [one for one in images if not is_text(one.get("file_name"))], "no file_name")
    names = [entry["file_name"].replace("\\", "/") for entry in images]
    reject_repeated(path, "file_name in images", names)
    category_ids, image_ids = [one["id"] for one in categories], [one["id"] for one in images]
    sizes = read_sizes(path, images)
    annotations = read_annotations(path, content["annotations"], category_ids, dict(zip(image_ids, sizes, strict=True)))
    return CocoFile(classes, category_ids, image_ids, names, annotations)


def read_content(path: Path) -> dict:
    """Return the content of an annotation file without its polygons. Raises UserError if it lacks one of LISTS."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=drop_segmentation)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"not a JSON file ({error})"
        raise UserError(f"{path}: {reason}\n{REMEDY}") from error
    if isinstance(content, list):
        raise UserError(f"{path}: a list, such as the detections of --predictions, not an annotation file\n{REMEDY}")
    lists = {key: content.get(key) if isinstance(content, dict) else None for key in LISTS}
    if absent := [key for key, value in lists.items() if not isinstance(value, list)]:
        raise UserError(f"{path}: no list {' and no list '.join(absent)} in the file\n{REMEDY}")
    if empty := [key for key in ("images", "categories") if not lists[key]]:
        raise UserError(f"{path}: the list {empty[0]} is empty\n{REMEDY}")
    for key, entries in lists.items():
        reject_entries(
            path, key, [entry for entry in entries if not isinstance(entry, dict)], "not an object in braces"
        )
    return lists


def drop_segmentation(entry: dict) -> dict:
    """Drop the polygons of an annotation while the file is parsed: they take most of its memory."""
    entry.pop("segmentation", None)
    return entry


def read_sizes(path: Path, images: list[dict]) -> list[tuple[int, int] | None]:
    """Return height and width of each image; None where the file does not say, or says 0."""
    sides = [[one.get(key) or 0 for key in ("height", "width")] for one in images]
    wrong = [one for one, size in zip(images, sides, strict=True) if not all(is_number(side) for side in size)]
    reject_entries(path, "images", wrong, "width or height is not a number")
    return [(round(height), round(width)) if height > 0 and width > 0 else None for height, width in sides]


def read_annotations(
    path: Path, entries: list[dict], category_ids: list[int], sizes: dict[int, tuple[int, int] | None]
) -> list[Annotation]:
    """Return the objects of each image. sizes: image id -> size, in the order of the result."""
    reject_entries(path, "annotations", [one for one in entries if "bbox" not in one], "no bbox", REMEDY)
    reject_entries(path, "annotations", [one for one in entries if not is_box(one["bbox"])], "bbox is not four numbers")
    reject_repeated(path, "id in annotations", [one["id"] for one in entries if is_whole(one.get("id"))])
    labels = {category_id: label for label, category_id in enumerate(category_ids, 1)}
    for key, known, column in (("image_id", sizes, "images"), ("category_id", labels, "categories")):
        lost = [one for one in entries if not is_whole(one.get(key)) or one[key] not in known]
        reject_entries(path, "annotations", lost, f"{key} is not in the list {column}")
    wrong = [one for one in entries if one.get("iscrowd", 0) not in (0, 1)]
    reject_entries(path, "annotations", wrong, "iscrowd is not 0 or 1")
    wrong = [one for one in entries if one.get("area") is not None and not is_number(one["area"])]
    reject_entries(path, "annotations", wrong, "area is not a number")
    by_image = {image_id: Annotation([], [], [], size, []) for image_id, size in sizes.items()}
    for entry in entries:
        boxes, found, crowd, _, areas = by_image[entry["image_id"]]
        x, y, width, height = map(float, entry["bbox"])
        boxes.append((x, y, x + width, y + height))
        found.append(labels[entry["category_id"]])
        crowd.append(bool(entry.get("iscrowd", 0)))
        area = entry.get("area")
        areas.append(width * height if area is None else float(area))
    return list(by_image.values())


# ---- Checks ----


def is_whole(value: object) -> bool:
    return type(value) is int


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def check_ids(path: Path, kind: str, entries: list[dict]) -> None:
    """Raise UserError unless every entry has a whole number as its id, which no other one has."""
    reject_entries(
        path, kind, [entry for entry in entries if not is_whole(entry.get("id"))], "id is not a whole number"
    )
    reject_repeated(path, f"id in {kind}", [entry["id"] for entry in entries])


def reject_entries(path: Path, kind: str, entries: Sequence, problem: str, remedy: str = "") -> None:
    """Raise UserError, with their number and the first of them, if there are entries that have this problem."""
    if entries:
        shown = [shorten(json.dumps(entry)) for entry in entries]
        raise UserError(
            f"{path}: {problem} in {len(entries):,} of the {kind}: {format_first_names(shown)}\n"
            f"{remedy or 'correct or remove these entries of the file'}"
        )


def reject_repeated(path: Path, kind: str, values: list) -> None:
    """Raise UserError if a value occurs more than once."""
    if repeated := [str(value) for value, count in Counter(values).items() if count > 1]:
        raise UserError(
            f"{path}: {kind} occurs more than once: {format_first_names(repeated)}\n"
            "make them unique; when files are merged, their entries must be renumbered"
        )


def shorten(text: str, length: int = 100) -> str:
    return text if len(text) <= length else f"{text[: length - 4]} ..."
