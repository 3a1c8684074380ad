"""If one process fails, print its error once and end all processes.

Otherwise the others would wait for the failed process in a collective operation. A process that fails puts its message
into the store that all processes share. The main process prints it, and all processes exit with code 1.

torchrun does not do this well enough. It ends only the processes on its own machine, and it waits 30 s for those that
handle SIGTERM, as ours do. With its error files (torch.distributed.elastic's `record`), one exception is printed four
times among five tracebacks, since processes that lose their peer fail too.
"""

import os
import sys
import threading
from contextlib import suppress
from datetime import timedelta

from torch import distributed as dist

POLL_SECONDS = 0.2
GRACE_SECONDS = 1.0  # time for the main process to report an error that occurs in all processes
SHOW_SECONDS = 10.0  # time for the main process to print the message of another one
EXIT_SECONDS = 2.0  # time for the others to see that the message is printed, before the main process ends the store


class FailureWatch:
    """Reports the failure of this process to the others, and exits if another one fails.

    store, watched: two connections to the shared store. The watching thread needs its own, since a waiting call blocks
    its connection.
    """

    def __init__(self, store: dist.Store, watched: dist.Store, *, rank: int, world_size: int):
        self.store, self.watched, self.rank, self.world_size = store, watched, rank, world_size
        self.printing, self.stopped = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread. A thread still inside the store when Python exits would abort the process."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    def report(self, text: str) -> None:
        """Have the main process print the error of this one, unless another error was reported before. Call it last."""
        if self.rank:  # most errors occur in all processes: leave the report to the main process
            self.stop()
            with suppress(RuntimeError):
                return self.wait_until_shown(GRACE_SECONDS)
        with self.printing:
            try:
                if self.store.add("failures", 1) == 1:
                    origin = f"\n(process {self.rank} of {self.world_size})" if self.rank else ""
                    self.store.set("failure", text + origin)
                if self.rank:
                    self.wait_until_shown(SHOW_SECONDS)
                else:
                    self.show(self.store)
            except RuntimeError:  # the store is gone, or the main process did not print in time
                print(text, file=sys.stderr, flush=True)

    def wait_until_shown(self, seconds: float) -> None:
        """Wait until the main process has printed the error. Raises RuntimeError if it does not in this time."""
        self.store.wait(["shown"], timedelta(seconds=seconds))
        self.store.set(f"seen by {self.rank}", "")

    def show(self, store: dist.Store) -> None:
        """Print the reported error, unless it is printed already, and wait until the other processes know it."""
        if store.check(["shown"]):
            return
        print(store.get("failure").decode(), file=sys.stderr, flush=True)
        store.set("shown", "")
        with suppress(RuntimeError):  # a process that was killed does not answer
            store.wait([f"seen by {rank}" for rank in range(1, self.world_size)], timedelta(seconds=EXIT_SECONDS))

    def watch(self) -> None:
        """Poll the store, and exit the process if another one has failed. Runs in a thread of its own.

        The main thread may be waiting for the failed process, where no exception reaches it.
        """
        try:
            while not self.watched.check(["shown" if self.rank else "failure"]):
                if self.stopped.wait(POLL_SECONDS):
                    return
        except RuntimeError:
            return  # the process that hosted the store has exited: the current collective operation reports that
        with self.printing, suppress(RuntimeError):
            if self.rank == 0:
                self.show(self.watched)
            else:
                self.watched.set(f"seen by {self.rank}", "")
        sys.stderr.flush()
        os._exit(1)
