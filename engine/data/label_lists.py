"""Read lists that give the class of each image, one image per line."""

import csv
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from engine.errors import UserError

HEADERS = {"file", "filename", "file_name", "image", "imageid", "image_id", "image_name", "img", "name", "path", "id"}
BOXES = re.compile(r"(\S+)(?:\s+-?[\d.]+){4}(?:\s.*)?")  # a class and the boxes that some lists give after it


def read_lines(path: Path, form: str = "file class") -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers. Raises UserError if it is not text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a text file in UTF-8"
        raise UserError(f"{path}: cannot be read ({reason})\ngive a text file with lines `{form}`") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_labels(path: Path, names: list[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Read the classes of the images `names` in a folder: name -> class, and the lines that name no such image.

    Lines are `file class` with tabs, commas or spaces between. Boxes after the class are ignored, as in Tiny-ImageNet's
    val_annotations.txt and ImageNet's LOC_val_solution.csv, and so is a header. A file may be given with the path of
    its folder or without its extension. Raises UserError, with the first wrong lines, for lines of another form and for
    files that are listed twice.
    """
    stems = Counter(PurePosixPath(name).stem for name in names)
    known = {PurePosixPath(name).stem: name for name in names if stems[PurePosixPath(name).stem] == 1}
    known |= {name: name for name in names}
    labels, places, absent, wrong = {}, {}, [], []
    for position, (number, line) in enumerate(read_lines(path)):
        file, label = split_line(line)
        file = PurePosixPath(file.replace("\\", "/"))
        name = known.get(file.name) if file.parent.name in ("", folder.name) else None
        if not label:
            wrong.append(f"line {number}: {line!r} does not have the form `file class`")
        elif name is None and not (position == 0 and file.name.lower() in HEADERS):
            absent.append(f"line {number}: {line!r} names a file that is not in {folder}")
        elif name in labels:
            wrong.append(f"line {number}: {name} is already listed, in line {places[name]} as {labels[name]}")
        elif name:
            labels[name], places[name] = label, number
    if wrong:
        raise UserError(f"{path}, {format_examples(wrong, '; ')}\ncorrect the list: one line per image, `file class`")
    return labels, absent


def split_line(line: str) -> tuple[str, str]:
    """Split a line into file and class. The class is empty if the line does not have both."""
    if "\t" in line:
        file, _, label = line.strip().partition("\t")
        label = " ".join(label.split())
    elif "," in line:
        file, label, *rest = [*next(csv.reader([line], skipinitialspace=True)), ""][:3]
        label = "" if any(rest) else label
    else:
        match = re.fullmatch(r"(.+?)\s+(\S+(?:\s+-?[\d.]+){4}|\S+)", line.strip())
        file, label = match.groups() if match else (line, "")
    match = BOXES.fullmatch(label.strip())
    return file.strip(), match[1] if match else label.strip()


def format_examples(names: list[str], separator: str = ", ") -> str:
    """Join the first three names; three dots stand for the others."""
    return separator.join([*names[:3], *["..."] * (len(names) > 3)])
