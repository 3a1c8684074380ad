"""PuzzleMix's mask: a small label per block that minimises unary costs and differences between neighbours.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.2. A problem is a grid of n x n sites with L labels, B images at once:

    E(l) = sum_i unary_i(l_i) + sum_(i,j) w_ij ((l_i - l_j) / (L - 1))^2,   w >= 0

Both terms are convex in the labels, so the optimum is that of one minimum cut. Grids up to 4 are solved exactly, by a
dynamic programme over the labels of one row. Larger ones by the dual of a total-variation problem, whose level sets are
minimum cuts (Chambolle and Darbon, IJCV 2009), with a lower bound for every image. The batch is the last dimension
throughout: all arithmetic runs along it.
"""

from functools import cache

import torch

ITERATIONS = {8: 60, 16: 160}  # of the dual ascent, by the largest side of a grid they are for
THRESHOLDS = (0.0, 0.01, -0.01, 0.05, -0.05)  # of the relaxed solution, in units of the image's mean unary difference


def energy(labels: torch.Tensor, unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(B,) the energy of labels (n, n, B) long. unary (L, n, n, B); down (n-1, n, B), right (n, n-1, B) weights."""
    scale = 1 / (len(unary) - 1)
    own = unary.gather(0, labels.unsqueeze(0)).sum((0, 1, 2))
    share = labels * scale
    vertical = (down * (share[1:] - share[:-1]).square()).sum((0, 1))
    return own + vertical + (right * (share[:, 1:] - share[:, :-1]).square()).sum((0, 1))


def solve(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (n, n, B) of least energy, and a lower bound (B,) of the energy. Arguments as those of energy()."""
    if unary.shape[1] <= 4:
        labels = solve_exact(unary, down, right)
        return labels, energy(labels, unary, down, right)
    return solve_total_variation(unary, down, right)


@cache
def squared_steps(count: int, device: torch.device) -> torch.Tensor:
    """(L, L): ((l - l') / (L - 1))^2."""
    labels = torch.arange(count, device=device, dtype=torch.float32) / (count - 1)
    return (labels.unsqueeze(1) - labels).square()


@cache
def digits(base: int, count: int, device: torch.device) -> torch.Tensor:
    """(count, base^count) long: the digits of every number, the most significant first."""
    numbers = torch.arange(base**count, device=device)
    return torch.stack([numbers // base ** (count - 1 - place) % base for place in range(count)])


def solve_exact(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The exact optimum, (n, n, B) long, by a dynamic programme over the labels of the last n sites in reading order.

    The frontier has L^n states. Site (r, c) replaces the label of the site above it: a minimum over L old labels.
    """
    count, rows, columns, batch = unary.shape
    steps = squared_steps(count, unary.device).view(count, count, 1)
    table = unary.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, count, -1, -1).clone()  # r, c, left label, own label
    table[:, 1:] += right.unsqueeze(2).unsqueeze(2) * steps
    above = down.unsqueeze(2).unsqueeze(2) * steps  # r - 1, c, label above, own label
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
    """Nearly the optimum, (n, n, B) long, and a lower bound (B,) of the energy, by total variation.

    With u_ik = [l_i > k] the energy is a constant plus sum f_ik u_ik + sum a_ij |u_ik - u_jk'| over all k, k'. The
    relaxed problem min_x |x + f|^2 / 2 + sum a |x_ik - x_jk'| has one solution, and its positive part is an optimal u.
    The layers come out nested by themselves, because the unary costs are convex in the label.
    """
    layers = len(unary) - 1
    around = torch.zeros_like(unary[0])  # weights of all edges at a site
    around[1:] += down
    around[:-1] += down
    around[:, 1:] += right
    around[:, :-1] += right
    k = torch.arange(layers, device=unary.device).view(-1, 1, 1, 1)
    f = unary[1:] - unary[:-1] + (1 + 2 * k - layers) / layers**2 * around
    scale = f.abs().mean((0, 1, 2)).clamp_min(1e-12)
    edges = layers**2 * scale
    side = max(unary.shape[1:3])
    iterations = iterations or next((steps for most, steps in ITERATIONS.items() if side <= most), 10 * side)
    x = ascend_dual(f / scale, down / edges, right / edges, iterations)
    bound = unary[0].sum((0, 1)) + scale * (-x).clamp_max_(0).sum((0, 1, 2))
    labels, least = None, None
    for threshold in THRESHOLDS:
        trial = (x > threshold).sum(0)
        cost = energy(trial, unary, down, right)
        labels = trial if labels is None else torch.where(cost < least, trial, labels)
        least = cost if least is None else torch.minimum(cost, least)
    return labels, bound


def ascend_dual(f: torch.Tensor, down: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """min_x |x + f|^2 / 2 + sum a_ij |x_ik - x_jk'|, over all pairs of layers: x (K, n, n, B) by its dual.

    f (K, n, n, B) of the order of 1, a: down (n-1, n, B) and right (n, n-1, B). The dual has a flow |p| <= a for every
    edge and pair of layers, x = -f - (what flows out) + (what flows in). It is climbed by accelerated projected steps
    (Beck and Teboulle, SIAM J. Imaging Sci. 2009), of 1.25 over the bound 8 K of the operator's norm: with momentum
    they are stable up to 4 / 3.

    The sites of a layer lie in one row, so that a neighbour is a fixed step away and every operation runs over one
    unbroken stretch: twice as fast as over slices of the grid. Edges from the end of a line to the next one weigh 0.
    """
    layers, rows, columns, batch = f.shape
    rate, momentum = 1.25 / (8 * layers), 1.0
    right = torch.cat([right, right.new_zeros(rows, 1, batch)], 1).view(-1)[:-batch]
    tops = [edge.reshape(-1).expand(layers, layers, -1).contiguous() for edge in (down, right)]
    bottoms, differences = [-top for top in tops], [torch.empty_like(top) for top in tops]
    flows, ahead = [torch.zeros_like(top) for top in tops], [torch.zeros_like(top) for top in tops]
    minus_f = -f.reshape(layers, -1)
    x = torch.empty_like(minus_f)
    sides = [(x[:, :-step], x[:, step:]) for step in (columns * batch, batch)]

    def flow_through(pair):
        x.copy_(minus_f)
        for (first, second), flow in zip(sides, pair, strict=True):
            first.sub_(flow.sum(1) if layers > 1 else flow[0])
            second.add_(flow.sum(0) if layers > 1 else flow[0])

    for _ in range(iterations):
        flow_through(ahead)
        momentum, before = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2, momentum
        for axis, (first, second) in enumerate(sides):
            torch.sub(first.unsqueeze(1), second.unsqueeze(0), out=differences[axis])
            flow = ahead[axis].add_(differences[axis], alpha=rate)  # the flows, carried on by the momentum
            torch.clamp(flow, bottoms[axis], tops[axis], out=flow)
            ahead[axis] = torch.lerp(flows[axis], flow, 1 + (before - 1) / momentum, out=flows[axis])
            flows[axis] = flow
    flow_through(flows)
    return x.view(f.shape)
