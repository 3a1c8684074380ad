"""PuzzleMix's mask as Triton kernels: one launch builds the problem, one solves it, with one program per image.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.2. mixing/puzzlemix.py and mixing/solvers/puzzlemix_mask.py have the
same functions in torch, which are the reference, with the derivations and the shapes of all tensors.

| kernel | a program holds | warps | registers per thread | shared memory |
|---|---|---|---|---|
| build_costs | the costs of all blocks | 1 to 8 | 32 | 1 KB |
| solve_exactly, 4 blocks a side | 256 states of the frontier, each with its labels in 32 bits | 4 | 31 | 1 KB |
| ascend, 8 blocks a side | 2 values of each flow in registers, one thread for each block | 2 | 80 | 0.5 KB |
| ascend, 16 blocks a side | the same | 8 | 80, with 4 labels 240 | 2 KB, 4 KB |
| ascend, 32 blocks a side | the same for two blocks a thread | 16 | 128, and 56 bytes are spilled | 8 KB |

Registers and memory are those on sm_90, with 3 labels where nothing else is said. An iteration of the ascent takes 196
instructions and 8 barriers at 8 and 16 blocks.
"""

import torch
import triton
import triton.language as tl

from ..puzzlemix import MaskProblem, prior_costs
from ..solvers import puzzlemix_mask as solver
from . import launch

MAX_FLOWS = 4096  # along one axis of an image; they fill a third of the registers of a multiprocessor
CHECK_EVERY, PAIR_SHARE = tl.constexpr(solver.CHECK_EVERY), tl.constexpr(solver.PAIR_SHARE)
THRESHOLDS = tl.constexpr(solver.THRESHOLDS)


def build_mask_problem(
    block_saliency: torch.Tensor,
    cells: torch.Tensor | None,
    partner: torch.Tensor,
    lam: torch.Tensor,
    *,
    n_labels: int,
    beta: float,
    gamma: float,
    eta: float,
) -> MaskProblem:
    """As mixing.puzzlemix.build_mask_problem()."""
    batch, n, _ = block_saliency.shape
    unary = block_saliency.new_empty(n_labels, n, n, batch)
    down, right = block_saliency.new_empty(n - 1, n, batch), block_saliency.new_empty(n, n - 1, batch)
    smooth, has_cells = beta / (16 * n), cells is not None and gamma > 0
    priors = [*prior_costs(lam, n_labels, eta / n**2), 0.0, 0.0][:4]
    cells = cells if has_cells else block_saliency.unsqueeze(1)
    places = triton.next_power_of_2(n * n)
    launch(
        build_costs,
        (batch,),
        *(block_saliency.contiguous(), cells, partner, unary, down, right),
        *(batch, n, smooth, smooth * gamma / 2, *priors, *cells.stride()),
        *(cells.shape[1], cells.shape[2] // n, cells.shape[3] // n),
        LABELS=n_labels,
        PLACES=places,
        HAS_CELLS=has_cells,
        num_warps=min(max(places // 32, 1), 8),
    )
    return unary, down, right


def solve(
    unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As mixing.solvers.puzzlemix_mask.solve(), which solves the grids that are too large for one program."""
    count, n, _, batch = unary.shape
    problem = [values.contiguous() for values in (unary, down, right)]
    labels, energy = unary.new_empty(n, n, batch, dtype=torch.long), unary.new_empty(batch)
    if n <= solver.EXACT_SIDE:
        base = triton.next_power_of_2(count)
        warps = max(base**n // 64, 1)
        launch(solve_exactly, (batch,), *problem, labels, energy, batch, N=n, LABELS=count, BASE=base, num_warps=warps)
        return labels, energy, energy
    places, layers = triton.next_power_of_2(n * n), triton.next_power_of_2(count - 1)
    if places * layers**2 > MAX_FLOWS:
        return solver.solve(unary, down, right)
    bound, rate = torch.empty_like(energy), float(solver.step_lengths(count - 1, torch.device("cpu")).max())
    launch(
        ascend,
        (batch,),
        *(*problem, labels, energy, bound, batch, n),
        *(solver.count_iterations(n), rate, solver.highest_momentum(n), solver.TOLERANCE * (count - 1) * n * n),
        LAYERS=count - 1,
        K=layers,
        PLACES=places,
        num_warps=min(places // 32, 16),
    )
    return labels, energy, bound


BUILD_NUMBERS = ("batch", "n", "stride_image", "stride_channel", "stride_row", "stride_column")
BUILD_NUMBERS += ("channels", "block_rows", "block_columns")


@triton.jit(do_not_specialize=BUILD_NUMBERS)
def build_costs(
    saliency, cells, partner, unary, down, right,
    batch, n, smooth, local, prior_0, prior_1, prior_2, prior_3,
    stride_image, stride_channel, stride_row, stride_column, channels, block_rows, block_columns,
    LABELS: tl.constexpr, PLACES: tl.constexpr, HAS_CELLS: tl.constexpr,
):  # fmt: skip
    """Unary costs and weights of one image. A block of the grid is block_rows x block_columns cells."""
    image = tl.program_id(0)
    other = tl.load(partner + image)
    place = tl.arange(0, PLACES)
    inside, row, column = place < n * n, place // n, place % n
    keep = tl.load(saliency + other * n * n + place, mask=inside, other=0.0)
    drop = tl.load(saliency + image * n * n + place, mask=inside, other=0.0)
    corner = cells + row * block_rows * stride_row + column * block_columns * stride_column
    has_below, has_beside = inside & (row < n - 1), inside & (column < n - 1)
    weight_down = tl.zeros([PLACES], tl.float32) + smooth
    weight_right = weight_down
    if HAS_CELLS:
        last = corner + (block_rows - 1) * stride_row
        keep_change, drop_change, weight_change = compare_borders(
            last + image * stride_image, last + other * stride_image, has_below, stride_row,
            channels, stride_channel, block_columns, stride_column, (place + n * n - n) % (n * n),
        )  # fmt: skip
        keep, drop = keep + local * keep_change, drop + local * drop_change
        weight_down += local * weight_change
        last = corner + (block_columns - 1) * stride_column
        keep_change, drop_change, weight_change = compare_borders(
            last + image * stride_image, last + other * stride_image, has_beside, stride_column,
            channels, stride_channel, block_rows, stride_row, (place + n * n - 1) % (n * n),
        )  # fmt: skip
        keep, drop = keep + local * keep_change, drop + local * drop_change
        weight_right += local * weight_change
    tl.store(down + place * batch + image, weight_down, mask=has_below)
    tl.store(right + (row * (n - 1) + column) * batch + image, weight_right, mask=has_beside)
    for label in tl.static_range(LABELS):
        prior = prior_0 if label == 0 else prior_1 if label == 1 else prior_2 if label == 2 else prior_3
        cost = keep + (drop - keep) * (label / (LABELS - 1)) + prior
        tl.store(unary + (label * n * n + place) * batch + image, cost, mask=inside)


@triton.jit
def compare_borders(
    first, first_partner, has_border, to_second, channels, stride_channel, length, stride_length, back
):  # fmt: skip
    """Return what the borders below (or right of) the blocks add to `keep`, `drop` and the weights.

    first, first_partner: the first cell on the near side of each border, in the image and in its partner; to_second:
    the way across. back: the block before each one, or one without a border.
    """
    phi_11 = tl.zeros(has_border.shape, tl.float32)
    phi_12, phi_21, phi_22 = phi_11, phi_11, phi_11
    for number in range(channels * length):
        offset = number // length * stride_channel + number % length * stride_length
        near = tl.load(first + offset, mask=has_border, other=0.0)
        far = tl.load(first + offset + to_second, mask=has_border, other=0.0)
        near_partner = tl.load(first_partner + offset, mask=has_border, other=0.0)
        far_partner = tl.load(first_partner + offset + to_second, mask=has_border, other=0.0)
        phi_11 += tl.abs(near - far)
        phi_12 += tl.abs(near - far_partner)
        phi_21 += tl.abs(near_partner - far)
        phi_22 += tl.abs(near_partner - far_partner)
    keep = phi_12 + phi_11 + tl.gather(phi_21 + phi_11, back, 0)
    drop = phi_21 + phi_22 + tl.gather(phi_12 + phi_22, back, 0)
    count = channels * length
    return keep / count, drop / count, (phi_12 + phi_21 - phi_11 - phi_22) / count


@triton.jit(do_not_specialize=["batch"])
def solve_exactly(
    unary, down, right, labels, energy, batch, N: tl.constexpr, LABELS: tl.constexpr, BASE: tl.constexpr
):  # fmt: skip
    """The dynamic programme of solve_exact() for one image.

    The frontier is a number of N digits to the base BASE, the label of the oldest block first: it is the block above
    the next one.
    """
    image = tl.program_id(0)
    REST: tl.constexpr = BASE ** (N - 1)
    own, above, left = tl.arange(0, BASE), tl.arange(0, BASE), tl.arange(0, REST) % BASE
    step_down = (above[:, None] - own[None, :]).to(tl.float32) / (LABELS - 1)
    step_right = (left[:, None] - own[None, :]).to(tl.float32) / (LABELS - 1)
    cost = tl.zeros([BASE, REST], tl.float32)
    history = tl.zeros([BASE, REST], tl.int32)  # 2 bits for each block so far
    for place in range(N * N):
        row, column = place // N, place % N
        own_cost = tl.load(unary + (own * N * N + place) * batch + image, mask=own < LABELS, other=float("inf"))
        weight_down = tl.load(down + (place - N) * batch + image, mask=row > 0, other=0.0)
        weight_right = tl.load(right + (row * (N - 1) + column - 1) * batch + image, mask=column > 0, other=0.0)
        trial = cost[:, :, None] + weight_down * (step_down * step_down)[:, None, :]
        lowest, old = tl.min(trial, 0, return_indices=True)  # REST, BASE
        kept = tl.sum(tl.where(above[:, None, None] == old[None, :, :], history[:, :, None], 0), 0)
        lowest += weight_right * (step_right * step_right) + own_cost[None, :]
        cost = tl.reshape(lowest, [BASE, REST])
        history = tl.reshape(kept | (own[None, :] << 2 * place), [BASE, REST])
    cost, history = tl.reshape(cost, [BASE * REST]), tl.reshape(history, [BASE * REST])
    lowest, state = tl.min(cost, 0, return_indices=True)
    history = tl.sum(tl.where(tl.arange(0, BASE * REST) == state, history, 0), 0)
    place = tl.arange(0, 16)
    tl.store(labels + place * batch + image, (history >> 2 * place) & 3, mask=place < N * N)
    tl.store(energy + image, lowest)


@triton.jit(do_not_specialize=["batch", "n", "iterations"])
def ascend(
    unary, down, right, labels, energy, bound, batch, n, iterations, rate, highest_momentum, tolerance,
    LAYERS: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The dual ascent of solve_total_variation() for one image, which ends when it is settled.

    Both blocks at an edge hold its flows, each as what leaves it, (own layer, layer of the mate, block). They update
    them alike, so that they exchange nothing but x.
    """
    image, place, layer = tl.program_id(0), tl.arange(0, PLACES), tl.arange(0, K)
    inside = place < n * n
    # ---- Edges of the four colours ----
    mate_0, limit_0 = load_edges(right, place, batch, n, LAYERS, True, 0)
    mate_1, limit_1 = load_edges(down, place, batch, n, LAYERS, False, 0)
    mate_2, limit_2 = load_edges(right, place, batch, n, LAYERS, True, 1)
    mate_3, limit_3 = load_edges(down, place, batch, n, LAYERS, False, 1)
    # ---- Costs of the layers, in units of their mean ----
    real = (layer < LAYERS)[:, None] & inside[None, :]
    f = load_layers(unary, limit_0 + limit_1 + limit_2 + limit_3, real, batch, n, LAYERS)
    scale = tl.maximum(tl.sum(tl.abs(f)) / (LAYERS * n * n), 1e-12)
    f = f / scale
    limit_0, limit_1, limit_2, limit_3 = limit_0 / scale, limit_1 / scale, limit_2 / scale, limit_3 / scale
    # ---- Ascent ----
    distance = tl.abs(layer[:, None] - layer[None, :])
    rates = rate * tl.where(distance == 0, 1.0, tl.where(distance == 1, PAIR_SHARE, PAIR_SHARE * PAIR_SHARE))
    rates = tl.where((layer < LAYERS)[:, None] & (layer < LAYERS)[None, :], rates, 0.0)[:, :, None]
    flow_0 = tl.zeros([K, K, PLACES], tl.float32)
    flow_1, flow_2, flow_3 = flow_0, flow_0, flow_0
    ahead_0, ahead_1, ahead_2, ahead_3 = flow_0, flow_0, flow_0, flow_0  # the extrapolated flows
    x = -f
    x_ahead = x
    iteration, gap = 0, float("inf")
    while (iteration < iterations) & (gap > tolerance):
        for _ in range(tl.minimum(CHECK_EVERY, iterations - iteration)):
            iteration += 1
            momentum = tl.minimum((iteration - 1) / (iteration + 2), highest_momentum)
            before = x
            x, new_0 = update(x_ahead, ahead_0, rates, limit_0, mate_0)
            x, new_1 = update(x, ahead_1, rates, limit_1, mate_1)
            x, new_2 = update(x, ahead_2, rates, limit_2, mate_2)
            x, new_3 = update(x, ahead_3, rates, limit_3, mate_3)
            ahead_0, flow_0 = new_0 + momentum * (new_0 - flow_0), new_0
            ahead_1, flow_1 = new_1 + momentum * (new_1 - flow_1), new_1
            ahead_2, flow_2 = new_2 + momentum * (new_2 - flow_2), new_2
            ahead_3, flow_3 = new_3 + momentum * (new_3 - flow_3), new_3
            x_ahead = x + momentum * (x - before)
        on = (real & (x > 0)).to(tl.float32)
        sums = tl.sum(on, 0)
        coupling = limit_0 * count_pairs(sums, mate_0, LAYERS) + limit_1 * count_pairs(sums, mate_1, LAYERS)
        coupling += limit_2 * count_pairs(sums, mate_2, LAYERS) + limit_3 * count_pairs(sums, mate_3, LAYERS)
        gap = tl.sum(on * (x + f)) + tl.sum(coupling) / 2
    # ---- Round ----
    best, lowest = tl.zeros([PLACES], tl.int32), float("inf")
    for number in tl.static_range(len(THRESHOLDS.value)):
        trial = tl.sum((real & (x > THRESHOLDS.value[number])).to(tl.int32), 0)
        coupling = limit_0 * squared_step(trial, mate_0) + limit_1 * squared_step(trial, mate_1)
        coupling += limit_2 * squared_step(trial, mate_2) + limit_3 * squared_step(trial, mate_3)
        own = tl.load(unary + (trial * n * n + place) * batch + image, mask=inside, other=0.0)
        reached = tl.sum(own) + scale * tl.sum(coupling) / 2
        if number == 0:
            best, lowest = trial, reached
        else:
            lower = (reached < lowest) & (gap > tolerance)
            best, lowest = tl.where(lower, trial, best), tl.where(lower, reached, lowest)
    tl.store(labels + place * batch + image, best, mask=inside)
    tl.store(energy + image, lowest)
    first_costs = tl.load(unary + place * batch + image, mask=inside, other=0.0)
    tl.store(bound + image, tl.sum(first_costs) - scale * tl.sum(tl.where(real, tl.maximum(x, 0.0), 0.0)))


@triton.jit
def load_layers(unary, limit_sum, real, batch, n, LAYERS: tl.constexpr):
    """Return f (K, N) of the relaxed problem. limit_sum: of the edges at each block; real: what is no padding."""
    layer, place = tl.arange(0, real.shape[0]), tl.arange(0, real.shape[1])
    cost = unary + (layer[:, None] * n * n + place[None, :]) * batch + tl.program_id(0)
    rise = tl.load(cost + n * n * batch, mask=real, other=0.0) - tl.load(cost, mask=real, other=0.0)
    return tl.where(real, rise + (1 + 2 * layer - LAYERS)[:, None] * limit_sum[None, :], 0.0)


@triton.jit
def load_edges(weights, place, batch, n, LAYERS: tl.constexpr, TO_THE_RIGHT: tl.constexpr, PARITY: tl.constexpr):
    """Return the mate of each block, to which an edge of a colour leads, and the weight of the edge.

    The colour has the edges to the right (or down) from the columns (or rows) of a parity. Without an edge: the block
    itself and 0.
    """
    row, column = place // n, place % n
    along = column if TO_THE_RIGHT else row
    is_first = along % 2 == PARITY
    first = along - tl.where(is_first, 0, 1)
    exists = (place < n * n) & (first >= 0) & (first < n - 1)
    edge = row * (n - 1) + first if TO_THE_RIGHT else first * n + column
    step = tl.where(is_first, 1, -1) * (1 if TO_THE_RIGHT else n)
    weight = tl.load(weights + edge * batch + tl.program_id(0), mask=exists, other=0.0)
    return tl.where(exists, place + step, place), weight / (LAYERS * LAYERS)


@triton.jit
def update(x, extrapolated, rates, limit, mate):
    """Return x (K, N) and the flows (K, K, N) of a colour after a step."""
    layer = tl.arange(0, x.shape[0])
    index = layer[:, None] * x.shape[1] + mate[None, :]
    of_mate = tl.reshape(tl.gather(tl.reshape(x, [x.numel]), tl.reshape(index, [x.numel]), 0), x.shape)
    flow = extrapolated + rates * (x[:, None, :] - of_mate[None, :, :])
    flow = tl.minimum(tl.maximum(flow, -limit), limit)
    return x - tl.sum(flow - extrapolated, 1), flow


@triton.jit
def count_pairs(sums, mate, LAYERS: tl.constexpr):
    """Return how many pairs of a layer of each block and one of its mate differ. sums: the layers that are on."""
    of_mate = tl.gather(sums, mate, 0)
    return LAYERS * (sums + of_mate) - 2 * sums * of_mate


@triton.jit
def squared_step(labels, mate):
    step = (labels - tl.gather(labels, mate, 0)).to(tl.float32)
    return step * step
