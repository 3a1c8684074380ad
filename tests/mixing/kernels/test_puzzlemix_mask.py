"""The kernels of PuzzleMix's mask against the torch functions. Where there is no GPU, the kernels are interpreted."""

from importlib import import_module

import pytest
import torch
from compile_ahead import CAPABILITIES, Build, compile_ahead
from torch.nn import functional as F

import mixing.puzzlemix
import models
from engine.data.datasets import load_evaluation
from engine.inference.classifier import load_classifier, normalize
from mixing.ops import block_means, normalize_sum
from mixing.puzzlemix import PuzzleMix, build_mask_problem, largest_divisor
from mixing.solvers import puzzlemix_mask as solver
from saliency.gradient import Gradient

pytest.importorskip("triton")
kernels = import_module("mixing.kernels.puzzlemix_mask")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHTS = {"beta": 1.2, "gamma": 0.5, "eta": 0.2}


def make_case(images, saliency, n: int, cell: int | None = 4) -> tuple:
    """Return block saliency, cells, partner and lam for build_mask_problem(). cell: None for no cells."""
    sides = [largest_divisor(side // n, cell or 1) for side in images.shape[2:]]
    cells = F.avg_pool2d(images, sides) if cell else None
    partner = torch.arange(len(images), device=images.device).roll(1)
    return normalize_sum(block_means(saliency, n, n)), cells, partner, torch.tensor(0.4, dtype=torch.float64)


def make_problem(labels: int, n: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Return the mask problem of random images with salient spots."""
    images = F.interpolate(torch.rand(batch, 3, 5, 5, device=DEVICE), (2 * n, 2 * n), mode="bilinear")
    case = make_case(images, images.mean(1) ** 6 + 1e-3 * torch.rand(batch, 2 * n, 2 * n, device=DEVICE), n)
    return build_mask_problem(*case, n_labels=labels, **WEIGHTS)


def assert_solutions_agree(problem):
    labels, energy, bound = kernels.solve(*problem)
    wanted, least, its_bound = solver.solve(*problem)
    assert labels.dtype == torch.int64 and labels.device == wanted.device
    torch.testing.assert_close(energy, solver.energy(labels, *problem), atol=1e-6, rtol=0)
    torch.testing.assert_close(energy, least, atol=1e-6, rtol=0)
    torch.testing.assert_close(bound, its_bound, atol=1e-6, rtol=0)
    return labels, wanted


@pytest.mark.parametrize(
    ("n", "labels"),
    [
        *((1, 3), (2, 2), (2, 3), (3, 4), (5, 3), (6, 2)),
        *(pytest.param(n, k, marks=pytest.mark.slow) for n in (4, 7, 8, 9, 12, 16) for k in (2, 3, 4)),
        *(pytest.param(n, k, marks=pytest.mark.slow) for n in (24, 32) for k in (2, 3)),
    ],
)
def test_labels_equal_those_of_the_torch_solver(n, labels):
    found, wanted = assert_solutions_agree(make_problem(labels, n))
    assert torch.equal(found, wanted) and (n < 3 or 0 < found.sum() < (labels - 1) * found.numel())


def test_images_that_never_settle_are_rounded_as_in_torch(monkeypatch):
    """After few iterations, the best of several thresholds is taken, and it is not the first one for all images."""
    monkeypatch.setattr(solver, "ITERATIONS", {8: 2})
    problem = make_problem(3, 5, batch=4)
    found, wanted = assert_solutions_agree(problem)
    assert torch.equal(found, wanted)
    monkeypatch.setattr(solver, "THRESHOLDS", solver.THRESHOLDS[:1])
    assert (solver.solve(*problem)[1] > solver.energy(found, *problem)).any()


def test_too_large_grids_are_solved_by_torch(monkeypatch):
    problem = make_problem(3, 5)
    monkeypatch.setattr(kernels, "MAX_FLOWS", 127)
    monkeypatch.setattr(kernels, "launch", None)
    for ours, wanted in zip(kernels.solve(*problem), solver.solve(*problem), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    ("shape", "n", "cell", "labels"),
    [
        ((3, 3, 16, 32), 2, 4, 3),
        ((3, 1, 10, 10), 5, 1, 2),
        ((2, 3, 16, 16), 4, None, 4),
        ((1, 3, 16, 16), 8, 2, 3),
        ((2, 3, 8, 8), 1, 4, 4),
    ],
)
def test_mask_problem_equals_that_of_torch(shape, n, cell, labels):
    """Also for images that are not square or alone, in channels-last memory, of one channel, and without cells."""
    images = torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)
    case = make_case(images, torch.rand(shape[0], *shape[2:], device=DEVICE), n, cell)
    for weights in (WEIGHTS, WEIGHTS | {"gamma": 0.0}):
        ours = kernels.build_mask_problem(*case, n_labels=labels, **weights)
        for one, wanted in zip(ours, build_mask_problem(*case, n_labels=labels, **weights), strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-7, rtol=1e-6)


def test_puzzlemix_uses_the_kernels_where_they_run(monkeypatch):
    images, targets, source = torch.rand(3, 3, 8, 8, device=DEVICE), torch.eye(3, device=DEVICE), lambda x, _: x.mean(1)
    results, started, launch = [], [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: started.append(launch(*args, **options)))
    for uses_kernels in (False, True):
        monkeypatch.setattr(mixing.puzzlemix, "use_kernels", lambda mode, device, answer=uses_kernels: answer)
        torch.manual_seed(1)
        mixer = PuzzleMix(block_num=(2,), transport=False)
        mixed, soft = mixer(images, targets, source)
        results.append((mixed, soft, mixer.energy, mixer.bound))
    assert len(started) == 2
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_masks_of_real_gradients_equal_those_of_torch(real_data, n):
    image_set = load_evaluation("cifar10", data_dir=str(real_data), limit=100)
    file = load_classifier(str(real_data / "weights" / "resnet20_cifar10.pt"), models)
    images = normalize(image_set.pixels.permute(0, 3, 1, 2).float() / 255, file.mean, file.std)
    saliency = Gradient(file.network)(images, F.one_hot(image_set.labels, 10).float()).to(DEVICE)
    images = images.to(DEVICE)
    case = make_case(images, saliency, n)
    problem = build_mask_problem(*case, n_labels=3, **WEIGHTS)
    for ours, wanted in zip(kernels.build_mask_problem(*case, n_labels=3, **WEIGHTS), problem, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-7, rtol=1e-6)
    found, wanted = assert_solutions_agree(problem)
    assert (found == wanted).float().mean() > 0.999


# ---- Machine code ----

POINTERS = ("unary", "down", "right", "energy", "bound", "saliency", "cells")
NUMBERS = (*kernels.BUILD_NUMBERS, "iterations")
FLOATS = ("smooth", "local", "prior_0", "prior_1", "prior_2", "prior_3", "rate", "highest_momentum", "tolerance")
TYPES = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(FLOATS, "fp32")
TYPES |= {"labels": "*i64", "partner": "*i64"}


def make_builds(gpu: int) -> dict[str, Build]:
    """Return the variants for 3 labels at 4, 8 and 16 blocks, and for the largest problems."""
    ascents = {"8 blocks": (2, 2, 64, 2), "16 blocks": (2, 2, 256, 8), "4 labels": (3, 4, 256, 8)}
    ascents["32 blocks"] = (2, 2, 1024, 16)
    builds = {
        name: Build(kernels.ascend, TYPES, {"LAYERS": layers, "K": k, "PLACES": places}, warps, gpu)
        for name, (layers, k, places, warps) in ascents.items()
    }
    builds["exact"] = Build(kernels.solve_exactly, TYPES, {"N": 4, "LABELS": 3, "BASE": 4}, 4, gpu)
    constants = {"LABELS": 3, "PLACES": 256, "HAS_CELLS": True}
    return builds | {"build": Build(kernels.build_costs, TYPES, constants, 8, gpu)}


LIMITS = {  # registers, bytes of shared memory, instructions of the first loop, programs on a multiprocessor
    "build": (40, 1024, 60, 6),
    "exact": (40, 2048, 110, 8),
    "8 blocks": (96, 512, 250, 8),
    "16 blocks": (96, 2048, 250, 2),
    "4 labels": (255, 4096, 800, 1),
    "32 blocks": (128, 8192, 450, 1),
}


@pytest.mark.parametrize(
    ("gpu", "names"),
    [(90, ["exact", "16 blocks"]), *(pytest.param(gpu, list(LIMITS), marks=pytest.mark.slow) for gpu in CAPABILITIES)],
)
def test_machine_code_stays_within_its_limits(gpu, names):
    builds = make_builds(gpu)
    for name, usage in zip(names, compile_ahead([builds[name] for name in names]), strict=True):
        registers, shared, instructions, resident = LIMITS[name]
        assert usage.registers <= registers and usage.shared <= shared and usage.resident >= resident, (name, usage)
        assert usage.loops[0] <= instructions, (name, usage)
        assert usage.spilled <= (128 if name == "32 blocks" else 0), (name, usage)
