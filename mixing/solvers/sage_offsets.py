"""SAGE's search: by how much the second image of a pair is shifted, so that the most saliency survives the mix.

Ma et al., BMVC 2022, arXiv 2211.00113, Sec. 3. With the weighted maps A of the first image and B of the second, every
pixel mixed by M = A / (A + B), a shift tau scores what it keeps: the sum of A M + B (1 - M) over the frame, that is

    v(tau) = sum A + (mass of B left inside the frame) - 2 sum A B / (A + B)

The second term is a box sum; the third runs over the overlap of the frame and the shifted frame, and is taken of the
inverse maps, 1 / (1/A + 1/B): a sum, an inverse, a sum, and empty pixels need no care. Offsets are (dy, dx) in pixels,
positive down and right, up to one short of the side of the image. Maps are float32 (B, H, W) >= 0.
"""

import math

import torch
from torch.nn import functional as F

CACHE_PIXELS = 2**20  # pixels of a block of images that a processor keeps at hand
MAX_WINDOW_PIXELS = 2**26  # pixels of all shifted windows of a block of images: 256 MB
NUM_NODES = 19  # of the quadrature of 1 / (A + B), a factor of e apart, from exp(-FIRST_NODE)
FIRST_NODE = -6
NUM_RESCORED = 16  # candidates an image whose approximate score is replaced by the exact one


def all_offsets(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """((2H - 1)(2W - 1), 2) long: every offset, column by column, the order in which the published code counts them."""
    columns, rows = torch.meshgrid(
        torch.arange(1 - width, width, device=device), torch.arange(1 - height, height, device=device), indexing="ij"
    )
    return torch.stack([rows, columns], -1).flatten(0, 1)


def random_offsets(height: int, width: int, count: int) -> torch.Tensor:
    """(count, 2) long, on the host: different offsets, in a random order."""
    number = torch.randperm((2 * height - 1) * (2 * width - 1))[:count]
    rows = 2 * height - 1
    return torch.stack([number % rows + 1 - height, number // rows + 1 - width], 1)


def grid_offsets(height: int, width: int, count: int) -> torch.Tensor:
    """(at most count, 2) long, on the host: an even grid with an odd number of rows and columns, so the zero shift is
    its centre.
    """

    def along(side: int, points: int) -> torch.Tensor:
        return torch.tensor([round(n * side / points) for n in range(-(points // 2), points // 2 + 1)])

    tall, wide = 2 * height - 1, 2 * width - 1
    rows = min(tall, largest_odd(math.isqrt(count * tall // wide)))
    columns = min(wide, largest_odd(count // rows))
    return torch.cartesian_prod(along(tall, rows), along(wide, columns))


def largest_odd(number: int) -> int:
    """The largest odd number up to this one; at least 1."""
    return max(1, number - 1 + number % 2)


def find_best_offset(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B, 2) long: the offset with the highest score, the earlier one of two equals.

    first, second (B, H, W): A and B of each pair. offsets: (K, 2), on the host so that no loop waits for the device.
    """
    return to_device(offsets, first)[score_offsets(first, second, offsets).argmax(1)]


def find_best_offset_exhaustive(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B, 2) long: the best of all offsets, of which only those with a high approximate score are scored exactly."""
    offsets = all_offsets(*first.shape[-2:], first.device)
    about = mass_in_frame(second, offsets) - 2 * approximate_lost_saliency(first, second)
    # in the order of all_offsets again, so that the earlier one of two equals wins
    chosen = about.topk(min(NUM_RESCORED, len(offsets)), sorted=False).indices.sort(1).values
    candidates = offsets[chosen]  # (B, R, 2)
    exact = mass_in_frame(second, candidates) - 2 * lost_saliency_by_window(first, second, candidates)
    return candidates[torch.arange(len(first), device=first.device), exact.argmax(1)]


def score_offsets(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B, K) the saliency that survives every offset. offsets (K, 2), on the host."""
    windows = first.device.type != "cpu" and len(offsets) * first.numel() <= MAX_WINDOW_PIXELS
    loss = (lost_saliency_by_window if windows else lost_saliency_by_overlap)(first, second, offsets)
    return first.sum((1, 2)).unsqueeze(1) + mass_in_frame(second, to_device(offsets, first)) - 2 * loss


def lost_saliency_by_overlap(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B, K) sum of A B / (A + B), one offset after the other, over nothing but the overlap.

    Three passes over a quarter of the pixels, on average: fastest on a processor and for large images.
    """
    height, width = first.shape[-2:]
    block = max(1, CACHE_PIXELS // (height * width)) if first.device.type == "cpu" else len(first)
    total = first.new_empty(len(offsets), len(first))
    room = first.new_empty(min(block, len(first)) * height * width)
    offsets = offsets.tolist()
    for start in range(0, len(first), block):
        one, two = first[start : start + block].reciprocal(), second[start : start + block].reciprocal()
        for number, (dy, dx) in enumerate(offsets):
            here = one[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            there = two[:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            summed = room[: here.numel()].view(here.shape)
            torch.add(here, there, out=summed).reciprocal_()
            torch.sum(summed.flatten(1), 1, out=total[number, start : start + block])
    return total.t()


def lost_saliency_by_window(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B, K) sum of A B / (A + B), all offsets at once; offsets (K, 2), or (B, K, 2) with its own for every image.

    A few kernels over every shifted map, in blocks of at most MAX_WINDOW_PIXELS pixels: fewest launches for small
    images.
    """
    height, width = first.shape[-2:]
    offsets = to_device(offsets, first).expand(len(first), -1, -1)
    block = max(1, MAX_WINDOW_PIXELS // (offsets.shape[1] * height * width))
    total = []
    for one, two, dy, dx in zip(*(values.split(block) for values in (first, second, *offsets.unbind(-1))), strict=True):
        padding = (width - 1, width - 1, height - 1, height - 1)
        padded = F.pad(two.reciprocal(), padding, value=math.inf)  # the inverse of nothing
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (b, 2H - 1, 2W - 1, H, W), a view
        image = torch.arange(len(one), device=first.device).unsqueeze(1)
        shifted = windows[image, height - 1 - dy, width - 1 - dx]  # (b, K, H, W)
        total.append(shifted.add_(one.reciprocal().unsqueeze(1)).reciprocal_().sum((2, 3)))
    return torch.cat(total)


def approximate_lost_saliency(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B, (2H - 1)(2W - 1)) about the sum of A B / (A + B), for every offset in the order of all_offsets.

    1 / z is the integral of exp(-t z) over t > 0, and exp(-t (A + B)) is a product of a function of A and one of B: a
    cross-correlation for every node t of a trapezoid rule in log t, summed before the one inverse transform. Pixels
    much fainter than 1e-4 of the brightest are taken too lightly; the error is about 3e-4 of a score.
    """
    height, width = first.shape[-2:]
    size = (2 * height, 2 * width)  # room for every shift without wrapping around
    peak = first.amax((1, 2), keepdim=True) + second.amax((1, 2), keepdim=True)
    one, two = first / peak, second / peak
    spectrum = 0.0
    for node in range(NUM_NODES):
        t = math.exp(FIRST_NODE + node)  # in log t the step is 1 and dt = t d(log t)
        ours = torch.fft.rfft2(one * (one * -t).exp_().mul_(t), s=size)
        spectrum = torch.fft.rfft2(two * (two * -t).exp_(), s=size).conj().mul(ours).add_(spectrum)
    loss = torch.fft.irfft2(spectrum, s=size).mul_(peak)
    loss = loss.roll((height - 1, width - 1), (1, 2))[:, : 2 * height - 1, : 2 * width - 1]
    return loss.transpose(1, 2).flatten(1)


def mass_in_frame(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(B, K) what stays in the frame of maps (B, H, W) shifted by offsets (K, 2) or (B, K, 2), on their device."""
    height, width = values.shape[-2:]
    table, unit = integral_image(values, whole=values.device.type != "cpu")
    y1, x1 = (-offsets).clamp_min(0).unbind(-1)
    y2, x2 = height - offsets[..., 0].clamp_min(0), width - offsets[..., 1].clamp_min(0)

    def corner(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return table.flatten(1).gather(1, (y * (width + 1) + x).expand(len(values), -1))

    return (corner(y2, x2) - corner(y1, x2) - corner(y2, x1) + corner(y1, x1)).float() * unit


def integral_image(values: torch.Tensor, whole: bool) -> tuple[torch.Tensor, float]:
    """(B, H + 1, W + 1) sums of everything above and to the left, and their unit. values sum to 1 at most.

    whole: in whole numbers. An accelerator's running sums of floats are not repeatable and, on CUDA, refused by torch's
    deterministic mode; a processor takes them in double precision, and several times faster than whole numbers.
    """
    unit = 2.0**-40 if whole else 1.0
    units = (values / unit).long() if whole else values
    batch, height, width = values.shape
    table = units.new_zeros(batch, height + 1, width + 1)
    torch.cumsum(units.cumsum(1), 2, out=table[:, 1:, 1:])
    return table, unit


def to_device(offsets: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The offsets on the device of `like`, without waiting for it."""
    return offsets.to(like.device, non_blocking=True)
