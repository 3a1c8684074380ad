"""The training step of a detector, and its detections on a whole part."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from detection.loader import Batch, DetectionLoader
from detection.metrics import Detections
from engine.runtime.device import autocast, exact_float32
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
            batch = next(stream)
            watch.lap("data")
            sync = number + 1 == loader.micro_batches or state.network is state.model
            with nullcontext() if sync else state.network.no_sync():
                with autocast(loader.device, precision):
                    terms = state.network(batch.images, batch.targets)
                loss = sum(terms.values())
                (state.scaler.scale(loss) if state.scaler else loss).backward()
            losses.append(terms)
            batches.append(batch)
            count = len(batch.images)
            stats.add(count, loss=loss.detach() * count, **{key: term.detach() * count for key, term in terms.items()})
            watch.lap("network")
        # torchvision's detectors make the host wait in every step anyway, so checking the loss costs nothing more
        check_finite(losses, batches, loader.part.names, first_step + step + 1)
        optimizer_step(state, clip_grad, loader.micro_batches)
        monitor.end_step(steps, state.optimizer, lambda: shown_means(stats))
    return stats.means()


def shown_means(stats: EpochStats) -> dict[str, float]:
    """The means of the loss and its terms, under their short names."""
    means = stats.means()
    return {"loss": means["loss"], **{name: means[key] for key, name in LOSS_NAMES.items()}}


def check_finite(losses: list[dict[str, torch.Tensor]], batches: list[Batch], names: list[str], step: int) -> None:
    """Raise NotFinite, with the terms, the images and their objects, in all processes if a loss of one of them is no
    number. losses, batches: of the pieces of the step. names: of all images.
    """
    values = torch.stack([torch.stack(list(terms.values())) for terms in losses]).detach()
    own = []
    if not values.isfinite().all():
        for terms, batch in zip(values.tolist(), batches, strict=True):
            if not math.isfinite(sum(terms)):
                seen = {"terms": dict(zip(losses[0], terms, strict=True)), "index": batch.index}
                seen |= {"names": [names[place] for place in batch.index.tolist()]}
                own.append(move_to_host({**seen, "images": batch.images, "targets": batch.targets}))
    bad = [piece for of_one in all_gather_object(own) for piece in of_one]
    if bad:
        terms = ", ".join(f"{name} {value:g}" for name, value in bad[0]["terms"].items())
        where = ", ".join(name for piece in bad for name in piece["names"])
        index = torch.cat([piece["index"] for piece in bad])
        raise NonFiniteLoss(step, index, step, f"the loss ({terms}) on {where}", {"batches": bad})


@torch.no_grad()
def predict(
    model: nn.Module, feed: DetectionLoader, *, precision: torch.dtype | None = None, progress: Callable | None = None
) -> list[Detections]:
    """The detections of each image of a part, in its order, in float32 unless a precision is given; the network is in
    evaluation mode meanwhile. Of several processes each takes its images, and only the first one gets the list.
    """
    training, found = model.training, {}
    model.eval()
    try:
        for step, batch in enumerate(feed.epoch()):
            with exact_float32(), autocast(feed.device, precision):
                results = model(batch.images)
            for place, result in zip(batch.index.tolist(), results, strict=True):
                boxes, labels, scores = (result[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
                found[place] = Detections(boxes.astype(np.float64), labels, scores.astype(np.float64))
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    parts = gather_object(found) or []
    together = {place: one for part in parts for place, one in part.items()}
    return [together[place] for place in sorted(together)]
