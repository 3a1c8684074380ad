"""One epoch of training with any mixing method."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import Batch, DeviceLoader
from engine.runtime.distributed import all_gather_object
from engine.training.monitor import EpochMonitor
from engine.training.network_step import StepConfig
from engine.training.running_sums import NonFiniteLoss
from engine.training.state import TrainingState
from engine.training.stopwatch import Stopwatch, take_clean_pass, time_source

NO_BAD_STEP = 2**62  # stands for the step of the first NaN or infinite loss as long as there is none


def train_one_epoch(
    state: TrainingState,
    loader: DeviceLoader,
    config: StepConfig,
    *,
    epoch: int,
    monitor: EpochMonitor | None = None,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Train for one epoch. Returns `train_loss`, `train_acc` in percent, and the number of `images`.

    train_loss is the mean loss of the mixed images, without the weight that the method gives it and without the loss of
    the unmixed batch, so that methods can be compared. train_acc is the mean label weight of the predicted class. Each
    optimizer step averages the gradients of `loader.micro_batches` batches. epoch: counted from 0. max_steps: stop the
    epoch early.

    Losses stay on the device and are checked every `monitor.log_every` steps. Raises NonFiniteLoss if the check finds a
    NaN or infinite loss, and TrainingInterrupted before a step if `monitor.stop_requested()`.
    """
    monitor = monitor or EpochMonitor(loader.device)
    stats, watch = monitor.stats, monitor.watch
    first_step = epoch * len(loader) if monitor.first_step is None else monitor.first_step
    source = time_source(state.source, watch)
    losses = LossCheck(loader.device, first_step)
    steps = min(len(loader), max_steps or len(loader))

    def means() -> dict[str, float]:
        losses.check(stats.step - 1)
        mean = stats.means()
        return {"train loss": mean["loss"], "train acc": 100 * mean["hits"]}

    state.model.train()
    monitor.start()
    batches = loader.epoch(epoch, start=stats.step)
    for step in range(stats.step, steps):
        monitor.raise_if_stopped(check=lambda: losses.check(stats.step - 1))
        state.zero_grad()
        for number in range(loader.micro_batches):
            batch = next(batches)
            last = number + 1 == loader.micro_batches
            loss, hits = backward_batch(state, source, batch, config, watch, sync=last)
            stats.add(len(hits), loss=loss * len(hits), hits=hits.sum())
            losses.add(step, loss, batch.index)
        optimizer_step(state, config.clip_grad, loader.micro_batches)
        monitor.end_step(steps, state.optimizer, means)
    mean = stats.means()
    return {"train_loss": mean["loss"], "train_acc": 100 * mean["hits"], "images": mean["images"]}


def backward_batch(
    state: TrainingState, source, batch: Batch, config: StepConfig, watch: Stopwatch, *, sync: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a batch and add the gradient of its loss to .grad.

    With config.clean_weight, clean_weight times the loss of the unmixed batch is added to the loss, unless the method
    has left the batch unmixed. If the saliency source has added this gradient already, in the pass that gives the maps,
    there is no further pass.

    Returns the loss, (), and for each image the label weight of the predicted class, (B, 1). sync: whether
    DistributedDataParallel averages the gradients over the processes in this backward pass.
    """
    mixer = state.mixer
    targets = F.one_hot(batch.labels, config.num_classes).float()
    watch.lap("data")
    learning_sources = [one for one in state.sources if one.learns]
    for one in learning_sources:
        one.start_batch(batch)
        batch.images.requires_grad_()  # such a source learns from the gradient at the unmixed images
    mixed, soft = mixer(batch.images, targets, source)
    if learning_sources:
        coverage = learning_sources[0].measure_coverage(mixed, batch.images)
    if mixer.wants_mixed_grad:
        mixed = mixed.requires_grad_() if not mixed.requires_grad else mixed
        mixed.retain_grad()
    watch.lap("mixing")
    unmixed = mixed is batch.images and soft is targets
    if config.clean_weight and not take_clean_pass(source) and not unmixed:
        with state.no_sync():
            state.run_network_step(config, batch.images.detach(), targets, config.clean_weight)
        watch.lap("clean")
    with mixer.during(state.model), nullcontext() if sync else state.no_sync():
        loss, hits = state.run_network_step(config, mixed, soft, mixer.mixed_weight)
    watch.lap("network")
    mixer.after_backward(mixed.grad if mixer.wants_mixed_grad else None)
    watch.lap("mixing")
    for one in learning_sources:
        one.after_backward(batch.images.grad, coverage)
        watch.lap("saliency")
    return loss, hits


def optimizer_step(state: TrainingState, clip_grad: float, micro_batches: int) -> None:
    """Step the optimizer on .grad, the sum of the gradients of `micro_batches` batches; then step the schedule and
    update the weight average.
    """
    if micro_batches > 1:
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)
    if clip_grad:
        if state.scaler:
            state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    if state.scaler:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        state.optimizer.step()
    if state.scheduler:
        state.scheduler.step()
    if state.ema:
        state.ema.update(state.model)


class LossCheck:
    """Finds the first NaN or infinite loss of an epoch without synchronising host and device in every step."""

    def __init__(self, device: torch.device, first_step: int):
        self.first_bad = torch.full((), NO_BAD_STEP, device=device, dtype=torch.long)
        self.first_step = first_step  # of the epoch, in the run
        self.indices: dict[int, list[torch.Tensor]] = {}  # step since the last check -> positions of its images

    def add(self, step: int, loss: torch.Tensor, index: torch.Tensor) -> None:
        self.first_bad = torch.where((self.first_bad == NO_BAD_STEP) & ~loss.isfinite(), step, self.first_bad)
        self.indices.setdefault(step, []).append(index)

    def check(self, now: int) -> None:
        """Raise NonFiniteLoss in all processes if one of them has had such a loss up to step `now` of the epoch."""
        bad = min(all_gather_object(int(self.first_bad)))
        if bad < NO_BAD_STEP:
            index = torch.cat([index for process in all_gather_object(self.indices[bad]) for index in process])
            raise NonFiniteLoss(self.first_step + bad, index, self.first_step + now)
        self.indices.clear()


def profile_steps(state: TrainingState, loader: DeviceLoader, config: StepConfig, steps: int) -> dict[str, float]:
    """Return milliseconds per step for data, saliency, mixing, network and, if the unmixed batch has a pass of its own,
    clean: means of `steps` steps, after ten steps of warm-up.
    """
    state.scheduler, seconds = None, {}  # a one-cycle schedule raises an error after its last step
    train_one_epoch(state, loader, config, epoch=0, max_steps=10)
    done, epoch = 0, 1
    while done < steps:
        now, monitor = min(steps - done, len(loader)), EpochMonitor(loader.device)
        train_one_epoch(state, loader, config, epoch=epoch, monitor=monitor, max_steps=now)
        for part, value in monitor.watch.seconds().items():
            seconds[part] = seconds.get(part, 0.0) + value
        done, epoch = done + now, epoch + 1
    parts = ["data", "saliency", "mixing", "network", *(["clean"] if "clean" in seconds else [])]
    return {part: 1000 * seconds.get(part, 0.0) / done for part in parts}
