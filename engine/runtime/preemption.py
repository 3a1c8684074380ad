"""On SIGTERM, stop between two steps, in all processes before the same step; on a second one, at once."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
from torch import distributed as dist

from engine.runtime.distributed import get_host_group, is_main_process, world_size

REPEAT_SECONDS = 2.0  # a scheduler and torchrun may each send the same request


class PreemptionGuard:
    """Turns SIGTERM, which schedulers send before they preempt a job, into a request to stop between two steps.

    All processes stop before the same step. They exchange their requests while a step is computed, so that no process
    waits for the exchange; the answer is therefore one step old.
    """

    def __init__(self):
        self.signalled, self.previous_handler = False, signal.SIG_DFL
        self.first_time = 0.0  # of the first signal
        self.pending: tuple | None = None  # number of requests, and the running all-reduce that sums it

    def install(self) -> None:
        """Handle SIGTERM. Does nothing outside the main thread, since Python handles signals only there."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handler = signal.signal(signal.SIGTERM, self.request)

    def restore(self) -> None:
        """Restore the previous handler of SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous_handler)

    def request(self, *signal) -> None:
        """Handle the signal. A second one ends the process, which may be waiting for something that never comes."""
        if self.signalled and time.monotonic() - self.first_time > REPEAT_SECONDS:
            end_process()
        self.first_time = self.first_time if self.signalled else time.monotonic()
        self.signalled = True

    def requested(self) -> bool:
        """Return whether to stop before the next step. Collective: every process must call it once per step."""
        if world_size() == 1:
            return self.signalled
        stop = False
        if self.pending:
            requests, work = self.pending
            work.wait()
            stop = bool(requests)
        requests = torch.tensor(int(self.signalled))
        self.pending = requests, dist.all_reduce(requests, group=get_host_group(), async_op=True)
        return stop


def end_process() -> None:
    """End this process and its workers now, without saving."""
    if is_main_process():
        print("stopped at once by a second SIGTERM, without saving", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(143)
