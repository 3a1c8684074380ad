"""Image files as square uint8 pixels, decoded in worker processes."""

import signal
from collections.abc import Callable, Iterator
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.decode import BadImage, decode_into
from engine.data.folders import FileList
from engine.data.sample_rng import draw_crop_numbers
from engine.data.views import RandomCrop, View
from engine.errors import UserError
from engine.runtime.distributed import cores_per_process


class ImageFiles:
    """Files as a sequence of square images. An index tensor gives a sub-sequence.

    on_bad_image: `stop`, or `skip` to let the next readable file, with its index, serve.
    """

    remedy: ClassVar[str] = "replace the file, or leave such files out with --on_bad_image skip"

    def __init__(self, files: FileList, view: View, on_bad_image: str = "stop"):
        self.files, self.view, self.on_bad_image = files, view, on_bad_image

    def __len__(self) -> int:
        return len(self.files)

    @property
    def size(self) -> int:
        return self.view.size

    def __getitem__(self, index: torch.Tensor) -> "ImageFiles":
        return ImageFiles(self.files[index], self.view, self.on_bad_image)

    def with_view(self, view: View) -> "ImageFiles":
        return ImageFiles(self.files, view, self.on_bad_image)

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Images uint8 (B, size, size, 3), the indices (B,) of the files they are of, and for a random view what
        part of the file each shows, (B, 4) as y1, y2, x1, x2 in 0..1. (None, what is wrong, None) for a bad file: an
        error raised here would come out of a worker as a page of text.
        """
        pixels = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8)
        random = isinstance(self.view, RandomCrop)
        draws = draw_crop_numbers(seed, epoch, index) if random else [None] * len(index)
        places, boxes = [], []
        for place, drawn, out in zip(index, draws, pixels.numpy(), strict=True):
            try:
                served, box = self.read_one(place, drawn, out)
            except BadImage as error:
                return None, str(error), None
            places.append(served)
            boxes.append(box)
        return pixels, torch.tensor(places), torch.tensor(boxes) if random else None

    def read_one(self, index: int, draws: torch.Tensor | None, out: np.ndarray) -> tuple[int, list[float]]:
        """Fill `out` with the image at `index` or, where allowed, the next one that can be read; its index and box."""
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return place, decode_into(out, self.files.path(place), self.view, draws)
            except BadImage:
                if self.on_bad_image == "stop":
                    raise
        raise BadImage("no file of this part can be read")

    def read_all(self, workers: int, progress: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Every image, uint8 (N, size, size, 3), and the indices (N,) of the files that served."""
        order = torch.arange(len(self)).split(256)
        reader = BatchReader(self, workers=workers)
        bar = progress(reader.read(order), total=len(order), desc="reading images", unit="batch")
        pixels, places, _ = zip(*bar, strict=True)
        reader.close()
        return torch.cat(pixels), torch.cat(places)


class BatchReader:
    """Batches of image files, read ahead by worker processes that start with the first batch and end with close().

    files: ImageFiles, or what else has a read() and a remedy like theirs.
    """

    def __init__(self, files: ImageFiles, *, seed: int = 0, workers: int = 0, pin: bool = False):
        self.samples, self.order = BatchDataset(files, seed), BatchOrder()
        self.workers, self.pin = min(workers, cores_per_process()), pin  # more workers would only wait
        self.loader, self.batches, self.turn = None, None, 0

    def read(self, order: list[torch.Tensor], epoch: int = 0) -> Iterator[tuple]:
        """Of each index tensor (B,): pixels, indices and boxes, as ImageFiles.read() gives them.

        Calling it again gives up what an earlier call has not delivered.
        """
        self.turn += 1
        turn, self.order.epoch, self.order.batches = self.turn, epoch, order
        self.batches = self.start_iterator()
        for _ in order:
            if turn != self.turn:
                raise RuntimeError(f"epoch {epoch} was given up: another one, or close(), came in between")
            try:
                pixels, places, boxes = next(self.batches)
            except Exception:  # a worker died: the next epoch shall have new ones
                self.close()
                raise
            if pixels is None:
                raise UserError(f"an image cannot be read: {places}\n{self.samples.files.remedy}")
            yield pixels, places, boxes

    def start_iterator(self) -> Iterator[tuple]:
        """The loader's iterator over what BatchOrder says, from the same workers as before if there are any."""
        if self.loader is not None:
            return iter(self.loader)
        self.loader = DataLoader(
            self.samples,
            batch_sampler=self.order,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            persistent_workers=self.workers > 0,
            collate_fn=identity_collate,
            worker_init_fn=start_worker,
            pin_memory=self.pin,
            generator=torch.Generator(),  # the loader draws a number; it shall not be one of the run's
        )
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # before the workers are forked: in them it would wait for threads that fork left behind
        try:
            return iter(self.loader)
        finally:
            cv2.setNumThreads(threads)

    def close(self) -> None:
        """End the workers."""
        self.turn += 1
        self.loader = self.batches = None  # the last reference to the loader's iterator: it ends them


class BatchOrder:
    """What the loader is to read next: it asks at the start of each epoch, and is never made anew."""

    def __init__(self):
        self.epoch: int = 0
        self.batches: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, batches = self.epoch, self.batches
        return ((epoch, index.tolist()) for index in batches)


class BatchDataset(Dataset):
    """What the workers hold. A batch is asked for as (epoch, indices), since a worker outlives the epoch."""

    def __init__(self, files: ImageFiles, seed: int):
        self.files, self.seed = files, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, wanted: tuple[int, list[int]]) -> tuple:
        epoch, index = wanted
        return self.files.read(index, self.seed, epoch)


def identity_collate(batch: tuple) -> tuple:
    return batch


def start_worker(worker: int) -> None:
    """One thread each; and SIGTERM, which schedulers send to all processes, is left to the one that trains: it needs
    the images of the step it finishes, and ends its workers itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    if cv2.getNumThreads() != 1:  # a worker that was not forked
        cv2.setNumThreads(1)
