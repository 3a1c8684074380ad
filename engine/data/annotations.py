"""Find the ground-truth boxes of the images of a set: those of shapes and of Tiny-ImageNet, or those of given files."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

from engine.data.annotation_files import (
    REMEDY,
    AnnotationRow,
    BoxAnnotation,
    check_size,
    is_usable_box,
    normalize_name,
    pick_class,
    read_csv,
    read_json,
    read_tiny,
    read_xml,
)
from engine.data.datasets import TINY_SIDE
from engine.data.decode import BadImage, read_header
from engine.data.image_set import ImageSet
from engine.errors import UserError


@dataclass
class BoxAnnotations:
    """The annotations of an image set, in the order of its images. Names are relative to the root of the set."""

    per_image: list[BoxAnnotation | None]  # None: the image has no usable box
    missing: list[str]  # names of images without an annotation
    empty: list[str]  # names of images whose annotation has no usable box of their class
    masks: torch.Tensor | None = None  # (N, H, W) bool, if the set has masks
    renamed: list[str] = field(default_factory=list)  # `name (classes)` of images annotated with other classes only
    broken: list[str] = field(default_factory=list)  # `name (reason)` of images with unreadable annotations

    def notes(self) -> list[str]:
        """Return one line per reason why images are left out of the scores, with their number and the first names."""
        reasons = {
            "no annotation": self.missing,
            "no usable box of their class": self.empty,
            "annotated with other classes only; use the names of the class folders": self.renamed,
            "unreadable annotation": self.broken,
        }
        return [
            f"{len(names):,} of {len(self.per_image):,} images left out of the scores ({reason}): "
            + "; ".join(names[:3] + ["..."] * (len(names) > 3))
            for reason, names in reasons.items()
            if names
        ]


Lookup = Callable[[int, str, str], BoxAnnotation | None]  # (index, file, class) -> None if there is no annotation
DescribeSources = Callable[[str, str], str]  # (file, class) -> where its annotation was looked for


def find_boxes(
    image_set: ImageSet,
    dataset: str,
    annotation_path: str | None = None,
    *,
    progress: Callable = lambda items, **kwargs: items,
) -> BoxAnnotations:
    """Read the ground-truth boxes of an image set from annotation_path (XML, CSV or JSON) or the data set.

    progress: see load_data(). Raises UserError if no image has an annotation, or if an annotation list cannot be read.
    A single broken XML file does not raise; its image is counted as broken.
    """
    # ---- Open the annotations ----
    if not annotation_path and dataset == "shapes":
        return get_shapes_boxes(image_set)
    check_annotations_given(image_set, dataset, annotation_path)
    lookup, describe = (
        open_annotations(image_set, Path(annotation_path)) if annotation_path else open_tiny_annotations(image_set)
    )
    # ---- Look up every image ----
    annotations = BoxAnnotations([], [], [])
    names, labels = image_set.files.names(), image_set.labels.tolist()
    for index, name in enumerate(progress(names, total=len(names), desc="reading boxes", unit="image")):
        annotation = None
        try:
            annotation = lookup(index, name, image_set.classes[labels[index]])
            if annotation and annotation.boxes and image_set.files.upright:
                check_orientation(image_set.files[index], annotation)
            if annotation is None:
                annotations.missing.append(name)
            elif annotation.others:
                expected = image_set.classes[labels[index]]
                annotations.renamed.append(f"{name} (found {', '.join(annotation.others)}, expected {expected})")
            elif not annotation.boxes:
                annotations.empty.append(name)
        except (ValueError, OSError) as error:
            annotation = None
            annotations.broken.append(f"{name} ({error or type(error).__name__})")
        annotations.per_image.append(annotation if annotation and annotation.boxes else None)
    if names and len(annotations.missing) == len(names):
        raise UserError(
            f"{annotation_path or image_set.origin}: no boxes for any of the {len(names):,} images in "
            f"{image_set.origin}; looked for {describe(names[0], image_set.classes[labels[0]])}\n{REMEDY}"
        )
    return annotations


def check_orientation(file: Path, annotation: BoxAnnotation) -> None:
    """Raise ValueError if an image is turned by its EXIF orientation and its boxes may refer to it as it is stored."""
    try:
        height, width, orientation = read_header(file)
    except BadImage:  # reading the image raises the error
        return
    is_upright = orientation > 4 and height != width and annotation[1:3] == (height, width)
    if orientation != 1 and not is_upright:
        raise ValueError(
            f"EXIF orientation {orientation}, and the boxes may be of the image as it is stored: store it upright, for "
            "example with PIL.ImageOps.exif_transpose"
        )


def check_annotations_given(image_set: ImageSet, dataset: str, annotation_path: str | None) -> None:
    """Raise UserError if the data set cannot take box annotations, or if it needs them and none are given."""
    if image_set.files is None:
        own = "leave out --annotation-path: shapes comes with its own boxes"
        raise UserError(
            f"{dataset} has no image files, so it cannot take box annotations\n"
            f"{own if dataset == 'shapes' else 'use a data set of image files, or shapes, which comes with boxes'}"
        )
    if not annotation_path and dataset != "tiny-imagenet":
        raise UserError(f"{dataset} comes without ground-truth boxes; give them with --annotation-path\n{REMEDY}")


def get_shapes_boxes(image_set: ImageSet) -> BoxAnnotations:
    """Return the boxes and masks that were drawn with the shapes."""
    side = image_set.pixels.shape[1]
    boxes = image_set.annotations["boxes"].tolist()
    per_image = [BoxAnnotation([(x1, y1, x2, y2)], side, side) for y1, y2, x1, x2 in boxes]
    return BoxAnnotations(per_image, [], [], image_set.annotations["masks"])


def open_annotations(image_set: ImageSet, path: Path) -> tuple[Lookup, DescribeSources]:
    """Open a folder of XML files, a CSV or a JSON file. Raises UserError for any other path."""
    if path.is_dir():
        return make_xml_lookup(path), lambda name, class_name: " and ".join(
            map(str, list_xml_candidates(path, name, class_name))
        )
    if not path.is_file():
        raise UserError(f"--annotation-path {path}: no such file or folder\n{REMEDY}")
    reader = {".csv": read_csv, ".json": read_json}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--annotation-path {path}: not a folder, a .csv or a .json file\n{REMEDY}")
    try:
        rows = reader(path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"--annotation-path {path}: cannot be read ({error})\n{REMEDY}") from error
    first = next(iter(rows), "missing")
    return make_row_lookup(image_set, rows), lambda name, class_name: f"{name} (the first image it lists is {first})"


def list_xml_candidates(folder: Path, name: str, class_name: str) -> list[Path]:
    stem = PurePosixPath(name).stem  # of the file name only, because a folder may have a dot in its name, as in ../ann
    return [folder / class_name / f"{stem}.xml", folder / f"{stem}.xml"]


def make_xml_lookup(folder: Path) -> Lookup:
    def lookup(index: int, name: str, class_name: str) -> BoxAnnotation | None:
        path = next((path for path in list_xml_candidates(folder, name, class_name) if path.is_file()), None)
        return path and read_xml(path, class_name)

    return lookup


def make_row_lookup(image_set: ImageSet, rows: dict[str, list[AnnotationRow]]) -> Lookup:
    """Look up rows by the path of the image relative to the root of the set.

    Where that fails, the base name of the file is used if it is unique both in the set and in the list.
    """
    in_set = Counter(PurePosixPath(name).name for name in set(image_set.files.names()))
    in_list = Counter(PurePosixPath(name).name for name in rows)
    by_base_name = {PurePosixPath(name).name: found for name, found in rows.items()}

    def lookup(index: int, name: str, class_name: str) -> BoxAnnotation | None:
        base = PurePosixPath(name).name
        found = rows.get(normalize_name(name)) or (
            by_base_name.get(base) if in_set[base] == in_list[base] == 1 else None
        )
        if found is None:
            return None
        found, others = pick_class([(row.class_name, row) for row in found], class_name)
        boxes = [row.box for row in found if row.box and is_usable_box(row.box)]
        if not boxes:
            return BoxAnnotation([], 0, 0, others)
        width, height = next((row.size for row in found if row.size), None) or read_image_size(image_set.files[index])
        check_size(width, height)
        return BoxAnnotation(boxes, width, height)

    return lookup


def read_image_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of an image file.

    1, 1 if it cannot be read: reading its pixels then raises the error.
    """
    try:
        height, width, _ = read_header(path)
    except BadImage:
        return 1, 1
    return width, height


def open_tiny_annotations(image_set: ImageSet) -> tuple[Lookup, DescribeSources]:
    """Open val_annotations.txt in or beside the image folder, or else <wnid>/<wnid>_boxes.txt inside it."""
    root = Path(image_set.origin)
    lists = [folder / "val_annotations.txt" for folder in (root, root.parent)]
    rows: dict[str, list[AnnotationRow]] = {}
    if path := next(filter(Path.is_file, lists), None):
        read_tiny(path, rows)
    else:
        for wnid in image_set.classes:
            path = root / wnid / f"{wnid}_boxes.txt"
            if path.is_file():
                read_tiny(path, rows, wnid)

    def lookup(index: int, name: str, class_name: str) -> BoxAnnotation | None:
        found = rows.get(PurePosixPath(name).name)
        if found is None:
            return None
        found, others = pick_class([(row.class_name, row) for row in found], class_name)
        return BoxAnnotation([row.box for row in found if is_usable_box(row.box)], TINY_SIDE, TINY_SIDE, others)

    return (
        lookup,
        lambda name, class_name: (
            f"{PurePosixPath(name).name} in {' and '.join(map(str, lists))} and in "
            + str(root / class_name / f"{class_name}_boxes.txt")
        ),
    )
