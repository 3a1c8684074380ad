"""The training step of a detector, and its detections on a whole part."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from detection.loader import Batch, DetectionLoader
from detection.metrics import Detections
from engine.runtime.device import autocast, exact_float32
from engine.runtime.distributed import all_gather_object, gather_object, move_to_host, world_size
from engine.training.loop import optimizer_step
from engine.training.running_sums import EpochStats, NonFiniteLoss, TrainingInterrupted
from engine.training.stopwatch import Stopwatch

LOSS_NAMES = {  # of the loss terms, for the progress bar
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_objectness": "object",
    "loss_rpn_box_reg": "proposal",
}


def train_one_epoch(
    model: nn.Module,
    feed: DetectionLoader,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    steps: int,
    first_step: int,
    network: nn.Module | None = None,
    scheduler=None,
    scaler=None,
    ema=None,
    precision: torch.dtype | None = None,
    clip_grad: float = 0.0,
    tally: EpochStats | None = None,
    watch: Stopwatch | None = None,
    stop: Callable[[], bool] | None = None,
    keep: Callable[[EpochStats], None] | None = None,
    look_every: int = 50,
    progress: Callable | None = None,
) -> dict[str, float]:
    """`steps` optimizer steps of an epoch, which may be fewer than it has; the means of the loss and of its terms.

    first_step: the number of the epoch's first step in the run. network: `model` as wrapped for several processes.
    tally: where a stopped epoch goes on. keep(tally) is called after every step, and may save. progress: as for
    engine.training.loop.train_one_epoch. Raises NotFinite, before the weights are touched, for a loss that is no
    number, and Stopped before a step where stop() says so.
    """
    network, tally = network or model, tally or EpochStats()
    watch = watch or Stopwatch(feed.device)
    model.train()
    begin, seen_before = time.perf_counter(), tally.seen
    watch.start()
    stream = feed.epoch(epoch, start=tally.step)
    for step in range(tally.step, steps):
        if stop and stop():
            raise TrainingInterrupted(tally)
        optimizer.zero_grad(set_to_none=True)
        batches, losses = [], []
        for number in range(feed.micro_batches):
            batch = next(stream)
            watch.lap("data")
            last = number + 1 == feed.micro_batches
            with nullcontext() if last or network is model else network.no_sync():
                with autocast(feed.device, precision):
                    terms = network(batch.images, batch.targets)
                loss = sum(terms.values())
                (scaler.scale(loss) if scaler else loss).backward()
            losses.append(terms)
            batches.append(batch)
            count = len(batch.images)
            tally.add(count, loss=loss.detach() * count, **{key: term.detach() * count for key, term in terms.items()})
            watch.lap("network")
        # torchvision's detectors make the host wait in every step anyway, so looking at the loss costs nothing more
        check_finite(losses, batches, feed.part.names, first_step + step + 1)
        optimizer_step(model, optimizer, scaler, clip_grad, micro_batches=feed.micro_batches)
        if scheduler:
            scheduler.step()
        if ema:
            ema.update(model)
        tally.step = step + 1
        watch.lap("network")
        if keep:
            keep(tally)
        if progress and (tally.step % look_every == 0 or tally.step == steps):
            means = tally.means()
            rate = (tally.seen - seen_before) * world_size() / (time.perf_counter() - begin)
            shown = {name: means[key] for key, name in LOSS_NAMES.items()}
            lr = optimizer.param_groups[0]["lr"]
            progress(tally.step, loss=means["loss"], **shown, lr=lr, images_per_second=rate)
        elif progress:
            progress(tally.step)
    return tally.means()


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
