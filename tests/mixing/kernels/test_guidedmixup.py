"""The kernel of GuidedMixup's pairing against the torch pairing. Where there is no GPU, the kernel is interpreted."""

from importlib import import_module

import numpy as np
import pytest
import torch
from compile_ahead import Build, compile_ahead
from support import GOLDEN

from mixing.guidedmixup import measure_distances, pair_in_a_cycle

pytest.importorskip("triton")
kernels = import_module("mixing.kernels.guidedmixup")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 17, 40])
def test_pairs_equal_those_of_torch(size):
    maps = torch.rand(size, 4, 5, generator=torch.Generator().manual_seed(size))
    for distance in (measure_distances(maps), torch.zeros(size, size)):
        partner = kernels.pair_in_a_cycle(distance.to(DEVICE))
        assert partner.dtype == torch.int64 and partner.tolist() == pair_in_a_cycle(distance).tolist()


def test_pairs_match_the_published_code():
    golden = np.load(GOLDEN / "more_methods.npz")
    distance = torch.from_numpy(golden["guided_pair40_dist"]).float().to(DEVICE)
    assert kernels.pair_in_a_cycle(distance).tolist() == golden["guided_pair40_pair"].tolist()


@pytest.mark.parametrize("capability", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
def test_the_kernel_compiles_without_spilling(capability):
    signature = {"distance": "*fp32", "start": "*i64", "partner": "*i64", "size": "i32"}
    sizes = {128: 1, 1024: 4}
    builds = [Build(kernels.cycle_kernel, signature, {"BLOCK": n}, warps, capability) for n, warps in sizes.items()]
    for one in compile_ahead(builds):
        assert one.spilled == 0 and one.registers <= 64
