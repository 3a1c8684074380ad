"""PuzzleMix's transport as a Triton kernel: one program per image, which ends when every place has a block.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.3, by the auction of mixing/solvers/puzzlemix_transport.py, which is the
reference: it gives the same blocks. Most programs end before the first round, because nothing can be gained.

For each place and its block, a program holds the saliency, the price, the block that shows, and whether the place is
unassigned: 1 or 2 numbers a thread each. In a round the unassigned places bid in groups of BIDDERS, and a group is a
tile of bidders x blocks. All it takes is to reduce tiles and to look numbers up, so there is no scatter, no atomic
operation and no race. On sm_90, 64 / 256 / 1,024 places: 1 / 4 / 16 warps, 67 / 80 / 89 registers a thread, none
spilled, 0 / 1 / 4 KB of shared memory.
"""

import torch
import triton
import triton.language as tl

from ..solvers import puzzlemix_transport as reference
from . import launch

SLACK = tl.constexpr(reference.SLACK)
SLACK_DOUBLING_ROUNDS = tl.constexpr(reference.SLACK_DOUBLING_ROUNDS)
MAX_ROUNDS = tl.constexpr(reference.MAX_ROUNDS)
MAX_PLACES = 1024  # 32x32 blocks; beyond, the state of an image does not fit the registers
BIDDERS = 4  # a group of more takes more registers and, at a few bidders a round, more time


def solve_transport(block_saliency: torch.Tensor, needed: torch.Tensor, t_eps: float) -> torch.Tensor:
    """As mixing.solvers.puzzlemix_transport.solve_transport(), which also solves grids of more than MAX_PLACES."""
    batch, rows, columns = block_saliency.shape
    if rows * columns > MAX_PLACES:
        return reference.solve_transport(block_saliency, needed, t_eps)
    places = triton.next_power_of_2(rows * columns)
    block = torch.empty(batch, rows * columns, dtype=torch.long, device=block_saliency.device)
    launch(
        run_auction,
        (batch,),
        block_saliency.contiguous(),
        needed.contiguous(),
        block,
        t_eps / max(rows - 1, columns - 1, 1) ** 2,
        rows,
        columns,
        PLACES=places,
        BIDDERS=BIDDERS,
        num_warps=max(1, places // 64),
        enable_fp_fusion=False,  # rounds as the reference does, so that ties are the same
    )
    return block


@triton.jit(do_not_specialize=["rows", "columns"])
def run_auction(
    block_saliency, needed, result, unit, rows, columns, PLACES: tl.constexpr, BIDDERS: tl.constexpr
):  # fmt: skip
    """As the function of the reference, but for images in which nothing can be gained, too. result (B, N) long."""
    place = tl.arange(0, PLACES)
    inside = place < rows * columns
    here = tl.program_id(0) * rows * columns + place
    saliency = tl.load(block_saliency + here, mask=inside, other=float("-inf"))
    need = tl.load(needed + here, mask=inside, other=0).to(tl.int1)
    # ---- Whether anything can be gained, as can_improve() ----
    kept = -envelope(tl.where(need, -saliency, float("-inf")), unit, rows, columns, 1)
    offered = envelope(tl.where(need, float("-inf"), saliency), unit, rows, columns, 2)
    moves = tl.max((need & (offered - kept > SLACK)).to(tl.int32)) > 0
    # ---- Start: every block at its own place, all prices 0 ----
    best_anywhere = envelope(saliency, unit, rows, columns, 2)
    unassigned = need & moves & (best_anywhere - saliency > SLACK)
    waiting = tl.sum(unassigned.to(tl.int32))
    block = place
    price = tl.zeros([PLACES], tl.float32)
    slack, number = SLACK, 0
    while (waiting > 0) & (number < MAX_ROUNDS.value):
        highest, first, wish = collect_bids(saliency, price, unassigned, waiting, slack, unit, columns, BIDDERS)
        # ---- Each block goes to the highest bid; of equal bids the first place wins ----
        won = unassigned & (tl.gather(first, tl.maximum(wish, 0), 0) == place)
        lost = need & ~unassigned & (tl.gather(highest, block, 0) > 0)
        block = tl.where(won, wish, block)
        price = tl.where(highest > 0, highest, price)
        unassigned = (unassigned & ~won) | lost
        waiting = tl.sum(unassigned.to(tl.int32))
        number += 1
        slack = tl.where(number % SLACK_DOUBLING_ROUNDS.value == 0, 2 * slack, slack)
    tl.store(result + here, block.to(tl.int64), mask=inside)


@triton.jit
def collect_bids(saliency, price, unassigned, waiting, slack, unit, columns, BIDDERS: tl.constexpr):
    """Return, for each block, the highest bid and the first place that made it; for each place, the block it wants.

    Without a bid: 0 and PLACES; -1.
    """
    PLACES: tl.constexpr = saliency.shape[0]
    place = tl.arange(0, PLACES)
    row, column = (place // columns).to(tl.float32), (place % columns).to(tl.float32)
    rank = tl.cumsum(unassigned.to(tl.int32), 0) - 1
    highest = tl.zeros([PLACES], tl.int32)
    first = tl.full([PLACES], PLACES, tl.int32)
    wish = tl.full([PLACES], -1, tl.int32)
    for start in range(0, waiting, BIDDERS):
        chosen = unassigned[None, :] & (rank[None, :] == start + tl.arange(0, BIDDERS)[:, None])
        bidder = tl.min(tl.where(chosen, place[None, :], PLACES), 1)  # PLACES: padding
        down = row[None, :] - (bidder // columns).to(tl.float32)[:, None]
        right = column[None, :] - (bidder % columns).to(tl.float32)[:, None]
        net = to_ordered((saliency - price)[None, :] - unit * (down * down + right * right))
        best = tl.max(net, 1)
        wanted = tl.min(tl.where(net == best[:, None], place[None, :], PLACES), 1)  # of equal blocks the first
        is_wanted = place[None, :] == wanted[:, None]
        second = tl.max(tl.where(is_wanted, -(2**31), net), 1)
        paid = from_ordered(tl.max(tl.where(is_wanted, to_ordered(price)[None, :], 0), 1))
        bid = to_ordered(paid + from_ordered(best) - from_ordered(second) + slack)
        bids = tl.where(is_wanted & (bidder < PLACES)[:, None], bid[:, None], 0)
        top = tl.max(bids, 0)
        leader = tl.min(tl.where((bids > 0) & (bids == top[None, :]), bidder[:, None], PLACES), 0)
        first = tl.where(top > highest, leader, first)  # bidders come in the order of their places
        highest = tl.maximum(top, highest)
        wish = tl.maximum(wish, tl.max(tl.where(chosen, wanted[:, None], -1), 0))
    return from_ordered(highest), first, wish


@triton.jit
def to_ordered(values):
    """Return numbers as integers in the same order, for which a GPU reduces over a warp in one instruction."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(values):
    """As to_ordered(), backwards."""
    return (values ^ ((values >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def envelope(values, unit, rows, columns, POWER: tl.constexpr):
    """As mixing.solvers.puzzlemix_transport.envelope(), for the places of one image."""
    place = tl.arange(0, values.shape[0])
    row, column = place // columns, place % columns
    along = tl.full(values.shape, float("-inf"), tl.float32)
    for other in range(rows):
        steps = tl.abs(row - other).to(tl.float32)
        cost = unit * (steps if POWER == 1 else steps * steps)
        along = tl.maximum(along, tl.gather(values, other * columns + column, 0) - cost)
    both = tl.full(values.shape, float("-inf"), tl.float32)
    for other in range(columns):
        steps = tl.abs(column - other).to(tl.float32)
        cost = unit * (steps if POWER == 1 else steps * steps)
        both = tl.maximum(both, tl.gather(along, tl.minimum(row, rows - 1) * columns + other, 0) - cost)
    return both
