"""Co-Mixup's binary problems inside a kernel: which blocks of an output take a new label?

The functions solve what mixing/solvers/binary_grid.py solves, for LABELS new labels of one output at once. A grid of h
x w blocks is padded to a grid of powers of two, HEIGHT x WIDTH, whose SITES = HEIGHT WIDTH sites lie in one dimension,
row by row. A tile has a row for each label: (LABELS, SITES). A label is a pair of inputs, `first` and `second`, and
shows half of each; both are the same input if it is hard.

On sm_90 a program of one warp takes 124 registers a thread for 4 labels on 4 x 4 blocks, 78 for one label on 8 x 8 and
202 on 16 x 16; at most 1 KB of shared memory; no spills.
"""

import triton
import triton.language as tl

from .. import solvers

THRESHOLDS = tl.constexpr(solvers.THRESHOLDS)
RATE = tl.constexpr(1.25 / 8)  # step length of the dual ascent, as in ascend_dual()


@triton.jit
def similarity(first, second, other_first, other_second):
    """Return the inner product of labels, in {0, 1/4, 1/2, 1}."""
    one = (first == other_first).to(tl.float32) + (first == other_second).to(tl.float32)
    return 0.25 * (one + (second == other_first).to(tl.float32) + (second == other_second).to(tl.float32))


@triton.jit
def move(tile, offset, SITES: tl.constexpr):
    """Return a tile (LABELS, SITES) whose site k holds what the tile has at site k + offset, within the grid's ends."""
    site = tl.arange(0, SITES)[None, :] + offset
    site = tl.minimum(tl.maximum(site, 0), SITES - 1)
    return tl.gather(tile, tl.broadcast_to(site, tile.shape), 1)


@triton.jit
def build_problem(
    current, first, second, cost, new_first, new_second, bias, smoothness, h, w,
    WIDTH: tl.constexpr, SITES: tl.constexpr,
):  # fmt: skip
    """Return the coefficients g, J to the block below and J to the block on the right, each (LABELS, SITES).

    current, first and second (LABELS, SITES): cost and inputs of the present labels; cost (LABELS, SITES): of the new
    ones; new_first, new_second (LABELS, 1): their inputs; bias (LABELS, 1): added for each block. Of the terms of
    ExpansionMoves.find_blocks(), in its order.
    """
    row, column = tl.arange(0, SITES)[None, :] // WIDTH, tl.arange(0, SITES)[None, :] % WIDTH
    real = (row < h) & (column < w)
    has_down, has_right = real & (row < h - 1), real & (column < w - 1)
    has_up, has_left = real & (row > 0), real & (column > 0)
    degree = has_down.to(tl.float32) + has_right.to(tl.float32) + has_up.to(tl.float32) + has_left.to(tl.float32)
    inner = smoothness * similarity(first, second, new_first, new_second)
    length = smoothness * similarity(new_first, new_second, new_first, new_second)
    norm = smoothness * similarity(first, second, first, second)
    below = smoothness * similarity(first, second, move(first, WIDTH, SITES), move(second, WIDTH, SITES))
    beside = smoothness * similarity(first, second, move(first, 1, SITES), move(second, 1, SITES))
    below, beside = tl.where(has_down, below, 0.0), tl.where(has_right, beside, 0.0)
    own = -0.5 * (norm * degree) - current
    own = own + tl.where(has_up, move(below, -WIDTH, SITES), 0.0) + below
    own = own + tl.where(has_left, move(beside, -1, SITES), 0.0) + beside
    inner_below, inner_beside = move(inner, WIDTH, SITES), move(inner, 1, SITES)
    g = cost + (degree * (length / 2) + bias) + own
    g = g - tl.where(has_up, move(inner, -WIDTH, SITES), 0.0) - tl.where(has_down, inner_below, 0.0)
    g = g - tl.where(has_left, move(inner, -1, SITES), 0.0) - tl.where(has_right, inner_beside, 0.0)
    down = tl.where(has_down, inner_below + inner - below - length, 0.0)
    right = tl.where(has_right, inner_beside + inner - beside - length, 0.0)
    return tl.where(real, g, 0.0), down, right


@triton.jit
def pick(tile, site, SITES: tl.constexpr):
    """Return column `site` of a tile, (LABELS,)."""
    return tl.sum(tl.where(tl.arange(0, SITES)[None, :] == site, tile, 0.0), 1)


@triton.jit
def solve_exact(
    g, down, right, H: tl.constexpr, W: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LABELS: tl.constexpr
):
    """Return x (LABELS, SITES) int32 and the minimum (LABELS,), for grids of H x W up to 4 x 4.

    A dynamic programme over the 2^W states of a row, as in solve_binary_exact(); a step to the next row looks at all
    pairs of states.
    """
    SITES: tl.constexpr = HEIGHT * WIDTH
    STATES: tl.constexpr = 2**W
    state = tl.arange(0, STATES)
    rows, columns = tl.arange(0, HEIGHT)[None, :], tl.arange(0, WIDTH)[None, None, :]
    # ---- Cost of each state of each row: tables (LABELS, HEIGHT, STATES) ----
    g_rows = tl.reshape(g, [LABELS, HEIGHT, WIDTH])
    right_rows = tl.reshape(right, [LABELS, HEIGHT, WIDTH])
    tables = tl.zeros([LABELS, HEIGHT, STATES], tl.float32)
    for column in tl.static_range(W):
        bit = ((state >> column) & 1).to(tl.float32)[None, None, :]
        tables += bit * tl.sum(tl.where(columns == column, g_rows, 0.0), 2)[:, :, None]
        if column > 0:
            both = bit * ((state >> (column - 1)) & 1).to(tl.float32)[None, None, :]
            tables += both * tl.sum(tl.where(columns == column - 1, right_rows, 0.0), 2)[:, :, None]
    # ---- Forward: add the lowest cost of the rows above ----
    reach = tl.sum(tl.where(rows[:, :, None] == 0, tables, 0.0), 1)  # (LABELS, STATES)
    for row in tl.static_range(1, H):
        through = tl.broadcast_to(reach[:, :, None], [LABELS, STATES, STATES])  # state above, state
        for column in tl.static_range(W):
            both = ((state[:, None] & state[None, :]) >> column & 1).to(tl.float32)[None, :, :]
            through += both * pick(down, (row - 1) * WIDTH + column, SITES)[:, None, None]
        here = rows[:, :, None] == row
        reach = tl.min(through, 1) + tl.sum(tl.where(here, tables, 0.0), 1)
        tables = tl.where(here, reach[:, None, :], tables)
    # ---- Backward: read the states ----
    value = tl.min(reach, 1)
    chosen = tl.argmin(reach, 1)  # (LABELS,)
    site = tl.arange(0, SITES)[None, :]
    x = tl.where(site // WIDTH == H - 1, (chosen[:, None] >> (site % WIDTH)) & 1, 0)
    for step in tl.static_range(H - 1):
        row = H - 2 - step
        trial = tl.sum(tl.where(rows[:, :, None] == row, tables, 0.0), 1)
        for column in tl.static_range(W):
            both = ((state[None, :] & chosen[:, None]) >> column & 1).to(tl.float32)
            trial += both * pick(down, row * WIDTH + column, SITES)[:, None]
        chosen = tl.argmin(trial, 1)
        x = tl.where(site // WIDTH == row, (chosen[:, None] >> (site % WIDTH)) & 1, x)
    return x, value


@triton.jit
def relax(f, down, right, steps, WIDTH: tl.constexpr, SITES: tl.constexpr):
    """Return what ascend_dual() returns for one layer, (LABELS, SITES), after so many steps."""
    flow_down, flow_right = tl.zeros_like(f), tl.zeros_like(f)
    ahead_down, ahead_right = tl.zeros_like(f), tl.zeros_like(f)  # the flows, extrapolated by the momentum
    momentum = 1.0
    for _ in range(steps):
        x = -f - ahead_down + tl.where(tl.arange(0, SITES)[None, :] >= WIDTH, move(ahead_down, -WIDTH, SITES), 0.0)
        x = x - ahead_right + tl.where(tl.arange(0, SITES)[None, :] >= 1, move(ahead_right, -1, SITES), 0.0)
        before = momentum
        momentum = (1.0 + tl.sqrt(1.0 + 4.0 * momentum * momentum)) / 2.0
        carry = 1.0 + (before - 1.0) / momentum
        new = tl.minimum(tl.maximum(ahead_down + RATE * (x - move(x, WIDTH, SITES)), -down), down)
        ahead_down, flow_down = flow_down + carry * (new - flow_down), new
        new = tl.minimum(tl.maximum(ahead_right + RATE * (x - move(x, 1, SITES)), -right), right)
        ahead_right, flow_right = flow_right + carry * (new - flow_right), new
    x = -f - flow_down + tl.where(tl.arange(0, SITES)[None, :] >= WIDTH, move(flow_down, -WIDTH, SITES), 0.0)
    return x - flow_right + tl.where(tl.arange(0, SITES)[None, :] >= 1, move(flow_right, -1, SITES), 0.0)


@triton.jit
def solve_relaxed(g, down, right, steps, h, w, WIDTH: tl.constexpr, SITES: tl.constexpr, LABELS: tl.constexpr):
    """Return nearly what solve_exact() returns, for larger grids, as solve_binary_approximately() does."""
    row, column = tl.arange(0, SITES)[None, :] // WIDTH, tl.arange(0, SITES)[None, :] % WIDTH
    real = (row < h) & (column < w)
    scale = 1.0 / tl.maximum(tl.sum(tl.abs(g), 1) / (h * w), 1e-12)[:, None]
    below, beside = tl.maximum(-0.5 * down, 0.0), tl.maximum(-0.5 * right, 0.0)
    f = g - tl.where(row > 0, move(below, -WIDTH, SITES), 0.0) - below
    f = f - tl.where(column > 0, move(beside, -1, SITES), 0.0) - beside
    x = relax(f * scale, below * scale, beside * scale, steps, WIDTH, SITES)
    x = tl.where(real, x, -1.0)
    best, lowest = tl.zeros([LABELS, SITES], tl.int32), tl.zeros([LABELS], tl.float32)
    for number in tl.static_range(len(THRESHOLDS.value)):
        trial = (x > THRESHOLDS.value[number]).to(tl.float32)
        pairs = move(trial, WIDTH, SITES) * down + move(trial, 1, SITES) * right
        value = tl.sum(trial * g, 1) + tl.sum(trial * pairs, 1)
        lower = value < lowest
        best, lowest = tl.where(lower[:, None], trial.to(tl.int32), best), tl.where(lower, value, lowest)
    return best, lowest
