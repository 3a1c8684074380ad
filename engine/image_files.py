"""Image files as square uint8 pixels, decoded in worker processes.

JPEGs are decoded by OpenCV, at a half, a quarter or an eighth of the size where the part that is wanted stays large
enough, and resized by torch's anti-aliased uint8 kernel. On one core that takes about half of Pillow's time, and the
pixels are Pillow's to within one level of 255 (reduced decoding apart); Pillow reads the header and whatever is no
plain JPEG. An EXIF orientation is ignored by both.
"""

import io
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from engine.cli import UserError
from engine.distributed import cores
from engine.folders import FileList

Box = tuple[int, int, int, int]  # y1, y2, x1, x2, half-open
TRIES, NUMBERS = 10, 4  # random numbers a sample: tries at a crop, and what each needs
FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class BadImage(Exception):
    """A file that cannot be decoded."""


class StillView:
    """A view that shows the same pixels of an image whenever it is asked: where a box of that image comes to lie."""

    def placed(self, box: tuple[int, int, int, int], width: int, height: int) -> Box:
        """Where the box x0, y0, x1, y1 of an image of width x height pixels lies in the pixels that are cut out of it.

        Clipped to these, and cut to whole pixels towards zero; a box that the view does not show comes back empty.
        """
        _, (rows, columns) = self.plan(height, width, None)
        down, across = corner(self.size, rows, columns)
        x0, y0, x1, y1 = box
        seen = [y * rows // height - down for y in (y0, y1)] + [x * columns // width - across for x in (x0, x1)]
        return tuple(min(max(side, 0), self.size) for side in seen)


def corner(size: int, rows: int, columns: int) -> tuple[int, int]:
    """First row and column of the centre of size x size."""
    return (rows - size) // 2, (columns - size) // 2


@dataclass(frozen=True)
class CentreView(StillView):
    """The shorter side resized to `resize`, then the centre of `size` x `size`."""

    size: int
    resize: int
    # of the size wanted, that reduced decoding leaves at least: 2 keeps evaluation within 0.8 of 255 on average of
    # full decoding (1 would be 2)
    margin: ClassVar[int] = 2

    def __post_init__(self):
        if self.resize < self.size:
            raise ValueError(f"a centre of {self.size} pixels does not fit into a side of {self.resize}")

    def plan(self, height: int, width: int, draws: np.ndarray | None) -> tuple[Box, tuple[int, int]]:
        """The part of the image that is needed, and the rows and columns it is resized to."""
        scale = self.resize / min(height, width)
        return (0, height, 0, width), (max(self.size, round(height * scale)), max(self.size, round(width * scale)))


@dataclass(frozen=True)
class RandomView:
    """torchvision's RandomResizedCrop: a share of the area in [min_scale, max_scale], an aspect ratio in [3/4, 4/3]."""

    size: int
    min_scale: float = 0.08
    max_scale: float = 1.0
    margin: ClassVar[int] = 1  # never to be enlarged again

    def plan(self, height: int, width: int, draws: np.ndarray | None) -> tuple[Box, tuple[int, int]]:
        """draws (TRIES, NUMBERS) in [0, 1). The part of the image, and the rows and columns it is resized to."""
        for share, shape, down, across in draws.tolist():
            area = height * width * (self.min_scale + (self.max_scale - self.min_scale) * share)
            ratio = (4 / 3) ** (2 * shape - 1)  # uniform in its logarithm
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
                return (top, top + h, left, left + w), (self.size, self.size)
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
        return (top, top + h, left, left + w), (self.size, self.size)


@dataclass(frozen=True)
class WholeView(StillView):
    """The whole image squeezed into `resize` x `resize`, whatever its shape, then the centre of `size` x `size`.

    resize None: `size` itself.
    """

    size: int
    resize: int | None = None
    margin: ClassVar[int] = 2  # as for CentreView

    def plan(self, height: int, width: int, draws: np.ndarray | None) -> tuple[Box, tuple[int, int]]:
        """The whole image, and the rows and columns it is resized to."""
        side = self.resize or self.size
        return (0, height, 0, width), (side, side)


View = CentreView | RandomView | WholeView


def uniforms(seed: int, epoch: int, index: list[int]) -> np.ndarray:
    """(B, TRIES, NUMBERS) numbers in [0, 1) that depend on (seed, epoch, index) alone, by splitmix64.

    A hash and no generator: a quarter of a microsecond a sample, and no state that a worker could carry along.
    """
    key = keys(seed, epoch, index)
    steps = np.arange(1, TRIES * NUMBERS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((scramble(key[:, None] + steps) >> np.uint64(11)) * 2.0**-53).reshape(-1, TRIES, NUMBERS)


def keys(seed: int, epoch: int, index: list[int]) -> np.ndarray:
    """(B,) uint64, of a sample's own in that epoch of that seed."""
    key = scramble(np.array([seed % 2**64], np.uint64))
    return scramble(scramble(key + np.uint64(epoch)) + np.array(index, np.uint64))


def scramble(key: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); uint64 wraps around."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def what_is_wrong(error: Exception) -> str:
    """The decoder's message; Pillow's names an object of ours instead of a file."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def decode(path: str | os.PathLike, size: int) -> np.ndarray:
    """RGB uint8 (size, size, 3): the shorter side resized to `size`, then the centre."""
    out = np.empty((size, size, 3), np.uint8)
    decode_into(out, path, CentreView(size, size), None)
    return out


def decode_into(out: np.ndarray, path: str | os.PathLike, view: View, draws: np.ndarray | None) -> list[float]:
    """Fill out, RGB uint8 (size, size, 3), and return the box that is seen: y1, y2, x1, x2 in shares of the image."""
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
        with Image.open(io.BytesIO(raw)) as image:
            height, width = image.height, image.width
            (y1, y2, x1, x2), (rows, columns) = view.plan(height, width, draws)
            pixels, reduced = load(image, raw, min((y2 - y1) // rows, (x2 - x1) // columns) // view.margin)
    except Exception as error:
        raise BadImage(f"{path}: {what_is_wrong(error)}") from error
    top, left, h, w = (side // reduced for side in (y1, x1, y2 - y1, x2 - x1))
    pixels = resized(pixels[top : top + h, left : left + w], rows, columns)
    down, across = corner(view.size, rows, columns)
    cv2.cvtColor(pixels[down : down + view.size, across : across + view.size], cv2.COLOR_BGR2RGB, dst=out)
    return [reduced * top / height, reduced * (top + h) / height, reduced * left / width, reduced * (left + w) / width]


def load(image: Image.Image, raw: bytes, spare: int) -> tuple[np.ndarray, int]:
    """BGR uint8 pixels of an image whose header is read, and the divisor of their size: at most `spare`, and 1, 2, 4
    or 8.
    """
    # OpenCV fills up a JPEG that was cut short; Pillow, which has the last word, refuses it
    if image.format == "JPEG" and image.mode in ("RGB", "L") and raw.endswith(b"\xff\xd9"):
        reduced = next(divisor for divisor in (8, 4, 2, 1) if divisor <= max(spare, 1))
        try:
            pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), FLAGS[reduced] | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            pixels = None
        if pixels is not None and pixels.shape[:2] == (-(-image.height // reduced), -(-image.width // reduced)):
            return pixels, reduced
    return np.asarray(as_rgb(image))[:, :, ::-1].copy(), 1


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resized(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (rows, columns, 3), bilinear and anti-aliased."""
    if pixels.shape[:2] == (rows, columns):
        return pixels
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order torch sees channels last: 1.5x faster
    images = F.interpolate(images, (rows, columns), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1)[0].numpy()


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
        random = isinstance(self.view, RandomView)
        draws = uniforms(seed, epoch, index) if random else [None] * len(index)
        places, boxes = [], []
        for place, drawn, out in zip(index, draws, pixels.numpy(), strict=True):
            try:
                served, box = self.read_one(place, drawn, out)
            except BadImage as error:
                return None, str(error), None
            places.append(served)
            boxes.append(box)
        return pixels, torch.tensor(places), torch.tensor(boxes) if random else None

    def read_one(self, index: int, draws: np.ndarray | None, out: np.ndarray) -> tuple[int, list[float]]:
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
        reader = Reader(self, workers=workers)
        bar = progress(reader.read(order), total=len(order), desc="reading images", unit="batch")
        pixels, places, _ = zip(*bar, strict=True)
        reader.close()
        return torch.cat(pixels), torch.cat(places)


class Reader:
    """Batches of image files, read ahead by worker processes that start with the first batch and end with close().

    files: ImageFiles, or what else has a read() and a remedy like theirs.
    """

    def __init__(self, files: ImageFiles, *, seed: int = 0, workers: int = 0, pin: bool = False):
        self.samples, self.order = Samples(files, seed), Order()
        self.workers, self.pin = min(workers, cores()), pin  # more workers would only wait
        self.loader, self.batches, self.turn = None, None, 0

    def read(self, order: list[torch.Tensor], epoch: int = 0) -> Iterator[tuple]:
        """Of each index tensor (B,): pixels, indices and boxes, as ImageFiles.read() gives them.

        Calling it again gives up what an earlier call has not delivered.
        """
        self.turn += 1
        turn, self.order.epoch, self.order.batches = self.turn, epoch, order
        self.batches = self.begin()
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

    def begin(self) -> Iterator[tuple]:
        """The loader's iterator over what Order says, from the same workers as before if there are any."""
        if self.loader is not None:
            return iter(self.loader)
        self.loader = DataLoader(
            self.samples,
            batch_sampler=self.order,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            persistent_workers=self.workers > 0,
            collate_fn=as_it_is,
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


class Order:
    """What the loader is to read next: it asks at the start of each epoch, and is never made anew."""

    def __init__(self):
        self.epoch: int = 0
        self.batches: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, batches = self.epoch, self.batches
        return ((epoch, index.tolist()) for index in batches)


class Samples(Dataset):
    """What the workers hold. A batch is asked for as (epoch, indices), since a worker outlives the epoch."""

    def __init__(self, files: ImageFiles, seed: int):
        self.files, self.seed = files, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, wanted: tuple[int, list[int]]) -> tuple:
        epoch, index = wanted
        return self.files.read(index, self.seed, epoch)


def as_it_is(batch: tuple) -> tuple:
    return batch


def start_worker(worker: int) -> None:
    """One thread each; and SIGTERM, which schedulers send to all processes, is left to the one that trains: it needs
    the images of the step it finishes, and ends its workers itself.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    if cv2.getNumThreads() != 1:  # a worker that was not forked
        cv2.setNumThreads(1)
