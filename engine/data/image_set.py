"""Image sets: uint8 images with labels, in memory or as files; a data set is up to three of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from engine.data.folders import DataFiles, FileList
from engine.data.image_files import ImageFiles
from engine.data.sample_rng import uniform
from engine.data.views import View
from engine.errors import UserError
from engine.runtime.distributed import check_same_value

STATISTICS = {  # mean and std of pixels in 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
DEFAULT_STATISTICS = {"folder": "imagenet", "shapes": "half"}  # of data sets without their own
MAX_MEMORY_BYTES = 2**31  # of decoded images that are kept in memory


def get_statistics(dataset: str, norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std to normalise a data set by. norm: `own`, or a name in STATISTICS."""
    return STATISTICS[DEFAULT_STATISTICS.get(dataset, dataset) if norm == "own" else norm]


@dataclass
class ImageSet:
    """One split of a data set: pixels in a uint8 tensor (N, H, W, 3), or files that are decoded batch by batch."""

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor  # (N,) long
    classes: list[str]
    origin: str  # where the images come from, for messages
    annotations: dict[str, torch.Tensor] = field(default_factory=dict)  # boxes and masks, of sets that have them
    files: FileList | None = None  # the file of each image, if it came from one

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "ImageSet":
        """The images at these positions, in this order."""
        annotations = {key: value[index] for key, value in self.annotations.items()}
        files = self.files[index] if self.files is not None else None
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], annotations=annotations, files=files)

    def first(self, most: int) -> "ImageSet":
        """At most so many images, from the first on."""
        return self.take(torch.arange(min(most, len(self))))

    def subsample(self, most: int) -> "ImageSet":
        """At most so many images, from all over the set and always the same: one is drawn from each of as many equal
        stretches. Evenly spaced images would be of few classes where the classes take turns.
        """
        count = min(most, len(self))
        ends = torch.arange(count + 1) * len(self) // max(count, 1)
        drawn = uniform(torch.arange(count), (), seed=0, purpose="a few of a part")
        return self.take(ends[:-1] + (drawn * ends.diff()).long())

    def with_view(self, view: View) -> "ImageSet":
        """The same image files, cut out by another view."""
        return replace(self, pixels=self.pixels.with_view(view))

    def summary(self, name: str) -> str:
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        return (
            f"{name}: {len(self):,} images of {len(self.classes)} classes, {counts.min():,} to {counts.max():,} a "
            f"class, from {self.origin}"
        )


@dataclass
class Data:
    """The parts of a data set, and the mean and std to normalise by."""

    train: ImageSet
    test: ImageSet
    valid: ImageSet | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    warnings: list[str]

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def held_out(self) -> dict[str, ImageSet]:
        """The parts that are evaluated after each epoch, by name."""
        return {"test": self.test, **({"valid": self.valid} if self.valid else {})}


def split_by_class(
    train: ImageSet, labels_per_class: int, valid_labels_per_class: int, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    """Training images, labels_per_class of each class (0: all the rest), and validation images, valid_labels_per_class
    of each.
    """
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


def make_image_set(found: DataFiles, view: View, on_bad_image: str) -> ImageSet:
    pixels = ImageFiles(found.files, view, on_bad_image)
    return ImageSet(pixels, found.labels, found.classes, str(found.root), files=found.files)


def load_into_memory(image_set: ImageSet, workers: int, progress: Callable, warnings: list[str]) -> ImageSet:
    """The set with its image files decoded, unless that takes more than MAX_MEMORY_BYTES."""
    if isinstance(image_set.pixels, torch.Tensor) or 3 * len(image_set) * image_set.pixels.size**2 > MAX_MEMORY_BYTES:
        return image_set
    return decode_all(image_set, workers, progress, warnings)


def select_classes(image_set: ImageSet, class_map: torch.Tensor, classes: list[str]) -> ImageSet:
    """The images whose class is one of `classes`, with labels among these. class_map (len(image_set.classes),):
    which of them each class of the set is; -1: none.
    """
    labels = class_map[image_set.labels]
    known = (labels >= 0).nonzero().flatten()
    return replace(image_set.take(known), labels=labels[known], classes=classes)


def decode_all(image_set: ImageSet, workers: int, progress: Callable, warnings: list[str]) -> ImageSet:
    """The set with its images decoded into one tensor."""
    pixels, loaded_index = image_set.pixels.read_all(workers, progress)
    if skipped := int((loaded_index != torch.arange(len(image_set))).sum()):
        warnings.append(f"{skipped} unreadable files of {image_set.origin} were skipped")
    return replace(
        image_set, pixels=pixels, labels=image_set.labels[loaded_index], files=image_set.pixels.files[loaded_index]
    )


def check_same_images(data: Data) -> None:
    """Raise UserError if the processes found different images."""
    parts = {"training images": data.train, "test images": data.test, "validation images": data.valid}
    found = {name: f"{len(image_set)}" for name, image_set in parts.items() if image_set}
    found["classes"] = ", ".join(data.classes)
    found |= {f"labels of the {name}": hash_labels(image_set.labels) for name, image_set in parts.items() if image_set}
    check_same_value("data", found, "every machine needs the same copy of the data set")


def hash_labels(labels: torch.Tensor) -> int:
    """A checksum."""
    weights = torch.arange(1, len(labels) + 1) % 1_000_003
    return int((labels.long() * weights).sum())
