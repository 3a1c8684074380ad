from collections import OrderedDict

import numpy as np
import pytest
import torch
from support import GOLDEN
from torch import nn
from torch.nn import functional as F

from engine.training.loss import LOSSES
from mixing import sage
from mixing.sage import SAGE, blend_shifted, scale_maps
from mixing.solvers import sage_offsets
from saliency import Source
from saliency.gradient import Gradient, blur

SHAPES = [(4, 3, 8, 8), (1, 3, 8, 8), (5, 3, 6, 10), (3, 1, 2, 2)]  # one image; odd batches; H != W; the smallest


@pytest.fixture(scope="module")
def golden():
    recorded = np.load(GOLDEN / "sage.npz")
    return {name: torch.from_numpy(np.asarray(recorded[name])) for name in recorded.files}


def case(golden: dict, prefix: str) -> dict:
    return {name[len(prefix) :]: value for name, value in golden.items() if name.startswith(prefix)}


def assert_close(ours, recorded, atol):
    torch.testing.assert_close(ours, recorded, atol=atol, rtol=0, check_dtype=False)


def smooth_maps(batch: int, height: int, width: int) -> torch.Tensor:
    """(B, H, W) > 0 with a few broad blobs each."""
    return blur(torch.rand(batch, height, width) ** 4, 1.5, 5)


def pairs(batch: int, height: int, width: int, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    maps = smooth_maps(batch, height, width)
    return scale_maps(maps, torch.arange(batch).roll(1), torch.tensor(lam, dtype=torch.float64))


def score_by_definition(first: torch.Tensor, second: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Return the score (B,) from the pixel weights, in double precision."""
    first, second = first.double(), second.double()
    height, width = first.shape[-2:]
    padded = F.pad(second, (width, width, height, height))
    second = padded[:, height - dy : 2 * height - dy, width - dx : 2 * width - dx]
    weight = first / (first + second).clamp_min(1e-16)
    return (first * weight + second * (1 - weight)).sum((1, 2))


def mix(images, targets, maps, partner, lam, offsets):
    """Mix with the best of given offsets, as SAGE does after its draws; return that offset too."""
    first, second = scale_maps(maps, partner, lam)
    offset = sage_offsets.find_best_offset(first, second, offsets)
    return *blend_shifted(images, targets, first, second, partner, offset)[:2], offset


# ---- The authors' code ----


@pytest.mark.parametrize("name", "abcde")
def test_search_finds_the_recorded_offsets(golden, name):
    recorded = case(golden, f"search_{name}_")
    maps, partner, offsets = recorded["saliency"][:, 0], recorded["index"].long(), recorded["offsets"].long()
    first, second = scale_maps(maps, partner, recorded["alpha"])
    scores = sage_offsets.score_offsets(first, second, offsets)
    assert_close(scores if name != "c" else scores.amax(1), recorded["score"], 1e-6)
    targets = F.one_hot(recorded["y"], 10).float()
    images = recorded.get("x", torch.zeros(len(maps), 3, *maps.shape[1:]))
    mixed, soft, offset = mix(images, targets, maps, partner, recorded["alpha"], offsets)
    assert torch.equal(offset, recorded["best_offset"].long())
    lam = recorded["lam"].unsqueeze(1)
    assert_close(soft, lam * targets + (1 - lam) * targets[partner], 1e-6)
    if "x" in recorded:
        assert_close(mixed, recorded["mixed_x"], 2e-6)
    if "soft_target" in recorded:
        assert_close(soft, recorded["soft_target"], 1e-6)


def test_exhaustive_search_finds_the_recorded_offsets(golden):
    recorded = case(golden, "search_c_")  # its candidates are all offsets
    first, second = scale_maps(recorded["saliency"][:, 0], recorded["index"].long(), recorded["alpha"])
    assert torch.equal(sage_offsets.find_best_offset_exhaustive(first, second), recorded["best_offset"].long())


class SmallNet(nn.Sequential):
    def __init__(self):
        layers = [
            ("conv1", nn.Conv2d(3, 8, 3, padding=1, bias=False)),
            ("bn1", nn.BatchNorm2d(8)),
            ("relu1", nn.ReLU()),
        ]
        layers += [("conv2", nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)), ("bn2", nn.BatchNorm2d(16))]
        layers += [("relu2", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
        super().__init__(OrderedDict([*layers, ("fc", nn.Linear(16, 10))]))


class Recording(Gradient):
    """A gradient source that keeps its results."""

    def gradient(self, images, targets):
        self.raw = super().gradient(images, targets)
        return self.raw

    def __call__(self, images, targets):
        self.saliency = super().__call__(images, targets)
        return self.saliency


def assert_close_relative(ours, recorded, tolerance):
    """Compare up to scale, within `tolerance` of the largest entry."""
    assert_close(ours / ours.amax(), recorded / recorded.amax(), tolerance)


@pytest.mark.parametrize("name", "pqr")
def test_training_step_matches_the_recorded_one(golden, name, monkeypatch):
    recorded = case(golden, f"step_{name}_")
    net = SmallNet()
    net.load_state_dict(case(recorded, "init_"), strict=False)  # all except the counters of batch norm
    optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=1e-4)
    settings = {key: float(recorded[key]) for key in ("update_ratio", "upper_lambda", "mixup_alpha")}
    mixer = SAGE(eval_mode=bool(recorded["eval_mode"]), **settings)
    source = Recording(net, **mixer.gradient_options, training_loss=LOSSES["softmax_bce"])
    if mixer.mixup_alpha:  # otherwise the mixer must use 0.5 by itself
        monkeypatch.setattr(sage, "draw_lam", lambda alpha, images: recorded["beta_draw"])
    monkeypatch.setattr(sage, "draw_partner", lambda images: recorded["index"].long())
    monkeypatch.setattr(sage, "random_offsets", lambda height, width, count: recorded["offsets"].long()[:count])

    images, targets = recorded["x"], F.one_hot(recorded["y"], 10).float()
    net.train()
    optimizer.zero_grad()
    mixed, soft = mixer(images, targets, source)
    loss = mixer.mixed_weight * LOSSES["softmax_bce"](net(mixed), soft)
    loss.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in net.named_parameters()}
    optimizer.step()

    if "saliency_raw" in recorded:
        assert_close_relative(source.raw.abs().mean(1, keepdim=True), recorded["saliency_raw"], 1e-5)
    assert_close_relative(source.saliency.unsqueeze(1), recorded["saliency_blur"], 1e-5)
    lam = recorded["lam"].unsqueeze(1)
    assert_close(soft, lam * targets + (1 - lam) * targets[recorded["index"].long()], 1e-6)
    if "mixed_x" in recorded:
        assert_close(mixed, recorded["mixed_x"], 2e-6)
    clean = (source.clean_weight or 1.0) * LOSSES["softmax_bce"](source.logits, targets)
    assert_close(torch.stack([clean, loss.detach()]), torch.stack([recorded["loss_clean"], recorded["loss_mix"]]), 1e-6)
    for key, gradient in case(recorded, "grad_").items():
        assert_close(gradients[key], gradient, 1e-5 * float(gradient.abs().amax()))
    state = net.state_dict()
    for key, value in case(recorded, "after_").items():
        assert_close(state[key], value, 1e-6)


# ---- The search ----


@pytest.mark.parametrize(("height", "width"), [(6, 10), (9, 5)])
@pytest.mark.parametrize("scorer", [sage_offsets.lost_saliency_by_overlap, sage_offsets.lost_saliency_by_window])
def test_both_scorers_match_the_definition(height, width, scorer, monkeypatch):
    monkeypatch.setattr(sage_offsets, "CACHE_PIXELS", 2 * height * width)  # blocks of two of five images
    monkeypatch.setattr(sage_offsets, "MAX_WINDOW_PIXELS", 2 * 30 * height * width)
    first, second = pairs(5, height, width, 0.4)
    first[0, :3], second[1, :, 2:] = 0, 0  # regions without saliency
    offsets = sage_offsets.random_offsets(height, width, 30)
    expected = torch.stack([score_by_definition(first, second, dy, dx) for dy, dx in offsets.tolist()], 1)
    kept = first.sum((1, 2)).unsqueeze(1) + sage_offsets.mass_in_frame(second, offsets)
    assert_close(kept - 2 * scorer(first, second, offsets), expected, 1e-6)
    assert_close(sage_offsets.score_offsets(first, second, offsets), expected, 1e-6)


def test_window_scorer_accepts_offsets_per_image():
    first, second = pairs(3, 6, 7, 0.4)
    offsets = torch.stack([sage_offsets.random_offsets(6, 7, 4) for _ in range(3)])
    ours = sage_offsets.mass_in_frame(second, offsets) - 2 * sage_offsets.lost_saliency_by_window(
        first, second, offsets
    )
    for image in range(3):
        one, two = first[image : image + 1], second[image : image + 1]
        assert_close(ours[image] + one.sum(), sage_offsets.score_offsets(one, two, offsets[image])[0], 1e-6)


def test_integer_and_float_integral_images_agree():
    first, _ = pairs(2, 7, 6, 1.0)
    for as_integers in (True, False):
        table, unit = sage_offsets.integral_image(first, as_integers)
        assert table.dtype == (torch.int64 if as_integers else torch.float32)
        assert_close((table[:, 5, 4] - table[:, 2, 4]) * unit, first[:, 2:5, :4].sum((1, 2)), 1e-6)
        assert_close(table[:, -1, -1] * unit, torch.ones(2), 1e-6)


def test_first_of_equal_offsets_wins():
    first, second = torch.full((1, 4, 4), 1 / 3), torch.zeros(1, 4, 4)
    second[0, 1:3, 1:3] = 1.0  # equally good anywhere in the frame, exactly so in floats
    for order in ([[0, 1], [1, 0], [0, 0]], [[3, 3], [1, 0], [0, 0], [0, 1]]):
        expected = next(offset for offset in order if offset != [3, 3])
        assert sage_offsets.find_best_offset(first, second, torch.tensor(order)).tolist() == [expected]
    assert sage_offsets.find_best_offset_exhaustive(first, second).tolist() == [[-1, -1]]


def test_exhaustive_search_rescores_exactly(monkeypatch):
    monkeypatch.setattr(sage_offsets, "approximate_lost_saliency", lambda first, second: torch.rand(len(first), 63))
    monkeypatch.setattr(sage_offsets, "NUM_RESCORED", 100)
    first, second = pairs(6, 4, 5, 0.5)
    expected = sage_offsets.find_best_offset(first, second, sage_offsets.all_offsets(4, 5))
    assert torch.equal(sage_offsets.find_best_offset_exhaustive(first, second), expected)


@pytest.mark.parametrize("lam", [0.05, 0.3, 0.5])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (7, 10), (3, 4)])
def test_exhaustive_search_finds_the_optimum(height, width, lam):
    first, second = pairs(6, height, width, lam)
    offsets = sage_offsets.all_offsets(height, width)
    assert len(offsets) == (2 * height - 1) * (2 * width - 1)
    exact = torch.stack([score_by_definition(first, second, dy, dx) for dy, dx in offsets.tolist()], 1)
    found = sage_offsets.find_best_offset_exhaustive(first, second)
    place = (found[:, 1] + width - 1) * (2 * height - 1) + found[:, 0] + height - 1
    assert_close(exact.gather(1, place.unsqueeze(1))[:, 0], exact.amax(1), 1e-7)


def test_quadrature_error_is_bounded():
    first, second = pairs(8, 16, 12, 0.4)
    approximate, exact = (
        sage_offsets.approximate_lost_saliency(first, second),
        sage_offsets.lost_saliency_by_overlap(first, second, sage_offsets.all_offsets(16, 12)),
    )
    assert (approximate - exact).abs().amax() < 5e-4 and exact.amax() > 0.2


# ---- The draws ----


def test_random_offsets_are_distinct_and_in_range():
    offsets = sage_offsets.random_offsets(4, 6, 77)
    assert sorted(offsets.tolist()) == sorted(sage_offsets.all_offsets(4, 6).tolist())
    assert len(sage_offsets.random_offsets(4, 6, 5)) == 5
    assert sage_offsets.all_offsets(4, 6)[:8].tolist() == [[dy, -5] for dy in range(-3, 4)] + [[-3, -4]]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (6, 10), (64, 48), (2, 9)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.04, 0.2, 1.0])
def test_grid_is_even_and_contains_the_zero_offset(height, width, share):
    count = max(1, int((2 * height - 1) * (2 * width - 1) * share))
    offsets = sage_offsets.grid_offsets(height, width, count)
    rows, columns = (sorted(set(offsets[:, axis].tolist())) for axis in (0, 1))
    assert [0, 0] in offsets.tolist() and 0.5 * count <= len(offsets) <= count
    assert len(offsets) == len(rows) * len(columns) == len(set(map(tuple, offsets.tolist())))
    assert offsets[:, 0].abs().amax() < height and offsets[:, 1].abs().amax() < width
    for places, side in ((rows, 2 * height - 1), (columns, 2 * width - 1)):
        steps = [b - a for a, b in zip(places, places[1:], strict=False)] or [0]
        assert places == [-place for place in places[::-1]] and max(steps) - min(steps) <= 1
        assert abs(places[-1] - places[0] - side * (1 - 1 / len(places))) <= 1, "the grid must span the frame"


def test_search_option_determines_the_offsets():
    assert len(SAGE().draw_offsets(32, 32)) == 39 and len(SAGE().draw_offsets(64, 64)) == 161
    assert len(SAGE(search="grid").draw_offsets(32, 32)) == 35
    assert len(SAGE(rand_pos=0.0).draw_offsets(32, 32)) == 1 == len(SAGE().draw_offsets(2, 2))
    assert SAGE(search="exhaustive").draw_offsets(8, 8) is None and SAGE(rand_pos=1.0).draw_offsets(8, 8) is None


def test_lam_is_at_most_upper_lambda():
    """With uniform maps and no shift, the weight of the image is lam at each pixel."""
    images, targets = torch.randn(2, 3, 4, 4), torch.eye(2)

    def draw(**options):
        mixer = SAGE(upper_lambda=0.4, search="grid", rand_pos=0.0, **options)
        mixer(images, targets, uniform_maps)
        assert mixer.offset.eq(0).all()
        return float(mixer.weight.mean())

    seen = [draw() for _ in range(300)]
    assert 0.35 < max(seen) <= 0.4 + 1e-6 and min(seen) < 0.05
    assert draw(mixup_alpha=0.0) == pytest.approx(0.2)


# ---- Mixing ----


def blend(first, second, offset, images=None):
    """Blend an image of ones and its partner of twos, or the given images."""
    shape = first.shape[-2:]
    images = torch.stack([torch.full((3, *shape), 1.0), torch.full((3, *shape), 2.0)]) if images is None else images
    maps = torch.stack([first, second]), torch.stack([second, first])
    offset = torch.tensor([offset, [0, 0]])
    mixed, soft, _ = blend_shifted(images, torch.eye(2), *maps, torch.tensor([1, 0]), offset)
    return mixed[0], soft[0]


def test_image_shows_where_the_partner_was_shifted_away():
    mixed, soft = blend(torch.full((4, 6), 0.3), torch.full((4, 6), 0.3), [1, -2])
    assert mixed[:, 0].eq(1).all() and mixed[:, :, 4:].eq(1).all(), "the partner moves down 1 and left 2"
    assert mixed[:, 1:, :4].eq(1.5).all()
    assert_close(soft, torch.tensor([1 - 12 / 48, 12 / 48]), 1e-6)


def test_partner_shows_where_neither_image_is_salient():
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[3, 3] = second[0, 0] = 0.5
    mixed, soft = blend(first, second, [1, 0])
    expected = torch.full((4, 4), 2.0)
    expected[0] = 0.0  # shifted in from outside
    expected[3, 3] = 1.0
    assert torch.equal(mixed, expected.expand(3, 4, 4))
    assert_close(soft, torch.tensor([1 / 16, 15 / 16]), 1e-6)


def test_target_weight_is_the_mean_pixel_weight():
    first, second = torch.full((2, 2), 0.1), torch.tensor([[0.9, 0.0], [0.0, 0.0]])
    _, soft = blend(first, second, [0, 0])
    assert_close(soft, torch.tensor([(0.1 + 3) / 4, 0.9 / 4]), 1e-6)


def test_weights_without_offset_are_the_ratio_of_the_maps():
    first, second = torch.rand(5, 7) + 0.1, torch.rand(5, 7) + 0.1
    images = torch.randn(2, 3, 5, 7)
    mixed, soft = blend(first, second, [0, 0], images)
    mask = first / (first + second)
    assert_close(mixed, mask * images[0] + (1 - mask) * images[1], 1e-6)
    assert_close(soft, torch.stack([mask.mean(), 1 - mask.mean()]), 1e-6)


def test_positive_offset_moves_pixels_down_and_right():
    images = torch.randn(2, 3, 4, 5)
    mixed, _ = blend(torch.zeros(4, 5), torch.ones(4, 5), [1, 2], images)
    assert (
        torch.equal(mixed[:, 1:, 2:], images[1, :, :3, :3]) and mixed[:, 0].eq(0).all() and mixed[:, :, :2].eq(0).all()
    )
    mixed, _ = blend(torch.zeros(4, 5), torch.ones(4, 5), [-1, -2], images)
    assert torch.equal(mixed[:, :3, :3], images[1, :, 1:, 2:]) and mixed[:, 3].eq(0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_flow_to_both_images(layout):
    images = torch.randn(5, 3, 6, 8).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(5, 3, 6, 8)
    torch.manual_seed(3)
    mixed, _ = SAGE(rand_pos=0.1)(images, torch.eye(5), lambda images, targets: smooth_maps(5, 6, 8))
    total = (mixed * weights).sum()
    total.backward()
    assert_close((images.grad * images).sum(), total, 1e-4)  # the mix is linear in the images
    assert not torch.equal(images.grad, weights) and images.grad.abs().sum() > 0


def test_memory_format_and_dtype_are_preserved():
    images, targets = torch.randn(5, 3, 6, 8), torch.eye(5)
    maps = smooth_maps(5, 6, 8)
    arguments = maps, torch.randperm(5), torch.tensor(0.4), sage_offsets.random_offsets(6, 8, 9)
    mixed, soft, *_ = mix(images, targets, *arguments)
    other = mix(images.contiguous(memory_format=torch.channels_last), targets, *arguments)[0]
    assert torch.equal(mixed, other) and mixed.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)
    half = mix(images.bfloat16(), targets, *arguments)
    assert half[0].dtype == torch.bfloat16 and torch.equal(half[1], soft)
    assert_close(half[0].float(), mixed, 0.03)


# ---- The method ----


def uniform_maps(images, targets):
    return torch.ones(len(images), *images.shape[-2:])


@pytest.mark.parametrize("search", ["random", "grid", "exhaustive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_inputs_are_kept_and_the_seed_repeats(shape, search):
    images, targets = torch.randn(shape), torch.eye(5)[torch.arange(shape[0]) % 5]
    maps = torch.rand(shape[0], *shape[-2:])
    kept = images.clone(), targets.clone(), maps.clone()
    for seed in range(6):
        results = []
        for _ in range(2):
            torch.manual_seed(seed)
            mixer = SAGE(rand_pos=0.05, search=search)
            results.append((*mixer(images, targets, lambda images, targets: maps), mixer.offset))
        mixed, soft, offset = results[0]
        assert mixed.shape == images.shape and soft.shape == targets.shape and offset.shape == (shape[0], 2)
        assert mixed.isfinite().all() and soft.ge(0).all()
        assert_close(soft.sum(1), torch.ones(shape[0]), 1e-6)
        assert all(map(torch.equal, kept, (images, targets, maps))), "inputs were modified"
        assert all(map(torch.equal, *results)), "same seed, different results"


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_invalid_maps_are_replaced_by_uniform_ones(bad):
    images, targets = torch.randn(4, 3, 8, 8), torch.eye(4)
    maps = smooth_maps(4, 8, 8)
    flat = maps.clone()
    maps[2], flat[2] = bad, 1.0
    results = []
    for given in (maps, flat):
        torch.manual_seed(5)
        mixer = SAGE(rand_pos=0.1)
        results.append(mixer(images, targets, lambda images, targets, given=given: given))
        assert int(mixer.replaced_maps) == (given is maps)
    assert all(map(torch.equal, *results)) and results[0][0].isfinite().all()


def test_mixed_weight_is_update_ratio_only_with_a_clean_loss():
    images, targets = torch.randn(2, 3, 4, 4), torch.eye(2)

    class Reusing(Source):
        clean_weight = 0.3

        def __call__(self, images, targets):
            return uniform_maps(images, targets)

    mixer = SAGE(update_ratio=0.7)
    mixer(images, targets, Reusing())
    assert mixer.mixed_weight == 0.7
    mixer(images, targets, uniform_maps)
    assert mixer.mixed_weight == 1.0, "no source has added a clean gradient"
    mixer(images, targets, Reusing())
    mixer.mix_prob = 0.0
    assert mixer(images, targets, None)[0] is images and mixer.mixed_weight == 1.0 and mixer.offset is None
    assert SAGE(update_ratio=1.0).gradient_options["clean_weight"] == 0


def test_gradient_options_reach_the_gradient_source():
    options = SAGE(update_ratio=0.5, blur_sigma=2.0, kernel_size=3, eval_mode=True).gradient_options
    source = Gradient(SmallNet(), **options, training_loss=LOSSES["softmax_bce"])
    assert (source.reduction, source.blur_sigma, source.kernel_size) == ("mean_abs", 2.0, 3)
    assert (source.mode, source.clean_weight, source.loss_fn) == ("eval", 0.5, LOSSES["softmax_bce"])
    assert SAGE().gradient_options["mode"] == "train"


@pytest.mark.parametrize(
    "options",
    [{"mixup_alpha": -1}, {"upper_lambda": 1.5}, {"rand_pos": -0.1}, {"update_ratio": 2}, {"search": "best"}]
    + [{"mix_prob": -1}],
)
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError):
        SAGE(**options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "table", [sage_offsets.MAX_WINDOW_PIXELS, 1]
)  # all windows at once; one offset after the other
def test_gpu_result_equals_the_cpu_result_without_synchronising(table, monkeypatch):
    monkeypatch.setattr(sage_offsets, "MAX_WINDOW_PIXELS", table)
    images, targets, maps = torch.randn(6, 3, 16, 12), torch.eye(6), smooth_maps(6, 16, 12)
    given = torch.randperm(6), torch.tensor(0.4, dtype=torch.float64), sage_offsets.random_offsets(16, 12, 20)
    expected = mix(images, targets, maps, *given)
    images, targets, maps, partner = (tensor.cuda() for tensor in (images, targets, maps, given[0]))
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = mix(images, targets, maps, partner, *given[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ours[2].cpu(), expected[2])
    assert_close(ours[0].cpu(), expected[0], 2e-6)
    assert_close(ours[1].cpu(), expected[1], 1e-6)
