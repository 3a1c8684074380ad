"""Building blocks for mixing methods: draw partners and shares, blend or paste images, handle boxes, blocks and maps.

| to | use |
|---|---|
| pair the images of a batch, draw lam, draw places | draw_partner(), draw_lam(), draw_centers() |
| mix two images as a whole, inside a box, or pixel by pixel | blend(), paste(), blend_pixels() |
| place boxes and turn them into masks | center_boxes(), scale_boxes(), clip_boxes(), box_mask() |
| let weights fall off around a place | gaussian_kernel() |
| work on a grid of blocks | block_means(), upsample_blocks(), check_divides() |
| clean up, smooth and normalise saliency maps | replace_invalid_maps(), check_blur(), blur_maps(), normalize_sum() |
| weight two labels by the saliency that is shown | find_saliency_share(), spread_saliency() |
| send numbers drawn on the host to the device | to_device() |

Boxes are rows (y1, y2, x1, x2) of a long tensor, half-open, in pixels. lam is the share of the first image.
"""

from functools import cache

import torch
from torch.distributions import Beta
from torch.nn import functional as F

NO_SALIENCY = 1e-6  # a mix that shows less than this share of two maps shows nothing of either object


def check_targets(targets: torch.Tensor) -> None:
    """Raise ValueError unless targets are (B, K) floats, one row per image."""
    if targets.dim() != 2 or not targets.is_floating_point():
        raise ValueError(
            f"targets must be (B, K) floats whose rows sum to 1, got {tuple(targets.shape)} {targets.dtype}: "
            "convert class indices with F.one_hot(labels, K).float()"
        )


def check_probability(name: str, value: float) -> float:
    """Return value. Raises ValueError if it is not in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return value


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raise ValueError if value < minimum."""
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy values from the host to a device without waiting for it."""
    # CUDA copies asynchronously, and in a captured graph at all, only from pinned memory
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def replace_invalid_maps(saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each map of saliency (B, H, W) whose sum is zero, NaN or infinite by ones.

    Returns the maps and a mask of the replaced ones, (B,) bool.
    """
    invalid = saliency.sum((1, 2)).nan_to_num(0.0, 0.0, 0.0) <= 0  # NaN and infinite sums become 0
    return saliency.masked_fill(invalid.view(-1, 1, 1), 1.0), invalid


def normalize_sum(saliency: torch.Tensor) -> torch.Tensor:
    """Scale maps (..., H, W) so that each sums to 1. No map may sum to 0."""
    return saliency / saliency.sum((-2, -1), keepdim=True)


def find_saliency_share(own: torch.Tensor, pasted: torch.Tensor, area_share: torch.Tensor) -> torch.Tensor:
    """Return own / (own + pasted), the share of an image in its mix, (B,); area_share (B,) or (1,) where both are 0.

    own, pasted (B,): the saliency of the image and of its partner that the mix shows, of maps that each sum to 1.
    """
    own = own.clamp_min(0)  # rounding
    total = own + pasted
    return torch.where(total > NO_SALIENCY, own / total.clamp_min(NO_SALIENCY), area_share)


def spread_saliency(amount: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Spread an amount (B,) evenly over the pixels of each mask, inside (B or 1, 1, H, W) bool: (B, H, W) float32.

    It is lost where a mask is empty.
    """
    inside = inside.squeeze(1).float()
    return amount.view(-1, 1, 1) * inside / inside.sum((1, 2), keepdim=True).clamp_min(1)


def blur_maps(maps: torch.Tensor, sigma: float, kernel_size: int) -> torch.Tensor:
    """Blur maps (B, H, W) with a Gaussian of kernel_size pixels, cut off at its border and scaled to sum 1.

    Borders are reflected without repeating the edge pixel, so a map needs more than kernel_size // 2 pixels per side.
    """
    kernel, reach = blur_kernel(sigma, kernel_size, maps.device, maps.dtype), kernel_size // 2
    padded = F.pad(maps.unsqueeze(1), (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).squeeze(1)


def check_blur(sigma: float, kernel_size: int, height: int, width: int) -> None:
    """Raise ValueError if maps of height x width pixels are too small for a blur with reflected borders."""
    if sigma and kernel_size // 2 >= min(height, width):
        raise ValueError(
            f"kernel_size {kernel_size} is too large to blur maps of {height}x{width} pixels; at most "
            f"{2 * min(height, width) - 1} works"
        )


@cache  # a copy to the device in each step would wait for it
def blur_kernel(sigma: float, kernel_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of a Gaussian blur along one axis, (kernel_size,)."""
    distance = torch.arange(kernel_size, device=device, dtype=dtype) - kernel_size // 2
    weight = (distance.square() / (-2 * sigma**2)).exp()
    return weight / weight.sum()


def block_means(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Average (..., H, W) over blocks: (..., rows, columns). H must be a multiple of rows, W of columns."""
    height, width = values.shape[-2:]
    return values.unflatten(-1, (columns, width // columns)).mean(-1).unflatten(-2, (rows, height // rows)).mean(-2)


def upsample_blocks(blocks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Repeat each block value of (B, rows, columns) over its pixels: (B, 1, H, W)."""
    batch, rows, columns = blocks.shape
    bh, bw = height // rows, width // columns  # height and width of a block
    return blocks.view(batch, rows, 1, columns, 1).expand(-1, -1, bh, -1, bw).reshape(batch, 1, height, width)


def expand_weight(weight: torch.Tensor | float, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Expand a weight to (B, 1, H, W) float32 on the device. shape: (B, C, H, W) of the images.

    weight: one number, (B,) numbers, or (B or 1, rows, columns) numbers for blocks or pixels.
    """
    weight = torch.as_tensor(weight, dtype=torch.float32, device=device).detach()
    weight = upsample_blocks(weight, *shape[-2:]) if weight.dim() == 3 else weight.view(-1, 1, 1, 1)
    return weight.expand(shape[0], 1, *shape[-2:])


def check_divides(name: str, count: int, height: int, width: int) -> None:
    """Raise ValueError if height x width pixels cannot be cut into count x count blocks. name: the option to blame."""
    if height % count or width % count:
        fits = [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
        raise ValueError(f"{name}: {height}x{width} pixels cannot be cut into {count}x{count} blocks; {fits} work")


def draw_lam(alpha: float, images: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """Draw lam ~ Beta(alpha, alpha). alpha 0 gives lam 1.

    Returns () float64 on the CPU or, with per_image, one lam for each image, (B,) float32 on their device.
    """
    if per_image:
        device = "cpu" if images.device.type == "mps" else images.device  # MPS cannot draw gamma variates
        parameter = torch.full((len(images),), float(alpha), device=device)
        lam = Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)
        return lam.to(images.device)
    parameter = torch.tensor(float(alpha), dtype=torch.float64)
    return Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)


def draw_partner(images: torch.Tensor) -> torch.Tensor:
    """Draw a random permutation of the batch, (B,) long on its device. An image can be its own partner."""
    return torch.randperm(len(images), device=images.device)


def draw_centers(images: torch.Tensor, per_image: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the row and the column of a random pixel, each (1,) long on the device, or (B,) with per_image."""
    number = len(images) if per_image else 1
    rows = torch.rand(number, device=images.device) * images.shape[-2]
    columns = torch.rand(number, device=images.device) * images.shape[-1]
    return rows.long(), columns.long()


def append_dims(values: torch.Tensor, count: int) -> torch.Tensor:
    """Append `count` dimensions to (B,) numbers, so that they broadcast; return one number () as it is."""
    return values.view(-1, *[1] * count) if values.dim() else values


def blend(values: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Return lam * values + (1 - lam) * values[partner], in the dtype of values.

    values (B, ...): images, targets or features; partner (B,); lam () or (B,).
    """
    lam = append_dims(lam, values.dim() - 1)
    return (lam * values + (1 - lam) * values[partner]).to(values.dtype)


def blend_pixels(images: torch.Tensor, partner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Blend each image (B, C, H, W) with its partner: weight (B, 1, H, W) is the share of the image at each pixel.

    Differentiable with respect to the images, whose memory format is kept.
    """
    weight = weight.to(images.dtype)
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        # broadcasting over the innermost dimension costs more than expanding the weight in memory
        weight = weight.expand_as(images).contiguous(memory_format=torch.channels_last)
    return torch.lerp(images[partner], images, weight)


def center_boxes(rows: torch.Tensor, columns: torch.Tensor, lam: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return boxes centred on the given pixels that cover 1 - lam of the image before they are clipped at its borders.

    rows, columns (B,) long; lam () or (B,), the share of the image that is pasted into. Returns (B, 4) long.

    CutMix, arXiv 1905.04899, Eq. 2, with the arithmetic of scale_boxes().
    """
    return scale_boxes(rows, columns, (1.0 - lam).sqrt(), height, width)


def scale_boxes(rows: torch.Tensor, columns: torch.Tensor, side: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return boxes with these sides around the given pixels, clipped at the borders of the image: (B, 4) long.

    rows, columns (B,) long; side () or (B,), relative to the sides of the image. The integer arithmetic is that of the
    code of CutMix: a side is rounded down to n pixels, of which n // 2 lie on each side of the centre, so that an odd
    side loses one pixel.
    """
    half_height, half_width = (height * side).long() // 2, (width * side).long() // 2
    return clip_boxes(rows, columns, half_height, half_width, height, width)


def clip_boxes(rows, columns, half_height, half_width, height: int, width: int) -> torch.Tensor:
    """Return boxes with these half sides around the given points, clipped at the image borders: (B, 4)."""
    boxes = torch.stack([rows - half_height, rows + half_height, columns - half_width, columns + half_width], dim=-1)
    boxes[..., :2].clamp_(0, height)
    boxes[..., 2:].clamp_(0, width)
    return boxes


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Convert boxes (B, 4) to masks (B, 1, H, W) bool, True inside."""
    y1, y2, x1, x2 = boxes[:, None, None, :].unbind(-1)  # each (B, 1, 1)
    rows = torch.arange(height, device=boxes.device).view(1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, -1)
    return ((rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)).unsqueeze(1)


def gaussian_kernel(
    rows: torch.Tensor, columns: torch.Tensor, spread: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return exp(-distance^2 / spread) of each pixel from the given points: (B, H, W) float32.

    rows, columns (B,), in pixels, not necessarily whole; spread () or (B,), in square pixels, positive.
    """
    spread = append_dims(spread, 1)
    vertical = torch.exp(-((torch.arange(height, device=rows.device) - rows.unsqueeze(1)).square() / spread))
    horizontal = torch.exp(-((torch.arange(width, device=rows.device) - columns.unsqueeze(1)).square() / spread))
    return (vertical.unsqueeze(2) * horizontal.unsqueeze(1)).float()


def paste(images: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, boxes: torch.Tensor):
    """Paste the partner's pixels inside each box, and weight the targets by the area of the box.

    images (B, C, H, W), targets (B, K), partner (B,), boxes (B, 4), or (1, 4) for one box per batch. Returns mixed
    images and soft targets.
    """
    inside = box_mask(boxes, *images.shape[-2:])
    lam = 1.0 - inside.flatten(1).float().mean(1, keepdim=True)
    return torch.where(inside, images[partner], images), lam * targets + (1.0 - lam) * targets[partner]
