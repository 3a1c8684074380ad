"""The training losses. Each takes logits (B, K) and soft targets (B, K), rows of which sum to 1, and gives a scalar."""

import torch
from torch.nn import functional as F


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft cross-entropy, mean over the batch; equal to the two-term loss of the mixing papers."""
    return F.cross_entropy(logits.float(), targets)


def softmax_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy between softmax probabilities and targets, mean over batch and classes.

    The loss of the Puzzle Mix, Co-Mixup and SAGE codes. In float32: on CUDA autocast refuses it, and half precision
    would round probabilities to 0 or 1. The logarithms are cut at -100, as torch's own does.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy(logits.float().softmax(1), targets)


LOSSES = {"ce": cross_entropy, "bce": softmax_bce}


def smooth_labels(targets: torch.Tensor, amount: float) -> torch.Tensor:
    """Label smoothing of soft targets: (1 - amount) of the target, the rest spread over all classes."""
    return targets if amount == 0 else (1 - amount) * targets + amount / targets.shape[1]


def cross_entropy_scale(name: str, num_classes: int) -> float:
    """What a clean cross-entropy is multiplied by to stand beside the training loss `name`: 2 / K beside the binary
    one (Puzzle Mix and Co-Mixup codes), about the ratio of the two.
    """
    return 2 / num_classes if name == "bce" else 1.0
