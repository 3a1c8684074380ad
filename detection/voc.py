"""Read PASCAL VOC: images, object boxes and lists of images in a VOCdevkit (Everingham et al., IJCV 2010).

On disk, boxes are 1-based and inclusive. Here they are continuous, (xmin - 1, ymin - 1, xmax, ymax), so that areas and
overlaps equal those of the "+1" arithmetic in the VOC tools.
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

from detection.dataset import DetectionSet, format_first_names
from engine.data.annotations import read_image_size
from engine.data.folders import describe_folder
from engine.errors import UserError, suggest_closest

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
SET_SIZES = {"2007_train": 2501, "2007_val": 2510, "2007_trainval": 5011, "2007_test": 4952}
SET_SIZES |= {"2012_train": 5717, "2012_val": 5823, "2012_trainval": 11540}
ARCHIVES = {  # (year, whether it holds the test set) -> published archive
    ("2007", False): "VOCtrainval_06-Nov-2007.tar",
    ("2007", True): "VOCtest_06-Nov-2007.tar",
    ("2012", False): "VOCtrainval_11-May-2012.tar",
}
SUFFIXES = (".jpg", ".jpeg", ".png")  # of image files; if an image has several files, the first suffix is used
CORNERS = ("xmin", "ymin", "xmax", "ymax")
CLASS_LIST_FLAGS = ("-1", "0", "1")  # in the list of a class: absent, only difficult objects, present


class Annotation(NamedTuple):
    """The ground-truth objects of one image."""

    boxes: list[tuple[float, float, float, float]]
    labels: list[int]
    difficult: list[bool]
    size: tuple[int, int]  # height, width
    clipped: int  # number of boxes that extended beyond the image
    dropped: int  # number of boxes without area, which are not in `boxes`


# ---- Folders and downloads ----


def list_candidate_folders(data_dir: Path) -> list[Path]:
    """Return the folders that may be the devkit, best first."""
    return [data_dir, data_dir / "VOCdevkit", data_dir / "VOCdevkit" / "VOCdevkit"]


def list_years(folder: Path) -> list[str]:
    """Return the years of its subfolders VOC<year>, sorted."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name[3:] for name in names if re.fullmatch(r"VOC\d{4}", name))


def find_devkit(data_dir: Path) -> Path:
    """Return the folder that holds VOC2007/ and VOC2012/: data_dir, VOCdevkit in it, or a nested VOCdevkit/VOCdevkit.

    Raises UserError with the folders that were searched.
    """
    if found := next(filter(list_years, list_candidate_folders(data_dir)), None):
        return found
    folders, archives = ", ".join(map(str, list_candidate_folders(data_dir))), ", ".join(ARCHIVES.values())
    raise UserError(
        f"PASCAL VOC not found: looked for VOC2007/ and VOC2012/, each with JPEGImages/, Annotations/ and "
        f"ImageSets/Main/, in {folders}\nunpack {archives} there, download them with --download true, or set "
        f"--data_dir to their folder{describe_folder(data_dir)}"
    )


def prepare_devkit(data_dir: Path, sets: list[str], download: bool) -> Path:
    """Return the devkit. With `download`, first download and unpack the archives of missing sets."""
    for name in sets if download else []:
        year, split = split_set_name(name)
        devkit = next(filter(list_years, list_candidate_folders(data_dir)), None)
        if devkit is None or not get_list_path(devkit, year, split).is_file():
            new_devkit = data_dir if data_dir.name == "VOCdevkit" else data_dir / "VOCdevkit"
            download_archive(devkit or new_devkit, year, split)
    return find_devkit(data_dir)


def download_archive(devkit: Path, year: str, split: str) -> None:
    """Download and unpack the archive that holds this set. Raises UserError if that fails."""
    test = split == "test" or split.endswith("_test")
    archive = ARCHIVES.get((year, test))
    root = devkit.absolute().parent
    if archive is None:
        raise UserError(f"no published archive holds {year}_{split}\nput it into {devkit}/VOC{year} yourself")
    if devkit.absolute().name != "VOCdevkit":
        raise UserError(
            f"{archive} unpacks into a folder named VOCdevkit, but the devkit is {devkit}\nrename it to VOCdevkit, or "
            "unpack the archive elsewhere and move its content there"
        )
    try:
        torchvision.datasets.VOCDetection(str(root), year=year, image_set="test" if test else "trainval", download=True)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"downloading {archive} failed ({type(error).__name__}: {reason})\nobtain it elsewhere and unpack it in "
            f"{root}, so that {root / 'VOCdevkit' / f'VOC{year}'} exists; --dataset shapes needs no files"
        ) from error


def split_set_name(name: str) -> tuple[str, str]:
    """Split the name of an image set into year and list: 2007_trainval -> 2007, trainval."""
    match = re.fullmatch(r"(\d{4})_([\w-]+)", name)
    if not match:
        raise UserError(
            f"{name!r} is not the name of an image set\nnames have the form YEAR_LIST, such as {', '.join(SET_SIZES)}"
        )
    return match[1], match[2]


def get_list_path(devkit: Path, year: str, split: str) -> Path:
    return devkit / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt"


# ---- Image sets and annotations ----


def read_sets(devkit: Path, sets: list[str], *, progress: Callable = lambda items, **kwargs: items) -> DetectionSet:
    """Read the images of these sets, each image once, in the order of the lists.

    The classes are those of VOC, or those in the file classes.txt of the devkit, one name per line. Raises UserError,
    which names the file, for missing or broken files. Warnings report boxes that were clipped or dropped.
    """
    # ---- Lists ----
    classes = read_classes(devkit)
    label_by_class = {name: label for label, name in enumerate(classes, 1)}
    image_set = DetectionSet(classes, [], [], [], [], f"{devkit} ({', '.join(sets)})")
    listed = []
    for name in sets:
        names = read_list(devkit, name)
        listed += names
        if classes == CLASSES and len(names) != SET_SIZES.get(name, len(names)):
            image_set.warnings.append(
                f"{name} has {len(names):,} images here instead of {SET_SIZES[name]:,}: do not compare the results "
                "with published ones"
            )
    image_set.names = list(dict.fromkeys(listed))

    # ---- Images and annotations ----
    folders = dict.fromkeys(name.split("/")[0] for name in image_set.names)
    files = {folder: list_image_files(devkit / folder / "JPEGImages") for folder in folders}
    annotations = []
    for name in progress(image_set.names, total=len(image_set.names), desc="reading annotations", unit="image"):
        folder, image_id = name.split("/", 1)
        file = files[folder].get(image_id)
        if file is None:
            raise UserError(
                f"no image {devkit / folder / 'JPEGImages' / image_id}{' or '.join(SUFFIXES)}\n"
                f"put it there, or remove {image_id} from the lists"
            )
        image_set.images.append(devkit / folder / "JPEGImages" / file)
        annotation_file = devkit / folder / "Annotations" / f"{image_id}.xml"
        annotations.append(read_annotation(annotation_file, image_set.images[-1], label_by_class))
    image_set.sizes = [annotation.size for annotation in annotations]
    image_set.targets = [make_target(annotation) for annotation in annotations]

    # ---- Warnings ----
    image_set.warnings += describe_defects(image_set.names, annotations)
    if repeated := len(listed) - len(image_set.names):
        image_set.warnings.append(f"images listed more than once (used only once): {repeated:,}")
    return image_set


def make_target(annotation: Annotation) -> dict[str, torch.Tensor]:
    """Convert an annotation to the target tensors of a DetectionSet."""
    return {
        "boxes": torch.tensor(annotation.boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(annotation.labels, dtype=torch.int64),
        "difficult": torch.tensor(annotation.difficult, dtype=torch.bool),
    }


def describe_defects(names: list[str], annotations: list[Annotation]) -> list[str]:
    """Return a line for each kind of defect, with the number of cases and the first images."""
    defects = {
        "boxes clipped to their image": [annotation.clipped for annotation in annotations],
        "boxes dropped because they have no area": [annotation.dropped for annotation in annotations],
        "images kept although they have no objects": [not annotation.boxes for annotation in annotations],
    }
    return [
        f"{text}: {sum(counts):,} ({format_first_names([name for name, n in zip(names, counts, strict=True) if n])})"
        for text, counts in defects.items()
        if any(counts)
    ]


def read_classes(devkit: Path) -> list[str]:
    """Read classes.txt of the devkit, or return the classes of VOC if there is no such file."""
    path = devkit / "classes.txt"
    if not path.is_file():
        return list(CLASSES)
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names or len(set(names)) < len(names):
        problem = "a class name occurs twice" if names else "the file has no class names"
        raise UserError(f"{path}: {problem}\nwrite one class name per line")
    return names


def read_list(devkit: Path, name: str) -> list[str]:
    """Return the images of a set, each once, as VOC2007/000005. Lines are `id`, or `id flag` in the list of a class."""
    year, split = split_set_name(name)
    path = get_list_path(devkit, year, split)
    if not path.is_file():
        available = [
            f"{other}_{file.stem}"
            for other in list_years(devkit)
            for file in sorted(get_list_path(devkit, other, split).parent.glob("*.txt"))
            if not file.stem.startswith(tuple(f"{word}_" for word in CLASSES))  # lists of one class: too many to show
        ]
        raise UserError(
            f"no image set {name}: {path} does not exist{suggest_closest(name, available)}\n"
            f"sets in {devkit}: {', '.join(available) or 'none'}; --download true downloads those of 2007 and 2012"
        )
    names = []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) > 2 or words[1:] and words[1] not in CLASS_LIST_FLAGS:
            raise UserError(f"{path}, line {number}: {line!r} is neither `id` nor `id flag`\ncorrect the line")
        if words and words[1:] != ["-1"]:
            names.append(f"VOC{year}/{words[0]}")
    if not names:
        raise UserError(f"{path}: the list is empty\nwrite one image id per line")
    return list(dict.fromkeys(names))


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}\nthe file must be UTF-8 text with one name per line") from error


def list_image_files(folder: Path) -> dict[str, str]:
    """Return id -> file name of the images in a folder. Listing it once is much faster than a look-up per image."""
    files = {}
    names = os.listdir(folder) if folder.is_dir() else []
    for suffix in SUFFIXES:
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() == suffix:
                files.setdefault(stem, name)
    return files


def read_annotation(path: Path, image: Path, label_by_class: dict[str, int]) -> Annotation:
    """Read the objects of an XML file. Parts of objects (heads, hands and feet of persons) are ignored.

    image: the image file, whose header is read if the annotation gives no size. Raises UserError, which names the
    file, if it is broken.
    """
    try:
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag}> instead of <annotation>")
        height, width = read_size(root) or read_image_size(image)[::-1]
        boxes, labels, difficult, clipped, dropped = [], [], [], 0, 0
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
            box = (xmin - 1, ymin - 1, xmax, ymax)
            inside = tuple(min(max(edge, 0.0), end) for edge, end in zip(box, (width, height) * 2, strict=True))
            if inside[2] <= inside[0] or inside[3] <= inside[1]:
                dropped += 1
                continue
            clipped += inside != box
            boxes.append(inside)
            labels.append(label_by_class[name])
            difficult.append(bool(read_number(element, "difficult", 0)))
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:  # LookupError: unknown encoding
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: {reason}\ncorrect the file, or remove {path.stem} from the lists") from error
    return Annotation(boxes, labels, difficult, (height, width), clipped, dropped)


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
