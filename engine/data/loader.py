"""Batches on the device: order, crop, flip, colour and normalisation, all as batched tensor operations.

Which images make up a batch and how each is cropped, flipped and coloured depends on (seed, epoch, position in the set)
alone: not on workers, not on where a run was stopped, and not on the generators that the mixing methods draw from.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from engine.data.augment import add_lighting, apply_colors, color_jitter, identity_colors
from engine.data.image_files import Reader
from engine.data.image_set import ImageSet
from engine.data.views import RandomCrop, View


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) normalised floats on the device
    labels: torch.Tensor  # (B,) long on the device
    index: torch.Tensor  # (B,) long, positions in the part, on the host
    place: torch.Tensor  # on the device: the same, or of the image that served in place of one that cannot be read
    shift: torch.Tensor | None = None  # (2, B) long on the device: first row and column of each crop; None: none
    flip: torch.Tensor | None = None  # (B,) bool on the device: left and right are exchanged
    box: torch.Tensor | None = None  # (B, 4) on the device: the part of its file that an image shows before the flip,


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


def split_batch(batch: torch.Tensor, *, rank: int, ranks: int, pieces: int, even: bool) -> list[torch.Tensor]:
    """The pieces of a global batch of indices that a rank reads. even: all as long, and what is too much is left out;
    else they differ by one and may be missing.
    """
    parts = ranks * pieces
    if even:
        batch = batch[: len(batch) // parts * parts]
    return [part for part in batch.tensor_split(parts)[rank * pieces : (rank + 1) * pieces] if len(part)]


class DeviceLoader:
    """The batches of one part. `epoch(n)` gives those of epoch n; len() says how many optimizer steps these are.

    augment: crop from `padding` black pixels around, and flip; in a random order if shuffle. Images in a tensor live on
    the device; files are read by worker processes, some batches ahead, which live until close().

    view: how files are seen, the part's own way if None; a random view takes the place of padding. jitter, lighting:
    strengths of the colour augmentation.

    batch_size is the total over `ranks` processes and the `pieces` into which each of them cuts its share of a step to
    accumulate gradients: of every batch, cut into ranks * pieces equal parts, rank r gets those from r * pieces on, and
    epoch() yields them one by one. What a last batch has too much for that is left out where the order is random; where
    it is not, the parts differ by one image and may be missing, so that each image is read once over all ranks.
    """

    def __init__(
        self,
        part: ImageSet,
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
        view: View | None = None,
        jitter: float = 0.0,
        lighting: float = 0.0,
        rank: int = 0,
        ranks: int = 1,
        pieces: int = 1,
    ):
        if shuffle and batch_size % (ranks * pieces):
            raise ValueError(f"a batch of {batch_size} cannot be cut into {ranks} ranks times {pieces} pieces")
        self.part, self.batch_size, self.device = part, batch_size, device
        self.shuffle, self.augment, self.padding, self.drop_last = shuffle, augment, padding, drop_last
        self.seed, self.channels_last = seed, channels_last
        self.jitter, self.lighting = jitter, lighting
        self.rank, self.ranks, self.pieces = rank, ranks, pieces
        self.labels = part.labels.to(device)
        self.resident = part.pixels.to(device) if isinstance(part.pixels, torch.Tensor) else None
        self.reader = None
        if self.resident is None:
            files = part.pixels.with_view(view or part.pixels.view)
            self.random_view = isinstance(files.view, RandomCrop)
            self.reader = Reader(files, seed=seed, workers=workers, pin=device.type == "cuda")
        elif view is not None:
            raise ValueError(f"{view} is for image files; the images of {part.where} lie in a tensor")
        else:
            self.random_view = False
        self.copies = torch.cuda.Stream(device) if self.reader and device.type == "cuda" else None
        self.scale = (1 / (255 * torch.tensor(std))).view(3, 1, 1).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.skipped = 0  # unreadable files of the last epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.part), self.batch_size)
        least = self.ranks * self.pieces if self.shuffle else 1
        return whole + (rest >= least and not self.drop_last)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self.reader:
            self.reader.close()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of this rank, from step `start` on; the pieces of a step one after the other."""
        order, drawn = self.draw(epoch)
        chosen = [part for batch in order.split(self.batch_size)[start : len(self)] for part in self.share(batch)]
        drawn = {name: values.to(self.device) for name, values in drawn.items()}
        # once an epoch: a copy in every step would hold up the device
        chosen_there = torch.cat([order[:0], *chosen]).to(self.device).split([len(index) for index in chosen])
        self.skipped = 0
        for index, there, (pixels, places, box) in zip(chosen, chosen_there, self.read(epoch, chosen), strict=True):
            own = {name: values[..., there] for name, values in drawn.items()}
            shift, flip = own.get("shift"), own.get("flip")
            if shift is not None:
                row = there if pixels is self.resident else torch.arange(len(index), device=self.device)
                pixels = crop_and_flip(pixels, row, *shift, flip)
            elif pixels is self.resident:
                pixels = pixels.index_select(0, there)
            elif flip is not None:
                pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(2), pixels)
            places = there if places is None else places
            yield Batch(self.normalise(pixels, own), self.labels[places], index, places, shift, flip, box)

    def draw(self, epoch: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The order (N,) of the set in this epoch, and what is drawn for each position in it, (..., N), on the host."""
        count, generator, drawn = len(self.part), epoch_generator(self.seed, epoch), {}
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if self.augment:
            if not self.random_view:
                drawn["shift"] = torch.randint(-self.padding, self.padding + 1, (2, count), generator=generator)
            drawn["flip"] = torch.rand(count, generator=generator) < 0.5
        if self.jitter:
            drawn["factors"] = 1 + self.jitter * (2 * torch.rand(3, count, generator=generator) - 1)
        if self.lighting:
            drawn["strength"] = self.lighting * torch.randn(3, count, generator=generator)
        return order, drawn

    def share(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a global batch of indices that this rank reads."""
        return split_batch(batch, rank=self.rank, ranks=self.ranks, pieces=self.pieces, even=self.shuffle)

    def read(
        self, epoch: int, chosen: list[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Pixels, positions in the part (of neighbours, where a file was skipped) and boxes of each batch of files; the
        whole part, for every batch, where it lies on the device.
        """
        if self.resident is not None:
            yield from ((self.resident, None, None) for _ in chosen)
            return
        for index, (pixels, places, box) in zip(chosen, self.reader.read(chosen, epoch), strict=True):
            self.skipped += int((places != index).sum())
            yield tuple(self.copied([pixels, places, box]))

    def copied(self, tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The same on the device. On CUDA a stream of its own copies them out of pinned memory, beside the steps that
        the host has queued already, and the stream in use waits for nothing but this copy.
        """
        if self.copies is None:
            return [one if one is None else one.to(self.device) for one in tensors]
        with torch.cuda.stream(self.copies):
            there = [one if one is None else one.to(self.device, non_blocking=True) for one in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        for one in there:
            if one is not None:
                one.record_stream(current)  # its memory belongs to the copying stream, which must not reuse it yet
        return there

    def normalise(self, pixels: torch.Tensor, drawn: dict[str, torch.Tensor]) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> normalised floats (B, 3, H, W), channels last in memory unless told otherwise."""
        images = pixels.permute(0, 3, 1, 2).float()
        if "factors" in drawn or "strength" in drawn:
            if "factors" in drawn:  # of colours in 0..1
                affine = color_jitter(images.mean((2, 3)) / 255, drawn["factors"])
            else:
                affine = identity_colors(len(images), self.device)
            if "strength" in drawn:
                affine = add_lighting(affine, drawn["strength"])
            scale = self.scale.view(3, 1)
            constant = 255 * scale * affine[:, :, 3:] + self.shift.view(3, 1)
            images = apply_colors(images, torch.cat([scale * affine[:, :, :3], constant], 2))
        else:
            torch.addcmul(self.shift, images, self.scale, out=images)
        return images if self.channels_last else images.contiguous()
