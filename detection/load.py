"""Load the training and test images of a detector. voc.py and coco.py read their formats, shape_scenes.py draws scenes.

Boxes are x0, y0, x1, y1 in continuous pixel coordinates: the pixel in row 0 and column 0 is the box 0, 0, 1, 1.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from detection import coco
from detection.dataset import DetectionSet, format_first_names
from detection.shape_scenes import MIN_SIDE, draw_scenes
from detection.voc import read_sets
from detection.voc_folders import download_missing_sets
from engine.errors import UserError
from engine.runtime.distributed import main_process_first
from engine.runtime.text import format_count

SCENES = ((1000, 2), (200, 3))  # number and seed of training and test scenes; seeds 0, 1 draw the classifier's `shapes`
SIDE = 160  # mean side of a scene, in pixels


def load_image_sets(
    *,
    dataset: str,
    data_dir: str = "data",
    train_sets: Sequence[str] = ("2007_trainval", "2012_trainval"),
    test_set: str = "2007_test",
    train_annotations: str | None = None,
    test_annotations: str | None = None,
    images: Sequence[str] = (),
    download: bool = False,
    limit: int = 0,
    max_size: int = 0,
    image_size: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> tuple[DetectionSet, DetectionSet]:
    """Return the training set and the test set.

    dataset: `voc`, `coco`, or `shapes` for drawn scenes. train_sets, test_set: lists of VOC as YEAR_LIST; if train_sets
    is empty, so is the training set. train_annotations, test_annotations: files in COCO format; without the first, the
    training set is empty. images: folder of their images, or one for each; empty: the folders of the files. limit: use
    only N images of each set, spread over the classes; 0: all. max_size: limit of the longer side after resizing, which
    must leave a pixel of the shorter side; 0: not checked. image_size: for shapes, the mean side of a scene in pixels;
    0: 160. progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError, with what was looked for
    and the remedy, if files are missing.
    """
    if dataset == "shapes":
        train, test, totals = draw_sets(bool(train_sets), limit, image_size, progress)
    elif dataset == "voc":
        if download:
            main_process_first(lambda: download_missing_sets(Path(data_dir), [*train_sets, test_set]))
        train, test = (read_sets(Path(data_dir), sets, progress=progress) for sets in (list(train_sets), [test_set]))
        totals = len(train), len(test)
    elif dataset == "coco":
        folders = list(images) or [None]
        parts = (train_annotations, folders[0]), (test_annotations, folders[-1])
        read = (coco.read_image_set(file, folder, limit=limit, progress=progress) for file, folder in parts)
        (train, test), totals = zip(*read, strict=True)
    else:
        raise ValueError(f"dataset must be voc, coco or shapes, got {dataset!r}")
    if len(train):
        test = test.reorder_classes(train.classes)
        check_same_classes(train, test)
    warn_about_shared_images(train, test)
    if limit:
        train, test = (image_set.subsample(limit) for image_set in (train, test))
        for image_set, total, name in zip((train, test), totals, ("training", "test"), strict=True):
            if len(image_set) < total:
                image_set.warnings.append(
                    f"--limit {limit}: only {len(image_set):,} of {total:,} {name} images are used"
                )
    for image_set in (train, test):
        check_sides(image_set, max_size)
    warn_about_uncounted_objects(test)
    return train, test


def draw_sets(
    with_training: bool, limit: int, image_size: int, progress: Callable
) -> tuple[DetectionSet, DetectionSet, tuple[int, int]]:
    """Draw training and test scenes. Returns both sets, and the number of all scenes of each."""
    if image_size and image_size < MIN_SIDE:
        raise UserError(f"image_size {image_size}: scenes need a mean side of at least {MIN_SIDE} pixels")
    totals = SCENES[0][0] if with_training else 0, SCENES[1][0]
    train, test = (
        draw_scenes(min(total, limit or total), size=image_size or SIDE, seed=seed, progress=progress)
        for total, (_, seed) in zip(totals, SCENES, strict=True)
    )
    return train, test, totals


def check_same_classes(train: DetectionSet, test: DetectionSet) -> None:
    """Raise UserError, with the classes of only one of them, unless both sets have the same classes."""
    if train.classes != test.classes:
        only = [
            f"only {one.origin} has {format_first_names(names)}"
            for one, other in ((train, test), (test, train))
            if (names := [name for name in one.classes if name not in other.classes])
        ]
        raise UserError(
            f"the training and the test set have different classes: {', '.join(only)}\ngive both the same class names: "
            "in classes.txt beside all folders VOC<year>, or in the categories of both COCO files"
        )


def check_sides(image_set: DetectionSet, max_size: int) -> None:
    """Raise UserError if an image is so elongated that no pixel of its shorter side is left at --max_size."""
    lost = [index for index, size in enumerate(image_set.sizes) if max_size and is_too_elongated(size, max_size)]
    if lost:
        named = [f"{image_set.names[n]} ({image_set.sizes[n][1]} x {image_set.sizes[n][0]} pixels)" for n in lost]
        needed = max(math.ceil(max(image_set.sizes[n]) / min(image_set.sizes[n])) for n in lost)
        raise UserError(
            f"--max_size {max_size} leaves less than a pixel of the shorter side of {format_count(len(lost), 'image')}"
            f": {format_first_names(named)}\nremove them from the data set, or give at least --max_size {needed}"
        )


def is_too_elongated(size: tuple[int, int], max_size: int) -> bool:
    """Return whether no pixel of the shorter side of an image is left once its longer side has max_size pixels."""
    scale = np.float32(max_size) / np.float32(max(size))  # as in torchvision
    return min(size) * float(scale) < 1


def warn_about_uncounted_objects(test: DetectionSet) -> None:
    """Add a warning to the test set if it has no object that counts, so that average precision is undefined."""
    difficult = [flag for target in test.targets for flag in target["difficult"].tolist()]
    if all(difficult):
        what = f"{format_count(len(difficult), 'object')}, marked {test.flag}" if difficult else "there are none"
        test.warnings.append(
            f"no object of the test set counts ({what}): average precision is undefined, and a run writes last.pt but "
            "no best.pt"
        )


def warn_about_shared_images(train: DetectionSet, test: DetectionSet) -> None:
    """Add a warning to the training set if images are in both sets."""
    training = dict(zip(train.names, train.images, strict=True))
    pairs = zip(test.names, test.images, strict=True)
    if shared := [name for name, image in pairs if name in training and is_same_image(training[name], image)]:
        train.warnings.append(
            f"the training and the test set share {format_count(len(shared), 'image')}, so the results are too high: "
            f"{format_first_names(shared)}"
        )


def is_same_image(one: Path | torch.Tensor, other: Path | torch.Tensor) -> bool:
    """Return whether two images of one name are the same: in COCO's format two folders may have the same names."""
    if isinstance(one, torch.Tensor):
        return True
    return one == other or one.stat().st_size == other.stat().st_size
