"""Data sets and their parts: uint8 images with labels. engine/batches.py feeds them to a network."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.cifar import LAYOUTS, class_names, find_cifar, read_cifar
from engine.cli import UserError
from engine.distributed import check_same, in_turn
from engine.draws import uniform
from engine.folders import (
    FileList,
    Found,
    find_evaluation,
    find_folder,
    find_imagenet,
    find_tiny_evaluation,
    find_tiny_imagenet,
    find_training,
)
from engine.image_files import CentreView, ImageFiles, View
from engine.phases import large_side
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
IN_MEMORY = 2**31  # bytes of decoded images that are kept, where they are looked at many times


@dataclass
class Part:
    """One part of a data set: pixels in a uint8 tensor (N, H, W, 3), or files that are read batch by batch."""

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor  # (N,) long
    classes: list[str]
    where: str
    notes: dict[str, torch.Tensor] = field(default_factory=dict)  # true boxes and masks, where the set has them
    files: FileList | None = None  # the file of each image, where it came from one

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Part":
        """The images at these positions, in this order."""
        notes = {key: value[index] for key, value in self.notes.items()}
        files = self.files[index] if self.files is not None else None
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], notes=notes, files=files)

    def spread(self, most: int) -> "Part":
        """At most so many images, from all over the part and always the same ones: one drawn from each of as many
        stretches. Evenly spaced ones would be of few classes where the classes take turns.
        """
        count = min(most, len(self))
        ends = torch.arange(count + 1) * len(self) // max(count, 1)
        drawn = uniform(torch.arange(count), (), seed=0, purpose="a few of a part")
        return self.take(ends[:-1] + (drawn * ends.diff()).long())

    def seen_as(self, view: View) -> "Part":
        """The same image files, cut out in another way."""
        return replace(self, pixels=self.pixels.with_view(view))

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
    check_class_count(dataset, train, num_classes)
    train, valid = split(train, labels_per_class, valid_labels_per_class, seed)
    if limit:
        train, test = (part.take(torch.arange(min(limit, len(part)))) for part in (train, test))
        warnings.append(f"--limit {limit}: results are partial")
    if dataset == "tiny-imagenet" and view.size == TINY_SIDE and not eval_resize:
        train, test, valid = (part and decoded(part, workers, progress, warnings) for part in (train, test, valid))
    side = check_side(dataset, train, image_size)
    mean, std = STATISTICS[WITHOUT_STATISTICS.get(dataset, dataset) if norm == "own" else norm]
    return Data(train, test, valid, mean, std, side, warnings)


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
) -> Part:
    """The test part that load_data() gives, where the training images need not be there; image files stay files.

    view: how image files are cut out, in place of what image_size says; shapes and CIFAR have none. Raises UserError
    with what was looked for and the remedy.
    """
    place, val_place, labels = (name and Path(name) for name in (data_dir, val_data_dir, val_labels))
    if dataset in LAYOUTS:
        part = cifar_part(
            dataset, in_turn(lambda: find_cifar(dataset, val_place or place, download)), [LAYOUTS[dataset].test]
        )
        check_side(dataset, part, image_size)
    elif dataset == "shapes":
        part = shapes_part(1, image_size or 32, num_classes or 10, progress, limit)
    else:
        tiny = dataset == "tiny-imagenet"
        found = find_tiny_evaluation(place, val_place) if tiny else find_evaluation(dataset, place, val_place, labels)
        part = part_of_files(found, view or view_of(dataset, image_size, eval_resize), on_bad_image)
    check_class_count(dataset, part, num_classes)
    return part.take(torch.arange(min(limit, len(part)))) if limit else part


def check_class_count(dataset: str, part: Part, num_classes: int | None) -> None:
    if num_classes and num_classes != len(part.classes):
        raise UserError(f"--num_classes {num_classes}: the data in {part.where} has {len(part.classes)} classes")
    if dataset == "imagenet" and len(part.classes) != 1000 and not num_classes:
        raise UserError(
            f"imagenet has 1000 classes, {part.where} has {len(part.classes)}\n"
            f"complete it, or say --num_classes {len(part.classes)} if a part of it is what you want"
        )


def check_side(dataset: str, part: Part, image_size: int | None) -> int:
    """The side of the images. Raises UserError where image_size is another."""
    side = part.pixels.shape[1] if isinstance(part.pixels, torch.Tensor) else part.pixels.size
    if image_size not in (None, side):
        raise UserError(f"--image_size {image_size}: the images of {dataset} have {side} pixels a side")
    return side


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
    train_place = in_turn(lambda: find_cifar(name, train_dir, download))
    test_place = train_place if test_dir == train_dir else in_turn(lambda: find_cifar(name, test_dir, download))
    return cifar_part(name, train_place, layout.train), cifar_part(name, test_place, [layout.test])


def cifar_part(name: str, place: Path, files: list[str]) -> Part:
    return Part(*read_cifar(name, place, files), class_names(name, place), str(place))


def load_shapes(size: int, num_classes: int, progress: Callable, most: int = 0) -> tuple[Part, Part]:
    """Both parts, with no more than `most` images if it is not 0."""
    train, test = (shapes_part(seed, size, num_classes, progress, most) for seed in (0, 1))
    return train, test


def shapes_part(seed: int, size: int, num_classes: int, progress: Callable, most: int = 0) -> Part:
    """seed: 0 for the training part, 1 for the test part."""
    if num_classes > len(SHAPE_NAMES):
        raise UserError(f"--num_classes {num_classes}: shapes has {len(SHAPE_NAMES)} classes")
    count = min(SHAPES_COUNTS[seed], most or SHAPES_COUNTS[seed])
    drawn = draw_shapes(count, size, num_classes=num_classes, seed=seed, progress=progress)
    where = f"the generator of shapes, seed {seed}"
    return Part(drawn.pop("images"), drawn.pop("labels"), SHAPE_NAMES[:num_classes], where, drawn)


def view_of(dataset: str, image_size: int | None, eval_resize: int | None) -> CentreView:
    """How evaluation images of this set are cut out. Raises UserError for a centre that is larger than the image."""
    size = image_size or (224 if dataset == "imagenet" else TINY_SIDE)
    resize = eval_resize or (large_side(size) if dataset == "imagenet" else size)
    if resize < size:
        raise UserError(
            f"--eval_resize {resize}: smaller than the {size} pixels of --image_size that are cut out of it"
        )
    return CentreView(size, resize)


def with_copies(data: Data, places: dict[str, str | None]) -> dict[str, Part]:
    """The training images `original`, and their resized copies by name (the originals where there is no place).

    places: name -> folder, as --data_NAME gives it. With --on_bad_image skip, images without a copy leave the training
    part. Raises UserError for copies of other images, and otherwise where some are missing.
    """
    names, found = data.train.pixels.files.names(), {}
    for name, place in places.items():
        if place:
            copies = find_training(f"--data_{name}", Path(place))
            there = dict(zip(copies.files.names(), range(len(copies.files)), strict=True))
            index = torch.tensor([there.get(file, -1) for file in names])
            check_copies(f"--data_{name} {place}", data.train, [names[i] for i in (index < 0).nonzero().flatten()])
            found[name] = copies, index
    kept = torch.stack([torch.ones(len(names)) >= 0, *(index >= 0 for _, index in found.values())]).all(0)
    if not kept.all():
        data.warnings.append(f"{int((~kept).sum()):,} training images have no copy and are left out")
        data.train = data.train.take(kept.nonzero().flatten())
    parts = dict.fromkeys(["original", *places], data.train)
    for name, (copies, index) in found.items():
        files = copies.files[index[kept]]
        pixels = ImageFiles(files, data.train.pixels.view, data.train.pixels.on_bad_image)
        parts[name] = replace(data.train, pixels=pixels, where=str(copies.where), files=files)
    return parts


def check_copies(what: str, originals: Part, missing: list[str]) -> None:
    if len(missing) > len(originals) / 2:
        raise UserError(
            f"{what}: copies of other images than the {len(originals):,} in {originals.where}; no {missing[0]} there"
            "\nmake them anew with --resize_to"
        )
    if missing and originals.pixels.on_bad_image == "stop":
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise UserError(
            f"{what}: no copy of {missing[0]}{more}\ncomplete them with --resize_to, which lists what it cannot read; "
            "--on_bad_image skip leaves such images out"
        )


def part_of_files(found: Found, view: View, on_bad_image: str) -> Part:
    pixels = ImageFiles(found.files, view, on_bad_image)
    return Part(pixels, found.labels, found.classes, str(found.where), files=found.files)


def in_memory(part: Part, workers: int, progress: Callable, warnings: list[str]) -> Part:
    """The same part with its image files decoded, unless that would take more than IN_MEMORY bytes."""
    if isinstance(part.pixels, torch.Tensor) or 3 * len(part) * part.pixels.size**2 > IN_MEMORY:
        return part
    return decoded(part, workers, progress, warnings)


def of_classes(part: Part, place: torch.Tensor, classes: list[str]) -> Part:
    """The images whose class is one of `classes`, with labels among these. place (len(part.classes),): which of them
    each class of the part is, -1 for none.
    """
    labels = place[part.labels]
    known = (labels >= 0).nonzero().flatten()
    return replace(part.take(known), labels=labels[known], classes=classes)


def decoded(part: Part, workers: int, progress: Callable, warnings: list[str]) -> Part:
    """The same part with its images read into one tensor."""
    pixels, places = part.pixels.read_all(workers, progress)
    if skipped := int((places != torch.arange(len(part))).sum()):
        warnings.append(f"{skipped} unreadable files of {part.where} were skipped")
    return replace(part, pixels=pixels, labels=part.labels[places], files=part.pixels.files[places])


def check_alike(data: Data) -> None:
    """Raise UserError where the processes found different images."""
    parts = {"training images": data.train, "test images": data.test, "validation images": data.valid}
    found = {name: f"{len(part)}" for name, part in parts.items() if part}
    found["classes"] = ", ".join(data.classes)
    found |= {f"labels of the {name}": fingerprint(part.labels) for name, part in parts.items() if part}
    check_same("data", found, "every machine needs the same copy of the data set")


def fingerprint(labels: torch.Tensor) -> int:
    """A number that tells two lists of labels apart."""
    weights = torch.arange(1, len(labels) + 1) % 1_000_003
    return int((labels.long() * weights).sum())
