"""Numbers about predictions: accuracy, classes mistaken for each other; and logits made ready to be counted."""

import torch


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """logits (N, K), labels (N,) -> (len(ks),) how many labels are among the k highest logits, on the same device."""
    ranked = logits.topk(max(ks), dim=1).indices
    hits = ranked == labels.unsqueeze(1)
    return torch.stack([hits[:, :k].any(1).sum() for k in ks])


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(K, K) counts: rows the true class, columns the predicted one."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def validate_logits(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """logits (N, K) of any floating type in float64, on the same device.

    In float32 every softmax whose first logit leads by 17 is exactly 1, and such images could not be told apart. Raises
    ValueError for another shape, for no images, for logits that are not finite, and for labels that are not (N,)
    long of 0 to K - 1.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits must be (N, K) of at least one image and class, got {tuple(logits.shape)}")
    broken = len(logits) - int(logits.isfinite().all(1).sum())
    if broken:
        raise ValueError(f"{broken} of {len(logits)} images have logits that are not finite: NaN or infinite")
    if labels is not None:
        if labels.shape != logits.shape[:1] or labels.dtype != torch.long:
            raise ValueError(f"labels must be {len(logits)} of torch.long, got {labels.dtype} of {tuple(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}, got {low} to {high}")
    return logits.double()


def format_accuracy(result: dict) -> str:
    return "  ".join(f"Top-{key[3:]} Accuracy: {value:.2f}%" for key, value in result.items() if key.startswith("top"))
