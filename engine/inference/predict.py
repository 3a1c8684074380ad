"""Predict the classes of an image set, and compute the loss and accuracies."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import DeviceLoader
from engine.inference.metrics import topk_correct
from engine.runtime.device import autocast, disable_tf32
from engine.runtime.distributed import gather_object


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: DeviceLoader,
    *,
    precision: torch.dtype | None = None,
    progress: Callable | None = None,
    transform: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict a whole image set: logits (N, K) float32 and labels (N,) on the CPU, in the order of the set.

    The network runs in evaluation mode, and its mode is restored afterwards. With several processes, each predicts its
    own images. Only the main process gets the results; the others get 0 rows. progress: called with the number of
    finished batches. transform(images, labels, index): returns the images that the network gets instead.
    """
    training = model.training
    model.eval()
    logits, labels, indices = [], [], []
    try:
        for step, batch in enumerate(loader.epoch()):
            with disable_tf32():
                images = transform(batch.images, batch.labels, batch.index) if transform else batch.images
                with autocast(loader.device, precision):
                    logits.append(model(images).float())
            labels.append(batch.labels)
            indices.append(batch.index)
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    own = [torch.cat(parts).cpu() for parts in (logits, labels, indices)] if indices else None
    parts = [part for part in gather_object(own) or [] if part]
    if not parts:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    logits, labels, indices = map(torch.cat, zip(*parts, strict=True))
    order = indices.argsort()
    return logits[order], labels[order]


def compute_scores(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Return the cross-entropy and the top-k accuracies in percent. A k above the number of classes is left out."""
    ks = tuple(k for k in ks if k <= logits.shape[1])
    correct = topk_correct(logits, labels, ks).double() * (100 / len(labels)) if ks else []
    loss = F.cross_entropy(logits.float(), F.one_hot(labels, logits.shape[1]).float())
    return {"loss": float(loss), **{f"top{k}": float(value) for k, value in zip(ks, correct, strict=True)}}
