"""One epoch of training a detector, and its detections on a whole image set."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from detection.loader import Batch, DetectionLoader
from detection.metrics import Detections
from engine.runtime.device import autocast, disable_tf32
from engine.runtime.distributed import all_gather_object, gather_object, move_to_host
from engine.training.loop import optimizer_step
from engine.training.monitor import EpochMonitor
from engine.training.running_sums import EpochStats, NonFiniteLoss
from engine.training.state import TrainingState

LOSS_NAMES = {  # of the loss terms, for the progress bar
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_objectness": "object",
    "loss_rpn_box_reg": "proposal",
}


def train_one_epoch(
    state: TrainingState,
    loader: DetectionLoader,
    *,
    epoch: int,
    steps: int,
    precision: torch.dtype | None = None,
    clip_grad: float = 0.0,
    monitor: EpochMonitor | None = None,
) -> dict[str, float]:
    """Train for `steps` optimizer steps of an epoch, which may be fewer than it has. Returns the means of the loss and
    of its terms, and the number of images.

    Raises NonFiniteLoss, before the weights are touched, for a loss that is NaN or infinite, and TrainingInterrupted
    before a step where the monitor is asked to stop.
    """
    monitor = monitor or EpochMonitor(loader.device)
    stats, watch = monitor.stats, monitor.watch
    first_step = epoch * len(loader) if monitor.first_step is None else monitor.first_step
    state.model.train()
    monitor.start()
    stream = loader.epoch(epoch, start=stats.step)
    for step in range(stats.step, steps):
        monitor.raise_if_stopped()
        state.optimizer.zero_grad(set_to_none=True)
        batches, losses = [], []
        for number in range(loader.micro_batches):
            batches.append(next(stream))
            watch.lap("data")
            sync = number + 1 == loader.micro_batches
            losses.append(backward_batch(state, batches[-1], precision, sync=sync))
            count = len(batches[-1].images)
            stats.add(count, **{name: value * count for name, value in losses[-1].items()})
            watch.lap("network")
        # torchvision's detectors make the host wait in every step anyway, so checking the loss costs nothing more
        check_finite(losses, batches, loader.part.names, first_step + step + 1)
        optimizer_step(state, clip_grad, loader.micro_batches)
        monitor.end_step(steps, state.optimizer, lambda: shown_means(stats))
    return stats.means()


def backward_batch(
    state: TrainingState, batch: Batch, precision: torch.dtype | None, *, sync: bool
) -> dict[str, torch.Tensor]:
    """Add the gradient of the loss of a batch to .grad. Returns the loss and its terms, each ().

    sync: whether DistributedDataParallel averages the gradients over the processes in this backward pass.
    """
    with nullcontext() if sync or state.network is state.model else state.network.no_sync():
        with autocast(state.device, precision):
            terms = state.network(batch.images, batch.targets)
        loss = sum(terms.values())
        (state.scaler.scale(loss) if state.scaler else loss).backward()
    return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


def shown_means(stats: EpochStats) -> dict[str, float]:
    """The means of the loss and its terms, under their short names."""
    means = stats.means()
    return {"loss": means["loss"], **{name: means[key] for key, name in LOSS_NAMES.items()}}


def check_finite(losses: list[dict[str, torch.Tensor]], batches: list[Batch], names: list[str], step: int) -> None:
    """Raise NonFiniteLoss in all processes, with the loss terms, the images and their objects, where a loss of one of
    them is NaN or infinite. losses, batches: of the micro-batches of the step. names: of all images.
    """
    values = torch.stack([torch.stack(list(terms.values())) for terms in losses])
    evidence = []
    if not values.isfinite().all():
        for terms, batch in zip(losses, batches, strict=True):
            terms = {name: value.item() for name, value in terms.items() if name != "loss"}
            if not math.isfinite(sum(terms.values())):
                content = {"terms": terms, "names": [names[position] for position in batch.index.tolist()]}
                evidence.append(move_to_host(content | batch._asdict()))
    bad = [batch for process in all_gather_object(evidence) for batch in process]
    if bad:
        terms = ", ".join(f"{name} {value:g}" for name, value in bad[0]["terms"].items())
        where = ", ".join(name for batch in bad for name in batch["names"])
        index = torch.cat([batch["index"] for batch in bad])
        raise NonFiniteLoss(step, index, step, f"the loss ({terms}) on {where}", {"batches": bad})


@torch.no_grad()
def predict(
    model: nn.Module, loader: DetectionLoader, *, precision: torch.dtype | None = None, progress: Callable | None = None
) -> list[Detections]:
    """The detections of each image of a set, in its order, in float32 unless a precision is given; the network is in
    evaluation mode meanwhile. Each process takes its share of the images, and only the main one gets the list.
    """
    training, detections = model.training, {}
    model.eval()
    try:
        for step, batch in enumerate(loader.epoch()):
            with disable_tf32(), autocast(loader.device, precision):
                results = model(batch.images)
            for position, result in zip(batch.index.tolist(), results, strict=True):
                boxes, labels, scores = (result[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
                detections[position] = Detections(boxes.astype(np.float64), labels, scores.astype(np.float64))
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    merged = {position: image for process in gather_object(detections) or [] for position, image in process.items()}
    return [merged[position] for position in sorted(merged)]
