"""Match class names: between a data set and a network, and between a user's words and a network."""

import csv
import re
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import torch

from engine.errors import UserError
from engine.runtime.text import format_count


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
            raise UserError(f"--class_list {class_list}: {len(classes)} classes, but the network has {num_classes}")
    if not classes and num_classes not in (None, len(data_classes)):
        raise UserError(
            f"the data has {len(data_classes)} classes and the network {num_classes}, and the network's file stores no "
            "class names\nlist all classes of the network, in order, in --class_list FILE: one per line, or a .csv "
            "with a column wnid"
        )
    positions = {name: position for position, name in enumerate(classes or data_classes)}
    if not positions.keys() & set(data_classes):
        raise UserError(
            f"the network knows none of the classes of the data ({', '.join(data_classes[:3])} ...); its classes are "
            f"{', '.join(list(positions)[:3])} ..."
        )
    return torch.tensor([positions.get(name, -1) for name in data_classes])


def read_class_list(file: str) -> list[str]:
    """Read class names from a file: one per line, or the column wnid or class of a .csv.

    Only the WordNet id of a line like `n01440764 tench, ...` is used. Raises UserError for an unreadable file and for a
    class that is listed twice.
    """
    names = read_column(file, "class_list", ("wnid", "class"))
    names = [re.sub(r"^(n\d{8})\s.*", r"\1", name) for name in names]
    duplicates = [name for name, number in Counter(names).items() if number > 1]
    if "" in names:
        raise UserError(f"--class_list {file}: class {names.index('')} has no name; name every class, in order")
    if duplicates:
        raise UserError(f"--class_list {file}: {duplicates[0]!r} is listed more than once; list each class once")
    return names


def read_titles(file: str, option: str, num_classes: int, owner: str) -> list[str]:
    """Read class names to display: one per line, or the column name, names, class or wnid of a .csv.

    Of a line like `n01440764 tench, ...`, the part after the WordNet id is used. option, owner: the option that names
    the file, and whose classes these are, for messages. Raises UserError for an unreadable file, and if it does not
    have num_classes names.
    """
    names = read_column(file, option, ("name", "names", "class", "wnid"))
    if len(names) != num_classes:
        raise UserError(
            f"--{option} {file}: {format_count(len(names), 'name')}, but {owner} has "
            f"{format_count(num_classes, 'class')}\nwrite one name per line, in the order of the classes"
        )
    return [re.sub(r"^n\d{8}\s+", "", name) for name in names]


def find_class(query: str, titles: list[str], num_classes: int) -> int:
    """Return the index of the class that a query names.

    The query is an index below num_classes, a title, one name of a title such as `crane, bird`, or a part of exactly
    one title. Case is ignored, and `_` stands for a space. Raises ValueError if no class or several classes match.
    """
    if re.fullmatch("-?[0-9]+", query) and query not in titles:
        if 0 <= int(query) < num_classes:
            return int(query)
        raise ValueError(f"there is no class {query}; give an index from 0 to {num_classes - 1}")
    if not titles:
        raise ValueError("its classes have no names\ngive an index, or name the classes with --labels FILE")
    sought, *names = (name.lower().replace("_", " ") for name in (query, *titles))
    for fits in (
        [index for index, title in enumerate(titles) if query == title],
        [index for index, name in enumerate(names) if sought == name],
        [index for index, name in enumerate(names) if sought in re.split(", *", name)],
        [index for index, name in enumerate(names) if sought in name],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            shown = ", ".join(f"{titles[index]} ({index})" for index in fits[:8]) + (", ..." if fits[8:] else "")
            raise ValueError(f"{len(fits)} classes match: {shown}\ngive the full name or the index")
    parts = {part: index for index, name in enumerate(names) for part in (*re.split(", *", name), name)}
    near = dict.fromkeys(parts[part] for part in get_close_matches(sought, parts, 5))
    shown = ", ".join(f"{titles[index]} ({index})" for index in near or range(min(3, len(titles))))
    raise ValueError(
        f"no class has this name; {'the nearest are' if near else 'the first classes are'} {shown}\n"
        "give a name, a part of a name, or an index"
    )


def read_column(file: str, option: str, columns: tuple[str, ...]) -> list[str]:
    """Read the lines of a file, or the first of these columns that a .csv has. option: the flag that named the file."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a text file"
        raise UserError(f"--{option} {file}: cannot be read ({reason})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not file.lower().endswith(".csv"):
        return lines
    header, *rows = csv.reader(lines, skipinitialspace=True) if lines else [[]]
    header = [name.strip().lower() for name in header]
    rows = [dict(zip(header, map(str.strip, row), strict=False)) for row in rows]
    for name in ("index", "class_index"):
        order = [row.get(name, "") for row in rows]
        if all(map(str.isdigit, order)) and order != sorted(order, key=int):
            raise UserError(f"--{option} {file}: the rows are not in the order of the column {name}; sort them by it")
    column = next((name for name in columns if rows and name in header), None)
    if column is None:
        raise UserError(f"--{option} {file}: the first line has none of the columns {', '.join(columns)}")
    return [row.get(column, "") for row in rows]
