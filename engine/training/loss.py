"""Training losses. Each takes logits (B, K) and soft targets (B, K), whose rows sum to 1, and returns a scalar."""

import torch
from torch.nn import functional as F


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy with soft targets, mean over the batch. It equals the two-term loss of the mixing
    papers, lam * CE(logits, labels) + (1 - lam) * CE(logits, labels[partner]).
    """
    return F.cross_entropy(logits.float(), targets)


def softmax_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy between softmax probabilities and targets, mean over batch and classes.

    This is the loss of the PuzzleMix, Co-Mixup and SAGE codes. It is computed in float32: autocast refuses it on CUDA,
    and half precision would round probabilities to 0 or 1. torch clamps the logarithms to at least -100.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(logits.float().softmax(1), targets)


LOSSES = {"ce": cross_entropy, "bce": softmax_bce}


def smooth_labels(targets: torch.Tensor, amount: float) -> torch.Tensor:
    """Return smoothed soft targets: (1 - amount) of the target, and `amount` spread evenly over all classes."""
    return targets if amount == 0 else (1 - amount) * targets + amount / targets.shape[1]


def get_cross_entropy_scale(name: str, num_classes: int) -> float:
    """Return the factor that brings the cross-entropy of clean images to the scale of the training loss `name`.

    It is 2 / K for `bce`, about the ratio of the two losses, as in the PuzzleMix and Co-Mixup codes; otherwise 1.
    """
    return 2 / num_classes if name == "bce" else 1.0
