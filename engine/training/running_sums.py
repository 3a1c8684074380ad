"""Sums over the images of an epoch, and the two exceptions that end an epoch early."""

from dataclasses import dataclass, field

import torch

from engine.runtime.distributed import all_reduce_sum


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite at `step`; it was detected at step `now`.

    index: positions in the image set of the images of that step. what: which loss. evidence: further values worth
    saving, by name.
    """

    def __init__(self, step: int, index: torch.Tensor, now: int, what: str = "the loss", evidence: dict | None = None):
        detected = f" (detected at step {now})" if evidence is None else ""
        super().__init__(f"{what} became NaN or infinite at step {step}{detected}")
        self.step, self.index, self.now, self.evidence = step, index, now, evidence or {}


class TrainingInterrupted(Exception):
    """Training stopped on request within an epoch, after the steps that `stats` counts."""

    def __init__(self, stats: "EpochStats"):
        super().__init__(f"stopped after {stats.step} steps of the epoch")
        self.stats = stats


@dataclass
class EpochStats:
    """Sums over the images of an epoch so far, in this process; they stay on the device until they are read."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: int = 0  # images
    step: int = 0  # optimizer steps

    def add(self, count: int, **sums: torch.Tensor) -> None:
        """Add the sums over `count` more images, each of shape ()."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().float()
        self.seen += count

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "seen": self.seen, "step": self.step}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.seen, self.step = state["seen"], state["step"]

    @staticmethod
    def merge(states: list[dict]) -> dict:
        """Return one state dict with the sums of the state dicts of all processes."""
        sums = {name: sum(one["sums"][name] for one in states) for name in states[0]["sums"]}
        return {"sums": sums, "seen": sum(one["seen"] for one in states), "step": states[0]["step"]}

    def means(self) -> dict[str, float]:
        """Return the means over the images of all processes, and under `images` their number. Waits for the device."""
        seen = next(iter(self.sums.values())).new_tensor(self.seen)
        *sums, seen = all_reduce_sum(torch.stack([*self.sums.values(), seen]).double()).tolist()
        return {**{name: value / seen for name, value in zip(self.sums, sums, strict=True)}, "images": int(seen)}
