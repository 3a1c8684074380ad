"""Saliency that costs no pass of its own: maps kept for every training image, learned from the training steps.

Each training step's backward pass already flows through the network; carried on to the images, through the mixing, it
says what the loss reads in the visible part of each of them. Un-augmented and averaged over a small grid, that is
remembered for the next time the image is mixed.
"""

import torch
from torch.nn import functional as F

from saliency.base import Source


class Bank(Source):
    """A small map for each of `images_count` training images, of mean 1; until an image was trained on it is uniform.

    bank_size: side of the maps in cells. bank_momentum: share of the old map that stays when a cell is seen again.
    16 x 16 cells in half precision take 512 bytes an image: 25 MB for CIFAR, in memory and in each checkpoint.
    """

    learns = True

    def __init__(self, images_count: int, bank_size: int = 16, bank_momentum: float = 0.5, device="cpu"):
        if bank_size < 1 or not 0 <= bank_momentum < 1:
            raise ValueError(f"bank_size {bank_size} must be positive and bank_momentum {bank_momentum} below 1")
        self.momentum = bank_momentum
        self.maps = torch.ones(images_count, bank_size, bank_size, dtype=torch.float16, device=device)
        self.batch = None

    def start_batch(self, batch):
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, targets=None):
        batch, count = self.batch, len(images)
        if batch is None or count > len(batch.place):
            raise ValueError("the bank only knows training images: hand it each batch with start_batch before it")
        maps = self.maps[batch.place[-count:]].float()  # a method that mixes a part of the batch mixes its end
        maps = F.interpolate(maps.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False)
        if batch.shift is None:
            return maps.squeeze(1)
        rows, columns, inside = places(batch, images.shape[-2:])
        return taken(maps.squeeze(1), rows[-count:], columns[-count:], inside[-count:])

    @torch.no_grad()
    def after_backward(self, image_grad, coverage):
        batch, cells = self.batch, self.maps.shape[-2:]
        share = coverage.squeeze(1).clamp(0, 1)
        strength = image_grad.float().square().mean(1).sqrt()  # already times the weight of each pixel
        if batch.shift is not None:
            rows, columns, inside = places(batch, strength.shape[-2:], back=True)
            strength, share = (taken(values, rows, columns, inside) for values in (strength, share))
        strength, share = (F.adaptive_avg_pool2d(values.unsqueeze(1), cells).squeeze(1) for values in (strength, share))
        seen = share > 0.25  # of the cell
        old = self.maps[batch.place].float()
        new = strength / share.clamp_min(0.25)
        # on the scale of the old map over the same cells, so that half an image does not outweigh the other half
        scale = (old * seen).sum((1, 2)) / (new * seen).sum((1, 2))
        good = (scale > 0) & scale.isfinite()
        new = torch.lerp(new * scale.view(-1, 1, 1), old, self.momentum)
        new = torch.where(seen & good.view(-1, 1, 1), new, old)
        self.maps[batch.place] = (new / new.mean((1, 2), keepdim=True)).clamp_max(6e4).half()

    def state_dict(self):
        return {"maps": self.maps}

    def load_state_dict(self, state):
        self.maps.copy_(state["maps"])


def places(batch, size: tuple[int, int], back: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each image of an augmented batch, where a row and a column of the crop lie in the original: rows (B, H),
    columns (B, W), and which lie inside (B, H, W) bool. back: where those of the original lie in the crop.
    """
    height, width = size
    top, left = batch.shift
    rows = torch.arange(height, device=top.device) + (-top if back else top).unsqueeze(1)
    columns = torch.arange(width, device=top.device).expand(len(left), -1)
    if back:
        columns = columns - left.unsqueeze(1)
    columns = torch.where(batch.flip.unsqueeze(1), width - 1 - columns, columns)
    if not back:
        columns = columns + left.unsqueeze(1)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    return rows.clamp(0, height - 1), columns.clamp(0, width - 1), inside


def taken(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """values (B, H, W) at rows (B, H) and columns (B, W), zero outside."""
    image = torch.arange(len(values), device=values.device).view(-1, 1, 1)
    return values[image, rows.unsqueeze(2), columns.unsqueeze(1)] * inside
