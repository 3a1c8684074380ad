"""Load batches on the device: shuffle, crop, flip, change colours and normalise, all as batched tensor operations.

The images of a batch and their random crops, flips and colours depend only on (seed, epoch, index in the set). They do
not depend on the workers, on where a run was interrupted, or on the generators that the mixing methods draw from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from engine.data.augment import Augmentation, apply_colors, compose_color_matrix, crop_and_flip_drawn
from engine.data.erasing import RandomErasing
from engine.data.image_files import BatchReader, ImageFiles
from engine.data.image_set import ImageSet, check_any_readable, count_missing
from engine.data.image_tensor import ImageTensor
from engine.errors import UserError
from engine.runtime.distributed import all_reduce_sum, rank, world_size


class Batch(NamedTuple):
    """One batch (or micro-batch) of images, with the random numbers of its augmentation."""

    images: torch.Tensor  # (B, 3, H, W) normalised floats on the device
    labels: torch.Tensor  # (B,) long on the device
    index: torch.Tensor  # (B,) long, indices in the set, on the CPU
    loaded_index: torch.Tensor  # (B,) long on the device: as index, but for a replaced file the one read instead
    shift: torch.Tensor | None = None  # (2, B) long on the device: first row and column of each crop; None: no crop
    flip: torch.Tensor | None = None  # (B,) bool on the device: whether an image is flipped horizontally
    box: torch.Tensor | None = None  # (B, 4) on the device: random crop as y1, y2, x1, x2 in 0..1


def make_epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator whose seed mixes `seed` and `epoch`."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch * 0x85EBCA77 + 0xC2B2AE3D) % 2**63)


def draw_epoch(
    epoch: int, *, count: int, seed: int, shuffle: bool, augmentation: Augmentation | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draw the order (N,) of `count` images in an epoch and their augmentation, name -> (..., N), on the CPU."""
    generator = make_epoch_generator(seed, epoch)
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    return order, augmentation.draw(count, generator) if augmentation else {}


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one process reads: `micro_batches` of `world_size * micro_batches` parts."""

    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1  # per optimizer step and process; their gradients are accumulated

    @property
    def parts(self) -> int:
        return self.world_size * self.micro_batches

    def split(self, batch: torch.Tensor, *, even: bool) -> list[torch.Tensor]:
        """Return the micro-batches of this process from a batch of indices.

        even: all parts have the same length, and the remainder of the batch is dropped. Otherwise their lengths differ
        by at most one, and empty micro-batches are omitted.
        """
        if even:
            batch = batch[: len(batch) // self.parts * self.parts]
        first = self.rank * self.micro_batches
        return [part for part in batch.tensor_split(self.parts)[first : first + self.micro_batches] if len(part)]


WHOLE_BATCH = Shard()


def get_process_shard(micro_batches: int = 1) -> Shard:
    """Return the shard of this process among the processes of a torchrun job."""
    return Shard(rank(), world_size(), micro_batches)


class DeviceLoader:
    """Batches of an image set. epoch(n) yields those of epoch n; len() is the number of optimizer steps per epoch.

    Images in a tensor are kept on the device. Image files are read ahead of time by worker processes, which live until
    close(); so are images in a tensor where the augmentation has a view or a policy, which change them one by one.
    augmentation: random changes of training images; None: no augmentation.

    batch_size is the total over all processes and micro-batches of an optimizer step. `shard` says which parts of it
    this process reads, and epoch() yields these one by one. With shuffle, the images of a last batch that do not fill
    equal parts are dropped. Without shuffle, parts may differ by one image or be empty, so that all processes together
    read each image once. Unreadable files that are skipped are missing in their batch; empty batches are omitted.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        drop_last: bool = False,
        augmentation: Augmentation | None = None,
        shard: Shard = WHOLE_BATCH,
        seed: int = 0,
        workers: int = 0,
        channels_last: bool = True,
    ):
        if shuffle and batch_size % shard.parts:
            raise ValueError(
                f"batch_size {batch_size} must be divisible by {shard.world_size} processes x {shard.micro_batches} "
                "micro-batches"
            )
        # ---- Order and augmentation ----
        self.image_set, self.batch_size, self.device = image_set, batch_size, device
        self.draw = partial(draw_epoch, count=len(image_set), seed=seed, shuffle=shuffle, augmentation=augmentation)
        self.shuffle, self.drop_last, self.seed, self.channels_last = shuffle, drop_last, seed, channels_last
        self.augmentation, self.shard, self.micro_batches = augmentation, shard, shard.micro_batches
        # ---- Images: kept on the device, or read by workers ----
        self.labels = image_set.labels.to(device)
        view = augmentation and augmentation.view
        in_tensor = isinstance(image_set.pixels, torch.Tensor) and not (augmentation and augmentation.needs_reading)
        self.resident = image_set.pixels.to(device) if in_tensor else None
        self.reader = None
        if self.resident is None:
            images = select_images(image_set, augmentation, mean, self.draw)
            self.reader = BatchReader(images, seed=seed, workers=workers, pin=device.type == "cuda")
        self.copy_stream = torch.cuda.Stream(device) if self.reader and device.type == "cuda" else None
        # ---- Erasing, and normalisation as scale and offset ----
        self.scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.erase, size = None, view.size if view else image_set.size
        if augmentation and augmentation.erasing:
            self.erase = RandomErasing(augmentation.erasing, size=size, seed=seed, device=device)
        self.loaded, self.unreadable = 0, 0  # images and unreadable files of the last epoch in this process

    def __len__(self) -> int:
        whole, rest = divmod(len(self.image_set), self.batch_size)
        min_rest = self.shard.parts if self.shuffle else 1
        return whole + (rest >= min_rest and not self.drop_last)

    def count_part_images(self) -> tuple[int, int]:
        """Return the number of images in a micro-batch of a shuffled epoch, and in one of its last step."""
        whole, rest = divmod(len(self.image_set), self.batch_size)
        full = self.batch_size // self.shard.parts
        last = rest // self.shard.parts if len(self) > whole else full
        return (full if whole else last), last

    def close(self) -> None:
        """Stop the worker processes, if there are any."""
        if self.reader:
            self.reader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of this process from step `start` on. The micro-batches of a step follow one another."""
        order, drawn = self.draw(epoch)
        steps = order.split(self.batch_size)[start : len(self)]
        indices = [part for batch in steps for part in self.shard.split(batch, even=self.shuffle)]
        drawn = {name: values.to(self.device) for name, values in drawn.items()}
        placed = self.augmentation is not None and self.augmentation.auto is not None  # cropped and flipped when read
        # one copy per epoch: a copy in every step would stall the device
        device_indices = torch.cat([order[:0], *indices]).to(self.device).split([len(index) for index in indices])
        self.loaded = self.unreadable = 0
        for index, device_index, read in zip(indices, device_indices, self.read(epoch, indices), strict=True):
            pixels, loaded_index, box = read
            if loaded_index is not None and len(loaded_index) < len(index):
                kept = torch.isin(device_index, loaded_index)
                index, device_index = index[kept.cpu()], device_index[kept]
            self.loaded += len(index)
            if not len(index):
                continue
            batch_drawn = {name: values[..., device_index] for name, values in drawn.items()}
            if not placed:
                row = device_index if pixels is self.resident else None
                mode = self.augmentation.crop_padding_mode if self.augmentation else ""
                pixels = self.image_set.resize_batch(crop_and_flip_drawn(pixels, row, batch_drawn, mode))
            images = self.normalize(pixels, batch_drawn)
            images = self.erase(images, index, epoch) if self.erase else images
            images = images if self.channels_last else images.contiguous()
            loaded_index = device_index if loaded_index is None else loaded_index
            view = (batch_drawn.get("shift"), batch_drawn.get("flip"), box)
            yield Batch(images, self.labels[loaded_index], index, loaded_index, *view)

    def count_unreadable(self) -> int:
        """Return the number of unreadable files in the last epoch, over all processes, each of which must call this.

        Raises UserError if no image could be read.
        """
        loaded, unreadable = all_reduce_sum(torch.tensor([self.loaded, self.unreadable])).tolist()
        check_any_readable(loaded, unreadable, self.image_set)
        return unreadable + self.image_set.unreadable

    def read(
        self, epoch: int, indices: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Yield pixels, the indices that were loaded, and boxes for each batch, on the device.

        For a set that is kept on the device, yields all its pixels for every batch, and None for the rest.
        """
        if self.resident is not None:
            yield from ((self.resident, None, None) for _ in indices)
            return
        for index, (pixels, loaded_index, box) in zip(indices, self.reader.read(indices, epoch), strict=True):
            self.unreadable += count_missing(index, loaded_index)
            yield tuple(self.copy_to_device([pixels, loaded_index, box]))

    def copy_to_device(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Copy tensors to the device.

        On CUDA, a separate stream copies them from pinned memory while the steps that are already queued run. The
        current stream waits only for this copy.
        """
        if self.copy_stream is None:
            return [tensor if tensor is None else tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.copy_stream):
            copies = [tensor if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copy_stream)
        for copy in copies:
            if copy is not None:
                copy.record_stream(current)  # keeps the copying stream from reusing this memory too early
        return copies

    def normalize(self, pixels: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """Convert uint8 (B, H, W, 3) to normalised floats (B, 3, H, W), with the drawn colour changes applied."""
        images = pixels.permute(0, 3, 1, 2).float()
        affine = compose_color_matrix(images, drawn)
        if affine is None:
            torch.addcmul(self.offset, images, self.scale, out=images)
        else:
            scale = self.scale.view(3, 1)
            constant = 255 * scale * affine[:, :, 3:] + self.offset.view(3, 1)
            images = apply_colors(images, torch.cat([scale * affine[:, :, :3], constant], 2))
        return images


def select_images(
    image_set: ImageSet, augmentation: Augmentation | None, mean: tuple[float, ...], draw: Callable
) -> ImageFiles:
    """Return what a BatchReader reads: images with the crops and the policy of the augmentation.

    draw: see engine.data.auto_augment.AugmentedImages.
    """
    pixels, view = image_set.pixels, augmentation and augmentation.view
    in_tensor = isinstance(pixels, torch.Tensor)
    images = ImageTensor(pixels, view) if in_tensor else pixels.with_view(view or pixels.view)
    if augmentation is None or augmentation.auto is None:
        return images
    from engine.data.auto_augment import AugmentedImages  # imports torchvision, which takes a second or two

    return AugmentedImages(images, augmentation, mean, resize=image_set.resize_batch, draw=draw)


def check_batch_size(batch_size: int, accumulate: int, images: int, drop_last: bool) -> None:
    """Raise UserError if a batch cannot be split into equal parts for all processes, or if it exceeds the data."""
    parts = world_size() * accumulate
    if batch_size % parts:
        factors = f"{world_size()} process{'es' if world_size() > 1 else ''}" + (
            f" x --accumulate {accumulate}" if accumulate > 1 else ""
        )
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        raise UserError(
            f"--batch_size {batch_size}: the total batch size must be divisible by {factors} = {parts}\n"
            f"use {f'{below} or ' if below else ''}{above}"
        )
    if images < (batch_size if drop_last else parts):
        raise UserError(
            f"--batch_size {batch_size}: larger than the {images} training images; use a smaller batch size"
        )
