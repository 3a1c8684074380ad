import numpy as np
import pytest
import torch
from support import GOLDEN
from torch import nn
from torch.nn import functional as F

import mixing.rmix
from mixing.ops import block_means, normalize_sum, upsample_blocks
from mixing.rlmix import saliency_similarity
from mixing.rmix import RMix, actions_to_percentiles, block_weights, mix, salient_mask
from saliency.gradient import Gradient

SHAPES = [(4, 3, 32, 32), (1, 3, 32, 32), (5, 3, 16, 48)]  # one image; an odd batch with H != W


class Net(nn.Module):
    """The network of the recorded steps."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)

    def forward(self, images):
        hidden = self.bn1(self.conv1(images)).relu()
        return self.fc(self.bn2(self.conv2(hidden)).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "rmix.npz")


def batch(shape, classes=5):
    images = torch.randn(shape)
    return images, torch.eye(classes)[torch.arange(shape[0]) % classes]


def random_maps(images, targets):
    """A source with a different map for each image."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(len(images), *images.shape[-2:], generator=generator)


@pytest.mark.parametrize("case", "abcd")
def test_training_step_matches_the_published_code(case, golden, monkeypatch):
    def recorded(name):
        return torch.from_numpy(golden[f"mix_{case}_{name}"])

    def state(kind):
        prefix = f"mix_{case}_{kind}_"
        return {name[len(prefix) :]: torch.from_numpy(golden[name]) for name in golden.files if name.startswith(prefix)}

    images, classes, side = recorded("x"), int(recorded("num_class")), int(recorded("pool_kernel"))
    targets = F.one_hot(recorded("y"), classes).float()
    net = Net(classes).train()
    net.load_state_dict(state("init"), strict=False)
    source = Gradient(net, mode="train")
    mixer = RMix(random_patches=(side,))
    monkeypatch.setattr(mixer, "choose_actions", lambda *_: recorded("action").long())
    monkeypatch.setattr(mixer, "draw_partner", lambda _: recorded("index").long())
    monkeypatch.setattr(mixing.rmix, "draw_lam", lambda *_: recorded("w1").double())
    maps = []
    mixed, soft = mixer(images, targets, lambda *args: maps.append(source(*args)) or maps[0])
    mixed.requires_grad_()
    loss = F.cross_entropy(net(mixed), soft)
    loss.backward()

    torch.testing.assert_close(
        actions_to_percentiles(recorded("action").long(), 10), recorded("quantile"), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(source.logits, recorded("logits_clean"), rtol=1e-5, atol=1e-5)
    patches = [n // side for n in images.shape[-2:]]
    near = {"rtol": 1e-5, "atol": 1e-9}
    torch.testing.assert_close(normalize_sum(block_means(maps[0], *patches)), recorded("saliency_pooled"), **near)
    clean = block_means(maps[0], 8, 8)
    scale = len(images) * classes / 2  # the recorded loss is 2 / K times the mean, ours the sum
    torch.testing.assert_close(clean / scale, recorded("agent_saliency_raw"), rtol=1e-5, atol=1e-9)
    some = recorded("mixed_x")  # the first images of the batch
    torch.testing.assert_close(mixed[: len(some)], some, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft, recorded("mixed_y"), rtol=0, atol=1e-6)
    assert abs(loss.item() - float(recorded("loss"))) < 1e-5
    for name, expected in state("grad").items():
        off = (net.get_parameter(name).grad - expected).abs().max()
        assert off <= 1e-5 * expected.abs().max(), name
    for name, expected in state("after").items():
        torch.testing.assert_close(net.state_dict()[name], expected, rtol=0, atol=1e-6)
    assert abs(float(saliency_similarity(clean, mixed.grad)) - float(recorded("reward"))) < 1e-5


@pytest.mark.parametrize(
    ("side", "ones"),
    [
        (2, [4, 3, 3, 3, 2, 2, 2, 1, 1, 1]),
        (4, [16, 14, 12, 11, 9, 7, 6, 4, 2, 1]),
        (8, [64, 57, 50, 43, 36, 29, 22, 15, 8, 1]),
    ],
)
def test_percentile_determines_the_number_of_salient_patches(side, ones):
    blocks = torch.randperm(side * side).float().view(1, side, side).repeat(10, 1, 1)
    mask = salient_mask(blocks, actions_to_percentiles(torch.arange(10), 10))
    assert mask.sum((1, 2)).tolist() == ones
    for row, kept in zip(mask, ones, strict=True):
        assert blocks[0][row].min() == side * side - kept, "the salient patches must be the largest ones"


def test_threshold_is_interpolated_between_two_patches():
    blocks = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]]).expand(3, 2, 2)
    mask = salient_mask(blocks, torch.tensor([1 / 3, 0.34, 0.5]))  # thresholds 2, 2.04 and 3
    assert mask.flatten(1).int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_equal_patches_and_a_single_patch_are_salient():
    assert salient_mask(torch.ones(10, 4, 4), actions_to_percentiles(torch.arange(10), 10)).all()
    assert salient_mask(torch.rand(10, 1, 1), actions_to_percentiles(torch.arange(10), 10)).all()
    assert actions_to_percentiles(torch.zeros(3, dtype=torch.long), 1).eq(0).all()


def test_mix_computed_by_hand():
    images = torch.stack([torch.zeros(1, 2, 4), torch.full((1, 2, 4), 8.0)])
    mask = torch.tensor([[[True, True]], [[False, True]]])  # one row of two patches, 2 x 2 pixels each
    partner = torch.tensor([1, 0])
    weight = block_weights(mask, partner, 0.25)
    assert weight.tolist() == [[[1.0, 0.25]], [[0.0, 0.25]]]
    mixed, soft = mix(images, torch.eye(2), partner, weight)
    assert mixed[0].flatten().tolist() == [0, 0, 6, 6] * 2 and mixed[1].flatten().tolist() == [0, 0, 2, 2] * 2
    assert soft.tolist() == [[0.625, 0.375], [0.875, 0.125]]


def test_block_weights_equal_the_three_cases_of_the_paper():
    images, targets = batch((6, 3, 16, 16), 6)
    mask, partner, lam = torch.rand(6, 4, 4) < 0.5, torch.tensor([3, 0, 1, 5, 4, 2]), 0.3
    own, other = (upsample_blocks(m.float(), 16, 16) for m in (mask, mask[partner]))
    first, second, agree = own * (1 - other), (1 - own) * other, own * other + (1 - own) * (1 - other)
    expected = first * images + second * images[partner] + agree * (lam * images + (1 - lam) * images[partner])
    share = (first + lam * agree).mean((1, 2, 3)).unsqueeze(1)
    mixed, soft = mix(images, targets, partner, block_weights(mask, partner, lam))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(soft, share * targets + (1 - share) * targets[partner], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_inputs_are_kept_and_the_seed_repeats(shape):
    images, targets = batch(shape)
    kept = images.clone(), targets.clone()
    results = []
    for seed in (*range(8), *range(8)):
        torch.manual_seed(seed)
        mixed, soft = RMix()(images, targets, random_maps)
        assert mixed.shape == images.shape and mixed.dtype == images.dtype and soft.shape == targets.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(shape[0]))
        assert torch.equal(images, kept[0]) and torch.equal(targets, kept[1]), "inputs were modified"
        results.append((mixed, soft))
    for first, again in zip(results[:8], results[8:], strict=True):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), "same seed, different results"
    if shape[0] > 1:
        assert len({float(mixed.sum()) for mixed, _ in results[:8]}) > 4, "different seeds must give different mixes"


def test_memory_format_is_preserved_and_does_not_change_the_values():
    images, targets = batch((5, 3, 32, 16))
    torch.manual_seed(3)
    expected = RMix()(images, targets, random_maps)
    torch.manual_seed(3)
    mixed, soft = RMix()(images.contiguous(memory_format=torch.channels_last), targets, random_maps)
    assert mixed.is_contiguous(memory_format=torch.channels_last) and expected[0].is_contiguous()
    assert torch.equal(mixed, expected[0]) and torch.equal(soft, expected[1])


def test_half_precision_images_keep_their_dtype():
    images, targets = batch((4, 3, 32, 32))
    mixed, soft = RMix()(images.bfloat16(), targets, random_maps)
    assert mixed.dtype == torch.bfloat16 and soft.dtype == torch.float32


def test_gradients_flow_through_the_blend_only():
    images, targets = batch((6, 3, 32, 32))
    images.requires_grad_()
    mixed, soft = RMix()(images, targets, lambda x, _: x.square().sum(1))
    assert not soft.requires_grad
    mixed.sum().backward()
    torch.testing.assert_close(images.grad.sum(), torch.tensor(float(images.numel())), rtol=1e-4, atol=0)


def test_reversed_pairing_reverses_the_batch():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 16, 16)
    mixed, soft = RMix(pairing="reversed", random_patches=(8,))(images, torch.eye(5), random_maps)
    for i in range(5):
        assert soft[i, i] + soft[i, 4 - i] >= 1 - 1e-6
        torch.testing.assert_close(mixed[i].mean(), soft[i] @ torch.arange(5.0))
    partners = {tuple(RMix().draw_partner(images).tolist()) for _ in range(20)}
    assert len(partners) > 10 and all(sorted(p) == list(range(5)) for p in partners)


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        ({}, {(4, 6), (2, 3)}),
        ({"random_patches": (4,)}, {(8, 12)}),
        ({"patches_per_side": (2, 4)}, {(2, 2), (4, 4)}),
        ({"use_random_patches": False}, {(8, 8)}),
        ({"use_random_patches": False, "num_patches": 16}, {(16, 16)}),
    ],
)
def test_grid_is_drawn_for_each_batch(options, grids):
    mixer = RMix(**options)
    assert {mixer.draw_grid(32, 48) for _ in range(20)} == grids


def test_error_for_patches_that_do_not_fit_names_sizes_that_do():
    images, targets = batch((2, 3, 24, 40))
    with pytest.raises(ValueError, match=r"random_patches.*24x40.*16x16.*\[2, 4, 8\]"):
        RMix()(images, targets, random_maps)
    with pytest.raises(ValueError, match=r"patches_per_side.*\[2, 4, 8\]"):
        RMix(patches_per_side=(2, 3))(images, targets, random_maps)
    with pytest.raises(ValueError, match=r"num_patches.*\[2, 4, 8\]"):
        RMix(use_random_patches=False, num_patches=5)(images, targets, random_maps)
    RMix(random_patches=(8,))(images, targets, random_maps)


def test_mix_prob_is_the_probability_that_a_batch_is_mixed():
    images, targets = batch((6, 3, 16, 16), 6)
    calls = []

    def source(*args):
        calls.append(1)
        return random_maps(*args)

    mixer = RMix(mix_prob=0.3, random_patches=(8,))
    changed = sum(mixer(images, targets, source)[0] is not images for _ in range(400))
    assert 80 <= changed <= 160 and len(calls) == changed, "unmixed batches must not cost a saliency pass"


def test_percentiles_are_uniform_and_weights_beta_distributed():
    saliency = torch.ones(5000, 1, 1)
    counts = RMix(num_action=4).choose_actions(saliency, None, None).bincount(minlength=4)
    assert len(counts) == 4 and (counts - 1250).abs().max() < 150
    equal = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])  # equal maps: all patches are blended
    shares = []
    for _ in range(600):
        _, soft = RMix(0.2, pairing="reversed", num_action=1)(equal, torch.eye(2), lambda i, _: torch.ones(2, 16, 16))
        shares.append(float(soft[0, 0]))
    assert abs(np.mean(shares) - 0.5) < 0.06 and abs(np.var(shares) - 0.25 / 1.4) < 0.02  # Beta(0.2, 0.2)


def test_clean_loss_is_trained_on_with_clean_lam():
    images, targets = batch((4, 3, 16, 16))
    for clean_lam in (0.0, 1.0):
        net = Net(5)
        mixer = RMix(clean_lam=clean_lam)
        mixer(images, targets, Gradient(net, **mixer.gradient_options))
        if clean_lam == 0:
            assert net.fc.weight.grad is None
            assert net.bn1.running_mean.ne(0).all(), "the saliency pass must update the running statistics"
        else:
            got = net.fc.weight.grad.clone()
            net.zero_grad()
            F.cross_entropy(net.train()(images), targets).backward()
            torch.testing.assert_close(got, net.fc.weight.grad)


@pytest.mark.parametrize(
    "options",
    [
        {"dirichlet_alpha": 0},
        {"random_patches": ()},
        {"random_patches": (0, 8)},
        {"patches_per_side": (2, 0)},
        {"num_patches": 0},
        {"num_action": 0},
        {"pairing": "backwards"},
        {"clean_lam": -1},
        {"mix_prob": 1.5},
    ],
)
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RMix(**options)
