"""A source without a pass of its own: it keeps one map per training image and learns it from the training steps.

The backward pass of a training step runs through the network anyway. Continued through the mixing to the unmixed
images, its gradient says what the loss depends on in the visible part of each image. It is mapped back through crop and
flip, averaged over a small grid, and used the next time the image is mixed, about one epoch later.
"""

import torch

from .base import Source


class Bank(Source):
    """Keeps a map of bank_size x bank_size cells, with mean 1, for each of `num_images` training images.

    Maps are uniform until their image is trained on. bank_momentum: weight of the old map when a cell is updated. 16 x
    16 cells in half precision take 512 bytes per image: 25 MB for CIFAR, in memory and in each checkpoint.
    """

    learns = True
    capturable = ("look_up", "update")

    def __init__(self, num_images: int, bank_size: int = 16, bank_momentum: float = 0.5, device="cpu"):
        if bank_size < 1 or not 0 <= bank_momentum < 1:
            raise ValueError(f"bank_size {bank_size} must be positive and bank_momentum {bank_momentum} in [0, 1)")
        self.momentum = bank_momentum
        self.maps = torch.ones(num_images, bank_size, bank_size, dtype=torch.float16, device=device)
        self.updated = torch.zeros(num_images, dtype=torch.bool, device=device)  # since the last sync()
        self.view: tuple[torch.Tensor | None, ...] | None = None

    def start_batch(self, batch):
        self.start_images(batch.loaded_index, shift=batch.shift, flip=batch.flip, box=batch.box)

    def start_images(
        self,
        index: torch.Tensor,
        *,
        shift: torch.Tensor | None = None,
        flip: torch.Tensor | None = None,
        box: torch.Tensor | None = None,
    ) -> None:
        """Note which images follow, and which part of each is seen. All tensors are on the device of the maps.

        index (B,) long: positions in the training set. shift (2, B) long: first row and column of a crop of the size of
        the image. flip (B,) bool: whether it is then flipped horizontally. box (B, 4): another crop, which is resized,
        as y1, y2, x1, x2 in 0..1. None: no crop or flip.
        """
        self.view = index, shift, flip, box

    @torch.no_grad()
    def __call__(self, images, targets=None):
        count = len(images)
        if self.view is None or count > len(self.view[0]):
            raise ValueError("the bank only has maps of training images: call start_images(index) before each batch")
        return self.look_up(count, *images.shape[-2:], *self.view)

    def look_up(self, count: int, height: int, width: int, index: torch.Tensor, *view: torch.Tensor | None):
        """Return the maps (count, height, width) of the last images of a batch, as PartialMix mixes these.

        index, and view as shift, flip, box: see start_images().
        """
        maps = self.maps[index[-count:]].float()
        rows, columns = (
            interpolation_weights((bounds[:-1] + bounds[1:])[:, -count:].T / 2, side)
            for bounds, side in zip(pixel_bounds(index, *view, (height, width)), maps.shape[1:], strict=True)
        )
        return rows @ maps @ columns.mT

    @torch.no_grad()
    def after_backward(self, image_grad, coverage):
        self.update(image_grad, coverage, *self.view)

    def update(self, image_grad: torch.Tensor, coverage: torch.Tensor, index: torch.Tensor, *view: torch.Tensor | None):
        """Learn from a batch; see after_backward() of the base class and look_up()."""
        cells = self.maps.shape[-2:]
        share = coverage.squeeze(1).clamp(0, 1)
        strength = image_grad.float().square().mean(1).sqrt()  # already multiplied by the weight of each pixel
        rows, columns = (
            cell_overlap(bounds.T, side)
            for bounds, side in zip(pixel_bounds(index, *view, strength.shape[-2:]), cells, strict=True)
        )
        strength, share = (rows @ values @ columns.mT for values in (strength, share))  # averages over the cells
        visible = share > 0.25  # enough of the cell was visible to learn from
        old = self.maps[index].float()
        new = strength / share.clamp_min(0.25)
        # scale the new values to the old ones in the same cells, so that no part of a map outweighs the others
        scale = (old * visible).sum((1, 2)) / (new * visible).sum((1, 2))
        valid = (scale > 0) & scale.isfinite()
        new = torch.lerp(new * scale.view(-1, 1, 1), old, self.momentum)
        new = torch.where(visible & valid.view(-1, 1, 1), new, old)
        self.maps[index] = (new / new.mean((1, 2), keepdim=True)).clamp_max(6e4).half()
        self.updated.index_fill_(0, index, True)  # an assignment would wait for the device

    def sync(self, all_reduce_sum):
        """Merge the maps of all processes.

        Within an epoch each process trains on images of its own, so a map is updated by one of them only.
        """
        learned = all_reduce_sum(self.updated.half()).to(self.maps.device) > 0
        maps = all_reduce_sum(self.maps * self.updated.view(-1, 1, 1)).to(self.maps.device)
        self.maps.copy_(torch.where(learned.view(-1, 1, 1), maps, self.maps))  # in place: captured graphs read it
        self.updated.zero_()

    def state_dict(self):
        return {"maps": self.maps}

    def load_state_dict(self, state):
        self.maps.copy_(state["maps"])


def pixel_bounds(
    index: torch.Tensor,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    box: torch.Tensor | None,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the borders between pixel rows and columns lie in the original images, whose sides are 1.

    Shapes (H + 1, B) and (W + 1, B). The borders between columns run from right to left in flipped images.
    """
    device, (height, width) = index.device, size
    zero = torch.zeros(len(index), device=device)
    top, bottom, left, right = zero, zero + 1, zero, zero + 1
    if box is not None:
        top, bottom, left, right = box.unbind(1)
    elif shift is not None:
        top, left = shift[0] / height, shift[1] / width
        bottom, right = top + 1, left + 1
    if flip is not None:
        left, right = torch.where(flip, right, left), torch.where(flip, left, right)
    down, across = (torch.arange(side + 1, device=device).unsqueeze(1) / side for side in size)
    return top + down * (bottom - top), left + across * (right - left)


def interpolation_weights(centres: torch.Tensor, cells: int) -> torch.Tensor:
    """Return weights (B, n, cells) of linear interpolation between cells at positions (B, n); 0 outside 0..1."""
    positions = (centres * cells - 0.5).clamp(0, cells - 1)
    tent = 1 - (positions.unsqueeze(2) - torch.arange(cells, device=centres.device)).abs()
    inside = (centres >= 0) & (centres < 1)
    return tent.clamp_min(0) * inside.unsqueeze(2)


def cell_overlap(bounds: torch.Tensor, cells: int) -> torch.Tensor:
    """Return the share of each cell that each pixel covers, (B, cells, n), for the borders (B, n + 1) of n pixels."""
    low = torch.minimum(bounds[:, :-1], bounds[:, 1:]).unsqueeze(1) * cells
    high = torch.maximum(bounds[:, :-1], bounds[:, 1:]).unsqueeze(1) * cells
    cell = torch.arange(cells, device=bounds.device).view(1, -1, 1)
    return (torch.minimum(high, cell + 1) - torch.maximum(low, cell)).clamp_min(0)
