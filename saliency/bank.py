"""Saliency that costs no pass of its own: maps kept for every training image, learned from the training steps.

Each training step's backward pass already flows through the network; carried on to the images, through the mixing, it
says what the loss reads in the visible part of each of them. Un-augmented and averaged over a small grid, that is
remembered for the next time the image is mixed.
"""

import torch

from saliency.base import Source


class Bank(Source):
    """A small map for each of `num_images` training images, of mean 1; until an image was trained on it is uniform.

    bank_size: side of the maps in cells. bank_momentum: share of the old map that stays when a cell is seen again.
    16 x 16 cells in half precision take 512 bytes an image: 25 MB for CIFAR, in memory and in each checkpoint.
    """

    learns = True

    def __init__(self, num_images: int, bank_size: int = 16, bank_momentum: float = 0.5, device="cpu"):
        if bank_size < 1 or not 0 <= bank_momentum < 1:
            raise ValueError(f"bank_size {bank_size} must be positive and bank_momentum {bank_momentum} below 1")
        self.momentum = bank_momentum
        self.maps = torch.ones(num_images, bank_size, bank_size, dtype=torch.float16, device=device)
        self.fresh = torch.zeros(num_images, dtype=torch.bool, device=device)  # learned since the last exchange
        self.batch = None

    def start_batch(self, batch):
        self.batch = batch

    @torch.no_grad()
    def __call__(self, images, targets=None):
        batch, count = self.batch, len(images)
        if batch is None or count > len(batch.loaded_index):
            raise ValueError("the bank only knows training images: hand it each batch with start_batch before it")
        maps = self.maps[batch.loaded_index[-count:]].float()  # a method that mixes a part of the batch mixes its end
        rows, columns = (
            interpolation((bounds[:-1] + bounds[1:])[:, -count:].T / 2, side)
            for bounds, side in zip(pixel_bounds(batch, images.shape[-2:]), maps.shape[1:], strict=True)
        )
        return rows @ maps @ columns.mT

    @torch.no_grad()
    def after_backward(self, image_grad, coverage):
        batch, cells = self.batch, self.maps.shape[-2:]
        share = coverage.squeeze(1).clamp(0, 1)
        strength = image_grad.float().square().mean(1).sqrt()  # already times the weight of each pixel
        rows, columns = (
            cell_overlap(bounds.T, side)
            for bounds, side in zip(pixel_bounds(batch, strength.shape[-2:]), cells, strict=True)
        )
        strength, share = (rows @ values @ columns.mT for values in (strength, share))  # means over the cells
        seen = share > 0.25  # of the cell
        old = self.maps[batch.loaded_index].float()
        new = strength / share.clamp_min(0.25)
        # on the scale of the old map over the same cells, so that half an image does not outweigh the other half
        scale = (old * seen).sum((1, 2)) / (new * seen).sum((1, 2))
        good = (scale > 0) & scale.isfinite()
        new = torch.lerp(new * scale.view(-1, 1, 1), old, self.momentum)
        new = torch.where(seen & good.view(-1, 1, 1), new, old)
        self.maps[batch.loaded_index] = (new / new.mean((1, 2), keepdim=True)).clamp_max(6e4).half()
        self.fresh[batch.loaded_index] = True

    def sync(self, all_reduce_sum):
        """Every process trains on images of its own within an epoch, so a map comes from one of them."""
        learned = all_reduce_sum(self.fresh.half()).to(self.maps.device) > 0
        maps = all_reduce_sum(self.maps * self.fresh.view(-1, 1, 1)).to(self.maps.device)
        self.maps = torch.where(learned.view(-1, 1, 1), maps, self.maps)
        self.fresh.zero_()

    def state_dict(self):
        return {"maps": self.maps}

    def load_state_dict(self, state):
        self.maps.copy_(state["maps"])


def pixel_bounds(batch, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the borders between the rows, and between the columns, of each image lie in its original, whose sides are
    1: (H + 1, B) and (W + 1, B), the latter from right to left in flipped images.
    """
    device, (height, width) = batch.loaded_index.device, size
    none = torch.zeros(len(batch.loaded_index), device=device)
    top, bottom, left, right = none, none + 1, none, none + 1
    if batch.box is not None:
        top, bottom, left, right = batch.box.unbind(1)
    elif batch.shift is not None:
        top, left = batch.shift[0] / height, batch.shift[1] / width
        bottom, right = top + 1, left + 1
    if batch.flip is not None:
        left, right = torch.where(batch.flip, right, left), torch.where(batch.flip, left, right)
    down, across = (torch.arange(side + 1, device=device).unsqueeze(1) / side for side in size)
    return top + down * (bottom - top), left + across * (right - left)


def interpolation(centres: torch.Tensor, cells: int) -> torch.Tensor:
    """Weights (B, n, cells) that interpolate between the centres of cells at the places (B, n); none outside 0..1."""
    places = (centres * cells - 0.5).clamp(0, cells - 1)
    tent = 1 - (places.unsqueeze(2) - torch.arange(cells, device=centres.device)).abs()
    inside = (centres >= 0) & (centres < 1)
    return tent.clamp_min(0) * inside.unsqueeze(2)


def cell_overlap(bounds: torch.Tensor, cells: int) -> torch.Tensor:
    """The share of each cell that each pixel covers: (B, cells, n) for the borders (B, n + 1) of n pixels."""
    low = torch.minimum(bounds[:, :-1], bounds[:, 1:]).unsqueeze(1) * cells
    high = torch.maximum(bounds[:, :-1], bounds[:, 1:]).unsqueeze(1) * cells
    cell = torch.arange(cells, device=bounds.device).view(1, -1, 1)
    return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)
