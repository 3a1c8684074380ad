import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data import sample_rng
from evaluation import corruptions, image_ops
from evaluation.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, STRENGTHS, corrupt

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
# At some published step of these, a higher severity changes values less; they have tests of their own.
UNEVEN = {"glass_blur", "snow", "frost", "fog", "elastic_transform"}


def make_images(count: int, height: int, width: int) -> torch.Tensor:
    """Return (B, 3, H, W) of 256 levels: a shaded ground, a bright disk and stripes, each image different."""
    shift = sample_rng.uniform(torch.arange(count), (3, 1, 1), seed=1, purpose="picture")
    down, across = torch.linspace(0, 1, height).view(1, 1, -1, 1), torch.linspace(0, 1, width)
    ground = 0.25 + 0.35 * (down * shift + across * (1 - shift))
    disk = torch.sigmoid(40 * (0.25 - ((down - 0.3 - 0.3 * shift[:, :1]) ** 2 + (across - 0.5) ** 2).sqrt()))
    stripes = 0.08 * torch.sin(2 * math.pi * (6 * across + 3 * down * shift))
    return round_to_levels(ground + 0.3 * disk * (0.5 + shift) + stripes)


def round_to_levels(values: torch.Tensor) -> torch.Tensor:
    return (values * 255).round().clamp(0, 255) / 255


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()


def make_flat(value: float, side: int = 64, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count, 3, side, side), round(value * 255) / 255), torch.arange(count)


def check_contract(clean: torch.Tensor, name: str, severity: int) -> None:
    index, before = torch.arange(10, 10 + len(clean)), clean.clone()
    worse = corrupt(clean, name, severity, index)
    assert worse.shape == clean.shape and worse.dtype == torch.float32 and worse is not clean
    assert torch.equal(clean, before) and torch.equal(worse, round_to_levels(worse))
    assert torch.equal(worse, corrupt(clean, name, severity, index))
    assert torch.equal(worse[-1:], corrupt(clean[-1:], name, severity, index[-1:])), "depends on the batch"
    shuffled = clean.to(memory_format=torch.channels_last)
    assert torch.equal(worse, corrupt(shuffled, name, severity, index)), "depends on the memory format"


def test_every_corruption_has_a_family_and_strengths():
    names = [function.__name__ for family in FAMILIES.values() for function in family]
    assert len(names) == 15 and set(names) == set(CORRUPTIONS) == set(STRENGTHS)
    assert all(len(strengths) == 5 for pair in STRENGTHS.values() for strengths in pair) and SEVERITIES == (
        1,
        2,
        3,
        4,
        5,
    )


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 32, 20), (1, 9, 41), (2, 100, 131)])
def test_contract(name, shape):
    for severity in (1, 5) if shape[1] > 50 else SEVERITIES:
        check_contract(make_images(*shape), name, severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_random_numbers_depend_on_the_seed_and_the_position(name):
    clean = make_images(1, 32, 32).expand(2, -1, -1, -1)
    first, second = corrupt(clean, name, 5, torch.tensor([0, 1]))
    other = corrupt(clean, name, 5, torch.tensor([0, 1]), seed=1)[0]
    assert torch.equal(first, second) == torch.equal(first, other) == (name in DETERMINISTIC)


def measure_change(name: str, count: int, side: int) -> list[float]:
    """Return the mean distance from the clean images at each severity."""
    clean, index = make_images(count, side, side), torch.arange(count)
    return [float((corrupt(clean, name, severity, index) - clean).abs().mean()) for severity in SEVERITIES]


def is_increasing(values: list[float]) -> bool:
    return all(after > before for before, after in zip(values, values[1:], strict=False))


def test_corruptions_and_severities_have_independent_random_numbers():
    clean, index = make_flat(0.5, 32, 1)
    noise = [corrupt(clean, "gaussian_noise", severity, index) for severity in (1, 2)]
    noise.append(corrupt(clean, "shot_noise", 1, index))
    assert torch.stack([image.flatten() for image in noise]).corrcoef().triu(1).abs().max() < 0.1


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - UNEVEN))
@pytest.mark.parametrize("side, count", [(32, 64), (112, 6)])
def test_a_higher_severity_changes_values_more(name, side, count):
    change = measure_change(name, count, side)
    if name == "motion_blur":  # 3 and 4 of CIFAR-10-C only differ in length, beyond where the smear has faded
        del change[3]
    assert is_increasing(change) and change[-1] > 1.2 * change[0], change


@pytest.mark.parametrize("name, side, count", [("frost", 32, 64), ("frost", 112, 6), ("fog", 32, 64)])
def test_a_higher_severity_hides_more_of_the_image(name, side, count):
    clean, correlation = make_images(count, side, side), []
    for severity in SEVERITIES:
        worse = corrupt(clean, name, severity, torch.arange(count))
        correlation.append(float(torch.stack([clean.flatten(), worse.flatten()]).corrcoef()[0, 1]))
    assert is_increasing(correlation[::-1]), correlation


@pytest.mark.parametrize("side", [32, 112])
def test_fog_is_thicker_and_rougher_at_a_higher_severity(side):
    white, index = make_flat(1.0, side, 8)
    fogs = [corrupt(white, "fog", severity, index) for severity in SEVERITIES]
    assert is_increasing([float(fog.diff(dim=3).abs().mean()) for fog in fogs])


@pytest.mark.parametrize("side, count", [(32, 64), (112, 6)])
def test_there_is_more_snow_at_a_higher_severity(side, count):
    change = measure_change("snow", count, side)
    assert change[1] > change[0] and is_increasing(change[:1] + change[2:]), (
        change
    )  # published severity 2 is denser than 3


def test_glass_blur_moves_pixels_further_with_more_rounds_or_a_larger_swap():
    change = measure_change("glass_blur", 64, 32)
    # severity 2 is one round, 3 one round with more blur, 4 and 5 two rounds
    assert change[3] > change[1] > change[2] and change[4] > change[2]
    change = measure_change("glass_blur", 2, 224)
    assert change[2] > 1.2 * change[1] and is_increasing(change[1:]) and change[0] < change[2], change


def test_elastic_transform_bends_more_at_a_higher_severity():
    """Measured on a ramp from left to right, by how unsteadily it climbs."""
    ramp = (torch.arange(32) / 31).expand(64, 3, 32, 32)
    bent = [corrupt(ramp, "elastic_transform", severity, torch.arange(64)) for severity in (1, 3, 4, 5)]
    climb = [float(image[..., 8:24, 8:24].diff(n=2, dim=3).abs().mean()) for image in bent]
    assert is_increasing(climb), climb
    assert bent[0][..., 8:24, 8:24].diff(n=2, dim=3).abs().max() < 3.5 / 255  # severity 1 is only an affine map


# ---- Cases by hand ----


def test_brightness_raises_the_value_and_keeps_hue_and_saturation():
    clean, index = make_flat(0.0, 8, 1)
    clean[0, :, 0, 0] = torch.tensor([100, 50, 25]) / 255  # times 1.51
    clean[0, :, 0, 1] = torch.tensor([250, 125, 0]) / 255
    worse = (corrupt(clean, "brightness", 4, index) * 255).round()  # + 0.2 is + 51
    assert worse[0, :, 0, 0].tolist() == [151, 76, 38] and worse[0, :, 0, 1].tolist() == [255, 128, 0]
    assert worse[0, :, 5, 5].eq(51).all()


def test_contrast_moves_values_towards_the_mean_of_their_channel():
    clean, index = make_flat(0.2, 8, 1)
    clean[..., 4:] = 204 / 255  # half of it 51, half 204: mean 127.5
    clean[:, 2] = 0
    worse = (corrupt(clean, "contrast", 3, index) * 255).round()  # 0.4
    assert worse[0, 0, 0, 0] == 97 and worse[0, 1, 0, 7] == 158 and worse[0, 2].eq(0).all()


def test_gaussian_noise_has_the_published_standard_deviation():
    for side, expected in ((64, STRENGTHS["gaussian_noise"][0]), (96, STRENGTHS["gaussian_noise"][1])):
        clean, index = make_flat(0.5, side, 8)
        for severity in (1, 2):
            noise = corrupt(clean, "gaussian_noise", severity, index) - clean
            assert noise.std() == pytest.approx(expected[severity - 1], rel=0.02) and abs(noise.mean()) < 0.002


@pytest.mark.parametrize("side, severity, counts", [(64, 1, 500), (64, 5, 50), (96, 1, 60), (96, 5, 3)])
def test_shot_noise_has_the_mean_and_variance_of_poisson_counts(side, severity, counts):
    clean, index = make_flat(0.2, side, 8)
    worse = corrupt(clean, "shot_noise", severity, index)
    assert worse.mean() == pytest.approx(0.2, rel=0.01) and worse.var() == pytest.approx(0.2 / counts, rel=0.05)
    if counts == 3:  # P(0) for a mean count of 0.6
        assert worse.eq(0).float().mean() == pytest.approx(math.exp(-0.6), rel=0.01)
        assert set((worse * 255).unique().round().tolist()) == {0, 85, 170, 255}
    assert corrupt(torch.zeros_like(clean), "shot_noise", severity, index).eq(0).all()


def test_impulse_noise_sets_the_published_fraction_to_0_or_1():
    clean, index = make_flat(0.5, 96, 8)
    worse = corrupt(clean, "impulse_noise", 5, index)
    assert worse.eq(0).float().mean() == pytest.approx(0.135, rel=0.03)
    assert worse.eq(1).float().mean() == pytest.approx(0.135, rel=0.03)
    assert worse.eq(clean).float().mean() == pytest.approx(0.73, rel=0.01)


def test_defocus_blur_spreads_a_point_over_a_disk():
    clean = torch.zeros(1, 3, 224, 224)
    clean[..., 100, 110] = 1
    spread = corruptions.defocus_blur(clean, (6, 0.5), 1.0, None)[0, 0]
    down, across = torch.meshgrid(torch.arange(224) - 100, torch.arange(224) - 110, indexing="ij")
    disk = down**2 + across**2 <= 36
    inside, outside = down**2 + across**2 <= 16, down**2 + across**2 > 81
    assert spread.sum() == pytest.approx(1, abs=1e-5) and spread[outside].eq(0).all()
    torch.testing.assert_close(spread[inside], torch.full_like(spread[inside], 1 / int(disk.sum())))


@pytest.mark.parametrize("angle, path", [(0.0, [(0, 1), (0, 2)]), (math.pi / 2, [(1, 0), (2, 0)])])
def test_motion_smear_goes_one_way(angle, path):
    clean = torch.zeros(1, 1, 9, 9)
    clean[..., 4, 4] = 1
    smeared = image_ops.motion_smear(clean, 1, 2.0, torch.tensor([[[angle]]]))[0, 0]
    weights = torch.tensor([math.exp(-(step**2) / 8) for step in range(3)])
    expected = torch.zeros(9, 9)
    for weight, (down, across) in zip(weights / weights.sum(), [(0, 0), *path], strict=True):
        expected[4 - down, 4 - across] = weight
    torch.testing.assert_close(smeared, expected)


@pytest.mark.parametrize("shape", [(32, 32), (23, 50), (224, 224)])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_pixelate_agrees_with_pillow(shape, severity):
    clean = make_images(1, *shape)
    fraction = STRENGTHS["pixelate"][shape[0] >= 96][severity - 1]
    height, width = shape
    small = Image.fromarray(to_uint8(clean)[0]).resize((int(width * fraction), int(height * fraction)), Image.BOX)
    expected = torch.from_numpy(np.array(small.resize((width, height), Image.BOX))).permute(2, 0, 1) / 255
    worse = corrupt(clean, "pixelate", severity, torch.arange(1))[0]
    assert (worse - expected).abs().max() * 255 < 1.01


def test_jpeg_leaves_middle_grey_unchanged():
    clean, index = make_flat(128 / 255, 32, 1)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(clean, "jpeg_compression", severity, index), clean)


@pytest.mark.parametrize("shape", [(32, 32), (20, 45), (224, 224)])
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_jpeg_agrees_with_an_encoder(shape, severity):
    clean = make_images(1, *shape)
    file = io.BytesIO()
    quality = STRENGTHS["jpeg_compression"][shape[0] >= 96][severity - 1]
    Image.fromarray(to_uint8(clean)[0]).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    worse = corrupt(clean, "jpeg_compression", severity, torch.arange(1))[0]
    assert (worse - expected).abs().mean() * 255 < 1.5
    assert (worse - expected).abs().mean() < 0.25 * (clean[0] - expected).abs().mean()


def test_zoom_blur_changes_the_border_more_than_the_centre():
    clean = make_images(2, 224, 224)
    change = (corrupt(clean, "zoom_blur", 5, torch.arange(2)) - clean).abs()
    assert change[..., 108:116, 108:116].mean() < 0.3 * change.mean()


def test_weather_on_black_and_white_images():
    black, index = make_flat(0.0, 64, 4)
    snowy = corrupt(black, "snow", 5, index)
    assert snowy.max() > 0.5 and snowy[:, 0].equal(snowy[:, 2]) and snowy.mean() > 0.15
    frozen = corrupt(black, "frost", 5, index)
    assert frozen[:, 2].mean() > frozen[:, 0].mean() > 0.1
    white = corrupt(1 - black, "frost", 5, index)
    assert ((white - frozen - 0.75).abs() < 0.01)[white < 1].all()
    ice = corruptions.draw_ice(image_ops.BatchRNG(index, 0, "frost/5", index.device), 64, 64)
    assert ice.min() < 0.2 and ice.max() > 0.9 and torch.equal(frozen, round_to_levels(0.45 * ice))
    foggy = corrupt(black + 102 / 255, "fog", 3, index)  # fog from 0 to 0.75, times 0.4 / 1.15
    assert foggy.min() == pytest.approx(0.16 / 1.15, abs=0.01) and foggy.max() == pytest.approx(0.4, abs=0.01)


def test_lengths_follow_the_size_of_the_image():
    """The blur of an image twice as large is twice as wide."""
    for name, sides in (("motion_blur", (32, 64)), ("defocus_blur", (112, 224))):
        change = [measure_change(name, 4, side)[4] for side in sides]
        assert change[1] == pytest.approx(change[0], rel=0.15), name


# ---- Errors and devices ----


def test_invalid_arguments_are_named():
    clean, index = make_flat(0.5, 8, 2)
    with pytest.raises(ValueError, match="got 'gausian_noise'.*did you mean gaussian_noise"):
        corrupt(clean, "gausian_noise", 1, index)
    for severity in (0, 6, 2.5, "3"):
        with pytest.raises(ValueError, match="severity must be one of 1, 2, 3, 4, 5, got"):
            corrupt(clean, "fog", severity, index)
    for shape in ((2, 1, 8, 8), (3, 8, 8), (2, 3, 7, 8)):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\) with H and W of at least 8"):
            corrupt(torch.zeros(shape), "fog", 1, index)
    with pytest.raises(ValueError, match="one position for each of 2 images"):
        corrupt(clean, "fog", 1, torch.arange(3))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(4, 32, 40), (2, 112, 100)])
def test_cpu_and_cuda_agree(name, shape):
    clean, index = make_images(*shape), torch.arange(shape[0])
    for severity in SEVERITIES:
        here, there = (corrupt(clean.to(device), name, severity, index).cpu() for device in ("cpu", "cuda"))
        # float error may change a rounding, and rarely a comparison with a threshold
        assert (here - there).abs().mean() * 255 < 0.02 and (here != there).float().mean() < 0.01
