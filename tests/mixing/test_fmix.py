import pytest
import torch
from support import load_method_recording
from torch.utils._python_dispatch import TorchDispatchMode

import mixing.fmix
from mixing import build_mixer
from mixing.fmix import FMix, make_field, scale_frequencies, threshold_field
from mixing.ops import blend_pixels


@pytest.mark.parametrize("case", "abcdef")
def test_masks_match_the_recordings(case, method_golden):
    def recorded(name):
        return torch.from_numpy(method_golden[f"fmix_{case}_{name}"])

    def rescale(field):
        return (field - field.min()) / (field.max() - field.min())

    noise, (height, width) = recorded("noise").unsqueeze(0), recorded("field").shape
    scale = scale_frequencies(height, width, float(recorded("decay")))
    torch.testing.assert_close(scale, recorded("scale"), rtol=0, atol=1e-6 * float(recorded("scale").max()))
    for form, name in (("paper", "paper_field"), ("released", "field")):
        field = make_field(noise, scale, width, form)
        torch.testing.assert_close(rescale(field[0]), recorded(name), rtol=0, atol=1e-5)
    mask = threshold_field(field, recorded("lam"), recorded("ceil").bool(), float(recorded("max_soft")))
    torch.testing.assert_close(mask[0], recorded("mask"), rtol=0, atol=1e-6 if recorded("max_soft") else 0)
    if case in "abcd":
        images, _ = load_method_recording(method_golden, f"fmix_{case}")
        mixed = blend_pixels(images, recorded("perm").long(), mask.unsqueeze(1))
        torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=1e-6)


def test_a_mask_by_hand():
    field = torch.tensor([[[5.0, 1.0, 4.0], [0.0, 2.0, 3.0]]]).expand(4, 2, 3)
    lam = torch.tensor([0.5, 0.45, 0.45, 0.5])
    hard = threshold_field(field, lam, torch.tensor([True, True, False, False]))
    expected = [[1, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0], [1, 0, 1, 0, 0, 1]]
    assert hard.flatten(1).tolist() == expected
    soft = threshold_field(field, lam, torch.tensor([True] * 4), 0.34)  # two pixels on each side of the threshold
    third = [1, 0, 2 / 3, 0, 0, 1 / 3]  # from 1 at the second largest to 0 at the second smallest
    expected = [1, third[1], 1, 0, third[5], third[2]]
    torch.testing.assert_close(soft[0].flatten(), torch.tensor(expected))
    assert threshold_field(field, torch.tensor(0.0).double(), torch.tensor(True), 0.3).eq(0).all()
    assert threshold_field(field, torch.tensor(1.0).double(), torch.tensor(True), 0.3).eq(1).all()


class Sorts(TorchDispatchMode):
    """Count what is sorted in the block."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += "sort" in operation.name()
        return operation(*args, **kwargs or {})


def test_a_field_is_sorted_once():  # sorting takes most of the time of a mask at 224 pixels
    with Sorts() as sorts:
        threshold_field(torch.rand(2, 4, 4), torch.tensor([0.3, 0.6]), torch.tensor([True, False]), 0.2)
    assert sorts.count == 1


def test_a_higher_decay_gives_smoother_shapes():
    edges = {}
    for decay in (1.0, 3.0):
        torch.manual_seed(0)
        mixer = FMix(fmix_decay=decay, in_batch=True)
        mixer(torch.zeros(64, 1, 32, 32), torch.eye(2).repeat(32, 1))
        edges[decay] = float(mixer.weight.diff(dim=2).abs().sum() / 64)
    assert edges[3.0] < edges[1.0] / 2


def test_pixels_are_rounded_up_and_down_equally_often(monkeypatch):
    monkeypatch.setattr(mixing.fmix, "draw_lam", lambda *_: torch.full((4000,), 0.5))
    torch.manual_seed(0)
    mixer = FMix(in_batch=True)
    mixer(torch.zeros(4000, 1, 3, 3), torch.eye(2).repeat(2000, 1))
    counts = mixer.weight.sum((1, 2, 3))
    assert set(counts.tolist()) == {4.0, 5.0} and abs(counts.mean() - 4.5) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_soft": 0.6}, "max_soft must lie between 0 and 0.5, got 0.6"),
        ({"fmix_decay": -1.0}, "fmix_decay must not be negative"),
        ({"fmix_field": "meant"}, "fmix_field must be paper or released, got 'meant'"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be positive"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer("fmix", **options)


def test_images_of_one_row_need_the_field_of_the_paper():
    images, targets = torch.rand(2, 3, 1, 8), torch.eye(2)
    assert FMix()(images, targets)[0].shape == images.shape
    with pytest.raises(ValueError, match="fmix_field released needs images of at least 2 rows, got 1x8 .*: use paper"):
        FMix(fmix_field="released")(images, targets)
