"""What every method draws, and that its targets follow it: shares of batches and of images, labels of two colours."""

import math
import sys

import pytest
import torch

import mixing.s2mix
import mixing.snapmix
from mixing import MIXERS, build_mixer, hyper_parameters, mixer_class

SIDE = 32
GRID = 2000  # steps of the numerical integrals over lam
SMALL = {"block_num": (2,), "m_block_num": 2, "random_patches": (2,), "num_patches": 4}


def random_maps(images, targets):
    return torch.rand(images[:, 0].shape)


def uniform_maps(images, targets):
    return torch.ones(images[:, 0].shape)


def one_random_peak(images, targets):
    """Maps that are 1 at one random pixel and 0 elsewhere."""
    peak = torch.randint(images[0, 0].numel(), (len(images), 1))
    return torch.zeros(images[:, 0].shape).flatten(1).scatter(1, peak, 1.0).view(images[:, 0].shape)


def count_mixed(name: str, calls: int, mix_prob: float) -> int:
    """Return how many of `calls` batches the method would mix. Mixing itself is left out."""
    images, targets, mixed = torch.rand(2, 1, 4, 4), torch.eye(2), (None, None)
    mixer = build_mixer(name, mix_prob=mix_prob)
    mixer.mix_batch = lambda *_: mixed
    return sum(mixer(images, targets)[0] is None for _ in range(calls))


@pytest.mark.parametrize("name", [name for name in MIXERS if "mix_prob" in hyper_parameters(name)])
def test_mix_prob_is_the_share_of_the_batches_that_are_mixed(name, calls=1500):
    deviation = math.sqrt(calls * 0.3 * 0.7)
    assert abs(count_mixed(name, calls, 0.3) - calls * 0.3) < 4 * deviation


def integrate(share, alpha: float = 1.0) -> tuple[float, float]:
    """Return mean and deviation of share(lam) for lam ~ Beta(alpha, alpha), alpha >= 1.

    share() returns the mean for each lam (GRID,), or the mean and the mean square over all that is drawn besides.
    """
    lam = (torch.arange(GRID) + 0.5).double() / GRID
    density = (lam * (1 - lam)) ** (alpha - 1)
    found = share(lam)
    mean, square = found if isinstance(found, tuple) else (found, found**2)
    mean, square = ((density * value).sum() / density.sum() for value in (mean, square))
    return float(mean), float((square - mean**2).clamp_min(0).sqrt())


def beta(alpha: float, scale: float = 1.0) -> tuple[float, float]:
    """Return mean and deviation of scale * Beta(alpha, alpha)."""
    return scale / 2, scale / math.sqrt(4 * (2 * alpha + 1))


def outside(cover: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and mean square over all places of 1 - the product of the shares of rows and of columns.

    cover (GRID, places): the share of the rows that is covered from each place, alike for the columns.
    """
    first, second = cover.mean(1) ** 2, (cover**2).mean(1) ** 2
    return 1 - first, 1 - 2 * first + second


def outside_box(side: torch.Tensor, whole: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for boxes with these relative sides, cut by the borders: `whole` around a random pixel, with half sides
    of whole pixels; else around a random point, with edges rounded down."""
    place = torch.arange(SIDE) if whole else (torch.arange(10 * SIDE) + 0.5) / 10
    half = (SIDE * side).unsqueeze(1)
    half = half.long() // 2 if whole else half / 2
    edges = (place + half).clamp(max=SIDE), (place - half).clamp(min=0)
    return outside((edges[0].long() - edges[1].long()).double() / SIDE)


def outside_kernel(spread: torch.Tensor, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for Gaussian kernels exp(-distance^2 / spread) around a random pixel, shifted by `shift` pixels."""
    pixel = torch.arange(SIDE).double()
    distance = pixel - pixel.unsqueeze(1) - shift
    return outside((distance**2 / -spread.view(-1, 1, 1)).exp().mean(2))


def gaussians(lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, square = outside_kernel(torch.minimum(lam, 1 - lam) * SIDE**2 / math.pi)
    return torch.where(lam < 0.5, 1 - mean, mean), torch.where(lam < 0.5, 1 - 2 * mean + square, square)


BOX = integrate(lambda lam: outside_box((1 - lam).sqrt()))
REAL_BOX = integrate(lambda lam: outside_box((1 - lam).sqrt(), whole=False))
STILL = {"search": "grid", "rand_pos": 0.0}  # SAGE tries one offset, that of no shift
WINDOWS = torch.tensor([2.0, 3, 4, 5, 6]) ** 2 / 64  # SMMix: a quarter to three quarters of 8 patches
DRAWN_PER_IMAGE = {"cutout", "saliencymix"}  # at places of their own in every image
MEANS = {  # method -> cases: options, source, mean and deviation of the share of the image; nan: no rule says it
    "none": [({}, None, 1.0, 0.0)],
    "cutout": [({}, None, *integrate(lambda lam: outside_box(torch.full_like(lam, 16 / SIDE))))],
    "mixup": [({"mixup_alpha": alpha}, None, *beta(alpha)) for alpha in (0.2, 1.0)],
    "manifold": [({}, None, *beta(2.0))],
    "cutmix": [({}, None, *BOX), ({"cutmix_box": "real"}, None, *REAL_BOX)],
    "saliencymix": [({}, one_random_peak, *BOX)],
    "puzzlemix": [({"block_num": (4,)}, random_maps, 0.5, math.nan)],  # the two images of a pair have equal rights
    "sage": [(STILL, uniform_maps, *beta(1.0, 0.6)), ({**STILL, "upper_lambda": 0.4}, uniform_maps, *beta(1.0, 0.4))],
    "rmix": [({}, uniform_maps, *beta(1.0)), ({"dirichlet_alpha": 0.2}, uniform_maps, *beta(0.2))],
    "rlmix": [({}, uniform_maps, *beta(1.0))],
    "guidedmixup": [({}, uniform_maps, 0.5, 0.0)],
    "snapmix": [
        ({"mixup_alpha": alpha}, uniform_maps, *integrate(lambda lam: outside_box((1 - lam).sqrt()), alpha))
        for alpha in (1.0, 5.0)
    ],
    "attentivemix": [
        ({}, random_maps, *integrate(lambda lam: (64 * lam).floor().clamp(min=1) / 64, 2.0)),
        ({"top_k": 6}, random_maps, 6 / 64, 0.0),
    ],
    "resizemix": [({}, None, *integrate(lambda lam: outside_box(0.1 + 0.7 * lam)))],
    "fmix": [({"mixup_alpha": alpha}, None, *beta(alpha)) for alpha in (0.2, 1.0)],
    "gridmix": [({}, None, 1 - 0.27, math.nan)],  # as OpenMixup's, by its code
    "smoothmix": [({}, None, *integrate(lambda lam: outside_kernel(2 * (SIDE * (0.25 + lam / 4)) ** 2, -0.5)))],
    "hmix": [({"mixup_alpha": alpha}, None, *beta(alpha)) for alpha in (0.2, 1.0)],
    "gmix": [({}, None, *integrate(gaussians))],
    "smmix": [({}, random_maps, 1 - float(WINDOWS.mean()), float(WINDOWS.std(correction=0)))],
    "maskmix": [({}, None, *integrate(lambda lam: (16 * lam).ceil() / 16))],
    "recursivemix": [
        ({"history_area": area}, None, *integrate(lambda lam, area=area: outside_box((area * lam).sqrt())))
        for area in (0.5, 1.0)
    ],
}


def draw_shares(name: str, options: dict, source, calls: int, batch: int) -> torch.Tensor:
    """Return the share of each image, the mean of its weights, over some calls: (calls, batch) float64."""
    images, targets = torch.zeros(batch, 1, SIDE, SIDE), torch.zeros(batch, 2)
    mixer, shares = build_mixer(name, **{"mix_prob": 1.0, **options}), []
    mixer(images, targets, source)  # RecursiveMix has nothing to mix with in the first batch
    for _ in range(calls):
        mixer(images, targets, source)
        shares.append(mixer.lam.expand(batch) if name == "manifold" else mixer.weight.mean((1, 2, 3)))
    return torch.stack(shares).double()


CASES = [(name, *case) for name, cases in MEANS.items() for case in cases]


def test_the_table_has_every_method_whose_images_have_a_share():
    # the solver of Co-Mixup divides an image between more than two; S2-Mix shows nothing but the image itself
    assert set(MIXERS) - set(MEANS) == {"comixup", "s2mix"}


@pytest.mark.parametrize(("name", "options", "source", "mean", "deviation"), CASES)
def test_the_share_of_the_image_is_drawn_as_the_options_say(name, options, source, mean, deviation):
    """Once per batch, or once per image with in_batch."""
    ways = [(20 if name == "rlmix" else 80, 2, {})]
    if "in_batch" in hyper_parameters(name):
        ways.append((1, 800, {"in_batch": True}))
    for calls, batch, way in ways:
        shares = draw_shares(name, {**options, **way}, source, calls, batch)
        if deviation != 0:
            are_equal = bool((shares == shares[:, :1]).all())
            assert are_equal == (not way and name not in DRAWN_PER_IMAGE)
        shares = shares[0] if way else shares[:, 0]
        bound = 4 / math.sqrt(len(shares))
        assert abs(float(shares.mean()) - mean) <= (0.5 if math.isnan(deviation) else deviation) * bound + 1e-6
        if deviation > 0:
            assert abs(float(shares.std()) / deviation - 1) < bound


def test_s2mix_blends_in_its_patches_with_a_uniform_share(monkeypatch):
    monkeypatch.setattr(mixing.s2mix, "enlarge_patches", lambda images, *_: torch.zeros_like(images))
    mixed, _ = build_mixer("s2mix", in_batch=True)(torch.ones(4000, 1, 4, 4), torch.eye(2).repeat(2000, 1), random_maps)
    shares = mixed[:, 0, 0, 0]
    assert abs(shares.mean() - 0.5) < 0.02 and abs(shares.std() - 12**-0.5) < 0.01


KEEPS_LABEL = ["none", "cutout", "s2mix"]
DRAWN_LAM = ["mixup", "manifold", "fmix", "hmix"]  # methods whose targets are the lam that was drawn
BY_AREA = [name for name in MIXERS if name not in ("cutout", "manifold", "snapmix")]  # or as if they were
ANY_SIZE = ["mixup", "cutmix", "resizemix", "fmix", "gridmix", "smoothmix", "hmix", "gmix", "s2mix", "recursivemix"]
VARIANTS = {  # method -> options to try besides the defaults
    "cutmix": [{"cutmix_box": "real", "in_batch": True}],
    "saliencymix": [{"saliency_scope": "batch"}],
    "puzzlemix": [{"block_num": (4,), "t_size": 2, "t_eps": 0.0}],
    "comixup": [{"m_block_num": 4}],
    "sage": [{"rand_pos": 0.1}],
    "guidedmixup": [{"pairing": "random"}],
    "attentivemix": [{"top_k": 3}],
    "resizemix": [{"resize_mode": "bilinear", "in_batch": True}],
    "fmix": [{"fmix_field": "released", "max_soft": 0.2}],
    "recursivemix": [{"resize_mode": "bilinear", "history_area": 1.0}],
}


def list_cases(names: list[str]) -> list[tuple]:
    """Return the name of each method with each of its options, and the shapes of the images to try them with."""
    found = []
    for name in names:
        variants = [{}, *VARIANTS.get(name, [])]
        variants += [{"in_batch": True}] if "in_batch" in hyper_parameters(name) else []
        shapes = [(6, 1, 16, 24)] + ([(3, 1, 2, 1), (1, 1, 5, 3)] if name in ANY_SIZE else [])
        found += [(name, options, shapes) for options in variants]
    return found


def mix_two_colours(name: str, options: dict, shapes: list[tuple], repeats: int = 3):
    """Mix images of one colour each, 0 or 1, with random maps.

    Yields the colours (B,), the maps, the one-hot targets, mixed images, soft targets and the mixer.
    """
    mixer = build_mixer(name, **{**SMALL, "mix_prob": 1.0, **options})
    for shape in shapes * repeats:
        colours, targets = torch.arange(shape[0]) % 2.0, torch.eye(shape[0])
        images, saliency = colours.view(-1, 1, 1, 1).expand(shape).contiguous(), torch.rand(shape[0], *shape[2:])
        mixed, soft = mixer(images, targets, lambda *_, saliency=saliency: saliency)
        yield colours, saliency, targets, mixed, soft, mixer


def record_calls(monkeypatch, module, name: str) -> list[tuple]:
    """Return a list to which each call of a function of the module appends its arguments and its result."""
    calls, function = [], getattr(module, name)

    def call(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(("name", "options", "shapes"), list_cases(BY_AREA))
def test_targets_give_each_colour_the_share_of_its_pixels(name, options, shapes):
    for colours, _, _, mixed, soft, _ in mix_two_colours(name, options, shapes):
        rounding = 1 / mixed[0].numel() if name == "fmix" else 0.0  # its mask is lam, rounded to whole pixels
        torch.testing.assert_close(soft @ colours, mixed.mean((1, 2, 3)), rtol=0, atol=rounding + 1e-5)


@pytest.mark.parametrize(("name", "options", "shapes"), list_cases(DRAWN_LAM))
def test_targets_are_exactly_the_lam_that_was_drawn(name, options, shapes, monkeypatch):
    draws = record_calls(monkeypatch, sys.modules[mixer_class(name).__module__], "draw_lam")
    for _, _, targets, _, soft, mixer in mix_two_colours(name, options, shapes):
        lam = draws[-1][1].float().expand(len(targets))
        torch.testing.assert_close(soft, torch.lerp(targets[mixer.partner], targets, lam.unsqueeze(1)))


@pytest.mark.parametrize(("name", "options", "shapes"), list_cases(KEEPS_LABEL))
def test_the_label_of_the_image_stays(name, options, shapes):
    assert all(soft is targets for _, _, targets, _, soft, _ in mix_two_colours(name, options, shapes))


@pytest.mark.parametrize(("name", "options", "shapes"), list_cases(["snapmix"]))
def test_targets_of_snapmix_follow_the_maps_in_its_boxes(name, options, shapes, monkeypatch):
    pastes = record_calls(monkeypatch, mixing.snapmix, "paste_resized")
    for _, saliency, targets, _, soft, _ in mix_two_colours(name, options, shapes):
        (_, partner, *boxes), _ = pastes[-1]
        for i, j in enumerate(partner.tolist()):
            (y1, y2, x1, x2), (v1, v2, u1, u2) = (one[i % len(one)].tolist() for one in boxes)
            own, other = saliency[i] - saliency[i].min(), saliency[j] - saliency[j].min()
            kept, shown = 1 - own[y1:y2, x1:x2].sum() / own.sum(), other[v1:v2, u1:u2].sum() / other.sum()
            torch.testing.assert_close(soft[i], (kept * targets[i] + shown * targets[j]) / (kept + shown))
