"""Make resized copies of an image set, which are decoded in a fraction of the time.

The folder tree, the file names and the label lists are kept, so a folder of copies is read like the original. Every
copy is a JPEG, whatever its extension; readers detect the format from the content. An interrupted run can be repeated:
it makes only the copies that are missing.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import filter as fnmatch_filter
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ExifTags, Image

from engine.config.parser import Parser
from engine.data.decode import convert_to_rgb, describe_error, get_orientation
from engine.data.folders import find_training_images
from engine.data.image_files import ImageFiles
from engine.data.image_set import Data, ImageSet
from engine.data.listing import filter_images, walk_files
from engine.errors import UserError
from engine.runtime.claim import claim, read_owner, release_claims
from engine.runtime.distributed import count_cores_per_process
from engine.runtime.files import make_side_path
from engine.runtime.progress import progress_bar

LISTS = ("val_annotations.txt", "*_boxes.txt", "wnids.txt", "words.txt", "LOC_*.csv")  # label lists, copied unchanged
QUALITY, SUBSAMPLING = 95, 0  # full colour resolution: a fifth more bytes and a fifth more time to decode than 4:2:0
MIN_REDUCED_RATIO = 2  # a JPEG decoded at reduced size stays at least this much larger than its largest copy

HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_temporaries: set[Path] = set()  # the files that this process is writing


@dataclass
class ResizeReport:
    """The numbers of copies. bad: the files that could not be read, and why."""

    made: int = 0
    skipped: int = 0  # copies that existed already
    bad: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Return lines to print: a summary and one line for each unreadable file."""
        rate = self.made / max(self.seconds, 1e-9)
        bad = f"; unreadable files: {len(self.bad):,}" if self.bad else ""
        first = (
            f"made {self.made:,} copies in {self.seconds:.0f} s ({rate:.0f}/s); existed already: {self.skipped:,}{bad}"
        )
        return [first, *(f"  {path}: {reason}" for path, reason in self.bad)]


class CopyResult(NamedTuple):
    """The result for one image: its name, the numbers of copies, and the reason if it could not be read."""

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
    """Write copies of all images in `source` to dest/S/ for each size S, with the same folder tree.

    The shorter side of a copy has S pixels (bicubic, RGB JPEG). workers: number of processes; None: one per core.
    progress: wraps an iterable in a progress bar, with tqdm's signature. Raises UserError for an empty source, if
    source and dest contain each other, and if a copy cannot be written.
    """
    source, dest, start = Path(source), Path(dest), time.perf_counter()
    check_folders(source, dest, sizes)
    images, lists = find_images_and_lists(source)
    if not images:
        raise UserError(f"no images in {source}\ngive the folder that contains train/ and val/ with --data_dir")
    with claim_destinations(dest, sizes), explain_killed_worker():
        # ---- Label lists ----
        for name in lists:
            for size in sizes:
                target = dest / str(size) / name
                if not target.exists():
                    with atomic_file(target) as temporary:
                        shutil.copyfile(source / name, temporary)
        # ---- Images ----
        report = ResizeReport()
        order = tuple(sorted(set(sizes), reverse=True))
        copy_image = partial(make_copies, source=str(source), dest=str(dest), sizes=order)
        with start_pool(workers or count_cores_per_process()) as pool:
            outcomes = pool.map(copy_image, images, chunksize=8)
            for outcome in progress(outcomes, total=len(images), desc="resizing", unit="image"):
                report.made += outcome.made
                report.skipped += outcome.skipped
                if outcome.problem:
                    report.bad.append((source / outcome.name, outcome.problem))
    report.bad.sort()
    report.seconds = time.perf_counter() - start
    return report


@contextmanager
def explain_killed_worker() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a process that makes copies was killed, perhaps for lack of memory\nrun the command again with fewer "
            "--workers; it makes only the copies that are missing"
        ) from error


@contextmanager
def claim_destinations(dest: Path, sizes: list[int]) -> Iterator[None]:
    """Claim the folders of copies, and delete the side files that a killed process left there.

    Raises UserError if another process makes copies there, or if a folder cannot be created.
    """
    try:
        for folder in {dest / str(size) for size in sizes}:
            try:
                claimed = claim(folder / ".lock")
            except OSError as error:
                raise UserError(f"cannot create {folder}: {error.strerror}\ngive another --resize_dest") from error
            if not claimed:
                raise UserError(
                    f"{folder} is in use: {read_owner(folder / '.lock')} makes copies there\nwait for its end, or give "
                    f"another --resize_dest; if that machine is gone, delete {folder / '.lock'}"
                )
            for root, _, files in os.walk(folder):
                for name in fnmatch_filter(files, ".*.part*"):
                    os.unlink(os.path.join(root, name))
        yield
    finally:
        release_claims()


def check_folders(source: Path, dest: Path, sizes: list[int]) -> None:
    """Raise UserError if source does not exist, or if source and a folder of copies contain each other."""
    if not source.is_dir():
        raise UserError(f"no folder {source}\ngive the folder that contains train/ and val/ with --data_dir")
    source_path, dest_path = source.resolve(), dest.resolve()
    if dest_path == source_path or source_path in dest_path.parents:
        raise UserError(f"--resize_dest {dest} is inside the source folder {source}\ngive a folder outside it")
    for size in sizes:
        if source_path == dest_path / str(size) or dest_path / str(size) in source_path.parents:
            raise UserError(f"the source folder {source} is inside {dest / str(size)}\ngive another --resize_dest")


def find_images_and_lists(source: Path) -> tuple[list[str], list[str]]:
    """Find the images and label lists in a folder tree: sorted paths relative to source."""
    files = list(walk_files(source))
    lists = (file for file in files if any(fnmatch(os.path.basename(file), pattern) for pattern in LISTS))
    return filter_images(files), sorted(lists)


def make_copies(name: str, *, source: str, dest: str, sizes: tuple[int, ...]) -> CopyResult:
    """Make the missing copies of one image; it is decoded once. sizes: in descending order."""
    targets = {size: Path(dest, str(size), name) for size in sizes}
    missing = [size for size in sizes if not targets[size].exists()]
    if not missing:
        return CopyResult(name, 0, len(sizes), None)
    try:
        with Image.open(os.path.join(source, name)) as image:
            if image.format == "JPEG":
                factor = MIN_REDUCED_RATIO * missing[0] / min(image.size)  # draft() never goes below the requested size
                image.draft("RGB", (int(image.width * factor), int(image.height * factor)))
            extra = {"exif": Image.Exif()} if (orientation := get_orientation(image)) != 1 else {}
            for exif in extra.values():  # copies are turned like the originals
                exif[ExifTags.Base.Orientation] = orientation
            rgb = convert_to_rgb(image)
    except Exception as error:
        return CopyResult(name, 0, len(sizes) - len(missing), describe_error(error))
    for size in missing:
        scale = size / min(rgb.size)
        shape = tuple(max(size, round(temporary * scale)) for temporary in rgb.size)
        with atomic_file(targets[size]) as temporary:
            copy = rgb.resize(shape, Image.Resampling.BICUBIC)
            copy.save(temporary, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING, **extra)
    return CopyResult(name, len(missing), len(sizes) - len(missing), None)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It is renamed to `target` at the end, and deleted after an error.

    The file is not flushed to disk, unlike in engine.runtime.files: a million flushes take hours, and the originals
    still exist. Raises UserError if the file cannot be written.
    """
    temporary = make_side_path(target)
    _temporaries.add(temporary)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"cannot write {target}: {reason}\nfree disk space, or give another --resize_dest") from error
    finally:
        delete_temporary(temporary)


def delete_temporary(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink()
    _temporaries.discard(temporary)


@contextmanager
def start_pool(workers: int) -> Iterator[Executor]:
    """Yield a pool of forked processes, which need no new imports; after an error or Ctrl-C they end at once.

    Where fork is not available, the pool has threads; Pillow releases the GIL.
    """
    processes = []
    if sys.platform == "linux" and workers > 1:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"), initializer=start_worker)
        before = multiprocessing.active_children()
        with hold_signals():  # a worker that got Ctrl-C before it ignores it would break the pool
            pool.submit(int)  # starts all workers
        processes = [process for process in multiprocessing.active_children() if process not in before]
    else:
        pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM in the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker() -> None:
    """Prepare a worker: the parent handles Ctrl-C; SIGTERM and the end of the parent end the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_worker)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    end_worker()


def end_worker(*signal) -> None:
    """Delete the temporary file and exit. The pool would treat an exception as the result of the task, and continue."""
    for temporary in list(_temporaries):
        delete_temporary(temporary)
    os._exit(1)


def resize_data_set(parser: Parser, typed: dict) -> None:
    """Carry out --resize_to of imagenet_train.py: make resized copies of the images, which are faster to read."""
    if "resize_dest" not in typed:
        parser.error("--resize_to needs --resize_dest DIR, the folder for the copies")
    source, dest = Path(typed.get("data_dir", parser.defaults["data_dir"])), Path(typed["resize_dest"])
    report = resize_copies(source, typed["resize_to"], dest, workers=typed.get("workers"), progress=progress_bar)
    print("\n".join(report.lines()))


def find_copies(data: Data, folders: dict[str, str | None]) -> dict[str, ImageSet]:
    """Return the training images as `original`, and their resized copies by name.

    folders: name -> folder given by --data_NAME; a name without a folder gets the originals. With --on_bad_image skip,
    images without a copy are removed from data.train. Raises UserError if the copies are of other images or, without
    skip, if copies are missing.
    """
    names, found = data.train.pixels.files.names(), {}
    for name, folder in folders.items():
        if folder:
            copies = find_training_images(f"--data_{name}", Path(folder))
            positions = dict(zip(copies.files.names(), range(len(copies.files)), strict=True))
            index = torch.tensor([positions.get(file, -1) for file in names])
            check_copies(f"--data_{name} {folder}", data.train, [names[i] for i in (index < 0).nonzero().flatten()])
            found[name] = copies, index
    kept = torch.stack([torch.ones(len(names)) >= 0, *(index >= 0 for _, index in found.values())]).all(0)
    if not kept.all():
        data.warnings.append(f"training images left out because they have no copy: {int((~kept).sum()):,}")
        data.train = data.train.take(kept.nonzero().flatten())
    image_sets = dict.fromkeys(["original", *folders], data.train)
    for name, (copies, index) in found.items():
        files = copies.files[index[kept]]
        files.upright = data.train.files.upright
        pixels = ImageFiles(files, data.train.pixels.view, data.train.pixels.on_bad_image)
        image_sets[name] = replace(data.train, pixels=pixels, origin=str(copies.root), files=files)
    return image_sets


def check_copies(flag: str, originals: ImageSet, missing: list[str]) -> None:
    """Raise UserError if too many originals have no copy. flag: the option and its folder, for messages."""
    if len(missing) > len(originals) / 2:
        raise UserError(
            f"{flag}: the copies are not of the {len(originals):,} images in {originals.origin}; {missing[0]} is "
            "missing\nmake new copies with --resize_to"
        )
    if missing and originals.pixels.on_bad_image == "stop":
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise UserError(
            f"{flag}: no copy of {missing[0]}{more}\nmake the missing copies with --resize_to, which lists unreadable "
            "images, or leave out images without a copy with --on_bad_image skip"
        )
