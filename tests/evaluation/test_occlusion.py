import pytest
import torch
from matplotlib.figure import Figure

from evaluation.occlusion import KINDS, SHARES, area_under_curve, draw_curves, occlude

FILL = (2.0, 3.0, 4.0)  # no colour of an image: what is hidden can be told
SIZES = [(32, 32), (16, 40), (4, 6), (30, 20), (1, 9)]  # cells of whole pixels, fewer cells, uneven ones


def hidden(kind: str, share: float, size: tuple[int, int], images: int = 5, seed: int = 0) -> torch.Tensor:
    """(B, H, W) how much of each pixel is hidden, from black images."""
    found = occlude(torch.zeros(images, 3, *size), kind, share, torch.arange(images), (1.0, 1.0, 1.0), seed)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    return found[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_rest_of_the_image_stays_as_it_is(kind, size, share):
    pixels, index = torch.rand(3, 3, *size), torch.tensor([4, 0, 77])
    before = pixels.clone()
    found = occlude(pixels, kind, share, index, FILL, seed=0)
    colour = torch.tensor(FILL).view(3, 1, 1).expand_as(pixels)
    assert found.dtype == torch.float32 and torch.equal(pixels, before)
    assert (share > 0 or torch.equal(found, pixels)) and (share < 1 or torch.equal(found, colour))
    covered = occlude(torch.zeros_like(pixels), kind, share, index, (1.0, 1.0, 1.0), seed=0)
    assert torch.equal(found[covered == 0], pixels[covered == 0])
    assert torch.equal(found[covered == 1], colour[covered == 1])
    assert kind == "centre" or ((covered == 0) | (covered == 1)).all(), "only a hole has a blended border"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (8, 8), (4, 6)])
def test_the_share_is_exact(kind, size):
    for share in SHARES:
        found = hidden(kind, share, size).flatten(1).mean(1)
        torch.testing.assert_close(found, torch.full((5,), share), rtol=0, atol=1e-5)
    assert SHARES == (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


def test_uneven_cells_keep_to_the_share_on_average():
    for share in (0.25, 0.8):
        assert abs(hidden("patches", share, (30, 21), images=400).mean() - share) < 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_hidden_stays_hidden(kind, size):
    levels = torch.stack([hidden(kind, share, size) for share in (*SHARES, 0.9, 1.0)])
    assert (levels.diff(dim=0) >= 0).all()


def test_patches_are_whole_cells_of_an_8_by_8_grid():
    found = hidden("patches", 0.5, (16, 40))
    cells = found.view(5, 8, 2, 8, 5)
    assert torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)) and set(found.unique().tolist()) == {0.0, 1.0}


def test_every_cell_has_the_same_chance():
    often = hidden("patches", 0.25, (8, 8), images=4000).mean(0)
    assert (often - 0.25).abs().max() < 0.035, "five deviations of a mean of 4000"


def test_the_patches_depend_on_the_image_and_the_seed_alone():
    pixels, index = torch.rand(6, 3, 16, 12), torch.tensor([3, 11, 0, 2, 999, 5])
    whole = occlude(pixels, "patches", 0.5, index, FILL, seed=1)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    parts = [occlude(pixels[one], "patches", 0.5, index[one], FILL, seed=1) for one in order.split(4)]
    assert torch.equal(torch.cat(parts), whole[order])
    masks = whole[:, 0] == FILL[0]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 6, "not the same of every image"
    assert not torch.equal(occlude(pixels, "patches", 0.5, index, FILL, seed=2), whole)


def test_the_hole_is_in_the_middle():
    expected = torch.zeros(8, 12)
    expected[2:6, 3:9] = 1
    assert torch.equal(hidden("centre", 0.25, (8, 12))[0], expected)
    rim = hidden("centre", 0.5, (6, 6))[0]  # of 4.243 pixels a side: a rim of 0.121
    torch.testing.assert_close(rim[0], rim[5])
    torch.testing.assert_close(rim, rim.T)
    assert torch.equal(rim[1:5, 1:5], torch.ones(4, 4)) and abs(float(rim[0, 2]) - 0.1213) < 1e-3
    assert abs(float(hidden("centre", 1 / 9, (3, 3))[0, 1, 1]) - 1) < 1e-6


def test_wrong_calls_say_what_came():
    for kind, share, message in [
        ("edge", 0.5, "patches or centre, got 'edge'"),
        ("centre", -0.1, "0..1, got -0.1"),
        ("patches", 1.1, "0..1, got 1.1"),
        ("patches", float("nan"), "0..1, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            occlude(torch.rand(1, 3, 4, 4), kind, share, torch.arange(1), FILL, seed=0)


def test_the_area_is_the_mean_along_the_curve():
    assert area_under_curve(SHARES, [70.0] * 8) == 70
    assert area_under_curve(SHARES, list(range(8))) == 3.5
    assert area_under_curve([0.0, 0.5, 0.6], [1.0, 0.0, 0.5]) == pytest.approx((0.25 + 0.025) / 0.6)  # uneven steps
    for shares, accuracies in [([0.5], [1.0]), ([], []), ([0, 0.5], [1.0]), ([0.5, 0.2], [1, 1]), ([0.5, 0.5], [1, 1])]:
        with pytest.raises(ValueError, match="two or more increasing shares"):
            area_under_curve(shares, accuracies)


def test_the_curves_are_told_apart(tmp_path):
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
def test_the_host_never_waits_while_images_are_hidden():
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
