"""Past states of a classifier, of which one judges the masks now and then.

Zolna, Geras and Cho, arXiv 1805.08249, Sec. 3: what hides the object from all of them cannot be a trick on one.
"""

import torch
from torch import nn


class ClassifierPool:
    """Up to f_size snapshots, one every smf iterations; once full, each new one takes a random place.

    device: where the snapshots lie. Pinned memory is used on the host of a GPU, so that loading one does not wait.
    """

    def __init__(self, f_size: int = 30, smf: int = 1000, device: torch.device | str = "cpu", pinned: bool = False):
        if f_size < 1 or smf < 1:
            raise ValueError(f"f_size and smf must be at least 1, got {f_size} and {smf}")
        self.f_size, self.smf, self.device, self.pinned = f_size, smf, torch.device(device), pinned
        self.snapshots: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.snapshots)

    def due(self, iteration: int) -> bool:
        """Whether a snapshot is taken after this iteration of an epoch (from 0)."""
        return iteration % self.smf == self.smf - 1 or not self.snapshots

    def add(self, classifier: nn.Module) -> None:
        """Take a snapshot: a copy, whatever becomes of the classifier."""
        place = len(self.snapshots) if len(self) < self.f_size else int(torch.randint(self.f_size, ()))
        if place == len(self.snapshots):
            self.snapshots.append([self.room_for(one) for one in state_of(classifier)])
        for room, one in zip(self.snapshots[place], state_of(classifier), strict=True):
            room.copy_(one, non_blocking=True)

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device=self.device, pin_memory=self.pinned, requires_grad=False)

    @torch.no_grad()
    def load_random(self, judge: nn.Module) -> None:
        """Put a uniformly drawn snapshot into `judge`, a copy of the classifier."""
        snapshot = self.snapshots[int(torch.randint(len(self), ()))]
        for own, one in zip(state_of(judge), snapshot, strict=True):
            own.copy_(one, non_blocking=True)

    def state_dict(self) -> list[list[torch.Tensor]]:
        if self.pinned:  # copies into it may still be under way
            torch.cuda.synchronize()
        return self.snapshots

    def load_state_dict(self, snapshots: list[list[torch.Tensor]]) -> None:
        self.snapshots = []
        for snapshot in snapshots:
            self.snapshots.append([self.room_for(one) for one in snapshot])
            for room, one in zip(self.snapshots[-1], snapshot, strict=True):
                room.copy_(one)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, in the order of the state dict."""
    return [one.detach() for one in model.state_dict().values()]


def megabytes(model: nn.Module) -> float:
    """Memory of one snapshot, in MB."""
    return sum(one.numel() * one.element_size() for one in state_of(model)) / 1e6
