"""Co-Mixup's labelling: which input, or which two inputs half and half, every block of every mixed image shows.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 3-4. m outputs are made of m inputs on a grid of N blocks. With z_ik in
{0, 1/2, 1}^m the label of block k of output i, and n_ij = sum_k z_ikj the blocks that output i takes from input j:

    F(z) = sum_ik cost_k . z_ik + b/2 sum_i sum_kk' |z_ik - z_ik'|^2 + g sum_ij phi(q_ij) n_ij,   q_i = A sum_i'!=i n_i'

over neighbouring blocks k, k', with b = beta / N, g = gamma / N, t = thres N. phi(q) = q where q > t and 0 elsewhere
(`hard`), or max(q - t, 0) (`soft`): an input that the other outputs show on more than t blocks becomes expensive. The
paper's text takes the maximum of tau and the whole double sum; its code, followed here, one threshold a pair (i, j).

The solver moves all outputs of all parts of a batch at once. A move puts one new label on the best set of blocks of one
output; those sets come from exact binary minimisations. Moves that change the counts of different inputs do not disturb
each other, so the best ones of each round are made together.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mixing.solvers.binary_grid import binary_ascent, binary_exact

EXACT_SIDE = 4  # largest grid whose binary problems are solved exactly
RULERS = {13: (0, 1, 4, 6), 7: (0, 1, 3), 2: (0, 1)}  # inputs at least -> offsets, no difference of which occurs twice
OFFERED = 4  # inputs offered to an output in a round
AGAIN = 4  # so many of these are offered once more, for fewer blocks: more than that may not fit
TOLL = 0.8  # on a block of those, in units of 1 / N, the mean price of a block
BONUS = 5e-4  # on a block of a half-and-half label; as the toll, only while the blocks of a move are chosen
PASSES = 3  # in which the moves of a round are picked
LEAST_GAIN = 1e-6
UNEVEN = 0.4  # how much dearer or cheaper than it is an input looks to the last start


class Labelling(NamedTuple):
    """What a solver returns. Of a block of label 1 both sources are the same input."""

    sources: torch.Tensor  # (P, m, h, w, 2) long: the two inputs, half of each, that every block of an output shows
    counts: torch.Tensor  # (P, m, m): blocks of output i taken from input j
    objective: torch.Tensor  # (P,): F


class Terms(NamedTuple):
    """The problem as the solver keeps it. The outputs of all P parts come last but one: Q = P m."""

    cost: torch.Tensor  # (h, w, P, 1, m)
    own: torch.Tensor  # (P, 1, m): diagonal of A
    cross: torch.Tensor  # (P, m, m): the rest of A, transposed
    smooth: float  # b
    diverse: float  # g
    shift: float  # phi(q) = threshold(q - shift, level, 0)
    level: float

    def mix(self, counts: torch.Tensor) -> torch.Tensor:
        """counts (P, X, m) -> A counts. The off-diagonal part is small: alone, TF32 does not harm it."""
        return torch.baddbmm(self.own * counts, counts, self.cross)

    def repeated(self, times: int) -> "Terms":
        """Every part so many times, one after the other."""
        return self._replace(
            cost=self.cost.repeat_interleave(times, 2),
            own=self.own.repeat_interleave(times, 0),
            cross=self.cross.repeat_interleave(times, 0),
        )

    def phi(self, shifted: torch.Tensor) -> torch.Tensor:
        """phi of q - shift."""
        return F.threshold(shifted, self.level, 0.0)


def objective(
    z: torch.Tensor,
    cost: torch.Tensor,
    compatibility: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    thres: float,
    thres_type: str = "hard",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unary, smoothness and diversity term of F, each (P,), in the precision of the arguments.

    z (P, m, h, w, m): label weights of every block of every output, by input; cost (P, m, h, w): of showing an input on
    a block; compatibility (P, m, m): A. thres < 0 with `hard` counts every overlap.
    """
    blocks = z.shape[2] * z.shape[3]
    unary = torch.einsum("pihwj,pjhw->p", z, cost)
    edges = (z[:, :, 1:] - z[:, :, :-1]).square().sum((1, 2, 3, 4))
    edges = edges + (z[:, :, :, 1:] - z[:, :, :, :-1]).square().sum((1, 2, 3, 4))
    counts = z.sum((2, 3))
    overlap = (counts.sum(1, keepdim=True) - counts) @ compatibility.mT
    penalty = _terms(cost, compatibility, beta, gamma, thres, thres_type)
    diversity = penalty.diverse * (penalty.phi(overlap - penalty.shift) * counts).sum((1, 2))
    return unary, beta / blocks / 2 * edges, diversity


def _terms(cost, compatibility, beta, gamma, thres, thres_type) -> Terms:
    if thres_type not in ("hard", "soft"):
        raise ValueError(f"m_thres_type must be hard or soft, got {thres_type!r}")
    blocks = cost.shape[-1] * cost.shape[-2]
    own = compatibility.diagonal(dim1=1, dim2=2)
    shift, level = (0.0, thres * blocks) if thres_type == "hard" else (thres * blocks, 0.0)
    cross = (compatibility - torch.diag_embed(own)).mT
    return Terms(
        cost.permute(2, 3, 0, 1).unsqueeze(3).contiguous(),
        own.unsqueeze(1),
        cross,
        beta / blocks,
        gamma / blocks,
        shift,
        level,
    )


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
    """A labelling of low F for each of P parts of m >= 2 inputs, by simultaneous expansions.

    cost (P, m, h, h) and compatibility (P, m, m) as in objective(), float32; order (P, S, m): random permutations of
    the inputs, from which S labellings of every part start. The best of them goes on after half of the rounds. On grids
    larger than EXACT_SIDE all rounds are made with larger blocks first, and then all again. resolve: in the last round,
    outputs that show the very same inputs are pulled apart. Space grows as P S m^3. Raises ValueError for an unknown
    thres_type.
    """
    parts, m, h, w = cost.shape
    terms = _terms(cost, compatibility, beta, gamma, thres, thres_type)
    side = max(n for n in range(1, EXACT_SIDE + 1) if h % n == 0 and w % n == 0)
    tall, wide = h // side, w // side
    heats = max(rounds // 2, 1)
    small = _coarser(terms, tall, wide)
    several = small.repeated(order.shape[1])
    z, value = improve(start(several, order), several, heats, whole_rounds=1)
    z = _winners(z, value.view(parts, -1))
    if tall * wide > 1:
        z, _ = improve(z, small, rounds - heats)
        z = z.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        heats = 0
    z, value = improve(z, terms, max(rounds - heats - resolve, 0))
    if resolve:
        extra = terms.diverse * twins(z.sum((0, 1)).view(parts, m, m))
        z, value = improve(z, terms, 1, extra)
        value = value - (extra * z.sum((0, 1)).view(parts, m, m)).sum((1, 2))
    return _labelling(z, value, parts, m)


def _coarser(terms: Terms, tall: int, wide: int) -> Terms:
    """The problem of labelling tall x wide blocks alike, with the same F: edges and counts stand for several."""
    size = tall * wide
    if size == 1:
        return terms
    h, w = terms.cost.shape[:2]
    return terms._replace(
        cost=terms.cost.unflatten(1, (w // wide, wide)).sum(2).unflatten(0, (h // tall, tall)).sum(1),
        smooth=terms.smooth * size**0.5,
        diverse=terms.diverse * size**2,
        shift=terms.shift / size,
        level=terms.level / size,
    )


def _winners(z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of S labellings of every part, z (h, w, P S m, m), those of lowest value (P, S): (h, w, P m, m)."""
    parts, starts = value.shape
    m = z.shape[3]
    index = value.min(1).indices + torch.arange(parts, device=z.device) * starts
    return z.unflatten(2, (-1, m)).index_select(2, index).flatten(2, 3)


def twins(counts: torch.Tensor) -> torch.Tensor:
    """(P, m, m) 0 or 1: inputs that become dearer to an output because another one shows the very same set of inputs.

    Of two such outputs the earlier one is kept from the first input of the set and the later one from the second.
    """
    shown = (counts > 0).to(counts.dtype)
    size = shown.sum(2, keepdim=True)
    common = shown @ shown.mT
    same = (common == size) & (common == size.mT) & (size > 1)
    earlier = earlier_of(counts.shape[1], counts.device)
    nth = (counts > 0).long().cumsum(2) * (counts > 0)  # in whole numbers: repeatable on every device
    first = (same & earlier.T).any(2, keepdim=True) & (nth == 1)
    second = (same & earlier).any(2, keepdim=True) & (nth == 2)
    return (first | second).to(counts.dtype)


def _labelling(z: torch.Tensor, value: torch.Tensor, parts: int, m: int) -> Labelling:
    """z (h, w, Q, m) as the pairs of inputs that it stands for."""
    index = torch.arange(m, device=z.device, dtype=z.dtype)
    total = (z * (2 * index)).sum(-1)  # of the two indices
    last = ((z > 0) * index).amax(-1)
    sources = torch.stack([total - last, last], -1).long().unflatten(2, (parts, m))
    return Labelling(sources.permute(2, 3, 0, 1, 4), z.sum((0, 1)).view(parts, m, m), value)


def start(terms: Terms, order: torch.Tensor) -> torch.Tensor:
    """(h, w, Q, m) labels in which two outputs share at most one input.

    Output i is filled with input order[i]; inputs order[i + o] are then spread over it where saliency and smoothness
    want them, for the offsets o of a ruler on which no distance occurs twice. The prices of every input are scaled at
    random (by its number in order), from start to start more so: starts of few inputs would be alike otherwise.
    order (P, S, m); the S starts of a part come one after the other.
    """
    h, w, parts, _, m = terms.cost.shape
    starts = order.shape[1]
    amount = torch.arange(1, starts + 1, device=order.device).mul(UNEVEN / starts).view(-1, 1)
    amount, order = amount.repeat(len(order), 1), order.flatten(0, 1)
    offsets = next(ruler for least, ruler in RULERS.items() if m >= least)
    labels = torch.stack([order.roll(-offset, 1).flatten() for offset in offsets])  # (offsets, Q)
    z = one_hot(labels[0], m).expand(h, w, -1, -1).contiguous()
    scale = 1 - amount * (2 / (m - 1) * order - 1)
    site = (terms.cost * scale.unsqueeze(1)).expand(h, w, parts, m, m).reshape(z.shape)
    for label in labels[1:]:
        view = View(z, site, terms.smooth)
        blocks, _ = view.expand(label.unsqueeze(1))
        z = torch.lerp(z, one_hot(label, m), blocks)
    return z


def improve(
    z: torch.Tensor, terms: Terms, rounds: int, extra: torch.Tensor | None = None, whole_rounds: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (h, w, Q, m) of lower F, and F itself, (P,), after some rounds of simultaneous moves. Sec. 4.

    extra (P, m, m): price of a block on top of the others, which F then includes. whole_rounds: so many rounds offer no
    half-and-half labels.
    """
    parts, m = terms.cost.shape[2], terms.cost.shape[4]
    best, best_value = z, None
    room = z.new_empty(parts * m**3 * (min(OFFERED, m) + min(AGAIN, m) + min(3, m)))
    for number in range(rounds + 1):
        counts = z.sum((0, 1)).view(parts, m, m)
        around = terms.mix(counts.sum(1, keepdim=True) - counts) - terms.shift  # q
        penalty = terms.phi(around)
        unit = 2 * terms.diverse * penalty  # third term, linearised: an output pays, and makes the others pay as much
        unit = unit if extra is None else unit + extra
        view = View(z, (terms.cost + unit).flatten(2, 3), terms.smooth)
        value = view.current.sum((0, 1)) + view.roughness()
        value = (value.view(parts, m) - terms.diverse * (penalty * counts).sum(2)).sum(1)
        if best_value is None:
            best_value = value
        else:
            lower = value < best_value
            best_value = torch.where(lower, value, best_value)
            best = torch.where(lower.view(-1, 1, 1).expand(-1, m, 1).reshape(-1, 1), z, best)
        if number == rounds:
            return best, best_value
        z = one_round(view, terms, counts, around, penalty, room, halves=number >= whole_rounds)


def one_round(view: "View", terms: Terms, counts, around, penalty, room, halves: bool) -> torch.Tensor:
    """The labels after one round. counts, around (q - shift) and penalty (phi): (P, m, m)."""
    parts, m, _ = counts.shape
    hard = view.promising().topk(min(OFFERED, m), 1).indices
    hard = torch.cat([hard, hard[:, :AGAIN]], 1)
    used = counts.flatten(0, 1).topk(min(3, m), 1).indices if halves else None
    blocks, change = view.expand(hard, used, again=min(AGAIN, m))
    label = labels(hard, used, m)  # (Q, C, m)
    kept = (1 - blocks).permute(2, 3, 0, 1).flatten(2) @ view.z.permute(2, 0, 1, 3).flatten(1, 2)
    shift = torch.addcmul(kept - counts.view(-1, 1, m), label, blocks.sum((0, 1)).unsqueeze(2))  # of the counts
    shift = shift.view(parts, m, -1, m)
    gain = -true_change(change, shift, terms, counts, around, penalty, room)
    chosen, moved = pick(gain, shift.permute(0, 3, 1, 2) != 0)
    chosen = chosen.flatten()
    blocks = blocks.gather(3, chosen.view(-1, 1).expand(*blocks.shape[:3], 1)) * moved.view(-1, 1)
    label = label.gather(1, chosen.view(-1, 1, 1).expand(-1, 1, m)).squeeze(1)
    return torch.lerp(view.z, label, blocks)


def true_change(change, shift, terms: Terms, counts, around, penalty, room) -> torch.Tensor:
    """(P, m, C): by how much F changes with every move, what it does to the other outputs included.

    change (Q, C): of the linearised prices; shift (P, m, C, m): of the output's counts; room: space for m^3 C numbers
    a part, which are not worth asking the operating system for in every round.
    """
    parts, m, moves, _ = shift.shape
    direct = (penalty.unsqueeze(2) * shift).sum(3)  # phi(q) d n, which the linearised prices hold twice
    ahead = terms.mix(shift.flatten(1, 2))  # the step of every other output's q, (P, mC, m)
    own = (terms.phi(around.unsqueeze(2) + ahead.view(shift.shape)) * counts.unsqueeze(2)).sum(3)
    before = (penalty * counts).sum(2)
    before = (before.sum(1, keepdim=True) - before).unsqueeze(2)
    later = room[: parts * m**3 * moves].view(parts, m, m, m * moves)
    torch.add(around.unsqueeze(3), ahead.mT.contiguous().unsqueeze(1), out=later)
    F.threshold_(later, terms.level, 0.0)
    others = (counts.view(parts, 1, m * m) @ later.flatten(1, 2)).view(parts, m, moves)
    return change.view(parts, m, moves) + terms.diverse * (others - own - before - direct)


def labels(hard: torch.Tensor, used: torch.Tensor | None, m: int) -> torch.Tensor:
    """(Q, C, m): the label vectors that View.expand() tries, for its arguments."""
    if used is None:
        return one_hot(hard, m)
    first, second = pairs(hard.shape[1], used.shape[1], hard.device)
    index = torch.cat([hard, used], 1)
    vectors = one_hot(index, m)
    return (vectors.index_select(1, first) + vectors.index_select(1, second)) * 0.5


def pick(gain: torch.Tensor, touched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves that can be made together: which one of each output, (P, m) long, and whether it is made, (P, m).

    gain (P, m, C): by how much each move lowers F; touched (P, m, m, C): whether it changes the count of an input
    (second dimension). No two chosen moves touch the same input. Equal gains go to the first output: identical outputs
    would swap for ever otherwise.
    """
    parts, m, moves = gain.shape
    touched = touched.to(gain.dtype)
    flat = touched.flatten(2)
    earlier = earlier_of(m, gain.device)
    taken = gain.new_zeros(parts, 1, m)
    chosen, moved = None, None
    for turn in range(PASSES):
        best, index = gain.max(2)
        inputs = touched.gather(3, index.view(parts, 1, m, 1).expand(-1, m, -1, -1)).squeeze(3)  # (P, inputs, outputs)
        rival, mine = best.unsqueeze(1), best.unsqueeze(2)
        stronger = (rival > mine) | ((rival == mine) & earlier)
        blocked = ((inputs.mT @ inputs) * stronger).sum(2) > 0
        wins = (best > LEAST_GAIN) & ~blocked
        chosen = index if chosen is None else torch.where(wins, index, chosen)
        moved = wins if moved is None else moved | wins
        if turn < PASSES - 1:
            taken = taken + (inputs * wins.unsqueeze(1)).sum(2).unsqueeze(1)
            free = ((taken @ flat).view(parts, m, moves) == 0) & ~moved.unsqueeze(2)
            gain = gain * free
    return chosen, moved


class View:
    """A labelling z (h, w, Q, m) beside the price of every label on every block, site (h, w, Q, m)."""

    def __init__(self, z: torch.Tensor, site: torch.Tensor, smooth: float):
        self.z, self.site, self.smooth = z, site, smooth
        self.current = (z * site).sum(-1)  # (h, w, Q)
        self.norm = smooth * (z * z).sum(-1)
        self.down = smooth * (z[1:] * z[:-1]).sum(-1)  # b z_k . z_k'
        self.right = smooth * (z[:, 1:] * z[:, :-1]).sum(-1)
        self.degree = degrees(*z.shape[:2], z.device)  # (h, w, 1): neighbours of a block

    def roughness(self) -> torch.Tensor:
        """(Q,) the smoothness term of every output."""
        return (self.norm * self.degree).sum((0, 1)) / 2 - self.down.sum((0, 1)) - self.right.sum((0, 1))

    def promising(self) -> torch.Tensor:
        """(Q, m): what each input would gain an output if it went wherever it is cheaper than what is there."""
        return (self.current.unsqueeze(3) - self.site).relu_().sum((0, 1))

    def expand(
        self, hard: torch.Tensor, used: torch.Tensor | None = None, again: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best blocks for each of C new labels: (h, w, Q, C) of 0 and 1, and the change of price, (Q, C).

        hard (Q, K): inputs offered whole. used (Q, 2 or 3): inputs of which every pair is also offered, half and half.
        The last `again` of the inputs in hard carry the toll.

        With v the new label and x_k = 1 where it goes, the change is sum_k g_k x_k + sum_kk' J_kk' x_k x_k'.
        """
        z, degree = self.z, self.degree.unsqueeze(3)
        index = hard if used is None else torch.cat([hard, used], 1)
        index = index.expand(*z.shape[:2], -1, -1)
        inner, price = z.gather(3, index), self.site.gather(3, index)  # z_k . v, and the price of v
        length = self.smooth  # b |v|^2
        toll = tolls(hard.shape[1], 0 if used is None else used.shape[1], again, z.shape[0] * z.shape[1], z.device)
        if used is not None:
            first, second = pairs(hard.shape[1], used.shape[1], z.device)
            inner = inner.index_select(3, first).add_(inner.index_select(3, second)).mul_(self.smooth / 2)
            price = price.index_select(3, first).add_(price.index_select(3, second)).mul_(0.5)
            whole = (first == second).to(z.dtype)
            length = (whole + 1) * (self.smooth / 2)
        else:
            inner = inner.mul_(self.smooth)
        lean = (self.norm * self.degree).mul_(-0.5).sub_(self.current)
        lean[1:].add_(self.down)
        lean[:-1].add_(self.down)
        lean[:, 1:].add_(self.right)
        lean[:, :-1].add_(self.right)
        g = price.add_(degree * (length / 2) + toll).add_(lean.unsqueeze(3))
        g[1:].sub_(inner[:-1])
        g[:-1].sub_(inner[1:])
        g[:, 1:].sub_(inner[:, :-1])
        g[:, :-1].sub_(inner[:, 1:])
        down = (inner[1:] + inner[:-1]).sub_(self.down.unsqueeze(3)).sub_(length)
        right = (inner[:, 1:] + inner[:, :-1]).sub_(self.right.unsqueeze(3)).sub_(length)
        minimise = binary_exact if max(z.shape[:2]) <= EXACT_SIDE else binary_ascent
        blocks, value = minimise(g.flatten(2), down.flatten(2), right.flatten(2))
        return blocks.view(g.shape), value.view(g.shape[2:]) - toll * blocks.sum((0, 1)).view(g.shape[2:])


def one_hot(index: torch.Tensor, count: int) -> torch.Tensor:
    """(...) long -> (..., count) float32. Unlike torch's it never asks the device for the largest index."""
    return (index.unsqueeze(-1) == torch.arange(count, device=index.device)).float()


@cache
def pairs(whole: int, used: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the two inputs of every label offered: `whole` single ones, then all pairs of the `used` next."""
    two = [(i, i) for i in range(whole)]
    two += [(whole + i, whole + j) for i in range(used) for j in range(i + 1, used)]
    return tuple(torch.tensor(column, device=device) for column in zip(*two, strict=True))


@cache
def tolls(whole: int, used: int, again: int, blocks: int, device: torch.device) -> torch.Tensor:
    """(C,): what a block of every label offered costs while blocks are chosen; minus the bonus for the pairs."""
    pairs_of_used = used * (used - 1) // 2
    prices = [0.0] * (whole - again) + [TOLL / blocks] * again + [-BONUS] * pairs_of_used
    return torch.tensor(prices, device=device)


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


@cache
def earlier_of(m: int, device: torch.device) -> torch.Tensor:
    """(m, m) bool: true where the column comes before the row."""
    return torch.ones(m, m, dtype=torch.bool, device=device).tril(-1)
