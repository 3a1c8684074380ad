"""Images with the boxes of the objects in them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import torch
from PIL import Image

from engine.data.decode import BadImage, describe_error, load_pixels


@dataclass
class DetectionSet:
    """The training or the test images of a detection data set."""

    classes: list[str]  # without background: label k is classes[k - 1]
    names: list[str]  # of the images, as VOC2007/000005
    images: list[Path] | list[torch.Tensor]  # files, or uint8 (3, H, W)
    targets: list[dict[str, torch.Tensor]]  # boxes (N, 4) float32, labels (N,) int64, difficult (N,) bool
    sizes: list[tuple[int, int]]  # height and width of each image
    origin: str  # where the images come from, for messages
    warnings: list[str] = field(default_factory=list)  # lines for the user

    def __len__(self) -> int:
        return len(self.names)

    def summary(self, name: str) -> str:
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(target["labels"] for target in self.targets)])
        counts = torch.bincount(labels, minlength=len(self.classes) + 1)[1:]
        difficult = sum(int(target["difficult"].sum()) for target in self.targets)
        ends = (f"{counts[k]:,} ({self.classes[k]})" for k in (int(counts.argmin()), int(counts.argmax())))
        return (
            f"{name}: {len(self):,} images with {len(labels):,} objects ({difficult:,} difficult) of "
            f"{len(self.classes)} classes, {' to '.join(ends)} a class, from {self.origin}"
        )

    def take(self, index: Sequence[int]) -> "DetectionSet":
        """The images at these positions, in this order."""
        columns = self.names, self.images, self.targets, self.sizes
        chosen = ([column[position] for position in index] for column in columns)
        return DetectionSet(self.classes, *chosen, self.origin, list(self.warnings))

    def without_difficult(self) -> "DetectionSet":
        """The same images, without the objects that are marked difficult."""
        targets = [{key: value[~target["difficult"]] for key, value in target.items()} for target in self.targets]
        return replace(self, targets=targets, warnings=list(self.warnings))

    def read(self, index: int) -> torch.Tensor:
        """RGB uint8 (3, H, W). Raises BadImage, which names the file, where it cannot be decoded or its size is not
        that of its annotation.
        """
        path = self.images[index]
        if isinstance(path, torch.Tensor):
            return path
        try:
            raw = path.read_bytes()
            with Image.open(io.BytesIO(raw)) as image:
                pixels, _ = load_pixels(image, raw, 1)
        except Exception as error:
            raise BadImage(f"{path}: {describe_error(error)}") from error
        if pixels.shape[:2] != self.sizes[index]:
            (height, width), (rows, columns) = self.sizes[index], pixels.shape[:2]
            raise BadImage(
                f"{path}: it has {columns} x {rows} pixels, its annotation says {width} x {height}; they do not belong "
                "together"
            )
        return torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def list_first_names(names: Sequence[str]) -> str:
    """The first three names, and dots where there are more."""
    return "; ".join([*names[:3], *["..."] * (len(names) > 3)])
