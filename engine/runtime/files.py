"""Writing files so that a kill, a full disk or Ctrl-C never leaves half of one."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import UserError


@contextmanager
def delay_interrupt() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done, then let it through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


def write_atomic(path: Path, write: Callable[[Path], None], before_rename: Callable[[], None] = lambda: None) -> None:
    """`write` fills a side file; it is flushed to the disk and then renamed over `path`.

    Raises UserError when the disk is full or not writable: the file that was there is then untouched.
    """
    path = Path(path)
    side = path.with_name(f".{path.name}.part")
    try:
        write(side)
        with open(side, "rb+") as file:
            os.fsync(file.fileno())
        before_rename()
        os.replace(side, path)
        if os.name == "posix":  # the new name itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        full = "the disk is full: " if path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20 else ""
        with suppress(OSError):
            side.unlink()
        kept = "the old file is intact" if path.exists() else "nothing was left behind"
        raise UserError(
            f"could not write {path}: {full}{str(error).splitlines()[0]}\n"
            f"{kept}; make room, or write to another place; a run goes on with --checkpoint"
        ) from error


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, lambda side: side.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
