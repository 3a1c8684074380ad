import json
from itertools import product

import numpy as np
import pytest
import torch
from support import GOLDEN
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixing.comixup import (
    CoMixup,
    assemble_images,
    block_costs,
    compatibility_matrix,
    mix_targets,
    most_salient_window,
)
from mixing.solvers.binary_grid import solve_binary_approximately, solve_binary_exact
from mixing.solvers.comixup_energy import objective
from mixing.solvers.comixup_labelling import duplicate_penalty, select_moves, solve

RECORDED = np.load(GOLDEN / "comixup.npz")
CASES = json.loads(str(RECORDED["meta"]))


def recorded(case: int | str, name: str) -> torch.Tensor:
    prefix = case if isinstance(case, str) else f"c{case}"
    return torch.from_numpy(RECORDED[f"{prefix}_{name}"])


def problem(case: dict) -> dict:
    return {key: case[key] for key in ("beta", "gamma", "thres", "thres_type")}


def find_labelling(cost, compatibility, *, sweeps: int, resolve: bool, **problem):
    options = {f"m_{name}": value for name, value in problem.items()}
    return CoMixup(m_niter=sweeps, set_resolve=resolve, **options).find_labelling(cost, compatibility)


def to_label_weights(sources: torch.Tensor, m: int) -> torch.Tensor:
    """Convert pairs of inputs (..., 2) to label weights (..., m)."""
    return F.one_hot(sources, m).double().mean(-2)


def to_pairs(z: torch.Tensor) -> torch.Tensor:
    """Convert label weights (..., m) to pairs of inputs (..., 2)."""
    _, first = z.max(-1)
    rest = z - 0.5 * F.one_hot(first, z.shape[-1])
    return torch.stack([first, rest.max(-1).indices], -1)


def duplicate_share(counts: torch.Tensor) -> float:
    """Return the share of outputs that show the same set of two or more inputs as another output."""
    shown = counts > 0
    same = (shown.unsqueeze(2) == shown.unsqueeze(1)).all(3) & (shown.sum(2) > 1).unsqueeze(2)
    return (same & ~torch.eye(counts.shape[1], dtype=torch.bool)).any(2).double().mean().item()


def blob_maps(count: int, height: int, width: int) -> torch.Tensor:
    """Return smooth saliency maps with one peak each."""
    rows = torch.arange(height).view(1, -1, 1) - torch.rand(count, 1, 1) * height
    columns = torch.arange(width).view(1, 1, -1) - torch.rand(count, 1, 1) * width
    return (-(rows**2 + columns**2) / (height * width / 8)).exp() + 0.05


def batch(count: int = 8, height: int = 16, width: int = 16, classes: int = 5):
    images, saliency = torch.randn(count, 3, height, width), blob_maps(count, height, width)
    return images, torch.eye(classes)[torch.arange(count) % classes], lambda images, targets: saliency


@pytest.mark.parametrize("number", [0, 2, 3])
def test_costs_match_the_published_code(number):
    case, saliency = CASES[number], recorded(number, "sal")
    places = most_salient_window(saliency, case["dstride"])
    assert torch.equal(places, recorded(number, "loc").long())
    torch.testing.assert_close(
        compatibility_matrix(places[None], case["omega"])[0], recorded(number, "A"), atol=1e-5, rtol=0
    )
    cost = block_costs(saliency[None], recorded(number, "draw")[None], case["bn"], case["eta"])[0]
    torch.testing.assert_close(cost, recorded(number, "cost"), atol=1e-5, rtol=0)
    share = block_costs(saliency[None], torch.ones(1, case["m"]), case["bn"], 0.0)[0].neg()
    torch.testing.assert_close(share, recorded(number, "blocks"), atol=1e-5, rtol=0)


def test_equal_positions_give_the_identity_and_not_nan():
    assert torch.equal(compatibility_matrix(torch.full((2, 3, 2), 4), 0.5), torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_objective_matches_the_recorded_labellings(number):
    case, z = CASES[number], recorded(number, "z_ref").double()[None] / 2
    cost, a = recorded(number, "cost").double()[None], recorded(number, "A").double()[None]
    known = problem(case) | {"thres_type": "hard"}
    terms = [term.item() for term in objective(z, cost, a, **known)]
    overlap = objective(z, cost, torch.eye(case["m"]).double()[None], **known | {"thres": -1.0})[2].item()
    np.testing.assert_allclose([*terms, overlap], RECORDED[f"c{number}_energy_ref"], atol=1e-6, rtol=0)


def test_mixing_with_the_recorded_labelling_gives_the_recorded_result():
    z = recorded(3, "z_ref").float() / 2
    torch.testing.assert_close(assemble_images(recorded(3, "x"), to_pairs(z)), recorded(3, "out"), atol=1e-5, rtol=0)
    targets = F.one_hot(recorded(3, "y"), 10).float()
    torch.testing.assert_close(mix_targets(targets, z.sum((1, 2))[None]), recorded(3, "target"), atol=1e-5, rtol=0)


def test_solver_beats_the_published_one():
    ahead, no_worse, seeds = [], [], 16
    for number, case in enumerate(CASES):
        m, h = case["m"], case["bn"]
        cost = recorded(number, "cost").expand(seeds, m, h, h)
        a = recorded(number, "A").expand(seeds, m, m)
        found = find_labelling(cost, a, sweeps=case["niter"], resolve=case["resolve"], **problem(case))
        z = to_label_weights(found.sources, m)
        value = sum(objective(z, cost.double(), a.double(), **problem(case)))
        torch.testing.assert_close(found.objective.double(), value, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.counts.double(), z.sum((2, 3)))
        assert set(z.unique().tolist()) <= {0.0, 0.5, 1.0} and z.sum(-1).eq(1).all()
        assert duplicate_share(found.counts) <= 0.05
        z_ref = recorded(number, "z_ref").double()[None] / 2
        reference = sum(objective(z_ref, cost[:1].double(), a[:1].double(), **problem(case)))
        ahead.append((reference - value.mean()).item())
        no_worse += (value <= reference + 1e-6).tolist()
    assert sum(no_worse) >= 0.95 * len(no_worse)
    assert min(ahead) >= -1 and sum(ahead) / len(ahead) >= 3, ahead


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_solver_is_close_to_the_optimum_of_tiny_problems(name):
    cost, a = recorded(name, "cost"), recorded(name, "A")
    gaps = []
    for _ in range(4):
        found = find_labelling(cost, a, beta=0.32, gamma=1.0, thres=0.83, sweeps=4, resolve=False)
        gaps.append(found.objective.double() - recorded(name, "F_opt"))
    assert torch.stack(gaps).mean() <= 0.1


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (4, 4), (2, 3), (4, 2)])
def test_exact_binary_solver_finds_the_optimum(shape):
    h, w = shape
    count = 6
    g, down, right = torch.randn(h, w, count), torch.randn(h - 1, w, count), torch.randn(h, w - 1, count)
    every = torch.tensor(list(product((0.0, 1.0), repeat=h * w))).view(-1, h, w, 1)

    def value(x):
        inner = (x[..., 1:, :, :] * x[..., :-1, :, :] * down).sum((-3, -2))
        return (x * g).sum((-3, -2)) + inner + (x[..., 1:, :] * x[..., :-1, :] * right).sum((-3, -2))

    best = value(every).amin(0)
    x, found = solve_binary_exact(g, down, right)
    torch.testing.assert_close(found, best)
    torch.testing.assert_close(value(x), best)


def test_approximate_binary_solver_is_close_to_the_optimum():
    g, down, right = torch.randn(4, 4, 200), -torch.rand(3, 4, 200), -torch.rand(4, 3, 200)
    _, best = solve_binary_exact(g, down, right)
    x, found = solve_binary_approximately(g, down, right)
    value = (x * g).sum((0, 1)) + (x[1:] * x[:-1] * down).sum((0, 1)) + (x[:, 1:] * x[:, :-1] * right).sum((0, 1))
    torch.testing.assert_close(found, value)
    assert (found >= best - 1e-4).all() and (found - best).mean() < 0.01


def test_selected_moves_touch_different_inputs():
    gain = torch.rand(3, 6, 4)
    gain[0] = 1.0  # all equal
    touched = torch.rand(3, 6, 6, 4) < 0.3
    chosen, moved = select_moves(gain, touched)
    made = touched.gather(3, chosen.view(3, 1, 6, 1).expand(-1, 6, -1, -1)).squeeze(3) & moved.unsqueeze(1)
    assert made.sum(2).amax() <= 1 and moved.any(1).all()
    assert not select_moves(torch.zeros(1, 6, 4), touched[:1])[1].any(), "a move without a gain was made"


def test_duplicate_penalty_makes_duplicates_avoid_different_inputs():
    counts = torch.tensor([[[2.0, 2, 0], [1, 3, 0], [4, 0, 0]]])
    assert duplicate_penalty(counts)[0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_diversity_limits_how_many_outputs_show_an_input():
    """One input is the most salient everywhere; the diversity term limits how many outputs show it."""
    cost = torch.full((1, 8, 4, 4), -0.05)
    cost[:, 3] = -0.1
    order = torch.rand(1, 2, 8).argsort(2)
    free = solve(cost, torch.eye(8)[None], order, beta=0.32, gamma=0.0, thres=0.83)
    held = solve(cost, torch.eye(8)[None], order, beta=0.32, gamma=1.0, thres=0.83)
    assert free.counts[0, :, 3].sum() > 100 and held.counts[0, :, 3].sum() <= 2 * 16


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])  # parts of 4: alone, short, with a last part of one
@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_shapes_and_inputs_are_kept_and_the_seed_repeats(count, height, width):
    images, targets, source = batch(count, height, width)
    kept = images.clone(), targets.clone()
    torch.manual_seed(3)
    mixer = CoMixup(m_part=4)
    mixed, soft = mixer(images, targets, source)
    torch.manual_seed(3)
    again = CoMixup(m_part=4)(images, targets, source)
    assert torch.equal(mixed, again[0]) and torch.equal(soft, again[1]), "same seed, different results"
    assert mixed.shape == images.shape and mixed.dtype == images.dtype and soft.shape == targets.shape
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1]), "inputs were modified"
    assert len(mixer.objective) == (count + 3) // 4
    if count % 4 == 1:
        assert torch.equal(mixed[-1], images[-1]) and torch.equal(soft[-1], targets[-1]), (
            "a single image must not change"
        )


def test_imagesof_different_parts_are_not_mixed():
    images, source = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 16, 16), batch(10)[2]
    mixed, soft = CoMixup(m_part=4)(images, torch.eye(10), source)
    for begin, end in ((0, 4), (4, 8), (8, 10)):
        assert begin <= mixed[begin:end].min() and mixed[begin:end].max() <= end - 1
        torch.testing.assert_close(soft[begin:end, begin:end].sum(1), torch.ones(end - begin))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(10.0))


def test_options_affect_the_solution():
    images, targets, source = batch(8)
    whole, soft = CoMixup(m_beta=100.0)(images, torch.eye(8), source)
    assert soft.amax(1).eq(1).all(), "borders this expensive must not occur"
    free = CoMixup(m_thres=8.0)
    free(images, targets, source)
    held = CoMixup(m_thres=0.5)
    held(images, targets, source)
    assert free.objective < held.objective
    shapes = set()
    for _ in range(12):
        mixed, _ = CoMixup(m_block_num=-1)(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 16, 16), targets, source)
        shapes.add(min(h for h in (2, 4, 8, 16) if block_constant(mixed, 16 // h)))
    assert len(shapes) > 1
    assert torch.equal(CoMixup(mix_prob=0.0)(images, targets, None)[0], images)


def block_constant(values: torch.Tensor, side: int) -> bool:
    tiles = values.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return bool((tiles == tiles[..., :1, :, :1]).all())


class DeviceSyncs(TorchDispatchMode):
    """Records operations for which the host would wait for a GPU: reading a value, shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masks = op.overloadpacket == torch.ops.aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or op.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim"):
            self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("blocks", [4, 8])
def test_solver_never_synchronises_with_the_device(blocks):
    images, mixer, saliency = torch.randn(8, 3, 16, 16), CoMixup(m_part=4), blob_maps(8, 16, 16).view(2, 4, 16, 16)
    mixer.solve_parts(saliency, blocks)  # constants are cached
    with DeviceSyncs() as syncs:
        labelling = mixer.solve_parts(saliency, blocks)
        assemble_images(images, labelling.sources.flatten(0, 1))
        mix_targets(torch.eye(8), labelling.counts)
    assert not syncs.seen
    with DeviceSyncs() as syncs:
        saliency.sum().item()
    assert syncs.seen, "the check must detect reading a value"


def test_gradients_reach_the_imagesonly_through_the_mix():
    images, targets, source = batch(8)
    images.requires_grad_()
    mixed, soft = CoMixup()(images, targets, lambda images, _: images.abs().mean(1))
    mixed.sum().backward()
    assert not soft.requires_grad
    # the gradient counts how often each pixel is shown, in halves; in total, 8 images are shown
    assert (images.grad * 2 == (images.grad * 2).round()).all() and images.grad.sum() == images.numel()


def test_nan_or_all_zero_maps_are_replaced_by_uniform_ones():
    images, targets, _ = batch(8)
    saliency = blob_maps(8, 16, 16)
    saliency[2], saliency[5, 0, 0] = 0, torch.nan
    mixer = CoMixup()
    mixed, _ = mixer(images, targets, lambda images, _: saliency)
    assert mixed.isfinite().all() and mixer.objective.isfinite().all() and mixer.replaced_maps == 2


def test_wrong_options_and_sizes_raise_an_error_naming_them():
    for options in (
        {"mixup_alpha": 0},
        {"m_part": 0},
        {"m_block_num": 0},
        {"m_beta": -1},
        {"m_thres_type": "firm"},
        {"solver": "none"},
        {"mix_prob": 2},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            CoMixup(**options)
    images, targets, source = batch(4, 18, 16)
    with pytest.raises(ValueError, match="18x16"):
        CoMixup()(images, targets, source)


def test_gradient_options_follow_clean_lam():
    assert CoMixup().gradient_options == {"mode": "train", "clean_weight": 1.0}
    assert CoMixup(clean_lam=0).gradient_options == {"mode": "eval", "clean_weight": 0}
