"""Training losses. Each takes logits (B, K) and soft targets (B, K), whose rows sum to 1, and returns a scalar."""

from collections.abc import Callable
from functools import partial

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


def sigmoid_bce(logits: torch.Tensor, targets: torch.Tensor, threshold: float | None = None) -> torch.Tensor:
    """Return the binary cross-entropy between sigmoid probabilities and targets, mean over batch and classes.

    Each class is a yes-no question of its own, as in Wightman et al. (arXiv 2110.00476), Sec. 3. threshold: targets
    above it become 1 and all others 0; None: soft targets. timm.loss.BinaryCrossEntropy returns the same.
    """
    if threshold is not None:
        targets = targets.gt(threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


LOSSES = {"ce": cross_entropy, "softmax_bce": softmax_bce, "sigmoid_bce": sigmoid_bce}


def build_loss(loss: str, bce_target_thresh: float | None = None) -> Callable:
    """Return the function (logits, soft targets) -> loss. The parameters are the options of the same names."""
    return partial(sigmoid_bce, threshold=bce_target_thresh) if loss == "sigmoid_bce" else LOSSES[loss]


def smooth_labels(targets: torch.Tensor, amount: float) -> torch.Tensor:
    """Return smoothed soft targets: (1 - amount) of the target, and `amount` spread evenly over all classes."""
    return targets if amount == 0 else (1 - amount) * targets + amount / targets.shape[1]


def get_cross_entropy_scale(name: str, num_classes: int) -> float:
    """Return the factor that brings the cross-entropy of clean images to the scale of the training loss `name`.

    It is 2 / K for `softmax_bce`, about the ratio of the two losses, as in the PuzzleMix and Co-Mixup codes. For
    `sigmoid_bce` it is 1 / K, the ratio of the gradients at the logits, (p - target) / K and p - target, where softmax
    and sigmoid give the same probabilities p. Otherwise it is 1.
    """
    return {"softmax_bce": 2 / num_classes, "sigmoid_bce": 1 / num_classes}.get(name, 1.0)
