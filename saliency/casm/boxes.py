"""From saliency masks to boxes and points, for a whole batch on any device, without once waiting for the device.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249, localisation: the mask is
binarised, and the box is the tight one around the largest 4-connected component. The threshold and the ties follow the
authors' code. Nothing here is random, and integers alone are summed across pixels, so every run gives the same boxes.
"""

import torch
from torch.nn import functional as F

RULES = ("percentile", "mean")


def binarize(masks: torch.Tensor, rule: str = "percentile") -> torch.Tensor:
    """Masks (B, H, W) -> bool (B, H, W), true where the object is.

    percentile: as many pixels as the mask has mass, so masks must lie in 0..1. With n pixels and mean a the threshold
    is the k-th smallest pixel, k = 1 + trunc((n - 1)(1 - a) + 0.5), and a pixel must exceed it: nothing is selected of
    a mask that is constant below 1, nor of a flat top below 1 that is larger than the mass.
    mean: pixels above the mean + 1e-4, for maps of any scale. A map with a NaN selects nothing under either rule.
    Raises ValueError for another rule or shape.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    check_maps("masks", masks)
    masks = masks.float()
    exact = torch.float32 if masks.device.type == "mps" else torch.float64
    mean = masks.mean((1, 2), keepdim=True, dtype=exact)
    if rule == "mean":
        return masks > mean + 1e-4
    count = masks.shape[1] * masks.shape[2]
    kth = ((count - 1) * (1 - mean) + 0.5).nan_to_num(count).long().clamp(0, count - 1)  # from 0
    # Sorted whole: kthvalue takes one k for all images. NaNs come last.
    threshold = masks.flatten(1).sort(1).values.gather(1, kth.flatten(1)).unsqueeze(2)
    return masks > threshold.clamp(1e-6, 1 - 1e-6)


def find_largest_components(binary: torch.Tensor) -> torch.Tensor:
    """bool (B, H, W) -> bool (B, H, W): the largest 4-connected component of each image, the one whose first pixel
    comes first in row-major order among equals; all false where nothing is selected. Raises ValueError for other input.
    """
    check_maps("binary", binary)
    if binary.dtype != torch.bool:
        raise ValueError(f"binary must be bool, got {binary.dtype}: binarize(masks) makes it of masks")
    batch, height, width = binary.shape
    # All images as one tall picture, an empty row above each and at the end, an empty column at the right: from here
    # on a position is an index into its pixels, and none lies outside.
    wide = width + 1
    pixels = F.pad(F.pad(binary, (0, 1, 1, 0)).flatten(), (0, wide))
    max_runs = height * ((width + 1) // 2)  # of an image
    run, first, end = number_runs(pixels, batch * max_runs)
    component = label_runs(pixels, run, first, end, wide, max_runs)

    length = (end - first).clamp_min(0)
    size = torch.zeros_like(length).scatter_add_(0, component, length)  # integers, so in any order
    size = size.index_select(0, component).index_select(0, run) * pixels
    shape = batch, (height + 1) * wide
    largest = size[:-wide].view(shape).argmax(1, keepdim=True)  # the first of equals
    component = component.index_select(0, run)[:-wide].view(shape)
    chosen = component == component.gather(1, largest)
    return binary & chosen.view(batch, height + 1, wide)[:, 1:, :-1]


def number_runs(pixels: torch.Tensor, max_runs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Number the maximal horizontal runs of pixels r = 1, 2, ... in row-major order.

    pixels (N,) bool, a picture of at most max_runs runs whose rows end in an empty pixel -> run (N,): the number of the
    run of each pixel, of an empty one that of the last run before it, or 0; first, end (max_runs + 2,): where each run
    begins and ends, half-open. A run that does not exist begins behind the picture and ends before it.
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
    pixels: torch.Tensor, run: torch.Tensor, first: torch.Tensor, end: torch.Tensor, wide: int, max_runs: int
) -> torch.Tensor:
    """The first run of the 4-connected component of each run, (R,). Arguments as in next_edges; max_runs: of an image.

    Components are told apart by their contours. Walking along a contour, each edge has one next edge, so the edges form
    cycles, and the least edge of every cycle is known after log2(length) doublings, whatever the shape; labels that
    spread from pixel to pixel would need as many rounds as the longest path. Then holes are tied to what surrounds
    them, by doubling again. A run that does not exist is a contour of its own.
    """
    following = next_edges(pixels, run, first, end, wide)
    least = torch.arange(len(following), device=pixels.device)
    for _ in range((2 * max_runs - 1).bit_length()):  # an image has no more than 2 * max_runs edges
        least = torch.minimum(least, least.index_select(0, following))
        following = following.index_select(0, following)
    # The least edge of an outer contour is the left one of its component's first run. That of a hole is the right one
    # of the run before the hole's first pixel, whose left edge lies on another contour of this component, with a lesser
    # least edge. So each of these links leads to a run of the same component and of a lower number, until its first.
    component = least[::2] >> 1  # by the left edge of each run
    for _ in range((max_runs - 1).bit_length()):
        component = component.index_select(0, component)
    return component


def next_edges(
    pixels: torch.Tensor, run: torch.Tensor, first: torch.Tensor, end: torch.Tensor, wide: int
) -> torch.Tensor:
    """The edge that follows each edge of a run on the contour, object on the right hand, background 8-connected.

    pixels (N,) bool, a picture with rows of `wide` pixels; run (N,), first and end (R,) as number_runs gives them ->
    (2R,) nodes: 2r is the left edge, 2r + 1 the right edge of run r.
    """
    number = torch.arange(len(first), device=first.device)
    # From a left edge it goes up. Over a pixel it turns left, and meets the right edge of the run before it or the
    # left one of the run above, whichever is nearer; else right, to the next run above, if that begins before its end.
    over = first - wide
    upper = run.index_select(0, over)
    joined = pixels.index_select(0, over)
    upper = torch.where(joined, upper, upper + 1)
    start = first.index_select(0, upper) + wide
    end_before = F.pad(end[:-1], (1, 0))
    left_next = torch.where(
        joined,
        torch.where(end_before > start, 2 * number - 1, 2 * upper),
        torch.where(start < end, 2 * upper, 2 * number + 1),
    )
    # From a right edge it goes down: the same, turned by 180 degrees.
    under = end - 1 + wide
    lower = run.index_select(0, under)
    joined = pixels.index_select(0, under)
    stop = end.index_select(0, lower) - wide
    first_after = F.pad(first[1:], (0, 1), value=len(pixels))
    right_next = torch.where(
        joined,
        torch.where(first_after < stop, 2 * number + 2, 2 * lower + 1),
        torch.where(stop > first, 2 * lower + 1, 2 * number),
    )
    return torch.stack([left_next, right_next], 1).flatten()


def find_rectangles(binary: torch.Tensor) -> torch.Tensor:
    """bool (B, H, W) -> long (B, 4): the tight box y1, y2, x1, x2, half-open, around the largest component of each
    image; zeros where nothing is selected.
    """
    component = find_largest_components(binary)
    y1, y2 = find_extent(component.any(2))
    x1, x2 = find_extent(component.any(1))
    return torch.stack([y1, y2, x1, x2], 1)


def find_extent(used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool (B, N) -> the first true index and one past the last, (B,) each; 0 and 0 where there is none."""
    size = used.shape[1]
    position = torch.arange(size, device=used.device)
    stop = torch.where(used, position + 1, 0).amax(1)
    return torch.where(used, position, size).amin(1).minimum(stop), stop


def find_centroids(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, H, W) of any scale -> float32 (B, 2), row and column in pixels: the unweighted centroid of the largest
    component above the mean; NaN where nothing is, which is a constant map.

    Our rule for where a patch is centred. The masks have flat tops, so their first maximum is a corner of the object.
    """
    component = find_largest_components(binarize(maps, "mean"))
    per_row, per_column = component.sum(2), component.sum(1)
    rows = torch.arange(maps.shape[1], device=maps.device)
    columns = torch.arange(maps.shape[2], device=maps.device)
    total = torch.stack([(per_row * rows).sum(1), (per_column * columns).sum(1)], 1)
    return total.float() / per_row.sum(1, keepdim=True)


def check_maps(name: str, maps: torch.Tensor) -> None:
    """Raise ValueError for anything but (B, H, W) with at least one pixel."""
    if maps.dim() != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} must be (B, H, W) with H and W at least 1, got {tuple(maps.shape)}")
