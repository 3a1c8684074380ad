"""Load a data set by name: its training, validation and test images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from engine.data.views import CenterCrop, SquashedView, View
from engine.errors import UserError
from engine.runtime.distributed import main_process_first
from engine.runtime.text import format_count

EXPECTED_COUNTS = {  # numbers of training and test images
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny-imagenet": (100_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}
SHAPES_COUNTS = (5000, 1000)  # numbers of training and test images
TINY_SIDE = 64  # side of Tiny-ImageNet's images, in pixels


def load_data(
    dataset: str,
    *,
    data_dir: str = "data",
    val_data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
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
    """Load the training, validation and test images of a data set.

    The parameters are the command-line options of the same names. progress: wraps an iterable in a progress bar, with
    tqdm's signature. Raises UserError if images are missing; it names the paths that were tried and the remedy.
    """
    # ---- Training and test images ----
    if dataset in LAYOUTS:
        found = load_cifar(dataset, Path(data_dir), Path(val_data_dir or data_dir), download)
        train, test = (resize_cifar(image_set, image_size, interpolation) for image_set in found)
    elif dataset == "shapes":
        max_count = 0 if labels_per_class or valid_labels_per_class else limit
        train, test = (
            make_shapes_image_set(split, image_size or 32, num_classes or 10, progress, max_count) for split in (0, 1)
        )
    else:
        view = get_default_view(dataset, image_size, eval_resize, interpolation)
        paths = [name and Path(name) for name in (data_dir, val_data_dir, val_labels)]
        train, test = (
            make_image_set(found, view, on_bad_image, dataset == "folder") for found in find_splits(dataset, *paths)
        )
    # ---- Checks, validation split and limit ----
    warnings = [*train.notes, *test.notes] + describe_counts(dataset, len(train), len(test), limit)
    check_class_count(dataset, train, num_classes)
    if len(train.classes) < 2:
        raise UserError(
            f"{train.origin} has a single class, {train.classes[0]!r}, so every prediction would be right\n"
            "give images of at least one other class"
        )
    train, valid = split_by_class(train, labels_per_class, valid_labels_per_class, seed)
    train = train.with_replacement()
    if limit:
        train, test = train.subsample(limit), test.subsample(limit)
    warnings += [*describe_single_class(train), *describe_single_class(test)]
    # ---- Tiny-ImageNet at its own size is decoded into memory ----
    if dataset == "tiny-imagenet" and train.pixels.size == TINY_SIDE and not eval_resize:
        train, test, valid = (
            split and decode_all(split, workers, progress, warnings) for split in (train, test, valid)
        )
    return Data(train, test, valid, *get_statistics(dataset, norm), train.size, warnings)


def describe_counts(dataset: str, train: int, test: int, limit: int) -> list[str]:
    """Return warnings about unusual numbers of training and test images and about --limit."""
    usual_train, usual_test = EXPECTED_COUNTS.get(dataset, (train, test))
    usual = f"{dataset} usually has {usual_train:,} training and {usual_test:,} test images"
    unusual = [f"{usual}; found {train:,} and {test:,}"] if (train, test) != (usual_train, usual_test) else []
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
    interpolation: str = "bilinear",
    num_classes: int | None = None,
    any_classes: bool = False,
    limit: int = 0,
    on_bad_image: str = "stop",
    progress: Callable = lambda items, **kwargs: items,
) -> ImageSet:
    """Load only the test images of load_data(); the training images may be missing. Image files are not decoded yet.

    view: how image files are cropped and resized, in place of image_size, eval_resize and interpolation; shapes and
    CIFAR ignore it.
    any_classes: take a part of ImageNet's classes without num_classes; for callers that match classes by name.
    Raises UserError if images are missing; it names the paths that were tried and the remedy.
    """
    folder, val_folder, labels_file = (name and Path(name) for name in (data_dir, val_data_dir, val_labels))
    if dataset in LAYOUTS:
        image_set = load_cifar_part(dataset, val_folder or folder, [LAYOUTS[dataset].test], download)
        image_set = resize_cifar(image_set, image_size, interpolation)
    elif dataset == "shapes":
        image_set = make_shapes_image_set(1, image_size or 32, num_classes or 10, progress, limit)
    else:
        found = find_evaluation_images(dataset, folder, val_folder, labels_file)
        view = view or get_default_view(dataset, image_size, eval_resize, interpolation)
        image_set = make_image_set(found, view, on_bad_image, dataset == "folder")
    check_class_count(dataset, image_set, num_classes, any_classes)
    image_set = image_set.subsample(limit) if limit else image_set
    return replace(image_set, notes=(*image_set.notes, *describe_single_class(image_set)))


def describe_single_class(image_set: ImageSet) -> list[str]:
    """Return a line if all images are of one class."""
    found, count = image_set.labels.unique().tolist(), format_count(len(image_set), "image")
    if len(found) != 1:
        return []
    name = image_set.classes[found[0]]
    return [f"{image_set.origin}: {count}, all of the class {name!r}; accuracy says nothing about the other classes"]


def check_class_count(dataset: str, image_set: ImageSet, num_classes: int | None, any_classes: bool = False) -> None:
    """Raise UserError if the number of classes is not the expected one."""
    if num_classes and num_classes != len(image_set.classes):
        count = len(image_set.classes)
        found = format_count(count, "class")
        raise UserError(f"--num_classes {num_classes}: {image_set.origin} has {found}; give {count} or leave it out")
    if dataset == "imagenet" and len(image_set.classes) != 1000 and not (num_classes or any_classes):
        raise UserError(
            f"imagenet has 1000 classes, but {image_set.origin} has {len(image_set.classes)}\n"
            f"complete it, or give --num_classes {len(image_set.classes)} to use this subset"
        )


def load_cifar(name: str, train_dir: Path, test_dir: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """Load the training and test images of CIFAR-10 or CIFAR-100."""
    layout = LAYOUTS[name]
    train = load_cifar_part(name, train_dir, layout.train, download)
    return train, load_cifar_part(name, test_dir, [layout.test], download)


def load_cifar_part(name: str, data_dir: Path, files: list[str], download: bool) -> ImageSet:
    """Load the images of some files; the other files may be missing."""
    folder = main_process_first(lambda: find_cifar(name, data_dir, files, download))
    return ImageSet(*read_cifar(name, folder, files), read_class_names(name, folder), str(folder))


def resize_cifar(image_set: ImageSet, image_size: int | None, interpolation: str) -> ImageSet:
    """Return the same images, resized batch by batch if image_size is another size than their own."""
    own = image_size in (None, image_set.size)
    return image_set if own else replace(image_set, resize=SquashedView(image_size, interpolation=interpolation))


def make_shapes_image_set(split: int, size: int, num_classes: int, progress: Callable, max_count: int = 0) -> ImageSet:
    """Draw the training images (split 0) or the test images (split 1); split is also the seed.

    max_count: maximum number of images; 0: SHAPES_COUNTS.
    """
    if num_classes > len(SHAPE_NAMES):
        raise UserError(f"--num_classes {num_classes}: shapes has only {len(SHAPE_NAMES)} classes")
    count = min(SHAPES_COUNTS[split], max_count or SHAPES_COUNTS[split])
    drawn = draw_shapes(count, size, num_classes=num_classes, seed=split, progress=progress)
    origin = f"the shapes generator, seed {split}"
    return ImageSet(drawn.pop("images"), drawn.pop("labels"), SHAPE_NAMES[:num_classes], origin, drawn)


def get_default_view(
    dataset: str, image_size: int | None, eval_resize: int | None, interpolation: str = "bilinear"
) -> CenterCrop:
    """Return the crop of evaluation images. Raises UserError if the crop is larger than the resized image."""
    size = image_size or (224 if dataset == "imagenet" else TINY_SIDE)
    resize = eval_resize or (default_eval_resize(size) if dataset == "imagenet" else size)
    if resize < size:
        raise UserError(
            f"--eval_resize {resize}: smaller than the crop of {size} pixels; give at least {size}, or a smaller "
            "--image_size"
        )
    return CenterCrop(size, resize, interpolation)
