"""Read image files as square uint8 pixels, decoded in worker processes."""

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from engine.data.decode import BadImage, decode_into
from engine.data.folders import FileList
from engine.data.sample_rng import draw_crop_numbers
from engine.data.views import RandomCrop, View
from engine.errors import UserError
from engine.runtime.distributed import count_cores_per_process

WAIT_SECONDS = 600  # for the next batch of the workers; a file server that restarts is back by then


class ImageFiles:
    """A sequence of image files that are read as square images. Indexing with a tensor returns a subset.

    on_bad_image: what to do with an unreadable file. `stop` raises an error; `skip` leaves the file out; `replace`
    reads the next readable file instead and returns the index of that file.
    """

    remedy: ClassVar[str] = "replace the file, or skip unreadable files with --on_bad_image skip"

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

    def with_replacement(self) -> "ImageFiles":
        """Return the same files, with `replace` in place of `skip`."""
        return ImageFiles(self.files, self.view, "stop" if self.on_bad_image == "stop" else "replace")

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Read a batch: images uint8 (B, size, size, 3), the indices (B,) of the files that were read, and boxes.

        boxes (B, 4), only for a random view: the visible part of each file as y1, y2, x1, x2 in 0..1. With `skip`, B is
        the number of readable files, which may be 0. With `stop`, the result for an unreadable file is (None, reason,
        None). An exception is not raised here, because the DataLoader would show it with the full traceback of the
        worker.
        """
        pixels = torch.empty(len(index), self.size, self.size, 3, dtype=torch.uint8)
        random = isinstance(self.view, RandomCrop)
        draws = draw_crop_numbers(seed, epoch, index) if random else [None] * len(index)
        indices, boxes = [], []
        outs = pixels.numpy()
        for wanted_index, drawn in zip(index, draws, strict=True):
            try:
                read_index, box = self.read_one(wanted_index, drawn, outs[len(indices)])
            except BadImage as error:
                if self.on_bad_image == "skip":
                    continue
                return None, str(error), None
            indices.append(read_index)
            boxes.append(box)
        indices = torch.tensor(indices, dtype=torch.long)
        return pixels[: len(indices)], indices, torch.tensor(boxes) if random else None

    def read_one(self, index: int, draws: torch.Tensor | None, out: np.ndarray) -> tuple[int, list[float]]:
        """Read the image at `index` (with `replace`, or the next readable one) into `out`; return its index and box."""
        for step in range(len(self)):
            read_index = (index + step) % len(self)
            try:
                return read_index, decode_into(out, self.files.path(read_index), self.view, draws, self.files.upright)
            except BadImage:
                if self.on_bad_image != "replace":
                    raise
        raise BadImage("none of the image files can be read")

    def read_all(self, workers: int, progress: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Read all images: uint8 (N, size, size, 3), and the indices (N,) of the files that were read."""
        order = torch.arange(len(self)).split(256)
        reader = BatchReader(self, workers=workers)
        bar = progress(reader.read(order), total=len(order), desc="reading images", unit="batch")
        pixels, indices, _ = zip(*bar, strict=True)
        reader.close()
        return torch.cat(pixels), torch.cat(indices)


class BatchReader:
    """Read batches of image files ahead of time in worker processes.

    The workers start with the first batch and live until close(). files: ImageFiles, or another object with the same
    read() and remedy.
    """

    def __init__(self, files: ImageFiles, *, seed: int = 0, workers: int = 0, pin: bool = False):
        self.samples, self.order = BatchDataset(files, seed), BatchOrder()
        self.workers, self.pin = min(workers, count_cores_per_process()), pin  # more workers than cores do not help
        self.loader, self.batches, self.calls = None, None, 0

    def read(self, order: list[torch.Tensor], epoch: int = 0) -> Iterator[tuple]:
        """Yield pixels, indices and boxes for each index tensor (B,) in order; see ImageFiles.read().

        A new call cancels the batches that an earlier call has not yielded yet.
        """
        self.calls += 1
        call, self.order.epoch, self.order.batches = self.calls, epoch, order
        self.batches = self.start_iterator()
        for _ in order:
            if call != self.calls:
                raise RuntimeError(f"epoch {epoch} was cancelled by a later call of read() or by close()")
            try:
                pixels, indices, boxes = next(self.batches)
            except Exception as error:  # a worker died or does not answer: the next epoch starts new ones
                if "timed out" in str(error):
                    self.kill_workers()
                self.close()
                raise
            if isinstance(pixels, RuntimeError):
                self.close()
                raise pixels
            if pixels is None:
                raise UserError(f"cannot read an image: {indices}\n{self.samples.files.remedy}")
            yield pixels, indices, boxes

    def start_iterator(self) -> Iterator[tuple]:
        """Return the DataLoader's iterator over the current order. Existing workers are reused."""
        if self.loader is not None:
            return iter(self.loader)
        self.loader = DataLoader(
            self.samples,
            batch_sampler=self.order,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            timeout=WAIT_SECONDS if self.workers else 0,
            persistent_workers=self.workers > 0,
            collate_fn=identity_collate,
            worker_init_fn=start_worker,
            pin_memory=self.pin,
            generator=torch.Generator(),  # the loader draws a seed, which must not come from the global generator
        )
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # must precede the fork: a forked worker would wait for threads that fork does not copy
        try:
            return iter(self.loader)
        finally:
            cv2.setNumThreads(threads)

    def kill_workers(self) -> None:
        """Stop workers that do not answer. They ignore SIGTERM, and Python would wait for them when it exits."""
        with suppress(ValueError):  # not in the main thread, where torch handles no signal either
            previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error when a worker is killed
        for process in self.batches._workers:
            process.kill()
        self.batches._shutdown_workers()
        with suppress(ValueError):
            signal.signal(signal.SIGCHLD, previous)

    def close(self) -> None:
        """Stop the workers."""
        self.calls += 1
        self.loader = self.batches = None  # dropping the last reference to the iterator stops the workers


class BatchOrder:
    """The batch sampler of the DataLoader: it returns the batches that are set for the next epoch.

    The DataLoader asks for them at the start of each epoch and is never recreated, so that its workers stay alive.
    """

    def __init__(self):
        self.epoch: int = 0
        self.batches: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, batches = self.epoch, self.batches
        return ((epoch, index.tolist()) for index in batches)


class BatchDataset(Dataset):
    """The dataset in the workers. A batch is requested as (epoch, indices), because workers outlive an epoch."""

    def __init__(self, files: ImageFiles, seed: int):
        self.files, self.seed = files, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, request: tuple[int, list[int]]) -> tuple:
        epoch, index = request
        batch = self.files.read(index, self.seed, epoch)
        if get_worker_info():
            try:
                share_memory(batch)
            except RuntimeError as error:
                return RuntimeError(f"DataLoader worker: {error}"), None, None
        return batch


def share_memory(value) -> None:
    """Move the tensors of a batch to shared memory. The DataLoader would do it in a thread of the worker, and if there
    is no memory left, the batch would never arrive.
    """
    if isinstance(value, torch.Tensor) and value.numel():
        value.share_memory_()
    elif isinstance(value, (list, tuple)):
        for one in value:
            share_memory(one)
    elif isinstance(value, dict):
        share_memory(list(value.values()))


def identity_collate(batch: tuple) -> tuple:
    return batch


def start_worker(worker: int) -> None:
    """Initialise a worker: one thread, and SIGTERM is ignored.

    Job schedulers send SIGTERM to all processes. The training process handles it: it still needs the images of the step
    that it finishes, and it stops its workers itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    if cv2.getNumThreads() != 1:  # in a worker that was spawned, not forked
        cv2.setNumThreads(1)
