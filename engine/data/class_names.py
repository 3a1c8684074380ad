"""Which class of a data set is which of a network's."""

import csv
import re
from collections import Counter
from pathlib import Path

import torch

from engine.errors import UserError, suggest_closest


def map_labels(
    data_classes: list[str], classes: list[str], class_list: str | None = None, num_classes: int | None = 1000
) -> torch.Tensor:
    """Return the network's class index for each class of the data: long (len(data_classes),), -1 for unknown classes.

    classes: class names of the network, in the order of its logits. If they are not known (empty), they are read from
    the file class_list. Without class_list, data and network are assumed to have the same classes in sorted order,
    which is true of ImageNet with its WordNet ids. num_classes: number of outputs of the network; None: any number.

    Raises UserError if the numbers of classes differ or if the network knows none of the classes of the data.
    """
    if not classes and class_list:
        classes = read_class_list(class_list)
        if num_classes not in (None, len(classes)):
            raise UserError(f"--class_list {class_list}: {len(classes)} classes, where the network has {num_classes}")
    if not classes and num_classes not in (None, len(data_classes)):
        raise UserError(
            f"the data has {len(data_classes)} classes, the network {num_classes}, and its file does not name them\n"
            "name them, in the order of the network, in a file: --class_list FILE, one a line or a .csv with a column "
            "wnid"
        )
    place = {name: position for position, name in enumerate(classes or data_classes)}
    if not place.keys() & set(data_classes):
        raise UserError(
            f"the network knows none of the classes of the data ({', '.join(data_classes[:3])} ...): its own are "
            f"{', '.join(list(place)[:3])} ..."
        )
    return torch.tensor([place.get(name, -1) for name in data_classes])


def read_class_list(file: str) -> list[str]:
    """Classes, one a line (of a line `n01440764 tench, ...` the WordNet id alone), or in the column wnid or class of a
    .csv. Raises UserError for another file, and for a class that comes twice.
    """
    names = read_column(file, "class_list", ("wnid", "class"))
    names = [re.sub(r"^(n\d{8})\s.*", r"\1", name) for name in names]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UserError(f"--class_list {file}: {twice[0]!r} is there more than once")
    return names


def read_titles(file: str) -> list[str]:
    """The names of classes for people, one a line (of a line `n01440764 tench, ...` what follows the WordNet id), or in
    the column name, class or wnid of a .csv. Raises UserError for another file.
    """
    names = read_column(file, "labels", ("name", "names", "class", "wnid"))
    return [re.sub(r"^n\d{8}\s+", "", name) for name in names]


def find_class(word: str, titles: list[str], count: int) -> int:
    """The class that a word means: an index below `count`, a title, one of the names of a title such as `crane, bird`,
    or a part of one title alone; not by case, and `_` is a blank.

    Raises ValueError where none or several fit.
    """
    if re.fullmatch("-?[0-9]+", word) and word not in titles:
        if 0 <= int(word) < count:
            return int(word)
        raise ValueError(f"its classes are 0 to {count - 1}")
    if not titles:
        raise ValueError("its classes have no names\ngive an index, or the names with --labels FILE")
    sought, *names = (name.lower().replace("_", " ") for name in (word, *titles))
    for fits in (
        [place for place, title in enumerate(titles) if word == title],
        [place for place, name in enumerate(names) if sought == name],
        [place for place, name in enumerate(names) if sought in re.split(", *", name)],
        [place for place, name in enumerate(names) if sought in name],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            some = ", ".join(f"{titles[place]} ({place})" for place in fits[:8]) + (", ..." if fits[8:] else "")
            raise ValueError(f"{len(fits)} classes fit: {some}\ngive the whole name or the index")
    raise ValueError(f"no class is called so{suggest_closest(sought, names)}\ngive a name, a part of one, or an index")


def read_column(file: str, option: str, columns: tuple[str, ...]) -> list[str]:
    """The lines of a file, or the first of these columns that a .csv has. option: what the file was given by."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no text"
        raise UserError(f"--{option} {file}: cannot be read ({reason})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not file.lower().endswith(".csv"):
        return lines
    rows = list(csv.DictReader(lines))
    column = next((name for name in columns if rows and name in rows[0]), None)
    if column is None:
        raise UserError(f"--{option} {file}: no column {columns[0]} and none called {columns[-1]} in its first line")
    return [row[column] or "" for row in rows]  # a row may be too short
