"""RecursiveMix: shrink the last mixed batch and paste it into the images of this one.

Yang et al., NeurIPS 2022, arXiv 2203.06844; github.com/implus/RecursiveMix-pytorch. The pasted images are mixed
themselves, so an image holds ever smaller ones of several batches, and its target the classes of all. Left out is the
second term of the paper's loss, which compares the network's features in the box with its earlier prediction: a mixing
method sees no features. The code pastes image i of the last batch into image i. Here the pairs are drawn, so that they
are random without a shuffled loader, too.
"""

import torch

from .base import Mixer
from .ops import box_mask, check_probability, draw_centers, draw_partner, scale_boxes
from .resizemix import resize_into


class RecursiveMix(Mixer):
    """The box covers a share of the image that is drawn uniformly from 0 to history_area; targets follow its area.

    One box per batch, or per image with in_batch; boxes are cut at the borders. resize_mode: `nearest` or `bilinear`.
    mix_prob: probability that a batch is mixed; one that is not is no history either. The first batch, the first of an
    epoch, and one whose images or targets have another shape than those of the history stay unmixed. `partner` is None
    for a mixed batch, since the other images are not in it.
    """

    label_obstacle = "mixes in images of earlier batches"

    def __init__(
        self,
        history_area: float = 0.5,
        resize_mode: str = "nearest",
        mix_prob: float = 1.0,
        in_batch: bool = False,
    ):
        if not 0 < history_area <= 1:
            raise ValueError(f"history_area must lie in (0, 1], got {history_area}")
        if resize_mode not in ("nearest", "bilinear"):
            raise ValueError(f"resize_mode must be nearest or bilinear, got {resize_mode!r}")
        self.history_area, self.resize_mode = history_area, resize_mode
        self.mix_prob, self.in_batch = check_probability("mix_prob", mix_prob), in_batch
        self.history: list[torch.Tensor] | None = None  # the last mixed images (n, C, H, W) and their targets (n, K)

    def mix_batch(self, images, targets, source):
        mixed, soft = images, targets
        if self.fits(images, targets):
            mixed, soft = self.paste_history(images, targets)
        else:
            self.set_weight(images, lambda: 1.0, partner=None)
        self.history = [mixed.detach().clone(), soft.detach().clone()]  # the caller may write into what it gets
        return mixed, soft

    def fits(self, images: torch.Tensor, targets: torch.Tensor) -> bool:
        """Return whether there is a history whose images and targets have the shapes of these."""
        shapes = [images.shape[1:], targets.shape[1:]]
        return self.history is not None and [one.shape[1:] for one in self.history] == shapes

    def paste_history(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Paste an image of the history into each image. Returns new images and targets.

        Each image of the history serves once, or as often as others if it has fewer images than this batch.
        """
        height, width = images.shape[-2:]
        before, targets_before = self.history[0].to(images), self.history[1].to(targets)
        chosen = draw_partner(before)[torch.arange(len(images), device=images.device) % len(before)]
        share = self.history_area * torch.rand(len(images) if self.in_batch else 1, device=images.device)
        boxes = scale_boxes(*draw_centers(images, self.in_batch), share.sqrt(), height, width)
        outside = ~box_mask(boxes, height, width)
        self.set_weight(images, lambda: ~box_mask(boxes, height, width).squeeze(1), partner=None)
        self.partner_fn = None
        lam = outside.flatten(1).float().mean(1, keepdim=True).to(targets)
        pasted = resize_into(before[chosen], boxes, self.resize_mode)
        return torch.where(outside, images, pasted), lam * targets + (1 - lam) * targets_before[chosen]

    def start_epoch(self, epoch, epochs, steps):
        self.history = None

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]
