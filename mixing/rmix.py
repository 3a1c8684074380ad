"""R-Mix: in each patch, show the image that is salient there, where a random percentile decides what is salient.

"Expeditious Saliency-guided Mix-up through Random Gradient Thresholding", arXiv 2212.04875, Sec. 3 (R-Mix). The
ImageNet settings of its code are dirichlet_alpha 0.2, patches_per_side (2, 4), pairing reversed and clean_lam 1.
"""

import torch

from .base import Mixer
from .ops import (
    blend,
    blend_pixels,
    block_means,
    check_divides,
    check_probability,
    draw_lam,
    draw_partner,
    normalize_sum,
    upsample_blocks,
)

MAX_PERCENTILE = 0.99  # the percentile of the last action; that of the first is 0


def actions_to_percentiles(actions: torch.Tensor, num_action: int) -> torch.Tensor:
    """Map actions (B,) in 0..num_action - 1 to percentiles (B,) float32, equally spaced from 0 to 0.99."""
    return actions * (MAX_PERCENTILE / max(num_action - 1, 1))


def salient_mask(blocks: torch.Tensor, percentile: torch.Tensor) -> torch.Tensor:
    """Return which patches reach the percentile of their image: (B, rows, columns) bool.

    blocks (B, rows, columns): block means of the saliency; percentile (B,). The threshold of an image is the value at
    rank percentile * (N - 1) of its N patches, interpolated linearly between two patches.
    """
    ordered = blocks.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    rank = (percentile * last).unsqueeze(1)
    below = rank.long()
    low, high = ordered.gather(1, below), ordered.gather(1, (below + 1).clamp(max=last))
    return blocks >= torch.lerp(low, high, rank - below).unsqueeze(2)


def block_weights(mask: torch.Tensor, partner: torch.Tensor, lam: float) -> torch.Tensor:
    """Return the weight of the image in each patch, (B, rows, columns) float32.

    mask (B, rows, columns) bool: where the image is salient. The weight is 1 where only the image is salient, 0 where
    only its partner is, and lam where both or neither are.
    """
    return mask.float().masked_fill(mask == mask[partner], lam)


def mix(images: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, weight: torch.Tensor):
    """Blend each patch with its weight, and the targets with the mean weight.

    images (B, C, H, W), targets (B, K), partner (B,), weight (B, rows, columns). Returns mixed images and soft targets.
    Differentiable with respect to the images, whose memory format is kept.
    """
    mixed = blend_pixels(images, partner, upsample_blocks(weight, *images.shape[-2:]))
    return mixed, blend(targets, partner, weight.mean((1, 2)))


class RMix(Mixer):
    """Draws a percentile for each image, uniformly from num_action values between 0 and 0.99.

    The weight of patches in which both images or neither are salient is ~ Dirichlet(dirichlet_alpha, dirichlet_alpha),
    drawn once per batch. The grid is drawn once per batch, too: random_patches lists sides of a patch in pixels;
    patches_per_side, if given, lists numbers of patches per side instead; with use_random_patches False there are
    always num_patches per side.

    pairing: `random` (a permutation) or `reversed` (the batch in reverse order). clean_lam: weight of the clean loss
    that is also trained on. mix_prob: probability that a batch is mixed. Raises ValueError for images that the patches
    do not divide.
    """

    default_source = "gradient"

    def __init__(
        self,
        dirichlet_alpha: float = 1.0,
        random_patches: tuple[int, ...] = (8, 16),
        use_random_patches: bool = True,
        num_patches: int = 8,
        patches_per_side: tuple[int, ...] | None = None,
        num_action: int = 10,
        pairing: str = "random",
        clean_lam: float = 0.0,
        mix_prob: float = 1.0,
    ):
        if dirichlet_alpha <= 0:
            raise ValueError(f"dirichlet_alpha must be positive, got {dirichlet_alpha}")
        if not random_patches or min(random_patches) < 1:
            raise ValueError(f"random_patches must be positive numbers of pixels, got {random_patches}")
        if patches_per_side is not None and (not patches_per_side or min(patches_per_side) < 1):
            raise ValueError(f"patches_per_side must be positive numbers of patches, got {patches_per_side}")
        if num_patches < 1 or num_action < 1:
            raise ValueError(f"num_patches and num_action must be positive, got {num_patches} and {num_action}")
        if pairing not in ("random", "reversed"):
            raise ValueError(f"pairing must be random or reversed, got {pairing!r}")
        if clean_lam < 0:
            raise ValueError(f"clean_lam must not be negative, got {clean_lam}")
        self.dirichlet_alpha, self.num_action, self.pairing = dirichlet_alpha, num_action, pairing
        self.random_patches, self.patches_per_side = tuple(random_patches), patches_per_side and tuple(patches_per_side)
        self.use_random_patches, self.num_patches = use_random_patches, num_patches
        self.clean_lam, self.mix_prob = clean_lam, check_probability("mix_prob", mix_prob)

    @property
    def gradient_options(self):
        return {"mode": "train", "clean_weight": self.clean_lam}

    def mix_batch(self, images, targets, source):
        rows, columns = self.draw_grid(*images.shape[-2:])
        lam = float(draw_lam(self.dirichlet_alpha, images))  # a Dirichlet of two is a Beta
        saliency = self.compute_saliency(source, images, targets)
        with torch.no_grad():
            partner = self.draw_partner(images)
            percentile = actions_to_percentiles(self.choose_actions(saliency, targets, source), self.num_action)
            mask = salient_mask(normalize_sum(block_means(saliency, rows, columns)), percentile)
            weight = block_weights(mask, partner, lam)
        self.set_weight(images, lambda: weight, partner)
        return mix(images, targets, partner, weight)

    def choose_actions(self, saliency: torch.Tensor, targets: torch.Tensor, source) -> torch.Tensor:
        """Return an action for each image, (B,) long, which stands for its percentile. RL-Mix overrides this."""
        return torch.randint(self.num_action, saliency.shape[:1], device=saliency.device)

    def draw_partner(self, images: torch.Tensor) -> torch.Tensor:
        """Return the partner of each image, (B,) long."""
        if self.pairing == "reversed":
            return torch.arange(len(images) - 1, -1, -1, device=images.device)
        return draw_partner(images)

    def check_size(self, height, width):
        if self.patches_per_side:
            for count in self.patches_per_side:
                check_divides("patches_per_side", count, height, width)
        elif not self.use_random_patches:
            check_divides("num_patches", self.num_patches, height, width)
        else:
            for side in self.random_patches:
                check_divides("random_patches (in pixels)", side, height, width)

    def draw_grid(self, height: int, width: int) -> tuple[int, int]:
        """Draw the rows and columns of patches for this batch."""
        self.check_size(height, width)
        if self.patches_per_side or not self.use_random_patches:
            count = draw_from(self.patches_per_side or (self.num_patches,))
            return count, count
        side = draw_from(self.random_patches)
        return height // side, width // side


def draw_from(values: tuple[int, ...]) -> int:
    """Draw one of the values, with equal probabilities."""
    return values[int(torch.randint(len(values), ()))]
