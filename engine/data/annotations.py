"""Read ground-truth boxes: from shapes, Tiny-ImageNet, XML files in the format of ImageNet and VOC, CSV and JSON.

Upper bounds in a file are read as exclusive, without adding 1. The published code of CASM (Zolna et al., arXiv
1805.08249) does the same, so its figures refer to such boxes. Only Tiny-ImageNet's own files are read as inclusive.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree

import torch
from PIL import Image

from engine.data.datasets import TINY_SIDE
from engine.data.decode import BadImage, read_header
from engine.data.image_set import ImageSet
from engine.data.label_lists import read_lines
from engine.errors import UserError

T = TypeVar("T")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1
ANNOTATION_FORMATS = (
    "a folder of XML files (<image>.xml or <class>/<image>.xml), a .csv with the columns file,xmin,ymin,xmax,ymax, or "
    'a .json of {"file": [[x0, y0, x1, y1], ...]}'
)
REMEDY = f"--annotation-path takes {ANNOTATION_FORMATS}"
COLUMNS = (("xmin", "ymin", "xmax", "ymax"), ("x0", "y0", "x1", "y1"))


class BoxAnnotation(NamedTuple):
    """The boxes of the objects in one image that belong to the class of the image."""

    boxes: list[Box]  # in pixels of an image of size width x height; x1 and y1 are exclusive
    width: int
    height: int
    others: tuple[str, ...] = ()  # classes of the objects in the image, if it has some, but none of its own class


class AnnotationRow(NamedTuple):
    """One object in an annotation list. None means that the list does not give this value."""

    box: Box | None
    class_name: str | None = None
    size: tuple[int, int] | None = None  # width, height


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
    """Read the ground-truth boxes of an image set from annotation_path (see ANNOTATION_FORMATS) or from the data set.

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
    except BadImage:  # whoever reads the image tells it
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
    """Open annotations in any of ANNOTATION_FORMATS. Raises UserError for any other path."""
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


def read_xml(path: Path, class_name: str) -> BoxAnnotation:
    """Read the boxes of the objects of this class. Raises ValueError for a broken file."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, LookupError) as error:  # LookupError: unknown encoding
        raise ValueError(f"not valid XML: {error}") from error
    width, height = (parse_pixel(read_tag(root, f"size/{side}")) for side in ("width", "height"))
    check_size(width, height)
    objects = [(read_tag(tag, "name"), tag) for tag in root.iter("object")]
    own, others = pick_class(objects, class_name)
    boxes = [tuple(parse_pixel(read_tag(tag, f"bndbox/{side}")) for side in COLUMNS[0]) for tag in own]
    return BoxAnnotation(list(filter(is_usable_box, boxes)), width, height, others)


def pick_class(objects: list[tuple[str | None, T]], class_name: str) -> tuple[list[T], tuple[str, ...]]:
    """Return the objects of a class or without one; and the classes of the others, if there is no such object.

    objects: (class or None, object).
    """
    own = [one for name, one in objects if name in (None, class_name)]
    return own, () if own else tuple(dict.fromkeys(name for name, _ in objects))


def read_tag(root: ElementTree.Element, tag: str) -> str:
    text = root.findtext(tag)
    if text is None:
        raise ValueError(f"no <{tag}> in <{root.tag}>")
    return text.strip()


def parse_pixel(text: str | float) -> int:
    """Round a number of pixels to the nearest integer. Raises ValueError for text that is not a finite number."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not a finite number of pixels")
    return math.floor(number + 0.5)


def check_size(width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise ValueError(f"the annotated image size is {width} x {height}, but both sides must be positive")


def is_usable_box(box: Box) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def read_csv(path: Path) -> dict[str, list[AnnotationRow]]:
    """Read a CSV list: file name -> its rows. Raises UserError, with the line number, for a row that is not a box."""
    rows: dict[str, list[AnnotationRow]] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, skipinitialspace=True)
        header = [name.strip().lower() for name in next(lines, [])]
        columns = next((names for names in COLUMNS if {"file", *names} <= set(header)), None)
        if columns is None:
            raise UserError(f"--annotation-path {path}: the header is {','.join(header) or 'missing'}\n{REMEDY}")
        for line in lines:
            cells = {name: cell.strip() for name, cell in zip(header, line, strict=False)}
            if not any(cells.values()):
                continue
            try:
                if not cells["file"]:
                    raise ValueError("it names no file")
                class_name = cells.get("wnid") or cells.get("class") or None
                row = AnnotationRow(
                    parse_numbers(cells, columns), class_name, parse_numbers(cells, ("width", "height"))
                )
            except ValueError as error:
                raise UserError(
                    f"--annotation-path {path}, line {lines.line_num}: {','.join(line)!r} is not a box ({error})\n"
                    f"fix that line; {REMEDY}"
                ) from error
            rows.setdefault(normalize_name(cells["file"]), []).append(row)
    return rows


def parse_numbers(cells: dict[str, str], columns: tuple[str, ...]) -> tuple[int, ...] | None:
    """Parse these cells as pixels. Returns None if all of them are empty or absent."""
    values = [cells.get(name, "") for name in columns]
    return tuple(map(parse_pixel, values)) if any(values) else None


def read_json(path: Path) -> dict[str, list[AnnotationRow]]:
    """Read a JSON file: file name -> its boxes. Raises UserError for anything but lists of boxes."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise UserError(f"--annotation-path {path}: not a JSON object {{...}}\n{REMEDY}")
    rows = {}
    for name, boxes in content.items():
        try:
            rows[normalize_name(name)] = [
                AnnotationRow(tuple(parse_pixel(number) for number in box)) for box in boxes
            ] or [AnnotationRow(None)]
            if any(row.box is not None and len(row.box) != 4 for row in rows[normalize_name(name)]):
                raise ValueError("a box needs four numbers")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--annotation-path {path}: {name!r} does not hold a list of boxes ({error})\n{REMEDY}"
            ) from error
    return rows


def normalize_name(name: str) -> str:
    return str(PurePosixPath(name.replace("\\", "/")))


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
    """Return width and height from the header of an image file."""
    with Image.open(path) as image:
        return image.size


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


def read_tiny(path: Path, rows: dict[str, list[AnnotationRow]], wnid: str | None = None) -> None:
    """Add the lines `file wnid x0 y0 x1 y1` of a file to rows. If wnid is given, the lines have no wnid column.

    Raises UserError for lines of another form.
    """
    form = "file x0 y0 x1 y1" if wnid else "file wnid x0 y0 x1 y1"
    for number, line in read_lines(path, form):
        cells = line.split("\t") if "\t" in line else line.split()
        try:
            x0, y0, x1, y1 = map(parse_pixel, cells[1 if wnid else 2 :])
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: {line!r} does not have the form `{form}`\nfix that line"
            ) from error
        box = (x0, y0, x1 + 1, y1 + 1)  # upper bounds are inclusive here: 0 to 63 covers all 64 pixels
        rows.setdefault(cells[0], []).append(AnnotationRow(box, wnid or cells[1]))
