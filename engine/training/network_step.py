"""The network's part of a training step: forward pass, loss and backward pass of a mixed batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.runtime.device import autocast
from engine.runtime.distributed import world_size
from engine.runtime.graphs import GraphCapture
from engine.training.loss import smooth_labels


@dataclass(frozen=True)
class StepConfig:
    """The loss of a training step and how its gradient is computed."""

    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits (B, K), soft targets (B, K)) -> ()
    num_classes: int
    precision: torch.dtype | None = None  # of autocast; None: float32
    label_smoothing: float = 0.0
    clip_grad: float = 0.0  # maximum norm of the gradient; 0: no clipping
    clean_weight: float | None = None  # weight of the loss of the unmixed batch; None: as the method has it

    def compute_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss, (), with smoothed labels. logits, targets (B, K)."""
        return self.loss_fn(logits, smooth_labels(targets, self.label_smoothing))


def run_network_step(
    network: torch.nn.Module,
    scaler: torch.amp.GradScaler | None,
    config: StepConfig,
    mixed: torch.Tensor,
    soft: torch.Tensor,
    weight: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of weight * loss to .grad. mixed (B, C, H, W), soft (B, K); weight: a number or a tensor ().

    Returns the loss, (), and for each image the label weight of the predicted class, (B, 1).
    """
    with autocast(mixed.device, config.precision):
        logits = network(mixed)
    loss = config.compute_loss(logits, soft)
    weighted = weight * loss
    (scaler.scale(weighted) if scaler else weighted).backward()
    with torch.no_grad():
        return loss.detach(), soft.gather(1, logits.argmax(1, keepdim=True))


def find_capture_obstacle(graphs: GraphCapture, mixer, sources: list) -> str | None:
    """Return why the network's step cannot be captured with this method and its sources; None: it can."""
    if graphs.obstacle:
        return graphs.obstacle
    if world_size() > 1:
        return "with several processes, their gradients are averaged in the backward pass"
    if mixer.mixes_hidden:
        return "manifold mixup hooks a layer of the network"
    if mixer.wants_mixed_grad:
        return "rlmix needs the gradient at the mixed images"
    if any(source.learns for source in sources):
        return "the source learns from the gradient at the images"
    return None
