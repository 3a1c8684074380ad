import pytest
import torch
from support import load_method_recording

from mixing import build_mixer
from mixing.hmix import HMix, gmix_weight, hmix_weight
from mixing.ops import blend, blend_pixels, scale_boxes


@pytest.mark.parametrize("case", ["hmix_a", "hmix_b", "hmix_c", "gmix_a", "gmix_b"])
def test_mixes_match_the_recordings(case, method_golden):
    def recorded(name):
        return torch.from_numpy(method_golden[f"{case}_{name}"])

    images, labels = load_method_recording(method_golden, case)
    centre, lam, size = recorded("centre").long().view(2, 1), recorded("lam_draw"), images.shape[-2:]
    if case.startswith("hmix"):
        boxes = scale_boxes(*centre, ((1 - lam) * recorded("ratio")).sqrt(), *size)
        assert boxes.tolist() == [recorded("box").tolist()]
        weight = hmix_weight(lam, boxes, *size)
        torch.testing.assert_close(weight.max().double(), recorded("outside_weight"), rtol=0, atol=1e-6)
        kept = lam
    else:
        weight = gmix_weight(lam, *centre, *size)
        kernel = weight[0] if lam < 0.5 else 1 - weight[0]
        torch.testing.assert_close(kernel, recorded("kernel"), rtol=0, atol=1e-6)
        assert abs(float(kernel.mean()) - float(recorded("kernel_mean"))) < 1e-6
        kept = weight.mean((1, 2))
    assert abs(float(kept) - float(recorded("lam"))) < 1e-6 and abs(float(weight.mean()) - float(kept)) < 1e-6
    partner = torch.arange(len(images)).flip(0)
    mixed = blend_pixels(images, partner, weight.unsqueeze(1))
    torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-6)
    smoothed = torch.lerp(torch.eye(10)[labels], torch.full((), 0.1), recorded("smoothing").float())
    torch.testing.assert_close(blend(smoothed, partner, kept), recorded("soft"), rtol=0, atol=1e-6)


def test_weights_by_hand():
    boxes = torch.tensor([[0, 2, 0, 2], [0, 4, 0, 4], [1, 1, 0, 0]])
    weight = hmix_weight(torch.tensor([0.6, 0.0, 0.3]), boxes, 4, 4)
    assert weight[0, :2, :2].eq(0).all()
    torch.testing.assert_close(weight[0, 2:], torch.full((2, 4), 0.8))  # 12 of 16 pixels share 0.6
    assert weight[1].eq(0).all(), "a box over the whole image"
    torch.testing.assert_close(weight[2], torch.full((4, 4), 0.3))
    rows, columns = torch.tensor([1, 1]), torch.tensor([2, 2])
    weight = gmix_weight(torch.tensor([0.25, 0.75]), rows, columns, 4, 8)  # e^-pi after sqrt(8) pixels
    torch.testing.assert_close(weight[0, [1, 3, 3], [2, 2, 4]], torch.exp(-torch.pi * torch.tensor([0, 0.5, 1])))
    torch.testing.assert_close(weight[1], 1 - weight[0])


def test_the_ratio_leads_from_mixup_to_cutmix():
    images, targets = torch.zeros(64, 1, 32, 32), torch.eye(64)
    pasted = {}
    for ratio in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        mixer = HMix(hmix_ratio=ratio, in_batch=True)
        _, soft = mixer(images, targets)
        mixed = mixer.partner != torch.arange(64)
        share = 1 - soft.diag()[mixed]
        pasted[ratio] = mixer.weight.eq(0).float().mean((1, 2, 3))[mixed]
        assert (pasted[ratio] <= ratio * share + 1e-6).all() and mixer.weight.max() <= 1
    assert pasted[0.0].eq(0).all() and pasted[0.5].mean() < pasted[1.0].mean() and pasted[1.0].max() > 0.5


def test_a_lam_of_zero_or_one_is_mixed():
    weight = gmix_weight(torch.tensor([0.0, 1.0]), torch.tensor([2, 2]), torch.tensor([1, 1]), 4, 4)
    spot = torch.zeros(4, 4).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(1.0))
    assert torch.equal(weight, torch.stack([spot, 1 - spot]))
    images, targets = torch.randn(6, 3, 8, 8), torch.eye(6)
    for name in ("hmix", "gmix"):
        for _ in range(20):
            mixed, soft = build_mixer(name, mixup_alpha=1e-4, hmix_ratio=1.0, in_batch=True)(images, targets)
            assert mixed.isfinite().all() and soft.isfinite().all()
            torch.testing.assert_close(soft.sum(1), torch.ones(6))


@pytest.mark.parametrize("name", ["hmix", "gmix"])
def test_values_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match="mixup_alpha must be positive, got 0"):
        build_mixer(name, mixup_alpha=0.0)
    with pytest.raises(ValueError, match="hmix_ratio must lie between 0 and 1, got 2"):
        build_mixer("hmix", hmix_ratio=2.0)
