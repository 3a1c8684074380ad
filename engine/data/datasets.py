"""Data sets by name, with their training, validation and test images."""

from collections.abc import Callable
from pathlib import Path

import torch

from engine.config.phases import default_eval_resize
from engine.data.cifar import LAYOUTS, find_cifar, read_cifar, read_class_names
from engine.data.folders import find_evaluation_images, find_splits
from engine.data.image_set import (
    Data,
    ImageSet,
    decode_all,
    get_statistics,
    make_image_set,
    split_by_class,
)
from engine.data.shapes import CLASSES as SHAPE_NAMES
from engine.data.shapes import draw_shapes
from engine.data.views import CenterCrop, View
from engine.errors import UserError
from engine.runtime.distributed import main_process_first

EXPECTED_COUNTS = {  # of training and test images
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny-imagenet": (100_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}
SHAPES_COUNTS = (5000, 1000)
TINY_SIDE = 64


def load_data(
    dataset: str,
    *,
    data_dir: str = "data",
    val_data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    eval_resize: int | None = None,
    val_labels: str | None = None,
    norm: str = "own",
    num_classes: int | None = None,
    limit: int = 0,
    labels_per_class: int = 0,
    valid_labels_per_class: int = 0,
    seed: int = 0,
    on_bad_image: str = "stop",
    workers: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> Data:
    """Read a data set. The parameters are the options of the same names; progress wraps an iterable in a progress bar
    (tqdm's signature). Raises UserError that says what was looked for, and the remedy.
    """
    if dataset in LAYOUTS:
        train, test = load_cifar(dataset, Path(data_dir), Path(val_data_dir or data_dir), download)
    elif dataset == "shapes":
        most = 0 if labels_per_class or valid_labels_per_class else limit
        train, test = (
            make_shapes_image_set(part, image_size or 32, num_classes or 10, progress, most) for part in (0, 1)
        )
    else:
        view = get_default_view(dataset, image_size, eval_resize)
        places = [place and Path(place) for place in (data_dir, val_data_dir, val_labels)]
        train, test = (make_image_set(part, view, on_bad_image) for part in find_splits(dataset, *places))
    warnings = describe_counts(dataset, len(train), len(test), limit)
    check_class_count(dataset, train, num_classes)
    train, valid = split_by_class(train, labels_per_class, valid_labels_per_class, seed)
    if limit:
        train, test = train.first(limit), test.first(limit)
    if dataset == "tiny-imagenet" and train.pixels.size == TINY_SIDE and not eval_resize:
        train, test, valid = (part and decode_all(part, workers, progress, warnings) for part in (train, test, valid))
    side = check_image_size(dataset, train, image_size)
    return Data(train, test, valid, *get_statistics(dataset, norm), side, warnings)


def describe_counts(dataset: str, train: int, test: int, limit: int) -> list[str]:
    """Warnings about numbers of images that are not the usual ones of the data set, and about --limit."""
    usual_train, usual_test = EXPECTED_COUNTS.get(dataset, (train, test))
    usual = f"{dataset} usually has {usual_train:,} training and {usual_test:,} test images"
    unusual = [f"{usual}, here are {train:,} and {test:,}"] if (train, test) != (usual_train, usual_test) else []
    return unusual + ([f"--limit {limit}: results are partial"] if limit else [])


def load_evaluation(
    dataset: str,
    *,
    data_dir: str = "data",
    val_data_dir: str | None = None,
    download: bool = False,
    view: View | None = None,
    val_labels: str | None = None,
    image_size: int | None = None,
    eval_resize: int | None = None,
    num_classes: int | None = None,
    limit: int = 0,
    on_bad_image: str = "stop",
    progress: Callable = lambda items, **kwargs: items,
) -> ImageSet:
    """The test images of load_data(), where the training images need not be there. Image files stay files.

    view: how image files are cut out, instead of by image_size and eval_resize; shapes and CIFAR have none. Raises
    UserError that says what was looked for, and the remedy.
    """
    place, val_place, labels = (name and Path(name) for name in (data_dir, val_data_dir, val_labels))
    if dataset in LAYOUTS:
        place = main_process_first(lambda: find_cifar(dataset, val_place or place, download))
        part = make_cifar_image_set(dataset, place, [LAYOUTS[dataset].test])
        check_image_size(dataset, part, image_size)
    elif dataset == "shapes":
        part = make_shapes_image_set(1, image_size or 32, num_classes or 10, progress, limit)
    else:
        found = find_evaluation_images(dataset, place, val_place, labels)
        part = make_image_set(found, view or get_default_view(dataset, image_size, eval_resize), on_bad_image)
    check_class_count(dataset, part, num_classes)
    return part.first(limit) if limit else part


def check_class_count(dataset: str, part: ImageSet, num_classes: int | None) -> None:
    if num_classes and num_classes != len(part.classes):
        raise UserError(f"--num_classes {num_classes}: the data in {part.origin} has {len(part.classes)} classes")
    if dataset == "imagenet" and len(part.classes) != 1000 and not num_classes:
        raise UserError(
            f"imagenet has 1000 classes, {part.origin} has {len(part.classes)}\n"
            f"complete it, or say --num_classes {len(part.classes)} if a part of it is what you want"
        )


def check_image_size(dataset: str, part: ImageSet, image_size: int | None) -> int:
    """The side of the images in pixels. Raises UserError if image_size is another."""
    side = part.pixels.shape[1] if isinstance(part.pixels, torch.Tensor) else part.pixels.size
    if image_size not in (None, side):
        raise UserError(f"--image_size {image_size}: the images of {dataset} have {side} pixels a side")
    return side


def load_cifar(name: str, train_dir: Path, test_dir: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """Training and test images."""
    train_place = test_place = main_process_first(lambda: find_cifar(name, train_dir, download))
    if test_dir != train_dir:
        test_place = main_process_first(lambda: find_cifar(name, test_dir, download))
    return (
        make_cifar_image_set(name, train_place, LAYOUTS[name].train),
        make_cifar_image_set(name, test_place, [LAYOUTS[name].test]),
    )


def make_cifar_image_set(name: str, place: Path, files: list[str]) -> ImageSet:
    return ImageSet(*read_cifar(name, place, files), read_class_names(name, place), str(place))


def make_shapes_image_set(part: int, size: int, num_classes: int, progress: Callable, most: int = 0) -> ImageSet:
    """part: 0 for training images, 1 for test images; it is the seed. most: number of images; 0: SHAPES_COUNTS."""
    if num_classes > len(SHAPE_NAMES):
        raise UserError(f"--num_classes {num_classes}: shapes has {len(SHAPE_NAMES)} classes")
    count = min(SHAPES_COUNTS[part], most or SHAPES_COUNTS[part])
    drawn = draw_shapes(count, size, num_classes=num_classes, seed=part, progress=progress)
    origin = f"the generator of shapes, seed {part}"
    return ImageSet(drawn.pop("images"), drawn.pop("labels"), SHAPE_NAMES[:num_classes], origin, drawn)


def get_default_view(dataset: str, image_size: int | None, eval_resize: int | None) -> CenterCrop:
    """How the evaluation images of a set are cut out. Raises UserError if the crop is larger than the resized image."""
    size = image_size or (224 if dataset == "imagenet" else TINY_SIDE)
    resize = eval_resize or (default_eval_resize(size) if dataset == "imagenet" else size)
    if resize < size:
        raise UserError(
            f"--eval_resize {resize}: smaller than the {size} pixels of --image_size that are cut out of it"
        )
    return CenterCrop(size, resize)
