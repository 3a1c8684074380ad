"""Stop between two steps on SIGTERM, in all processes at the same step."""

import signal
import threading

import torch
from torch import distributed as dist

from engine.runtime.distributed import host_group, world_size


class PreemptionGuard:
    """SIGTERM, as schedulers send it before they take a machine away, asks for a stop between two steps.

    All processes stop before the same step. The question travels while a step is computed: an answer is one step old.
    """

    def __init__(self):
        self.asked, self.usual = False, signal.SIG_DFL
        self.answer: tuple | None = None

    def watch(self) -> None:
        """From here on SIGTERM only asks. In a thread beside the main one Python has no signals: then nothing asks."""
        if threading.current_thread() is threading.main_thread():
            self.usual = signal.signal(signal.SIGTERM, self.ask)

    def rest(self) -> None:
        """From here on SIGTERM means what it did before."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.usual)

    def ask(self, *signal) -> None:
        self.asked = True

    def raised(self) -> bool:
        """Whether to stop here. Every process must call it once a step."""
        if world_size() == 1:
            return self.asked
        stop = False
        if self.answer:
            votes, work = self.answer
            work.wait()
            stop = bool(votes)
        votes = torch.tensor(int(self.asked))
        self.answer = votes, dist.all_reduce(votes, group=host_group(), async_op=True)
        return stop
