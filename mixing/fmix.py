"""FMix: a mask of random shape, which is a thresholded image of low-frequency noise.

Harris et al., arXiv 2002.12047, Sec. 4. The released code takes the wrong axis of its noise for the real and the
imaginary part, so that its fields have two column frequencies alone; fmix_field="released" is that form.
"""

import torch
from torch.nn import functional as F

from .base import Mixer
from .ops import append_dims, blend, blend_pixels, check_probability, draw_lam, draw_partner


def scale_frequencies(height: int, width: int, decay: float, device: torch.device | None = None) -> torch.Tensor:
    """Return 1 / f^decay of each frequency f of a real image: (H, columns) float32.

    There are W // 2 + 1 columns, and one more if W is odd, as in the released code. f is at least 1 / max(H, W).
    """
    rows = torch.fft.fftfreq(height, device=device)
    columns = torch.fft.fftfreq(width, device=device)[: width // 2 + 1 + width % 2]
    return torch.hypot(rows.unsqueeze(1), columns).clamp(min=1 / max(height, width)) ** -decay


def make_field(noise: torch.Tensor, scale: torch.Tensor, width: int, form: str = "paper") -> torch.Tensor:
    """Return fields (B, H, W) of noise whose spectrum is scaled; only the order of their values matters.

    noise (B, H, columns, 2) normal numbers, scale (H, columns). form `paper`: the last dimension of the noise holds the
    real and the imaginary part. form `released`: its first two rows do, and the last dimension is the column frequency.
    """
    height, half = noise.shape[1], width // 2 + 1
    noise = scale.unsqueeze(-1) * noise
    if form == "paper":
        spectrum = torch.view_as_complex(noise)[..., :half]
    else:
        spectrum = torch.complex(noise[:, 0], noise[:, 1])[:, :height, :half]
        spectrum = F.pad(spectrum, (0, half - spectrum.shape[2], 0, height - spectrum.shape[1]))
    return torch.fft.irfft2(spectrum, s=(height, width))


def threshold_field(field: torch.Tensor, lam: torch.Tensor, round_up: torch.Tensor, max_soft: float = 0.0):
    """Return masks (B, H, W) float32 that are 1 on the share lam of the pixels with the largest values.

    field (B, H, W); lam () or (B,); round_up, of the same shape, bool: whether the number of pixels is rounded up or
    down. With max_soft the mask falls linearly from 1 to 0 over up to 2 max_soft of the pixels, half of them on each
    side of the threshold, which is what lam leaves room for.
    """
    size = field[0].numel()
    number = torch.where(round_up, (lam * size).ceil(), (lam * size).floor())
    soft = (size * torch.minimum(lam, 1 - lam).clamp(max=max_soft)).floor()
    first, last = append_dims((number - soft).float(), 1), append_dims((number + soft).float(), 1)
    rank = torch.arange(size, device=field.device)
    fall = 1 - (rank - first) / (last - first - 1).clamp(min=1)
    ranked = torch.where(rank < first, 1.0, torch.where(rank < last, fall, 0.0))
    order = field.flatten(1).argsort(1, descending=True)
    return torch.empty_like(field).flatten(1).scatter_(1, order, ranked.expand_as(order)).view(field.shape)


class FMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha). Targets follow lam itself, from which the mask differs by up to one pixel.

    fmix_decay: the higher, the smoother the shapes. max_soft: width of the soft edge, a share of the pixels on each
    side of it. fmix_field: `paper`, or `released` as the released code computes it. One lam and one mask per batch, or
    per image with in_batch. mix_prob: probability that a batch is mixed. The form `released` raises ValueError for
    images of one row.
    """

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        fmix_decay: float = 3.0,
        max_soft: float = 0.0,
        fmix_field: str = "paper",
        mix_prob: float = 1.0,
        in_batch: bool = False,
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        if fmix_decay < 0:
            raise ValueError(f"fmix_decay must not be negative, got {fmix_decay}")
        if not 0 <= max_soft <= 0.5:
            raise ValueError(f"max_soft must lie between 0 and 0.5, got {max_soft}")
        if fmix_field not in ("paper", "released"):
            raise ValueError(f"fmix_field must be paper or released, got {fmix_field!r}")
        self.mixup_alpha, self.fmix_decay, self.max_soft = mixup_alpha, fmix_decay, max_soft
        self.fmix_field, self.in_batch = fmix_field, in_batch
        self.mix_prob = check_probability("mix_prob", mix_prob)

    def check_size(self, height, width):
        if self.fmix_field == "released" and height < 2:
            raise ValueError(
                f"fmix_field released needs images of at least 2 rows, got {height}x{width} pixels: use paper"
            )

    def mix_batch(self, images, targets, source):
        height, width = images.shape[-2:]
        self.check_size(height, width)
        lam = draw_lam(self.mixup_alpha, images, self.in_batch)
        partner = draw_partner(images)
        scale = scale_frequencies(height, width, self.fmix_decay, images.device)
        noise = torch.randn(len(images) if self.in_batch else 1, *scale.shape, 2, device=images.device)
        field = make_field(noise, scale, width, self.fmix_field)
        mask = threshold_field(field, lam, torch.rand_like(lam) < 0.5, self.max_soft)
        self.set_weight(images, lambda: mask, partner)
        return blend_pixels(images, partner, mask.unsqueeze(1)), blend(targets, partner, lam)
