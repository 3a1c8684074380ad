"""One message for an error that ends the run, and an end for all processes when one of them fails.

A failed process would leave the others waiting for it in a collective operation. So whoever fails puts its message into
a store that all processes share; the first process prints it, and all of them exit with code 1.

torchrun also ends the processes of its own machine, but not those of other machines, and it waits 30 s for one that
handles SIGTERM, as ours do. With its error files (torch.distributed.elastic's `record`) one exception is printed four
times among five tracebacks, since the processes that lose their peer fail too.
"""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta

from torch import distributed as dist

POLL_SECONDS = 0.2
GRACE_SECONDS = 1.0  # the first process is given to report an error that all processes meet
SHOW_SECONDS = 10.0  # the first process is given to print the message of another one


class FailureWatch:
    """The watch of one process over the others.

    store, watched: two connections to the common store; the thread needs its own, since a call that waits blocks its
    connection.
    """

    def __init__(self, store: dist.Store, watched: dist.Store, *, rank: int, world_size: int):
        self.store, self.watched, self.rank, self.world_size = store, watched, rank, world_size
        self.printing, self.stopped = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """A thread that is inside the store when Python exits would abort the process."""
        self.stopped.set()
        self.thread.join(timeout=5)

    def report(self, text: str) -> None:
        """Let the first process print the error of this one, unless another one was reported before. Call it last."""
        if self.rank:  # most errors are met by all processes, and then the first one says it best
            with suppress(RuntimeError):
                return self.store.wait(["shown"], timedelta(seconds=GRACE_SECONDS))
        with self.printing:
            try:
                if self.store.add("failures", 1) == 1:
                    origin = f"\n(process {self.rank} of {self.world_size})" if self.rank else ""
                    self.store.set("failure", text + origin)
                if self.rank:
                    self.store.wait(["shown"], timedelta(seconds=SHOW_SECONDS))
                else:
                    self.show(self.store)
            except RuntimeError:  # the store is gone, or nobody is there to print
                print(text, file=sys.stderr, flush=True)

    def show(self, store: dist.Store) -> None:
        if not store.check(["shown"]):
            print(store.get("failure").decode(), file=sys.stderr, flush=True)
            store.set("shown", "")

    def watch(self) -> None:
        """The thread: exit when another process has failed. The main thread may be waiting for that one where no
        exception reaches it.
        """
        try:
            while not self.watched.check(["shown" if self.rank else "failure"]):
                if self.stopped.wait(POLL_SECONDS):
                    return
        except RuntimeError:
            return  # the process that kept the store has gone: the collective operation under way says so
        with self.printing:
            if self.rank == 0:
                self.show(self.watched)
        sys.stderr.flush()
        os._exit(1)
