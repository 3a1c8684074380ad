"""Tests of SIGTERM: the first one is a request, a later one ends the process at once."""

import multiprocessing
import os
import signal
import time

import pytest

from engine.runtime import preemption
from engine.runtime.preemption import PreemptionGuard


def wait_for_ever(marker) -> None:
    guard = PreemptionGuard()
    guard.install()
    for _ in range(2):  # as from a scheduler and from torchrun: one request
        os.kill(os.getpid(), signal.SIGTERM)
    assert guard.requested()
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
    marker.write_text(str(multiprocessing.active_children()[0].pid))
    time.sleep(preemption.REPEAT_SECONDS + 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_sigterm_ends_a_process_that_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "REPEAT_SECONDS", 0.3)
    process = multiprocessing.get_context("fork").Process(target=wait_for_ever, args=(tmp_path / "pid",))
    process.start()
    process.join(30)
    assert process.exitcode == 143
    with pytest.raises(ProcessLookupError):  # its worker, which may ignore SIGTERM
        for _ in range(100):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.05)
