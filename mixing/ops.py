"""Operations that several mixing methods share: boxes, partners, blends, checks."""

import torch
from torch.distributions import Beta


def check_targets(targets: torch.Tensor) -> None:
    """Raise ValueError for anything but soft targets (B, K)."""
    if targets.dim() != 2 or not targets.is_floating_point():
        raise ValueError(
            f"targets must be (B, K) floats whose rows sum to 1, got {tuple(targets.shape)} {targets.dtype}: "
            "F.one_hot(labels, K).float() makes them of labels"
        )


def check_probability(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return value


def check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def replace_unusable(saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """saliency (B, H, W) with ones in place of every map whose sum is zero or not finite, and which those are, (B,)."""
    total = saliency.sum((1, 2))
    unusable = ~((total > 0) & total.isfinite())
    return saliency.masked_fill(unusable.view(-1, 1, 1), 1.0), unusable


def normalize_sum(saliency: torch.Tensor) -> torch.Tensor:
    """Maps (..., H, W) that each sum to 1."""
    return saliency / saliency.sum((-2, -1), keepdim=True)


def block_means(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(..., H, W) -> (..., rows, columns): the mean of every block. H and W must be multiples of rows and columns."""
    height, width = values.shape[-2:]
    return values.unflatten(-1, (columns, width // columns)).mean(-1).unflatten(-2, (rows, height // rows)).mean(-2)


def upsample_blocks(blocks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, rows, columns) -> (B, 1, H, W): every block repeated over its pixels."""
    batch, rows, columns = blocks.shape
    tall, wide = height // rows, width // columns
    return blocks.view(batch, rows, 1, columns, 1).expand(-1, -1, tall, -1, wide).reshape(batch, 1, height, width)


def expand_weight(weight: torch.Tensor | float, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """One share, (B,) shares, or masks (B or 1, rows, columns) of blocks or pixels -> (B, 1, H, W) float32 on the
    device. shape: (B, C, H, W).
    """
    weight = torch.as_tensor(weight, dtype=torch.float32, device=device).detach()
    weight = upsample_blocks(weight, *shape[-2:]) if weight.dim() == 3 else weight.view(-1, 1, 1, 1)
    return weight.expand(shape[0], 1, *shape[-2:])


def check_divides(what: str, count: int, height: int, width: int) -> None:
    """Raise ValueError where an image of height x width cannot be cut into count x count blocks."""
    if height % count or width % count:
        fits = [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
        raise ValueError(f"{what}: {height}x{width} pixels cannot be cut into {count}x{count} blocks; {fits} would do")


def draw_lam(alpha: float, images: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """lam ~ Beta(alpha, alpha): () float64 on the host, or (B,) float32 on the device; 1 where alpha is 0."""
    if per_image:
        device = "cpu" if images.device.type == "mps" else images.device  # MPS has no gamma draws
        parameter = torch.full((len(images),), float(alpha), device=device)
        lam = Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)
        return lam.to(images.device)
    parameter = torch.tensor(float(alpha), dtype=torch.float64)
    return Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)


def draw_partner(images: torch.Tensor) -> torch.Tensor:
    """(B,) a uniform permutation of the batch; an image can be its own partner."""
    return torch.randperm(len(images), device=images.device)


def blend(values: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lam * values + (1 - lam) * values[partner] along the first dimension; lam () or (B,)."""
    if lam.dim():
        lam = lam.view(-1, *[1] * (values.dim() - 1))
    return (lam * values + (1 - lam) * values[partner]).to(values.dtype)


def center_boxes(rows: torch.Tensor, columns: torch.Tensor, lam: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes of (1 - lam) of the area around the given pixels, clipped: (B, 4) as y1, y2, x1, x2, half-open.

    CutMix, arXiv 1905.04899, Eq. 2 in the integer form of its code: side int(n sqrt(1 - lam)), centre -+ side // 2, so
    that an odd side loses a pixel. rows, columns (B,) long; lam () or (B,), the share of the image that receives.
    """
    side = (1.0 - lam).sqrt()
    half_height, half_width = (height * side).long() // 2, (width * side).long() // 2
    return clip_boxes(rows, columns, half_height, half_width, height, width)


def clip_boxes(rows, columns, half_height, half_width, height: int, width: int) -> torch.Tensor:
    """Boxes of these half sides around the given points, cut at the edges of the image: (B, 4)."""
    y1, y2 = (rows - half_height).clamp(0, height), (rows + half_height).clamp(0, height)
    x1, x2 = (columns - half_width).clamp(0, width), (columns + half_width).clamp(0, width)
    return torch.stack([y1, y2, x1, x2], dim=-1)


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4) boxes y1, y2, x1, x2 -> (B, 1, H, W) bool, true inside."""
    y1, y2, x1, x2 = boxes[:, None, None, :].unbind(-1)  # each (B, 1, 1)
    rows = torch.arange(height, device=boxes.device).view(1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, -1)
    return ((rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)).unsqueeze(1)


def paste(images: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, boxes: torch.Tensor):
    """The partner's pixels inside the box, the image's own outside; targets by the area of the clipped box.

    images (B, C, H, W), targets (B, K), partner (B,), boxes (B, 4) or (1, 4) -> mixed images, soft targets.
    """
    inside = box_mask(boxes, *images.shape[-2:])
    lam = 1.0 - inside.flatten(1).float().mean(1, keepdim=True)
    return torch.where(inside, images[partner], images), lam * targets + (1.0 - lam) * targets[partner]
