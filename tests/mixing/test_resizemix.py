import pytest
import torch
from support import load_method_recording

import mixing.resizemix
from mixing import build_mixer
from mixing.ops import blend, box_mask, scale_boxes
from mixing.resizemix import ResizeMix, resize_into

CASES = {"a": "nearest", "b": "bilinear", "c": "nearest", "d": "bilinear", "e": "bilinear"}


@pytest.mark.parametrize(("case", "mode"), CASES.items())
def test_mixes_match_the_recordings(case, mode, method_golden):
    def recorded(name):
        return torch.from_numpy(method_golden[f"resizemix_{case}_{name}"])

    images, labels = load_method_recording(method_golden, f"resizemix_{case}")
    partner, size = recorded("perm").long(), images.shape[-2:]
    side = recorded("tau") if case != "e" else (1 - (0.7 * recorded("beta_draw") + 0.1)).sqrt()
    boxes = scale_boxes(*recorded("centre").long().view(2, 1), side, *size)
    assert boxes.tolist() == [recorded("box").tolist()]
    inside = box_mask(boxes, *size)
    lam = 1 - inside.float().mean((1, 2, 3))
    mixed = torch.where(inside, resize_into(images[partner], boxes, mode), images)
    torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-6 if mode == "nearest" else 1e-5)
    torch.testing.assert_close(lam.double(), recorded("lam").view(1), rtol=0, atol=1e-7)
    soft = blend(torch.eye(10)[labels], partner, lam)
    torch.testing.assert_close(soft, recorded("soft"), rtol=0, atol=1e-6)


def test_resizing_into_a_box_by_hand():
    image = torch.arange(24.0).view(1, 1, 4, 6)
    boxes = torch.tensor([[1, 3, 0, 3]])  # 2 x 3 pixels for 4 x 6
    nearest, bilinear = (resize_into(image, boxes, mode)[0, 0, 1:3, :3].tolist() for mode in ("nearest", "bilinear"))
    assert nearest == [[0, 2, 4], [12, 14, 16]]
    assert bilinear == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]  # the means of blocks of 2 x 2 pixels
    larger = resize_into(image[..., :2, :2], torch.tensor([[0, 2, 0, 1]]), "bilinear")
    assert larger[0, 0, :, 0].tolist() == [0.5, 6.5]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_each_image_goes_to_its_own_box(mode):
    images = torch.randn(3, 2, 12, 9)
    boxes = torch.tensor([[0, 12, 0, 9], [2, 7, 8, 9], [5, 5, 0, 4]])  # the whole image; one column; an empty box
    resized = resize_into(images, boxes, mode)
    assert torch.equal(resized[0], images[0]) and resized.isfinite().all()
    for k in range(3):
        assert torch.equal(resized[k], resize_into(images[k : k + 1], boxes[k : k + 1], mode)[0])


def test_each_image_shows_its_whole_partner_in_its_box():
    torch.manual_seed(3)
    images = torch.randn(6, 3, 24, 20)
    mixer = ResizeMix(in_batch=True, resize_range=(0.3, 0.8))
    mixed, _ = mixer(images, torch.eye(6))
    for k, partner in enumerate(mixer.partner):
        pasted = mixer.weight[k, 0] == 0
        rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
        box = torch.tensor([[rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]])
        expected = torch.where(pasted, resize_into(images[partner : partner + 1], box)[0], images[k])
        assert torch.equal(mixed[k], expected)


def test_sides_follow_the_draw_and_stay_in_their_range():
    images = torch.empty(20_000, 1, 1, 1)
    draws = {alpha: ResizeMix(alpha, in_batch=True).draw_tau(images) for alpha in (0.2, 1.0)}
    for tau in draws.values():
        assert tau.min() >= 0.1 and tau.max() <= 0.8
        assert abs(tau.mean() - 0.45) < 0.02
    assert abs(draws[1.0].var() - 0.7**2 / 12) < 0.001  # uniform
    assert ResizeMix(resize_range=(0.5, 0.5)).draw_tau(images) == 0.5


def test_small_images_and_single_ones_can_be_mixed():
    for shape in ((1, 3, 5, 3), (3, 3, 1, 1)):
        images, targets = torch.randn(shape), torch.eye(4)[: shape[0]]
        for mode in ("nearest", "bilinear"):
            mixed, soft = ResizeMix(resize_mode=mode, in_batch=True)(images, targets)
            assert mixed.isfinite().all() and torch.equal(soft.sum(1), torch.ones(shape[0]))


def test_a_draw_out_of_range_is_replaced_as_in_the_recording(method_golden, monkeypatch):
    drawn, again, tau = (float(method_golden[f"resizemix_c_{name}"]) for name in ("beta_draw", "uniform_draw", "tau"))
    monkeypatch.setattr(mixing.resizemix, "draw_lam", lambda *_: torch.tensor(drawn, dtype=torch.float64))
    monkeypatch.setattr(torch, "rand_like", lambda values: values.new_tensor((again - 0.1) / 0.7))
    assert abs(float(ResizeMix().draw_tau(torch.zeros(3, 3, 32, 32))) - tau) < 1e-7


def test_images_in_which_every_box_would_be_empty_are_refused():
    message = (
        r"resize_range: at 9x7 pixels no box .* nothing would be mixed; raise its upper end, 0.2, to at least 0.29"
    )
    with pytest.raises(ValueError, match=message):
        ResizeMix(resize_range=(0.1, 0.2)).check_size(9, 7)
    mixer = ResizeMix(resize_range=(0.29, 0.29), in_batch=True)
    mixer.check_size(9, 7)
    mixer(torch.zeros(8, 1, 9, 7), torch.eye(8))
    assert mixer.weight.min() == 0


def test_half_precision_and_gradients_pass_through():
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    mixed = ResizeMix(resize_mode="bilinear")(images.bfloat16(), torch.eye(4))[0]
    assert mixed.dtype == torch.bfloat16
    images.requires_grad_()
    ResizeMix()(images, torch.eye(4))[0].sum().backward()
    torch.testing.assert_close(images.grad.sum(), torch.tensor(images.numel() * 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize_range": (0.8, 0.1)}, r"resize_range .*\(0.8, 0.1\)"),
        ({"resize_range": (0.1, 1.5)}, "resize_range"),
        ({"resize_mode": "cubic"}, "resize_mode must be nearest or bilinear, got 'cubic'"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be positive"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer("resizemix", **options)
