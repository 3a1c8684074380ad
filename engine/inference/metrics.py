"""Compute accuracy and confusion matrices from logits, and validate logits."""

import statistics
from collections.abc import Sequence

import torch

from engine.runtime.text import format_count


def rank_classes(logits: torch.Tensor) -> torch.Tensor:
    """Return the classes of logits (N, K) from the highest to the lowest, (N, K) long; equal ones by their index.

    Probabilities would not do: in float32, all classes that lie more than about 100 below the highest have exactly 0.
    """
    return logits.argsort(dim=1, descending=True, stable=True)


def rank_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return where each label (N,) stands in rank_classes(), 0 for the highest: (N,). It is last if its logit is NaN.

    Nothing is sorted, which takes many times longer for 1000 classes.
    """
    own, index = logits.gather(1, labels.unsqueeze(1)), torch.arange(logits.shape[1], device=logits.device)
    return (~(logits <= own) | ((logits == own) & (index < labels.unsqueeze(1)))).sum(1)


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """Count the labels (N,) that are among the k highest logits (N, K), for each k: (len(ks),) on the same device."""
    rank = rank_labels(logits, labels)
    return torch.stack([(rank < k).sum() for k in ks])


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return (K, K) counts: rows are true classes, columns are predicted classes."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def validate_logits(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Check logits (N, K) and return them as float64, on the same device.

    In float32, the softmax is exactly 1 once the highest logit leads by 17, so such images would have equal confidence.
    Raises ValueError for another shape, for no images, for logits that are NaN or infinite, and for labels that are not
    (N,) long in 0..K - 1.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits must be (N, K) with at least one image and class, got {tuple(logits.shape)}")
    broken = len(logits) - int(logits.isfinite().all(1).sum())
    if broken:
        raise ValueError(f"logits are NaN or infinite for {broken} of {len(logits)} images")
    if labels is not None:
        if labels.shape != logits.shape[:1] or labels.dtype != torch.long:
            raise ValueError(
                f"labels must be torch.long of shape ({len(logits)},), got {labels.dtype} of {tuple(labels.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"labels must be in 0..{logits.shape[1] - 1}, got {low} to {high}")
    return logits.double()


def format_accuracy(result: dict) -> str:
    """Format the top-k accuracies of a result, in percent, and the number of unreadable files, if there are any."""
    texts = [f"Top-{key[3:]} Accuracy: {value:.2f}%" for key, value in result.items() if key.startswith("top")]
    return "  ".join([*texts, *list_unreadable(result, {"unreadable": ""})])


def list_unreadable(result: dict, splits: dict[str, str]) -> list[str]:
    """Return a text for each key of `splits` under which a result has a number of files that do not count.

    splits: key -> which images they are, or nothing.
    """
    found = [(result[key], f"{split} file".strip()) for key, split in splits.items() if result.get(key)]
    return [f"{format_count(count, noun)} cannot be read: left out" for count, noun in found]


def summarize_values(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return mean, standard deviation of a sample (n - 1) and number of the values. std is None for a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}
