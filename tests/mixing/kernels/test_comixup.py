"""The kernels of Co-Mixup's solver against the torch solver. Where there is no GPU, the kernels are interpreted."""

import json
from collections import namedtuple
from importlib import import_module

import numpy as np
import pytest
import torch
from compile_ahead import CAPABILITIES, Build, compile_ahead
from support import GOLDEN
from torch.nn import functional as F

import models
from engine.data.datasets import load_evaluation
from engine.inference.classifier import load_classifier, normalize
from mixing import comixup
from mixing.comixup import CoMixup, block_costs, compatibility_matrix, most_salient_window
from mixing.solvers import binary_grid, comixup_labelling
from mixing.solvers.comixup_energy import build_energy, objective
from saliency.gradient import Gradient

triton = pytest.importorskip("triton")
tl = triton.language
kernels = import_module("mixing.kernels.comixup")
blocks_of = import_module("mixing.kernels.comixup_blocks")
rounds_of = import_module("mixing.kernels.comixup_rounds")
solve_exact, solve_relaxed = blocks_of.solve_exact, blocks_of.solve_relaxed
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEM = {"beta": 0.32, "gamma": 1.0, "thres": 0.83}
RECORDED = np.load(GOLDEN / "comixup.npz")
CASES = json.loads(str(RECORDED["meta"]))
TopK = namedtuple("TopK", "values indices")


@pytest.fixture(autouse=True)
def first_of_equal_inputs(monkeypatch):
    """Let the torch solver, too, take the first of equally good inputs, and give the interpreter fewer programs."""

    def topk(values, k, dim):
        ranked = values.sort(dim=dim, descending=True, stable=True)
        return TopK(ranked.values.narrow(dim, 0, k), ranked.indices.narrow(dim, 0, k))

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "LABELS_TOGETHER", {True: 16, False: 16})


def make_problem(parts: int, m: int, h: int, w: int, starts: int):
    """Return costs, compatibilities and orders of the inputs.

    The costs of an input differ in scale, as under the prior. Otherwise, inputs that are better on all blocks have
    gains that are equal up to rounding, which then ranks them.
    """
    cost = torch.rand(parts, m, h, w, device=DEVICE) ** 3
    distance = torch.rand(parts, m, m, device=DEVICE)
    identity = torch.eye(m, device=DEVICE).expand_as(distance)
    order = torch.rand(parts, starts, m, device=DEVICE).argsort(2)
    scale = torch.rand(parts, m, 1, 1, device=DEVICE) + 0.5
    return -scale * cost / cost.sum((2, 3), keepdim=True), identity.lerp(distance + distance.mT, 0.01), order


def assert_same_labelling(problem: tuple, **options):
    expected = comixup_labelling.solve(*problem, **options)
    found = kernels.solve(*problem, **options)
    assert found.sources.dtype == torch.int64
    torch.testing.assert_close(found.objective, expected.objective, atol=1e-5, rtol=1e-6)
    assert torch.equal(found.sources, expected.sources) and torch.equal(found.counts, expected.counts)


@triton.jit
def binary_kernel(
    coefficients, x, value, h, w, steps, H: tl.constexpr, W: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    EXACT: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Solve LABELS binary problems, each with g and J to the block below and on the right, zero at the edges."""
    site = tl.arange(0, HEIGHT * WIDTH)[None, :]
    real = (site // WIDTH < h) & (site % WIDTH < w)
    label = tl.arange(0, LABELS)
    place = label[:, None] * h * w + site // WIDTH * w + site % WIDTH
    g = tl.load(coefficients + place, mask=real, other=0.0)
    down = tl.load(coefficients + LABELS * h * w + place, mask=real, other=0.0)
    right = tl.load(coefficients + 2 * LABELS * h * w + place, mask=real, other=0.0)
    if EXACT:
        found, lowest = solve_exact(g, down, right, H, W, HEIGHT, WIDTH, LABELS)
    else:
        found, lowest = solve_relaxed(g, down, right, steps, h, w, WIDTH, HEIGHT * WIDTH, LABELS)
    tl.store(x + place, found, mask=real)
    tl.store(value + label, lowest)


@pytest.mark.parametrize(("h", "w", "steps"), [(1, 1, 0), (2, 2, 0), (3, 4, 0), (4, 4, 0), (4, 3, 0), (5, 6, 5)])
def test_binary_problems_are_solved_as_by_torch(h, w, steps, monkeypatch):
    """steps: 0 where the grid is solved exactly, else of the dual ascent."""
    count = 16
    coefficients = torch.randn(3, count, h, w, device=DEVICE)
    coefficients[1, :, -1], coefficients[2, :, :, -1] = 0, 0
    if steps:
        coefficients[1:] = -coefficients[1:].abs()
    g, down, right = coefficients.permute(0, 2, 3, 1)
    monkeypatch.setattr(binary_grid, "STEPS", (steps, steps))
    solver = binary_grid.solve_binary_approximately if steps else binary_grid.solve_binary_exact
    expected, lowest = solver(g, down[:-1], right[:, :-1])
    x = torch.full((count, h, w), -1, dtype=torch.int32, device=DEVICE)
    value = torch.empty(count, device=DEVICE)
    sizes = {"H": h, "W": w, "HEIGHT": kernels.power(h), "WIDTH": kernels.power(w)}
    kernels.launch(
        binary_kernel, (1,), coefficients, x, value, h, w, steps, **sizes, EXACT=not steps, LABELS=count, num_warps=1
    )
    assert torch.equal(x.permute(1, 2, 0).float(), expected)
    torch.testing.assert_close(value, lowest)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 3, 4, 4, 1), {"rounds": 1}),
        ((2, 2, 2, 2, 1), {"rounds": 1, "thres_type": "soft"}),
    ],
)
def test_labelling_equals_that_of_torch(sizes, options):
    """sizes: parts, inputs, height and width of the grid, initial labellings."""
    assert_same_labelling(make_problem(*sizes), **PROBLEM | options)


@pytest.mark.parametrize("thres_type", ["hard", "soft"])
def test_gain_of_a_move_is_the_decrease_of_the_objective(thres_type):
    m, h, w = 3, 2, 2
    cost, a, order = make_problem(1, m, h, w, 1)
    options = {"beta": 0.32, "gamma": 1.0, "thres": 0.4, "thres_type": thres_type}
    energy = build_energy(cost, a, **options)
    search = kernels.Search(kernels.start(energy, order), energy, a, None)
    search.offer(try_soft=True)
    search.expand()
    offered, blocks, gain = (array.view(m, search.tried, -1) for array in (search.offered, search.blocks, search.gain))
    labels = F.one_hot(search.state.labels.long(), m).double().mean(1)  # (outputs, blocks, inputs)

    def evaluate(labels):
        terms = objective(labels.view(1, m, h, w, m), cost.double(), a.double(), **options)
        return sum(terms)

    for output in range(m):
        for number in range(search.tried):
            label = F.one_hot(offered[output, number].long(), m).double().mean(0)
            moved = labels.clone()
            moved[output] = torch.where(blocks[output, number].unsqueeze(1) > 0, label, moved[output])
            torch.testing.assert_close(
                gain[output, number].double(), evaluate(labels) - evaluate(moved), atol=1e-5, rtol=0
            )
    assert blocks.any(2).sum() > 5 and (blocks.sum(2) < h * w).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 5, 4, 4, 2), {"rounds": 4}),
        ((2, 4, 2, 2, 2), {"rounds": 4, "thres_type": "soft"}),
        ((1, 7, 3, 3, 2), {"rounds": 2, "resolve": False}),
        ((1, 13, 4, 2, 1), {"rounds": 1}),
        ((1, 34, 2, 1, 1), {"rounds": 1}),
        ((1, 3, 8, 8, 1), {"rounds": 1}),
        ((1, 2, 5, 5, 1), {"rounds": 1}),
        ((1, 2, 16, 16, 1), {"rounds": 1, "resolve": False}),
    ],
)
def test_labelling_equals_that_of_torch_at_more_sizes(sizes, options):
    assert_same_labelling(make_problem(*sizes), **PROBLEM | options)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)))
def test_labelling_equals_that_of_torch_on_recorded_problems(number):
    case = CASES[number]
    cost, a = (torch.from_numpy(RECORDED[f"c{number}_{name}"])[None].to(DEVICE) for name in ("cost", "A"))
    order = torch.rand(1, 1, case["m"], device=DEVICE).argsort(2)
    options = {key: case[key] for key in ("beta", "gamma", "thres", "thres_type", "resolve")}
    assert_same_labelling((cost, a, order), rounds=4 if case["m"] <= 8 else 2, **options)


@pytest.mark.slow
@pytest.mark.data
def test_objective_on_real_gradients_is_no_worse_than_that_of_torch(real_data):
    """20 parts of 20 images on a GPU, of 4 images interpreted."""
    m, starts, rounds = (20, 2, 8) if DEVICE.type == "cuda" else (4, 1, 4)
    image_set = load_evaluation("cifar10", data_dir=str(real_data), limit=20 * m)
    file = load_classifier(str(real_data / "weights" / "resnet20_cifar10.pt"), models)
    images = normalize(image_set.pixels.permute(0, 3, 1, 2).float() / 255, file.mean, file.std)
    saliency = Gradient(file.network)(images, F.one_hot(image_set.labels, 10).float())
    positions = most_salient_window(saliency).view(20, m, 2)
    cost = block_costs(saliency.view(20, m, 32, 32), torch.full((20, m), 1 / m), 4, 0.05)
    problem = (cost, compatibility_matrix(positions, 0.001), torch.rand(20, starts, m).argsort(2))
    problem = [tensor.to(DEVICE) for tensor in problem]
    expected = comixup_labelling.solve(*problem, **PROBLEM, rounds=rounds).objective
    found = kernels.solve(*problem, **PROBLEM, rounds=rounds).objective
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_problems_too_large_for_a_program_are_solved_by_torch(monkeypatch):
    monkeypatch.setattr(kernels, "launch", None)
    assert_same_labelling(make_problem(1, 2, 17, 17, 1), **PROBLEM, rounds=1)
    monkeypatch.setattr(kernels, "MAX_INPUTS", 3)
    assert_same_labelling(make_problem(1, 4, 2, 2, 1), **PROBLEM, rounds=1)


def test_method_uses_the_kernels_where_kernels_run(monkeypatch):
    images, targets, maps = torch.randn(4, 3, 8, 8), torch.eye(4), torch.rand(4, 8, 8)
    calls, asked, results = [], [], []

    def solve(*problem, **options):
        calls.append(options)
        return comixup_labelling.solve(*problem, **options)

    monkeypatch.setattr(kernels, "solve", solve)
    for runs in (False, True):
        monkeypatch.setattr(comixup, "use_kernels", lambda mode, device, runs=runs: asked.append(mode) or runs)
        torch.manual_seed(1)
        mixer = CoMixup(m_block_num=2, kernels="triton" if runs else "torch")
        results.append(mixer(images, targets, lambda images, targets: maps))
    assert all(map(torch.equal, *results))
    assert asked == ["torch", "triton"] and len(calls) == 1


ARGUMENTS = {  # types of the kernels' arguments; all others are i32
    "*i32": {"labels", "to_labels", "best_labels", "offered", "blocks", "touched"},
    "*i64": {"order"},
    "*fp32": {"cost", "compatibility", "extra", "counts", "to_counts", "best_counts", "overlap", "unit", "step", "gain"}
    | {"value", "best_value"},
    "fp32": {"smoothness", "diversity", "shift", "level", "noise", "weight"},
}
OFFERED = {"LABELS": 11, "HARD": 4, "REOFFERED": 4, "SOFT": 3}
GRID = {"H": 4, "W": 4, "HEIGHT": 4, "WIDTH": 4}
FINE = {"H": 0, "W": 0, "EXACT": False, "LABELS": kernels.LABELS_TOGETHER[False]}
SMALL, LARGE = {"CHUNK": 16}, {"CHUNK": 64}
VARIANTS = {  # for parts of 20 images: kernel, warps, constants without INPUTS, the most registers that it may take
    "expand 4": ("expand_kernel", 1, {**GRID, "EXACT": True, "LABELS": kernels.LABELS_TOGETHER[True]}, 152),
    "expand 8": ("expand_kernel", 1, {**FINE, "HEIGHT": 8, "WIDTH": 8}, 96),
    "expand 16": ("expand_kernel", 1, {**FINE, "HEIGHT": 16, "WIDTH": 16}, 240),
    "offer 4": ("offer_kernel", 4, {**OFFERED, **SMALL}, 80),
    "offer 16": ("offer_kernel", 8, {**OFFERED, **LARGE}, 96),
    "select 4": ("select_kernel", 4, {"MOVE": True, "LABELS": 16, **SMALL}, 144),
    "select 16": ("select_kernel", 8, {"MOVE": True, "LABELS": 16, **LARGE}, 144),
    "start": ("start_kernel", 1, {**GRID, "RULER": 0x6410, "MARKS": 4}, 128),
    "carry": ("carry_kernel", 1, {"STARTS": 2, "BLOCKS": 256}, 80),
    "duplicate": ("duplicate_kernel", 1, {}, 80),
}


def make_build(name: str, warps: int, constants: dict, capability: int) -> Build:
    kernel, types = getattr(rounds_of, name), {}
    for argument in kernel.arg_names:
        types[argument] = next((type_ for type_, names in ARGUMENTS.items() if argument in names), "i32")
    return Build(kernel, types, {**constants, "INPUTS": 32}, warps, capability)


def assert_compiles(names: list[str], capability: int):
    usages = compile_ahead([make_build(*VARIANTS[name][:3], capability) for name in names])
    for name, usage in zip(names, usages, strict=True):
        assert usage.spilled == 0 and usage.registers <= VARIANTS[name][3] and usage.shared <= 16_384, (name, usage)


def test_expansions_compile_without_spills():
    assert_compiles(["expand 4", "expand 16"], 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability):
    assert_compiles(list(VARIANTS), capability)
