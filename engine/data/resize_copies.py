"""Copies of an image set with a smaller shorter side: they are decoded in a fraction of the time.

The tree, the file names and the lists of labels stay, so a folder of copies is read like the original. A copy is a JPEG
whatever its name ends in; readers go by the content. A run that was stopped goes on where it was.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from engine.config.parser import Parser
from engine.data.decode import convert_to_rgb
from engine.data.folders import IMAGE_EXTENSIONS, find_training_images
from engine.data.image_files import ImageFiles
from engine.data.image_set import Data, ImageSet
from engine.errors import UserError
from engine.runtime.distributed import cores_per_process
from engine.runtime.progress import progress_bar

LISTS = ("val_annotations.txt", "*_boxes.txt", "wnids.txt", "words.txt", "LOC_*.csv")  # copied as they are
QUALITY, SUBSAMPLING = 95, 0  # full colour resolution: a fifth more bytes and a fifth more time to decode than 4:2:0
SPARE = 2  # a JPEG is decoded at reduced size only while it stays this much larger than the largest copy


@dataclass
class ResizeReport:
    """What was done; bad: the files that could not be read, and why."""

    made: int = 0
    skipped: int = 0
    bad: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """For a person: one line, and one more for each bad file."""
        rate = self.made / max(self.seconds, 1e-9)
        bad = f", {len(self.bad):,} files could not be read:" if self.bad else ""
        first = f"made {self.made:,} copies in {self.seconds:.0f} s ({rate:.0f}/s), {self.skipped:,} were there{bad}"
        return [first, *(f"  {path}: {reason}" for path, reason in self.bad)]


class CopyResult(NamedTuple):
    name: str
    made: int
    skipped: int
    problem: str | None


def resize_copies(
    source: Path,
    sizes: list[int],
    dest: Path,
    *,
    workers: int | None = None,
    progress: Callable = lambda items, **kwargs: items,
) -> ResizeReport:
    """For each size S, dest/S/ with the tree of `source`: shorter side S, bicubic, RGB JPEG; one process a core.

    progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError for an empty source, for places
    that lie in each other, and where a copy cannot be written.
    """
    source, dest, begin = Path(source), Path(dest), time.perf_counter()
    check_folders(source, dest, sizes)
    images, lists = walk_images(source)
    if not images:
        raise UserError(f"no images below {source}\nname the folder that holds train/ and val/")
    for name in lists:
        for size in sizes:
            target = dest / str(size) / name
            if not target.exists():
                with atomic_file(target) as side:
                    shutil.copyfile(source / name, side)
    report = ResizeReport()
    work = partial(make_copies, source=str(source), dest=str(dest), sizes=tuple(sorted(set(sizes), reverse=True)))
    with start_pool(workers or cores_per_process()) as pool:
        outcomes = pool.map(work, images, chunksize=8)
        for outcome in progress(outcomes, total=len(images), desc="resizing", unit="image"):
            report.made += outcome.made
            report.skipped += outcome.skipped
            if outcome.problem:
                report.bad.append((source / outcome.name, outcome.problem))
    report.bad.sort()
    report.seconds = time.perf_counter() - begin
    return report


def check_folders(source: Path, dest: Path, sizes: list[int]) -> None:
    if not source.is_dir():
        raise UserError(f"no folder {source}\nname the folder that holds train/ and val/")
    whole, target = source.resolve(), dest.resolve()
    if target == whole or whole in target.parents:
        raise UserError(f"--resize_dest {dest} is in {source}, which is copied\nname a place outside it")
    for size in sizes:
        if whole == target / str(size) or target / str(size) in whole.parents:
            raise UserError(f"{source}, which is copied, is in {dest / str(size)}\nname another --resize_dest")


def walk_images(source: Path) -> tuple[list[str], list[str]]:
    """Images and lists of labels below source, relative to it, sorted. Links to folders are followed, not upwards."""
    images, lists = [], []
    for root, folders, files in os.walk(source, followlinks=True):
        here = os.path.realpath(root) + os.sep
        folders[:] = sorted(name for name in folders if not here.startswith(os.path.realpath(here + name) + os.sep))
        below = os.path.relpath(root, source)
        for name in sorted(files):
            path = os.path.normpath(os.path.join(below, name))
            if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
                images.append(path)
            elif any(fnmatch(name, pattern) for pattern in LISTS):
                lists.append(path)
    return images, lists


def make_copies(name: str, *, source: str, dest: str, sizes: tuple[int, ...]) -> CopyResult:
    """The copies of one image that are not there yet, from one decoding. sizes: the largest first."""
    targets = {size: Path(dest, str(size), name) for size in sizes}
    wanted = [size for size in sizes if not targets[size].exists()]
    if not wanted:
        return CopyResult(name, 0, len(sizes), None)
    try:
        with Image.open(os.path.join(source, name)) as image:
            if image.format == "JPEG":
                factor = SPARE * wanted[0] / min(image.size)  # draft() gives no less than it is asked for
                image.draft("RGB", (int(image.width * factor), int(image.height * factor)))
            picture = convert_to_rgb(image)
    except Exception as error:
        return CopyResult(name, 0, len(sizes) - len(wanted), str(error) or type(error).__name__)
    for size in wanted:
        scale = size / min(picture.size)
        shape = tuple(max(size, round(side * scale)) for side in picture.size)
        with atomic_file(targets[size]) as side:
            copy = picture.resize(shape, Image.Resampling.BICUBIC)
            copy.save(side, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return CopyResult(name, len(wanted), len(sizes) - len(wanted), None)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A side file to fill; it gets the name `target` when it is whole, and goes when that fails or is broken off.

    Not flushed to the disk as engine.runtime.files does it: a million flushes take hours, and the originals are still
    there.
    """
    side = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield side
        os.replace(side, target)
    except OSError as error:
        what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"could not write {target}: {what}\nmake room, or name another --resize_dest") from error
    finally:
        with suppress(OSError):
            side.unlink()


@contextmanager
def start_pool(workers: int) -> Iterator[Executor]:
    """Processes by fork, which imports nothing anew; threads where there is no fork (Pillow lets go of the lock)."""
    if sys.platform == "linux" and workers > 1:
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, mp_context=fork, initializer=ignore_interrupt)
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # what is at work is finished


def ignore_interrupt() -> None:
    """Ctrl-C is for the parent, which then lets its workers finish what they are at."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which takes a side file away


def resize_data_set(parser: Parser, typed: dict) -> None:
    """--resize_to of imagenet_train.py: make smaller copies of the images, which are quicker to read."""
    if "resize_dest" not in typed:
        parser.error("--resize_to needs --resize_dest DIR: where shall the copies go?")
    source, dest = Path(typed.get("data_dir", parser.defaults["data_dir"])), Path(typed["resize_dest"])
    report = resize_copies(source, typed["resize_to"], dest, workers=typed.get("workers"), progress=progress_bar)
    print("\n".join(report.lines()))


def find_copies(data: Data, places: dict[str, str | None]) -> dict[str, ImageSet]:
    """The training images `original`, and their resized copies by name (the originals where there is no place).

    places: name -> folder, as --data_NAME gives it. With --on_bad_image skip, images without a copy leave the training
    part. Raises UserError for copies of other images, and otherwise where some are missing.
    """
    names, found = data.train.pixels.files.names(), {}
    for name, place in places.items():
        if place:
            copies = find_training_images(f"--data_{name}", Path(place))
            there = dict(zip(copies.files.names(), range(len(copies.files)), strict=True))
            index = torch.tensor([there.get(file, -1) for file in names])
            check_copies(f"--data_{name} {place}", data.train, [names[i] for i in (index < 0).nonzero().flatten()])
            found[name] = copies, index
    kept = torch.stack([torch.ones(len(names)) >= 0, *(index >= 0 for _, index in found.values())]).all(0)
    if not kept.all():
        data.warnings.append(f"{int((~kept).sum()):,} training images have no copy and are left out")
        data.train = data.train.take(kept.nonzero().flatten())
    parts = dict.fromkeys(["original", *places], data.train)
    for name, (copies, index) in found.items():
        files = copies.files[index[kept]]
        pixels = ImageFiles(files, data.train.pixels.view, data.train.pixels.on_bad_image)
        parts[name] = replace(data.train, pixels=pixels, origin=str(copies.root), files=files)
    return parts


def check_copies(what: str, originals: ImageSet, missing: list[str]) -> None:
    if len(missing) > len(originals) / 2:
        raise UserError(
            f"{what}: copies of other images than the {len(originals):,} in {originals.origin}; no {missing[0]} there"
            "\nmake them anew with --resize_to"
        )
    if missing and originals.pixels.on_bad_image == "stop":
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise UserError(
            f"{what}: no copy of {missing[0]}{more}\ncomplete them with --resize_to, which lists what it cannot read; "
            "--on_bad_image skip leaves such images out"
        )
