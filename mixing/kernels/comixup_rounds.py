"""Co-Mixup's solver on CUDA: three kernels for each round of simultaneous moves, for all parts of a batch at once.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 4. The rule is that of mixing/solvers/comixup_labelling.py; where inputs
are ranked, the first of equal ones wins. A round needs three kernels, because each reads what the one before has
written for all outputs of a part:

* offer_kernel, one program per output: its overlaps q, its share of F, and the labels that it tries.
* expand_kernel, one program per output and a few of its labels: their best blocks (comixup_blocks.py), the change of
  the counts, and the change of F with the effect on the other outputs.
* select_kernel, one program per part: the moves that are made, and the best labelling so far.

All arrays between them are small enough for the L2 cache. On sm_90, for parts of 20 inputs, offer_kernel takes 56
registers a thread in 4 warps (16 x 16 blocks: 80 in 8), expand_kernel 78 to 202 in one, select_kernel 105 in 4
warps (128 in 8): no spills, at most 8 KB of shared memory.

The outputs of all parts and initial labellings are numbered q, those of one labelling after each other. Arrays:
labels (Q, 2, N) int32, the two inputs of each block in ascending order, equal for a hard label; counts, overlap and
unit (Q, m); offered (Q, C, 2) int32, the labels tried; blocks (Q, C, N) int32; step (Q, C, m); gain (Q, C); touched
(Q, C, words) int32, bit j of which tells whether a move changes the count of input j.
"""

import triton
import triton.language as tl

from ..solvers import comixup_labelling as rule
from ..solvers.comixup_moves import REOFFER_COST, SOFT_BONUS
from .comixup_blocks import build_problem, similarity, solve_exact, solve_relaxed

MIN_GAIN = tl.constexpr(rule.MIN_GAIN)
SELECTION_PASSES = tl.constexpr(rule.SELECTION_PASSES)
REOFFERED_COST, SOFT_COST = tl.constexpr(REOFFER_COST), tl.constexpr(-SOFT_BONUS)


@triton.jit
def threshold(shifted, level):
    """Return phi(q) for shifted = q - shift."""
    return tl.where(shifted > level, shifted, 0.0)


@triton.jit
def load_cost(cost, part, parts, inputs, block, m, mask):
    """Return the unary costs of inputs on blocks. cost: (h, w, parts, 1, m), as in Energy."""
    return tl.load(cost + (block * parts + part) * m + inputs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["parts", "starts", "m"])
def start_kernel(
    cost, order, labels, counts, smoothness, noise, parts, starts, m,
    RULER: tl.constexpr, MARKS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write an initial labelling of one output and its counts, as initial_labels(), on at most 4 x 4 blocks.

    order (P S, m); noise: of the first initial labelling. RULER: MARKS offsets of 4 bits each.
    """
    SITES: tl.constexpr = HEIGHT * WIDTH
    output = tl.program_id(0)
    group, i = output // m, output % m
    part = group // starts
    noise *= group % starts + 1
    order += group * m
    site = tl.arange(0, SITES)[None, :]
    block, real = site // WIDTH * W + site % WIDTH, (site // WIDTH < H) & (site % WIDTH < W)
    label = tl.load(order + i).to(tl.int32)
    rank = tl.load(order + label).to(tl.float32)
    current = load_cost(cost, part, parts, label, block, m, real) * (1 - noise * (2 / (m - 1) * rank - 1))
    first = tl.zeros([1, SITES], tl.int32) + label
    for mark in tl.static_range(1, MARKS):
        label = tl.load(order + (i + (RULER >> 4 * mark & 15)) % m).to(tl.int32)
        rank = tl.load(order + label).to(tl.float32)
        new = load_cost(cost, part, parts, label, block, m, real) * (1 - noise * (2 / (m - 1) * rank - 1))
        g, down, right = build_problem(current, first, first, new, label, label, 0.0, smoothness, H, W, WIDTH, SITES)
        x, _ = solve_exact(g, down, right, H, W, HEIGHT, WIDTH, 1)
        first, current = tl.where(x > 0, label, first), tl.where(x > 0, new, current)
    tl.store(labels + output * 2 * H * W + block, first, mask=real)
    tl.store(labels + output * 2 * H * W + H * W + block, first, mask=real)
    j = tl.arange(0, INPUTS)
    shown = tl.sum(((first == j[:, None]) & real).to(tl.float32), 1)
    tl.store(counts + output * m + j, shown, mask=j < m)


@triton.jit(do_not_specialize=["starts", "m", "h", "w", "tall", "wide"])
def carry_kernel(
    labels, counts, value, to_labels, to_counts, starts, m, h, w, tall, wide, STARTS: tl.constexpr,
    BLOCKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Copy one output of the best of the labellings of a part to a grid of h x w, cutting each block in tall x wide."""
    output = tl.program_id(0)
    part, i = output // m, output % m
    start = tl.arange(0, STARTS)
    best = tl.argmin(tl.load(value + part * starts + start, mask=start < starts, other=float("inf")), 0)
    source = (part * starts + best) * m + i
    block, j = tl.arange(0, BLOCKS), tl.arange(0, INPUTS)
    real = block < h * w
    coarse = source * 2 * (h // tall) * (w // wide) + block // w // tall * (w // wide) + block % w // wide
    for half in tl.static_range(2):
        label = tl.load(labels + coarse + half * (h // tall) * (w // wide), mask=real, other=0)
        tl.store(to_labels + (2 * output + half) * h * w + block, label, mask=real)
    shown = tl.load(counts + source * m + j, mask=j < m, other=0.0)
    tl.store(to_counts + output * m + j, shown * (tall * wide), mask=j < m)


@triton.jit(do_not_specialize=["m"])
def duplicate_kernel(counts, extra, weight, m, INPUTS: tl.constexpr):
    """Write a row of weight * duplicate_penalty(counts), for one output."""
    output = tl.program_id(0)
    i, j = output % m, tl.arange(0, INPUTS)
    shown = tl.load(counts + output * m + j, mask=j < m, other=0.0) > 0
    place = counts + (output // m * m + j[:, None]) * m + j[None, :]
    every = tl.load(place, mask=(j[:, None] < m) & (j[None, :] < m), other=0.0) > 0
    different = tl.sum((every != shown[None, :]).to(tl.int32), 1)
    same = (different == 0) & (j < m) & (tl.sum(shown.to(tl.int32), 0) > 1)
    number = tl.cumsum(shown.to(tl.int32), 0)
    first = shown & (number == 1) & (tl.sum((same & (j > i)).to(tl.int32), 0) > 0)
    second = shown & (number == 2) & (tl.sum((same & (j < i)).to(tl.int32), 0) > 0)
    tl.store(extra + output * m + j, tl.where(first | second, weight, 0.0), mask=j < m)


@triton.jit(do_not_specialize=["parts", "starts", "m", "h", "w"])
def offer_kernel(
    cost, compatibility, extra, labels, counts, overlap, unit, value, offered,
    smoothness, diversity, shift, level, parts, starts, m, h, w,
    LABELS: tl.constexpr, HARD: tl.constexpr, REOFFERED: tl.constexpr, SOFT: tl.constexpr,
    CHUNK: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write overlap, unit and value (Q,) of one output, and the labels offered to it.

    unit: cost per block of an input, with the diversity term linearised. HARD, REOFFERED, SOFT: numbers of inputs tried
    as hard labels, tried again, and tried in pairs as soft labels; LABELS: all labels tried.
    """
    output = tl.program_id(0)
    group = output // m
    part = group // starts
    j = tl.arange(0, INPUTS)
    real = j < m
    square = real[:, None] & real[None, :]
    place = j[:, None] * m + j[None, :]
    own = tl.load(counts + output * m + j, mask=real, other=0.0)
    others = tl.sum(tl.load(counts + group * m * m + place, mask=square, other=0.0), 0) - own
    a = tl.load(compatibility + part * m * m + place, mask=square, other=0.0)
    q = tl.sum(a * others[None, :], 1) - shift
    penalty = threshold(q, level)
    per_block = 2 * diversity * penalty
    if extra is not None:
        per_block += tl.load(extra + output * m + j, mask=real, other=0.0)
    tl.store(overlap + output * m + j, q, mask=real)
    tl.store(unit + output * m + j, per_block, mask=real)
    # ---- Share of F, and an upper estimate of the gain by each input, as in input_gains() ----
    gains, share = tl.zeros([INPUTS], tl.float32), tl.zeros([CHUNK], tl.float32)
    labels += output * 2 * h * w
    for begin in range(0, h * w, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        live = block < h * w
        has_down, has_right = live & (block // w < h - 1), live & (block % w < w - 1)
        first, second = tl.load(labels + block, mask=live, other=0), tl.load(labels + h * w + block, mask=live, other=0)
        tile = real[:, None] & live[None, :]
        costs = load_cost(cost, part, parts, j[:, None], block[None, :], m, tile) + per_block[:, None]
        shown = (first[None, :] == j[:, None]).to(tl.float32) + (second[None, :] == j[:, None]).to(tl.float32)
        current = tl.sum(0.5 * shown * costs, 0)
        gains += tl.sum(tl.where(tile, tl.maximum(current[None, :] - costs, 0.0), 0.0), 1)
        degree = has_down.to(tl.float32) + has_right.to(tl.float32) + (live & (block >= w)).to(tl.float32)
        degree += (live & (block % w > 0)).to(tl.float32)
        edges = degree / 2 * similarity(first, second, first, second)
        below, beside = labels + block + w, labels + block + 1
        first_below, first_beside = tl.load(below, mask=has_down, other=-1), tl.load(beside, mask=has_right, other=-1)
        below, beside = below + h * w, beside + h * w
        edges -= similarity(first, second, first_below, tl.load(below, mask=has_down, other=-1))
        edges -= similarity(first, second, first_beside, tl.load(beside, mask=has_right, other=-1))
        share += tl.where(live, current + smoothness * edges, 0.0)
    tl.store(value + output, tl.sum(share, 0) - diversity * tl.sum(penalty * own, 0))
    # ---- Labels ----
    offered += output * 2 * LABELS
    gains = tl.where(real, gains, -1.0)
    for number in tl.static_range(HARD):
        best = tl.argmax(gains, 0)
        gains = tl.where(j == best, -1.0, gains)
        tl.store(offered + 2 * number + tl.arange(0, 2), best + tl.zeros([2], tl.int32))
        if number < REOFFERED:
            tl.store(offered + 2 * (HARD + number) + tl.arange(0, 2), best + tl.zeros([2], tl.int32))
    if SOFT > 1:
        offered += 2 * (HARD + REOFFERED)
        own = tl.where(real, own, -1.0)
        one = tl.argmax(own, 0)
        own = tl.where(j == one, -1.0, own)
        two = tl.argmax(own, 0)
        tl.store(offered, tl.minimum(one, two))
        tl.store(offered + 1, tl.maximum(one, two))
        if SOFT > 2:
            three = tl.argmax(tl.where(j == two, -1.0, own), 0)
            tl.store(offered + 2, tl.minimum(one, three))
            tl.store(offered + 3, tl.maximum(one, three))
            tl.store(offered + 4, tl.minimum(two, three))
            tl.store(offered + 5, tl.maximum(two, three))


@triton.jit(
    do_not_specialize=["parts", "starts", "m", "labels_tried", "hard", "reoffered", "iterations", "words", "h", "w"]
)
def expand_kernel(
    cost, compatibility, labels, counts, overlap, unit, offered, blocks, step, gain, touched,
    smoothness, diversity, level, parts, starts, m, labels_tried, hard, reoffered, iterations, words, h, w,
    H: tl.constexpr, W: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
    LABELS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Write blocks, step, touched and gain of LABELS of the labels offered to one output.

    As find_blocks() and objective_change(). H, W: the grid if it is solved exactly, otherwise unused.
    """
    SITES: tl.constexpr = HEIGHT * WIDTH
    output = tl.program_id(0)
    group = output // m
    part = group // starts
    number = tl.program_id(1) * LABELS + tl.arange(0, LABELS)
    tried = (number < labels_tried)[:, None]
    row = output * labels_tried + number[:, None]
    site = tl.arange(0, SITES)[None, :]
    block, real = site // WIDTH * w + site % WIDTH, (site // WIDTH < h) & (site % WIDTH < w)
    # ---- Binary problem ----
    place = labels + output * 2 * h * w + block
    first, second = tl.load(place, mask=real, other=0), tl.load(place + h * w, mask=real, other=0)
    new_first, new_second = (
        tl.load(offered + 2 * row, mask=tried, other=0),
        tl.load(offered + 2 * row + 1, mask=tried, other=0),
    )
    unit += output * m
    current = load_cost(cost, part, parts, first, block, m, real) + tl.load(unit + first)
    current = 0.5 * (current + load_cost(cost, part, parts, second, block, m, real) + tl.load(unit + second))
    new = load_cost(cost, part, parts, new_first, block, m, tried & real) + tl.load(unit + new_first)
    other = load_cost(cost, part, parts, new_second, block, m, tried & real) + tl.load(unit + new_second)
    bias = tl.where(number < hard, 0.0, tl.where(number < hard + reoffered, REOFFERED_COST / (h * w), SOFT_COST))[
        :, None
    ]
    new = 0.5 * (new + other)
    g, down, right = build_problem(
        current, first, second, new, new_first, new_second, bias, smoothness, h, w, WIDTH, SITES
    )
    if EXACT:
        x, change = solve_exact(g, down, right, H, W, HEIGHT, WIDTH, LABELS)
    else:
        x, change = solve_relaxed(g, down, right, iterations, h, w, WIDTH, SITES, LABELS)
    x = tl.where(real, x, 0)
    tl.store(blocks + row * h * w + block, x, mask=tried & real)
    # ---- Change of the counts, and of the overlaps of the other outputs ----
    size = tl.sum(x, 1).to(tl.float32)[:, None]
    change -= tl.sum(size * bias, 1)
    replaced = x.to(tl.float32)
    j = tl.arange(0, INPUTS)[None, :]
    ahead, steps = tl.zeros([LABELS, INPUTS], tl.float32), tl.zeros([LABELS, INPUTS], tl.float32)
    for word in range(words):
        bits = tl.zeros([LABELS, 1], tl.int32)
        for i in range(32 * word, tl.minimum(32 * word + 32, m)):
            shown = (first == i).to(tl.float32) + (second == i).to(tl.float32)
            gained = (new_first == i).to(tl.float32) + (new_second == i).to(tl.float32)
            moved = 0.5 * (gained * size - tl.sum(replaced * shown, 1)[:, None])
            steps = tl.where(j == i, moved, steps)
            ahead += moved * tl.load(compatibility + (part * m + j) * m + i, mask=j < m, other=0.0)
            bits |= (moved != 0).to(tl.int32) << (i - 32 * word)
        tl.store(touched + row * words + word, bits, mask=tried)
    tl.store(step + row * m + j, steps, mask=tried & (j < m))
    # ---- Change of F ----
    after, before = tl.zeros([LABELS, INPUTS], tl.float32), tl.zeros([1, INPUTS], tl.float32)
    for i in range(group * m, group * m + m):
        q = tl.load(overlap + i * m + j, mask=j < m, other=0.0)
        shown = tl.load(counts + i * m + j, mask=j < m, other=0.0)
        after += threshold(q + ahead, level) * shown
        before += threshold(q, level) * shown
    q = tl.load(overlap + output * m + j, mask=j < m, other=0.0)
    shown = tl.load(counts + output * m + j, mask=j < m, other=0.0)
    after = tl.sum(after, 1) - tl.sum(threshold(q + ahead, level) * shown, 1)
    before = tl.sum(before, 1) - tl.sum(threshold(q, level) * shown, 1)
    direct = tl.sum(threshold(q, level) * steps, 1)  # phi(q) dn, which the linearised costs contain twice
    change += diversity * (after - before - direct)
    tl.store(gain + output * labels_tried + number, -change, mask=number < labels_tried)


@triton.jit(do_not_specialize=["number", "m", "labels_tried", "words", "area"])
def select_kernel(
    labels, counts, value, offered, blocks, step, gain, touched, best_labels, best_counts, best_value,
    number, m, labels_tried, words, area, MOVE: tl.constexpr,
    LABELS: tl.constexpr, CHUNK: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Keep the labelling of one part if it is the best so far, then make the moves of select_moves() in place."""
    group = tl.program_id(0)
    i = tl.arange(0, INPUTS)
    real = i < m
    output = group * m + i
    f = tl.sum(tl.load(value + output, mask=real, other=0.0), 0)
    known = tl.load(best_value + group + 0 * i, mask=number + 0 * i > 0, other=float("inf"))
    lower = f + tl.zeros_like(known) < known
    tl.debug_barrier()  # all threads have read the value before one overwrites it
    tl.store(best_value + group + 0 * i, f + tl.zeros_like(known), mask=lower)
    lower = lower[:, None]
    # ---- Selection ----
    chosen = tl.full([INPUTS], -1, tl.int32)
    if MOVE:
        tried_as = tl.arange(0, LABELS)[None, :]
        row = output[:, None] * labels_tried + tried_as
        tried = real[:, None] & (tried_as < labels_tried)
        gains = tl.load(gain + row, mask=tried, other=float("-inf"))
        for _ in range(SELECTION_PASSES):
            best, index = tl.max(gains, 1, return_indices=True)
            rival = tl.reshape(best, [1, INPUTS])
            stronger = (rival > best[:, None]) | ((rival == best[:, None]) & (i[None, :] < i[:, None]))
            mine = touched + (output * labels_tried + index) * words
            conflict = tl.zeros([INPUTS, INPUTS], tl.int32)
            for word in range(words):
                bits = tl.load(mine + word, mask=real, other=0)
                conflict |= bits[:, None] & tl.reshape(bits, [1, INPUTS])
            blocked = tl.sum((stronger & (conflict != 0)).to(tl.int32), 1) > 0
            wins = (best > MIN_GAIN) & (blocked == 0) & real
            chosen = tl.where(wins, index, chosen)
            free = (chosen < 0)[:, None] & tried
            for word in range(words):
                taken = tl.xor_sum(tl.where(wins, tl.load(mine + word, mask=real, other=0), 0), 0)  # no bit is in two
                free &= (tl.load(touched + row * words + word, mask=tried, other=0) & taken) == 0
            gains = tl.where(free | (tried_as >= labels_tried), gains, 0.0)  # padding is never the best
    # ---- Best labelling and moves ----
    moved = chosen >= 0
    index = output * labels_tried + chosen
    first = tl.load(offered + 2 * index, mask=moved, other=0)[:, None]
    second = tl.load(offered + 2 * index + 1, mask=moved, other=0)[:, None]
    for begin in range(0, area, CHUNK):
        block = begin + tl.arange(0, CHUNK)[None, :]
        live = real[:, None] & (block < area)
        x = tl.load(blocks + index[:, None] * area + block, mask=moved[:, None] & live, other=0)
        for half in tl.static_range(2):
            place = (2 * output + half)[:, None] * area + block
            label = tl.load(labels + place, mask=live, other=0)
            tl.store(best_labels + place, label, mask=live & lower)
            if MOVE:
                new = first if half == 0 else second
                tl.store(labels + place, tl.where(x > 0, new, label), mask=live)
    for begin in range(0, m, CHUNK):
        j = begin + tl.arange(0, CHUNK)[None, :]
        live = real[:, None] & (j < m)
        shown = tl.load(counts + output[:, None] * m + j, mask=live, other=0.0)
        tl.store(best_counts + output[:, None] * m + j, shown, mask=live & lower)
        if MOVE:
            change = tl.load(step + index[:, None] * m + j, mask=live & moved[:, None], other=0.0)
            tl.store(counts + output[:, None] * m + j, shown + change, mask=live)
