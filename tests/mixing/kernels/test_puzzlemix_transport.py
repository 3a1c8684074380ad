"""The Triton kernel of PuzzleMix's transport gives the blocks of the torch solver. Without a GPU it is interpreted."""

import json

import numpy as np
import pytest
import torch
from compile_ahead import CAPABILITIES, Build, compile_ahead
from support import GOLDEN, tensor

from mixing.ops import block_means, normalize_sum
from mixing.solvers import puzzlemix_transport as reference

pytest.importorskip("triton")
from mixing.kernels import puzzlemix_transport as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIGNATURE = {"block_saliency": "*fp32", "needed": "*i1", "result": "*i64", "unit": "fp32", "rows": "i32"}
SIGNATURE["columns"] = "i32"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make_maps(batch: int, rows: int, columns: int) -> torch.Tensor:
    return normalize_sum(torch.rand(batch, rows, columns) ** 4 + 0.01)


def check_equal(saliency: torch.Tensor, needed: torch.Tensor, t_eps: float) -> torch.Tensor:
    """Compare the blocks and return them. The interpreter takes 10 ms for each function of Triton that a kernel calls,
    so the tests have few images and few rounds.
    """
    block = kernel.solve_transport(saliency.to(DEVICE), needed.to(DEVICE), t_eps).cpu()
    assert torch.equal(block, reference.solve_transport(saliency, needed, t_eps))
    return block


@pytest.mark.parametrize("bidders", [1, 4])
def test_groups_of_any_size_give_the_blocks_of_the_torch_solver(monkeypatch, bidders):
    monkeypatch.setattr(kernel, "BIDDERS", bidders)
    block = check_equal(make_maps(1, 3, 5), torch.rand(1, 3, 5) < 0.6, 0.3)  # 7 rounds, 30 bids
    assert (block != torch.arange(15)).sum() == 3


@pytest.mark.parametrize(
    "batch, rows, columns, t_eps",
    [
        (2, 2, 2, 0.02),
        (1, 4, 4, 0.03),  # 72 rounds: the slack doubles
        (1, 8, 8, 0.4),
        *(slow(8, side, side, t_eps) for side in (2, 4) for t_eps in (0.8, 0.1, 0.02)),
        *(slow(4, 8, 8, t_eps) for t_eps in (0.8, 0.1, 0.02)),
        *(slow(2, 16, 16, t_eps) for t_eps in (0.8, 0.1)),
        slow(2, 7, 12, 0.3),
    ],
)
def test_blocks_are_those_of_the_torch_solver(monkeypatch, batch, rows, columns, t_eps):
    monkeypatch.setattr(kernel, "BIDDERS", 16)  # fewer groups to interpret
    needed = torch.rand(batch, rows, columns) < 0.5
    check_equal(make_maps(batch, rows, columns), needed, t_eps)


@pytest.mark.parametrize("bidders", [1, 4])
def test_ties_go_to_the_first_place_and_the_first_block(monkeypatch, bidders):
    """Four places want the same block; one place wants any of four blocks."""
    monkeypatch.setattr(kernel, "BIDDERS", bidders)
    one = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    two = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    around = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    block = check_equal(normalize_sum(torch.stack([one, two])), torch.stack([around, ~around & (two == 0)]), 0.4)
    assert block.tolist() == [[0, 4, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 5, 6, 7, 8]]


def test_nothing_moves_without_gain():
    """All or no places are needed, or all blocks are the same."""
    saliency = torch.cat([make_maps(2, 3, 3), torch.full((1, 3, 3), 1 / 9)])
    needed = torch.stack([torch.ones(3, 3), torch.zeros(3, 3), torch.eye(3)]).bool()
    assert check_equal(saliency, needed, 0.02).equal(torch.arange(9).expand(3, 9))


@pytest.mark.parametrize("number", [11, *(slow(number) for number in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10))])
def test_recorded_problems_have_the_blocks_of_the_torch_solver(monkeypatch, number):
    monkeypatch.setattr(kernel, "BIDDERS", 16)
    golden = np.load(GOLDEN / "puzzlemix.npz")
    case = json.loads(str(golden["meta"]))[number]
    side, partner = case["t_block_num"], tensor(golden[f"c{number}_perm"]).long()
    salient = normalize_sum(block_means(tensor(golden[case["sal"]]), side, side))
    for image, values in (("t1", salient), ("t2", salient[partner])):
        check_equal(values, tensor(golden[f"c{number}_{image}_need"]).view(-1, side, side), case["t_eps"])


def test_larger_grids_are_solved_by_torch(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PLACES", 8)
    monkeypatch.setattr(kernel, "launch", None)
    check_equal(make_maps(2, 3, 3), torch.rand(2, 3, 3) < 0.5, 0.1)


def make_build(places: int, capability: int) -> Build:
    constants, options = {"PLACES": places, "BIDDERS": kernel.BIDDERS}, {"enable_fp_fusion": False}
    return Build(kernel.run_auction, SIGNATURE, constants, max(1, places // 64), capability, options)


ALL_VARIANTS = [(places, capability) for places in (4, 16, 64, 256, 1024) for capability in CAPABILITIES]


@pytest.mark.parametrize("variants", [[(64, 90)], slow(ALL_VARIANTS)], ids=["one", "all"])
def test_a_program_fits_the_registers(variants):
    usages = compile_ahead([make_build(*variant) for variant in variants])
    for (places, capability), usage in zip(variants, usages, strict=True):
        few = 16 if capability == 80 else 0  # 4 numbers, which are read back once a round
        assert usage.spilled <= few and usage.registers <= 96, (places, usage)
        assert usage.shared <= 4 * places and usage.instructions <= 2400, (places, usage)
