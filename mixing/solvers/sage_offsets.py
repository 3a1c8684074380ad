"""SAGE's search: find the offset of the partner at which the most saliency survives mixing.

Ma et al., BMVC 2022, arXiv 2211.00113, Sec. 3. Let A be the weighted map of the image, B that of its partner shifted by
tau, and M = A / (A + B) the weight of each pixel. The score of tau is the saliency that survives, the sum of
A M + B (1 - M) over the frame:

    v(tau) = sum A + (mass of B inside the frame) - 2 sum A B / (A + B)

The second term is a box sum. The third, the lost saliency, runs over the overlap of the frame and the shifted frame. It
is computed from the inverse maps as 1 / (1/A + 1/B): a sum, an inverse and a sum, with no special case for empty
pixels.

Offsets are (dy, dx) in pixels, positive down and right, smaller than the side of the image. Maps are float32 (B, H, W)
>= 0.
"""

import math

import torch
from torch.nn import functional as F

from ..ops import to_device

CACHE_PIXELS = 2**20  # pixels of a block of images that fits into the cache of a CPU
MAX_WINDOW_PIXELS = 2**26  # pixels of all shifted maps of a block of images: 256 MB
NUM_NODES = 19  # of the quadrature of 1 / (A + B), a factor of e apart, starting at exp(FIRST_NODE)
FIRST_NODE = -6
NUM_RESCORED = 16  # candidates per image whose approximate score is replaced by the exact one


def all_offsets(height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Return all offsets, ((2H - 1)(2W - 1), 2) long, column by column, in the order of the published code."""
    columns, rows = torch.meshgrid(
        torch.arange(1 - width, width, device=device), torch.arange(1 - height, height, device=device), indexing="ij"
    )
    return torch.stack([rows, columns], -1).flatten(0, 1)


def random_offsets(height: int, width: int, count: int) -> torch.Tensor:
    """Return `count` distinct random offsets, (count, 2) long on the CPU."""
    number = torch.randperm((2 * height - 1) * (2 * width - 1))[:count]
    rows = 2 * height - 1
    return torch.stack([number % rows + 1 - height, number // rows + 1 - width], 1)


def grid_offsets(height: int, width: int, count: int) -> torch.Tensor:
    """Return an even grid of at most `count` offsets, (K, 2) long on the CPU.

    It has an odd number of rows and columns, so that its centre is the zero offset.
    """

    def axis_offsets(side: int, points: int) -> torch.Tensor:
        return torch.tensor([round(n * side / points) for n in range(-(points // 2), points // 2 + 1)])

    max_rows, max_columns = 2 * height - 1, 2 * width - 1
    rows = min(max_rows, largest_odd(math.isqrt(count * max_rows // max_columns)))
    columns = min(max_columns, largest_odd(count // rows))
    return torch.cartesian_prod(axis_offsets(max_rows, rows), axis_offsets(max_columns, columns))


def largest_odd(number: int) -> int:
    """Return the largest odd number up to `number`, at least 1."""
    return max(1, number - 1 + number % 2)


def find_best_offset(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Return the offset with the highest score for each pair, (B, 2) long; the first of equals wins.

    first, second (B, H, W): A and the unshifted B of each pair. offsets (K, 2), on the CPU so that no loop waits for
    the device; None: all offsets.
    """
    if offsets is None:
        return find_best_offset_exhaustive(first, second)
    return take_best(score_offsets(first, second, offsets), to_device(offsets, first.device))


def find_best_offset_exhaustive(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the best of all offsets for each pair, (B, 2) long.

    All offsets get an approximate score; only the best NUM_RESCORED of each pair are scored exactly.
    """
    candidates = choose_candidates(first, second)
    return take_best(
        mass_in_frame(second, candidates) - 2 * lost_saliency_by_window(first, second, candidates), candidates
    )


def choose_candidates(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the NUM_RESCORED offsets with the best approximate score for each pair, (B, NUM_RESCORED, 2) long."""
    offsets = all_offsets(*first.shape[-2:], first.device)
    approximate = mass_in_frame(second, offsets) - 2 * approximate_lost_saliency(first, second)
    # back in the order of all_offsets(), so that the first of equals wins
    return offsets[approximate.topk(min(NUM_RESCORED, len(offsets)), sorted=False).indices.sort(1).values]


def take_best(scores: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the first offset with the highest score for each pair, (B, 2) long.

    scores (B, K); offsets (K, 2), or (B, K, 2) with its own for each pair.
    """
    best = scores.argmax(1).view(-1, 1, 1).expand(-1, -1, 2)
    return offsets.expand(len(scores), -1, -1).gather(1, best).squeeze(1)


def score_offsets(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the saliency that survives at each offset, (B, K). offsets (K, 2) on the CPU."""
    windows = first.device.type != "cpu" and len(offsets) * first.numel() <= MAX_WINDOW_PIXELS
    on_device = to_device(offsets, first.device)
    loss = (
        lost_saliency_by_window(first, second, on_device)
        if windows
        else lost_saliency_by_overlap(first, second, offsets)
    )
    return first.sum((1, 2)).unsqueeze(1) + mass_in_frame(second, on_device) - 2 * loss


def lost_saliency_by_overlap(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the lost saliency, (B, K), computing one offset after the other on the overlap alone.

    On average these are three passes over a quarter of the pixels: the fastest way on a CPU, and for large images.
    """
    height, width = first.shape[-2:]
    block = max(1, CACHE_PIXELS // (height * width)) if first.device.type == "cpu" else len(first)
    total = first.new_empty(len(offsets), len(first))
    buffer = first.new_empty(min(block, len(first)) * height * width)
    offsets = offsets.tolist()
    for start in range(0, len(first), block):
        inverse_first = first[start : start + block].reciprocal()
        inverse_second = second[start : start + block].reciprocal()
        for number, (dy, dx) in enumerate(offsets):
            part_first = inverse_first[:, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            part_second = inverse_second[:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            summed = buffer[: part_first.numel()].view(part_first.shape)
            torch.add(part_first, part_second, out=summed).reciprocal_()
            torch.sum(summed.flatten(1), 1, out=total[number, start : start + block])
    return total.t()


def lost_saliency_by_window(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the lost saliency, (B, K), computing all offsets at once.

    offsets (K, 2), or (B, K, 2) with its own for each image, on the device of the maps. A few kernels over all shifted
    maps, in blocks of at most MAX_WINDOW_PIXELS pixels: the fewest launches for small images on a GPU.
    """
    height, width = first.shape[-2:]
    offsets = offsets.expand(len(first), -1, -1)
    block = max(1, MAX_WINDOW_PIXELS // (offsets.shape[1] * height * width))
    total = []
    for one, two, dy, dx in zip(*(values.split(block) for values in (first, second, *offsets.unbind(-1))), strict=True):
        padding = (width - 1, width - 1, height - 1, height - 1)
        padded = F.pad(two.reciprocal(), padding, value=math.inf)  # the inverse of 0
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # (b, 2H - 1, 2W - 1, H, W), a view
        image = torch.arange(len(one), device=first.device).unsqueeze(1)
        shifted = windows[image, height - 1 - dy, width - 1 - dx]  # (b, K, H, W)
        total.append(shifted.add_(one.reciprocal().unsqueeze(1)).reciprocal_().sum((2, 3)))
    return torch.cat(total)


def approximate_lost_saliency(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return approximately the lost saliency at every offset, (B, (2H - 1)(2W - 1)), in the order of all_offsets().

    1 / z is the integral of exp(-t z) over t > 0, and exp(-t (A + B)) is a product of a function of A and one of B.
    Each node t of a trapezoid rule in log t is therefore a cross-correlation; these are summed in the Fourier domain
    and inverted once. Pixels much fainter than 1e-4 of the brightest are underestimated; the error of a score is about
    3e-4.
    """
    height, width = first.shape[-2:]
    size = (2 * height, 2 * width)  # zero padding, so that no shift wraps around
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
    """Return the mass of maps (B, H, W) that stays in the frame at each offset, (B, K). offsets (K, 2) or (B, K, 2)."""
    height, width = values.shape[-2:]
    table, unit = integral_image(values, as_integers=values.device.type != "cpu")
    y1, x1 = (-offsets).clamp_min(0).unbind(-1)
    y2, x2 = height - offsets[..., 0].clamp_min(0), width - offsets[..., 1].clamp_min(0)

    def corner(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return table.flatten(1).gather(1, (y * (width + 1) + x).expand(len(values), -1))

    return (corner(y2, x2) - corner(y1, x2) - corner(y2, x1) + corner(y1, x1)).float() * unit


def integral_image(values: torch.Tensor, as_integers: bool) -> tuple[torch.Tensor, float]:
    """Return the integral image, (B, H + 1, W + 1), of maps that sum to at most 1, and the unit in which it counts.

    as_integers: count in integers. On CUDA, running sums of floats are not reproducible, and torch's deterministic mode
    refuses them. A CPU takes floats in double precision, several times faster than integers.
    """
    unit = 2.0**-40 if as_integers else 1.0
    counts = (values / unit).long() if as_integers else values
    batch, height, width = values.shape
    table = counts.new_zeros(batch, height + 1, width + 1)
    torch.cumsum(counts.cumsum(1), 2, out=table[:, 1:, 1:])
    return table, unit
