"""The kernel of SAGE's search against the torch search. Where there is no GPU, the kernel is interpreted."""

from importlib import import_module

import pytest
import torch
from compile_ahead import Build, compile_ahead
from torch.nn import functional as F

import models
from engine.data.datasets import load_evaluation
from engine.inference.classifier import load_classifier, normalize
from mixing import sage
from mixing.sage import SAGE, blend_shifted, scale_maps
from mixing.solvers import sage_offsets
from saliency.gradient import Gradient, blur

pytest.importorskip("triton")
kernels = import_module("mixing.kernels.sage")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_pairs(batch: int, height: int, width: int, lam: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps A and B of smooth blobs, (B, H, W). In the first pair there are pixels without A, B or both."""
    maps = torch.rand(batch, height, width, device=DEVICE) ** 4
    if min(height, width) > 2:
        maps = blur(maps, 1.5, 5)
    first, second = scale_maps(maps, torch.arange(batch, device=DEVICE).roll(1), torch.tensor(lam, dtype=torch.float64))
    first[0, : height // 2], second[0, :, : width // 2] = 0, 0
    return first, second


def make_offsets(height: int, width: int, count: int) -> torch.Tensor:
    """Return random offsets and, at the end, those with an overlap of one pixel, of one edge and of all pixels."""
    bottom, right = height - 1, width - 1
    extremes = [[bottom, right], [-bottom, -right], [bottom, 0], [0, -right], [0, 0]]
    return torch.cat([sage_offsets.random_offsets(height, width, count), torch.tensor(extremes)])


def assert_search_agrees(first, second, offsets):
    """Compare scores and best offsets with the torch search; the kernel leaves out the sum of A."""
    expected = sage_offsets.score_offsets(first, second, offsets)
    scores = kernels.score_offsets(first, second, offsets.to(DEVICE)) + first.sum((1, 2)).unsqueeze(1)
    torch.testing.assert_close(scores, expected, atol=2e-7, rtol=0)
    found = kernels.find_best_offset(first, second, offsets)
    assert found.dtype == torch.int64 and found.device == first.device
    best = (offsets.to(DEVICE) == found.unsqueeze(1)).all(2).float().argmax(1, keepdim=True)
    assert (expected.amax(1) - expected.gather(1, best)[:, 0]).max() < 4e-7, "another offset is better by more"


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 10), (5, 40), (20, 3), (1, 1)])
def test_scores_equal_those_of_torch(height, width):
    """Also for images smaller and larger than a tile, with edges that no tile fits."""
    offsets = make_offsets(height, width, 4)
    assert_search_agrees(*make_pairs(3, height, width), offsets)


def test_large_images_are_searched_in_larger_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_EXACT_PIXELS", 0)
    assert_search_agrees(*make_pairs(2, 33, 40), make_offsets(33, 40, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("side", "batch", "count"), [(32, 2, 34), (224, 1, 8)])
def test_scores_equal_those_of_torch_at_training_sizes(side, batch, count):
    assert_search_agrees(*make_pairs(batch, side, side), make_offsets(side, side, count))


@pytest.mark.parametrize("order", [[[0, 1], [1, 0], [0, 0]], [[3, 3], [1, 0], [0, 0], [0, 1]]])
def test_first_of_equal_offsets_wins(order):
    first, second = torch.full((1, 4, 4), 1 / 3, device=DEVICE), torch.zeros(1, 4, 4, device=DEVICE)
    second[0, 1:3, 1:3] = 1.0  # equally good anywhere in the frame
    expected = next(offset for offset in order if offset != [3, 3])
    assert kernels.find_best_offset(first, second, torch.tensor(order)).tolist() == [expected]


def test_on_maps_of_equal_values_opposite_offsets_are_equally_good():
    """Two uniform maps take the place of two that are all zero. A shift then only costs area, in any direction."""
    first, second = torch.full((1, 9, 35), 0.4 / 315, device=DEVICE), torch.full((1, 9, 35), 0.6 / 315, device=DEVICE)
    offsets = torch.tensor([[2, 3], [-2, 3], [2, -3], [-2, -3]], device=DEVICE)
    assert kernels.score_offsets(first, second, offsets).unique().numel() == 1


def test_each_image_can_have_its_own_offsets():
    first, second = make_pairs(3, 6, 7)
    offsets = torch.stack([sage_offsets.random_offsets(6, 7, 4) for _ in range(3)]).to(DEVICE)
    scores = kernels.score_offsets(first, second, offsets)
    expected = torch.cat([kernels.score_offsets(first[n : n + 1], second[n : n + 1], offsets[n]) for n in range(3)])
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("max_exact_pixels", [16, 0])  # all offsets scored exactly; only the best candidates
def test_exhaustive_search_finds_the_optimum(max_exact_pixels, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_EXACT_PIXELS", max_exact_pixels)
    first, second = make_pairs(2, 4, 4)
    exact = sage_offsets.score_offsets(first, second, sage_offsets.all_offsets(4, 4))
    found = kernels.find_best_offset_exhaustive(first, second)
    place = (found[:, 1] + 3) * 7 + found[:, 0] + 3
    torch.testing.assert_close(exact.gather(1, place.unsqueeze(1))[:, 0], exact.amax(1), atol=2e-7, rtol=0)


def test_method_uses_the_kernel_where_kernels_run(monkeypatch):
    """One seed, one result, whichever search runs; and a search is one launch."""
    images, targets, maps = torch.randn(2, 3, 4, 4), torch.eye(2), torch.rand(2, 4, 4)
    images, targets, maps = (tensor.to(DEVICE) for tensor in (images, targets, maps))
    launches = []

    def count(kernel, *args, **options):
        launches.append(kernel)
        launch(kernel, *args, **options)

    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", count)
    for search in ("random", "exhaustive"):
        results = []
        for runs in (False, True):
            monkeypatch.setattr(sage, "use_kernels", lambda mode, device, runs=runs: runs)
            torch.manual_seed(1)
            mixer = SAGE(mixup_alpha=0.0, rand_pos=0.1, search=search)
            results.append(mixer(images, targets, lambda images, targets: maps))
        assert all(map(torch.equal, *results))
    assert launches == [kernels.score_kernel] * 2


@pytest.mark.parametrize("capability", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
def test_a_program_keeps_its_tile_in_registers(capability):
    """So nothing is spilled, and enough programs run on a multiprocessor to hide the latency of their loads."""
    signature = dict.fromkeys(["first", "second", "scores"], "*fp32") | {"offsets": "*i64"}
    signature |= dict.fromkeys(["offset_stride", "height", "width"], "i32")
    builds = []
    for side in (32, 224):
        tile = kernels.choose_tile(side, side)
        warps = tile.pop("num_warps")
        builds.append(Build(kernels.score_kernel, signature, tile, warps, capability))
    small, large = compile_ahead(builds)
    assert small.spilled == large.spilled == 0 and small.shared == 0 and large.shared <= 64
    assert small.registers <= 80 and small.resident >= 24 and small.loops[0] <= 180
    assert large.registers <= 48 and large.resident >= 8 and large.loops[0] <= 100


@pytest.mark.slow
@pytest.mark.data
def test_offsets_equal_those_of_torch_on_real_gradients(real_data):
    image_set = load_evaluation("cifar10", data_dir=str(real_data), limit=6)
    file = load_classifier(str(real_data / "weights" / "resnet20_cifar10.pt"), models)
    images = normalize(image_set.pixels.permute(0, 3, 1, 2).float() / 255, file.mean, file.std)
    source = Gradient(file.network, reduction="mean_abs", blur_sigma=1.0)
    maps = source(images, F.one_hot(image_set.labels, 10).float()).to(DEVICE)
    for lam in (0.1, 0.5):
        first, second = scale_maps(maps, torch.arange(6, device=DEVICE).roll(1), torch.tensor(lam))
        assert_search_agrees(first, second, sage_offsets.random_offsets(32, 32, 39))


@pytest.mark.gpu
def test_search_does_not_wait_for_the_gpu():
    images, targets, maps = torch.randn(6, 3, 16, 12), torch.eye(6), torch.rand(6, 16, 12)
    images, targets, maps = (tensor.cuda() for tensor in (images, targets, maps))
    partner, lam = torch.randperm(6, device="cuda"), torch.tensor(0.4, dtype=torch.float64)
    offsets = sage_offsets.random_offsets(16, 12, 20)
    kernels.find_best_offset(maps, maps, offsets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = scale_maps(maps, partner, lam)
        blend_shifted(images, targets, first, second, partner, kernels.find_best_offset(first, second, offsets))
    finally:
        torch.cuda.set_sync_debug_mode("default")
