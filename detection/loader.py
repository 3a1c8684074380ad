"""Batches of images and their objects: read ahead, augmented, on the device.

Which images make up a batch and what happens to each depends on (seed, epoch, position in the set) alone: not on the
workers, and not on where a run was stopped.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from detection.dataset import DetectionSet
from engine.data.decode import BadImage
from engine.data.image_files import BatchReader
from engine.data.loader import WHOLE_BATCH, Shard, make_epoch_generator
from engine.data.sample_rng import hash_samples


def get_box_labels(sample: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of a target that lose a row where a box is left out."""
    return sample[1]["labels"], sample[1]["difficult"]


AUGMENTATIONS = {  # of training images; multi-scale is --min_size with several sizes
    "none": lambda: None,
    "flip": lambda: v2.RandomHorizontalFlip(0.5),
    "ssd": lambda: v2.Compose(  # Liu et al., "SSD", arXiv 1512.02325, Sec. 2.2 and 3.6
        [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=(123, 117, 104)),  # ImageNet's mean colour
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(0.5),
            v2.SanitizeBoundingBoxes(labels_getter=get_box_labels),
        ]
    ),
}


class DetectionViews:
    """The images of a set as training sees them, for engine.data.image_files.BatchReader."""

    remedy = (
        "replace the file or its annotation; without it in ImageSets/Main it is another run, from --frcnn_checkpoint"
    )

    def __init__(self, part: DetectionSet, augment: str = "none"):
        self.part, self.transform = part, AUGMENTATIONS[augment]()

    def __len__(self) -> int:
        return len(self.part)

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Images uint8 (3, H, W) and their targets, as two lists, and None; or (None, the error, None)."""
        state = torch.get_rng_state()  # without workers this is the training process: its draws stay as they were
        samples = []
        try:
            for position, key in zip(index, hash_samples(seed, epoch, index).tolist(), strict=True):
                torch.default_generator.manual_seed(key)
                samples.append(self.read_one(position))
        except BadImage as error:
            return None, str(error), None
        finally:
            torch.set_rng_state(state)
        return [image for image, _ in samples], [target for _, target in samples], None

    def read_one(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, target = self.part.read(index), self.part.targets[index]
        if self.transform is None:
            return image, target
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        image, target = self.transform(tv_tensors.Image(image), {**target, "boxes": boxes})
        tensors = {key: value.as_subclass(torch.Tensor) for key, value in target.items()}
        return image.as_subclass(torch.Tensor), tensors


class Batch(NamedTuple):
    images: list[torch.Tensor]  # (3, H, W) in 0..1, on the device
    targets: list[dict[str, torch.Tensor]]  # boxes (N, 4), labels (N,), difficult (N,), on the device
    index: torch.Tensor  # (B,) long, positions in the set, on the host


class DetectionLoader:
    """Batches of an image set. `epoch(n)` yields those of epoch n; len() is the number of optimizer steps in an epoch.

    batch_size is the total over all processes and micro-batches, as for engine.data.loader.DeviceLoader. With shuffle,
    images higher than wide make batches of their own, which spares padding; an epoch ends with what is left of both
    kinds, and, where the shards do not divide that, with the epoch's first images again: so it has as many steps for
    any number of processes.
    """

    def __init__(
        self,
        part: DetectionSet,
        batch_size: int,
        *,
        device: torch.device,
        shuffle: bool = False,
        augment: str = "none",
        seed: int = 0,
        workers: int = 0,
        shard: Shard = WHOLE_BATCH,
    ):
        self.part, self.batch_size, self.device = part, batch_size, device
        self.shuffle, self.seed, self.shard, self.micro_batches = shuffle, seed, shard, shard.micro_batches
        drawn = part.images and isinstance(part.images[0], torch.Tensor)  # nothing to read: workers would only copy
        self.pinned = device.type == "cuda"
        self.reader = BatchReader(
            DetectionViews(part, augment), seed=seed, workers=0 if drawn else workers, pin=self.pinned
        )

    def __len__(self) -> int:
        return math.ceil(len(self.part) / self.batch_size)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        self.reader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of this rank, from step `start` on; the micro-batches of a step follow one another."""
        steps = self.order(epoch).split(self.batch_size)[start : len(self)]
        chosen = [part for batch in steps for part in self.shard.split(batch, even=self.shuffle)]
        for index, (images, targets, _) in zip(chosen, self.reader.read(chosen, epoch), strict=True):
            images = [image.to(self.device, non_blocking=self.pinned).float().div_(255) for image in images]
            targets = [
                {key: value.to(self.device, non_blocking=self.pinned) for key, value in target.items()}
                for target in targets
            ]
            yield Batch(images, targets, index)

    def order(self, epoch: int) -> torch.Tensor:
        """The positions of all images, batch after batch."""
        count = len(self.part)
        if not self.shuffle:
            return torch.arange(count)
        portrait = [height > width for height, width in self.part.sizes]
        order, waiting = [], {False: [], True: []}
        for position in torch.randperm(count, generator=make_epoch_generator(self.seed, epoch)).tolist():
            batch = waiting[portrait[position]]
            batch.append(position)
            if len(batch) == self.batch_size:
                order += batch
                batch.clear()
        order += [*waiting[False], *waiting[True]]
        missing = -(count % self.batch_size) % self.shard.parts  # until the shards divide the last batch
        return torch.tensor(order + order[:missing], dtype=torch.long)
