"""SAGE's search on CUDA: one program scores one offset of one pair.

Ma et al., BMVC 2022, arXiv 2211.00113, Sec. 3; the formulas are those of mixing/solvers/sage_offsets.py. A program
walks over the overlap of the frame and the shifted frame, and adds up what the partner contributes there. With the
weight M = A / (A + B) a pixel keeps A M + B (1 - M), which is A + B (B - A) / (A + B). The sum of A is the same for all
offsets of a pair and is left out, so that no program looks at the pixels outside the overlap.

The tiles start at the corner of the overlap. Overlaps of the same shape are therefore summed in the same order, and on
maps of equal values, equally good offsets have equal scores. A program holds one sum for each pixel of a tile and
writes one number at the end. There are no atomics, so the result is the same in each run.

On sm_90, images of up to 64 x 64 pixels: tiles of 8 x 32 pixels, one warp, 72 registers, no shared memory. Larger ones:
16 x 32 pixels, 4 warps, 40 registers, 16 bytes of shared memory. No register is spilled. A pixel takes 21 instructions.
"""

import torch
import triton
import triton.language as tl

from ..ops import to_device
from ..solvers.sage_offsets import all_offsets, choose_candidates, take_best
from . import launch

MAX_EXACT_PIXELS = 64 * 64  # up to this size, scoring all offsets exactly costs less than the approximation
MIN_SUM = tl.constexpr(1e-30)  # of A + B: keeps pixels at which both are 0 from being 0 / 0


@triton.jit
def score_kernel(
    first, second, offsets, scores, offset_stride, height, width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    """Write scores[image, number]. offset_stride: numbers from the offsets of one image to those of the next."""
    number, image = tl.program_id(0), tl.program_id(1)
    offset = offsets + image * offset_stride + 2 * number
    dy, dx = tl.load(offset).to(tl.int32), tl.load(offset + 1).to(tl.int32)
    rows, columns = height - tl.abs(dy), width - tl.abs(dx)  # of the overlap
    start = image.to(tl.int64) * height * width
    first += start + tl.maximum(dy, 0) * width + tl.maximum(dx, 0)
    second += start + tl.maximum(-dy, 0) * width + tl.maximum(-dx, 0)
    total = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    for y in range(0, rows, BLOCK_Y):
        row = y + tl.arange(0, BLOCK_Y)[:, None]
        for x in range(0, columns, BLOCK_X):
            column = x + tl.arange(0, BLOCK_X)[None, :]
            inside = (row < rows) & (column < columns)
            a = tl.load(first + row * width + column, mask=inside, other=0.0)
            b = tl.load(second + row * width + column, mask=inside, other=0.0)
            total += b * (b - a) / tl.maximum(a + b, MIN_SUM)
    tl.store(scores + image * tl.num_programs(0) + number, tl.sum(total))


def score_offsets(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return the saliency that survives at each offset, less the sum of the image's map: (B, K).

    first, second (B, H, W) float32; offsets (K, 2), or (B, K, 2) with its own for each image, long on their device.
    """
    batch, height, width = first.shape
    first, second, offsets = first.contiguous(), second.contiguous(), offsets.contiguous()
    scores = first.new_empty(batch, offsets.shape[-2])
    offset_stride = offsets.stride(0) if offsets.dim() == 3 else 0
    arguments = first, second, offsets, scores, offset_stride, height, width
    launch(score_kernel, (scores.shape[1], batch), *arguments, **choose_tile(height, width))
    return scores


def choose_tile(height: int, width: int) -> dict[str, int]:
    """Return the tile of a program and its warps: one warp for small images, so that all pairs run at once."""
    rows, warps = (8, 1) if height * width <= MAX_EXACT_PIXELS else (16, 4)
    return {"BLOCK_Y": rows, "BLOCK_X": min(32, triton.next_power_of_2(width)), "num_warps": warps}


def find_best_offset(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """As sage_offsets.find_best_offset()."""
    if offsets is None:
        return find_best_offset_exhaustive(first, second)
    offsets = to_device(offsets, first.device)
    return take_best(score_offsets(first, second, offsets), offsets)


def find_best_offset_exhaustive(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """As sage_offsets.find_best_offset_exhaustive(), but exact for images of up to MAX_EXACT_PIXELS pixels."""
    height, width = first.shape[-2:]
    if height * width <= MAX_EXACT_PIXELS:
        offsets = all_offsets(height, width, first.device)
    else:
        offsets = choose_candidates(first, second)
    return take_best(score_offsets(first, second, offsets), offsets)
