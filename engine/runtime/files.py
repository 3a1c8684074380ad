"""Write files so that a kill, a full disk or Ctrl-C never leaves an incomplete one."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from engine.errors import UserError

MAX_STEM_BYTES = 220  # of a side file, whose name has an ending; most file systems allow 255


@contextmanager
def delay_interrupt() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, and raise KeyboardInterrupt then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    previous_handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if received:
        raise KeyboardInterrupt


def make_side_path(path: Path) -> Path:
    """Return a new name beside `path` for a file that will be renamed to it.

    It names the process, and no two calls return the same: processes in two containers can have the same number.
    """
    name = os.fsencode(path.name)[:MAX_STEM_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.part-{os.getpid()}-{uuid4().hex[:8]}")


def write_atomic(path: Path, write: Callable[[Path], None], before_rename: Callable[[], None] = lambda: None) -> None:
    """Write a file atomically: write(side) fills a side file, which is flushed to disk and renamed to `path`.

    before_rename() is called just before the rename. Raises UserError if the disk is full or not writable; an existing
    file is then unchanged.
    """
    path = Path(path)
    side = make_side_path(path)
    try:
        write(side)
        with open(side, "rb+") as file:
            os.fsync(file.fileno())
        before_rename()
        os.replace(side, path)
        if os.name == "posix":  # flush the rename itself too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        cause = "the disk is full: " if path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20 else ""
        kept = "the old file is intact" if path.exists() else "no partial file is left"
        raise UserError(
            f"could not write {path}: {cause}{str(error).splitlines()[0]}\n{kept}; free disk space or write elsewhere"
        ) from error
    finally:
        with suppress(OSError):  # it is gone unless an error or Ctrl-C came before the rename
            side.unlink()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically. Raises UserError as write_atomic() does."""
    write_atomic(path, lambda side: side.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def check_output_folder(folder: Path, option: str) -> None:
    """Raise UserError if no files can be written to a folder, which need not exist. option: with its value."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "is not writable" if existing.is_dir() else "is a file, not a folder"
        raise UserError(f"{option}: {existing} {reason}; choose another path")


def find_overwritten(outputs: Iterable[Path], inputs: Iterable[Path]) -> Path | None:
    """Return the first output path that is one of the input files, also under another name; None: there is none."""
    files = {(status.st_dev, status.st_ino) for status in (path.stat() for path in inputs if path.exists())}
    for path in outputs:
        if path.is_file() and (path.stat().st_dev, path.stat().st_ino) in files:
            return path
    return None
