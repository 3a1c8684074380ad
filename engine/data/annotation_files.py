"""Read files of ground-truth boxes: XML in the format of ImageNet and VOC, CSV, JSON, and the lists of Tiny-ImageNet.

Upper bounds in a file are read as exclusive, without adding 1. The published code of CASM (Zolna et al., arXiv
1805.08249) does the same, so its figures refer to such boxes. Only Tiny-ImageNet's own files are read as inclusive.
"""

import csv
import json
import math
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree

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
