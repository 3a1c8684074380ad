"""The contract of a saliency source: `source(images, targets) -> (B, H, W) >= 0`, "where is the object?"."""

from collections.abc import Callable

import torch


class Source:
    """A source of saliency maps. A subclass implements __call__() and sets the members in which it differs.

    images (B, C, H, W) are normalised floats, targets (B, K) have rows that sum to 1. The images are a training batch
    or the last images of one, in order: methods that mix only a part of a batch mix its end. A call changes neither,
    and no gradient flows through its result.
    """

    clean_weight: float = 0.0  # weight of the clean loss whose parameter gradients each call adds to .grad
    mode: str = "eval"  # "train" if each call runs the network in training mode, and so moves batch norm's statistics
    logits: torch.Tensor | None = None  # (B, K) float32 of the last call, from a source that runs the network
    has_gradient: bool = False  # whether it has gradient() and reduce()
    learns: bool = False  # whether after_backward() reads the pixel gradient of the training step

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def points(self, saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Row and column, each (B,) long, of the object in maps (B, H, W) of this source; None: at the maximum."""
        return None

    def gradient(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The signed gradient at the pixels (B, C, H, W) float32, up to one positive factor for the whole batch."""
        raise NotImplementedError

    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        """The maps (B, H, W) that a call makes of the signed gradient (B, C, H, W)."""
        raise NotImplementedError

    def start_batch(self, batch) -> None:
        """Called before a batch is mixed. batch: an engine.data.loader.Batch, whose geometry and index are read."""

    def after_backward(self, image_grad: torch.Tensor, coverage: torch.Tensor) -> None:
        """Called after the backward pass of the training step if the source learns, with the gradient at the unmixed
        images (B, C, H, W) and the weight with which each of their pixels went into the mixed ones, (B, 1, H, W).
        """

    def exchange(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Learn what the other processes have learned since the last call. total(tensor) is the sum of a tensor over
        all processes, on the host.
        """

    def state_dict(self) -> dict:
        """The state that must survive a resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict() returned."""
