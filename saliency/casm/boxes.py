"""Turn saliency masks into boxes and points, for a whole batch on any device and without synchronizing with it.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249, localization: the mask is
binarized, and the box is the bounding box of the largest 4-connected component. The threshold and the handling of ties
follow the authors' code. Only integers are summed in a varying order, so every run gives the same boxes.
"""

import torch
from torch.nn import functional as F

BINARIZE_RULES = ("percentile", "mean")


def binarize(masks: torch.Tensor, rule: str = "percentile") -> torch.Tensor:
    """Select the pixels of the object: masks (B, H, W) -> bool (B, H, W).

    percentile: select about as many pixels as the mask has mass (its sum), so masks must lie in 0..1. With n pixels and
    mean a, the threshold is the k-th smallest pixel, k = 1 + trunc((n - 1)(1 - a) + 0.5), and a pixel must exceed it.
    So nothing is selected of a mask that is constant below 1, nor of a plateau below 1 with more pixels than the mass.
    mean: select pixels above the mean + 1e-4, for maps of any scale. A map with a NaN selects nothing by either rule.
    Raises ValueError for another rule or shape.
    """
    if rule not in BINARIZE_RULES:
        raise ValueError(f"rule must be one of {', '.join(BINARIZE_RULES)}, got {rule!r}")
    check_maps("masks", masks)
    masks = masks.float()
    dtype = torch.float32 if masks.device.type == "mps" else torch.float64  # MPS has no float64
    mean = masks.mean((1, 2), keepdim=True, dtype=dtype)
    if rule == "mean":
        return masks > mean + 1e-4
    count = masks.shape[1] * masks.shape[2]
    kth = ((count - 1) * (1 - mean) + 0.5).nan_to_num(count).long().clamp(0, count - 1)  # counted from 0
    # A full sort, because kthvalue() takes the same k for all images. NaNs come last.
    threshold = masks.flatten(1).sort(1).values.gather(1, kth.flatten(1)).unsqueeze(2)
    return masks > threshold.clamp(1e-6, 1 - 1e-6)


def find_largest_components(binary: torch.Tensor) -> torch.Tensor:
    """Keep the largest 4-connected component of each image: bool (B, H, W) -> bool (B, H, W).

    Among components of equal size, the one whose first pixel comes first in row-major order is kept. An image without
    selected pixels stays all false. Raises ValueError for other input.
    """
    check_maps("binary", binary)
    if binary.dtype != torch.bool:
        raise ValueError(f"binary must be bool, got {binary.dtype}; use binarize(masks)")
    batch, height, width = binary.shape
    # Stack all images into one tall picture, with an empty row above each and at the end and an empty column on the
    # right. From here on a position is an index into the flat pixels, and no neighbor of a pixel lies outside.
    stride = width + 1
    pixels = F.pad(F.pad(binary, (0, 1, 1, 0)).flatten(), (0, stride))
    max_runs = height * ((width + 1) // 2)  # per image
    run, first, end = number_runs(pixels, batch * max_runs)
    component = label_runs(pixels, run, first, end, stride, max_runs)

    length = (end - first).clamp_min(0)
    size = torch.zeros_like(length).scatter_add_(0, component, length)  # integers, so the order does not matter
    size = size.index_select(0, component).index_select(0, run) * pixels
    shape = batch, (height + 1) * stride
    largest = size[:-stride].view(shape).argmax(1, keepdim=True)  # the first one in a tie
    component = component.index_select(0, run)[:-stride].view(shape)
    chosen = component == component.gather(1, largest)
    return binary & chosen.view(batch, height + 1, stride)[:, 1:, :-1]


def number_runs(pixels: torch.Tensor, max_runs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the maximal horizontal runs of pixels 1, 2, ... in row-major order.

    pixels (N,) bool: a flat picture with at most max_runs runs, whose rows end in an empty pixel. Returns run (N,): the
    number of each pixel's run, and for an empty pixel that of the last run before it, or 0; first, end (max_runs + 2,):
    the half-open range of each run. A run that does not exist starts after the picture and ends before it.
    """
    position = torch.arange(len(pixels), device=pixels.device)
    before, after = F.pad(pixels[:-1], (1, 0)), F.pad(pixels[1:], (0, 1))
    run = (pixels & ~before).cumsum(0)
    unused = max_runs + 1
    first = torch.full((unused + 1,), len(pixels), device=pixels.device)
    first.scatter_(0, torch.where(pixels & ~before, run, unused), position)
    end = torch.zeros_like(first).scatter_(0, torch.where(pixels & ~after, run, unused), position + 1)
    first[-1:].fill_(len(pixels))
    end[-1:].fill_(0)
    return run, first, end


def label_runs(
    pixels: torch.Tensor, run: torch.Tensor, first: torch.Tensor, end: torch.Tensor, stride: int, max_runs: int
) -> torch.Tensor:
    """Return the first run of the 4-connected component of each run, (R,).

    The arguments are those of find_next_edges(); max_runs: per image.

    Components are identified by their contours. Each edge of a contour has one next edge, so the edges form cycles, and
    pointer doubling finds the lowest edge of every cycle in log2(length) rounds, whatever the shape. Labels that spread
    from pixel to pixel would need as many rounds as the longest path. Then doubling links holes to the contours around
    them. A run that does not exist is a contour of its own.
    """
    next_edge = find_next_edges(pixels, run, first, end, stride)
    lowest = torch.arange(len(next_edge), device=pixels.device)
    for _ in range((2 * max_runs - 1).bit_length()):  # an image has no more than 2 * max_runs edges
        lowest = torch.minimum(lowest, lowest.index_select(0, next_edge))
        next_edge = next_edge.index_select(0, next_edge)
    # The lowest edge of an outer contour is the left edge of its component's first run. The lowest edge of a hole is
    # the right edge of the run before the hole's first pixel; the left edge of that run lies on another contour of the
    # component, whose lowest edge is lower. So each link leads to a lower run of the same component, down to its first.
    component = lowest[::2] >> 1  # by the left edge of each run
    for _ in range((max_runs - 1).bit_length()):
        component = component.index_select(0, component)
    return component


def find_next_edges(
    pixels: torch.Tensor, run: torch.Tensor, first: torch.Tensor, end: torch.Tensor, stride: int
) -> torch.Tensor:
    """Return the edge that follows each edge of a run on its contour, (2R,): 2r is the left edge and 2r + 1 the right
    edge of run r.

    The contour has the object on its right, and the background is 8-connected. pixels (N,) bool: a flat picture with
    rows of `stride` pixels; run (N,), first and end (R,): from number_runs().
    """
    number = torch.arange(len(first), device=first.device)
    # From a left edge the contour goes up. Below an object pixel it turns left, and meets the right edge of the run
    # before this one or the left edge of the run above, whichever is nearer. Otherwise it turns right, and meets the
    # next run above if that starts before this run ends.
    above = first - stride
    upper = run.index_select(0, above)
    joined = pixels.index_select(0, above)
    upper = torch.where(joined, upper, upper + 1)
    start = first.index_select(0, upper) + stride
    end_before = F.pad(end[:-1], (1, 0))
    left_next = torch.where(
        joined,
        torch.where(end_before > start, 2 * number - 1, 2 * upper),
        torch.where(start < end, 2 * upper, 2 * number + 1),
    )
    # From a right edge the contour goes down: the same rotated by 180 degrees.
    below = end - 1 + stride
    lower = run.index_select(0, below)
    joined = pixels.index_select(0, below)
    stop = end.index_select(0, lower) - stride
    first_after = F.pad(first[1:], (0, 1), value=len(pixels))
    right_next = torch.where(
        joined,
        torch.where(first_after < stop, 2 * number + 2, 2 * lower + 1),
        torch.where(stop > first, 2 * lower + 1, 2 * number),
    )
    return torch.stack([left_next, right_next], 1).flatten()


def find_rectangles(binary: torch.Tensor) -> torch.Tensor:
    """Return the bounding box of the largest component of each image: bool (B, H, W) -> long (B, 4).

    Boxes are half-open, as y1, y2, x1, x2; an image without selected pixels gets zeros.
    """
    component = find_largest_components(binary)
    y1, y2 = find_extent(component.any(2))
    x1, x2 = find_extent(component.any(1))
    return torch.stack([y1, y2, x1, x2], 1)


def find_extent(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first true index and one past the last, (B,) each, of bool (B, N); 0 and 0 if there is none."""
    size = flags.shape[1]
    position = torch.arange(size, device=flags.device)
    stop = torch.where(flags, position + 1, 0).amax(1)
    return torch.where(flags, position, size).amin(1).minimum(stop), stop


def find_centroids(maps: torch.Tensor) -> torch.Tensor:
    """Return the unweighted centroid of the largest component above the mean: maps (B, H, W) of any scale -> float32
    (B, 2), row and column in pixels. A constant map gives NaN.

    This is our rule for the center of a patch. Masks have flat tops, so their first maximum is a corner of the object.
    """
    component = find_largest_components(binarize(maps, "mean"))
    per_row, per_column = component.sum(2), component.sum(1)
    rows = torch.arange(maps.shape[1], device=maps.device)
    columns = torch.arange(maps.shape[2], device=maps.device)
    total = torch.stack([(per_row * rows).sum(1), (per_column * columns).sum(1)], 1)
    return total.float() / per_row.sum(1, keepdim=True)


def check_maps(name: str, maps: torch.Tensor) -> None:
    """Raise ValueError unless the shape is (B, H, W) with at least one pixel."""
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} must be (B, H, W) with H and W at least 1, got {tuple(maps.shape)}")
