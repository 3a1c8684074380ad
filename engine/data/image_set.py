"""Hold the splits of a data set: uint8 images with labels, in memory or as files."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from engine.data.folders import DataFiles, FileList
from engine.data.image_files import ImageFiles
from engine.data.resize import resize_pixels
from engine.data.sample_rng import uniform
from engine.data.views import SquashedView, View
from engine.errors import UserError
from engine.runtime.distributed import check_same_value
from engine.runtime.text import format_count

STATISTICS = {  # mean and std of pixels in 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # of many codes: the mean std of an image
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dpn": ((124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
DEFAULT_STATISTICS = {"folder": "imagenet", "shapes": "half"}  # for data sets without their own statistics
MAX_MEMORY_BYTES = 2**31  # limit for decoded images that load_into_memory() keeps


def get_statistics(dataset: str, norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std to normalise a data set with. norm: `own`, or a name in STATISTICS."""
    return STATISTICS[DEFAULT_STATISTICS.get(dataset, dataset) if norm == "own" else norm]


@dataclass
class ImageSet:
    """One split of a data set: pixels in a uint8 tensor (N, H, W, 3), or files that are decoded batch by batch."""

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor  # (N,) long
    classes: list[str]
    origin: str  # source of the images, shown in messages
    annotations: dict[str, torch.Tensor] = field(default_factory=dict)  # boxes and masks, if the set has any
    files: FileList | None = None  # the file of each image, if the images are from files
    notes: tuple[str, ...] = ()  # lines on files that were not read, to show to the user
    unreadable: int = 0  # number of files that decode_all() left out
    resize: SquashedView | None = None  # of images in a tensor, after they are cropped; None: they keep their size

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """The side of the images of a batch, in pixels."""
        if not isinstance(self.pixels, torch.Tensor):
            return self.pixels.size
        return self.resize.size if self.resize else self.pixels.shape[1]

    def resize_batch(self, pixels: torch.Tensor) -> torch.Tensor:
        """Resize pixels of the set, uint8 (B, H, W, 3), to its size."""
        if self.resize is None:
            return pixels
        return resize_pixels(pixels, self.resize.size, self.resize.size, self.resize.interpolation)

    def take(self, index: torch.Tensor) -> "ImageSet":
        """Return the images at these indices, in this order."""
        annotations = {key: value[index] for key, value in self.annotations.items()}
        files = self.files[index] if self.files is not None else None
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], annotations=annotations, files=files)

    def subsample(self, max_count: int) -> "ImageSet":
        """Return max_count images of all classes, or all images if there are fewer; see spread_over_classes()."""
        return self.take(spread_over_classes(self.labels, max_count))

    def with_view(self, view: View) -> "ImageSet":
        """Return the same image files with another crop and resize."""
        return replace(self, pixels=self.pixels.with_view(view))

    def with_replacement(self) -> "ImageSet":
        """Return the same images; unreadable files that would be left out are replaced by others. Training needs this,
        since its batches must be full.
        """
        return self if isinstance(self.pixels, torch.Tensor) else replace(self, pixels=self.pixels.with_replacement())

    def summary(self, split: str) -> str:
        """Return one line with the numbers of images and classes. split: `training`, `validation` or `test`."""
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        fewest, most = int(counts.min()), int(counts.max())
        per_class = f"{most:,} each" if fewest == most else f"{fewest:,} to {most:,} per class"
        images, classes = format_count(len(self), f"{split} image"), format_count(len(self.classes), "class")
        return f"{images}, {classes}, {per_class}, from {self.origin}"


@dataclass
class Data:
    """The splits of a data set, and the mean and std to normalise them with."""

    train: ImageSet
    test: ImageSet
    valid: ImageSet | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int  # side of the images in pixels
    warnings: list[str]  # lines that are shown to the user

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    @property
    def held_out(self) -> dict[str, ImageSet]:
        """The splits that are evaluated after each epoch, by name."""
        return {"test": self.test, **({"valid": self.valid} if self.valid else {})}


def spread_over_classes(labels: torch.Tensor, max_count: int) -> torch.Tensor:
    """Return the indices of max_count images, or of all if there are fewer: sorted, and the same in every call.

    labels (N,). Each class has about the same share of the chosen images as of all, and at least one if there are
    enough. The images of a class are cut into equal intervals, and one image is drawn from each.
    """
    count, order = min(max_count, len(labels)), labels.argsort(stable=True)
    if not count:
        return order[:0]
    sizes = torch.bincount(labels)
    sizes = sizes[sizes > 0]
    if count < len(sizes):  # the intervals hold several classes
        sizes = torch.tensor([len(labels)])
    shares = (sizes - 1).cumsum(0) * (count - len(sizes)) // max(len(labels) - len(sizes), 1)
    counts = 1 + shares.diff(prepend=shares.new_zeros(1))  # the first image of each class, and a share of the others
    groups = zip((sizes.cumsum(0) - sizes).tolist(), sizes.tolist(), counts.tolist(), strict=True)
    ends = [start + torch.arange(wanted) * size // wanted for start, size, wanted in groups]
    ends = torch.cat([*ends, torch.tensor([len(labels)])])
    drawn = uniform(torch.arange(count), (), seed=0, purpose="a few of a part")
    return order[ends[:-1] + (drawn * ends.diff()).long()].sort().values


def split_by_class(
    train: ImageSet, labels_per_class: int, valid_labels_per_class: int, seed: int
) -> tuple[ImageSet, ImageSet | None]:
    """Split the training images: labels_per_class training and valid_labels_per_class validation images of each class.

    labels_per_class 0 keeps all remaining images. Raises UserError if a class has too few images.
    """
    if not labels_per_class and not valid_labels_per_class:
        return train, None
    generator = torch.Generator().manual_seed(seed)
    kept, held_out = [], []
    for label, name in enumerate(train.classes):
        indices = (train.labels == label).nonzero().flatten()
        if labels_per_class + valid_labels_per_class > len(indices):
            raise UserError(
                f"class {name!r} has {len(indices)} images, fewer than --labels_per_class {labels_per_class} plus "
                f"--valid_labels_per_class {valid_labels_per_class}; lower one of them"
            )
        shuffled = indices[torch.randperm(len(indices), generator=generator)]
        rest = shuffled[valid_labels_per_class:]
        held_out.append(shuffled[:valid_labels_per_class])
        kept.append(rest[:labels_per_class] if labels_per_class else rest)
    valid = train.take(torch.cat(held_out).sort().values) if valid_labels_per_class else None
    return train.take(torch.cat(kept).sort().values), valid


def make_image_set(found: DataFiles, view: View, on_bad_image: str, upright: bool = False) -> ImageSet:
    """Return an image set of files. upright: apply the EXIF orientation of the images."""
    found.files.upright = upright
    pixels = ImageFiles(found.files, view, on_bad_image)
    return ImageSet(pixels, found.labels, found.classes, str(found.root), files=found.files, notes=found.notes)


def load_into_memory(image_set: ImageSet, workers: int, progress: Callable, warnings: list[str]) -> ImageSet:
    """Decode the image files of the set, unless they need more than MAX_MEMORY_BYTES."""
    if isinstance(image_set.pixels, torch.Tensor) or 3 * len(image_set) * image_set.pixels.size**2 > MAX_MEMORY_BYTES:
        return image_set
    return decode_all(image_set, workers, progress, warnings)


def select_classes(image_set: ImageSet, class_map: torch.Tensor, classes: list[str]) -> ImageSet:
    """Keep the images whose class is in `classes`, and relabel them.

    class_map (len(image_set.classes),): index in `classes` of each class of the set; -1: not in `classes`.
    """
    labels = class_map[image_set.labels]
    known = (labels >= 0).nonzero().flatten()
    return replace(image_set.take(known), labels=labels[known], classes=classes)


def decode_all(image_set: ImageSet, workers: int, progress: Callable, warnings: list[str]) -> ImageSet:
    """Decode all images of the set into one tensor. Adds a warning if files are unreadable, and raises UserError if all
    of them are.
    """
    pixels, index = image_set.pixels.read_all(workers, progress)
    unreadable = count_missing(torch.arange(len(image_set)), index)
    check_any_readable(len(index), unreadable, image_set)
    if unreadable:
        warnings.append(describe_unreadable(unreadable, image_set))
    left_out = len(image_set) - len(index)
    return replace(image_set.take(index), pixels=pixels, unreadable=left_out)


def count_missing(wanted: torch.Tensor, loaded: torch.Tensor) -> int:
    """Return how many of the indices `wanted` are not among those that were loaded."""
    return 0 if torch.equal(wanted, loaded) else int((~torch.isin(wanted, loaded)).sum())


def describe_unreadable(count: int, image_set: ImageSet) -> str:
    """Return a note on files of the set that cannot be read."""
    replaced = isinstance(image_set.pixels, ImageFiles) and image_set.pixels.on_bad_image == "replace"
    outcome = "another image is used for each" if replaced else "left out"
    return f"{format_count(count, 'file')} of {image_set.origin} cannot be read: {outcome}"


def check_any_readable(loaded: int, unreadable: int, image_set: ImageSet) -> None:
    """Raise UserError if files of the set were unreadable and none was loaded."""
    if unreadable and not loaded:
        raise UserError(
            f"{image_set.origin}: none of the image files can be read\nreplace them, or choose other images"
        )


def check_same_images(data: Data) -> None:
    """Raise UserError if the processes loaded different images."""
    splits = {"training images": data.train, "test images": data.test, "validation images": data.valid}
    found = {name: f"{len(image_set)}" for name, image_set in splits.items() if image_set}
    found["classes"] = ", ".join(data.classes)
    found |= {f"labels of the {name}": hash_labels(image_set.labels) for name, image_set in splits.items() if image_set}
    check_same_value("data", found, "use the same copy of the data set on every machine")


def hash_labels(labels: torch.Tensor) -> int:
    """Return a checksum of the labels, to compare them between processes."""
    weights = torch.arange(1, len(labels) + 1) % 1_000_003
    return int((labels.long() * weights).sum())
