import pytest
import torch
from support import load_method_recording
from torch.nn import functional as F

from mixing import GuidedMixup
from mixing.guidedmixup import measure_distances, pair_in_a_cycle, weigh_pixels
from mixing.ops import blur_maps, normalize_sum
from saliency.gradient import Gradient, blur
from saliency.static import SpectralResidualFull, residual_of_log_spectrum, spectral_residual_full

CASES = ["guided_sra", "guided_srb", "guided_ap"]  # guided_srb: 32 x 24 pixels


def recorded(golden, name):
    return torch.from_numpy(golden[name]).float()


def assert_close_to_largest(found, expected, share):
    assert (found - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("case", ["guided_sra", "guided_srb"])
def test_spectral_residual_matches_the_published_code(case, method_golden):
    images, _ = load_method_recording(method_golden, case)
    grey = 0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    assert_close_to_largest(residual_of_log_spectrum(grey), recorded(method_golden, f"{case}_residual"), 1e-5)
    saliency = recorded(method_golden, f"{case}_saliency")
    assert_close_to_largest(spectral_residual_full(images), saliency, 1e-5)
    assert torch.equal(SpectralResidualFull(mean=(0, 0, 0), std=(1, 1, 1))(images), spectral_residual_full(images))


def test_large_images_are_analysed_at_128_pixels(method_golden):
    images, _ = load_method_recording(method_golden, "guided_src")
    images = images.repeat_interleave(5, 2).repeat_interleave(5, 3)
    saliency = spectral_residual_full(images)
    assert saliency.shape == (2, 160, 160)
    assert_close_to_largest(saliency[:, ::4, ::4], recorded(method_golden, "guided_src_saliency_4"), 1e-5)
    assert spectral_residual_full(torch.randn(1, 3, 130, 40)).shape == (1, 130, 40)
    assert spectral_residual_full(torch.zeros(1, 3, 8, 8)).eq(0).all()


@pytest.mark.parametrize("case", CASES)
def test_mix_matches_the_published_code(case, method_golden):
    images, labels = load_method_recording(method_golden, case)
    saliency, expected_map = (recorded(method_golden, f"{case}_{name}") for name in ("saliency", "map"))
    mixer = GuidedMixup(mix_prob=1.0)
    mixed, soft = mixer(images, F.one_hot(labels, 10).float(), lambda *_: saliency)
    maps = normalize_sum(blur_maps(saliency, 3.0, 7))
    assert_close_to_largest(maps, expected_map, 1e-5)
    torch.testing.assert_close(
        measure_distances(maps), recorded(method_golden, f"{case}_dist"), rtol=0, atol=1e-6, msg="distances"
    )
    assert mixer.partner.tolist() == method_golden[f"{case}_pair"].tolist()
    torch.testing.assert_close(mixed, recorded(method_golden, f"{case}_mixed"), rtol=0, atol=2e-6)
    torch.testing.assert_close(soft, recorded(method_golden, f"{case}_soft"), rtol=0, atol=1e-6)
    weight = recorded(method_golden, f"{case}_weight")
    torch.testing.assert_close(mixer.weight.mean((1, 2, 3)), weight, rtol=0, atol=1e-6)


def test_gradient_source_reduces_as_the_published_code(method_golden):
    options = GuidedMixup(clean_lam=0.5).gradient_options
    assert options == {"mode": "train", "clean_weight": 0.5}
    source = Gradient(torch.nn.Identity(), **options)
    gradient = recorded(method_golden, "guided_ap_gradient")
    assert_close_to_largest(source.reduce(gradient), recorded(method_golden, "guided_ap_saliency"), 1e-5)


def test_distances_of_large_maps_are_exact():
    """The pixels of maps that sum to 1 are small, and their squares smaller still."""
    maps = normalize_sum(blur_maps(torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0)), 3.0, 7))
    expected = (maps.double().unsqueeze(1) - maps.double()).square().sum((2, 3)).sqrt()
    torch.testing.assert_close(measure_distances(maps).double(), expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3, 7, 40])
def test_pairs_match_the_published_code(size, method_golden):
    partner = pair_in_a_cycle(recorded(method_golden, f"guided_pair{size}_dist"))
    assert partner.tolist() == method_golden[f"guided_pair{size}_pair"].tolist()


def test_the_cycle_of_four_images_by_hand():
    """Images on a line at 0, 1, 5 and 11: 0 - 11 is the longest; from 11, 1 is farthest of the rest; then 5, then 0."""
    places = torch.tensor([0.0, 1.0, 5.0, 11.0])
    distance = (places.unsqueeze(1) - places).abs()
    assert pair_in_a_cycle(distance).tolist() == [3, 2, 0, 1]
    assert pair_in_a_cycle(torch.zeros(1, 1)).tolist() == [0]


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_a_cycle_visits_all_images_also_with_equal_distances(size):
    for distance in (torch.zeros(size, size), measure_distances(torch.rand(size, 4, 4))):
        partner, seen, image = pair_in_a_cycle(distance), set(), 0
        for _ in range(size):
            image = int(partner[image])
            seen.add(image)
        assert image == 0 and len(seen) == size


def test_weights_by_hand():
    maps = torch.tensor([[[0.25, 0.75, 0.0]], [[0.75, 0.25, 0.0]]])
    weight = weigh_pixels(maps, torch.tensor([1, 0]))
    torch.testing.assert_close(weight, torch.tensor([[[0.25, 0.75, 0.5]], [[0.75, 0.25, 0.5]]]))


@pytest.mark.parametrize("pairing", ["greedy", "random"])
@pytest.mark.parametrize("shape", [(6, 3, 16, 12), (1, 3, 8, 8)])
def test_targets_follow_the_mean_weight(pairing, shape):
    images = torch.arange(float(shape[0])).view(-1, 1, 1, 1).expand(shape)  # one colour an image
    mixer = GuidedMixup(pairing=pairing, mix_prob=1.0)
    mixed, soft = mixer(images, torch.eye(shape[0]), lambda images, _: torch.rand(images[:, 0].shape))
    colours = torch.arange(float(shape[0]))
    torch.testing.assert_close(soft @ colours, mixed.mean((1, 2, 3)))
    assert mixer.partner.shape == (shape[0],) and sorted(mixer.partner.tolist()) == list(range(shape[0]))


def test_blur_is_that_of_the_gradient_source():
    maps = torch.rand(2, 9, 12)
    torch.testing.assert_close(blur_maps(maps, 1.5, 5), blur(maps, 1.5, 5))
    mixer = GuidedMixup(blur_sigma=0.0, mix_prob=1.0)
    mixer(torch.rand(2, 3, 2, 2), torch.eye(2), lambda *_: torch.ones(2, 2, 2).cumsum(0))
    assert mixer.weight.eq(0.5).all(), "maps are compared after they are scaled to sum 1"


def test_errors():
    with pytest.raises(ValueError, match="kernel_size 7 is too large to blur maps of 3x8 pixels; at most 5 works"):
        GuidedMixup(mix_prob=1.0)(torch.rand(2, 3, 3, 8), torch.eye(2), lambda *_: torch.rand(2, 3, 8))
    GuidedMixup(kernel_size=5, mix_prob=1.0)(torch.rand(2, 3, 3, 8), torch.eye(2), lambda *_: torch.rand(2, 3, 8))
    for options in ({"pairing": "reversed"}, {"kernel_size": 4}, {"blur_sigma": -1.0}, {"clean_lam": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GuidedMixup(**options)
