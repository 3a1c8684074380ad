"""Claim an output folder for this process, so that no second run writes to it.

The claim is a lock on a small file. The operating system releases it when the process ends, however it ends, and the
text in the file says who has it. Some network file systems have no locks. There the process that claims last has the
folder, and check_claim() stops the earlier one before it writes again.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path

from engine.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

POLL_SECONDS = 0.2
MAX_FAILURES = 10  # a folder that cannot be created would otherwise be tried for ever

UNKNOWN_OWNER = "another process"


@dataclass(frozen=True)
class Claim:
    """A lock file that this process has. made: the folders created for it, from the innermost."""

    descriptor: int
    owner: str  # the text in the file
    locked: bool  # False: the file system has no locks
    made: list[Path]


_claims: dict[Path, Claim] = {}


def claim(lock: Path, *, new: bool = False, wait: float = 0.0) -> bool:
    """Claim a lock file, and create its folder. Returns False if another process has it.

    new: the file must not exist yet. wait: seconds to wait for the other process to end.
    """
    lock, end, failures = lock.resolve(), time.monotonic() + wait, 0
    while lock not in _claims:
        try:
            claimed = try_to_claim(lock, make_folders(lock.parent), new)
        except FileNotFoundError:  # its last owner deleted the file or the folder just now
            if (failures := failures + 1) == MAX_FAILURES:
                raise
            continue
        if claimed:
            _claims[lock] = claimed
        elif time.monotonic() >= end:
            return False
        else:
            time.sleep(POLL_SECONDS)
    return True


def try_to_claim(lock: Path, made: list[Path], new: bool) -> Claim | None:
    """Return the claim, or None if another process has it. Raises FileNotFoundError if the file or folder vanishes."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0), 0o666)
    except FileExistsError:
        return None
    try:
        locked = lock_file(descriptor)
        if os.fstat(descriptor).st_ino != os.stat(lock).st_ino:
            raise FileNotFoundError(f"{lock} was replaced")
        owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        os.truncate(descriptor, 0)
        os.write(descriptor, owner.encode())
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return Claim(descriptor, owner, locked, made)


def lock_file(descriptor: int) -> bool:
    """Lock an open file. Returns False if its file system has no locks. Raises BlockingIOError if it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents. Returns those that did not exist, from the innermost."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def read_owner(lock: Path) -> str:
    """Return who has a lock file; some file systems do not let others read it."""
    with suppress(OSError, UnicodeDecodeError):
        return lock.read_text(encoding="utf-8") or UNKNOWN_OWNER
    return UNKNOWN_OWNER


def is_claimed(lock: Path) -> bool:
    """Return whether a process has claimed a lock file, without claiming it. On a file system without locks, the file
    of a process that was killed looks like a claim.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:  # no such file
        return False
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return True


def has_locks(lock: Path) -> bool:
    """Return whether a claim of this process is a lock, or only the text in a file."""
    return _claims[lock.resolve()].locked


def check_claim(lock: Path) -> None:
    """Raise UserError if another process has taken over, which is possible only on a file system without locks."""
    held = _claims.get(lock.resolve())
    if held and not held.locked and (owner := read_owner(lock)) not in (held.owner, UNKNOWN_OWNER):
        raise UserError(f"{lock.parent} has been taken over by {owner}; this process stops, and the other continues")


def release_claims() -> None:
    """Release every claim of this process, and delete the lock files and the folders that stayed empty."""
    while _claims:
        lock, held = _claims.popitem()
        with suppress(OSError):
            if read_owner(lock) == held.owner:
                lock.unlink()
        os.close(held.descriptor)
        with suppress(OSError):  # not empty
            for folder in held.made:
                folder.rmdir()


def releasing_claims(main: Callable) -> Callable:
    """Decorate the main() of a script: its claims end with the call, also where it is called as a function."""

    @wraps(main)
    def call(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        finally:
            release_claims()

    return call


def close_in_child() -> None:
    """Close the locks in a forked process: a worker that outlives a killed run must not keep them."""
    for held in _claims.values():
        os.close(held.descriptor)
    _claims.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_in_child)
