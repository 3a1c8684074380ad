"""SAGE: shift the partner so that the most saliency survives, then blend each pixel by the ratio of the saliencies.

Ma et al., BMVC 2022, arXiv 2211.00113, Sec. 3. As in the authors' code, lam and the candidate offsets are drawn once
for the whole batch, and each image uses the best of these offsets. The gradient pass that gives the saliency is also
trained on: the clean loss has weight 1 - update_ratio and the mixed loss update_ratio.

mixing/solvers/sage_offsets.py searches the offsets.
"""

import torch

from .base import Mixer
from .kernels import check_mode, use_kernels
from .ops import check_blur, check_probability, draw_lam, draw_partner, normalize_sum
from .solvers.sage_offsets import find_best_offset, grid_offsets, random_offsets

MIN_WEIGHT = 1e-12  # of each image, so that neither map vanishes when lam is 0 or 1
MIN_SUM = 1e-16  # of the two maps at a pixel: where both are 0, the partner shows


def scale_maps(saliency: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted maps A of each image and B of its partner, (B, H, W), which sum to lam and 1 - lam.

    saliency (B, H, W) >= 0, no map all zero; partner (B,); lam ().
    """
    saliency = normalize_sum(saliency.float())
    return lam.clamp_min(MIN_WEIGHT) * saliency, (1 - lam).clamp_min(MIN_WEIGHT) * saliency[partner]


def blend_shifted(
    images: torch.Tensor,
    targets: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    partner: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blend each image and its shifted partner, pixel by pixel, in the ratio of their weighted maps.

    images (B, C, H, W), targets (B, K), partner (B,). first, second (B, H, W): the maps A of the images and B of their
    partners, before the shift. offset (B, 2): dy, dx. Pixels shifted in from outside are 0. Returns the mixed images,
    the soft targets, and the weight of the image at each pixel, (B, H, W), whose mean is the share of its target.
    Differentiable with respect to the images only.
    """
    with torch.no_grad():
        pixels, inside = source_pixels(offset, *images.shape[-2:])
        second = second.flatten(1).gather(1, pixels).view_as(first) * inside
        mask = first / (first + second).clamp_min(MIN_SUM)
        share = mask.mean((1, 2)).unsqueeze(1)
    # in place: on a CPU, allocating a tensor of 224 x 224 images takes longer than filling it
    shifted = gather_pixels(images, partner, pixels).float().mul_(inside.unsqueeze(1))
    mixed = shifted.lerp_(images.float(), mask.unsqueeze(1)).to(images.dtype)
    return mixed, share * targets + (1 - share) * targets[partner], mask


def source_pixels(offset: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each pixel of a shifted image comes from, and whether that is inside the image.

    offset (B, 2): dy, dx. Returns indices (B, H * W) long in row-major order, clamped to the image, and a mask (B, H,
    W) of 0.0 and 1.0.
    """
    rows = torch.arange(height, device=offset.device) - offset[:, :1]
    columns = torch.arange(width, device=offset.device) - offset[:, 1:]
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    pixels = (near_rows * width).unsqueeze(2) + near_columns.unsqueeze(1)
    inside = (near_rows == rows).float().unsqueeze(2) * (near_columns == columns).float().unsqueeze(1)
    return pixels.flatten(1), inside


def gather_pixels(images: torch.Tensor, partner: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return images[partner] with their pixels taken from the indices `pixels`, in the memory format of the images."""
    batch, channels, height, width = images.shape
    if images.is_contiguous():
        return images[partner].flatten(2).gather(2, pixels.unsqueeze(1).expand(-1, channels, -1)).view(images.shape)
    flat_index = (pixels + (partner * (height * width)).unsqueeze(1)).flatten()  # channels_last: whole pixels
    taken = images.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, flat_index)
    return taken.view(batch, height, width, channels).permute(0, 3, 1, 2)


def shift_maps(maps: torch.Tensor, partner: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return maps[partner], (B, H, W), each shifted by its offset (B, 2). What comes in from outside is 0."""
    pixels, inside = source_pixels(offset, *maps.shape[-2:])
    return gather_pixels(maps.unsqueeze(1), partner, pixels).squeeze(1) * inside


class SAGE(Mixer):
    """lam ~ upper_lambda * Beta(mixup_alpha, mixup_alpha), drawn once per batch; mixup_alpha 0 means upper_lambda / 2.

    rand_pos: fraction of the (2H - 1)(2W - 1) offsets to try, at least one. search: which ones. `random` draws them for
    each batch. `grid` tries at most as many, evenly spaced and including the zero offset. `exhaustive` tries all: for
    small lam the best offset is then nearly always zero, which removes much of the augmentation.

    update_ratio: weight of the mixed loss; the clean loss has the rest, and with 1 it is not trained on. blur_sigma and
    kernel_size, in pixels: Gaussian blur of the saliency. eval_mode: use batch norm's running statistics in the
    saliency pass instead of those of the batch. mix_prob: probability that a batch is mixed.

    kernels: see mixing.kernels.use_kernels().

    After a call, `offset` (B, 2) long has the offset (dy, dx) of each partner in pixels; None if it was not mixed.
    """

    default_source = "gradient"

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        upper_lambda: float = 0.6,
        rand_pos: float = 0.01,
        update_ratio: float = 0.7,
        search: str = "random",
        blur_sigma: float = 1.0,
        kernel_size: int = 5,
        eval_mode: bool = False,
        mix_prob: float = 1.0,
        kernels: str = "auto",
    ):
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must not be negative, got {mixup_alpha}")
        if search not in ("random", "grid", "exhaustive"):
            raise ValueError(f"search must be random, grid or exhaustive, got {search!r}")
        self.mixup_alpha, self.search = mixup_alpha, search
        self.upper_lambda = check_probability("upper_lambda", upper_lambda)
        self.rand_pos = check_probability("rand_pos", rand_pos)
        self.update_ratio = check_probability("update_ratio", update_ratio)
        self.blur_sigma, self.kernel_size, self.eval_mode = blur_sigma, kernel_size, eval_mode
        self.mix_prob = check_probability("mix_prob", mix_prob)
        self.kernels = check_mode(kernels)
        self.offset: torch.Tensor | None = None

    @property
    def gradient_options(self):
        return {
            "reduction": "mean_abs",
            "blur_sigma": self.blur_sigma,
            "kernel_size": self.kernel_size,
            "mode": "eval" if self.eval_mode else "train",
            "clean_weight": 1 - self.update_ratio,
            "follows_training_loss": True,
        }

    def check_size(self, height, width):
        check_blur(self.blur_sigma, self.kernel_size, height, width)

    def draw_offsets(self, height: int, width: int) -> torch.Tensor | None:
        """Return the candidate offsets, (K, 2) long, or None for all offsets.

        They are on the CPU, so that a loop over them never waits for the device.
        """
        if self.search == "exhaustive" or (self.search == "random" and self.rand_pos == 1):
            return None
        count = max(1, int((2 * height - 1) * (2 * width - 1) * self.rand_pos))
        return (random_offsets if self.search == "random" else grid_offsets)(height, width, count)

    def __call__(self, images, targets, source=None):
        self.offset = None
        return super().__call__(images, targets, source)

    def mix_batch(self, images, targets, source):
        saliency = self.compute_saliency(source, images, targets)
        if source.clean_weight > 0:  # the source has added the clean part of the gradient to .grad
            self.mixed_weight = self.update_ratio
        lam = draw_lam(self.mixup_alpha, images) if self.mixup_alpha > 0 else torch.tensor(0.5, dtype=torch.float64)
        lam, partner = self.upper_lambda * lam, draw_partner(images)
        offsets = self.draw_offsets(*images.shape[-2:])
        with torch.no_grad():
            first, second = scale_maps(saliency, partner, lam)
            self.offset = self.find_offset(first, second, offsets)
        mixed, soft, mask = blend_shifted(images, targets, first, second, partner, self.offset)
        self.set_weight(images, lambda: mask, partner)
        self.move_maps = lambda maps: (maps, shift_maps(maps, partner, self.offset))
        return mixed, soft

    def find_offset(self, first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """Return the best of these offsets for each pair of maps A and B, (B, 2) long; None: of all offsets."""
        if use_kernels(self.kernels, first.device):
            from .kernels import sage as kernels

            return kernels.find_best_offset(first, second, offsets)
        return find_best_offset(first, second, offsets)
