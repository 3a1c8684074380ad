"""SnapMix: paste one box of the partner into another box of the image, and weight the labels by what each box shows.

Huang et al., AAAI 2021, arXiv 2012.04846, Sec. 3. The class activation map of the true class says which share of its
object each box holds. The paper's two weights need not sum to 1; here they are divided by their sum, because targets
are distributions.
"""

import torch

from .base import Mixer
from .ops import (
    blend,
    box_mask,
    center_boxes,
    check_probability,
    draw_centers,
    draw_lam,
    draw_partner,
    find_saliency_share,
    spread_saliency,
)

FLAT = 1e-6  # a map whose values differ by less, relative to the largest one, says nothing about the object


def sample_lines(
    boxes: torch.Tensor, source_boxes: torch.Tensor, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and the column in the source box for each row and each column of the image, float32.

    boxes, source_boxes (B or 1, 4) -> (B or 1, H), (B or 1, W). The centres of the first rows of the two boxes
    coincide, and those of their last rows. Rows outside the box get the nearest edge. Columns alike.
    """
    start, end = boxes[:, ::2], boxes[:, 1::2]  # of the rows and of the columns
    source_start, last = source_boxes[:, ::2], (source_boxes[:, 1::2] - source_boxes[:, ::2] - 1).clamp_min(0)
    step = last / (end - start - 1).clamp_min(1)
    lines = []
    for axis, size in enumerate((height, width)):
        offset = (torch.arange(size, device=boxes.device) - start[:, axis : axis + 1]) * step[:, axis : axis + 1]
        offset = offset.clamp_min(0).minimum(last[:, axis : axis + 1])
        lines.append(source_start[:, axis : axis + 1] + offset)
    return lines[0], lines[1]


def interpolate(values: torch.Tensor, position: torch.Tensor, dim: int) -> torch.Tensor:
    """Interpolate values (B, C, H, W) linearly at the positions (B or 1, n) along `dim`, 2 or 3."""
    shape = list(values.shape)
    shape[dim] = position.shape[1]
    position = position.view([position.shape[0], 1, -1, 1] if dim == 2 else [position.shape[0], 1, 1, -1])
    below = position.long()
    above = (below + 1).clamp_max(values.shape[dim] - 1)
    low, high = (values.gather(dim, index.expand(shape)) for index in (below, above))
    return torch.lerp(low, high, (position - below).to(values.dtype))


def paste_resized(
    values: torch.Tensor, partner: torch.Tensor, boxes: torch.Tensor, source_boxes: torch.Tensor
) -> torch.Tensor:
    """Paste each partner's source box, resized to the box, into the box.

    values (B, C, H, W): images or maps; partner (B,); boxes, source_boxes (B or 1, 4), in the partner. Boxes are not
    empty, or all 0: then nothing is pasted. Differentiable with respect to the values, whose memory format is kept.
    """
    rows, columns = sample_lines(boxes, source_boxes, *values.shape[-2:])
    resized = interpolate(interpolate(values[partner], rows, 2), columns, 3)
    if values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous():
        resized = resized.contiguous(memory_format=torch.channels_last)
    return torch.where(box_mask(boxes, *values.shape[-2:]), resized, values)


def empty_together(boxes: torch.Tensor, source_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both kinds of boxes (B or 1, 4), with each pair set to 0 of which one is empty."""
    both = torch.stack([boxes, source_boxes])
    is_filled = (both[..., 1::2] - both[..., ::2]).amin((0, 2)) > 0  # heights and widths
    both = both * is_filled.unsqueeze(1)
    return both[0], both[1]


def normalize_maps(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Subtract the minimum of each map (B, H, W) and scale it to sum 1. Returns the maps and which are flat, (B,) bool.

    A flat map is all 0 after that.
    """
    largest = maps.abs().amax((1, 2))
    maps = maps - maps.amin((1, 2), keepdim=True)
    is_flat = maps.amax((1, 2)) <= FLAT * largest
    maps = maps.masked_fill(is_flat.view(-1, 1, 1), 0)
    return maps / maps.sum((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny), is_flat


def weigh_labels(
    maps: torch.Tensor, partner: torch.Tensor, inside: torch.Tensor, source_inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the labels of the image and of its partner, each (B,), which need not sum to 1.

    They are the share of its own map that the image keeps, and the share of the partner's map in the source box. Where
    a map is flat, the area of the box counts. maps (B, H, W); partner (B,); inside, source_inside (B or 1, 1, H, W)
    bool: masks of the boxes.
    """
    maps, is_flat = normalize_maps(maps)
    inside, source_inside = inside.squeeze(1).float(), source_inside.squeeze(1).float()
    area = inside.mean((1, 2))
    own = 1 - torch.where(is_flat, area, (maps * inside).sum((1, 2)))
    pasted = torch.where(is_flat[partner], area, (maps[partner] * source_inside).sum((1, 2)))
    return own, pasted


def paste_maps(
    maps: torch.Tensor, partner: torch.Tensor, inside: torch.Tensor, source_inside: torch.Tensor
) -> torch.Tensor:
    """Return what each partner's map (B, H, W) has in its source box, spread over the box of the image: (B, H, W).

    The sum is exact, which that of a map resized as paste_resized() does would not be. Masks as in weigh_labels().
    """
    return spread_saliency((maps[partner] * source_inside.squeeze(1)).sum((1, 2)), inside)


class SnapMix(Mixer):
    """A random box of the partner is resized to another random box of the image and pasted there.

    Each box covers 1 - lam of its image before it is clipped at the borders, with its own lam ~ Beta(mixup_alpha,
    mixup_alpha). Where one of them is empty, nothing is pasted. Both are drawn once per batch, or per image with
    in_batch. mix_prob: probability that a batch is mixed; the paper has 0.5 without pretrained weights, and with them
    1 and mixup_alpha 5.

    The targets follow the saliency: see weigh_labels(). `weight` is 1 outside the box and 0 in it, as for CutMix, so
    its mean is not the share of the target.
    """

    default_source = "cam"

    def __init__(self, mixup_alpha: float = 1.0, in_batch: bool = False, mix_prob: float = 1.0):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        self.mixup_alpha, self.in_batch = mixup_alpha, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def mix_batch(self, images, targets, source):
        size = images.shape[-2:]
        saliency = self.compute_saliency(source, images, targets)
        lams = [draw_lam(self.mixup_alpha, images, self.in_batch) for _ in range(2)]
        partner = draw_partner(images)
        boxes, source_boxes = empty_together(*(self.draw_boxes(images, lam) for lam in lams))
        inside, source_inside = box_mask(boxes, *size), box_mask(source_boxes, *size)
        outside_share = 1 - inside.flatten(1).float().mean(1)
        shown = weigh_labels(saliency, partner, inside, source_inside)
        share = find_saliency_share(*shown, outside_share)
        self.set_weight(images, lambda: ~inside.squeeze(1), partner)
        self.move_maps = lambda maps: (maps, paste_maps(maps, partner, inside, source_inside))
        mixed = paste_resized(images, partner, boxes, source_boxes)
        return mixed, blend(targets, partner, share)

    def draw_boxes(self, images: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        """Draw a box for the batch, (1, 4), or with in_batch for each image, (B, 4), that covers 1 - lam of it."""
        return center_boxes(*draw_centers(images, self.in_batch), lam, *images.shape[-2:])
