"""The published sets of corrupted test images, and the mean corruption error.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
arXiv 1903.12261, Sec. 3-4. CIFAR-10-C and CIFAR-100-C are arrays, Tiny-ImageNet-C and ImageNet-C folders of images.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from engine.data.folders import describe_folder, describe_missing, label_files, list_class_folders, list_folders
from engine.data.image_set import ImageSet, make_image_set
from engine.data.views import View
from engine.errors import UserError, suggest_closest
from evaluation.corruptions import SEVERITIES

ALEXNET_ERRORS = {  # mean over the five severities of ImageNet-C, in the paper's order
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published, outside the paper's mean
ORDER = [*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS]
SET_BY_CLASS_COUNT = {10: "cifar-10-c", 100: "cifar-100-c", 200: "tiny-imagenet-c", 1000: "imagenet-c"}


@dataclass
class CorruptedSet:
    """The files of a corrupted set; nothing is read into memory before load()."""

    kind: str  # arrays or folders
    root: Path
    classes: list[str]
    sources: dict[str, dict[int, Path]]  # corruption, in the paper's order -> severity -> its array or its folder
    notes: list[str]  # what is missing, a line each
    labels: torch.Tensor | None = None  # of arrays: (N,) long for one severity, or for all five
    view: View | None = None  # of folders
    on_bad_image: str = "stop"

    def load(self, name: str, severity: int) -> ImageSet:
        """The images of one corruption at one severity, labels as positions in `classes`. Raises UserError for what
        cannot be read, ValueError for what is not there.
        """
        if severity not in self.sources.get(name, ()):
            there = {name: list(severities) for name, severities in self.sources.items()}
            nearest = suggest_closest(name, self.sources)
            raise ValueError(f"no {name!r} of severity {severity!r}, there are {there}{nearest}")
        source = self.sources[name][severity]
        with explain_os_errors(source):
            if self.kind == "folders":
                found = label_files(list_class_folders(source), source)
                class_map = torch.tensor([self.classes.index(each) for each in found.classes])
                found = found._replace(labels=class_map[found.labels], classes=self.classes)
                return make_image_set(found, self.view, self.on_bad_image)
            images = open_images(source, len(self.labels))
            count = len(images) // len(SEVERITIES)
            rows = slice((severity - 1) * count, severity * count)
            labels = self.labels if len(self.labels) == count else self.labels[rows]
            pixels = torch.from_numpy(images[rows]).clone()  # out of the memory map, while its errors are caught
            return ImageSet(pixels, labels, self.classes, f"{source}, severity {severity}")


def find_corrupted_set(
    place: Path, classes: list[str], *, view: View | None = None, on_bad_image: str = "stop"
) -> CorruptedSet:
    """The corrupted set in `place`, or in a folder CIFAR-10-C, ImageNet-C ... there; the published one of so many
    classes goes first.

    classes: of the network. view: how image files are cut out; arrays need none. Raises UserError with what was looked
    for, and for damaged arrays and for classes that the network does not have.
    """
    with explain_os_errors(place):
        if not place.is_dir():
            raise UserError(
                f"no folder {place}\nname the folder of the corrupted images{describe_folder(place.parent)}"
            )
        places = [place / name for name in list_folders(place) if name.lower().endswith("-c")]
        places.sort(key=lambda path: path.name.lower() != SET_BY_CLASS_COUNT.get(len(classes)))
        for root in [*places, place]:
            if arrays := list_arrays(root):
                labels, notes = read_labels(root / "labels.npy", classes)
                for path in arrays.values():
                    open_images(path, len(labels))
                sources = sort_corruptions({name: dict.fromkeys(SEVERITIES, path) for name, path in arrays.items()})
                notes = list_missing(root, sources) + notes
                return CorruptedSet("arrays", root, classes, sources, notes, labels)
            if sources := sort_corruptions(list_severity_folders(root)):
                if view is None:
                    raise ValueError(f"{root} holds image files, which need a view")
                notes = list_missing(root, sources) + check_classes(root, sources, classes)
                return CorruptedSet("folders", root, classes, sources, notes, None, view, on_bad_image)
        raise UserError(
            f"no corrupted images in {place}: looked for <corruption>.npy with labels.npy (CIFAR) and for "
            "<corruption>/<severity>/<class>/*.jpg (or .png, .JPEG ...), there and in folders like CIFAR-10-C or "
            f"ImageNet-C\nunpack the published set there, or name its place{describe_folder(place)}"
        )


@contextmanager
def explain_os_errors(place: Path) -> Iterator[None]:
    """Turn errors of the file system into a UserError of one line and a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or place} cannot be read: {error.strerror or error}\nallow that, or name another place"
        ) from error


def list_arrays(root: Path) -> dict[str, Path]:
    """Corruption -> its array. Not by glob(), which ignores a folder that may not be read."""
    names = [name for name in os.listdir(root) if name.endswith(".npy") and name != "labels.npy"]
    return {name.removesuffix(".npy"): root / name for name in names if not name.startswith(".")}


def list_severity_folders(root: Path) -> dict[str, dict[int, Path]]:
    """Corruption -> severity -> the folder of its class folders; also one level further down, as noise/shot_noise/1."""
    found = {}
    for group in list_folders(root):
        below = [group] if list_severities(root / group) else [f"{group}/{name}" for name in list_folders(root / group)]
        found |= {Path(name).name: levels for name in below if (levels := list_severities(root / name))}
    return found


def list_severities(folder: Path) -> dict[int, Path]:
    """Severity -> its folder, where that has folders in it."""
    there = list_folders(folder)
    levels = {level: folder / str(level) for level in SEVERITIES if str(level) in there}
    return {level: path for level, path in levels.items() if list_folders(path)}


def sort_corruptions(sources: dict[str, dict[int, Path]]) -> dict[str, dict[int, Path]]:
    names = [name for name in ORDER if name in sources] + sorted(set(sources) - set(ORDER))
    return {name: sources[name] for name in names}


def list_missing(root: Path, sources: dict[str, dict[int, Path]]) -> list[str]:
    """What is missing from a complete set, a line each."""
    absent = [name for name in ALEXNET_ERRORS if name not in sources]
    total = len(ALEXNET_ERRORS)
    lines = [f"{root} lacks {len(absent)} of the {total} corruptions: {', '.join(absent)}"] if absent else []
    for name, levels in sources.items():
        if gaps := [str(level) for level in SEVERITIES if level not in levels]:
            lines.append(f"{name} lacks the severities {', '.join(gaps)}")
    return lines


def check_classes(root: Path, sources: dict[str, dict[int, Path]], classes: list[str]) -> list[str]:
    """A line if there are fewer classes than the network has; UserError if there are others."""
    ours, fewest = label_files(dict.fromkeys(classes, ()), root), len(classes)
    for folder in (path for levels in sources.values() for path in levels.values()):
        theirs = label_files(dict.fromkeys(list_folders(folder), ()), folder)
        if (others := describe_missing(theirs, ours)) != "none":
            raise UserError(
                f"{folder} has classes that the network does not have: {others}; only the network has "
                f"{describe_missing(ours, theirs)}\nname the corrupted images of the data set that it was trained on"
            )
        fewest = min(fewest, len(theirs.classes))
    return [f"{root} has only {fewest} of the {len(classes)} classes"] if fewest < len(classes) else []


def read_labels(path: Path, classes: list[str]) -> tuple[torch.Tensor, list[str]]:
    """labels.npy as (N,) long, and a line if the classes are fewer than the network's."""
    if not path.is_file():
        raise UserError(
            f"no {path}: it tells the classes of the images\nput the published one there{describe_folder(path.parent)}"
        )
    labels = open_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        found = f"{labels.dtype} of shape {labels.shape}"
        raise UserError(f"{path} holds {found}, not whole numbers (N,)\ndownload it again")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(classes):
        raise UserError(
            f"{path} has labels from {lowest} to {highest}, the network has {len(classes)} classes\nname the corrupted "
            "images of the data set that it was trained on"
        )
    fewer = f"{path} has only {highest + 1} of the {len(classes)} classes"
    return torch.from_numpy(labels.astype(np.int64)), [fewer] if highest + 1 < len(classes) else []


def open_images(path: Path, labels: int) -> np.ndarray:
    """uint8 (N, H, H, 3), memory-mapped: five equal blocks, one per severity. labels: how many, N or a fifth of it."""
    images, again = open_array(path), "\nunpack or download it again"
    side = images.shape[1] if images.ndim == 4 else 0
    if images.dtype != np.uint8 or not side or images.shape[1:] != (side, side, 3):
        raise UserError(f"{path} holds {images.dtype} of shape {images.shape}, not uint8 (N, H, H, 3){again}")
    if not len(images) or len(images) % len(SEVERITIES):
        raise UserError(f"{path} has {len(images):,} images, which are not five severities of as many{again}")
    if labels not in (len(images), len(images) // len(SEVERITIES)):
        raise UserError(
            f"{path} has {len(images):,} images, but labels.npy {labels:,} labels, neither as many nor a fifth{again}"
        )
    return images


def open_array(path: Path) -> np.ndarray:
    """A memory-mapped array."""
    try:
        return np.lib.format.open_memmap(path, mode="c")  # private: torch wants arrays that can be written to
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})\nunpack or download it again") from error


def mean_corruption_error(
    errors: dict[str, list[float]], reference: dict[str, list[float]] | dict[str, float]
) -> tuple[float, dict[str, float]]:
    """(mCE, {corruption: CE}) in percent: CE is the mean error over the severities relative to that of a reference
    network, mCE the mean of CE over the corruptions of `errors`. arXiv 1903.12261, Sec. 4.1.

    errors, reference: corruption -> error at each severity, or the reference's mean over them, both in 0..1. Raises
    ValueError for corruptions without a reference, with a reference of 0, and with other numbers of severities.
    """
    if lacking := [name for name in errors if name not in reference]:
        raise ValueError(f"no reference for {', '.join(lacking)}; there is one for {', '.join(reference)}")
    if not errors:
        raise ValueError("no corruptions to average over")
    quotients = {}
    for name, ours in errors.items():
        theirs = reference[name]
        if isinstance(theirs, (int, float)):
            if len(ours) != len(SEVERITIES):
                raise ValueError(f"{name}: errors at {len(ours)} severities, the reference's is the mean of all five")
        else:
            if len(theirs) != len(ours):
                raise ValueError(f"{name}: errors at {len(ours)} severities, the reference's at {len(theirs)}")
            theirs = fmean(theirs)
        if not ours or not 0 < theirs < math.inf:
            raise ValueError(f"{name}: errors {ours} cannot be divided by the reference {theirs}")
        quotients[name] = 100 * fmean(ours) / theirs
    return fmean(quotients.values()), quotients
