import pytest
import torch
from matplotlib.figure import Figure

from evaluation.occlusion import FRACTIONS, KINDS, area_under_curve, draw_curves, occlude

FILL = (2.0, 3.0, 4.0)  # outside the range of an image, so that hidden pixels are recognised
SIZES = [(32, 32), (16, 40), (4, 6), (30, 20), (1, 9)]  # cells of whole pixels, fewer cells, uneven cells


def compute_hidden(kind: str, fraction: float, size: tuple[int, int], images: int = 5, seed: int = 0) -> torch.Tensor:
    """Return how much of each pixel is hidden, (B, H, W), from black images."""
    found = occlude(torch.zeros(images, 3, *size), kind, fraction, torch.arange(images), (1.0, 1.0, 1.0), seed)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    return found[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_only_the_hidden_part_of_the_image_changes(kind, size, fraction):
    pixels, index = torch.rand(3, 3, *size), torch.tensor([4, 0, 77])
    before = pixels.clone()
    found = occlude(pixels, kind, fraction, index, FILL, seed=0)
    colour = torch.tensor(FILL).view(3, 1, 1).expand_as(pixels)
    assert found.dtype == torch.float32 and torch.equal(pixels, before)
    assert (fraction > 0 or torch.equal(found, pixels)) and (fraction < 1 or torch.equal(found, colour))
    hidden = occlude(torch.zeros_like(pixels), kind, fraction, index, (1.0, 1.0, 1.0), seed=0)
    assert torch.equal(found[hidden == 0], pixels[hidden == 0])
    assert torch.equal(found[hidden == 1], colour[hidden == 1])
    assert kind == "centre" or ((hidden == 0) | (hidden == 1)).all(), "only the hole has a blended border"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (8, 8), (4, 6)])
def test_the_hidden_fraction_is_exact(kind, size):
    for fraction in FRACTIONS:
        found = compute_hidden(kind, fraction, size).flatten(1).mean(1)
        torch.testing.assert_close(found, torch.full((5,), fraction), rtol=0, atol=1e-5)
    assert FRACTIONS == (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def test_uneven_cells_keep_the_fraction_on_average():
    for fraction in (0.25, 0.8):
        assert abs(compute_hidden("patches", fraction, (30, 21), images=400).mean() - fraction) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_hidden_pixels_stay_hidden_at_larger_fractions(kind, size):
    levels = torch.stack([compute_hidden(kind, fraction, size) for fraction in (*FRACTIONS, 0.9, 1.0)])
    assert (levels.diff(dim=0) >= 0).all()


def test_patches_are_whole_cells_of_an_8_by_8_grid():
    found = compute_hidden("patches", 0.5, (16, 40))
    cells = found.view(5, 8, 2, 8, 5)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)) and set(found.unique().tolist()) == {0.0, 1.0}


def test_every_cell_is_hidden_equally_often():
    frequency = compute_hidden("patches", 0.25, (8, 8), images=4000).mean(0)
    assert (frequency - 0.25).abs().max() < 0.035, "five standard errors of a mean of 4000"


def test_patches_depend_only_on_the_image_and_the_seed():
    pixels, index = torch.rand(6, 3, 16, 12), torch.tensor([3, 11, 0, 2, 999, 5])
    whole = occlude(pixels, "patches", 0.5, index, FILL, seed=1)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    parts = [occlude(pixels[one], "patches", 0.5, index[one], FILL, seed=1) for one in order.split(4)]
    assert torch.equal(torch.cat(parts), whole[order])
    masks = whole[:, 0] == FILL[0]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6, "each image has patches of its own"
    assert not torch.equal(occlude(pixels, "patches", 0.5, index, FILL, seed=2), whole)


def test_the_hole_is_centred():
    expected = torch.zeros(8, 12)
    expected[2:6, 3:9] = 1
    assert torch.equal(compute_hidden("centre", 0.25, (8, 12))[0], expected)
    rim = compute_hidden("centre", 0.5, (6, 6))[0]  # a hole of 4.243 pixels a side: 0.121 of each border pixel
    torch.testing.assert_close(rim[0], rim[5])
    torch.testing.assert_close(rim, rim.T)
    assert torch.equal(rim[1:5, 1:5], torch.ones(4, 4)) and abs(float(rim[0, 2]) - 0.1213) < 1e-3
    assert abs(float(compute_hidden("centre", 1 / 9, (3, 3))[0, 1, 1]) - 1) < 1e-6


def test_invalid_arguments_are_named():
    for kind, fraction, message in [
        ("edge", 0.5, "patches or centre, got 'edge'"),
        ("centre", -0.1, "0..1, got -0.1"),
        ("patches", 1.1, "0..1, got 1.1"),
        ("patches", float("nan"), "0..1, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            occlude(torch.rand(1, 3, 4, 4), kind, fraction, torch.arange(1), FILL, seed=0)


def test_the_area_is_the_mean_accuracy_along_the_curve():
    assert area_under_curve(FRACTIONS, [70.0] * 8) == 70
    assert area_under_curve(FRACTIONS, list(range(8))) == 3.5
    assert area_under_curve([0.0, 0.5, 0.6], [1.0, 0.0, 0.5]) == pytest.approx((0.25 + 0.025) / 0.6)  # uneven steps
    for fractions, accuracies in [
        ([0.5], [1.0]),
        ([], []),
        ([0, 0.5], [1.0]),
        ([0.5, 0.2], [1, 1]),
        ([0.5, 0.5], [1, 1]),
    ]:
        with pytest.raises(ValueError, match="two or more increasing fractions"):
            area_under_curve(fractions, accuracies)


def test_curves_differ_in_colour_and_line_style(tmp_path):
    curve = {"share": [0.0, 0.5], "top1": [90.0, 30.0]}
    figure = Figure()
    axes = figure.subplots()
    draw_curves(axes, [("resnet20", {"patches": curve, "centre": curve}), ("other", {"patches": curve})])
    lines = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [(line.get_linestyle(), line.get_color()) for line in lines] == [("-", "C0"), ("--", "C0"), ("-", "C1")]
    assert lines[0].get_xdata() == pytest.approx([0, 50]) and lines[0].get_ydata() == pytest.approx([90, 30])
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["resnet20", "other", "random patches", "centred hole"]
    figure.savefig(tmp_path / "curves.png")


@pytest.mark.gpu
def test_occlusion_never_synchronises_with_the_host():
    pixels, index = torch.rand(6, 3, 30, 32), torch.arange(6)
    there = pixels.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = {kind: occlude(there, kind, 0.375, index, FILL, seed=0) for kind in KINDS}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for kind, one in found.items():
        torch.testing.assert_close(one.cpu(), occlude(pixels, kind, 0.375, index, FILL, seed=0))
