"""ResizeMix: shrink the whole partner image and paste it into a random box.

Qin et al., arXiv 2012.11101, Sec. 3. The defaults, and what is not in the paper, are those of OpenMixup, because the
authors released no code.
"""

import math

import torch

from .base import Mixer
from .ops import blend, box_mask, check_probability, draw_centers, draw_lam, draw_partner, scale_boxes, spread_saliency


def resize_into(values: torch.Tensor, boxes: torch.Tensor, mode: str = "nearest") -> torch.Tensor:
    """Resize each image as a whole to its box, and move it there; the values outside of the box have no meaning.

    values (B, C, H, W), which may also be maps or masks of the images; boxes (B, 4), or (1, 4) for one box per batch;
    they may be empty. mode `nearest`: of n pixels, pixel i shows pixel floor(i H / n) of the image. mode `bilinear`:
    pixels have their centres at a half, and nothing is anti-aliased. Returns (B, C, H, W).
    """
    for dim, edges in ((2, boxes[:, :2]), (3, boxes[:, 2:])):
        values = resize_axis(values, dim, edges, mode)
    return values


def resize_axis(values: torch.Tensor, dim: int, edges: torch.Tensor, mode: str) -> torch.Tensor:
    """Resize values (B, C, H, W) along one dimension to the interval edges (B or 1, 2)."""
    size, start = values.shape[dim], edges[:, :1]
    length = (edges[:, 1:] - start).clamp(min=1)
    offset = torch.arange(size, device=values.device) - start
    if mode == "nearest":
        return pick(values, dim, (offset * size // length).clamp(0, size - 1))
    place = ((offset + 0.5) * size / length - 0.5).clamp(0, size - 1)
    first = place.long()
    share = (place - first).to(values.dtype).view([-1, 1, size, 1] if dim == 2 else [-1, 1, 1, size])
    return torch.lerp(pick(values, dim, first), pick(values, dim, (first + 1).clamp(max=size - 1)), share)


def pick(values: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Return the rows (dim 2) or columns (dim 3) of each of values (B, C, H, W) that index (B or 1, size) names."""
    index = index.view([-1, 1, index.shape[1], 1] if dim == 2 else [-1, 1, 1, index.shape[1]])
    return values.gather(dim, index.expand(values.shape))


class ResizeMix(Mixer):
    """The sides of the box are tau times those of the image, and it is cut at the borders; targets follow its area.

    tau ~ Beta(mixup_alpha, mixup_alpha); a draw outside of resize_range is replaced by a uniform one inside, so that
    mixup_alpha 1 is the uniform draw of the paper. One tau and one place per batch, or per image with in_batch.
    resize_mode: `nearest` or `bilinear`. mix_prob: probability that a batch is mixed. A box of less than two pixels is
    empty: the image stays unmixed. check_size() raises ValueError for images in which every box would be empty.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        resize_range: tuple[float, float] = (0.1, 0.8),
        resize_mode: str = "nearest",
        mix_prob: float = 1.0,
        in_batch: bool = False,
    ):
        low, high = resize_range
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"resize_range must be two ascending numbers from 0 to 1, got {(low, high)}")
        if resize_mode not in ("nearest", "bilinear"):
            raise ValueError(f"resize_mode must be nearest or bilinear, got {resize_mode!r}")
        self.mixup_alpha, self.resize_range, self.resize_mode = mixup_alpha, (low, high), resize_mode
        self.mix_prob, self.in_batch = check_probability("mix_prob", mix_prob), in_batch

    def check_size(self, height, width):
        shorter, high = min(height, width), self.resize_range[1]
        if int(shorter * high) < 2:
            raise ValueError(
                f"resize_range: at {height}x{width} pixels no box has two pixels per side, so nothing would be mixed; "
                f"raise its upper end, {high}, to at least {math.ceil(200 / shorter) / 100}"
            )

    def mix_batch(self, images, targets, source):
        height, width = images.shape[-2:]
        tau = self.draw_tau(images)
        partner = draw_partner(images)
        boxes = scale_boxes(*draw_centers(images, self.in_batch), tau, height, width)
        outside = ~box_mask(boxes, height, width)
        resized = resize_into(images[partner], boxes, self.resize_mode)
        self.set_weight(images, lambda: ~box_mask(boxes, height, width).squeeze(1), partner)
        # the whole partner shows, whatever the size of the box
        self.move_maps = lambda maps: (maps, spread_saliency(maps.new_ones(len(maps)), ~outside))
        lam = outside.flatten(1).float().mean(1)
        return torch.where(outside, images, resized), blend(targets, partner, lam)

    def draw_tau(self, images: torch.Tensor) -> torch.Tensor:
        """Return the sides of the boxes relative to the image, () or (B,)."""
        low, high = self.resize_range
        tau = draw_lam(self.mixup_alpha, images, self.in_batch)
        again = low + (high - low) * torch.rand_like(tau)
        return torch.where((tau >= low) & (tau <= high), tau, again)
