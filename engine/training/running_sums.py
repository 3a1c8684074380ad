"""Sums over the images of an epoch, and the two ways in which an epoch ends early."""

from dataclasses import dataclass, field

import torch

from engine.runtime.distributed import all_reduce_sum


class NonFiniteLoss(Exception):
    """The loss left the numbers at `step`, which was seen at step `now`. index: the images of that batch. what, and
    evidence to be kept: where more is known.
    """

    def __init__(self, step: int, index: torch.Tensor, now: int, what: str = "the loss", evidence: dict | None = None):
        seen = f" (seen at step {now})" if evidence is None else ""
        super().__init__(f"{what} is not finite at step {step}{seen}")
        self.step, self.index, self.now, self.evidence = step, index, now, evidence or {}


class TrainingInterrupted(Exception):
    """Training was asked to stop inside an epoch, where `tally` stands."""

    def __init__(self, tally: "EpochStats"):
        super().__init__(f"stopped after {tally.step} steps of the epoch")
        self.tally = tally


@dataclass
class EpochStats:
    """What an epoch adds up, in this process: sums over its images so far, on the device until they are asked for."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: int = 0
    step: int = 0  # optimizer steps done

    def add(self, count: int, **sums: torch.Tensor) -> None:
        """What `count` more images bring."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().float()
        self.seen += count

    def state(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "seen": self.seen, "step": self.step}

    @classmethod
    def load(cls, state: dict, device: torch.device) -> "EpochStats":
        sums = {name: value.to(device) for name, value in state["sums"].items()}
        return cls(sums, state["seen"], state["step"])

    def means(self) -> dict[str, float]:
        """Of all processes, and how many `images` they are of; waits for the device."""
        seen = next(iter(self.sums.values())).new_tensor(self.seen)
        *sums, seen = all_reduce_sum(torch.stack([*self.sums.values(), seen]).double()).tolist()
        return {**{name: value / seen for name, value in zip(self.sums, sums, strict=True)}, "images": int(seen)}
