"""Co-Mixup's solver: labels of low objective F (comixup_energy.py) for all outputs of all parts of a batch at once.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 4. A move puts one new label on the best set of blocks of one output
(comixup_moves.py). Moves that change the counts of different inputs do not disturb each other, so the best ones of each
round are made together. The diversity term, which is supermodular, is linearised at the labels of each round.
"""

from functools import cache

import torch
from torch.nn import functional as F

from mixing.solvers.comixup_energy import Energy, Labelling, build_energy
from mixing.solvers.comixup_moves import EXACT_SIDE, ExpansionMoves, build_labels, one_hot

GOLOMB_RULERS = {13: (0, 1, 4, 6), 7: (0, 1, 3), 2: (0, 1)}  # inputs at least -> offsets, all differences distinct
OFFERED = 4  # inputs offered to an output in a round
REOFFERED = 4  # as many of these are offered once more, for fewer blocks: more than that may not fit
SELECTION_PASSES = 3  # in which the moves of a round are selected
MIN_GAIN = 1e-6
START_NOISE = 0.4  # largest relative change of the prices of an input in the last start


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
    """A labelling of low F for each of P parts of m >= 2 inputs, by simultaneous expansion moves.

    cost (P, m, h, h) and compatibility (P, m, m) as in objective(), float32; order (P, S, m): random permutations of
    the inputs, from which S labellings of every part start. After half of the rounds only the best of them is pursued.
    On grids larger than EXACT_SIDE all rounds are made with larger blocks first, and then all again. resolve: in the
    last round, outputs that show the very same inputs are pulled apart. Memory grows as P S m^3. Raises ValueError for
    an unknown thres_type.
    """
    parts, m, h, w = cost.shape
    energy = build_energy(cost, compatibility, beta, gamma, thres, thres_type)
    side = max(n for n in range(1, EXACT_SIDE + 1) if h % n == 0 and w % n == 0)
    tall, wide = h // side, w // side
    first_rounds = max(rounds // 2, 1)
    coarse = energy.coarsen(tall, wide)
    starts = coarse.repeat(order.shape[1])
    z, value = run_rounds(initial_labels(starts, order), starts, first_rounds, whole_rounds=1)
    z = select_best_starts(z, value.view(parts, -1))
    if tall * wide > 1:
        z, _ = run_rounds(z, coarse, rounds - first_rounds)
        z = z.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        first_rounds = 0
    z, value = run_rounds(z, energy, max(rounds - first_rounds - resolve, 0))
    if resolve:
        extra = energy.diversity * duplicate_penalty(count_blocks(z, parts))
        z, value = run_rounds(z, energy, 1, extra)
        value = value - (extra * count_blocks(z, parts)).sum((1, 2))
    return to_labelling(z, value, parts)


def count_blocks(z: torch.Tensor, parts: int) -> torch.Tensor:
    """n (P, m, m): the blocks that each output takes from each input, for labels z (h, w, P m, m)."""
    return z.sum((0, 1)).view(parts, z.shape[3], z.shape[3])


def initial_labels(energy: Energy, order: torch.Tensor) -> torch.Tensor:
    """(h, w, Q, m) labels in which two outputs share at most one input.

    Output i is filled with input order[i]; inputs order[i + o] are then spread over it where saliency and smoothness
    want them, for the offsets o of a Golomb ruler. The prices of every input are scaled at random (by its number in
    order), from start to start more so: starts of few inputs would be alike otherwise. order (P, S, m); the S starts of
    a part follow each other.
    """
    h, w, parts, _, m = energy.unary.shape
    starts = order.shape[1]
    noise = torch.arange(1, starts + 1, device=order.device).mul(START_NOISE / starts).view(-1, 1)
    noise, order = noise.repeat(len(order), 1), order.flatten(0, 1)
    offsets = next(ruler for least, ruler in GOLOMB_RULERS.items() if m >= least)
    labels = torch.stack([order.roll(-offset, 1).flatten() for offset in offsets])  # (offsets, Q)
    z = one_hot(labels[0], m).expand(h, w, -1, -1).contiguous()
    scale = 1 - noise * (2 / (m - 1) * order - 1)
    price = (energy.unary * scale.unsqueeze(1)).expand(h, w, parts, m, m).reshape(z.shape)
    for label in labels[1:]:
        blocks, _ = ExpansionMoves(z, price, energy.smoothness).find_blocks(label.unsqueeze(1))
        z = torch.lerp(z, one_hot(label, m), blocks)
    return z


def select_best_starts(z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of S labellings of every part, z (h, w, P S m, m), those of lowest value (P, S): (h, w, P m, m)."""
    parts, starts = value.shape
    m = z.shape[3]
    index = value.min(1).indices + torch.arange(parts, device=z.device) * starts
    return z.unflatten(2, (-1, m)).index_select(2, index).flatten(2, 3)


def run_rounds(
    z: torch.Tensor, energy: Energy, rounds: int, extra: torch.Tensor | None = None, whole_rounds: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (h, w, Q, m) of lower F, and F itself, (P,), after some rounds of simultaneous moves. Sec. 4.

    extra (P, m, m): price of a block on top of the others, which F then includes. whole_rounds: number of rounds that
    offer no half-and-half labels.
    """
    parts, m = energy.unary.shape[2], energy.unary.shape[4]
    best, best_value = z, None
    buffer = z.new_empty(parts * m**3 * (min(OFFERED, m) + min(REOFFERED, m) + min(3, m)))
    for number in range(rounds + 1):
        counts = count_blocks(z, parts)
        overlap = energy.overlap(counts.sum(1, keepdim=True) - counts) - energy.shift  # q - shift
        penalty = energy.phi(overlap)
        unit = (
            2 * energy.diversity * penalty
        )  # third term, linearised: an output pays, and makes the others pay as much
        unit = unit if extra is None else unit + extra
        moves = ExpansionMoves(z, (energy.unary + unit).flatten(2, 3), energy.smoothness)
        value = moves.current.sum((0, 1)) + moves.smoothness_term()
        value = (value.view(parts, m) - energy.diversity * (penalty * counts).sum(2)).sum(1)
        if best_value is None:
            best_value = value
        else:
            lower = value < best_value
            best_value = torch.where(lower, value, best_value)
            best = torch.where(lower.view(-1, 1, 1).expand(-1, m, 1).reshape(-1, 1), z, best)
        if number == rounds:
            return best, best_value
        z = apply_moves(moves, energy, counts, overlap, penalty, buffer, halves=number >= whole_rounds)


def apply_moves(moves: ExpansionMoves, energy: Energy, counts, overlap, penalty, buffer, halves: bool) -> torch.Tensor:
    """The labels after one round. counts, overlap (q - shift) and penalty (phi): (P, m, m)."""
    parts, m, _ = counts.shape
    whole = moves.input_gains().topk(min(OFFERED, m), 1).indices
    whole = torch.cat([whole, whole[:, :REOFFERED]], 1)
    paired = counts.flatten(0, 1).topk(min(3, m), 1).indices if halves else None
    blocks, change = moves.find_blocks(whole, paired, reoffered=min(REOFFERED, m))
    label = build_labels(whole, paired, m)  # (Q, C, m)
    kept = (1 - blocks).permute(2, 3, 0, 1).flatten(2) @ moves.z.permute(2, 0, 1, 3).flatten(1, 2)
    step = torch.addcmul(kept - counts.view(-1, 1, m), label, blocks.sum((0, 1)).unsqueeze(2))  # of the counts
    step = step.view(parts, m, -1, m)
    gain = -objective_change(change, step, energy, counts, overlap, penalty, buffer)
    chosen, moved = select_moves(gain, step.permute(0, 3, 1, 2) != 0)
    chosen = chosen.flatten()
    blocks = blocks.gather(3, chosen.view(-1, 1).expand(*blocks.shape[:3], 1)) * moved.view(-1, 1)
    label = label.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1)
    return torch.lerp(moves.z, label, blocks)


def objective_change(change, step, energy: Energy, counts, overlap, penalty, buffer) -> torch.Tensor:
    """(P, m, C): the change of F by every move, with its effect on the other outputs.

    change (Q, C): of the linearised prices; step (P, m, C, m): of the output's counts; buffer: memory for m^3 C numbers
    per part, too many to allocate in every round.
    """
    parts, m, moves, _ = step.shape
    direct = (penalty.unsqueeze(2) * step).sum(3)  # phi(q) d n, which the linearised prices hold twice
    ahead = energy.overlap(step.flatten(1, 2))  # the step of every other output's q, (P, mC, m)
    own = (energy.phi(overlap.unsqueeze(2) + ahead.view(step.shape)) * counts.unsqueeze(2)).sum(3)
    before = (penalty * counts).sum(2)
    before = (before.sum(1, keepdim=True) - before).unsqueeze(2)
    later = buffer[: parts * m**3 * moves].view(parts, m, m, m * moves)
    torch.add(overlap.unsqueeze(3), ahead.mT.contiguous().unsqueeze(1), out=later)
    F.threshold_(later, energy.level, 0.0)
    others = (counts.view(parts, 1, m * m) @ later.flatten(1, 2)).view(parts, m, moves)
    return change.view(parts, m, moves) + energy.diversity * (others - own - before - direct)


def select_moves(gain: torch.Tensor, touched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves that can be made together: which one of each output, (P, m) long, and whether it is made, (P, m).

    gain (P, m, C): by how much each move lowers F; touched (P, m, m, C): whether it changes the count of an input
    (second dimension). No two chosen moves touch the same input. Equal gains go to the first output: identical outputs
    would swap for ever otherwise.
    """
    parts, m, moves = gain.shape
    touched = touched.to(gain.dtype)
    flat = touched.flatten(2)
    earlier = earlier_mask(m, gain.device)
    taken = gain.new_zeros(parts, 1, m)
    chosen, moved = None, None
    for turn in range(SELECTION_PASSES):
        best, index = gain.max(2)
        inputs = touched.gather(3, index.view(parts, 1, m, 1).expand(-1, m, -1, -1)).squeeze(3)  # (P, inputs, outputs)
        rival, mine = best.unsqueeze(1), best.unsqueeze(2)
        stronger = (rival > mine) | ((rival == mine) & earlier)
        blocked = ((inputs.mT @ inputs) * stronger).sum(2) > 0
        wins = (best > MIN_GAIN) & ~blocked
        chosen = index if chosen is None else torch.where(wins, index, chosen)
        moved = wins if moved is None else moved | wins
        if turn < SELECTION_PASSES - 1:
            taken = taken + (inputs * wins.unsqueeze(1)).sum(2).unsqueeze(1)
            free = ((taken @ flat).view(parts, m, moves) == 0) & ~moved.unsqueeze(2)
            gain = gain * free
    return chosen, moved


def duplicate_penalty(counts: torch.Tensor) -> torch.Tensor:
    """(P, m, m) 0 or 1: inputs that become more expensive to an output because another one shows the very same inputs.

    Of two such outputs the earlier one is kept from the first input of the set and the later one from the second.
    """
    shown = (counts > 0).to(counts.dtype)
    size = shown.sum(2, keepdim=True)
    common = shown @ shown.mT
    same = (common == size) & (common == size.mT) & (size > 1)
    earlier = earlier_mask(counts.shape[1], counts.device)
    nth = (counts > 0).long().cumsum(2) * (counts > 0)  # of integers: repeatable on every device
    first = (same & earlier.T).any(2, keepdim=True) & (nth == 1)
    second = (same & earlier).any(2, keepdim=True) & (nth == 2)
    return (first | second).to(counts.dtype)


def to_labelling(z: torch.Tensor, value: torch.Tensor, parts: int) -> Labelling:
    """Labels z (h, w, Q, m) as the pairs of inputs that they stand for."""
    m = z.shape[3]
    index = torch.arange(m, device=z.device, dtype=z.dtype)
    total = (z * (2 * index)).sum(-1)  # of the two indices
    last = ((z > 0) * index).amax(-1)
    sources = torch.stack([total - last, last], -1).long().unflatten(2, (parts, m))
    return Labelling(sources.permute(2, 3, 0, 1, 4), count_blocks(z, parts), value)


@cache
def earlier_mask(m: int, device: torch.device) -> torch.Tensor:
    """(m, m) bool: true where the column comes before the row."""
    return torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
