"""The pool of past classifiers, one of which classifies the masked images in some of the iterations.

Zolna, Geras and Cho, arXiv 1805.08249, Sec. 3: a mask that works against all of them does not exploit a single one.
"""

import torch
from torch import nn


class ClassifierPool:
    """Up to f_size snapshots of a classifier, taken every smf iterations. In a full pool each new snapshot replaces a
    random one.

    device: where the snapshots are kept. pinned: keep them in pinned host memory, so that the host does not wait when
    one is loaded to a GPU.
    """

    def __init__(self, f_size: int = 30, smf: int = 1000, device: torch.device | str = "cpu", pinned: bool = False):
        if f_size < 1 or smf < 1:
            raise ValueError(f"f_size and smf must be at least 1, got {f_size} and {smf}")
        self.f_size, self.smf, self.device, self.pinned = f_size, smf, torch.device(device), pinned
        self.snapshots: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.snapshots)

    def is_due(self, iteration: int) -> bool:
        """Return whether a snapshot is due in this iteration of an epoch (counted from 0)."""
        return iteration % self.smf == self.smf - 1 or not self.snapshots

    def add(self, classifier: nn.Module) -> None:
        """Add a copy of the classifier to the pool."""
        position = len(self.snapshots) if len(self) < self.f_size else int(torch.randint(self.f_size, ()))
        if position == len(self.snapshots):
            self.snapshots.append([self.allocate_like(tensor) for tensor in get_tensors(classifier)])
        for stored, tensor in zip(self.snapshots[position], get_tensors(classifier), strict=True):
            stored.copy_(tensor, non_blocking=True)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=self.device, pin_memory=self.pinned, requires_grad=False)

    @torch.no_grad()
    def load_random(self, classifier: nn.Module) -> None:
        """Copy a uniformly drawn snapshot into `classifier`."""
        snapshot = self.snapshots[int(torch.randint(len(self), ()))]
        for tensor, stored in zip(get_tensors(classifier), snapshot, strict=True):
            tensor.copy_(stored, non_blocking=True)

    def state_dict(self) -> list[list[torch.Tensor]]:
        if self.pinned:  # copies to pinned memory are asynchronous
            torch.cuda.synchronize()
        return self.snapshots

    def load_state_dict(self, snapshots: list[list[torch.Tensor]]) -> None:
        self.snapshots = [[self.allocate_like(tensor).copy_(tensor) for tensor in snapshot] for snapshot in snapshots]


def get_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers in the order of the state dict."""
    return [tensor.detach() for tensor in model.state_dict().values()]


def compute_snapshot_megabytes(model: nn.Module) -> float:
    """Return the size of one snapshot in MB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in get_tensors(model)) / 1e6
