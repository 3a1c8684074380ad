import pytest
import torch
from support import load_method_recording
from torch.nn import functional as F

from mixing import SnapMix
from mixing.ops import box_mask, center_boxes, find_saliency_share
from mixing.snapmix import empty_together, normalize_maps, paste_resized, weigh_labels

CASES = ["snapmix_a", "snapmix_b", "snapmix_c", "snapmix_d"]


def box(*edges):
    return torch.tensor([edges])


@pytest.mark.parametrize("case", CASES)
def test_mix_matches_the_published_code(case, method_golden):
    """snapmix_b: 32 x 24 pixels; _c: equal labels, images paired with themselves; _d: image 0 has a constant map."""

    def recorded(name):
        return torch.from_numpy(method_golden[f"{case}_{name}"])

    images, labels = load_method_recording(method_golden, case)
    size = images.shape[-2:]
    lams, partner, boxes = recorded("beta_draw"), recorded("perm").long(), []
    for lam, name in zip(lams, ("", "_partner"), strict=True):
        row, column = recorded(f"centre{name}").long().unsqueeze(1)
        boxes.append(center_boxes(row, column, lam, *size))
        assert boxes[-1][0].tolist() == recorded(f"box{name}").tolist()
    boxes = empty_together(*boxes)
    mixed = paste_resized(images, partner, *boxes)
    torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-5)

    maps = torch.einsum("bchw,bc->bhw", recorded("features").relu(), recorded("weight")[labels])
    maps = maps + recorded("bias")[labels].view(-1, 1, 1)
    maps = F.interpolate(maps.unsqueeze(1), size, mode="bilinear").squeeze(1)
    normalized, is_flat = normalize_maps(maps)
    expected = recorded("map")
    assert is_flat.tolist() == expected.isnan().flatten(1).all(1).tolist()
    torch.testing.assert_close(
        normalized, expected.nan_to_num(), rtol=0, atol=1e-5 * float(expected.nan_to_num().max())
    )

    inside, source_inside = (box_mask(one, *size) for one in boxes)
    own, pasted = weigh_labels(maps, partner, inside, source_inside)
    equal = labels == labels[partner]
    total = own + pasted
    both = [torch.where(equal, total, one) for one in (own, pasted)]  # the code's rule; the same targets here
    torch.testing.assert_close(both[0], recorded("weight_own"), rtol=0, atol=1e-6)
    torch.testing.assert_close(both[1], recorded("weight_partner"), rtol=0, atol=1e-6)
    torch.testing.assert_close(find_saliency_share(own, pasted, torch.zeros(1)), own / total)


def test_a_resized_box_by_hand():
    """A box of 1 x 3 pixels is pasted as 3 x 5: its corners stay, and new pixels lie half way between."""
    images = torch.zeros(2, 1, 4, 6)
    images[1, 0, 2, :3] = torch.tensor([1.0, 3.0, 7.0])
    mixed = paste_resized(images, torch.tensor([1, 0]), box(0, 3, 1, 6), box(2, 3, 0, 3))
    assert mixed[0, 0, :3, 1:].tolist() == [[1.0, 2.0, 3.0, 5.0, 7.0]] * 3
    assert mixed[0, 0, 3].eq(0).all() and mixed[0, 0, :, 0].eq(0).all()
    assert mixed[1, 0, :3, 1:].eq(0).all()
    one = paste_resized(images, torch.tensor([1, 0]), box(1, 2, 1, 2), box(2, 3, 0, 3))
    assert one[0, 0, 1, 1] == 1, "a box of one pixel shows the first of the source box"
    same = paste_resized(images, torch.tensor([0, 1]), box(0, 4, 0, 6), box(0, 4, 0, 6))
    assert torch.equal(same, images)


def test_nothing_is_pasted_where_a_box_is_empty():
    boxes = torch.tensor([[0, 2, 0, 2], [0, 2, 3, 3], [1, 1, 0, 2], [0, 2, 0, 2]])
    source_boxes = torch.tensor([[1, 3, 0, 2], [1, 3, 0, 2], [1, 3, 0, 2], [3, 3, 0, 2]])
    boxes, source_boxes = empty_together(boxes, source_boxes)
    images = torch.rand(4, 3, 3, 3)
    mixed = paste_resized(images, torch.tensor([1, 2, 3, 0]), boxes, source_boxes)
    assert torch.equal(mixed[1:], images[1:]) and not torch.equal(mixed[0], images[0])
    inside, source_inside = box_mask(boxes, 3, 3), box_mask(source_boxes, 3, 3)
    own, pasted = weigh_labels(torch.rand(4, 3, 3), torch.tensor([1, 2, 3, 0]), inside, source_inside)
    share = find_saliency_share(own, pasted, torch.ones(4))
    assert share[1:].eq(1).all() and share[0] < 1


def test_label_weights_by_hand():
    """Image 0 loses a quarter of its map, and shows three quarters of that of image 1: 0.75 / 1.5."""
    maps = torch.zeros(2, 2, 4)
    maps[0, :, 0] = torch.tensor([3.0, 1.0])
    maps[1, :, 3] = torch.tensor([3.0, 1.0])
    inside, source_inside = (box_mask(one, 2, 4) for one in (box(1, 2, 0, 2), box(0, 1, 2, 4)))
    own, pasted = weigh_labels(maps, torch.tensor([1, 0]), inside, source_inside)
    assert own.tolist() == [0.75, 1.0] and pasted.tolist() == [0.75, 0.0]
    assert find_saliency_share(own, pasted, torch.zeros(1)).tolist() == [0.5, 1.0]
    nothing = find_saliency_share(torch.zeros(2), torch.zeros(2), torch.tensor([0.75]))
    assert nothing.tolist() == [0.75, 0.75], "where neither shows anything, the area counts"


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 16, 12), (1, 3, 8, 8)])
def test_without_saliency_targets_follow_the_area(in_batch, shape):
    """One colour an image: pixels of the partner have its colour, whichever box they come from."""
    count = shape[0]
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(shape)
    mixer, areas = SnapMix(in_batch=in_batch), set()
    for seed in range(8):
        torch.manual_seed(seed)
        mixed, soft = mixer(images, torch.eye(count), lambda images, _: torch.zeros(images[:, 0].shape))
        torch.testing.assert_close(soft @ torch.arange(float(count)), mixed.mean((1, 2, 3)))
        areas.add(len(mixer.weight.mean((1, 2, 3)).unique()))
    assert (max(areas) > 1) == (in_batch and count > 1)


def test_targets_follow_the_saliency():
    """Each image shows its object in the left column alone, so a label weighs as much as a box holds of that column."""
    images, targets = torch.rand(6, 3, 8, 8), torch.eye(6)
    saliency = torch.zeros(6, 8, 8)
    saliency[..., 0] = 1
    mixer, kept = SnapMix(), 0
    for seed in range(20):
        torch.manual_seed(seed)
        _, soft = mixer(images, targets, lambda *_: saliency)
        if mixer.weight[..., 0].eq(1).all():
            own = soft[range(6), range(6)][mixer.partner != torch.arange(6)]
            assert own.ge(0.5).all(), "an image that keeps its whole object weighs at least as much as its partner"
            kept += 1
    assert kept > 3


def test_targets_keep_their_dtype():
    images = torch.rand(4, 3, 8, 8).half()
    mixed, soft = SnapMix()(images, torch.eye(4).half(), lambda images, _: images.mean(1))
    assert mixed.dtype == soft.dtype == torch.float16


def test_errors():
    with pytest.raises(ValueError, match="mixup_alpha must be positive"):
        SnapMix(mixup_alpha=0.0)
