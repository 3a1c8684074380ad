"""Expansion moves on a labelling of Co-Mixup: a new label on the best set of blocks of one output.

The outputs of all parts of a batch are the last dimension but one, Q = P m of them (see comixup_energy.py). With v the
new label and x_k = 1 on the blocks that take it, the change of F, its diversity term linearised, is a binary problem
on the grid, sum_k g_k x_k + sum_kk' J_kk' x_k x_k', which binary_grid.py solves.
"""

from functools import cache

import torch

from mixing.solvers.binary_grid import solve_binary_approximately, solve_binary_exact

EXACT_SIDE = 4  # largest grid whose binary problems are solved exactly
REOFFER_COST = 0.8  # of a block of an input that is offered again, in units of 1 / N, the mean price of a block
PAIR_BONUS = 5e-4  # for a block of a half-and-half label; as the cost, only while the blocks of a move are chosen


class ExpansionMoves:
    """The moves from a labelling z (h, w, Q, m), given the price (h, w, Q, m) of every input on every block."""

    def __init__(self, z: torch.Tensor, price: torch.Tensor, smoothness: float):
        self.z, self.price, self.smoothness = z, price, smoothness
        self.current = (z * price).sum(-1)  # (h, w, Q)
        self.norm = smoothness * (z * z).sum(-1)
        self.down = smoothness * (z[1:] * z[:-1]).sum(-1)  # b z_k . z_k'
        self.right = smoothness * (z[:, 1:] * z[:, :-1]).sum(-1)
        self.degree = degrees(*z.shape[:2], z.device)  # (h, w, 1): neighbours of a block

    def smoothness_term(self) -> torch.Tensor:
        """(Q,) the smoothness term of every output."""
        return (self.norm * self.degree).sum((0, 1)) / 2 - self.down.sum((0, 1)) - self.right.sum((0, 1))

    def input_gains(self) -> torch.Tensor:
        """(Q, m): what an output would gain by each input on all blocks where that is cheaper than what is there."""
        return (self.current.unsqueeze(3) - self.price).relu_().sum((0, 1))

    def find_blocks(
        self, whole: torch.Tensor, paired: torch.Tensor | None = None, reoffered: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best blocks for each of C new labels: (h, w, Q, C) of 0 and 1, and the change of price, (Q, C).

        whole (Q, K): inputs offered as whole labels; the last `reoffered` of them carry REOFFER_COST. paired (Q, 2 or
        3): inputs of which every pair is offered too, half and half.
        """
        z, degree, blocks = self.z, self.degree.unsqueeze(3), self.z.shape[0] * self.z.shape[1]
        index = whole if paired is None else torch.cat([whole, paired], 1)
        index = index.expand(*z.shape[:2], -1, -1)
        inner, price = z.gather(3, index), self.price.gather(3, index)  # z_k . v, and the price of v
        length = self.smoothness  # b |v|^2
        bias = selection_bias(whole.shape[1], 0 if paired is None else paired.shape[1], reoffered, blocks, z.device)
        if paired is not None:
            first, second = label_inputs(whole.shape[1], paired.shape[1], z.device)
            inner = inner.index_select(3, first).add_(inner.index_select(3, second)).mul_(self.smoothness / 2)
            price = price.index_select(3, first).add_(price.index_select(3, second)).mul_(0.5)
            length = ((first == second).to(z.dtype) + 1) * (self.smoothness / 2)
        else:
            inner = inner.mul_(self.smoothness)
        own = (self.norm * self.degree).mul_(-0.5).sub_(self.current)  # what the labels that give way cost
        own[1:].add_(self.down)
        own[:-1].add_(self.down)
        own[:, 1:].add_(self.right)
        own[:, :-1].add_(self.right)
        g = price.add_(degree * (length / 2) + bias).add_(own.unsqueeze(3))
        g[1:].sub_(inner[:-1])
        g[:-1].sub_(inner[1:])
        g[:, 1:].sub_(inner[:, :-1])
        g[:, :-1].sub_(inner[:, 1:])
        down = (inner[1:] + inner[:-1]).sub_(self.down.unsqueeze(3)).sub_(length)
        right = (inner[:, 1:] + inner[:, :-1]).sub_(self.right.unsqueeze(3)).sub_(length)
        minimise = solve_binary_exact if max(z.shape[:2]) <= EXACT_SIDE else solve_binary_approximately
        x, value = minimise(g.flatten(2), down.flatten(2), right.flatten(2))
        return x.view(g.shape), value.view(g.shape[2:]) - bias * x.sum((0, 1)).view(g.shape[2:])


def build_labels(whole: torch.Tensor, paired: torch.Tensor | None, m: int) -> torch.Tensor:
    """(Q, C, m): the labels that find_blocks() tries, for its arguments."""
    if paired is None:
        return one_hot(whole, m)
    first, second = label_inputs(whole.shape[1], paired.shape[1], whole.device)
    vectors = one_hot(torch.cat([whole, paired], 1), m)
    return (vectors.index_select(1, first) + vectors.index_select(1, second)) * 0.5


def one_hot(index: torch.Tensor, count: int) -> torch.Tensor:
    """(...) long -> (..., count) float32. Unlike torch's it never asks the device for the largest index."""
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()


@cache
def label_inputs(whole: int, paired: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the two inputs of every label offered: `whole` single ones, then all pairs of the `paired` next."""
    two = [(i, i) for i in range(whole)]
    two += [(whole + i, whole + j) for i in range(paired) for j in range(i + 1, paired)]
    return tuple(torch.tensor(column, device=device) for column in zip(*two, strict=True))


@cache
def selection_bias(whole: int, paired: int, reoffered: int, blocks: int, device: torch.device) -> torch.Tensor:
    """(C,): what a block of every label offered costs more, or less, while the blocks of a move are chosen."""
    pairs = paired * (paired - 1) // 2
    costs = [0.0] * (whole - reoffered) + [REOFFER_COST / blocks] * reoffered + [-PAIR_BONUS] * pairs
    return torch.tensor(costs, device=device)


@cache
def degrees(h: int, w: int, device: torch.device) -> torch.Tensor:
    """(h, w, 1): how many neighbours a block has."""
    row = torch.full((h, 1, 1), 2.0)
    row[0] -= 1
    row[-1] -= 1
    column = torch.full((1, w, 1), 2.0)
    column[:, 0] -= 1
    column[:, -1] -= 1
    return (row + column).to(device)
