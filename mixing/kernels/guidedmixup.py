"""GuidedMixup's pairing on CUDA: one program walks along the whole cycle.

Each step depends on the one before it, so a torch operation can only do one of them: three launches for each image. The
program keeps in registers which images are still free, and reads one row of the distances in each step.
"""

import torch
import triton
import triton.language as tl

from . import launch


@triton.jit
def cycle_kernel(distance, start, partner, size, BLOCK: tl.constexpr):
    """Write partner[0..size - 1]. start: index of the largest distance in row-major order."""
    images = tl.arange(0, BLOCK)
    first = tl.load(start) // size
    image = first
    chosen = tl.load(start) % size
    free = (images < size) & (images != first)
    tl.store(partner + image, chosen)
    for _ in range(size - 2):
        image = chosen
        free = free & (images != image)
        row = tl.load(distance + image * size + images, mask=free, other=-1.0)
        chosen = tl.argmax(row, 0).to(tl.int64)
        tl.store(partner + image, chosen)
    tl.store(partner + chosen, first)


def pair_in_a_cycle(distance: torch.Tensor) -> torch.Tensor:
    """As guidedmixup.pair_in_a_cycle(); distance (B, B) >= 0."""
    size = len(distance)
    distance = distance.contiguous()
    start = distance.clone().fill_diagonal_(-1).argmax()
    partner = torch.empty(size, dtype=torch.long, device=distance.device)
    block = triton.next_power_of_2(size)
    launch(cycle_kernel, (1,), distance, start, partner, size, BLOCK=block, num_warps=1 if block <= 256 else 4)
    return partner
