"""Hold back signals while other processes start."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def hold_signals(numbers: Iterable[int]) -> Iterator[None]:
    """Hold back these signals in the block, in this thread and in processes that it starts by forking.

    This process gets them after the block. A forked process never does, unless it unblocks them.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
