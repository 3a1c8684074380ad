"""Published sets of corrupted test images, and the mean corruption error (mCE).

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

from engine.data.folders import describe_folder, describe_missing, find_class_folders, label_files
from engine.data.image_set import ImageSet, make_image_set
from engine.data.listing import list_folders
from engine.data.views import SquashedView, View
from engine.errors import UserError, suggest_closest
from evaluation.corruptions import SEVERITIES

ALEXNET_ERRORS = {  # error on ImageNet-C, mean over the five severities, in the paper's order
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
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published too, but not part of the mCE
ORDER = [*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS]
SET_BY_CLASS_COUNT = {10: "cifar-10-c", 100: "cifar-100-c", 200: "tiny-imagenet-c", 1000: "imagenet-c"}


@dataclass
class CorruptedSet:
    """The files of a corrupted set; no image is read before load()."""

    kind: str  # arrays or folders
    root: Path
    classes: list[str]
    sources: dict[str, dict[int, Path]]  # corruption, in the paper's order -> severity -> array or folder
    notes: list[str]  # one line for each thing that is missing
    labels: torch.Tensor | None = None  # for arrays: (N,) long of one severity, or of all five
    view: View | None = None  # for folders: how images are resized and cropped
    on_bad_image: str = "stop"
    resize: SquashedView | None = None  # for arrays: to the size that the network takes

    def load(self, name: str, severity: int) -> ImageSet:
        """Return the images of one corruption at one severity; labels are positions in `classes`.

        Raises UserError for files that cannot be read, ValueError for a corruption or severity that the set lacks.
        """
        if severity not in self.sources.get(name, ()):
            available = {name: list(severities) for name, severities in self.sources.items()}
            closest = suggest_closest(name, self.sources)
            raise ValueError(f"no {name!r} of severity {severity!r}; available: {available}{closest}")
        source = self.sources[name][severity]
        with explain_os_errors(source):
            if self.kind == "folders":
                files = find_class_folders(source)
                class_map = torch.tensor([self.classes.index(each) for each in files.classes])
                files = files._replace(labels=class_map[files.labels], classes=self.classes)
                return make_image_set(files, self.view, self.on_bad_image)
            images = open_images(source, len(self.labels))
            count = len(images) // len(SEVERITIES)
            rows = slice((severity - 1) * count, severity * count)
            labels = self.labels if len(self.labels) == count else self.labels[rows]
            pixels = torch.from_numpy(images[rows]).clone()  # reads the memory map here, where its errors are caught
            origin = f"{source}, severity {severity}"
            return ImageSet(pixels, labels, self.classes, origin, resize=self.resize)


def find_corrupted_set(
    folder: Path,
    classes: list[str],
    *,
    view: View | None = None,
    on_bad_image: str = "stop",
    resize: SquashedView | None = None,
) -> CorruptedSet:
    """Return the corrupted set in a folder, or in its subfolder CIFAR-10-C, ImageNet-C or the like.

    If there are several subfolders, the published set with as many classes as the network goes first. classes: those of
    the network. view: how image files are resized and cropped. resize: how arrays are resized; None: they keep their
    size. Raises UserError if there is no such set, if an array is damaged, and if the set has classes that the network
    does not have.
    """
    with explain_os_errors(folder):
        if not folder.is_dir():
            raise UserError(
                f"--corruptions: no folder {folder}\n"
                f"give the folder of the corrupted images{describe_folder(folder.parent)}"
            )
        candidates = [folder / name for name in list_folders(folder) if name.lower().endswith("-c")]
        candidates.sort(key=lambda path: path.name.lower() != SET_BY_CLASS_COUNT.get(len(classes)))
        for root in [*candidates, folder]:
            if arrays := list_arrays(root):
                labels, notes = read_labels(root / "labels.npy", classes)
                for path in arrays.values():
                    open_images(path, len(labels))
                sources = sort_corruptions({name: dict.fromkeys(SEVERITIES, path) for name, path in arrays.items()})
                notes = list_missing(root, sources) + notes
                return CorruptedSet("arrays", root, classes, sources, notes, labels, resize=resize)
            if sources := sort_corruptions(list_severity_folders(root)):
                if view is None:
                    raise ValueError(f"{root} holds image files: the argument view is needed to read them")
                notes = list_missing(root, sources) + check_classes(root, sources, classes)
                return CorruptedSet("folders", root, classes, sources, notes, None, view, on_bad_image)
        raise UserError(
            f"--corruptions: no corrupted images in {folder}: expected <corruption>.npy with labels.npy (CIFAR) or "
            "<corruption>/<severity>/<class>/*.jpg (or .png, .JPEG ...), there or in a subfolder such as CIFAR-10-C or "
            f"ImageNet-C\nunpack the published set there, or give another folder{describe_folder(folder)}"
        )


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a UserError with one line and a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path} cannot be read: {error.strerror or error}\n"
            "change its permissions, or give another path"
        ) from error


def list_arrays(root: Path) -> dict[str, Path]:
    """Return the array of each corruption. Not by glob(), which ignores a folder without read permission."""
    names = [name for name in os.listdir(root) if name.endswith(".npy") and name != "labels.npy"]
    return {name.removesuffix(".npy"): root / name for name in names if not name.startswith(".")}


def list_severity_folders(root: Path) -> dict[str, dict[int, Path]]:
    """Return the folder of each severity of each corruption; groups of corruptions are searched: noise/shot_noise/1."""
    found = {}
    for group in list_folders(root):
        names = [group] if list_severities(root / group) else [f"{group}/{name}" for name in list_folders(root / group)]
        found |= {Path(name).name: levels for name in names if (levels := list_severities(root / name))}
    return found


def list_severities(folder: Path) -> dict[int, Path]:
    """Return the folder of each severity that has subfolders."""
    names = list_folders(folder)
    levels = {level: folder / str(level) for level in SEVERITIES if str(level) in names}
    return {level: path for level, path in levels.items() if list_folders(path)}


def sort_corruptions(sources: dict[str, dict[int, Path]]) -> dict[str, dict[int, Path]]:
    """Return the corruptions in the paper's order, then others by name."""
    names = [name for name in ORDER if name in sources] + sorted(set(sources) - set(ORDER))
    return {name: sources[name] for name in names}


def list_missing(root: Path, sources: dict[str, dict[int, Path]]) -> list[str]:
    """Return one line for each thing that is missing from a complete set."""
    absent = [name for name in ALEXNET_ERRORS if name not in sources]
    total = len(ALEXNET_ERRORS)
    lines = [f"{root} lacks {len(absent)} of the {total} corruptions: {', '.join(absent)}"] if absent else []
    for name, levels in sources.items():
        if gaps := [str(level) for level in SEVERITIES if level not in levels]:
            lines.append(f"{name} lacks severit{'y' if len(gaps) == 1 else 'ies'} {', '.join(gaps)}")
    return lines


def check_classes(root: Path, sources: dict[str, dict[int, Path]], classes: list[str]) -> list[str]:
    """Return a line if the set has fewer classes than the network. Raise UserError if it has others."""
    ours, fewest = label_files(dict.fromkeys(classes, ()), root), len(classes)
    for folder in (path for levels in sources.values() for path in levels.values()):
        theirs = label_files(dict.fromkeys(list_folders(folder), ()), folder)
        if (others := describe_missing(theirs, ours)) != "none":
            raise UserError(
                f"{folder} has classes that the network does not have: {others}; only the network has "
                f"{describe_missing(ours, theirs)}\ngive the corrupted images of the data set that it was trained on"
            )
        fewest = min(fewest, len(theirs.classes))
    return [f"{root} has only {fewest} of the {len(classes)} classes"] if fewest < len(classes) else []


def read_labels(path: Path, classes: list[str]) -> tuple[torch.Tensor, list[str]]:
    """Return labels.npy as (N,) long, and a line if it has fewer classes than the network."""
    if not path.is_file():
        raise UserError(
            f"no {path}, which must hold the classes of the images\n"
            f"copy the published file there{describe_folder(path.parent)}"
        )
    labels = open_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        found = f"{labels.dtype} of shape {labels.shape}"
        raise UserError(f"{path} holds {found}, expected integers of shape (N,)\ndownload it again")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= len(classes):
        raise UserError(
            f"{path} has labels from {lowest} to {highest}, but the network has {len(classes)} classes\n"
            "give the corrupted images of the data set that it was trained on"
        )
    fewer = f"{path} has only {highest + 1} of the {len(classes)} classes"
    return torch.from_numpy(labels.astype(np.int64)), [fewer] if highest + 1 < len(classes) else []


def open_images(path: Path, num_labels: int) -> np.ndarray:
    """Return the memory-mapped images, uint8 (N, H, H, 3), in five equal blocks, one per severity.

    num_labels: the number of labels, N or a fifth of it.
    """
    images, remedy = open_array(path), "\nunpack or download it again"
    side = images.shape[1] if images.ndim == 4 else 0
    if images.dtype != np.uint8 or not side or images.shape[1:] != (side, side, 3):
        raise UserError(f"{path} holds {images.dtype} of shape {images.shape}, expected uint8 (N, H, H, 3){remedy}")
    if not len(images) or len(images) % len(SEVERITIES):
        raise UserError(f"{path} has {len(images):,} images, expected five severities of equal size{remedy}")
    if num_labels not in (len(images), len(images) // len(SEVERITIES)):
        raise UserError(
            f"{path} has {len(images):,} images, but labels.npy has {num_labels:,} labels; expected as many or a fifth"
            f"{remedy}"
        )
    return images


def open_array(path: Path) -> np.ndarray:
    """Return a memory-mapped array. Raises UserError if the file is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="c")  # copy-on-write: torch warns about read-only arrays
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})\nunpack or download it again") from error


def mean_corruption_error(
    errors: dict[str, list[float]], reference: dict[str, list[float]] | dict[str, float]
) -> tuple[float, dict[str, float]]:
    """Return (mCE, {corruption: CE}) in percent. arXiv 1903.12261, Sec. 4.1.

    CE is the mean error over the severities relative to that of a reference network; mCE is the mean of CE over the
    corruptions of `errors`. errors: corruption -> error at each severity, 0..1. reference: the same, or the mean over
    the five severities. Raises ValueError for corruptions that the reference lacks, for a reference error of 0, and for
    different numbers of severities.
    """
    if missing := [name for name in errors if name not in reference]:
        raise ValueError(f"the reference lacks {', '.join(missing)}; it has {', '.join(reference)}")
    if not errors:
        raise ValueError("no corruptions to average over")
    corruption_errors = {}
    for name, ours in errors.items():
        theirs = reference[name]
        if isinstance(theirs, (int, float)):
            if len(ours) != len(SEVERITIES):
                raise ValueError(f"{name}: severities measured: {len(ours)}, but the reference is the mean of all five")
        else:
            if len(theirs) != len(ours):
                raise ValueError(f"{name}: severities measured: {len(ours)}, of the reference: {len(theirs)}")
            theirs = fmean(theirs)
        if not ours or not 0 < theirs < math.inf:
            raise ValueError(f"{name}: errors {ours} cannot be divided by the reference error {theirs}")
        corruption_errors[name] = 100 * fmean(ours) / theirs
    return fmean(corruption_errors.values()), corruption_errors
