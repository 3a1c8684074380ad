"""The graph-cut solver, for comparison: its results, and the error if its package is missing."""

import json
import sys

import numpy as np
import pytest
import torch
from support import GOLDEN, load_recorded_problem

from mixing import build_mixer
from mixing.solvers import puzzlemix_mask
from mixing.solvers.graphcut import duplicate_costs, pairwise_costs, soft_labels, solve_labelling, solve_mask


def test_mask_energies_match_the_published_code():
    pytest.importorskip("gco")
    golden = np.load(GOLDEN / "puzzlemix.npz")
    for number, case in enumerate(json.loads(str(golden["meta"]))):
        problem = load_recorded_problem(golden, number, case)
        energy = puzzlemix_mask.energy(solve_mask(*problem), *problem)
        torch.testing.assert_close(
            energy.double(), torch.from_numpy(golden[f"c{number}_energy_ref"]), atol=1e-3, rtol=0
        )


def test_more_sweeps_lower_the_objective():
    pytest.importorskip("gco")
    cost, identity = -torch.rand(2, 6, 4, 4).softmax(1), torch.eye(6).expand(2, -1, -1)
    settings = {"beta": 0.32, "gamma": 1.0, "thres": 0.83}
    first, last = (solve_labelling(cost, identity, sweeps=sweeps, **settings) for sweeps in (1, 8))
    assert last.sources.shape == (2, 6, 4, 4, 2) and last.counts.sum(2).eq(16).all()
    assert last.objective.mean() < first.objective.mean()


def test_soft_labels_and_their_pairwise_costs():
    assert soft_labels(np.array([0, 5, 3, 0, 8])) == [(4, 1), (4, 2), (1, 2)]
    assert soft_labels(np.array([16, 0])) == []
    labels = np.array([(0, 0), (1, 1), (0, 1), (2, 3), (1, 2)])
    wanted = [[0, 4, 1, 3, 3], [4, 0, 1, 3, 1], [1, 1, 0, 2, 1], [3, 3, 2, 0, 1], [3, 1, 1, 1, 0]]
    assert pairwise_costs(labels, 4).tolist() == wanted  # of |z - z'|^2 / 2: 1, 1/4 and 3/4 as in the objective


def test_duplicate_costs_separate_outputs_with_the_same_inputs():
    counts = np.array([[8.0, 8, 0], [2, 14, 0], [0, 16, 0]])
    extra = duplicate_costs(counts, 0.5)
    assert extra.tolist() == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", ["puzzlemix", "comixup"])
def test_methods_run_with_the_graph_cut_solver(name):
    pytest.importorskip("gco")
    images, targets = torch.randn(5, 3, 16, 16), torch.eye(5)
    mixed, soft = build_mixer(name, solver="gco")(images, targets, lambda images, targets: images.abs().mean(1))
    assert mixed.shape == images.shape and mixed.isfinite().all()
    torch.testing.assert_close(soft.sum(1), torch.ones(5))


@pytest.mark.parametrize("name", ["puzzlemix", "comixup"])
def test_missing_package_is_reported_by_the_constructor(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gco", None)
    monkeypatch.setitem(sys.modules, "numpy", None)  # as in an environment with torch alone
    monkeypatch.delitem(sys.modules, "mixing.solvers.graphcut")
    with pytest.raises(ValueError, match="pip install gco-wrapper"):
        build_mixer(name, solver="gco")
    with pytest.raises(ValueError, match="parallel or gco"):
        build_mixer(name, solver="cut")
