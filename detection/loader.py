"""Load batches of images and targets: prefetched, augmented and moved to the device.

The composition of a batch and the augmentation of each image depend only on (seed, epoch, position in the set). They
do not depend on the number of workers or on where a run was interrupted.
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

TARGET_KEYS = ("boxes", "labels", "difficult")  # what training uses of a target


def get_box_labels(sample: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target tensors from which v2.SanitizeBoundingBoxes also removes the row of a dropped box."""
    return sample[1]["labels"], sample[1]["difficult"]


AUGMENTATIONS = {  # for training images; multi-scale training is --min_size with several sizes
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
    """The augmented images of a set, in the form that engine.data.image_files.BatchReader reads."""

    remedy = (
        "replace the file or its annotation; if you remove it from the data set, start a new run from "
        "--frcnn_checkpoint"
    )

    def __init__(self, image_set: DetectionSet, augment: str = "none"):
        self.image_set, self.transform = image_set, AUGMENTATIONS[augment]()

    def __len__(self) -> int:
        return len(self.image_set)

    def read(self, indices: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Return a list of images uint8 (3, H, W), a list of their targets, and None; or (None, error, None)."""
        state = torch.get_rng_state()  # without workers this is the training process, whose draws must not change
        samples = []
        try:
            for index, key in zip(indices, hash_samples(seed, epoch, indices).tolist(), strict=True):
                torch.default_generator.manual_seed(key)
                samples.append(self.read_sample(index))
        except BadImage as error:
            return None, str(error), None
        finally:
            torch.set_rng_state(state)
        return [image for image, _ in samples], [target for _, target in samples], None

    def read_sample(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return one augmented image and its target. The draws come from torch's global generator."""
        image, target = self.image_set.read(index), self.image_set.targets[index]
        target = {key: target[key].clone() for key in TARGET_KEYS}  # a view would take the boxes of all images along
        if self.transform is None:
            return image, target
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        image, target = self.transform(tv_tensors.Image(image), {**target, "boxes": boxes})
        tensors = {key: value.as_subclass(torch.Tensor) for key, value in target.items()}
        return image.as_subclass(torch.Tensor), tensors


class Batch(NamedTuple):
    images: list[torch.Tensor]  # (3, H, W) in 0..1, on the device
    targets: list[dict[str, torch.Tensor]]  # boxes (N, 4), labels (N,), difficult (N,), on the device
    index: torch.Tensor  # (B,) long, positions in the image set, on the host


class DetectionLoader:
    """Batches of an image set. `epoch(n)` yields those of epoch n; len() is the number of optimizer steps per epoch.

    batch_size is the total over all processes and micro-batches, as in engine.data.loader.DeviceLoader. With shuffle,
    portrait images form their own batches, which saves padding, and the last batches hold the rest of both
    orientations. If the shards do not divide the last batch, the first images of the epoch fill it up. An epoch thus
    has the same number of steps for any number of processes.
    """

    def __init__(
        self,
        image_set: DetectionSet,
        batch_size: int,
        *,
        device: torch.device,
        shuffle: bool = False,
        augment: str = "none",
        seed: int = 0,
        workers: int = 0,
        shard: Shard = WHOLE_BATCH,
    ):
        self.image_set, self.batch_size, self.device = image_set, batch_size, device
        self.shuffle, self.seed, self.shard, self.micro_batches = shuffle, seed, shard, shard.micro_batches
        if image_set.images and isinstance(image_set.images[0], torch.Tensor):
            workers = 0  # the images are in memory: workers would only copy them
        self.pinned = device.type == "cuda"
        self.reader = BatchReader(DetectionViews(image_set, augment), seed=seed, workers=workers, pin=self.pinned)

    def __len__(self) -> int:
        return math.ceil(len(self.image_set) / self.batch_size)

    def count_part_images(self) -> tuple[int, int]:
        """Return the number of images in a micro-batch of a shuffled epoch, and in one of its last step."""
        whole, rest = divmod(len(self.image_set), self.batch_size)
        full = self.batch_size // self.shard.parts
        last = math.ceil(rest / self.shard.parts) if rest else full
        return (full if whole else last), last

    def close(self) -> None:
        """Stop the worker processes, if there are any."""
        self.reader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of this process from step `start` on; the micro-batches of a step are consecutive."""
        steps = self.order(epoch).split(self.batch_size)[start : len(self)]
        indices = [index for batch in steps for index in self.shard.split(batch, even=self.shuffle)]
        for index, (images, targets, _) in zip(indices, self.reader.read(indices, epoch), strict=True):
            images = [image.to(self.device, non_blocking=self.pinned).float().div_(255) for image in images]
            targets = [
                {key: value.to(self.device, non_blocking=self.pinned) for key, value in target.items()}
                for target in targets
            ]
            yield Batch(images, targets, index)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the positions of all images in the order of the batches: (N,) long, or a few more with shuffle."""
        count = len(self.image_set)
        if not self.shuffle:
            return torch.arange(count)
        portrait = [height > width for height, width in self.image_set.sizes]
        order, waiting = [], {False: [], True: []}  # waiting: incomplete batches of landscape and portrait images
        for position in torch.randperm(count, generator=make_epoch_generator(self.seed, epoch)).tolist():
            batch = waiting[portrait[position]]
            batch.append(position)
            if len(batch) == self.batch_size:
                order += batch
                batch.clear()
        order += [*waiting[False], *waiting[True]]
        missing = -(count % self.batch_size) % self.shard.parts  # images to add until the shards divide the last batch
        return torch.tensor(order + order[:missing], dtype=torch.long)
