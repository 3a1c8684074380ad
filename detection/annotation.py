"""Ground-truth objects as an annotation file has them, and the image set that is made of them and the image files."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from detection.dataset import DetectionSet, format_first_names
from detection.orientation import Header, Size, choose_upright, get_upright_size
from engine.data.decode import BadImage, read_header
from engine.errors import UserError

ROUNDING = 0.011  # pixels: COCO rounds x and width to two decimals each, so that their sum may exceed the image


class Annotation(NamedTuple):
    """The ground-truth objects of one image, as its file says."""

    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    difficult: list[bool]
    size: Size | None  # None: the file does not say
    areas: list[float] | None = None  # in square pixels; None: those of the boxes


def read_image_header(path: Path, name: str) -> Header:
    """Read the header of an image file. Raises UserError, with the image's name in the data set, if it is broken."""
    try:
        return read_header(path)
    except BadImage as error:
        raise UserError(f"cannot read an image: {error}\nreplace it, or remove {name} from the data set") from error


def build_image_set(
    classes: list[str],
    names: list[str],
    files: list[Path],
    headers: list[Header],
    annotations: list[Annotation],
    origin: str,
) -> DetectionSet:
    """Build an image set with boxes inside the images. The lists hold the same images in the same order.

    Warnings report boxes that were clipped or dropped, and images with an EXIF orientation. Raises UserError for an
    image that has another size than its annotation says.
    """
    turned, notes = choose_upright(names, headers, [annotation.size for annotation in annotations])
    sizes = [get_upright_size(one) if name in turned else one[:2] for name, one in zip(names, headers, strict=True)]
    targets, defects = fit_to_images(annotations, sizes)
    warnings = [*notes, *describe_defects(names, defects)]
    return DetectionSet(classes, names, files, targets, sizes, origin, warnings, turned)


def fit_to_images(
    annotations: list[Annotation], sizes: list[Size]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, np.ndarray]]:
    """Clip the boxes to their images and drop those without area.

    Returns the targets of a DetectionSet, and a description of each kind of defect -> number of cases in each image.
    """
    counts = [len(one.labels) for one in annotations]
    image = np.repeat(np.arange(len(counts)), counts)
    boxes = np.array(flatten(one.boxes for one in annotations), float).reshape(-1, 4)
    inside = np.clip(boxes, 0, np.array(sizes, float).reshape(-1, 2)[image][:, [1, 0, 1, 0]])
    kept = (inside[:, :2] < inside[:, 2:]).all(1)
    clipped = kept & (np.abs(inside - boxes) > ROUNDING).any(1)
    columns = {
        "boxes": torch.from_numpy(inside[kept]).float(),
        "labels": torch.tensor(flatten(one.labels for one in annotations), dtype=torch.int64)[kept],
        "difficult": torch.tensor(flatten(one.difficult for one in annotations), dtype=torch.bool)[kept],
    }
    if annotations and annotations[0].areas is not None:
        columns["area"] = torch.tensor(flatten(one.areas for one in annotations), dtype=torch.float64)[kept]
    left = np.bincount(image[kept], minlength=len(counts))
    parts = zip(*(column.split(left.tolist()) for column in columns.values()), strict=True)
    defects = {
        "boxes clipped to their image": np.bincount(image[clipped], minlength=len(counts)),
        "boxes dropped because they have no area": counts - left,
        "images kept although they have no objects": left == 0,
    }
    return [dict(zip(columns, part, strict=True)) for part in parts], defects


def flatten(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def describe_defects(names: list[str], defects: dict[str, np.ndarray]) -> list[str]:
    """Return a line for each kind of defect, with the number of cases and the first images."""
    return [
        f"{text}: {counts.sum():,} ({format_first_names([names[index] for index in np.flatnonzero(counts)])})"
        for text, counts in defects.items()
        if counts.any()
    ]
