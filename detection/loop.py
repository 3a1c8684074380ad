"""Train a detector for one epoch, and detect objects in a whole image set."""

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

LOSS_NAMES = {  # torchvision's name of a loss term -> the short name on the console
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
    """Train up to optimizer step `steps` of an epoch, which may have more. Returns the mean losses and the image count.

    precision: dtype of autocast; None: float32. clip_grad: maximum gradient norm; 0: no limit. Raises NonFiniteLoss,
    before the weights change, for a loss that is NaN or infinite, and TrainingInterrupted before the next step if the
    monitor was asked to stop.
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
        # torchvision's detectors synchronise with the device in every step anyway, so checking the loss costs nothing
        check_finite(losses, batches, loader.image_set.names, first_step + step + 1)
        optimizer_step(state, clip_grad, loader.micro_batches)
        monitor.end_step(steps, state.optimizer, lambda: get_progress_means(stats))
    return stats.means()


def backward_batch(
    state: TrainingState, batch: Batch, precision: torch.dtype | None, *, sync: bool
) -> dict[str, torch.Tensor]:
    """Add the gradient of the loss on a batch to .grad. Returns the loss and its terms, each of shape ().

    sync: whether DistributedDataParallel averages the gradients over the processes in this backward pass.
    """
    with nullcontext() if sync or state.network is state.model else state.network.no_sync():
        with autocast(state.device, precision):
            terms = state.network(batch.images, batch.targets)
        loss = sum(terms.values())
        (state.scaler.scale(loss) if state.scaler else loss).backward()
    return {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


def get_progress_means(stats: EpochStats) -> dict[str, float]:
    """Return the means of the loss and its terms, under their short names."""
    means = stats.means()
    return {"loss": means["loss"], **{name: means[key] for key, name in LOSS_NAMES.items()}}


def check_finite(losses: list[dict[str, torch.Tensor]], batches: list[Batch], names: list[str], step: int) -> None:
    """Raise NonFiniteLoss in all processes if the loss of any of them is NaN or infinite.

    losses, batches: those of the micro-batches of this step. names: names of all images in the set. The error carries
    the loss terms, the images and their targets, as evidence.
    """
    values = torch.stack([torch.stack(list(terms.values())) for terms in losses])
    evidence = []
    if not values.isfinite().all():
        for terms, batch in zip(losses, batches, strict=True):
            terms = {name: value.item() for name, value in terms.items() if name != "loss"}
            if not math.isfinite(sum(terms.values())):
                content = {"terms": terms, "names": [names[index] for index in batch.index.tolist()]}
                evidence.append(move_to_host(content | batch._asdict()))
    bad = [batch for process in all_gather_object(evidence) for batch in process]
    if bad:
        terms = ", ".join(f"{name} {value:g}" for name, value in bad[0]["terms"].items())
        image_names = ", ".join(name for batch in bad for name in batch["names"])
        index = torch.cat([batch["index"] for batch in bad])
        raise NonFiniteLoss(step, index, step, f"the loss ({terms}) on {image_names}", {"batches": bad})


@torch.no_grad()
def predict(
    model: nn.Module, loader: DetectionLoader, *, precision: torch.dtype | None = None, progress: Callable | None = None
) -> list[Detections]:
    """Return the detections in each image of a set, in its order. Each process takes its share of the images.

    Only the main process gets the full list; the others get an empty one. precision: dtype of autocast; None: float32.
    progress: called with the number of finished steps. The model is in evaluation mode only during the call.
    """
    training, detections = model.training, {}
    model.eval()
    try:
        for step, batch in enumerate(loader.epoch()):
            detections |= zip(batch.index.tolist(), detect(model, batch.images, precision), strict=True)
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    merged = {index: image for process in gather_object(detections) or [] for index, image in process.items()}
    return [merged[index] for index in sorted(merged)]


@torch.no_grad()
def detect(model: nn.Module, images: list[torch.Tensor], precision: torch.dtype | None = None) -> list[Detections]:
    """Return the detections in a batch of images (3, H, W) in 0..1. The model is in evaluation mode."""
    with disable_tf32(), autocast(images[0].device, precision):
        results = model(images)
    rows = ([result[key].cpu().numpy() for key in ("boxes", "labels", "scores")] for result in results)
    return [Detections(boxes.astype(np.float64), labels, scores.astype(np.float64)) for boxes, labels, scores in rows]
