"""Exponential moving average of the weights."""

import copy
import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

RAMP_START, RAMP_END = 0.999, 0.999999  # decay of --ema_ramp
RAMP_HOLD = 0.1  # fraction of the run at the first decay


class ModelEma:
    """Exponential moving average of the weights and of the batch-norm statistics; integer buffers are copied.

    torch's AveragedModel does the same, but synchronises host and device at every step.

    ramp_steps: number of updates in which the decay rises to RAMP_END along a cosine, after RAMP_HOLD of them; 0: it
    is constant. This is the momentum of AutoMix and SAMix (arXiv 2103.13027 and 2111.15454) in the OpenMixup code. The
    cosine counts from the start of the run there, too, so that the decay makes a small jump where it is released.
    """

    def __init__(self, model: torch.nn.Module, decay: float, ramp_steps: int = 0):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.ramp_steps, self.step = decay, ramp_steps, 0

    def get_decay(self) -> float:
        """Return the decay of the next update."""
        if self.step < int(RAMP_HOLD * self.ramp_steps) or not self.ramp_steps:
            return self.decay
        done = min(1.0, self.step / self.ramp_steps)
        return RAMP_END - (RAMP_END - self.decay) * (math.cos(math.pi * done) + 1) / 2

    def update(self, model: torch.nn.Module) -> None:
        pairs = list(zip(list_tensors(self.module), list_tensors(model), strict=True))
        moving = [(own.detach(), new.detach()) for own, new in pairs if own.is_floating_point()]
        get_ema_multi_avg_fn(self.get_decay())(*map(list, zip(*moving, strict=True)), None)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
        self.step += 1


def list_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
