import numpy as np
import pytest
import torch

from saliency import SOURCES, build_source
from saliency.static import binomial_blur, fine_grained, float_bytes, grey, resize_exact, spectral_residual

SIZES = ["32", "64", "97x131", "48x40"]


def opencv_angle(spectrum: torch.Tensor) -> torch.Tensor:
    """OpenCV's phase: a polynomial in float32 degrees, good to 1.6e-4 rad."""
    x, y = spectrum.real.float(), spectrum.imag.float()
    low, high = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    c = low / high.clamp_min(1e-37)
    square = c * c
    angle = 57.29578 * c * (0.99978784 - 0.32580840 * square + 0.15557865 * square**2 - 0.04432656 * square**3)
    angle = torch.where(y.abs() > x.abs(), 90 - angle, angle)
    angle = torch.where(x < 0, 180 - angle, angle)
    return torch.deg2rad(torch.where(y < 0, 360 - angle, angle).double())


def recorded(golden, size):
    return torch.from_numpy(golden[f"img{size}_rgb"]).permute(0, 3, 1, 2)


def first_maxima(maps: torch.Tensor) -> np.ndarray:
    return np.stack(np.unravel_index(maps.flatten(1).argmax(1).numpy(), maps.shape[1:]), 1)


@pytest.mark.parametrize("size", SIZES)
def test_fine_grained_equals_opencv_step_by_step(size, static_golden):
    images = recorded(static_golden, size)
    assert np.array_equal(grey(images), static_golden[f"img{size}_gray"])
    assert np.array_equal(binomial_blur(binomial_blur(grey(images))), static_golden[f"img{size}_gray_blur2"])
    maps = fine_grained(images)
    assert np.array_equal((maps * 255).round(), static_golden[f"img{size}_fine_u8"])
    assert np.array_equal(first_maxima(maps), static_golden[f"img{size}_fine_argmax"])


@pytest.mark.parametrize("size", SIZES)
def test_spectral_residual_equals_opencv(size, static_golden):
    images, expected = recorded(static_golden, size), static_golden[f"img{size}_spectral"]
    assert np.array_equal(resize_exact(grey(images), 64), static_golden[f"img{size}_gray64"])
    assert np.abs(spectral_residual(images).numpy() - expected).max() < 2e-4
    assert np.abs(spectral_residual(images, angle=opencv_angle).numpy() - expected).max() < 5e-6


def test_grey_images_are_taken_too(static_golden):
    images = torch.from_numpy(static_golden["img48x40_gray"]).unsqueeze(1)
    assert np.array_equal((fine_grained(images) * 255).round(), static_golden["gray_in_fine_u8"])
    assert np.abs(spectral_residual(images).numpy() - static_golden["gray_in_spectral"]).max() < 2e-4


def test_a_flat_image_has_no_fine_grained_saliency():
    assert fine_grained(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)).eq(0).all()


def test_float_bytes_is_what_opencv_makes_of_floats(static_golden):
    maps = float_bytes(torch.from_numpy(static_golden["sm_normalised"]))
    expected = static_golden["sm_float_map_official_u8"]
    assert np.mean((maps * 255).round().numpy() == expected) > 0.9  # the last bit of a float depends on the processor
    peaks = first_maxima(maps) == first_maxima(torch.from_numpy(expected))
    assert peaks.all(1).mean() >= 0.75


@pytest.mark.parametrize("name", sorted(SOURCES))
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (1, 3, 20, 36)])
def test_every_source_gives_a_map_for_each_image(name, shape):
    source = build_source(name, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    images = torch.randn(shape)
    kept = images.clone()
    saliency = source(images, torch.eye(5)[: shape[0]])
    assert saliency.shape == (shape[0], *shape[2:]) and saliency.min() >= 0 and saliency.isfinite().all()
    assert torch.equal(images, kept)
    for index in range(shape[0]):  # a map does not depend on the rest of the batch
        torch.testing.assert_close(source(images[index : index + 1], None)[0], saliency[index])


def test_a_source_undoes_the_normalisation(static_golden):
    images = recorded(static_golden, "32")
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    normalised = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    source = build_source("fine_grained", mean=mean, std=std)
    assert torch.equal(source(normalised, None), fine_grained(images))


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(ValueError, match="fine_grained"):
        build_source("fine", mean=(0.5,), std=(0.5,))
    assert build_source(None, mean=(0.5,), std=(0.5,)) is None
