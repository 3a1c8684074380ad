"""Tests of the claims on output folders: one process at a time, whatever its end."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest
from support import ROOT

from engine.errors import UserError
from engine.runtime import claim as claims
from engine.runtime.claim import check_claim, claim, has_locks, is_claimed, read_owner, release_claims, releasing_claims

HOLDER = """
    import os, sys, time
    from pathlib import Path
    from engine.runtime.claim import claim
    print(claim(Path(sys.argv[1])), flush=True)
    if "--fork" in sys.argv and os.fork() == 0:  # as a worker that outlives its killed parent
        os.close(1)
        time.sleep(20)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def release():
    yield
    release_claims()


@pytest.fixture
def start_holder():
    """Return a function that starts another process, which claims a lock file, and waits until it has it."""
    processes = []

    def start(lock, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(lock), *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("fork", [(), ("--fork",)])
def test_a_killed_process_does_not_keep_its_claim(tmp_path, start_holder, fork):
    lock = tmp_path / "runs" / "a" / ".lock"
    other = start_holder(lock, *fork)
    assert not claim(lock) and not claim(lock, wait=0.3) and not claim(lock, new=True)
    assert read_owner(lock).startswith(f"process {other.pid} on {os.uname().nodename} since 20")
    other.kill()
    other.wait()
    assert claim(lock) and has_locks(lock) and read_owner(lock).startswith(f"process {os.getpid()} on ")
    assert claim(lock), "a process can claim what it has already"


def test_a_claim_waits_for_a_process_that_ends(tmp_path, start_holder):
    other, begin = start_holder(tmp_path / ".lock"), time.monotonic()
    other.kill()
    assert claim(tmp_path / ".lock", wait=20) and time.monotonic() - begin < 10


def test_deleting_the_file_of_a_lost_machine_frees_the_folder(tmp_path, start_holder):
    start_holder(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()
    assert claim(tmp_path / ".lock")


def test_release_deletes_only_the_lock_and_new_empty_folders(tmp_path):
    assert claim(tmp_path / "x" / "y" / ".lock") and claim(tmp_path / "z" / ".lock")
    (tmp_path / "z" / "kept.txt").touch()
    release_claims()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept.txt", "z"]

    @releasing_claims
    def main(lock):
        assert claim(lock) and lock.exists()
        raise UserError("a folder without data")

    with pytest.raises(UserError, match="without data"):
        main(tmp_path / "new" / ".lock")
    assert not (tmp_path / "new").exists()


def test_a_new_claim_takes_no_existing_file(tmp_path):
    (tmp_path / ".lock").touch()  # left by a killed process
    assert not claim(tmp_path / ".lock", new=True) and claim(tmp_path / ".lock")


def test_a_folder_that_cannot_be_created_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        claim(tmp_path / "file" / "run" / ".lock")
    with pytest.raises(OSError):
        claim(claims.Path("/proc/run/.lock"))


def test_without_locks_the_process_that_began_first_stops_before_it_writes(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(38, "Function not implemented")  # as on Lustre without its option flock

    monkeypatch.setattr(claims.fcntl, "flock", refuse)
    lock = tmp_path / "run" / ".lock"
    assert claim(lock) and not has_locks(lock)
    check_claim(lock)
    lock.write_text("process 7 on node12 since 2026-01-02 03:04:05")
    with pytest.raises(UserError, match=r"run has been taken over by process 7 on node12 since .*; this process stops"):
        check_claim(lock)
    release_claims()
    assert lock.exists(), "it belongs to the other process"
    assert not claim(lock, new=True) and claim(lock)


def test_a_look_at_a_claim_neither_takes_nor_mistakes_it(tmp_path, start_holder, monkeypatch):
    lock = tmp_path / ".lock"
    assert not is_claimed(lock) and not lock.exists()
    process = start_holder(lock)
    assert is_claimed(lock)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lock.exists() and not is_claimed(lock)  # as a kill leaves it
    assert claim(lock)
    monkeypatch.setattr(claims, "fcntl", None)  # without locks, the file is all there is
    assert is_claimed(lock)
