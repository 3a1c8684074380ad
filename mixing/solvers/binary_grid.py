"""Binary problems on a grid, many at once: which blocks take a new label? Co-Mixup's moves consist of them.

The batch is the last dimension of all tensors, so that arithmetic runs along it.
"""

from functools import cache

import torch

from . import THRESHOLDS

STEPS = (40, 60)  # of the dual ascent, for grids with up to 8 blocks per side and for larger ones


@cache
def bits(count: int, device: torch.device) -> torch.Tensor:
    """Return the bits of all numbers below 2^count, lowest bit first: (count, 2^count) of 0.0 and 1.0."""
    numbers = torch.arange(2**count, device=device)
    return torch.stack([(numbers >> place & 1).float() for place in range(count)])


def solve_binary_exact(g: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x in {0, 1} that minimises sum g x + sum J x x' over neighbours, (h, w, N), and the minimum (N,).

    g (h, w, N) for N problems; J is down (h-1, w, N) and right (h, w-1, N), of any sign. A dynamic programme over the
    2^w states of a row; the state of one row is replaced by that of the next column by column.
    """
    # ---- Cost of each state of each row ----
    h, w, count = g.shape
    states = 2**w
    table = g.new_empty(h, states, count)  # cost of each row on its own; bit c of a state is column c
    table[:, 0] = 0
    for column in range(w):
        low, high = 2**column, 2 ** (column + 1)
        torch.add(table[:, :low], g[:, column : column + 1], out=table[:, low:high])
        if column:
            table[:, low + low // 2 : high].add_(right[:, column - 1 : column])
    # ---- Forward: add the lowest cost of the rows above ----
    for row in range(1, h):
        reach = table[row - 1]
        for column in range(w):
            reach = reach.view(-1, 2, 2**column, count)
            off, on = reach.unbind(1)
            moved = torch.empty_like(reach)
            torch.minimum(off, on, out=moved[:, 0])
            torch.minimum(off, on + down[row - 1, column], out=moved[:, 1])
            reach = moved
        table[row].add_(reach.view(states, count))
    # ---- Backward: read the states ----
    columns = bits(w, g.device)
    value, state = table[-1].min(0)
    found = [columns.index_select(1, state)]
    for row in range(h - 2, -1, -1):
        link = down[row] * found[-1]
        trial = table[row]
        for column in range(w):
            trial.view(-1, 2, 2**column, count)[:, 1].add_(link[column])
        state = trial.min(0).indices
        found.append(columns.index_select(1, state))
    return torch.stack(found[::-1]), value


def solve_binary_approximately(
    g: torch.Tensor, down: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nearly what solve_binary_exact() returns, for larger grids.

    J > 0 counts as 0 in the search, but not in the value. With a = -J / 2, the sum consists of linear terms f_k x_k and
    of a |x_k - x_k'|: a total-variation problem, as that of PuzzleMix's mask, but with one layer.
    """
    side = max(g.shape[:2])
    scale = 1 / g.abs().mean((0, 1)).clamp_min(1e-12)
    edges = [(down * -0.5).clamp_min_(0), (right * -0.5).clamp_min_(0)]
    f = g.clone()
    f[1:].sub_(edges[0])
    f[:-1].sub_(edges[0])
    f[:, 1:].sub_(edges[1])
    f[:, :-1].sub_(edges[1])
    f, edges = f.mul_(scale), [edge.mul_(scale) for edge in edges]
    x = ascend_dual(f, *edges, STEPS[0 if side <= 8 else 1])
    best, best_value = torch.zeros_like(g), torch.zeros_like(scale)
    for threshold in THRESHOLDS:
        trial = (x > threshold).to(g.dtype)
        value = (trial * g).sum((0, 1))
        value += (trial[1:] * trial[:-1] * down).sum((0, 1)) + (trial[:, 1:] * trial[:, :-1] * right).sum((0, 1))
        lower = value < best_value
        best, best_value = torch.where(lower, trial, best), torch.where(lower, value, best_value)
    return best, best_value


def ascend_dual(f: torch.Tensor, down: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return x (h, w, N) that minimises |x + f|^2 / 2 + sum a |x_k - x_k'| over neighbours.

    f (h, w, N) is of the order of 1; a is down (h-1, w, N) and right (h, w-1, N). The dual variables are flows |p| <= a
    on the edges: x = -f - (flow out) + (flow in). They are found by accelerated projected gradient steps (FISTA: Beck
    and Teboulle, SIAM J. Imaging Sci. 2009) of length 1.25 / 8, where 8 bounds the norm of the operator; with momentum,
    steps are stable up to 4/3 of 1 / 8. The ascent for PuzzleMix's mask needs fewer iterations, but more operations for
    each, and stops at optimal signs; here, x is also rounded at thresholds for the terms J > 0.

    The blocks are stored in one row, so that a neighbour is a fixed offset away and each operation runs over one
    contiguous stretch. This is twice as fast as slicing the grid. Edges from the end of a row to the next row weigh 0.
    """
    rows, columns, count = f.shape
    momentum, minus_f = 1.0, -f.reshape(-1)
    right = torch.cat([right, right.new_zeros(rows, 1, count)], 1).view(-1)[:-count]
    upper = [edge.reshape(-1) for edge in (down, right)]
    lower, differences = [-bound for bound in upper], [torch.empty_like(bound) for bound in upper]
    flows, extrapolated = [torch.zeros_like(bound) for bound in upper], [torch.zeros_like(bound) for bound in upper]
    x = torch.empty_like(minus_f)
    sides = [(x[:-step], x[step:]) for step in (columns * count, count)]

    def apply_flows(pair):
        x.copy_(minus_f)
        for (first, second), flow in zip(sides, pair, strict=True):
            first.sub_(flow)
            second.add_(flow)

    for _ in range(iterations):
        apply_flows(extrapolated)
        momentum, before = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2, momentum
        for axis, (first, second) in enumerate(sides):
            torch.sub(first, second, out=differences[axis])
            flow = extrapolated[axis].add_(differences[axis], alpha=1.25 / 8)  # flows extrapolated by the momentum
            torch.clamp(flow, lower[axis], upper[axis], out=flow)
            extrapolated[axis] = torch.lerp(flows[axis], flow, 1 + (before - 1) / momentum, out=flows[axis])
            flows[axis] = flow
    apply_flows(flows)
    return x.view(f.shape)
