import pytest
import torch
from support import load_method_recording

from mixing.ops import blend_pixels
from mixing.smoothmix import SmoothMix, smooth_weight


@pytest.mark.parametrize("case", "ab")
def test_mixes_match_the_recordings(case, method_golden):
    def recorded(name):
        return torch.from_numpy(method_golden[f"smoothmix_{case}_{name}"])

    images, _ = load_method_recording(method_golden, f"smoothmix_{case}")
    row, column = recorded("draw_second") - 0.5, recorded("draw_first") - 0.5
    weight = smooth_weight(row.view(1), column.view(1), recorded("uniform").view(1), 32, 32)
    torch.testing.assert_close(1 - weight[0], recorded("kernel"), rtol=0, atol=1e-6)
    torch.testing.assert_close(1 - weight.double().mean(), recorded("kernel_mean"), rtol=0, atol=1e-6)
    mixed = blend_pixels(images, recorded("perm").long(), weight.unsqueeze(1))
    torch.testing.assert_close(mixed, recorded("mixed"), rtol=0, atol=2e-6)


def test_a_kernel_by_hand():
    weight = smooth_weight(torch.tensor([1.0]), torch.tensor([8.0]), torch.tensor([1.0]), 4, 16)[0]
    distance = torch.tensor([0.0, 4.0, 8.0])  # sigma is half of 8, the side of the square with as many pixels
    torch.testing.assert_close(1 - weight[1, [8, 4, 0]], torch.exp(-((distance / 4) ** 2) / 2))
    torch.testing.assert_close(1 - weight[3, 8], torch.tensor(-1 / 8).exp())


def test_kernels_lie_half_a_pixel_before_the_drawn_one():
    mixer = SmoothMix(in_batch=True)
    torch.manual_seed(0)
    mixer(torch.zeros(4000, 1, 4, 6), torch.eye(2).repeat(2000, 1))
    corners = mixer.weight[:, 0, [0, 0, 3, 3], [0, 5, 0, 5]]
    nearest = corners.eq(mixer.weight.amin((1, 2, 3)).unsqueeze(1)).float().mean(0)
    # the first row is nearest if the first or the second one is drawn, the last row only if it is drawn itself
    torch.testing.assert_close(nearest, torch.tensor([4, 2, 2, 1]) / 24, rtol=0, atol=0.02)


def test_mix_prob_must_be_a_probability():
    with pytest.raises(ValueError, match="mix_prob must lie between 0 and 1, got 2"):
        SmoothMix(mix_prob=2)
