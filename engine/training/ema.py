"""Exponential moving average of the weights."""

import copy

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEma:
    """Exponential moving average of the weights and of the batch-norm statistics; integer buffers are copied.

    torch's AveragedModel does the same, but synchronises host and device at every step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.average = get_ema_multi_avg_fn(decay)

    def update(self, model: torch.nn.Module) -> None:
        pairs = list(zip(list_tensors(self.module), list_tensors(model), strict=True))
        moving = [(own.detach(), new.detach()) for own, new in pairs if own.is_floating_point()]
        self.average(*map(list, zip(*moving, strict=True)), None)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)


def list_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
