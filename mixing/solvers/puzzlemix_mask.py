"""PuzzleMix's mask: find one label per block that minimises unary costs plus differences between neighbours.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.2. A problem is a grid of n x n blocks with L labels; B images are
solved at once:

    E(l) = sum_i unary_i(l_i) + sum_(i,j) w_ij ((l_i - l_j) / (L - 1))^2,   w >= 0

Both terms are convex in the labels, so one minimum cut gives the optimum. Grids up to 4 x 4 are solved exactly, by a
dynamic programme over the labels of one row. Larger grids are solved through the dual of a total-variation problem
whose level sets are minimum cuts (Chambolle and Darbon, IJCV 2009); this also gives a lower bound for each image.

The dual is solved by block coordinate ascent with momentum (Chambolle, Tan and Vaiter, J. Math. Imaging Vis. 2017,
prove it for two sets of variables; here there are four). The rule is the same for each image, whatever else is in its
batch, and every implementation follows it:

* There is a flow p, |p| <= a, for each edge and pair of layers, and x = -f - (flow out) + (flow in). All flows start
  from 0. The edges have four colours, so that no block has two edges of a colour: to the right from even columns, down
  from even rows, to the right from odd columns, down from odd rows.
* An iteration updates the colours in turn: p = clamp(e + s (x_k - x_k'), -a, a), where e are the extrapolated flows, s
  is step_lengths(), and x belongs to the updated flows of earlier colours and the extrapolated ones of later colours.
  Then all flows are extrapolated from their values p' before the iteration: e = p' + (1 + momentum_after()) (p - p').
* After every CHECK_EVERY iterations, an image is settled if energy - bound of u = [x > 0], with x of the flows p, is
  at most TOLERANCE for each block and layer. This x is kept. An image that is not settled after the last iteration
  takes the labels of lowest energy among the THRESHOLDS.

The batch is the last dimension of all tensors, so that arithmetic runs along it.
"""

import math
from functools import cache
from typing import NamedTuple

import torch

from . import THRESHOLDS

EXACT_SIDE = 4  # largest side of a grid that is solved exactly
ITERATIONS = {8: 40, 16: 60}  # largest side of the grid -> most iterations of the dual ascent
CHECK_EVERY = 5  # iterations
TOLERANCE = 1e-6  # energy - bound of a settled image, for each block and layer, in units of the mean |f|
RATE = 1.25  # length of a step, relative to exact minimisation; with momentum, steps are stable up to 4/3
PAIR_SHARE = 0.3  # the step of the flow between layers k and k' falls by this factor with each unit of |k - k'|
CACHED_FLOWS = 2**19  # per thread: flows of the images that are solved together on a CPU
LEAVING_SHARE, FEW_IMAGES = 0.5, 16  # on a CPU, settled images leave when at most this share of more images is open


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


def solve(
    unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return labels (n, n, B) of lowest energy, their energy (B,) and a lower bound (B,) of the energy.

    Arguments as in energy().
    """
    if unary.shape[1] <= EXACT_SIDE:
        labels = solve_exact(unary, down, right)
        reached = bound = energy(labels, unary, down, right)
    else:
        labels, bound = solve_total_variation(unary, down, right)
        reached = energy(labels, unary, down, right)
    return labels, reached, bound


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
    iterations = iterations or count_iterations(max(unary.shape[1:3]))
    x, is_settled = ascend_until_settled(f / scale, down / edges, right / edges, iterations)
    bound = unary[0].sum((0, 1)) + scale * (-x).clamp_max_(0).sum((0, 1, 2))
    labels = (x > THRESHOLDS[0]).sum(0)
    if unary.device.type == "cpu" and is_settled.all():
        return labels, bound
    lowest = energy(labels, unary, down, right)
    for threshold in THRESHOLDS[1:]:
        trial = (x > threshold).sum(0)
        cost = energy(trial, unary, down, right)
        lower = (cost < lowest) & ~is_settled
        labels, lowest = torch.where(lower, trial, labels), torch.where(lower, cost, lowest)
    return labels, bound


def ascend_until_settled(
    f: torch.Tensor, down: torch.Tensor, right: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (K, n, n, B) that minimises |x + f|^2 / 2 + sum a_ij |x_ik - x_jk'|, and which images settled, (B,).

    The sum is over all pairs of layers. f (K, n, n, B) is of the order of 1; a is down (n-1, n, B) and right
    (n, n-1, B). On a CPU, as many images are solved at a time as fit the cache, so that the time is linear in B.
    """
    flows, num_parts = 2 * len(f) * f.numel(), 1
    if f.device.type == "cpu":
        num_parts = min(f.shape[-1], math.ceil(flows / (CACHED_FLOWS * torch.get_num_threads())))
    parts = zip(*(tensor.tensor_split(num_parts, -1) for tensor in (f, down, right)), strict=True)
    x, is_settled = zip(*(ascend_together(DualAscent(*part), iterations) for part in parts), strict=True)
    return torch.cat(x, -1), torch.cat(is_settled)


def ascend_together(ascent: "DualAscent", iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the ascent and return what ascend_until_settled() returns.

    On a CPU, settled images leave. A device would have to wait for the host, so there all images go on, and the x of a
    settled image is kept.
    """
    found = ascent.get_x()
    images = torch.arange(found.shape[-1], device=found.device)  # those in the ascent
    is_settled = torch.zeros_like(images, dtype=torch.bool)
    x, all_settled, on_cpu = torch.empty_like(found), is_settled.clone(), found.device.type == "cpu"
    while ascent.iteration < iterations:
        ascent.advance(min(CHECK_EVERY, iterations - ascent.iteration))
        found = torch.where(is_settled, found, ascent.get_x())
        is_settled = is_settled | (ascent.compute_gap() <= ascent.tolerance)
        num_open = len(images) - int(is_settled.sum()) if on_cpu else len(images)
        if not num_open:
            break
        if len(images) > FEW_IMAGES and num_open <= LEAVING_SHARE * len(images):
            x.index_copy_(-1, images, found)
            all_settled.index_copy_(0, images, is_settled)
            stay = is_settled.logical_not().nonzero().squeeze(1)
            images, found, is_settled = (tensor.index_select(-1, stay) for tensor in (images, found, is_settled))
            ascent.keep(stay)
    x.index_copy_(-1, images, found)
    return ascent.join_parts(x), all_settled.index_copy_(0, images, is_settled)


def count_iterations(side: int) -> int:
    """Return the most iterations for a grid. side: the larger one."""
    return next((steps for largest, steps in ITERATIONS.items() if side <= largest), 4 * side)


@cache
def step_lengths(layers: int, device: torch.device) -> torch.Tensor:
    """Return the step lengths (K, K) of the flows between all pairs of layers."""
    layer = torch.arange(layers, device=device)
    share = PAIR_SHARE ** (layer.unsqueeze(1) - layer).abs().float()
    return RATE / 2 * share / share.sum(1).max()


def momentum_after(iteration: int, side: int) -> float:
    """Return the momentum after an iteration, counted from 1. side: the larger one of the grid."""
    return min((iteration - 1) / (iteration + 2), highest_momentum(side))


def highest_momentum(side: int) -> float:
    return 1 - 2.4 / max(side, 16)


def split_by_parity(grid: torch.Tensor) -> torch.Tensor:
    """Split a grid (..., 2h, 2w, B) into even and odd rows and columns: (2, 2, ..., hw, B)."""
    return grid.unflatten(-3, (-1, 2)).unflatten(-2, (-1, 2)).movedim((-4, -2), (0, 1)).flatten(-3, -2)


class Blocks(NamedTuple):
    """A value of all blocks, and views of it at the two ends of the edges of each colour."""

    all: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]


class DualAscent:
    """The flows and x of the images that ascend together. The rule is in the module docstring.

    The grid is split by the parity of row and column into 2 x 2 parts, so that a colour of edges joins two of them. A
    part is stored as one row of cells x batch, so that a neighbour is a fixed offset away and each operation runs over
    long stretches. One row of the grid is added at its end. Edges that leave the grid weigh 0.
    """

    def __init__(self, f: torch.Tensor, down: torch.Tensor, right: torch.Tensor):
        layers, rows, columns, batch = f.shape
        height, width = rows + rows % 2, columns + columns % 2
        self.grid, self.iteration, self.tolerance = (rows, columns), 0, TOLERANCE * f[..., 0].numel()
        self.steps = step_lengths(layers, f.device).view(layers, layers, 1)
        cells = f.new_zeros(layers, height + 2, width, batch)
        cells[:, :rows, :columns] = f
        edges = f.new_zeros(2, height, width, batch)  # to the right, down
        edges[0, :rows, : columns - 1], edges[1, : rows - 1, :columns] = right, down
        right, down = split_by_parity(edges).transpose(0, 2).transpose(1, 2)
        upper = torch.stack([right[:, 0], down[0], right[:, 1], down[1]])
        cost = split_by_parity(cells)
        flows = f.new_zeros(2, 4, 2, layers, layers, *upper.shape[2:])
        self.allocate(-cost, -cost, cost, upper, *flows)
        for (first, second), weight in zip(self.pair_up(self.cost), self.upper, strict=True):
            first.add_(weight, alpha=layers)
            second.add_(weight, alpha=layers)

    def allocate(self, x, previous, cost, upper, flows, extrapolated) -> None:
        """Set the state, with the images as the last dimension, and allocate the buffers.

        x, its value one iteration ago and cost, f + K (sum of a at the block): (2, 2, K, cells + padding, B); upper,
        the bounds a of the flows: (4, 2, cells, B), for each colour; flows and extrapolated (4, 2, K, K, cells, B).
        """
        self.batch, self.size = x.shape[-1], upper[0, 0].numel()
        self.x, self.previous = (Blocks(one, self.pair_up(one)) for one in (x.flatten(-2), previous.flatten(-2)))
        self.cost, self.upper = cost.flatten(-2), upper.view(4, 2, 1, 1, -1)
        self.bounds = [(-bound, bound) for bound in self.upper]
        self.flows = list(flows.flatten(-2))
        self.extrapolated = [(one, one.split(1, 2), one.split(1, 1)) for one in extrapolated.flatten(-2)]
        self.spare = torch.empty_like(self.flows[0])
        self.u, labels = torch.empty_like(self.cost), torch.empty_like(self.cost[:, :, :1])
        self.labels, self.coupling = Blocks(labels, self.pair_up(labels)), torch.empty_like(self.upper)

    def keep(self, images: torch.Tensor) -> None:
        """Go on with these images only. images: indices, (B',) long."""
        state = (self.x.all, self.previous.all, self.cost, self.upper.view(4, 2, -1))
        state += (torch.stack(self.flows), torch.stack([one for one, *_ in self.extrapolated]))
        self.allocate(*(tensor.unflatten(-1, (-1, self.batch)).index_select(-1, images) for tensor in state))

    def pair_up(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the blocks at the two ends of the edges of each colour, (2, K, 1, size) and (2, 1, K, size)."""
        here, beside = x[..., : self.size], x[..., self.batch : self.batch + self.size]
        below = x[..., x.shape[-1] - self.size :]
        ends = (here[:, 0], here[:, 1]), (here[0], here[1]), (here[:, 1], beside[:, 0]), (here[1], below[0])
        return [(first.unsqueeze(2), second.unsqueeze(1)) for first, second in ends]

    def advance(self, iterations: int) -> None:
        """Make some iterations. x belongs to the extrapolated flows, and after an update to the updated flows."""
        for _ in range(iterations):
            self.iteration += 1
            weight = 1 + momentum_after(self.iteration, max(self.grid))
            for colour, ((first, second), (lower, upper)) in enumerate(zip(self.x.pairs, self.bounds, strict=True)):
                updated, flows = self.spare, self.flows[colour]
                extrapolated, outgoing, incoming = self.extrapolated[colour]
                torch.sub(first, second, out=updated)
                torch.addcmul(extrapolated, updated, self.steps, out=updated)
                torch.clamp(updated, lower, upper, out=updated)
                extrapolated.sub_(updated)
                for change in outgoing:
                    first.add_(change)
                for change in incoming:
                    second.sub_(change)
                torch.lerp(flows, updated, weight, out=extrapolated)
                self.flows[colour], self.spare = updated, flows
            torch.lerp(self.previous.all, self.x.all, weight, out=self.previous.all)
            self.x, self.previous = self.previous, self.x

    def get_x(self) -> torch.Tensor:
        """Return a view of x of the flows, (2, 2, K, cells + padding, B)."""
        return self.previous.all.unflatten(-1, (-1, self.batch))

    def join_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of get_x() as a grid (K, n, n, B)."""
        rows, columns = self.grid
        cells = x.unflatten(-2, (-1, (columns + 1) // 2)).permute(2, 3, 0, 4, 1, 5)
        return cells.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]

    def compute_gap(self) -> torch.Tensor:
        """Return energy - bound (B,) of u = [x > 0].

        The coupling of all pairs of layers depends on the sums S of u over the layers only: a (K S + K S' - 2 S S').
        """
        torch.gt(self.previous.all, 0, out=self.u)
        torch.sum(self.u, 2, keepdim=True, out=self.labels.all)
        for product, (first, second) in zip(self.coupling, self.labels.pairs, strict=True):
            torch.mul(first, second, out=product)
        coupling = self.coupling.mul_(self.upper)
        gap = self.previous.all.clamp_min(0).addcmul_(self.u, self.cost)
        gap, coupling = (terms.view(-1, self.batch).sum(0) for terms in (gap, coupling))
        return gap - 2 * coupling
