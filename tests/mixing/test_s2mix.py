import math

import pytest
import torch
from torch.nn import functional as F

from mixing.s2mix import S2Mix, blend_patches, choose_places, enlarge_patches, patch_sides, rotated_pixels


def draw_patches(images, angle=0.0, salient=True):
    """Arguments of enlarge_patches(): random places, patches of both scales."""
    height, width = images.shape[-2:]
    sides = patch_sides(height, width, images.device)
    y, x = (torch.rand(2, len(images), 2) * (torch.tensor([[height], [width]]) + 1 - sides.T).unsqueeze(1)).long()
    mask = torch.full((len(images), height, width), salient)
    return mask, torch.stack([y, x], 2), sides, torch.full((len(images), 2), angle)


def crop(images, places, sides, index, scale):
    (y, x), (height, width) = places[index, scale].tolist(), sides[scale].tolist()
    return images[index : index + 1, :, y : y + height, x : x + width]


def test_a_patch_has_half_or_a_quarter_of_the_sides():
    assert patch_sides(32, 24, torch.device("cpu")).tolist() == [[16, 12], [8, 6]]
    assert patch_sides(7, 3, torch.device("cpu")).tolist() == [[3, 1], [1, 1]]


def test_places_by_hand():
    """Threshold 0.75: a place is accepted if a quarter of its patch is salient."""
    salient = torch.zeros(2, 8, 8, dtype=torch.bool)
    salient[0, :2, :2] = True  # image 0: 4 pixels, a quarter of the patch of 4 x 4 and all of a patch of 2 x 2
    salient[1, 7, 7] = True
    places = torch.tensor([[[4, 4], [1, 0], [0, 0], [0, 1]], [[5, 5], [1, 1], [0, 0], [0, 1]]])
    sides = torch.tensor([[4, 4], [2, 2]])
    chosen = choose_places(salient, torch.tensor([0.75, 0.75]), places.expand(2, -1, -1, -1), sides)
    assert chosen[0].tolist() == [[0, 0], [1, 1]]  # the first that is accepted, not the best
    assert chosen[1].tolist() == [[4, 4], [5, 5]]  # none is: the best, or else the first
    chosen = choose_places(salient, torch.tensor([0.9, 0.9]), places.expand(2, -1, -1, -1), sides)
    assert chosen[0].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (1, 3, 16, 40), (2, 1, 9, 7)])
def test_a_salient_patch_is_enlarged_as_torch_does(shape):
    images = torch.rand(shape)
    salient, places, sides, angle = draw_patches(images)
    expected = [
        [F.interpolate(crop(images, places, sides, k, s), shape[2:], mode="bilinear")[0] for s in (0, 1)]
        for k in range(shape[0])
    ]
    expected = torch.stack([torch.stack(pair).mean(0) for pair in expected])
    torch.testing.assert_close(enlarge_patches(images, salient, places, sides, angle), expected)


def test_a_patch_without_saliency_is_blurred_within_itself():
    images = torch.rand(2, 3, 64, 64)
    salient, places, sides, angle = draw_patches(images, salient=False)
    rough = enlarge_patches(images, ~salient, places, sides, angle)
    smooth = enlarge_patches(images, salient, places, sides, angle)
    assert smooth.diff(dim=3).square().mean() < 0.5 * rough.diff(dim=3).square().mean()
    torch.testing.assert_close(smooth.mean((2, 3)), rough.mean((2, 3)), atol=0.02, rtol=0)
    inside = torch.zeros_like(images)
    for k in range(2):
        for s in (0, 1):
            crop(inside, places, sides, k, s).fill_(1)
    torch.testing.assert_close(enlarge_patches(images * inside, salient, places, sides, angle), smooth)
    # with one pixel per place, the blur of a patch of 32 rows is a Gaussian of 2 pixels
    dot = torch.zeros(1, 1, 64, 64)
    dot[0, 0, 16, 16] = 1
    places = torch.tensor([[[0, 0], [48, 48]]])
    profile = enlarge_patches(dot, salient[:1], places, sides, angle[:1])[0, 0].sum(1)
    rows = (torch.arange(64) + 0.5) / 2 - 0.5
    bell = (-(rows - 16).square() / 8).exp()
    torch.testing.assert_close(profile / profile.max(), bell / bell.max(), atol=1e-3, rtol=0)


def test_only_the_salient_part_of_a_patch_is_rotated():
    images = torch.rand(1, 3, 32, 32)
    salient, places, sides, angle = draw_patches(images, math.pi)
    half = salient.clone()
    half[:, :, 16:] = False
    places = torch.tensor([[[8, 8], [4, 12]]])  # the middle of both patches is at column 16
    rotated, blurred, mixed = (enlarge_patches(images, one, places, sides, angle) for one in (salient, ~salient, half))
    upright = enlarge_patches(images, salient, places, sides, 0 * angle)
    torch.testing.assert_close(rotated, upright.flip(2, 3))
    torch.testing.assert_close(mixed, torch.cat([rotated[..., :16], blurred[..., 16:]], 3))


def test_an_image_is_rotated_about_its_centre():
    image = torch.arange(35.0).view(5, 7)
    angles = torch.tensor([[0.0, math.pi / 2, math.pi]])
    still, quarter, half = image.flatten()[rotated_pixels(angles, 5, 7)[0]].view(3, 5, 7)
    assert torch.equal(still, image) and torch.equal(half, image.flip(0, 1))
    assert torch.equal(quarter[:, 1:6], torch.rot90(image[:, 1:6], -1)) or torch.equal(
        quarter[:, 1:6], torch.rot90(image[:, 1:6], 1)
    )


def test_the_share_of_the_image():
    images, patches = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(blend_patches(images, patches, torch.tensor(1.0)), images)
    mixed = blend_patches(images, patches, torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(mixed, torch.stack([patches[0], 0.25 * images[1] + 0.75 * patches[1]]))


@pytest.mark.parametrize("in_batch", [False, True])
def test_images_stay_apart_and_labels_stay_as_they_are(in_batch):
    """Two colours never mix. The share is drawn per batch or per image."""
    images = torch.tensor([0.0, 1.0]).repeat(8).view(16, 1, 1, 1).expand(16, 3, 16, 24).clone()
    images[:, :, 8, 12] += 1  # what is left of this pixel is its share, where no patch shows it
    mixer, targets = S2Mix(in_batch=in_batch), torch.eye(16)
    mixed, soft = mixer(images, targets, lambda images, _: torch.rand(images[:, 0].shape))
    assert soft is targets and mixer.partner.tolist() == [*range(16)] and mixer.weight.eq(1).all()
    torch.testing.assert_close(mixed.amin((1, 2, 3)), images.amin((1, 2, 3)))
    left = mixed[:, 0, 8, 12] - images[:, 0, 0, 0]
    assert ((left - left.min() < 1e-3).sum() < 8) == in_batch


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 24), (3, 3, 3, 5)])
def test_any_size_and_a_map_without_saliency(shape):
    images, targets = torch.rand(shape), torch.eye(5)[: shape[0]]
    mixer = S2Mix()
    for saliency in (torch.zeros(shape[0], *shape[2:]), torch.ones(shape[0], *shape[2:])):
        mixed, _ = mixer(images, targets, lambda *_, saliency=saliency: saliency)
        assert mixed.isfinite().all() and mixed.min() >= 0 and mixed.max() <= 1 and not torch.equal(mixed, images)
    assert int(mixer.replaced_maps) == shape[0]


def test_the_threshold_is_a_quantile():
    salient, _, _ = S2Mix().choose_patches(torch.rand(2000, 16, 16) ** 8)
    share = salient.float().mean((1, 2))
    assert 0 < share.min() < 0.01 and 0.49 < share.max() < 0.51 and abs(share.mean() - 0.25) < 0.01


def test_patches_come_from_where_the_saliency_is():
    saliency = torch.zeros(200, 32, 32)
    saliency[:, 20:30, 2:12] = 1
    salient, places, sides = S2Mix().choose_patches(saliency)
    assert torch.equal(salient, saliency.bool()) and places.min() >= 0 and (places + sides).max() <= 32
    spread = places.float() + sides / 2  # the centres of the patches
    assert (spread[:, 0, 0] > 16).float().mean() > 0.85 and (spread[:, 0, 1] < 16).float().mean() > 0.85
    inside = (spread - torch.tensor([25.0, 7.0])).abs().amax(2) < 9
    assert inside[:, 1].float().mean() > 0.6


@pytest.mark.parametrize("options", [{"mixup_alpha": 0}, {"mix_prob": -1}])
def test_wrong_hyper_parameters_raise_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        S2Mix(**options)
