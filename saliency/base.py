"""The contract of a saliency source: `saliency = source(images, targets)`, "where is the object in each image?".

A source subclasses Source and implements __call__(). A mixing method (mixing/base.py) calls it once for each batch that
it mixes. A plain function with the same signature also works wherever a mixer takes a source.

Each of the other members has a default. Override only what differs:
* `clean_weight`, `mode`: if the source trains the network with its own backward pass, or moves batch norm's statistics.
* `per_image`: if the map of an image depends on nothing but that image, its target and the network. A mixer that reads
  one map then asks for one.
* `logits`: if it runs the classifier. RL-Mix feeds them to its policy.
* `has_gradient`, gradient(), reduce(): if it can return the signed pixel gradient. Adversarial PuzzleMix needs it.
* points(): if it knows the position of the object better than the maximum of its map does. SaliencyMix asks for it.
* `learns`, start_batch(), after_backward(), sync(), state_dict(): if it is updated while the classifier trains.
* `capturable`: if methods of it are fixed sequences of device operations, which a run on CUDA captures as graphs.

The training step in engine/training/loop.py makes these calls to a source that learns, in this order:

    source.start_batch(batch)                            before the batch is mixed
    saliency = source(images, targets)                   by the mixer
    coverage = source.measure_coverage(mixed, images)    after mixing; images.requires_grad is True
    source.after_backward(image_grad, coverage)          after the backward pass of the mixed batch
    source.sync(all_reduce_sum)                          after each epoch, if there are several processes
"""

from collections.abc import Callable

import torch


class Source:
    """Base class of all saliency sources.

    images (B, C, H, W) are normalised floats; targets (B, K) are floats whose rows sum to 1. They are a training batch,
    or the last images of one in their order, if only these are mixed; a source that is `per_image` may get any of them.
    A call modifies neither. It returns one map per image, (B, H, W) >= 0 on any scale, through which no gradient flows.
    """

    clean_weight: float = 0.0  # > 0: each call adds the parameter gradients of clean_weight * the clean loss to .grad
    mode: str = "eval"  # "train": each call runs the network in training mode, which updates batch norm's statistics
    per_image: bool = False  # whether any selection of images can be passed, each of which then has the same map
    logits: torch.Tensor | None = None  # (B, K) float32 of the last call, if the source runs the classifier
    has_gradient: bool = False  # whether gradient() and reduce() are implemented
    learns: bool = False  # whether start_batch() and after_backward() must be called in every training step
    # Names of methods that a run may replace by captured CUDA graphs, which cost one launch each. Such a method takes
    # tensors, None and plain values. For arguments of the same shapes it launches the same operations on the same
    # memory: it never waits for the device or draws on the host, and it updates tensors of the source in place.
    capturable: tuple[str, ...] = ()
    network_passes: tuple[str, ...] = ()  # the same for methods that run the network; captured with --graph_step

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the saliency maps, (B, H, W) float32 >= 0."""
        raise NotImplementedError

    def points(self, saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the row and the column of the object in each map (B, H, W), each (B,) long.

        None means that the object is at the maximum of its map.
        """
        return None

    def gradient(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the signed gradient of the loss with respect to the pixels, (B, C, H, W) float32.

        It is exact up to one positive factor for the whole batch.
        """
        raise NotImplementedError

    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        """Reduce a signed gradient (B, C, H, W) to the maps (B, H, W) that a call returns."""
        raise NotImplementedError

    def start_batch(self, batch) -> None:
        """Note which batch follows. batch: an engine.data.loader.Batch, with image indices, crops and flips."""

    @staticmethod
    def measure_coverage(mixed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return for each pixel of `images` its weight in the mixed images, summed over them: (B, 1, H, W).

        The gradient of the sum of all mixed pixels is this weight, whatever the method. images must have required
        gradients when they were mixed.
        """
        if mixed is images:
            return torch.ones_like(images[:, :1])
        (weight,) = torch.autograd.grad(mixed, images, torch.ones_like(mixed), retain_graph=True)
        return weight[:, :1]

    def after_backward(self, image_grad: torch.Tensor, coverage: torch.Tensor) -> None:
        """Learn from the training step. Only called if `learns` is True.

        image_grad (B, C, H, W): gradient of the loss with respect to the images before mixing. coverage (B, 1, H, W):
        what measure_coverage() returned before the backward pass.
        """

    def sync(self, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Merge what all processes have learned since the last call.

        all_reduce_sum(tensor) returns the sum of the tensor over all processes, on the CPU.
        """

    def state_dict(self) -> dict:
        """Return the state that a resumed run needs: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict() returned."""
