"""Expansion moves for Co-Mixup: give a new label to the best set of blocks of one output.

The outputs of all P parts of a batch, with m outputs each, share one dimension of size Q = P m. Let v be the new label
and x_k = 1 on the blocks that take it. The change of F, with its diversity term linearised, is then a binary problem on
the grid, sum_k g_k x_k + sum_kk' J_kk' x_k x_k'.
"""

from functools import cache

import torch

from .binary_grid import solve_binary_approximately, solve_binary_exact

EXACT_SIDE = 4  # largest grid whose binary problems are solved exactly
REOFFER_COST = 0.8  # extra cost per block of an input tried a second time, in units of 1 / N, the mean cost of a block
SOFT_BONUS = 5e-4  # per block of a soft label. Both only count while the blocks of a move are chosen


class ExpansionMoves:
    """The moves from labels z (h, w, Q, m), given the costs (h, w, Q, m) of showing each input on each block."""

    def __init__(self, z: torch.Tensor, costs: torch.Tensor, smoothness: float):
        self.z, self.costs, self.smoothness = z, costs, smoothness
        self.current = (z * costs).sum(-1)  # (h, w, Q)
        self.norm = smoothness * (z * z).sum(-1)
        self.down = smoothness * (z[1:] * z[:-1]).sum(-1)  # b z_k . z_k'
        self.right = smoothness * (z[:, 1:] * z[:, :-1]).sum(-1)
        self.degree = degrees(*z.shape[:2], z.device)  # (h, w, 1): neighbours of a block

    def smoothness_term(self) -> torch.Tensor:
        """Return the smoothness term of each output, (Q,)."""
        return (self.norm * self.degree).sum((0, 1)) / 2 - self.down.sum((0, 1)) - self.right.sum((0, 1))

    def input_gains(self) -> torch.Tensor:
        """Return an upper estimate of the gain by each input, (Q, m): shown on all blocks where it costs less."""
        return (self.current.unsqueeze(3) - self.costs).relu_().sum((0, 1))

    def find_blocks(
        self, hard: torch.Tensor, soft_inputs: torch.Tensor | None = None, reoffered: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best blocks for each of C new labels, (h, w, Q, C) of 0 and 1, and the change of the cost, (Q, C).

        hard (Q, K): inputs tried as hard labels; the last `reoffered` of them carry REOFFER_COST. soft_inputs (Q, 2 or
        3): inputs of which each pair is tried as a soft label.
        """
        # ---- The new labels v: z . v, cost and length ----
        z, degree, blocks = self.z, self.degree.unsqueeze(3), self.z.shape[0] * self.z.shape[1]
        index = hard if soft_inputs is None else torch.cat([hard, soft_inputs], 1)
        index = index.expand(*z.shape[:2], -1, -1)
        inner, costs = z.gather(3, index), self.costs.gather(3, index)  # z_k . v, and the cost of v
        length = self.smoothness  # b |v|^2
        num_soft = 0 if soft_inputs is None else soft_inputs.shape[1]
        bias = selection_bias(hard.shape[1], num_soft, reoffered, blocks, z.device)
        if soft_inputs is not None:
            first, second = label_inputs(hard.shape[1], soft_inputs.shape[1], z.device)
            inner = inner.index_select(3, first).add_(inner.index_select(3, second)).mul_(self.smoothness / 2)
            costs = costs.index_select(3, first).add_(costs.index_select(3, second)).mul_(0.5)
            length = ((first == second).to(z.dtype) + 1) * (self.smoothness / 2)
        else:
            inner = inner.mul_(self.smoothness)
        # ---- Coefficients g and J of the binary problems ----
        own = (self.norm * self.degree).mul_(-0.5).sub_(self.current)  # minus the cost of the labels that are replaced
        own[1:].add_(self.down)
        own[:-1].add_(self.down)
        own[:, 1:].add_(self.right)
        own[:, :-1].add_(self.right)
        g = costs.add_(degree * (length / 2) + bias).add_(own.unsqueeze(3))
        g[1:].sub_(inner[:-1])
        g[:-1].sub_(inner[1:])
        g[:, 1:].sub_(inner[:, :-1])
        g[:, :-1].sub_(inner[:, 1:])
        down = (inner[1:] + inner[:-1]).sub_(self.down.unsqueeze(3)).sub_(length)
        right = (inner[:, 1:] + inner[:, :-1]).sub_(self.right.unsqueeze(3)).sub_(length)
        # ---- Solution ----
        minimise = solve_binary_exact if max(z.shape[:2]) <= EXACT_SIDE else solve_binary_approximately
        x, value = minimise(g.flatten(2), down.flatten(2), right.flatten(2))
        return x.view(g.shape), value.view(g.shape[2:]) - bias * x.sum((0, 1)).view(g.shape[2:])


def build_labels(hard: torch.Tensor, soft_inputs: torch.Tensor | None, m: int) -> torch.Tensor:
    """Return the labels that find_blocks() tries, (Q, C, m). Arguments as there."""
    if soft_inputs is None:
        return one_hot(hard, m)
    first, second = label_inputs(hard.shape[1], soft_inputs.shape[1], hard.device)
    vectors = one_hot(torch.cat([hard, soft_inputs], 1), m)
    return (vectors.index_select(1, first) + vectors.index_select(1, second)) * 0.5


def one_hot(index: torch.Tensor, count: int) -> torch.Tensor:
    """One-hot encode (...) long as (..., count) float32. Unlike torch's function it never waits for the device."""
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()


@cache
def label_inputs(hard: int, soft_inputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of the two inputs of each label tried, each (C,) long.

    First the `hard` single inputs, then all pairs of the `soft_inputs` inputs after them.
    """
    two = [(i, i) for i in range(hard)]
    two += [(hard + i, hard + j) for i in range(soft_inputs) for j in range(i + 1, soft_inputs)]
    return tuple(torch.tensor(column, device=device) for column in zip(*two, strict=True))


@cache
def selection_bias(hard: int, soft_inputs: int, reoffered: int, blocks: int, device: torch.device) -> torch.Tensor:
    """Return the extra cost per block of each label tried, (C,), which only counts while the blocks are chosen."""
    pairs = soft_inputs * (soft_inputs - 1) // 2
    costs = [0.0] * (hard - reoffered) + [REOFFER_COST / blocks] * reoffered + [-SOFT_BONUS] * pairs
    return torch.tensor(costs, device=device)


@cache
def degrees(h: int, w: int, device: torch.device) -> torch.Tensor:
    """Return the number of neighbours of each block, (h, w, 1)."""
    row = torch.full((h, 1, 1), 2.0)
    row[0] -= 1
    row[-1] -= 1
    column = torch.full((1, w, 1), 2.0)
    column[:, 0] -= 1
    column[:, -1] -= 1
    return (row + column).to(device)
