"""Co-Mixup's solver on CUDA: solve() of mixing/solvers/comixup_labelling.py by the kernels of comixup_rounds.py.

A round of simultaneous moves is three launches, whatever the number of parts. Where inputs are ranked, the first of
equal ones wins; torch leaves open which one does.
"""

from typing import NamedTuple

import torch
import triton

from ..solvers import comixup_labelling
from ..solvers.binary_grid import STEPS
from ..solvers.comixup_energy import Energy, Labelling, build_energy
from ..solvers.comixup_labelling import (
    GOLOMB_RULERS,
    OFFERED,
    REOFFERED,
    START_NOISE,
    find_coarse_blocks,
)
from ..solvers.comixup_moves import EXACT_SIDE
from . import launch
from .comixup_rounds import (
    carry_kernel,
    duplicate_kernel,
    expand_kernel,
    offer_kernel,
    select_kernel,
    start_kernel,
)

MAX_SIDE, MAX_INPUTS = 16, 128  # of a grid, and of a part
LABELS_TOGETHER = {True: 4, False: 1}  # whether binary problems are solved exactly -> labels of a program
power = triton.next_power_of_2


class State(NamedTuple):
    """A labelling of each of G groups of m outputs: one for each part, or for each of its initial labellings."""

    labels: torch.Tensor  # (G m, 2, h w) int32: the two inputs of each block, in ascending order
    counts: torch.Tensor  # (G m, m): blocks taken from each input
    value: torch.Tensor  # (G,): F


@torch.no_grad()
def solve(
    cost: torch.Tensor,
    compatibility: torch.Tensor,
    order: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    thres: float,
    thres_type: str = "hard",
    rounds: int = 8,
    resolve: bool = True,
) -> Labelling:
    """As mixing.solvers.comixup_labelling.solve(), which also solves problems that are too large for a program."""
    parts, m, h, w = cost.shape
    if max(h, w) > MAX_SIDE or m > MAX_INPUTS:
        problem = {"beta": beta, "gamma": gamma, "thres": thres, "thres_type": thres_type}
        return comixup_labelling.solve(cost, compatibility, order, rounds=rounds, resolve=resolve, **problem)
    energy = build_energy(cost, compatibility, beta, gamma, thres, thres_type)
    compatibility = compatibility.contiguous()
    tall, wide = find_coarse_blocks(h, w)
    coarse, first_rounds = energy.coarsen(tall, wide), max(rounds // 2, 1)
    state = run_rounds(start(coarse, order), coarse, compatibility, first_rounds, hard_rounds=1)
    if tall * wide > 1:
        state = run_rounds(carry(state, parts, coarse), coarse, compatibility, rounds - first_rounds)
        first_rounds = 0
    state = carry(state, parts, energy, tall, wide)
    state = run_rounds(state, energy, compatibility, max(rounds - first_rounds - resolve, 0))
    value = state.value
    if resolve:
        state, extra = carry(state, parts, energy), torch.empty_like(state.counts)
        launch(duplicate_kernel, (parts * m,), state.counts, extra, energy.diversity, m, INPUTS=power(m), num_warps=1)
        state = run_rounds(state, energy, compatibility, 1, extra)
        value = state.value - (extra * state.counts).view(parts, -1).sum(1)
    sources = state.labels.view(parts, m, 2, h, w).permute(0, 1, 3, 4, 2).long()
    return Labelling(sources, state.counts.view(parts, m, m), value)


def make_state(energy: Energy, groups: int) -> State:
    """Return an empty State for the grid and the inputs of an Energy."""
    unary = energy.unary
    h, w, _, _, m = unary.shape
    labels = torch.empty(groups * m, 2, h * w, dtype=torch.int32, device=unary.device)
    return State(labels, unary.new_empty(groups * m, m), unary.new_empty(groups))


def start(energy: Energy, order: torch.Tensor) -> State:
    """Return the initial labellings of initial_labels(), one for each row of order (P, S, m)."""
    h, w, parts, _, m = energy.unary.shape
    starts = order.shape[1]
    ruler = next(ruler for minimum, ruler in GOLOMB_RULERS.items() if m >= minimum)
    state = make_state(energy, parts * starts)
    launch(
        start_kernel,
        (len(state.labels),),
        *(energy.unary, order.contiguous(), state.labels, state.counts),
        *(energy.smoothness, START_NOISE / starts, parts, starts, m),
        RULER=sum(mark << 4 * number for number, mark in enumerate(ruler)),
        MARKS=len(ruler),
        **{"H": h, "W": w, "HEIGHT": power(h), "WIDTH": power(w)},
        INPUTS=power(m),
        num_warps=1,
    )
    return state


def carry(state: State, parts: int, energy: Energy, tall: int = 1, wide: int = 1) -> State:
    """Return the best labelling of each part on the grid of an Energy, with tall x wide blocks for each. No value."""
    h, w, _, _, m = energy.unary.shape
    starts = len(state.value) // parts
    result = make_state(energy, parts)
    launch(
        carry_kernel,
        (parts * m,),
        *(*state, result.labels, result.counts, starts, m, h, w, tall, wide),
        STARTS=power(starts),
        BLOCKS=power(h * w),
        INPUTS=power(m),
        num_warps=1,
    )
    return result


def run_rounds(
    state: State,
    energy: Energy,
    compatibility: torch.Tensor,
    rounds: int,
    extra: torch.Tensor | None = None,
    hard_rounds: int = 0,
) -> State:
    """As comixup_labelling.run_rounds(). The labels and counts of `state` are overwritten."""
    search = Search(state, energy, compatibility, extra)
    for number in range(rounds):
        search.offer(try_soft=number >= hard_rounds)
        search.expand()
        search.select(number, move=True)
    search.offer(try_soft=False)  # evaluates the last labelling
    search.select(rounds, move=False)
    return search.best


class Search:
    """The arrays of comixup_rounds.py and the launches of its kernels, for rounds that begin at one State."""

    def __init__(self, state: State, energy: Energy, compatibility: torch.Tensor, extra: torch.Tensor | None):
        h, w, parts, _, m = energy.unary.shape
        self.state, self.energy, self.compatibility, self.extra = state, energy, compatibility, extra
        self.groups, outputs = len(state.value), len(state.labels)
        self.grid, self.repeats = (h, w), (parts, self.groups // parts, m)
        self.hard, self.reoffered, self.soft = min(OFFERED, m), min(OFFERED, REOFFERED, m), min(3, m)
        self.tried = most = self.hard + self.reoffered + self.soft * (self.soft - 1) // 2  # labels of an output
        self.words = triton.cdiv(m, 32)  # of 32 bits, one for each input
        floats, ints = state.counts.new_empty, state.labels.new_empty
        self.overlap, self.unit, self.value = floats(outputs * m), floats(outputs * m), floats(outputs)
        self.step, self.gain = floats(outputs * most * m), floats(outputs * most)
        self.offered, self.touched = ints(outputs * most * 2), ints(outputs * most * self.words)
        self.blocks = ints(outputs * most * h * w)
        self.best = make_state(energy, self.groups)
        inputs = power(m)
        self.tile = {"CHUNK": max(16, min(power(h * w), 2048 // inputs)), "INPUTS": inputs}
        self.warps = min(max(max(self.tile.values()) * inputs // 256, 1), 8)

    def offer(self, try_soft: bool) -> None:
        energy, state, soft = self.energy, self.state, self.soft if try_soft else 0
        self.tried = self.hard + self.reoffered + soft * (soft - 1) // 2
        launch(
            offer_kernel,
            (len(state.labels),),
            *(energy.unary, self.compatibility, self.extra, state.labels, state.counts, self.overlap, self.unit),
            *(self.value, self.offered, energy.smoothness, energy.diversity, energy.shift, energy.level),
            *(*self.repeats, *self.grid),
            **{"LABELS": self.tried, "HARD": self.hard, "REOFFERED": self.reoffered, "SOFT": soft},
            **self.tile,
            num_warps=self.warps,
        )

    def expand(self) -> None:
        energy, state, (h, w) = self.energy, self.state, self.grid
        exact, steps = max(h, w) <= EXACT_SIDE, STEPS[0 if max(h, w) <= 8 else 1]
        together = LABELS_TOGETHER[exact]
        launch(
            expand_kernel,
            (len(state.labels), triton.cdiv(self.tried, together)),
            *(energy.unary, self.compatibility, state.labels, state.counts, self.overlap, self.unit, self.offered),
            *(self.blocks, self.step, self.gain, self.touched, energy.smoothness, energy.diversity, energy.level),
            *(*self.repeats, self.tried, self.hard, self.reoffered, steps, self.words, h, w),
            **{"H": h if exact else 0, "W": w if exact else 0, "HEIGHT": power(h), "WIDTH": power(w)},
            **{"EXACT": exact, "LABELS": together, "INPUTS": self.tile["INPUTS"]},
            num_warps=1,
        )

    def select(self, number: int, move: bool) -> None:
        launch(
            select_kernel,
            (self.groups,),
            *(self.state.labels, self.state.counts, self.value, self.offered, self.blocks, self.step, self.gain),
            *(self.touched, *self.best, number, self.repeats[2], self.tried, self.words, self.grid[0] * self.grid[1]),
            **{"MOVE": move, "LABELS": power(self.tried)},
            **self.tile,
            num_warps=self.warps,
        )
