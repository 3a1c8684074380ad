"""Stop between two steps on SIGTERM, in all processes at the same step."""

import signal
import threading

import torch
from torch import distributed as dist

from engine.runtime.distributed import host_group, world_size


class PreemptionGuard:
    """Turns SIGTERM, which schedulers send before they take a machine away, into a request to stop between two steps.

    All processes stop before the same step. They exchange requests while a step is computed, so that nobody waits for
    the answer; it is one step old.
    """

    def __init__(self):
        self.signalled, self.previous_handler = False, signal.SIG_DFL
        self.pending: tuple | None = None  # the number of requests, and the reduction that is summing them up

    def install(self) -> None:
        """Take over SIGTERM. Python has signals in the main thread only; in another one this does nothing."""
        if threading.current_thread() is threading.main_thread():
            self.previous_handler = signal.signal(signal.SIGTERM, self.request)

    def restore(self) -> None:
        """Give SIGTERM back to its previous handler."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.previous_handler)

    def request(self, *signal) -> None:
        """The handler of SIGTERM."""
        self.signalled = True

    def requested(self) -> bool:
        """Whether to stop before the next step. A collective operation: every process calls it once a step."""
        if world_size() == 1:
            return self.signalled
        stop = False
        if self.pending:
            requests, work = self.pending
            work.wait()
            stop = bool(requests)
        requests = torch.tensor(int(self.signalled))
        self.pending = requests, dist.all_reduce(requests, group=host_group(), async_op=True)
        return stop
