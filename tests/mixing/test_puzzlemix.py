"""PuzzleMix: the mask problem and its solvers, transport, mixing, and the method as a whole."""

import itertools
import json

import numpy as np
import pytest
import torch
from fake_cuda import fake_cuda, find_obstacle
from support import GOLDEN, load_recorded_problem, tensor
from torch import nn
from torch.nn import functional as F

from mixing.ops import block_means, normalize_sum
from mixing.puzzlemix import PuzzleMix, build_mask_problem, mix
from mixing.solvers import puzzlemix_mask, puzzlemix_transport
from mixing.solvers.puzzlemix_transport import can_improve, run_auction, solve_transport, squared_distances
from saliency.gradient import Gradient

CPU = torch.device("cpu")
CIFAR100 = {
    "mean": (129.3 / 255, 124.1 / 255, 112.4 / 255),
    "std": (68.2 / 255, 65.4 / 255, 70.4 / 255),
}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "puzzlemix.npz")


def cases(golden) -> list[dict]:
    return json.loads(str(golden["meta"]))


def method(case: dict) -> PuzzleMix:
    names = ("n_labels", "beta", "gamma", "eta", "neigh_size", "transport", "t_eps", "t_size")
    statistics = CIFAR100 if case["x"] == "x32" else {}
    return PuzzleMix(block_num=(case["block_num"],), **{name: case[name] for name in names}, **statistics)


def random_problem(labels: int, n: int, batch: int = 6):
    return torch.rand(labels, n, n, batch), torch.rand(n - 1, n, batch), torch.rand(n, n - 1, batch)


def test_mask_problem_matches_the_recorded_one(golden):
    for number, case in enumerate(cases(golden)):
        mixer, n = method(case), case["block_num"]
        images, partner = tensor(golden[case["x"]]), tensor(golden[f"c{number}_perm"]).long()
        cell = min(case["neigh_size"], images.shape[-1] // n)
        salient = normalize_sum(block_means(tensor(golden[case["sal"]]), n, n))
        cells = F.avg_pool2d(images, cell) * mixer.std
        problem = build_mask_problem(salient, cells, partner, torch.tensor(case["lam"]), **mixer.weights)
        for ours, recorded in zip(problem, load_recorded_problem(golden, number, case), strict=True):
            torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=2e-7)


def test_mask_energies_reach_the_recorded_optimum(golden):
    gaps = []
    for number, case in enumerate(cases(golden)):
        problem = load_recorded_problem(golden, number, case)
        mask = tensor(golden[f"c{number}_mask_ref"])
        labels = ((1 - mask) * (case["n_labels"] - 1)).round().long().permute(1, 2, 0)
        reference = tensor(golden[f"c{number}_energy_ref"])
        torch.testing.assert_close(puzzlemix_mask.energy(labels, *problem).double(), reference, rtol=0, atol=1e-6)
        found, energy, bound = puzzlemix_mask.solve(*problem)
        assert torch.equal(energy, puzzlemix_mask.energy(found, *problem))
        energy = energy.double()
        gap = energy - tensor(golden[f"c{number}_energy_opt"])
        assert (gap < 1e-5).all(), case
        assert (energy <= reference + 1e-3).all(), case
        assert (bound <= energy + 1e-6).all() and (energy - bound < 1e-5).all(), case
        gaps.append(gap.mean())
    assert max(gaps) < 1e-6


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_exact_solver_finds_the_optimum_of_small_grids(labels):
    unary, down, right = random_problem(labels, 2)
    every = torch.tensor(list(itertools.product(range(labels), repeat=4))).view(-1, 2, 2, 1).expand(-1, -1, -1, 6)
    least = torch.stack([puzzlemix_mask.energy(one.contiguous(), unary, down, right) for one in every]).amin(0)
    torch.testing.assert_close(
        puzzlemix_mask.energy(puzzlemix_mask.solve(unary, down, right)[0], unary, down, right), least
    )


def test_exact_and_total_variation_solvers_agree():
    """Two independent solvers find the same energies."""
    slope = torch.rand(1, 4, 4, 20) - 0.5
    unary = slope * torch.linspace(0, 1, 3).view(-1, 1, 1, 1)  # convex in the label, like PuzzleMix's
    down, right = 0.2 * torch.rand(3, 4, 20), 0.2 * torch.rand(4, 3, 20)
    exact = puzzlemix_mask.energy(puzzlemix_mask.solve_exact(unary, down, right), unary, down, right)
    labels, bound = puzzlemix_mask.solve_total_variation(unary, down, right, iterations=300)
    torch.testing.assert_close(puzzlemix_mask.energy(labels, unary, down, right), exact, atol=1e-5, rtol=0)
    assert (bound <= exact + 1e-5).all() and (exact - bound).max() < 1e-3


@pytest.mark.parametrize("grid", [(5, 3), (6, 4), (9, 2), (7, 1)])
def test_total_variation_solver_finds_the_optimum_of_other_grids(grid):
    """Odd sides, non-square grids and single columns."""
    rows, columns = grid
    unary = (torch.rand(1, rows, columns, 20) - 0.5) * torch.linspace(0, 1, 3).view(-1, 1, 1, 1)
    down, right = 0.2 * torch.rand(rows - 1, columns, 20), 0.2 * torch.rand(rows, columns - 1, 20)
    exact = puzzlemix_mask.energy(puzzlemix_mask.solve_exact(unary, down, right), unary, down, right)
    labels, bound = puzzlemix_mask.solve_total_variation(unary, down, right)
    torch.testing.assert_close(puzzlemix_mask.energy(labels, unary, down, right), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(bound, exact, atol=1e-5, rtol=0)


def saliency_problem(labels: int, n: int, batch: int):
    """Return a problem with a range of difficulties, like PuzzleMix's: few to many iterations settle it."""
    slope = (torch.rand(1, n, n, batch) - 0.5) * torch.linspace(0.5, 2, batch)
    unary = slope * torch.linspace(0, 1, labels).view(-1, 1, 1, 1)
    return unary, 0.5 * torch.rand(n - 1, n, batch), 0.5 * torch.rand(n, n - 1, batch)


def count_images_in_the_ascent(monkeypatch) -> list[int]:
    """Return a list that gets the number of images at each call of DualAscent.advance()."""
    counts, advance = [], puzzlemix_mask.DualAscent.advance

    def counting(self, iterations):
        counts.append(self.batch)
        advance(self, iterations)

    monkeypatch.setattr(puzzlemix_mask.DualAscent, "advance", counting)
    return counts


@pytest.mark.parametrize("labels", [2, 3])
def test_labels_of_an_image_do_not_depend_on_its_batch(labels, monkeypatch):
    """Whether images leave, are solved in parts of the batch or alone, and where none leaves, as on a device."""
    problem = saliency_problem(labels, 8, 48)
    counts = count_images_in_the_ascent(monkeypatch)
    wanted, bound = puzzlemix_mask.solve_total_variation(*problem)
    assert counts[0] == 48 and counts[-1] < 24, "settled images must leave"
    some = [part[..., 10:20] for part in problem]
    for flows in (1, 5 * 2 * (labels - 1) ** 2 * 64):  # single images, and five at a time
        monkeypatch.setattr(puzzlemix_mask, "CACHED_FLOWS", flows)
        labels_of_some, bound_of_some = puzzlemix_mask.solve_total_variation(*some)
        assert torch.equal(labels_of_some, wanted[..., 10:20])
        torch.testing.assert_close(bound_of_some, bound[10:20])
    monkeypatch.undo()
    monkeypatch.setattr(puzzlemix_mask, "LEAVING_SHARE", -1)
    stayed, its_bound = puzzlemix_mask.solve_total_variation(*problem)
    assert torch.equal(stayed, wanted)
    torch.testing.assert_close(its_bound, bound)


def test_settled_images_are_those_that_meet_their_bound():
    """Some are settled after few iterations, all at the end; what settled stays."""
    problem = saliency_problem(3, 8, 60)
    f, down, right = problem[0][1:] - problem[0][:-1], problem[1] / 8, problem[2] / 8
    few, early = puzzlemix_mask.ascend_until_settled(f, down, right, 5)
    x, settled = puzzlemix_mask.ascend_until_settled(f, down, right, 200)
    assert settled.all() and 0 < early.sum() < 60
    assert torch.equal(x[..., early], few[..., early]) and not torch.equal(x, few)

    u, coupled = (few > 0).float(), 0
    for first, second, weight in ((u[:, :-1], u[:, 1:], down), (u[:, :, :-1], u[:, :, 1:], right)):
        coupled = coupled + ((first.unsqueeze(1) - second).abs() * weight).sum((0, 1, 2, 3))
    gap = (f * u).sum((0, 1, 2)) + coupled - (-few).clamp_max(0).sum((0, 1, 2))
    assert gap[early].max() < 2 * 128 * puzzlemix_mask.TOLERANCE < gap[~early].min()


def test_lower_bound_holds_after_any_number_of_iterations():
    unary = (torch.rand(1, 8, 8, 20) - 0.5) * torch.linspace(0, 1, 3).view(-1, 1, 1, 1)
    down, right = 0.3 * torch.rand(7, 8, 20), 0.3 * torch.rand(8, 7, 20)
    gaps = []
    best = puzzlemix_mask.energy(puzzlemix_mask.solve_total_variation(unary, down, right, 500)[0], unary, down, right)
    for iterations in (1, 20, 100):
        labels, bound = puzzlemix_mask.solve_total_variation(unary, down, right, iterations)
        assert (bound <= best + 1e-5).all()
        gaps.append(float((puzzlemix_mask.energy(labels, unary, down, right) - bound).mean()))
    assert gaps[0] > gaps[1] > gaps[2]


# ---- Transport ----


def plan_cost(block, salient, needed, t_eps):
    rows, columns = salient.shape[1:]
    places = rows * columns
    distance = squared_distances(rows, columns, CPU) / (max(rows, columns) - 1) ** 2
    value = t_eps * distance[block, torch.arange(places)] - salient.flatten(1).gather(1, block)
    return (value * needed.flatten(1)).sum(1)


def assert_valid(block, needed):
    for row, wanted in zip(block, needed.flatten(1), strict=True):
        assert len(row[wanted].unique()) == wanted.sum(), "a block must not be shown twice"
        assert torch.equal(row[~wanted], torch.arange(len(row))[~wanted])


def solve_without_counting(salient, needed, t_eps):
    """As solve_transport() does on other devices, where the host does not count the bidders."""
    unit = t_eps / (max(salient.shape[1:]) - 1) ** 2
    moves = can_improve(salient, needed, unit)
    return run_auction(salient, needed & moves.view(-1, 1, 1), unit, needed.numel())


@pytest.mark.parametrize("solve", [solve_transport, solve_without_counting])
def test_transport_is_at_least_as_good_as_the_recorded_plans(golden, solve):
    for number, case in enumerate(cases(golden)):
        side = case["t_block_num"]
        if not side:
            continue
        partner = tensor(golden[f"c{number}_perm"]).long()
        salient = normalize_sum(block_means(tensor(golden[case["sal"]]), side, side))
        for image, values in (("t1", salient), ("t2", salient[partner])):
            needed = tensor(golden[f"c{number}_{image}_need"]).view(-1, side, side)
            block = solve(values, needed, case["t_eps"])
            assert_valid(block, needed)
            cost = plan_cost(block, values, needed, case["t_eps"]).double()
            assert (cost - tensor(golden[f"c{number}_{image}_cost_ref"])).mean() <= 1e-6, case
            assert (cost - tensor(golden[f"c{number}_{image}_cost_opt"])).max() <= 2e-3, case


@pytest.mark.parametrize("t_eps", [0.1, 0.02])
def test_cheap_moves_end_alike_whether_or_not_the_host_counts(t_eps):
    """Auctions of a hundred rounds and more; with few bidders in a round they end, too."""
    salient, needed = normalize_sum(torch.rand(12, 8, 8) ** 4 + 0.01), torch.rand(12, 8, 8) < 0.5
    block, stay = solve_transport(salient, needed, t_eps), torch.arange(64).expand(12, 64)
    assert_valid(block, needed)
    assert torch.equal(block, solve_without_counting(salient, needed, t_eps))
    gain = plan_cost(stay, salient, needed, t_eps) - plan_cost(block, salient, needed, t_eps)
    assert gain.min() > 0.2, "no image is given up"
    few = run_auction(salient, needed, t_eps / 49, most_bidders=40)
    assert_valid(few, needed)
    assert (plan_cost(stay, salient, needed, t_eps) - plan_cost(few, salient, needed, t_eps) > 0.9 * gain).all()


@pytest.mark.parametrize("most_bidders", [None, 72])
def test_small_transports_are_optimal(most_bidders):
    """Compared with all ways to fill the needed places, whether or not the host counts the bidders."""
    salient, needed = normalize_sum(torch.rand(12, 2, 3) ** 4), torch.rand(12, 2, 3) < 0.5
    block = run_auction(salient, needed, 0.05 / 4, most_bidders)
    ours = plan_cost(block, salient, needed, 0.05)
    for image in range(12):
        wanted = needed[image].flatten().nonzero().flatten()
        best = 0.0
        for blocks in itertools.permutations(range(6), len(wanted)):
            plan = torch.arange(6)
            plan[wanted] = torch.tensor(blocks, dtype=torch.long)
            best = min(best, float(plan_cost(plan[None], salient[[image]], needed[[image]], 0.05)))
        assert float(ours[image]) <= best + 6e-4


def test_can_improve_finds_all_images_that_gain():
    """Where can_improve() is False, the auction gains no more than its slack."""
    salient, needed = normalize_sum(0.2 + torch.rand(300, 8, 8)), torch.rand(300, 8, 8) < 0.5
    moves = can_improve(salient, needed, 1.0 / 49)
    assert 30 < moves.sum() < 270
    found = run_auction(salient, needed, 1.0 / 49)
    gain = plan_cost(torch.arange(64).expand(300, 64), salient, needed, 1.0) - plan_cost(found, salient, needed, 1.0)
    assert gain[~moves].max() < 64e-4 and gain[~moves].mean() < 1e-5 and gain[moves].min() > -64e-4
    assert gain[moves].mean() > 1e-3


@pytest.mark.skipif(find_obstacle() is not None, reason=str(find_obstacle()))
def test_the_host_does_not_wait_for_the_auction(monkeypatch):
    launches = []
    for rounds in (1, 1, 2):  # first once for the cached distances
        monkeypatch.setattr(puzzlemix_transport, "MAX_ROUNDS", rounds)
        with fake_cuda() as fake:
            solve_transport(torch.rand(4, 8, 8, device="cuda"), torch.rand(4, 8, 8, device="cuda") < 0.5, 0.8)
        assert not fake.findings
        launches.append(fake.launches)
    assert launches[2] - launches[1] < 40


# ---- Mixing ----


def test_mix_matches_the_recorded_one(golden):
    for number, case in enumerate(cases(golden)):
        if f"c{number}_out" not in golden:
            continue
        mixer, images = method(case), tensor(golden[case["x"]])
        partner, side = tensor(golden[f"c{number}_perm"]).long(), case["t_block_num"]
        blocks = [tensor(golden[f"c{number}_{name}_src_ref"]).long().clamp_min(0) for name in ("t1", "t2") if side]
        own = others = images
        if case["adv1"] or case["adv2"]:
            noised = mixer.add_noise(images, tensor(golden[f"c{number}_noise"]))
            own, others = (noised if case[flag] else images for flag in ("adv1", "adv2"))
        mask = tensor(golden[f"c{number}_mask_ref"]).float()
        plan = (*blocks, side, side) if side else None
        mixed, soft = mix(own, torch.eye(len(images)), partner, mask, plan, others)
        torch.testing.assert_close(mixed, tensor(golden[f"c{number}_out"]), rtol=0, atol=1e-5)
        ratio = tensor(golden[f"c{number}_ratio"]).float()
        wanted = torch.diag(ratio) + (1 - ratio).unsqueeze(1) * torch.eye(len(images))[partner]
        torch.testing.assert_close(soft, wanted, rtol=0, atol=1e-6)


def test_mix_shows_moved_blocks_at_their_place():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    blocks = torch.tensor([[3, 1, 2, 0]])
    mask = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    mixed, _ = mix(images, torch.ones(1, 1), torch.tensor([0]), mask, (blocks, torch.arange(4).view(1, 4), 2, 2))
    wanted = torch.tensor([[10.0, 11, 2, 3], [14, 15, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]])
    assert torch.equal(mixed[0, 0], wanted)


# ---- The gradient source ----


def net(golden) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    model.load_state_dict({k[4:]: tensor(golden[k]) for k in golden.files if k.startswith("net_") and k[4].isdigit()})
    return model.train()


def test_saliency_and_clean_gradient_match_the_recorded_ones(golden):
    images = tensor(golden["x32"][:4])
    targets = F.one_hot(tensor(golden["net_y"]).long(), 10).float()
    model = net(golden)
    running = model[1].running_mean.clone()
    saliency = normalize_sum(Gradient(model, **PuzzleMix().gradient_options)(images, targets))
    torch.testing.assert_close(saliency, normalize_sum(tensor(golden["net_sal_eval"])), rtol=1e-4, atol=1e-8)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "the parameters must not get gradients"
    assert model.training and torch.equal(model[1].running_mean, running)
    source = Gradient(model, cross_entropy_scale=2 / 10, **PuzzleMix(clean_lam=1.0).gradient_options)
    recorded = tensor(golden["net_sal_train"])
    torch.testing.assert_close(source(images, targets), recorded, rtol=0, atol=1e-4 * float(recorded.max()))
    torch.testing.assert_close(model[8].weight.grad, tensor(golden["net_gradfc_train"]), rtol=1e-5, atol=1e-8)
    assert not torch.equal(model[1].running_mean, running)


# ---- The method ----


def mean_brightness(images, targets):
    return images.abs().mean(1)


def test_salient_blocks_survive():
    """The left half of one image and the right half of the other are salient: both show, and the targets are shared."""
    images = torch.randn(2, 3, 32, 32)
    saliency = torch.full((2, 32, 32), 1e-3)
    saliency[0, :, :16] = 1
    saliency[1, :, 16:] = 1
    mixer = PuzzleMix(block_num=(8,), transport=False)
    for seed in range(20):  # until each image has the other as its partner
        torch.manual_seed(seed)
        mixed, soft = mixer(images, torch.eye(2), lambda *_: saliency)
        if not torch.equal(soft, torch.eye(2)):
            break
    assert torch.equal(mixed[0, :, :, :12], images[0, :, :, :12])
    assert torch.equal(mixed[0, :, :, 20:], images[1, :, :, 20:])
    assert 0.3 < float(soft[0, 0]) < 0.7


def test_transport_uses_the_mask_of_each_image_of_a_pair():
    """With t_size, on a finer grid and with its block saliency."""
    mixer = PuzzleMix(block_num=(4,), t_size=4, t_eps=0.1)
    images, saliency, partner = torch.randn(6, 3, 32, 32), torch.rand(6, 32, 32) ** 8, torch.arange(5, -1, -1)
    mask, (own, other, rows, columns) = mixer.solve_mask_and_transport(images, saliency, partner, torch.tensor(0.5), 4)
    assert (rows, columns) == (8, 8)
    salient, shown = normalize_sum(block_means(saliency, 8, 8)), mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(own, solve_transport(salient, shown > 0, 0.1))
    assert torch.equal(other, solve_transport(salient[partner], shown < 1, 0.1))
    still = torch.arange(64)
    assert (own != still).any() and (other != still).any() and (shown < 1).any() and (shown > 0).any()


@pytest.mark.parametrize("labels", [2, 3, 4])
def test_label_counts_and_non_square_images(labels):
    images = torch.randn(5, 3, 16, 32).contiguous(memory_format=torch.channels_last)
    mixer = PuzzleMix(block_num=(2, 4, 8), n_labels=labels)
    for _ in range(6):
        mixed, soft = mixer(images, torch.eye(5), mean_brightness)
        assert mixed.shape == images.shape and mixed.is_contiguous(memory_format=torch.channels_last)
        values = (mixer.mask * (labels - 1)).unique()
        assert set(values.round().tolist()) <= set(range(labels)) and torch.allclose(values, values.round())
        torch.testing.assert_close(soft.sum(1), torch.ones(5))
        assert (mixer.bound <= mixer.energy + 1e-5).all()


def test_adversarial_noise_is_bounded_and_needs_the_gradient(golden):
    model, images = net(golden).eval(), tensor(golden["x32"][:4])
    mixer = PuzzleMix(block_num=(4,), adv_p=1.0, adv_eps=8.0, **CIFAR100)
    source, targets = Gradient(model), torch.eye(10)[:4]
    saliency, noise = mixer.compute_noise(source, images, targets)
    assert 0 < noise.abs().max() <= 8 / 255 + 1e-7 and saliency.shape == (4, 32, 32)
    noised = mixer.add_noise(images, noise)
    pixels = noised * mixer.std + mixer.mean
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6 and not torch.equal(noised, images)
    assert model(noised).shape == (4, 10)
    loss, worse = (F.cross_entropy(model(batch), targets) for batch in (images, noised))
    assert worse > loss
    mixer(images, targets, source)
    with pytest.raises(ValueError, match="signed pixel gradient"):
        mixer(images, targets, mean_brightness)
    with torch.no_grad():
        model[8].weight.fill_(float("nan"))  # a diverged network
    mixed, soft = mixer(images, targets, source)
    assert mixed.isfinite().all() and soft.isfinite().all() and int(mixer.replaced_maps) == 4


def test_unsolvable_options_raise_an_error():
    with pytest.raises(ValueError, match="gamma .* submodular"):
        PuzzleMix(gamma=1.1)
    with pytest.raises(ValueError, match="n_labels"):
        PuzzleMix(n_labels=5)
    with pytest.raises(ValueError, match=r"36x36 pixels cannot be cut into 8x8 blocks; .*12"):
        PuzzleMix(block_num=(4, 8)).check_size(36, 36)
    with pytest.raises(ValueError, match="t_size 5"):
        PuzzleMix(block_num=(4,), t_size=5).check_size(32, 32)
