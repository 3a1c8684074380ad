"""Detection data: images, and what objects are where in them. detection/voc.py reads them, detection/scenes.py draws
them.

Boxes are x0, y0, x1, y1 in pixels and continuous: the pixel of row 0 and column 0 is the box 0, 0, 1, 1.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import torch
from PIL import Image

from engine.cli import UserError
from engine.distributed import in_turn
from engine.image_files import BadImage, load, what_is_wrong

SCENES = ((1000, 2), (200, 3))  # train and test: how many, and their seed; the classifier's shapes have 0 and 1
SIDE = 160  # of a scene, on average


@dataclass
class Part:
    """One part of a detection data set."""

    classes: list[str]  # without background: label k is classes[k - 1]
    names: list[str]  # of the images, as VOC2007/000005
    images: list[Path] | list[torch.Tensor]  # files, or uint8 (3, H, W)
    targets: list[dict[str, torch.Tensor]]  # boxes (N, 4) float32, labels (N,) int64, difficult (N,) bool
    sizes: list[tuple[int, int]]  # height and width of each image
    where: str
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
            f"{len(self.classes)} classes, {' to '.join(ends)} a class, from {self.where}"
        )

    def take(self, index: Sequence[int]) -> "Part":
        """The images at these positions, in this order."""
        chosen = {key: [getattr(self, key)[i] for i in index] for key in ("names", "images", "targets", "sizes")}
        return replace(self, **chosen, warnings=list(self.warnings))

    def without_difficult(self) -> "Part":
        """The same images, with the objects that are not marked difficult."""
        targets = [{key: value[~target["difficult"]] for key, value in target.items()} for target in self.targets]
        return replace(self, targets=targets, warnings=list(self.warnings))

    def read(self, index: int) -> torch.Tensor:
        """RGB uint8 (3, H, W). Raises BadImage, with the path, for a file that cannot be decoded or has another size
        than its annotation says.
        """
        path = self.images[index]
        if isinstance(path, torch.Tensor):
            return path
        try:
            raw = path.read_bytes()
            with Image.open(io.BytesIO(raw)) as image:
                pixels, _ = load(image, raw, 1)
        except Exception as error:
            raise BadImage(f"{path}: {what_is_wrong(error)}") from error
        if pixels.shape[:2] != self.sizes[index]:
            (height, width), (rows, columns) = self.sizes[index], pixels.shape[:2]
            raise BadImage(
                f"{path}: it has {columns} x {rows} pixels, its annotation says {width} x {height}; they do not belong "
                "together"
            )
        return torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)).permute(2, 0, 1).contiguous()


def load_parts(
    *,
    dataset: str,
    data_dir: str = "data",
    train_sets: Sequence[str] = ("2007_trainval", "2012_trainval"),
    test_set: str = "2007_test",
    download: bool = False,
    limit: int = 0,
    image_size: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> tuple[Part, Part]:
    """The training and the test part.

    dataset: `voc`, or `shapes` for drawn scenes. train_sets, test_set: of voc, as YEAR_LIST; without any train_sets
    the training part is empty. limit: the first N images of each part, 0 for all. image_size: of shapes, the mean side
    of a scene, 0 for 160. progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError with what
    was looked for and the remedy.
    """
    from detection import scenes, voc  # they make Parts, so this file comes first

    if dataset == "shapes":
        if image_size and image_size < scenes.LEAST:
            raise UserError(f"--image_size {image_size}: scenes have at least {scenes.LEAST} pixels a side")
        totals = [SCENES[0][0] if train_sets else 0, SCENES[1][0]]
        train, test = (
            scenes.draw_scenes(min(total, limit or total), size=image_size or SIDE, seed=seed, progress=progress)
            for total, (_, seed) in zip(totals, SCENES, strict=True)
        )
    elif dataset == "voc":
        devkit = in_turn(lambda: voc.find_sets(Path(data_dir), [*train_sets, test_set], download))
        train, test = (voc.read_part(devkit, sets, progress=progress) for sets in (list(train_sets), [test_set]))
        totals = [len(train), len(test)]
    else:
        raise ValueError(f"dataset is voc or shapes, got {dataset!r}")
    both = set(test.names) & set(train.names)
    shared = [name for name in test.names if name in both]
    if shared:
        train.warnings.append(
            f"{len(shared):,} images are in the training and in the test part: {first_names(shared)}; results are "
            "those of images seen in training"
        )
    if limit:
        train, test = (part.take(range(min(limit, len(part)))) for part in (train, test))
        for part, total, name in zip((train, test), totals, ("training", "test"), strict=True):
            if len(part) < total:
                part.warnings.append(f"--limit {limit}: {len(part):,} of {total:,} {name} images; results are partial")
    return train, test


def first_names(names: Sequence[str]) -> str:
    """The first three, and whether there are more."""
    return "; ".join([*names[:3], *["..."] * (len(names) > 3)])
