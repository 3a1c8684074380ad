"""Batches on the device: order, crop, flip, colour and normalisation, all as batched tensor operations.

Which images make up a batch and how each is cropped, flipped and coloured depends on (seed, epoch, position in the set)
alone: not on workers, not on where a run was stopped, and not on the generators that the mixing methods draw from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.data.augment import Augmentation, apply_colors, compose_color_matrix, crop_and_flip
from engine.data.image_files import BatchReader
from engine.data.image_set import ImageSet
from engine.errors import UserError
from engine.runtime.distributed import rank, world_size


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) normalised floats on the device
    labels: torch.Tensor  # (B,) long on the device
    index: torch.Tensor  # (B,) long, positions in the set, on the host
    loaded_index: torch.Tensor  # (B,) long on the device: the same but for unreadable files, whose neighbours are shown
    shift: torch.Tensor | None = None  # (2, B) long on the device: first row and column of each crop; None: none
    flip: torch.Tensor | None = None  # (B,) bool on the device: which images are mirrored
    box: torch.Tensor | None = None  # (B, 4) on the device: y1, y2, x1, x2 of a random crop, in 0..1


def make_epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch * 0x85EBCA77 + 0xC2B2AE3D) % 2**63)


@dataclass(frozen=True)
class Shard:
    """The share of every batch that one process reads: `micro_batches` of `world_size * micro_batches` parts."""

    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1  # that the process takes one after the other in an optimizer step, accumulating gradients

    @property
    def parts(self) -> int:
        return self.world_size * self.micro_batches

    def split(self, batch: torch.Tensor, *, even: bool) -> list[torch.Tensor]:
        """The micro-batches that this process reads of a batch of indices. even: all are of one length, and the rest of
        the batch is left out; otherwise their lengths differ by one at most, and empty ones are missing.
        """
        if even:
            batch = batch[: len(batch) // self.parts * self.parts]
        first = self.rank * self.micro_batches
        return [part for part in batch.tensor_split(self.parts)[first : first + self.micro_batches] if len(part)]


WHOLE_BATCH = Shard()


def get_process_shard(micro_batches: int = 1) -> Shard:
    """The shard of this process among those that torchrun started."""
    return Shard(rank(), world_size(), micro_batches)


class DeviceLoader:
    """Batches of an image set. `epoch(n)` yields those of epoch n; len() is the number of optimizer steps in an epoch.

    Images in a tensor are kept on the device; files are decoded ahead of time by worker processes, which live until
    close(). augmentation: of training images, see there; None: images as they are.

    batch_size is the total over all processes and micro-batches of an optimizer step; `shard` tells which of its parts
    this process reads, and epoch() yields them one by one. With shuffle, the rest of a last batch that the parts do not
    divide is left out; without, the parts differ by one image and may be missing, so that all processes together read
    each image once.
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
                f"a batch of {batch_size} cannot be cut into {shard.world_size} ranks times "
                f"{shard.micro_batches} pieces"
            )
        self.image_set, self.batch_size, self.device = image_set, batch_size, device
        self.shuffle, self.drop_last, self.seed, self.channels_last = shuffle, drop_last, seed, channels_last
        self.augmentation, self.shard, self.micro_batches = augmentation, shard, shard.micro_batches
        self.labels = image_set.labels.to(device)
        self.resident = image_set.pixels.to(device) if isinstance(image_set.pixels, torch.Tensor) else None
        self.reader, view = None, augmentation and augmentation.view
        if self.resident is None:
            files = image_set.pixels.with_view(view or image_set.pixels.view)
            self.reader = BatchReader(files, seed=seed, workers=workers, pin=device.type == "cuda")
        elif view is not None:
            raise ValueError(f"{view} is for image files; the images of {image_set.origin} lie in a tensor")
        self.copy_stream = torch.cuda.Stream(device) if self.reader and device.type == "cuda" else None
        self.scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.skipped = 0  # unreadable files of the last epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.image_set), self.batch_size)
        least = self.shard.parts if self.shuffle else 1
        return whole + (rest >= least and not self.drop_last)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self.reader:
            self.reader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of this process from step `start` on; the micro-batches of a step follow one another."""
        order, drawn = self.draw(epoch)
        steps = order.split(self.batch_size)[start : len(self)]
        indices = [part for batch in steps for part in self.shard.split(batch, even=self.shuffle)]
        drawn = {name: values.to(self.device) for name, values in drawn.items()}
        # copied once an epoch: a copy in every step would hold up the device
        device_indices = torch.cat([order[:0], *indices]).to(self.device).split([len(index) for index in indices])
        self.skipped = 0
        for index, device_index, read in zip(indices, device_indices, self.read(epoch, indices), strict=True):
            pixels, loaded_index, box = read
            own = {name: values[..., device_index] for name, values in drawn.items()}
            shift, flip = own.get("shift"), own.get("flip")
            if shift is not None:
                row = device_index if pixels is self.resident else torch.arange(len(index), device=self.device)
                pixels = crop_and_flip(pixels, row, *shift, flip)
            elif pixels is self.resident:
                pixels = pixels.index_select(0, device_index)
            elif flip is not None:
                pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(2), pixels)
            loaded_index = device_index if loaded_index is None else loaded_index
            images = self.normalize(pixels, own)
            yield Batch(images, self.labels[loaded_index], index, loaded_index, shift, flip, box)

    def draw(self, epoch: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The order (N,) of the set in this epoch, and what is drawn for each position in it, (..., N), on the host."""
        count, generator = len(self.image_set), make_epoch_generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        return order, self.augmentation.draw(count, generator) if self.augmentation else {}

    def read(
        self, epoch: int, indices: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Of each batch of files: pixels, the positions they were loaded from, and boxes, on the device. Of a set that
        lies on the device: all its pixels, for every batch.
        """
        if self.resident is not None:
            yield from ((self.resident, None, None) for _ in indices)
            return
        for index, (pixels, loaded_index, box) in zip(indices, self.reader.read(indices, epoch), strict=True):
            self.skipped += int((loaded_index != index).sum())
            yield tuple(self.copy_to_device([pixels, loaded_index, box]))

    def copy_to_device(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The tensors on the device. On CUDA a stream of its own copies them out of pinned memory, beside the steps
        that the host has queued already, and the current stream waits for nothing but this copy.
        """
        if self.copy_stream is None:
            return [tensor if tensor is None else tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.copy_stream):
            copies = [tensor if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copy_stream)
        for copy in copies:
            if copy is not None:
                copy.record_stream(current)  # its memory belongs to the copying stream, which must not reuse it yet
        return copies

    def normalize(self, pixels: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> normalised floats (B, 3, H, W), with the drawn changes of colour."""
        images = pixels.permute(0, 3, 1, 2).float()
        affine = compose_color_matrix(images, drawn)
        if affine is None:
            torch.addcmul(self.offset, images, self.scale, out=images)
        else:
            scale = self.scale.view(3, 1)
            constant = 255 * scale * affine[:, :, 3:] + self.offset.view(3, 1)
            images = apply_colors(images, torch.cat([scale * affine[:, :, :3], constant], 2))
        return images if self.channels_last else images.contiguous()


def check_batch_size(batch_size: int, accumulate: int, images: int, drop_last: bool) -> None:
    """Raise UserError where a batch cannot be cut into equal parts for all processes, or is larger than the data."""
    cut = world_size() * accumulate
    if batch_size % cut:
        by = f"{world_size()} processes" + (f" x --accumulate {accumulate}" if accumulate > 1 else "")
        below, above = batch_size // cut * cut, (batch_size // cut + 1) * cut
        raise UserError(
            f"--batch_size {batch_size}: the total, which {by} = {cut} do not divide\n"
            f"take {f'{below} or ' if below else ''}{above}"
        )
    if images < (batch_size if drop_last else cut):
        raise UserError(f"--batch_size {batch_size}: only {images} training images; take a smaller one")
