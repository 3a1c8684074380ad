"""PuzzleMix's mask: find one label per block that minimises unary costs plus differences between neighbours.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.2. A problem is a grid of n x n blocks with L labels; B images are
solved at once:

    E(l) = sum_i unary_i(l_i) + sum_(i,j) w_ij ((l_i - l_j) / (L - 1))^2,   w >= 0

Both terms are convex in the labels, so one minimum cut gives the optimum. Grids up to 4 x 4 are solved exactly, by a
dynamic programme over the labels of one row. Larger grids are solved through the dual of a total-variation problem
whose level sets are minimum cuts (Chambolle and Darbon, IJCV 2009); this also gives a lower bound for each image.

The batch is the last dimension of all tensors, so that arithmetic runs along it.
"""

from functools import cache

import torch

ITERATIONS = {8: 60, 16: 160}  # largest side of the grid -> iterations of the dual ascent
THRESHOLDS = (0.0, 0.01, -0.01, 0.05, -0.05)  # that round the relaxed solution, in units of the mean |f|


def energy(labels: torch.Tensor, unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the energy (B,) of labels (n, n, B) long.

    unary (L, n, n, B): cost of each label; down (n-1, n, B) and right (n, n-1, B): weights w of vertical and horizontal
    neighbours.
    """
    scale = 1 / (len(unary) - 1)
    own = unary.gather(0, labels.unsqueeze(0)).sum((0, 1, 2))
    share = labels * scale
    vertical = (down * (share[1:] - share[:-1]).square()).sum((0, 1))
    return own + vertical + (right * (share[:, 1:] - share[:, :-1]).square()).sum((0, 1))


def solve(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels (n, n, B) of lowest energy and a lower bound (B,) of the energy. Arguments as in energy()."""
    if unary.shape[1] <= 4:
        labels = solve_exact(unary, down, right)
        return labels, energy(labels, unary, down, right)
    return solve_total_variation(unary, down, right)


@cache
def squared_steps(count: int, device: torch.device) -> torch.Tensor:
    """Return the pairwise costs ((l - l') / (L - 1))^2 as a table (L, L)."""
    labels = torch.arange(count, device=device, dtype=torch.float32) / (count - 1)
    return (labels.unsqueeze(1) - labels).square()


@cache
def digits(base: int, count: int, device: torch.device) -> torch.Tensor:
    """Return the digits of all numbers below base^count, most significant first: (count, base^count) long."""
    numbers = torch.arange(base**count, device=device)
    return torch.stack([numbers // base ** (count - 1 - place) % base for place in range(count)])


def solve_exact(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the exact optimum, (n, n, B) long, by a dynamic programme over a frontier of n blocks in reading order.

    The frontier has L^n states. Block (r, c) replaces the label of the block above it: a minimum over the L old labels.
    """
    # ---- Costs ----
    count, rows, columns, batch = unary.shape
    steps = squared_steps(count, unary.device).view(count, count, 1)
    table = unary.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, count, -1, -1).clone()  # r, c, left label, own label
    table[:, 1:] += right.unsqueeze(2).unsqueeze(2) * steps
    above = down.unsqueeze(2).unsqueeze(2) * steps  # r - 1, c, label above, own label
    # ---- Forward: the lowest cost of each state of the frontier ----
    cost = table[0, 0, 0].view(count, 1, batch)
    for column in range(1, columns):
        cost = cost.reshape(-1, count, 1, batch) + table[0, column]
    choices = []
    for row in range(1, rows):
        for column in range(columns):
            before, after = count**column, count ** (columns - 1 - column)
            trial = cost.reshape(before, count, 1, after, batch) + above[row - 1, column].unsqueeze(2)
            cost, choice = trial.min(1)
            choices.append(choice.reshape(-1, batch))
            if column:
                cost = cost.reshape(before // count, count, count, after, batch)
                cost = cost + table[row, column].unsqueeze(2)
            else:
                cost = cost.reshape(count, after, batch) + table[row, 0, 0].unsqueeze(1)
    # ---- Backward: read the labels from the stored choices ----
    state = cost.reshape(-1, batch).argmin(0)
    decode, labels = digits(count, columns, unary.device), []
    for row in range(rows - 1, -1, -1):
        own = decode[:, state]
        labels.append(own)
        for column in range(columns - 1, -1, -1) if row else ():
            old = choices.pop().gather(0, state.unsqueeze(0))[0]
            state = state + (old - own[column]) * count ** (columns - 1 - column)
    return torch.stack(labels[::-1])


def solve_total_variation(
    unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor, iterations: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a labelling near the optimum, (n, n, B) long, and a lower bound (B,) of the energy.

    With u_ik = [l_i > k], the energy is a constant plus sum f_ik u_ik + sum a_ij |u_ik - u_jk'| over all k, k'. The
    relaxed problem min_x |x + f|^2 / 2 + sum a |x_ik - x_jk'| has one solution, and u = [x > 0] is optimal. The layers
    k are nested without a constraint, because the unary costs are convex in the label.
    """
    layers = len(unary) - 1
    weight_sum = torch.zeros_like(unary[0])  # weights of all edges at a block
    weight_sum[1:] += down
    weight_sum[:-1] += down
    weight_sum[:, 1:] += right
    weight_sum[:, :-1] += right
    k = torch.arange(layers, device=unary.device).view(-1, 1, 1, 1)
    f = unary[1:] - unary[:-1] + (1 + 2 * k - layers) / layers**2 * weight_sum
    scale = f.abs().mean((0, 1, 2)).clamp_min(1e-12)
    edges = layers**2 * scale
    side = max(unary.shape[1:3])
    iterations = iterations or next((steps for largest, steps in ITERATIONS.items() if side <= largest), 10 * side)
    x = ascend_dual(f / scale, down / edges, right / edges, iterations)
    bound = unary[0].sum((0, 1)) + scale * (-x).clamp_max_(0).sum((0, 1, 2))
    labels, lowest = None, None
    for threshold in THRESHOLDS:
        trial = (x > threshold).sum(0)
        cost = energy(trial, unary, down, right)
        labels = trial if labels is None else torch.where(cost < lowest, trial, labels)
        lowest = cost if lowest is None else torch.minimum(cost, lowest)
    return labels, bound


def ascend_dual(f: torch.Tensor, down: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return x (K, n, n, B) that minimises |x + f|^2 / 2 + sum a_ij |x_ik - x_jk'| over all pairs of layers.

    f (K, n, n, B) is of the order of 1; a is down (n-1, n, B) and right (n, n-1, B). The dual variables are flows |p|
    <= a, one for each edge and pair of layers: x = -f - (flow out) + (flow in). They are found by accelerated projected
    gradient steps (FISTA: Beck and Teboulle, SIAM J. Imaging Sci. 2009) of length 1.25 / (8 K), where 8 K bounds the
    norm of the operator; with momentum, steps are stable up to 4/3 of 1 / (8 K).

    The blocks of a layer are stored in one row, so that a neighbour is a fixed offset away and each operation runs over
    one contiguous stretch. This is twice as fast as slicing the grid. Edges from the end of a row to the next row weigh
    0.
    """
    layers, rows, columns, batch = f.shape
    rate, momentum = 1.25 / (8 * layers), 1.0
    right = torch.cat([right, right.new_zeros(rows, 1, batch)], 1).view(-1)[:-batch]
    upper = [edge.reshape(-1).expand(layers, layers, -1).contiguous() for edge in (down, right)]
    lower, differences = [-bound for bound in upper], [torch.empty_like(bound) for bound in upper]
    flows, extrapolated = [torch.zeros_like(bound) for bound in upper], [torch.zeros_like(bound) for bound in upper]
    minus_f = -f.reshape(layers, -1)
    x = torch.empty_like(minus_f)
    sides = [(x[:, :-step], x[:, step:]) for step in (columns * batch, batch)]

    def apply_flows(pair):
        x.copy_(minus_f)
        for (first, second), flow in zip(sides, pair, strict=True):
            first.sub_(flow.sum(1) if layers > 1 else flow[0])
            second.add_(flow.sum(0) if layers > 1 else flow[0])

    for _ in range(iterations):
        apply_flows(extrapolated)
        momentum, before = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2, momentum
        for axis, (first, second) in enumerate(sides):
            torch.sub(first.unsqueeze(1), second.unsqueeze(0), out=differences[axis])
            flow = extrapolated[axis].add_(differences[axis], alpha=rate)  # flows extrapolated by the momentum
            torch.clamp(flow, lower[axis], upper[axis], out=flow)
            extrapolated[axis] = torch.lerp(flows[axis], flow, 1 + (before - 1) / momentum, out=flows[axis])
            flows[axis] = flow
    apply_flows(flows)
    return x.view(f.shape)
