"""Co-Mixup's solver: find labels of low objective F for all outputs of a batch at once.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 4. As in the paper, the supermodular diversity term is linearised at the
current labels, once per round. An expansion move then gives one new label to the best set of blocks of one output. The
paper updates one output after the other; here the best moves of all outputs are made together, as long as they change
the counts of different inputs, because such moves do not affect each other.
"""

from functools import cache

import torch
from torch.nn import functional as F

from .comixup_energy import Energy, Labelling, build_energy
from .comixup_moves import EXACT_SIDE, ExpansionMoves, build_labels, one_hot

# minimum number of inputs -> offsets, all of whose differences are distinct
GOLOMB_RULERS = {13: (0, 1, 4, 6), 7: (0, 1, 3), 2: (0, 1)}
OFFERED = 4  # inputs tried for each output in a round
REOFFERED = 4  # of these, tried again on fewer blocks, because a larger move may exceed the threshold
SELECTION_PASSES = 3  # greedy passes that select the moves of a round
MIN_GAIN = 1e-6  # smallest decrease of F for which a move is made
START_NOISE = 0.4  # largest relative change of the costs of an input in the last initial labelling


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
    """Return a labelling of low F for each of P parts of m >= 2 inputs, found by simultaneous expansion moves.

    cost (P, m, h, h) and compatibility (P, m, m), float32: see build_energy(). order (P, S, m): random permutations of
    the inputs, one for each of S initial labellings per part. After half of the rounds only the best labelling of each
    part is continued. On grids larger than EXACT_SIDE all rounds are first run with larger blocks and then again with
    the real ones. resolve: separate outputs that show the same set of inputs, in the last round. Memory grows as P S
    m^3. Raises ValueError for an unknown thres_type.
    """
    parts, m, h, w = cost.shape
    energy = build_energy(cost, compatibility, beta, gamma, thres, thres_type)
    tall, wide = find_coarse_blocks(h, w)
    first_rounds = max(rounds // 2, 1)
    coarse = energy.coarsen(tall, wide)
    starts = coarse.repeat(order.shape[1])
    z, value = run_rounds(initial_labels(starts, order), starts, first_rounds, hard_rounds=1)
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


def find_coarse_blocks(h: int, w: int) -> tuple[int, int]:
    """Return the size in blocks of the larger blocks of which a grid of h x w consists, at most EXACT_SIDE a side."""
    side = max(n for n in range(1, EXACT_SIDE + 1) if h % n == 0 and w % n == 0)
    return h // side, w // side


def count_blocks(z: torch.Tensor, parts: int) -> torch.Tensor:
    """Return n (P, m, m), the blocks that each output takes from each input, for labels z (h, w, P m, m)."""
    return z.sum((0, 1)).view(parts, z.shape[3], z.shape[3])


def initial_labels(energy: Energy, order: torch.Tensor) -> torch.Tensor:
    """Return initial labels (h, w, Q, m) in which any two outputs share at most one input.

    Output i is filled with input order[i]. The inputs order[i + o], for the offsets o of a Golomb ruler, are then given
    the blocks where they lower the unary and smoothness terms. The costs of each input are scaled at random, more so
    from one initial labelling to the next: with few inputs these would otherwise be alike. order (P, S, m); the S
    labellings of a part follow each other.
    """
    h, w, parts, _, m = energy.unary.shape
    starts = order.shape[1]
    noise = torch.arange(1, starts + 1, device=order.device).mul(START_NOISE / starts).view(-1, 1)
    noise, order = noise.repeat(len(order), 1), order.flatten(0, 1)
    offsets = next(ruler for minimum, ruler in GOLOMB_RULERS.items() if m >= minimum)
    labels = torch.stack([order.roll(-offset, 1).flatten() for offset in offsets])  # (offsets, Q)
    z = one_hot(labels[0], m).expand(h, w, -1, -1).contiguous()
    scale = 1 - noise * (2 / (m - 1) * order - 1)
    costs = (energy.unary * scale.unsqueeze(1)).expand(h, w, parts, m, m).reshape(z.shape)
    for label in labels[1:]:
        blocks, _ = ExpansionMoves(z, costs, energy.smoothness).find_blocks(label.unsqueeze(1))
        z = torch.lerp(z, one_hot(label, m), blocks)
    return z


def select_best_starts(z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the labelling of lowest value (P, S) of each part, (h, w, P m, m), of those in z (h, w, P S m, m)."""
    parts, starts = value.shape
    m = z.shape[3]
    index = value.min(1).indices + torch.arange(parts, device=z.device) * starts
    return z.unflatten(2, (-1, m)).index_select(2, index).flatten(2, 3)


def run_rounds(
    z: torch.Tensor, energy: Energy, rounds: int, extra: torch.Tensor | None = None, hard_rounds: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run rounds of simultaneous moves (Sec. 4). Returns the best labels seen, (h, w, Q, m), and their F, (P,).

    extra (P, m, m): additional cost per block of an output showing an input, which F then includes. hard_rounds: number
    of first rounds that try no soft labels.
    """
    parts, m = energy.unary.shape[2], energy.unary.shape[4]
    best, best_value = z, None
    buffer = z.new_empty(parts * m**3 * (min(OFFERED, m) + min(REOFFERED, m) + min(3, m)))
    for number in range(rounds + 1):
        counts = count_blocks(z, parts)
        overlap = energy.overlap(counts.sum(1, keepdim=True) - counts) - energy.shift  # q - shift
        penalty = energy.phi(overlap)
        # the linearised diversity term: a block costs its output and, as much again, the other outputs
        unit = 2 * energy.diversity * penalty
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
        z = apply_moves(moves, energy, counts, overlap, penalty, buffer, try_soft=number >= hard_rounds)


def apply_moves(
    moves: ExpansionMoves, energy: Energy, counts, overlap, penalty, buffer, try_soft: bool
) -> torch.Tensor:
    """Return the labels after one round of moves.

    counts, overlap (q - shift) and penalty (phi), (P, m, m), are those of the current labels.
    """
    parts, m, _ = counts.shape
    hard = moves.input_gains().topk(min(OFFERED, m), 1).indices
    hard = torch.cat([hard, hard[:, :REOFFERED]], 1)
    soft_inputs = counts.flatten(0, 1).topk(min(3, m), 1).indices if try_soft else None
    blocks, change = moves.find_blocks(hard, soft_inputs, reoffered=min(REOFFERED, m))
    label = build_labels(hard, soft_inputs, m)  # (Q, C, m)
    kept = (1 - blocks).permute(2, 3, 0, 1).flatten(2) @ moves.z.permute(2, 0, 1, 3).flatten(1, 2)
    step = torch.addcmul(kept - counts.view(-1, 1, m), label, blocks.sum((0, 1)).unsqueeze(2))  # change of the counts
    step = step.view(parts, m, -1, m)
    gain = -objective_change(change, step, energy, counts, overlap, penalty, buffer)
    chosen, moved = select_moves(gain, step.permute(0, 3, 1, 2) != 0)
    chosen = chosen.flatten()
    blocks = blocks.gather(3, chosen.view(-1, 1).expand(*blocks.shape[:3], 1)) * moved.view(-1, 1)
    label = label.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1)
    return torch.lerp(moves.z, label, blocks)


def objective_change(change, step, energy: Energy, counts, overlap, penalty, buffer) -> torch.Tensor:
    """Return the change of F by each move, (P, m, C), including its effect on the other outputs.

    change (Q, C): change of the linearised F; step (P, m, C, m): change of the counts of the output. buffer: memory for
    m^3 C numbers per part, too many to allocate in each round.
    """
    parts, m, moves, _ = step.shape
    direct = (penalty.unsqueeze(2) * step).sum(3)  # phi(q) dn, which the linearised costs contain twice
    ahead = energy.overlap(step.flatten(1, 2))  # change of q of all other outputs, (P, mC, m)
    own = (energy.phi(overlap.unsqueeze(2) + ahead.view(step.shape)) * counts.unsqueeze(2)).sum(3)
    before = (penalty * counts).sum(2)
    before = (before.sum(1, keepdim=True) - before).unsqueeze(2)
    later = buffer[: parts * m**3 * moves].view(parts, m, m, m * moves)
    torch.add(overlap.unsqueeze(3), ahead.mT.contiguous().unsqueeze(1), out=later)
    F.threshold_(later, energy.level, 0.0)
    others = (counts.view(parts, 1, m * m) @ later.flatten(1, 2)).view(parts, m, moves)
    return change.view(parts, m, moves) + energy.diversity * (others - own - before - direct)


def select_moves(gain: torch.Tensor, touched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Select moves that can be made together: the move of each output, (P, m) long, and whether it is made, (P, m).

    gain (P, m, C): decrease of F by each move. touched (P, m, m, C): whether it changes the count of an input (second
    dimension). No two selected moves touch the same input. Of equal gains the first output wins; otherwise identical
    outputs would swap their labels forever.
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
    """Return the inputs that outputs showing the same set of inputs should avoid, (P, m, m) of 0 and 1.

    Of two such outputs, the earlier one should avoid the first input of the set and the later one the second.
    """
    shown = (counts > 0).to(counts.dtype)
    size = shown.sum(2, keepdim=True)
    num_shared = shown @ shown.mT
    same = (num_shared == size) & (num_shared == size.mT) & (size > 1)
    earlier = earlier_mask(counts.shape[1], counts.device)
    nth = (counts > 0).long().cumsum(2) * (counts > 0)  # integers, so that the result is deterministic on all devices
    first = (same & earlier.T).any(2, keepdim=True) & (nth == 1)
    second = (same & earlier).any(2, keepdim=True) & (nth == 2)
    return (first | second).to(counts.dtype)


def to_labelling(z: torch.Tensor, value: torch.Tensor, parts: int) -> Labelling:
    """Convert labels z (h, w, Q, m) to the pairs of inputs that they show."""
    m = z.shape[3]
    index = torch.arange(m, device=z.device, dtype=z.dtype)
    total = (z * (2 * index)).sum(-1)  # sum of the two indices
    last = ((z > 0) * index).amax(-1)
    sources = torch.stack([total - last, last], -1).long().unflatten(2, (parts, m))
    return Labelling(sources.permute(2, 3, 0, 1, 4), count_blocks(z, parts), value)


@cache
def earlier_mask(m: int, device: torch.device) -> torch.Tensor:
    """Return a mask (m, m) bool that is True where the column index is smaller than the row index."""
    return torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
