"""How a training epoch is watched: its sums, its time by part, its progress, and whether it shall stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.runtime.distributed import world_size
from engine.training.running_sums import EpochStats, TrainingInterrupted
from engine.training.stopwatch import Stopwatch


@dataclass
class EpochMonitor:
    """What the training loops of classifiers and detectors tell while an epoch runs. By default nobody listens.

    progress(step) is called after every step, and with the means, lr and images_per_second every `log_every` steps.
    """

    device: torch.device
    stats: EpochStats = field(default_factory=EpochStats)  # not empty where an interrupted epoch is resumed
    progress: Callable[..., None] = lambda step, **numbers: None
    stop_requested: Callable[[], bool] = lambda: False
    after_step: Callable[[], None] = lambda: None
    log_every: int = 100  # steps
    first_step: int | None = None  # optimizer steps before this epoch; None: the loader's length times the epoch
    watch: Stopwatch | None = None

    def __post_init__(self):
        self.watch = self.watch or Stopwatch(self.device)

    def start(self) -> None:
        self.watch.start()
        self.begun, self.images_before = time.perf_counter(), self.stats.seen

    def raise_if_stopped(self, check: Callable[[], None] = lambda: None) -> None:
        """Raise TrainingInterrupted where a stop is requested; check() comes first. Every process calls it."""
        if self.stop_requested():
            check()
            raise TrainingInterrupted(self.stats)

    def end_step(self, steps: int, optimizer: torch.optim.Optimizer, means: Callable[[], dict[str, float]]) -> None:
        """After an optimizer step of `steps`; means() is asked for the numbers to show when they are due."""
        self.stats.step += 1
        self.watch.lap("network")
        self.after_step()
        if self.stats.step % self.log_every and self.stats.step != steps:
            return self.progress(self.stats.step)
        numbers = means()
        rate = (self.stats.seen - self.images_before) * world_size() / (time.perf_counter() - self.begun)
        self.progress(self.stats.step, **numbers, lr=optimizer.param_groups[0]["lr"], images_per_second=rate)
