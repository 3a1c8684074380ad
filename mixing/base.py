"""What every mixing method is, and the pieces several of them share: boxes, partners, and methods put together."""

from contextlib import AbstractContextManager, nullcontext

import torch

from mixing.ops import check_targets, replace_unusable


class Mixer:
    """A mixing method: `mixed, soft = mixer(images, targets, source)`.

    images (B, C, H, W) normalised floats and targets (B, K) with rows that sum to 1 are never changed; the results have
    the same shapes. source: callable (images, targets) -> saliency (B, H, W) >= 0, or None where default_source is
    None. The random draws come from torch's global generators: scalars on the host, tensors on the device of the
    images.
    """

    default_source: str | None = None  # the source this method was published with; None: it looks at no saliency
    mixed_weight: float = 1.0  # weight of the mixed loss of the last batch
    wants_mixed_grad: bool = False  # whether after_backward reads the gradient at the mixed images
    mixes_hidden: bool = False  # whether it hooks a stage of the network, which a compiled network ignores
    batch_size: int | None = None  # the only size of batch it does itself justice on, where there is one
    unusable: torch.Tensor | int = 0  # saliency maps so far that were all zero or no numbers

    @property
    def gradient_options(self) -> dict:
        """How a gradient source takes the pixel gradient for this method: parameters of saliency.gradient.Gradient."""
        return {}

    def build_source(self, make):
        """The source of this method, or None if it looks at no saliency. make(mixer) builds one."""
        return make(self) if self.default_source else None

    def look(self, source, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, H, W) float32 >= 0: what the source says of the batch. A map that is all zero or no number becomes
        uniform, and is counted in `unusable` without asking the device. Raises ValueError for targets that are labels.
        """
        check_targets(targets)
        saliency, unusable = replace_unusable(source(images, targets).detach().float())
        self.unusable = self.unusable + unusable.sum()
        return saliency

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, source=None) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with the remedy, if images of this size in pixels cannot be mixed."""

    def during(self, model: torch.nn.Module) -> AbstractContextManager:
        """Around the forward pass of the mixed batch."""
        return nullcontext()

    def after_backward(self, mixed_grad: torch.Tensor | None) -> None:
        """After the backward pass of the mixed batch, with its pixel gradient if wants_mixed_grad."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Before epoch number `epoch` (from 0) of `epochs`, which has `steps` batches."""

    def state_dict(self) -> dict:
        """Whatever must survive a resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what state_dict gave."""
