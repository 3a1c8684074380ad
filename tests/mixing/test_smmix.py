import pytest
import torch
from support import load_method_recording
from torch.nn import functional as F

import mixing.smmix
from mixing.smmix import SMMix, place_windows, window_sums


def fix_draws(monkeypatch, partner, side):
    monkeypatch.setattr(mixing.smmix, "draw_partner", lambda images: torch.as_tensor(partner))
    monkeypatch.setattr(SMMix, "draw_side", lambda self, images: torch.as_tensor(side).view(-1))


@pytest.mark.parametrize("case", ["smmix_a", "smmix_b"])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_mix_is_that_of_the_published_code(case, per_image, method_golden, monkeypatch):
    def recorded(name):
        return torch.from_numpy(method_golden[f"{case}_{name}"])

    images, labels = load_method_recording(method_golden, case)
    count, side = (int(method_golden[f"{case}_{name}"]) for name in ("side", "window"))
    targets = 0.9 * F.one_hot(labels, 10) + 0.01
    attention = recorded("attention")
    maps = attention.repeat_interleave(32 // count, 1).repeat_interleave(32 // count, 2)
    fix_draws(monkeypatch, [3, 2, 1, 0], [side] * 4 if per_image else side)
    mixer = SMMix(num_patches=count)
    mixed, soft = mixer(images, targets, lambda *_: maps)
    shown = F.interpolate(1 - mixer.weight, (count, count)).squeeze(1)
    assert torch.equal(shown, recorded("source_mask").float())
    torch.testing.assert_close(mixed, recorded("mixed"), atol=1e-6, rtol=0)
    torch.testing.assert_close(soft, recorded("soft"), atol=1e-6, rtol=0)
    assert mixer.weight.mean((1, 2, 3)).allclose(torch.tensor(method_golden[f"{case}_lam"]).float())


@pytest.mark.parametrize("case", ["smmix_a", "smmix_b"])
def test_the_sides_are_those_of_the_published_code(case, method_golden):
    mixer = SMMix(num_patches=int(method_golden[f"{case}_side"]), in_batch=True)
    sides = mixer.draw_side(torch.zeros(20_000, 1, 1, 1))
    values, counts = sides.unique(return_counts=True)
    assert values.tolist() == method_golden[f"{case}_sides"].tolist()
    assert (counts / 20_000 * len(values) - 1).abs().max() < 0.1
    assert mixer.draw_side(torch.zeros(3, 1, 1, 1)).shape == (3,) and SMMix().draw_side(torch.zeros(3, 1)).shape == (1,)


def test_windows_of_two_images_by_hand():
    """2 x 2 windows on a grid of 3 x 3: the first least and the first largest sum, in row-major order."""
    patches = torch.tensor([[[5.0, 0, 0], [0, 9, 0], [0, 0, 0]], [[1.0, 1, 1], [1, 1, 1], [1, 1, 1]]])
    sums, inside = window_sums(patches, torch.tensor([2]))
    assert sums.view(2, 3, 3)[0, :2, :2].tolist() == [[14, 9], [9, 9]]
    assert inside.view(3, 3).int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    least, most = place_windows(patches, torch.tensor([1, 0]), torch.tensor([2]))
    assert least.tolist() == [[0, 1], [0, 0]] and most.tolist() == [[0, 0], [0, 0]]
    least, most = place_windows(patches, torch.tensor([1, 0]), torch.tensor([3, 1]))
    assert least.tolist() == [[0, 0], [0, 0]] and most.tolist() == [[0, 0], [1, 1]]


def test_the_window_moves_to_the_place_it_covers(monkeypatch):
    """Image 0 is salient at the right, image 1 in its lower left corner; patches are 2 x 4 pixels."""
    images = torch.arange(2.0 * 64).view(2, 1, 4, 16).expand(2, 3, 4, 16)
    saliency = torch.zeros(2, 4, 16)
    saliency[0, :, 4:], saliency[1, 2:, :4] = 1, 1
    fix_draws(monkeypatch, [1, 0], 1)
    mixer = SMMix(num_patches=2)
    with pytest.raises(ValueError, match="num_patches: 5x16 pixels cannot be cut into 2x2 blocks"):
        mixer(torch.zeros(2, 3, 5, 16), torch.eye(2), lambda *_: saliency)
    mixed, soft = mixer(images, torch.eye(2), lambda *_: saliency)
    expected = images.clone()
    expected[0, :, :2, :8] = images[1, :, 2:, :8]
    expected[1, :, :2, :8] = images[0, :, :2, 8:]
    assert torch.equal(mixed, expected)
    assert soft.tolist() == [[0.75, 0.25], [0.25, 0.75]]


def test_without_saliency_the_first_window_stays_in_place():
    images, targets = torch.rand(5, 3, 16, 16), torch.eye(5)
    mixer = SMMix(num_patches=4)
    mixed, _ = mixer(images, targets, lambda *_: torch.zeros(5, 16, 16))
    assert int(mixer.replaced_maps) == 5
    torch.testing.assert_close(mixed, torch.where(mixer.weight.bool(), images, images[mixer.partner]))
    assert mixer.weight[:, :, 0, 0].eq(0).all() and mixer.weight[:, :, -1, -1].eq(1).all()


@pytest.mark.parametrize(
    "options",
    [{"num_patches": 1}, {"min_side_ratio": 0.8}, {"min_side_ratio": -0.1}, {"max_side_ratio": 1.1}, {"mix_prob": 2}],
)
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SMMix(**options)
