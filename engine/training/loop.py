"""The training step that every method shares, and evaluation."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import DeviceLoader
from engine.runtime.device import autocast
from engine.runtime.distributed import all_gather_object, world_size
from engine.training.loss import smooth_labels
from engine.training.running_sums import EpochStats, NonFiniteLoss, TrainingInterrupted
from engine.training.stopwatch import Stopwatch, flatten_sources, time_source

NO_BAD_STEP = 2**62  # the step of a loss that was always finite


def train_one_epoch(
    model: nn.Module,
    mixer,
    source: Callable | None,
    batches: DeviceLoader,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable,
    *,
    epoch: int,
    num_classes: int,
    network: nn.Module | None = None,
    scheduler=None,
    scaler=None,
    precision: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
    ema=None,
    watch: Stopwatch | None = None,
    max_steps: int | None = None,
    progress: Callable | None = None,
    look_every: int = 100,
    tally: EpochStats | None = None,
    stop: Callable[[], bool] | None = None,
    steps_before: int | None = None,
) -> dict[str, float]:
    """One pass over the training part. Returns mean loss and accuracy, the latter as the mean label weight of the
    predicted class.

    A step takes `batches.micro_batches` batches, whose gradients are averaged. network: `model` as wrapped for several
    processes, which averages gradients over them; None: `model` itself. tally: where a stopped epoch goes on.

    Losses stay on the device and are looked at every `look_every` steps. progress(step) is called after every step, and
    with loss, accuracy, lr and images_per_second after a look. Raises NotFinite at the look after a loss that is none,
    and Stopped before a step where stop() says so. steps_before: those of earlier epochs.
    """
    device, network = batches.device, network or model
    watch, tally = watch or Stopwatch(device), tally or EpochStats()
    sources = flatten_sources(source)
    learning = [one for one in sources if getattr(one, "learns", False)]
    source = time_source(source, watch)
    model.train()
    first_bad = torch.full((), NO_BAD_STEP, device=device, dtype=torch.long)
    indices = {}
    steps = min(len(batches), max_steps or len(batches))

    def look(now: int) -> None:
        bad = min(all_gather_object(int(first_bad)))
        if bad < NO_BAD_STEP:
            before = epoch * len(batches) if steps_before is None else steps_before
            raise NonFiniteLoss(before + bad, gather_indices(indices[bad]), before + now)

    watch.start()
    begin, seen_before = time.perf_counter(), tally.seen
    stream = batches.epoch(epoch, start=tally.step)
    for step in range(tally.step, steps):
        if stop and stop():
            look(step - 1)
            raise TrainingInterrupted(tally)
        optimizer.zero_grad(set_to_none=True)
        indices[step] = []
        for number in range(batches.micro_batches):
            batch = next(stream)
            targets = F.one_hot(batch.labels, num_classes).float()
            watch.lap("data")
            for one in learning:
                one.start_batch(batch)
                batch.images.requires_grad_()
            mixed, soft = mixer(batch.images, targets, source)
            if learning:
                coverage = mixing_coverage(mixed, batch.images)
            if mixer.wants_mixed_grad:
                mixed = mixed.requires_grad_() if not mixed.requires_grad else mixed
                mixed.retain_grad()
            watch.lap("mixing")
            last = number + 1 == batches.micro_batches
            with mixer.during(model), nullcontext() if last or network is model else network.no_sync():
                with autocast(device, precision):
                    logits = network(mixed)
                value = loss_fn(logits, smooth_labels(soft, label_smoothing))
                loss = mixer.mixed_weight * value
                (scaler.scale(loss) if scaler else loss).backward()
            watch.lap("network")
            mixer.after_backward(mixed.grad if mixer.wants_mixed_grad else None)
            watch.lap("mixing")
            for one in learning:
                one.after_backward(batch.images.grad, coverage)
                watch.lap("saliency")
            with torch.no_grad():
                value = value.detach()  # without the weight, so that methods can be compared
                hits = soft.gather(1, logits.argmax(1, keepdim=True)).sum()
                tally.add(len(soft), loss=value * len(soft), hits=hits)
                first_bad = torch.where((first_bad == NO_BAD_STEP) & ~value.isfinite(), step, first_bad)
            indices[step].append(batch.index)
        optimizer_step(model, optimizer, scaler, clip_grad, micro_batches=batches.micro_batches)
        if scheduler:
            scheduler.step()
        if ema:
            ema.update(model)
        tally.step = step + 1
        watch.lap("network")
        if (step + 1) % look_every == 0 or step + 1 == steps:
            look(step)
            indices.clear()
            means = tally.means()
            if progress:
                rate = (tally.seen - seen_before) * world_size() / (time.perf_counter() - begin)
                lr = optimizer.param_groups[0]["lr"]
                progress(step + 1, loss=means["loss"], accuracy=100 * means["hits"], lr=lr, images_per_second=rate)
        elif progress:
            progress(step + 1)
    means = tally.means()
    return {"train_loss": means["loss"], "train_acc": 100 * means["hits"], "images": means["images"]}


def optimizer_step(model: nn.Module, optimizer, scaler, clip_grad: float, micro_batches: int) -> None:
    """The optimizer step on the gradients in .grad, which are a sum over `micro_batches` batches."""
    if micro_batches > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)
    if clip_grad:
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def gather_indices(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The positions of the images of a step, over all its batches and all processes."""
    return torch.cat([index for of_one in all_gather_object(pieces) for index in of_one])


def mixing_coverage(mixed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W): the weight with which each pixel of `images` went into the mixed ones, summed over them."""
    if mixed is images:
        return torch.ones_like(images[:, :1])
    (weight,) = torch.autograd.grad(mixed, images, torch.ones_like(mixed), retain_graph=True)
    return weight[:, :1]


def profile_steps(
    steps: int, model: nn.Module, mixer, source: Callable | None, batches: DeviceLoader, optimizer, **step
) -> dict:
    """Milliseconds a step of data, saliency, mixing and network, over `steps` steps after ten to warm up."""
    watch, step = Stopwatch(batches.device), {**step, "scheduler": None}  # a one-cycle schedule has an end
    train_one_epoch(model, mixer, source, batches, optimizer, epoch=0, max_steps=10, **step)
    done, epoch = 0, 1
    while done < steps:
        now = min(steps - done, len(batches))
        train_one_epoch(model, mixer, source, batches, optimizer, epoch=epoch, max_steps=now, watch=watch, **step)
        done, epoch = done + now, epoch + 1
    return {part: 1000 * watch.seconds().get(part, 0.0) / done for part in ("data", "saliency", "mixing", "network")}
