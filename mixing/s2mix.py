"""S2-Mix: blend an image with enlarged patches of its own, turned where they are salient and blurred elsewhere.

Islam et al., "S2-FracMix", ECCV 2026, arXiv 2606.25784: its self-saliency mixup. The authors have released no code, and
what is here follows their project page and a reader's description, not the paper. These choices are ours: one patch for
each scale; the threshold t is a quantile of the map; 8 places are drawn, and where none is accepted the most salient
one is taken; the blur is 1/16 of the side of a patch; the corners of a turned patch repeat its edge; the threshold is
drawn per image, the places and the angle per patch. The fractal pictures of FracMix are left out.
"""

import math
from functools import cache

import torch
from torch.nn import functional as F

from .base import Mixer
from .ops import check_probability, draw_lam
from .rmix import salient_mask

NUM_SCALES = 2  # patches of 1/2 and 1/4 of the sides of the image
NUM_PLACES = 8  # drawn for each patch
LOWEST_THRESHOLD = 0.5  # the highest is 1
MAX_ANGLE = math.radians(30)
BLUR = 1 / 16  # standard deviation of the blur relative to the side of a patch
MIN_BLUR = 0.5  # the same in pixels


@cache  # the same in each step, and eight launches
def patch_sides(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the height and width of the patch of each scale, (K, 2) long."""
    scale = 2 ** torch.arange(1, NUM_SCALES + 1, device=device)
    return torch.stack([height // scale, width // scale], 1).clamp(min=1)


def choose_places(
    salient: torch.Tensor, threshold: torch.Tensor, places: torch.Tensor, sides: torch.Tensor
) -> torch.Tensor:
    """Choose the place of each patch: its first row and column, (B, K, 2) long.

    salient (B, H, W) bool: where the saliency reaches its quantile t (B,). places (B, K, N, 2) long: the places to
    choose from, in the order in which they are tried; sides (K, 2): of the patches. A place is accepted if at least a
    share of 1 - t of its patch is salient, as of the whole image. If none is, the one with the largest share is chosen.
    """
    width = salient.shape[2] + 1
    sums = F.pad(salient, (1, 0, 1, 0)).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32).flatten(1)
    (y1, x1), (y2, x2) = places.unbind(3), (places + sides.unsqueeze(1)).unbind(3)
    corners = torch.stack([y2 * width + x2, y1 * width + x1, y1 * width + x2, y2 * width + x1], 1)
    last, first, above, left = sums.gather(1, corners.flatten(1)).view(corners.shape).unbind(1)
    share = (last + first - above - left) / sides.prod(1).unsqueeze(1)
    best = share.masked_fill(share >= (1 - threshold).view(-1, 1, 1), 2.0).argmax(2)
    return places.gather(2, best.view(*best.shape, 1, 1).expand(-1, -1, 1, 2)).squeeze(2)


def patch_pixels(places: torch.Tensor, sides: torch.Tensor, size: int) -> torch.Tensor:
    """Return which row (or column) of an image each row of an enlarged patch shows, (B, K, size) float.

    places (B, K): first row of each patch; sides (K,): its rows; size: rows of the enlarged patch. Pixels have their
    centres at a half. What would lie beyond the first or last row of the patch is clamped to it.
    """
    sides = sides.unsqueeze(1)
    inside = (torch.arange(size, device=places.device) + 0.5) * (sides / size) - 0.5
    return inside.clamp(min=0).minimum(sides - 1) + places.unsqueeze(2)


def enlarging_matrices(places: torch.Tensor, sides: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return matrices (B, 2 K, size, size) that cut patches out of an image and enlarge their rows (or columns).

    Those of the first K patches interpolate linearly, those of the others blur. Arguments as in patch_pixels(), which
    returns `pixels`.
    """
    index = torch.arange(pixels.shape[2], device=pixels.device)
    distance = (index - pixels.unsqueeze(3)).abs()
    sigma = (BLUR * sides).clamp(min=MIN_BLUR).view(-1, 1, 1)
    step = index - places.view(*places.shape, 1, 1)
    blur = ((distance / sigma).square() / -2).exp() * ((step >= 0) & (step < sides.view(-1, 1, 1)))
    return torch.cat([(1 - distance).clamp(min=0), blur / blur.sum(3, keepdim=True)], 1)


def rotated_pixels(angle: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return which pixel of an image each pixel of the rotated image shows: indices (B, K, H * W) in row-major order.

    angle (B, K) in radians, about the centre. The nearest pixel is taken, also beyond the edge.
    """
    dy = torch.arange(height, device=angle.device).unsqueeze(1) - (height - 1) / 2
    dx = torch.arange(width, device=angle.device) - (width - 1) / 2
    cos, sin = (value.view(*angle.shape, 1, 1) for value in (angle.cos(), angle.sin()))
    rows = (cos * dy - sin * dx + height / 2).long().clamp(0, height - 1)
    columns = (sin * dy + cos * dx + width / 2).long().clamp(0, width - 1)
    return (rows * width + columns).flatten(2)


def enlarge_patches(
    images: torch.Tensor, salient: torch.Tensor, places: torch.Tensor, sides: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """Return the mean of the patches of each image, enlarged to its size, (B, C, H, W).

    A patch is rotated by its angle where it is salient, and blurred elsewhere. images (B, C, H, W), salient (B, H, W)
    bool, places (B, K, 2), sides (K, 2), angle (B, K) in radians. Differentiable with respect to the images.
    """
    height, width = images.shape[-2:]
    (y, x), (patch_height, patch_width) = places.unbind(2), sides.unbind(1)
    rows, columns = patch_pixels(y, patch_height, height), patch_pixels(x, patch_width, width)
    down, across = enlarging_matrices(y, patch_height, rows), enlarging_matrices(x, patch_width, columns)
    enlarged = torch.einsum("bkih,bchw,bkjw->bkcij", down.to(images.dtype), images, across.to(images.dtype))
    sharp, blurred = enlarged.chunk(2, 1)
    pixels = rotated_pixels(angle, height, width).unsqueeze(2).expand(-1, -1, images.shape[1], -1)
    rotated = sharp.flatten(3).gather(3, pixels).view_as(sharp)
    nearest = ((rows + 0.5).long() * width).unsqueeze(3) + (columns + 0.5).long().unsqueeze(2)
    turns = salient.flatten(1).gather(1, nearest.flatten(1)).view(nearest.shape).unsqueeze(2)
    return torch.where(turns, rotated, blurred).mean(1)


def blend_patches(images: torch.Tensor, patches: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return share * images + (1 - share) * patches, in the dtype and memory format of the images. share () or (B,)."""
    share = share.view(-1, 1, 1, 1) if share.dim() else share
    mixed = (share * images + (1 - share) * patches).to(images.dtype)
    return mixed if images.is_contiguous() else mixed.contiguous(memory_format=torch.channels_last)


class S2Mix(Mixer):
    """The share of the image is drawn from Beta(mixup_alpha, mixup_alpha): once per batch, or per image with in_batch.

    mixup_alpha 1.0 is the uniform draw of the paper. The rest is made of its own patches, so targets do not change,
    each image is its own partner, and `weight` is 1. mix_prob: probability that a batch is mixed.
    """

    default_source = "spectral_residual"
    keeps_labels = True

    def __init__(self, mixup_alpha: float = 1.0, mix_prob: float = 1.0, in_batch: bool = False):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        self.mixup_alpha, self.mix_prob, self.in_batch = mixup_alpha, check_probability("mix_prob", mix_prob), in_batch

    def mix_batch(self, images, targets, source):
        share = draw_lam(self.mixup_alpha, images, self.in_batch)
        with torch.no_grad():
            salient, places, sides = self.choose_patches(self.compute_saliency(source, images, targets))
            angle = torch.empty(places.shape[:2], device=images.device).uniform_(-MAX_ANGLE, MAX_ANGLE)
        patches = enlarge_patches(images, salient, places, sides, angle)
        self.set_weight(images, lambda: 1.0, partner=None)
        return blend_patches(images, patches, share), targets

    def choose_patches(self, saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw thresholds and places. Returns the arguments of enlarge_patches() between the images and the angle.

        saliency (B, H, W) >= 0, no map all zero.
        """
        batch, height, width = saliency.shape
        sides = patch_sides(height, width, saliency.device)
        threshold = torch.empty(batch, device=saliency.device).uniform_(LOWEST_THRESHOLD, 1)
        salient = salient_mask(saliency, threshold) & (saliency > 0)
        y, x = torch.rand(2, batch, NUM_SCALES, NUM_PLACES, device=saliency.device)
        y, x = y * (height + 1 - sides[:, :1]), x * (width + 1 - sides[:, 1:])
        return salient, choose_places(salient, threshold, torch.stack([y, x], 3).long(), sides), sides
