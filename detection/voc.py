"""Read PASCAL VOC: the images of a set and their object boxes (Everingham et al., IJCV 2010).

On disk, boxes are 1-based and inclusive. Here they are continuous, (xmin - 1, ymin - 1, xmax, ymax), so that areas and
overlaps equal those of the "+1" arithmetic in the VOC tools.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from detection.annotation import Annotation, build_image_set, read_image_header
from detection.dataset import DetectionSet
from detection.orientation import Header
from detection.voc_folders import CLASSES, SET_SIZES, find_devkits, read_classes, read_list
from engine.data.listing import IMAGE_EXTENSIONS, get_extension, is_visible
from engine.errors import UserError, suggest_closest

SUFFIXES = (".jpg", ".jpeg", ".png")  # if an image has several files, the first suffix is used
SUFFIXES += tuple(sorted(IMAGE_EXTENSIONS - {*SUFFIXES}))
CORNERS = ("xmin", "ymin", "xmax", "ymax")


# ---- Image sets ----


def read_sets(data_dir: Path, sets: list[str], *, progress: Callable = lambda items, **kwargs: items) -> DetectionSet:
    """Read the images of these sets, each image once, in the order of the lists. Only headers of images are read.

    data_dir: see voc_folders.list_devkits(). The classes are those of VOC, or those in the file classes.txt beside the
    folders VOC<year>, one name per line. Raises UserError, which names the file, for missing or broken files. Warnings
    report boxes that were clipped or dropped, and images with an EXIF orientation.
    """
    # ---- Lists ----
    devkits = find_devkits(data_dir)
    lists = {name: read_list(devkits, name) for name in sets}
    devkit_by_name = {name: devkit for images in lists.values() for name, devkit in images.items()}
    used = list(dict.fromkeys(devkit_by_name.values())) or devkits[:1]
    classes = read_classes(used)

    # ---- Images ----
    names = list(devkit_by_name)
    label_by_class = {name: label for label, name in enumerate(classes, 1)}
    items = progress(names, total=len(names), desc="reading headers and annotations", unit="image")
    files, headers, annotations = read_headers(items, devkit_by_name, label_by_class)
    origin = f"{', '.join(map(str, used))} ({', '.join(sets)})"
    image_set = build_image_set(classes, names, files, headers, annotations, origin)
    return replace(image_set, warnings=[*describe_lists(lists, classes), *image_set.warnings])


def read_headers(
    names: Iterable[str], devkit_by_name: dict[str, Path], label_by_class: dict[str, int]
) -> tuple[list[Path], list[Header], list[Annotation]]:
    """Return the files of images such as VOC2007/000005, the results of read_header(), and the annotations."""
    files, headers, annotations = [], [], []
    list_cached = cache(list_files)
    for name in names:
        image, annotation = find_files(devkit_by_name[name], name, list_cached)
        annotations.append(read_annotation(annotation, label_by_class))
        headers.append(read_image_header(image, name))
        files.append(image)
    return files, headers, annotations


def find_files(devkit: Path, name: str, list_files: Callable) -> tuple[Path, Path]:
    """Return the image file and the annotation file of an image. name: such as VOC2007/000005.

    list_files: list_files() with a cache, because listing a folder once is much faster than a look-up per image.
    """
    year, image_id = name.split("/", 1)
    image, annotation = (devkit / year / folder / image_id for folder in ("JPEGImages", "Annotations"))
    image_file = list_files(image.parent, SUFFIXES).get(image.name)
    if image_file is None:
        raise UserError(
            f"no image {image} with the ending {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}\n"
            f"put it there, or remove {image_id} from the lists"
        )
    annotation_file = list_files(annotation.parent, (".xml",)).get(annotation.name, f"{annotation.name}.xml")
    return image.with_name(image_file), annotation.with_name(annotation_file)


def list_files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return stem -> file name of the files with one of these suffixes, in any case; of several, the first."""
    files = {}
    names = sorted(filter(is_visible, os.listdir(folder))) if folder.is_dir() else []
    for suffix in suffixes:
        for name in names:
            if get_extension(name) == suffix:
                files.setdefault(name[: -len(suffix)], name)
    return files


def describe_lists(lists: dict[str, dict[str, Path]], classes: list[str]) -> list[str]:
    """Return a line for each set that is not as published, and one for images that are listed repeatedly.

    lists: set -> its images.
    """
    lines = [
        f"{name} has {len(images):,} images here instead of {SET_SIZES[name]:,}: do not compare the results with "
        "published ones"
        for name, images in lists.items()
        if classes == CLASSES and len(images) != SET_SIZES.get(name, len(images))
    ]
    repeated = sum(map(len, lists.values())) - len(set().union(*lists.values()))
    return lines + [f"images listed more than once (used only once): {repeated:,}"] * (repeated > 0)


# ---- Annotations ----


def read_annotation(path: Path, label_by_class: dict[str, int]) -> Annotation:
    """Read the objects of an XML file. Parts of objects (heads, hands and feet of persons) are ignored.

    Raises UserError, which names the file, if it is broken.
    """
    boxes, labels, difficult = [], [], []
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag}> instead of <annotation>")
        for element in root.iterfind("object"):
            name = (element.findtext("name") or "").strip()
            if name not in label_by_class:
                hint = suggest_closest(name, label_by_class)
                raise UserError(
                    f"{path}: an object has the class {name!r}, which is none of the {len(label_by_class)} "
                    f"classes{hint}\nfor your own classes, put a file classes.txt with one name per line next to the "
                    "folders VOC<year>"
                )
            xmin, ymin, xmax, ymax = (read_number(element, f"bndbox/{side}") for side in CORNERS)
            boxes.append((xmin - 1, ymin - 1, xmax, ymax))
            labels.append(label_by_class[name])
            difficult.append(bool(read_number(element, "difficult", 0)))
        return Annotation(boxes, labels, difficult, read_size(root))
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: unknown encoding
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: {reason}\ncorrect the file, or remove {path.stem} from the lists") from error


def read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Return height and width; None if the file has no usable ones, since some tools write 0."""
    height, width = (round(read_number(root, f"size/{side}", 0)) for side in ("height", "width"))
    return (height, width) if height > 0 and width > 0 else None


def read_number(root: ElementTree.Element, tag: str, default: float | None = None) -> float:
    """Return the number in a tag, or the default if the tag is empty or missing. Raises ValueError otherwise."""
    text = (root.findtext(tag) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problem = f"<{tag}> in <{root.tag}> is {text!r}, not a finite number"
        raise ValueError(problem if text else f"<{root.tag}> has no <{tag}>")
    return value
