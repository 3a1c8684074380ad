import pytest
import torch
from support import load_method_recording

import mixing.gridmix
from mixing import build_mixer
from mixing.gridmix import GridMix, grid_mask

DRAWS = ("lam_draw", "n_holes", "hole_aspect", "area_ratio", "crop_aspect", "place")


@pytest.mark.parametrize("case", ["a", "b", "c", "fault"])
def test_masks_match_the_recordings_but_for_holes_that_wrap_around(case, method_golden):
    def recorded(name):
        return torch.from_numpy(method_golden[f"gridmix_{case}_{name}"])

    images, _ = load_method_recording(method_golden, f"gridmix_{case}")
    mask = grid_mask(*(recorded(name).unsqueeze(0) for name in DRAWS), 32, 32)
    partner = recorded("perm").long()
    mixed = torch.where(mask, images[partner], images)
    if case == "fault":  # the grid is higher than the image, and in the recording holes above it appear at the bottom
        wrapped = recorded("mask").bool() & ~mask[0]
        assert torch.equal(mask[0] | wrapped, recorded("mask").bool()) and not wrapped[:, :27].any()
        assert wrapped.sum() == 32 and abs(mask.double().mean() + 32 / 1024 - 1 + recorded("lam")) < 1e-7
        mixed = torch.where(wrapped, images[partner], mixed)
        torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-6)
        return
    assert torch.equal(mask[0], recorded("mask").bool())
    torch.testing.assert_close(1 - mask.double().mean(), recorded("lam"), rtol=0, atol=1e-7)
    torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-6)


def draw(lam=0.75, holes=2, hole_aspect=1.0, area=1.0, aspect=1.0, place=(0.0, 0.0)):
    one = [torch.tensor([value]) for value in (lam, holes, hole_aspect, area, aspect)]
    return [*one, torch.tensor([place])]


def test_a_grid_by_hand():
    mask = grid_mask(*draw(), 8, 8)[0, 0].int()  # two cells of 4 pixels, with holes of half their side
    row = [1, 1, 0, 0, 1, 1, 0, 0]
    assert mask.tolist() == [row, row, [0] * 8, [0] * 8] * 2
    mask = grid_mask(*draw(aspect=0.5, place=(1.0, 0.0)), 8, 8)[0, 0].int()  # 11 x 5 pixels at the bottom, cells of 6
    row = [1, 1, 1, 0, 0, 0, 1, 1]  # the grid is cut on the right
    assert mask.tolist() == [[0] * 8] * 3 + [row] * 3 + [[0] * 8] * 2


def test_images_in_which_no_cell_could_have_a_hole_are_refused():
    message = "grid_holes: at 8x8 pixels the largest cell has 1x1: too few for a hole, so nothing is mixed; take fewer"
    with pytest.raises(ValueError, match=message):
        GridMix(grid_holes=(11, 64)).check_size(8, 8)  # the widest grid has 11 pixels
    with pytest.raises(ValueError, match="the largest cell has 1x6"):
        GridMix(hole_aspect=(0.1, 0.3)).check_size(8, 8)
    mixer = GridMix(grid_holes=(10, 10), grid_area=(1.0, 1.0), grid_aspect=(0.5, 0.5), in_batch=True)
    mixer.check_size(8, 8)
    mixer(torch.zeros(8, 1, 8, 8), torch.eye(8))
    assert mixer.weight.min() == 0


def test_cells_of_one_pixel_have_no_holes():
    assert not grid_mask(*draw(lam=0.1, holes=8), 8, 8).any()
    assert not grid_mask(*draw(lam=0.1, holes=1, hole_aspect=0.01), 8, 8).any()


def test_the_draws_fill_their_ranges(monkeypatch):
    seen = []
    monkeypatch.setattr(mixing.gridmix, "grid_mask", lambda *draws: seen.extend(draws) or torch.ones(4000, 1, 8, 8) > 0)
    ranges = {"grid_holes": (2, 4), "hole_aspect": (0.5, 1.0), "grid_area": (0.5, 0.9), "grid_aspect": (0.5, 2.0)}
    torch.manual_seed(0)
    GridMix(in_batch=True, **ranges).draw_mask(torch.zeros(4000, 1, 8, 8))
    _, holes, *draws, place, height, width = seen
    assert holes.bincount().tolist()[:2] == [0, 0] and (holes.bincount()[2:] / 4000 - 1 / 3).abs().max() < 0.03
    for drawn, (low, high) in zip([*draws, place], [*list(ranges.values())[1:], (0.0, 1.0)], strict=True):
        assert low <= drawn.min() and drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert place.shape == (4000, 2) and (height, width) == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_holes": (6, 2)}, r"grid_holes must be two ascending numbers of at least 1, got \(6, 2\)"),
        ({"grid_holes": (0, 2)}, "grid_holes"),
        ({"grid_area": (0.5, 1.5)}, "grid_area must be at most 1"),
        ({"hole_aspect": (0.0, 1.0)}, "hole_aspect must be two ascending positive numbers"),
        ({"grid_aspect": (2.0, 0.5)}, "grid_aspect must be two ascending positive numbers"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be positive"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer("gridmix", **options)
