"""Predictions of a classifier on an image set, and their loss and accuracies."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import DeviceLoader
from engine.inference.metrics import topk_correct
from engine.runtime.device import autocast, exact_float32
from engine.runtime.distributed import gather_object


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: DeviceLoader,
    *,
    precision: torch.dtype | None = None,
    progress: Callable | None = None,
    transform: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) float32 and labels (N,) of a whole part, on the host, network in evaluation mode (put back
    afterwards). Of several processes each takes its images, and only the first one gets the whole; the others get
    nothing (0 rows). transform(images, labels, index): gives what the network sees instead.
    """
    training = model.training
    model.eval()
    logits, labels, places = [], [], []
    try:
        for step, batch in enumerate(batches.epoch()):
            with exact_float32():
                images = transform(batch.images, batch.labels, batch.index) if transform else batch.images
                with autocast(batches.device, precision):
                    logits.append(model(images).float())
            labels.append(batch.labels)
            places.append(batch.index)
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    own = [torch.cat(parts).cpu() for parts in (logits, labels, places)] if places else None
    parts = [part for part in gather_object(own) or [] if part]
    if not parts:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    logits, labels, places = map(torch.cat, zip(*parts, strict=True))
    order = places.argsort()
    return logits[order], labels[order]


def compute_scores(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Cross-entropy and top-k accuracies in percent; k above the number of classes is left out."""
    ks = tuple(k for k in ks if k <= logits.shape[1])
    correct = topk_correct(logits, labels, ks).double() * (100 / len(labels)) if ks else []
    loss = F.cross_entropy(logits.float(), F.one_hot(labels, logits.shape[1]).float())
    return {"loss": float(loss), **{f"top{k}": float(value) for k, value in zip(ks, correct, strict=True)}}
