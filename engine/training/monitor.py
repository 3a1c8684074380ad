"""Monitor a training epoch: running sums, time per part of a step, progress, and requests to stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.runtime.distributed import world_size
from engine.training.optimizer import get_lr
from engine.training.running_sums import EpochStats, TrainingInterrupted
from engine.training.stopwatch import Stopwatch


@dataclass
class EpochMonitor:
    """What a training loop reports to during an epoch; by default the reports go nowhere.

    progress(step) is called after every step. Every `log_every` steps, and after the last one, it also gets the means,
    lr and images_per_second as keyword arguments.
    """

    device: torch.device
    stats: EpochStats = field(default_factory=EpochStats)  # not empty if an interrupted epoch is resumed
    progress: Callable[..., None] = lambda step, **numbers: None
    stop_requested: Callable[[], bool] = lambda: False
    after_step: Callable[[], None] = lambda: None
    log_every: int = 100  # steps
    first_step: int | None = None  # optimizer steps before this epoch; None: epoch times length of the loader
    watch: Stopwatch | None = None

    def __post_init__(self):
        self.watch = self.watch or Stopwatch(self.device)

    def start(self) -> None:
        self.watch.start()
        self.start_time, self.images_before = time.perf_counter(), self.stats.seen

    def raise_if_stopped(self, check: Callable[[], None] = lambda: None) -> None:
        """Raise TrainingInterrupted if a stop is requested, after a call of check(). All processes must call it."""
        if self.stop_requested():
            check()
            raise TrainingInterrupted(self.stats)

    def end_step(self, steps: int, optimizer: torch.optim.Optimizer, means: Callable[[], dict[str, float]]) -> None:
        """Report the end of an optimizer step. steps: in the epoch. means() is called only when they are due."""
        self.stats.step += 1
        self.watch.lap("network")
        self.after_step()
        if self.stats.step % self.log_every and self.stats.step != steps:
            return self.progress(self.stats.step)
        numbers = means()
        rate = (self.stats.seen - self.images_before) * world_size() / (time.perf_counter() - self.start_time)
        self.progress(self.stats.step, **numbers, lr=get_lr(optimizer), images_per_second=rate)
