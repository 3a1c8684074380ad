"""PASCAL VOC: images, object boxes and lists of images in the folders of a VOCdevkit (Everingham et al., IJCV 2010).

On disk, boxes are 1-based and inclusive. Here they are continuous, (xmin - 1, ymin - 1, xmax, ymax), so that plain
areas and overlaps are those of the "+1" arithmetic of the VOC tools.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
import torchvision

from detection.dataset import DetectionSet, list_first_names
from engine.data.annotations import read_image_size
from engine.data.folders import describe_folder
from engine.errors import UserError, suggest_closest

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
SET_SIZES = {"2007_train": 2501, "2007_val": 2510, "2007_trainval": 5011, "2007_test": 4952}
SET_SIZES |= {"2012_train": 5717, "2012_val": 5823, "2012_trainval": 11540}
ARCHIVES = {  # (year, whether it is the test set) -> published archive
    ("2007", False): "VOCtrainval_06-Nov-2007.tar",
    ("2007", True): "VOCtest_06-Nov-2007.tar",
    ("2012", False): "VOCtrainval_11-May-2012.tar",
}
SUFFIXES = (".jpg", ".jpeg", ".png")  # of images; where one has several files, the first of these counts
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = ("-1", "0", "1")  # in the list of one class: absent, present but difficult, present


class Annotation(NamedTuple):
    """The objects of one image."""

    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    difficult: list[bool]
    size: tuple[int, int]  # height, width
    clipped: int  # number of boxes that reached outside the image
    dropped: int  # number of boxes without area, which are not in `boxes`


# where the files are


def candidate_folders(data_dir: Path) -> list[Path]:
    return [data_dir, data_dir / "VOCdevkit", data_dir / "VOCdevkit" / "VOCdevkit"]


def list_years(folder: Path) -> list[str]:
    """The years of the folders VOC<year> in it, sorted."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name[3:] for name in names if re.fullmatch(r"VOC\d{4}", name))


def find_devkit(data_dir: Path) -> Path:
    """The folder that holds VOC2007/ and VOC2012/: data_dir, VOCdevkit in it, or a doubled VOCdevkit/VOCdevkit.

    Raises UserError that says what was looked for where.
    """
    if found := next(filter(list_years, candidate_folders(data_dir)), None):
        return found
    folders, archives = ", ".join(map(str, candidate_folders(data_dir))), ", ".join(ARCHIVES.values())
    raise UserError(
        f"PASCAL VOC not found: looked for VOC2007/ and VOC2012/, each with JPEGImages/, Annotations/ and "
        f"ImageSets/Main/, in {folders}\nunpack {archives} there, get them with --download true, or name their place "
        f"with --data_dir{describe_folder(data_dir)}"
    )


def prepare_devkit(data_dir: Path, sets: list[str], download: bool) -> Path:
    """The devkit; with `download`, the archives of missing sets are first downloaded and unpacked."""
    for name in sets if download else []:
        year, part = split_name(name)
        devkit = next(filter(list_years, candidate_folders(data_dir)), None)
        if devkit is None or not list_file(devkit, year, part).is_file():
            fresh = data_dir if data_dir.name == "VOCdevkit" else data_dir / "VOCdevkit"
            download_archive(devkit or fresh, year, part)
    return find_devkit(data_dir)


def download_archive(devkit: Path, year: str, part: str) -> None:
    """Download and unpack the archive with this set. Raises UserError where that fails."""
    test = part == "test" or part.endswith("_test")
    archive = ARCHIVES.get((year, test))
    root = devkit.absolute().parent
    if archive is None:
        raise UserError(f"no published archive has {year}_{part}\nput it into {devkit}/VOC{year} yourself")
    if devkit.absolute().name != "VOCdevkit":
        raise UserError(
            f"{archive} unpacks into a folder VOCdevkit, and {devkit} is called otherwise\nrename it, or unpack "
            "the archive elsewhere and move what is in it there"
        )
    try:
        torchvision.datasets.VOCDetection(str(root), year=year, image_set="test" if test else "trainval", download=True)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"downloading {archive} failed ({type(error).__name__}: {reason})\nget it elsewhere and unpack it in "
            f"{root}, so that {root / 'VOCdevkit' / f'VOC{year}'} is there; --dataset shapes needs no files"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """2007_trainval -> year and list."""
    match = re.fullmatch(r"(\d{4})_([\w-]+)", name)
    if not match:
        raise UserError(f"{name!r} names no image set\nsets are called YEAR_LIST, as {', '.join(SET_SIZES)}")
    return match[1], match[2]


def list_file(devkit: Path, year: str, part: str) -> Path:
    return devkit / f"VOC{year}" / "ImageSets" / "Main" / f"{part}.txt"


# reading


def read_sets(devkit: Path, sets: list[str], *, progress: Callable = lambda items, **kwargs: items) -> DetectionSet:
    """The images of these sets, each once, in the order of the lists.

    The classes are VOC's, or those in the file classes.txt of the devkit, one name a line. Raises UserError that names
    the file for whatever is missing or broken; boxes that are clipped or dropped are counted in the warnings.
    """
    classes = read_classes(devkit)
    label_of = {name: label for label, name in enumerate(classes, 1)}
    part = DetectionSet(classes, [], [], [], [], f"{devkit} ({', '.join(sets)})")
    listed = []
    for name in sets:
        names = read_list(devkit, name)
        listed += names
        if classes == CLASSES and len(names) != SET_SIZES.get(name, len(names)):
            part.warnings.append(
                f"{name} usually has {SET_SIZES[name]:,} images, here are {len(names):,}: figures cannot be set "
                "against published ones"
            )
    part.names = list(dict.fromkeys(listed))
    folders = dict.fromkeys(name.split("/")[0] for name in part.names)
    files = {folder: list_image_files(devkit / folder / "JPEGImages") for folder in folders}
    annotations = []
    for name in progress(part.names, total=len(part.names), desc="reading annotations", unit="image"):
        folder, identity = name.split("/", 1)
        file = files[folder].get(identity)
        if file is None:
            raise UserError(
                f"no image {devkit / folder / 'JPEGImages' / identity}{' or '.join(SUFFIXES)}\n"
                f"put it there, or take {identity} out of the lists"
            )
        part.images.append(devkit / folder / "JPEGImages" / file)
        annotation_file = devkit / folder / "Annotations" / f"{identity}.xml"
        annotations.append(read_annotation(annotation_file, part.images[-1], label_of))
    part.sizes = [annotation.size for annotation in annotations]
    part.targets = [make_target(annotation) for annotation in annotations]
    part.warnings += describe_defects(part.names, annotations)
    if repeated := len(listed) - len(part.names):
        part.warnings.append(f"images that are listed more than once and taken once: {repeated:,}")
    return part


def make_target(annotation: Annotation) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(annotation.boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(annotation.labels, dtype=torch.int64),
        "difficult": torch.tensor(annotation.difficult, dtype=torch.bool),
    }


def describe_defects(names: list[str], annotations: list[Annotation]) -> list[str]:
    """A line for each kind of defect, with how often it occurs and where."""
    defects = {
        "boxes that reach outside their image and are cut": [one.clipped for one in annotations],
        "boxes that have no area and are dropped": [one.dropped for one in annotations],
        "images without any object, which stay as such": [not one.boxes for one in annotations],
    }
    return [
        f"{text}: {sum(counts):,}, {list_first_names([name for name, n in zip(names, counts, strict=True) if n])}"
        for text, counts in defects.items()
        if any(counts)
    ]


def read_classes(devkit: Path) -> list[str]:
    path = devkit / "classes.txt"
    if not path.is_file():
        return list(CLASSES)
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: {'a class is named twice' if names else 'no class'}\nit takes one name a line")
    return names


def read_list(devkit: Path, name: str) -> list[str]:
    """The images of a set, as VOC2007/000005, each once. Lines are `id`, or `id flag` in the list of one class."""
    year, part = split_name(name)
    path = list_file(devkit, year, part)
    if not path.is_file():
        available = [
            f"{other}_{file.stem}"
            for other in list_years(devkit)
            for file in sorted(list_file(devkit, other, part).parent.glob("*.txt"))
            if not file.stem.startswith(tuple(f"{word}_" for word in CLASSES))  # 20 times as many as the others
        ]
        raise UserError(
            f"no image set {name}: there is no {path}{suggest_closest(name, available)}\n"
            f"the sets in {devkit} are {', '.join(available) or 'none'}; --download true gets those of 2007 and 2012"
        )
    names = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) > 2 or words[1:] and words[1] not in FLAGS:
            raise UserError(f"{path}, line {number}: {line!r} is neither `id` nor `id flag`\nmend that line")
        if words and words[1:] != ["-1"]:
            names.append(f"VOC{year}/{words[0]}")
    if not names:
        raise UserError(f"{path}: no image in it\nit takes one id a line")
    return list(dict.fromkeys(names))


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}\nit takes one name a line, in UTF-8") from error


def list_image_files(folder: Path) -> dict[str, str]:
    """Id -> file name of the images in a folder. It is listed once: a look-up of each file takes far longer."""
    files = {}
    names = os.listdir(folder) if folder.is_dir() else []
    for suffix in SUFFIXES:
        for name in names:
            stem, own = os.path.splitext(name)
            if own.lower() == suffix:
                files.setdefault(stem, name)
    return files


def read_annotation(path: Path, image: Path, label_of: dict[str, int]) -> Annotation:
    """The objects in an XML file; their parts (heads, hands and feet of persons) do not count.

    image: its header is read where the file gives no size. Raises UserError, which names the file, where it is broken.
    """
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"it begins with <{root.tag}>, not with <annotation>")
        height, width = read_size(root) or read_image_size(image)[::-1]
        boxes, labels, difficult, clipped, dropped = [], [], [], 0, 0
        for element in root.iterfind("object"):
            name = (element.findtext("name") or "").strip()
            if name not in label_of:
                classes = f"none of the {len(label_of)} classes{suggest_closest(name, label_of)}"
                raise UserError(
                    f"{path}: an object is called {name!r}, {classes}\nfor classes of your own put classes.txt, one "
                    f"name a line, beside the folders VOC<year>"
                )
            xmin, ymin, xmax, ymax = (read_number(element, f"bndbox/{side}") for side in CORNERS)
            box = (xmin - 1, ymin - 1, xmax, ymax)
            inside = tuple(min(max(edge, 0.0), end) for edge, end in zip(box, (width, height) * 2, strict=True))
            if inside[2] <= inside[0] or inside[3] <= inside[1]:
                dropped += 1
                continue
            clipped += inside != box
            boxes.append(inside)
            labels.append(label_of[name])
            difficult.append(bool(read_number(element, "difficult", 0)))
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: an unknown encoding
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: {reason}\nmend the file, or take {path.stem} out of the lists") from error
    return Annotation(boxes, labels, difficult, (height, width), clipped, dropped)


def read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width, None where the file gives no usable ones: some tools write 0."""
    height, width = (round(read_number(root, f"size/{side}", 0)) for side in ("height", "width"))
    return (height, width) if height > 0 and width > 0 else None


def read_number(root: ElementTree.Element, tag: str, default: float | None = None) -> float:
    """The number in a tag; the default where it is empty or missing. Raises ValueError for anything else."""
    text = (root.findtext(tag) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"<{tag}> in <{root.tag}> is {text!r}, no number" if text else f"no <{tag}> in <{root.tag}>")
    return value
