"""What every saliency source is: `source(images, targets) -> (B, H, W) >= 0`, "where is the object?"."""

import torch


class Source:
    """A source of saliency maps. images (B, C, H, W) are normalised floats, targets (B, K) have rows that sum to 1.

    A source is asked about a training batch or about the last images of one, in order: methods that mix only a part of
    a batch mix its end. Neither it nor the images change, and no gradient flows through it.
    """

    clean_weight: float = 0.0  # weight of the clean loss whose parameter gradients each call adds to .grad
    learns: bool = False  # whether after_backward wants the pixel gradient of the training step

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def start_batch(self, batch) -> None:
        """Before the batch is mixed. batch: engine.data.loader.Batch, of which only the geometry and the index are
        read.
        """

    def after_backward(self, image_grad: torch.Tensor, coverage: torch.Tensor) -> None:
        """After the training step's own backward pass: the gradient at the un-mixed images (B, C, H, W) and the weight
        with which each of their pixels went into the mixed ones, (B, 1, H, W).
        """

    def exchange(self, total) -> None:
        """Where several processes train: learn what the others have learned since the last call. total(tensor) is
        the sum of a tensor over all of them, on the host.
        """

    def state_dict(self) -> dict:
        """Whatever must survive a resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what state_dict gave."""
