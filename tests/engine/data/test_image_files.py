"""Tests of the worker processes that read images: what stops them ends the wait for them too."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from engine.data import image_files
from engine.data.image_files import BatchReader
from engine.launch import explain_error


class Files:
    """Files whose reading calls a function in the worker."""

    remedy = ""

    def __init__(self, action):
        self.action = action

    def __len__(self) -> int:
        return 4

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        self.action()
        return torch.full((1, 2, 2, 3), index[0]), torch.tensor(index), [torch.zeros(0), {"boxes": torch.ones(2)}]


def read_failing(action, message: str) -> None:
    """Read with a worker that fails, and check the error, its explanation and that no process is left."""
    handler = signal.getsignal(signal.SIGCHLD)
    reader = BatchReader(Files(action), workers=1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=message) as error:
        next(reader.read([torch.tensor([0])]))
    first, second = explain_error(error.value).splitlines()
    assert "worker processes that read images failed" in first and "--shm-size" in second and "--workers 0" in second
    while multiprocessing.active_children() and time.monotonic() < begin + 20:
        time.sleep(0.05)
    assert not multiprocessing.active_children() and time.monotonic() < begin + 20
    assert signal.getsignal(signal.SIGCHLD) == handler or not callable(handler)


def test_a_worker_without_shared_memory_ends_the_read(monkeypatch):
    """It waited for ever: the batch got lost in a thread of the worker."""

    def fail(*args):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)
    monkeypatch.setattr(image_files, "WAIT_SECONDS", 20)
    read_failing(lambda: None, "DataLoader worker: unable to allocate shared memory.*No space left")


def test_workers_that_do_not_answer_are_given_up(monkeypatch):
    monkeypatch.setattr(image_files, "WAIT_SECONDS", 1)
    read_failing(lambda: time.sleep(100), "timed out after 1 seconds")


def test_a_killed_worker_is_named_with_a_remedy():
    read_failing(lambda: os.kill(os.getpid(), signal.SIGKILL), "worker .*(killed by signal|exited unexpectedly)")


def test_a_batch_arrives_whole():
    reader = BatchReader(Files(lambda: None), workers=1)
    pixels, index, (empty, targets) = next(reader.read([torch.tensor([3])]))
    assert pixels.eq(3).all() and index.tolist() == [3] and len(empty) == 0 and targets["boxes"].tolist() == [1, 1]
    reader.close()
