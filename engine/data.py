"""Data sets and their parts: uint8 images with labels. engine/batches.py feeds them to a network."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.cifar import LAYOUTS, class_names, find_cifar, read_cifar
from engine.cli import UserError
from engine.folders import Found, find_folder, find_imagenet, find_tiny_imagenet
from engine.image_files import CentreView, ImageFiles, View
from engine.shapes import CLASSES as SHAPE_NAMES
from engine.shapes import draw_shapes

STATISTICS = {  # mean and std of pixels in 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
WITHOUT_STATISTICS = {"folder": "imagenet", "shapes": "half"}  # whose they use
USUAL_COUNTS = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "tiny-imagenet": (100_000, 10_000)}
USUAL_COUNTS["imagenet"] = (1_281_167, 50_000)
FINDERS = {"imagenet": find_imagenet, "tiny-imagenet": find_tiny_imagenet, "folder": find_folder}
SHAPES_COUNTS = (5000, 1000)
TINY_SIDE = 64


@dataclass
class Part:
    """One part of a data set: pixels in a uint8 tensor (N, H, W, 3), or files that are read batch by batch."""

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor  # (N,) long
    classes: list[str]
    where: str
    notes: dict[str, torch.Tensor] = field(default_factory=dict)  # true boxes and masks, where the set has them

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Part":
        """The images at these positions, in this order."""
        notes = {key: value[index] for key, value in self.notes.items()}
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], notes=notes)

    def summary(self, name: str) -> str:
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        return (
            f"{name}: {len(self):,} images of {len(self.classes)} classes, {counts.min():,} to {counts.max():,} a "
            f"class, from {self.where}"
        )


@dataclass
class Data:
    """The parts of a data set, and the mean and std to normalise by."""

    train: Part
    test: Part
    valid: Part | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    warnings: list[str]

    @property
    def classes(self) -> list[str]:
        return self.train.classes


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
    """Read a data set; the parameters are the flags of the same names.

    progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError with what was looked for and the
    remedy.
    """
    if dataset in LAYOUTS:
        train, test = load_cifar(dataset, Path(data_dir), Path(val_data_dir or data_dir), download)
    elif dataset == "shapes":
        train, test = load_shapes(
            image_size or 32,
            num_classes or 10,
            progress,
            most=0 if labels_per_class or valid_labels_per_class else limit,
        )
    else:
        view = view_of(dataset, image_size, eval_resize)
        places = [place and Path(place) for place in (data_dir, val_data_dir, val_labels)]
        if dataset == "tiny-imagenet":
            del places[2]  # it says its labels itself
        train, test = (part_of_files(part, view, on_bad_image) for part in FINDERS[dataset](*places))
    warnings = []
    counts = (len(train), len(test))
    if counts != USUAL_COUNTS.get(dataset, counts):
        usual = USUAL_COUNTS[dataset]
        warnings.append(
            f"{dataset} usually has {usual[0]:,} training and {usual[1]:,} test images, here are {counts[0]:,} "
            f"and {counts[1]:,}"
        )
    if num_classes and num_classes != len(train.classes):
        raise UserError(f"--num_classes {num_classes}: the data in {train.where} has {len(train.classes)} classes")
    if dataset == "imagenet" and len(train.classes) != 1000 and not num_classes:
        raise UserError(
            f"imagenet has 1000 classes, {train.where} has {len(train.classes)}\n"
            f"complete it, or say --num_classes {len(train.classes)} if a part of it is what you want"
        )
    train, valid = split(train, labels_per_class, valid_labels_per_class, seed)
    if limit:
        train, test = (part.take(torch.arange(min(limit, len(part)))) for part in (train, test))
        warnings.append(f"--limit {limit}: results are partial")
    if dataset == "tiny-imagenet" and view.size == view.resize == TINY_SIDE:
        train, test, valid = (part and decoded(part, workers, progress, warnings) for part in (train, test, valid))
    side = train.pixels.shape[1] if isinstance(train.pixels, torch.Tensor) else train.pixels.size
    if image_size not in (None, side):
        raise UserError(f"--image_size {image_size}: the images of {dataset} have {side} pixels a side")
    mean, std = STATISTICS[WITHOUT_STATISTICS.get(dataset, dataset) if norm == "own" else norm]
    return Data(train, test, valid, mean, std, side, warnings)


def split(train: Part, labels_per_class: int, valid_labels_per_class: int, seed: int) -> tuple[Part, Part | None]:
    """Keep labels_per_class images of each class (0: all the others), and valid_labels_per_class for validation."""
    if not labels_per_class and not valid_labels_per_class:
        return train, None
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label, name in enumerate(train.classes):
        of_class = (train.labels == label).nonzero().flatten()
        if labels_per_class + valid_labels_per_class > len(of_class):
            raise UserError(
                f"class {name!r} has {len(of_class)} images, fewer than --labels_per_class {labels_per_class} and "
                f"--valid_labels_per_class {valid_labels_per_class} together"
            )
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        rest = shuffled[valid_labels_per_class:]
        held.append(shuffled[:valid_labels_per_class])
        kept.append(rest[:labels_per_class] if labels_per_class else rest)
    valid = train.take(torch.cat(held).sort().values) if valid_labels_per_class else None
    return train.take(torch.cat(kept).sort().values), valid


def load_cifar(name: str, train_dir: Path, test_dir: Path, download: bool) -> tuple[Part, Part]:
    layout = LAYOUTS[name]
    train_place = find_cifar(name, train_dir, download)
    test_place = train_place if test_dir == train_dir else find_cifar(name, test_dir, download)
    classes = class_names(name, train_place)
    train = Part(*read_cifar(name, train_place, layout.train), classes, str(train_place))
    return train, Part(*read_cifar(name, test_place, [layout.test]), classes, str(test_place))


def load_shapes(size: int, num_classes: int, progress: Callable, most: int = 0) -> tuple[Part, Part]:
    """Both parts, with no more than `most` images if it is not 0."""
    if num_classes > len(SHAPE_NAMES):
        raise UserError(f"--num_classes {num_classes}: shapes has {len(SHAPE_NAMES)} classes")
    parts = []
    for seed, count in enumerate(SHAPES_COUNTS):
        drawn = draw_shapes(min(count, most or count), size, num_classes=num_classes, seed=seed, progress=progress)
        where = f"the generator of shapes, seed {seed}"
        parts.append(Part(drawn.pop("images"), drawn.pop("labels"), SHAPE_NAMES[:num_classes], where, drawn))
    return parts[0], parts[1]


def view_of(dataset: str, image_size: int | None, eval_resize: int | None) -> CentreView:
    """How evaluation images of this set are cut out. Raises UserError for a centre that is larger than the image."""
    size = image_size or (224 if dataset == "imagenet" else TINY_SIDE)
    resize = eval_resize or (round(size * 256 / 224) if dataset == "imagenet" else size)
    if resize < size:
        raise UserError(
            f"--eval_resize {resize}: smaller than the {size} pixels of --image_size that are cut out of it"
        )
    return CentreView(size, resize)


def find_copies(
    place: str,
    like: Part,
    *,
    dataset: str,
    limit: int = 0,
    labels_per_class: int = 0,
    valid_labels_per_class: int = 0,
    seed: int = 0,
) -> Part:
    """Resized copies of the training images `like`, below `place`. Raises UserError where they are other images."""
    found = FINDERS[dataset](Path(place), None)[0]
    part = part_of_files(found, like.pixels.view, like.pixels.on_bad_image)
    part, _ = split(part, labels_per_class, valid_labels_per_class, seed)
    part = part.take(torch.arange(min(limit, len(part)))) if limit else part
    if part.classes != like.classes or not torch.equal(part.labels, like.labels):
        raise UserError(
            f"{part.where} and {like.where} hold different images: {len(part):,} and {len(like):,} of "
            f"{len(part.classes)} and {len(like.classes)} classes\nmake the copies anew with --resize_to"
        )
    return part


def part_of_files(found: Found, view: View, on_bad_image: str) -> Part:
    pixels = ImageFiles(found.files, view, on_bad_image)
    return Part(pixels, found.labels, found.classes, str(found.where))


def decoded(part: Part, workers: int, progress: Callable, warnings: list[str]) -> Part:
    """The same part with its images read into one tensor."""
    pixels, places = part.pixels.read_all(workers, progress)
    if skipped := int((places != torch.arange(len(part))).sum()):
        warnings.append(f"{skipped} unreadable files of {part.where} were skipped")
    return replace(part, pixels=pixels, labels=part.labels[places])
