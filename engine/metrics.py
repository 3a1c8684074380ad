"""Numbers about predictions: accuracy, calibration, classes mistaken for each other."""

import torch


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """logits (N, K), labels (N,) -> (len(ks),) how many labels are among the k highest logits, on the same device."""
    ranked = logits.topk(max(ks), dim=1).indices
    hits = ranked == labels.unsqueeze(1)
    return torch.stack([hits[:, :k].any(1).sum() for k in ks])


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    """Expected calibration error, 0..1: mean over `bins` equal bins of |confidence - accuracy|, weighted by their
    share.

    Guo et al., "On calibration of modern neural networks", ICML 2017, Eq. 3; bins are (lower, upper].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, confidence - right)
    return float(gap.abs().sum() / len(labels))


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(K, K) counts: rows the true class, columns the predicted one."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)
