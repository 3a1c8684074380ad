"""SMMix: replace the least salient window of an image by the most salient window of its partner.

Chen et al., ICCV 2023, arXiv 2212.12977, the max-min placing of windows. Its saliency is the attention that each patch
of a vision transformer receives from the others; here, any source serves. Two parts of the paper need more of the
network than a mixer knows and are left out: the loss of the tokens of each image, and the one that pulls the prediction
for the mixed image to the mixed predictions.
"""

import torch

from .base import Mixer
from .ops import (
    blend,
    block_means,
    box_mask,
    check_at_least,
    check_divides,
    check_probability,
    draw_partner,
)
from .sage import gather_pixels, source_pixels


def window_sums(patches: torch.Tensor, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum maps over each window of side x side patches.

    patches (B, s, s); side (B,) or (1,) long, from 1 to s. Returns the sums (B, s * s), each at the place of the first
    patch of its window, and a mask (B or 1, s * s) of the windows that lie inside the grid.
    """
    index = torch.arange(patches.shape[-1], device=patches.device)
    step = index - index.unsqueeze(1)  # (s, s): from the first patch of a window to each patch, along one axis
    covered = (step >= 0) & (step < side.view(-1, 1, 1))
    # by matrix products, because CUDA's cumulative sum of floats is not deterministic; in double precision, because
    # single precision may be rounded (TF32)
    covered = covered.to(torch.float32 if patches.device.type == "mps" else torch.float64)
    sums = covered @ patches.to(covered.dtype) @ covered.mT
    fits = index <= len(index) - side.unsqueeze(1)
    return sums.flatten(1), (fits.unsqueeze(2) & fits.unsqueeze(1)).flatten(1)


def place_windows(
    patches: torch.Tensor, partner: torch.Tensor, side: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the least salient window of each image and the most salient one of its partner begin.

    patches (B, s, s): saliency of the patches; partner (B,); side (B,) or (1,) long: of the windows, in patches.
    Returns two tensors (B, 2) long: row and column, in patches. Of equal windows, the first in row-major order counts.
    """
    count = patches.shape[-1]
    sums, inside = window_sums(patches, side)
    least = sums.masked_fill(~inside, float("inf")).argmin(1)
    sums, inside = window_sums(patches[partner], side)
    most = sums.masked_fill(~inside, float("-inf")).argmax(1)
    least, most = (torch.stack([first // count, first % count], 1) for first in (least, most))
    return least, most


def to_pixels(
    least: torch.Tensor, most: torch.Tensor, side: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the boxes (B, 4) of the least salient windows, and the offsets (B, 2) that move the others there.

    least, most (B, 2) and side (B,) or (1,): in patches of height x width pixels.
    """
    (y, x), (dy, dx) = least.unbind(1), (least - most).unbind(1)
    boxes = torch.stack([y * height, (y + side) * height, x * width, (x + side) * width], 1)
    return boxes, torch.stack([dy * height, dx * width], 1)


def move_partners(values: torch.Tensor, partner: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return values[partner], each shifted by its offset.

    values (B, C, H, W): images, maps or masks; partner (B,); offset (B, 2) long: dy, dx in pixels. Pixels from outside
    of the frame repeat its edge.
    """
    pixels, _ = source_pixels(offset, *values.shape[-2:])
    return gather_pixels(values, partner, pixels)


class SMMix(Mixer):
    """The image is cut into num_patches x num_patches patches, which are those of the network in the paper.

    The side of the windows is drawn uniformly from the whole numbers of patches between min_side_ratio and
    max_side_ratio of num_patches: once per batch, or per image with in_batch. Targets follow the area of the window.
    mix_prob: probability that a batch is mixed. Raises ValueError for images that the patches do not divide.
    """

    default_source = "gradient"

    def __init__(
        self,
        num_patches: int = 8,
        min_side_ratio: float = 0.25,
        max_side_ratio: float = 0.75,
        mix_prob: float = 1.0,
        in_batch: bool = False,
    ):
        check_at_least("num_patches", num_patches, 2)
        check_probability("min_side_ratio", min_side_ratio)
        check_probability("max_side_ratio", max_side_ratio)
        if min_side_ratio > max_side_ratio:
            raise ValueError(f"min_side_ratio {min_side_ratio} must not exceed max_side_ratio {max_side_ratio}")
        self.num_patches, self.min_side_ratio, self.max_side_ratio = num_patches, min_side_ratio, max_side_ratio
        self.mix_prob, self.in_batch = check_probability("mix_prob", mix_prob), in_batch

    def check_size(self, height, width):
        check_divides("num_patches", self.num_patches, height, width)

    def mix_batch(self, images, targets, source):
        height, width = images.shape[-2:]
        self.check_size(height, width)
        side, partner = self.draw_side(images), draw_partner(images)
        with torch.no_grad():
            patches = block_means(self.compute_saliency(source, images, targets), self.num_patches, self.num_patches)
            least, most = place_windows(patches, partner, side)
            boxes, offset = to_pixels(least, most, side, height // self.num_patches, width // self.num_patches)
        inside = box_mask(boxes, height, width)
        self.set_weight(images, lambda: ~box_mask(boxes, height, width).squeeze(1), partner)
        self.move_maps = lambda maps: (maps, move_partners(maps.unsqueeze(1), partner, offset).squeeze(1))
        mixed = torch.where(inside, move_partners(images, partner, offset), images)
        return mixed, blend(targets, partner, 1 - side.square() / self.num_patches**2)

    def draw_side(self, images: torch.Tensor) -> torch.Tensor:
        """Return the side of the windows in patches, (1,) or (B,) long, on the device."""
        lowest = max(1, int(self.num_patches * self.min_side_ratio))
        highest = max(lowest, int(self.num_patches * self.max_side_ratio))
        number = len(images) if self.in_batch else 1
        return torch.randint(lowest, highest + 1, (number,), device=images.device)
