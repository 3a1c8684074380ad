"""Draw `shapes`, a synthetic data set of ten textured shapes on clutter, with ground-truth boxes and masks.

Every image shows one object of random position, size, angle, colours and texture. The background is coloured noise with
small distractors of the same textures; contrast may be low. Only the outline shows the class, not colour or texture.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

CLASSES = ["disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bar", "bow"]
CHUNK = 100  # images per seed, so that the first N images do not depend on the size of the set


def draw_shapes(
    count: int, size: int, *, num_classes: int = 10, seed: int = 0, progress: Callable = lambda items, **kwargs: items
) -> dict[str, torch.Tensor]:
    """Draw images uint8 (N, size, size, 3), labels (N,) long, boxes (N, 4) long and masks bool (N, size, size).

    Boxes are y1, y2, x1, x2, half-open. Classes alternate, so every contiguous part of the set is balanced. The global
    random generators are not used.
    """
    parts = []
    for chunk, start in enumerate(progress(range(0, count, CHUNK), desc="drawing shapes")):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + chunk) * 2 + 1)
        labels = torch.arange(start, start + CHUNK) % num_classes
        images, masks = draw_chunk(labels, size, generator)
        parts.append((images, labels, masks))
    images, labels, masks = (torch.cat(column)[:count] for column in zip(*parts, strict=True))
    return {"images": images, "labels": labels, "boxes": masks_to_boxes(masks), "masks": masks}


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the tight boxes of non-empty masks (N, H, W): (N, 4) long as y1, y2, x1, x2, half-open."""
    rows, columns = masks.any(2), masks.any(1)

    def find_ends(line: torch.Tensor) -> list[torch.Tensor]:
        first = line.int().argmax(1)
        return [first, line.shape[1] - line.flip(1).int().argmax(1)]

    return torch.stack([*find_ends(rows), *find_ends(columns)], dim=1)


def draw_chunk(labels: torch.Tensor, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images uint8 (N, size, size, 3) and masks bool (N, size, size) for labels (N,).

    They are drawn at twice the size and averaged, which smooths the edges.
    """
    count, fine = len(labels), 2 * size
    line = (torch.arange(fine) + 0.5) / fine * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    # ---- Background ----
    canvas = (
        draw_noise(count, fine, 4, generator) * 0.5
        + draw_noise(count, fine, 12, generator) * 0.25
        + uniform(count, 3, 1, 1) * 0.5
    )
    # ---- Distractors: small discs and squares of two colours ----
    for _ in range(4):
        local = to_local_frame(
            y, x, uniform(count, 2, low=-1, high=1), uniform(count, low=0.06, high=0.18), uniform(count, high=7.0)
        )
        inside = torch.where(uniform(count, 1, 1) < 0.5, local.square().sum(0) < 1, local.abs().amax(0) < 0.8)
        canvas = torch.where(inside.unsqueeze(1), fill_texture(local, count, uniform), canvas)
    # ---- Object ----
    radius = uniform(count, low=0.46, high=0.8)
    centre = uniform(count, 2, low=-1, high=1) * (0.98 - radius).unsqueeze(1)
    frame = to_local_frame(y, x, centre, radius, uniform(count, low=-0.6, high=0.6))
    inside = torch.zeros(count, fine, fine, dtype=torch.bool)
    for kind in labels.unique().tolist():
        selected = labels == kind
        inside[selected] = is_inside(CLASSES[kind], frame[0][selected], frame[1][selected])
    fill = fill_texture(frame, count, uniform)
    opacity = uniform(count, 1, 1, 1, low=0.65, high=1.0)
    canvas = torch.where(inside.unsqueeze(1), opacity * fill + (1 - opacity) * canvas, canvas)
    # ---- Down to the final size, with pixel noise ----
    canvas = F.avg_pool2d(canvas, 2) + 0.03 * torch.randn(count, 3, size, size, generator=generator)
    masks = F.avg_pool2d(inside.float().unsqueeze(1), 2).squeeze(1) >= 0.5
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), masks


def draw_noise(count: int, size: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Draw smooth coloured noise in 0..1 from `cells` x `cells` random colours: (count, 3, size, size)."""
    coarse = torch.rand(count, 3, cells, cells, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)


def to_local_frame(
    y: torch.Tensor, x: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor, angle: torch.Tensor
) -> torch.Tensor:
    """Return coordinates (2, N, H, W) in which the object has radius 1, is upright and is centred at the origin."""
    cos, sin = (angle.cos() / radius).view(-1, 1, 1), (angle.sin() / radius).view(-1, 1, 1)
    down, right = y - centre[:, :1, None], x - centre[:, 1:, None]
    return torch.stack([cos * down - sin * right, sin * down + cos * right])


def fill_texture(frame: torch.Tensor, count: int, uniform) -> torch.Tensor:
    """Draw stripes, checks or a gradient between two random colours: (N, 3, H, W)."""
    first, second = uniform(count, 3, 1, 1), uniform(count, 3, 1, 1)
    frequency, phase = uniform(count, 1, 1, low=3.0, high=9.0), uniform(count, 1, 1, high=6.3)
    down, right = frame
    stripes = (frequency * down + phase).sin()
    checks = stripes * (frequency * right + phase).sin()
    kind = uniform(count, 1, 1)
    wave = torch.where(kind < 0.35, stripes, torch.where(kind < 0.7, checks, down.clamp(-1, 1)))
    share = (wave * 2).clamp(-1, 1).unsqueeze(1) * 0.5 + 0.5
    return share * first + (1 - share) * second


def is_inside(name: str, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return whether the points (v down, u right) are inside the shape of radius 1 around the origin."""
    r2 = u.square() + v.square()
    if name == "disc":
        return r2 < 0.8
    if name == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.78
    if name == "triangle":
        return (v < 0.6) & (0.87 * u.abs() - 0.5 * v < 0.5)
    if name == "star":
        wedge = math.pi / 5
        angle = (torch.atan2(u, -v).remainder(2 * wedge) - wedge).abs()  # 0 in a notch, `wedge` at a tip
        r = r2.sqrt()
        along, across = r * (wedge - angle).cos(), r * (wedge - angle).sin()
        return along + across * (1 - 0.42 * math.cos(wedge)) / (0.42 * math.sin(wedge)) < 1
    if name == "cross":
        return (torch.minimum(u.abs(), v.abs()) < 0.28) & (torch.maximum(u.abs(), v.abs()) < 0.95)
    if name == "ring":
        return (r2 < 0.9) & (r2 > 0.3)
    if name == "crescent":
        return (r2 < 0.95) & ((u - 0.5).square() + v.square() > 0.6)
    if name == "heart":
        a, b = 1.2 * u, -1.2 * v + 0.1
        return (a.square() + b.square() - 1) ** 3 - a.square() * b**3 < 0
    if name == "bar":
        return (u.abs() < 0.98) & (v.abs() < 0.34)
    return (v.abs() < 0.15 + 0.8 * u.abs()) & (u.abs() < 0.85)  # bow
