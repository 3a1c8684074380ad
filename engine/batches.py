"""Batches on the device: order, crop, flip and normalisation, all as batched tensor operations.

Which images make up a batch and how each is cropped and flipped depends on (seed, epoch, position in the set) alone:
not on workers, not on where a run was stopped, and not on the generators that the mixing methods draw from.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from engine.data import Part


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) normalised floats on the device
    labels: torch.Tensor  # (B,) long on the device
    index: torch.Tensor  # (B,) long, positions in the part, on the host
    place: torch.Tensor  # the same on the device
    shift: torch.Tensor | None = None  # (2, B) long on the device: first row and column of each crop; None: none
    flip: torch.Tensor | None = None  # (B,) bool on the device: left and right are exchanged


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + epoch * 0x85EBCA77 + 0xC2B2AE3D) % 2**63)


def crop_and_flip(
    pixels: torch.Tensor, index: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor
) -> torch.Tensor:
    """Images `index` of pixels uint8 (N, H, W, 3), each shifted and flipped: (B, H, W, 3).

    top, left (B,): first row and column of the crop, from -padding to +padding; what lies outside the image is black.
    flip (B,) bool: left and right are exchanged.
    """
    height, width = pixels.shape[1:3]
    rows = torch.arange(height, device=pixels.device) + top.unsqueeze(1)  # (B, H)
    columns = torch.arange(width, device=pixels.device)
    columns = torch.where(flip.unsqueeze(1), columns.flip(0), columns) + left.unsqueeze(1)  # (B, W)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    place = (index.unsqueeze(1) * height + rows.clamp(0, height - 1)).unsqueeze(2) * width + columns.clamp(
        0, width - 1
    ).unsqueeze(1)
    picked = pixels.view(-1, 3).index_select(0, place.flatten()).view(*place.shape, 3)
    return picked * inside.unsqueeze(3)


class Batches:
    """The batches of one part. `epoch(n)` gives those of epoch n; len() says how many there are.

    augment: crop from `padding` black pixels around, and flip; in a random order if shuffle. Images in a tensor live on
    the device; files are read by worker processes, one batch ahead.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        *,
        device: torch.device,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        augment: bool = False,
        padding: int = 0,
        drop_last: bool = False,
        seed: int = 0,
        workers: int = 0,
        channels_last: bool = True,
    ):
        self.part, self.batch_size, self.device = part, batch_size, device
        self.shuffle, self.augment, self.padding, self.drop_last = shuffle, augment, padding, drop_last
        self.seed, self.workers, self.channels_last = seed, workers, channels_last
        self.labels = part.labels.to(device)
        self.resident = part.pixels.to(device) if isinstance(part.pixels, torch.Tensor) else None
        self.scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.skipped = 0  # unreadable files of the last epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.part), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        count, generator = len(self.part), epoch_generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shift = (
            torch.randint(-self.padding, self.padding + 1, (2, count), generator=generator) if self.augment else None
        )
        flip = (torch.rand(count, generator=generator) < 0.5) if self.augment else None
        chosen = list(order.split(self.batch_size))[: len(self)]
        order_there = order.to(self.device)  # once an epoch: a copy in every step would hold up the device
        if self.augment:
            shift, flip = shift.to(self.device), flip.to(self.device)
        self.skipped, start = 0, 0
        for index, (pixels, labels) in zip(chosen, self.read(chosen), strict=True):
            there, moved = order_there[start : start + len(index)], (None, None)
            start += len(index)
            if self.augment:
                moved = shift[:, there], flip[there]
                row = there if pixels is self.resident else torch.arange(len(index), device=self.device)
                pixels = crop_and_flip(pixels, row, *moved[0], moved[1])
            elif pixels is self.resident:
                pixels = pixels.index_select(0, there)
            labels = self.labels[there] if labels is None else labels
            yield Batch(self.normalise(pixels), labels, index, there, *moved)

    def read(self, chosen: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Pixels and labels of each batch of files; the whole part, for every batch, where it lies on the device."""
        if self.resident is not None:
            yield from ((self.resident, None) for _ in chosen)
            return
        files = self.part.pixels.batches([index.tolist() for index in chosen], self.workers)
        for index, (pixels, places) in zip(chosen, files, strict=True):
            self.skipped += int((places != index).sum())
            yield pixels.to(self.device, non_blocking=True), self.labels[places.to(self.device)]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> normalised floats (B, 3, H, W), channels last in memory unless told otherwise."""
        images = torch.addcmul(self.shift, pixels.permute(0, 3, 1, 2).float(), self.scale)
        return images if self.channels_last else images.contiguous()
