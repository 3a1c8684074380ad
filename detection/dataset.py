"""Image sets with ground-truth boxes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.data.decode import BadImage, decode_image
from engine.data.image_set import spread_over_classes
from engine.runtime.text import format_count


@dataclass
class DetectionSet:
    """The training or test images of a detection data set, with their ground truth."""

    classes: list[str]  # class names without the background: label k is classes[k - 1]
    names: list[str]  # image names such as VOC2007/000005
    images: list[Path] | list[torch.Tensor]  # image files, or uint8 tensors (3, H, W)
    # boxes (N, 4) float32, labels (N,) int64, difficult (N,) bool; of COCO also area (N,) float64 in square pixels
    targets: list[dict[str, torch.Tensor]]
    sizes: list[tuple[int, int]]  # height and width of each image
    origin: str  # where the images come from, for messages
    warnings: list[str] = field(default_factory=list)  # lines that are shown to the user
    turned: set[str] = field(default_factory=set)  # names of the images whose EXIF orientation is applied
    flag: str = "difficult"  # what objects with the flag `difficult` are: `difficult`, or `crowd` of COCO
    image_ids: list[int] | None = None  # of COCO: ids by which predictions name images; None: their names
    category_ids: list[int] | None = None  # of COCO: ids by which predictions name classes; None: labels

    def __len__(self) -> int:
        return len(self.names)

    def summary(self, name: str) -> str:
        """Return one line with the numbers of images, objects and classes. name: `training` or `test`."""
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(target["labels"] for target in self.targets)])
        counts = torch.bincount(labels, minlength=len(self.classes) + 1)[1:]
        difficult = sum(int(target["difficult"].sum()) for target in self.targets)
        fewest, most = (f"{counts[k]:,} ({self.classes[k]})" for k in (int(counts.argmin()), int(counts.argmax())))
        per_class = f"{fewest} to {most} objects per class" if counts.min() < counts.max() else f"{counts[0]:,} each"
        return (
            f"{format_count(len(self), f'{name} image')}, {format_count(len(labels), 'object')} ({difficult:,} "
            f"{self.flag}), {format_count(len(self.classes), 'class')}, {per_class}, from {self.origin}"
        )

    def take(self, indices: Sequence[int]) -> "DetectionSet":
        """Return the images at these positions, in this order."""
        columns = {"names": self.names, "images": self.images, "targets": self.targets, "sizes": self.sizes}
        if self.image_ids is not None:
            columns["image_ids"] = self.image_ids
        chosen = {key: [column[index] for index in indices] for key, column in columns.items()}
        return replace(self, **chosen, warnings=list(self.warnings))

    def subsample(self, max_count: int) -> "DetectionSet":
        """Return max_count images, or all if there are fewer, spread over the classes of their first objects."""
        return self.take(choose_spread([target["labels"].tolist() for target in self.targets], max_count))

    def reorder_classes(self, classes: Sequence[str]) -> "DetectionSet":
        """Return the same images with the classes in this order. Other class names: the set as it is."""
        if list(classes) == self.classes or sorted(classes) != sorted(self.classes):
            return self
        old = [self.classes.index(name) for name in classes]
        labels = torch.zeros(len(old) + 1, dtype=torch.int64)
        labels[torch.tensor(old) + 1] = torch.arange(1, len(old) + 1)
        targets = [{**target, "labels": labels[target["labels"]]} for target in self.targets]
        ids = self.category_ids and [self.category_ids[index] for index in old]
        return replace(self, classes=list(classes), targets=targets, category_ids=ids)

    def without_difficult(self) -> "DetectionSet":
        """Return the same images without the objects that are marked difficult."""
        targets = [{key: value[~target["difficult"]] for key, value in target.items()} for target in self.targets]
        return replace(self, targets=targets, warnings=list(self.warnings))

    def read(self, index: int) -> torch.Tensor:
        """Return the image as RGB uint8 (3, H, W).

        Raises BadImage, which names the file, if it cannot be decoded or its size differs from its annotation.
        """
        path = self.images[index]
        if isinstance(path, torch.Tensor):
            return path
        pixels = decode_image(path, upright=self.names[index] in self.turned)
        if pixels.shape[:2] != self.sizes[index]:
            (height, width), (rows, columns) = self.sizes[index], pixels.shape[:2]
            raise BadImage(
                f"{path}: the image has {columns} x {rows} pixels, but its annotation says {width} x {height}; check "
                "that the two files belong together"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def choose_spread(labels: Sequence[Sequence[int]], max_count: int) -> list[int]:
    """Return the positions of max_count images, or of all if there are fewer, spread over the classes.

    labels: those of the objects in each image. An image belongs to the class of its first object.
    """
    first = [found[0] if found else 0 for found in labels]
    return spread_over_classes(torch.tensor(first, dtype=torch.long), max_count).tolist()


def format_first_names(names: Sequence[str]) -> str:
    """Join the first three names; three dots stand for the others."""
    return "; ".join([*names[:3], *["..."] * (len(names) > 3)])
