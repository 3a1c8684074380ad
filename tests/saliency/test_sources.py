import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.data.augment import crop_and_flip
from engine.data.loader import Batch
from models import build_model
from saliency import SOURCES, build_source
from saliency.bank import Bank
from saliency.cam.sources import CAM
from saliency.gradient import Gradient, blur
from saliency.static import binomial_blur, fine_grained, float_bytes, resize_exact, spectral_residual, to_grey

SIZES = ["32", "64", "97x131", "48x40"]


def opencv_angle(spectrum: torch.Tensor) -> torch.Tensor:
    """Return OpenCV's phase: a polynomial in float32 degrees, accurate to 1.6e-4 rad."""
    x, y = spectrum.real.float(), spectrum.imag.float()
    low, high = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    c = low / high.clamp_min(1e-37)
    square = c * c
    angle = 57.29578 * c * (0.99978784 - 0.32580840 * square + 0.15557865 * square**2 - 0.04432656 * square**3)
    angle = torch.where(y.abs() > x.abs(), 90 - angle, angle)
    angle = torch.where(x < 0, 180 - angle, angle)
    return torch.deg2rad(torch.where(y < 0, 360 - angle, angle).double())


def recorded_images(golden, size):
    return torch.from_numpy(golden[f"img{size}_rgb"]).permute(0, 3, 1, 2)


def first_maxima(maps: torch.Tensor) -> np.ndarray:
    return np.stack(np.unravel_index(maps.flatten(1).argmax(1).numpy(), maps.shape[1:]), 1)


@pytest.mark.parametrize("size", SIZES)
def test_fine_grained_matches_opencv_step_by_step(size, static_golden):
    images = recorded_images(static_golden, size)
    assert np.array_equal(to_grey(images), static_golden[f"img{size}_gray"])
    assert np.array_equal(binomial_blur(binomial_blur(to_grey(images))), static_golden[f"img{size}_gray_blur2"])
    maps = fine_grained(images)
    assert np.array_equal((maps * 255).round(), static_golden[f"img{size}_fine_u8"])
    assert np.array_equal(first_maxima(maps), static_golden[f"img{size}_fine_argmax"])


@pytest.mark.parametrize("size", SIZES)
def test_spectral_residual_matches_opencv(size, static_golden):
    images, expected = recorded_images(static_golden, size), static_golden[f"img{size}_spectral"]
    assert np.array_equal(resize_exact(to_grey(images), 64), static_golden[f"img{size}_gray64"])
    assert np.abs(spectral_residual(images).numpy() - expected).max() < 2e-4
    assert np.abs(spectral_residual(images, angle=opencv_angle).numpy() - expected).max() < 5e-6


def test_static_sources_accept_grey_images(static_golden):
    images = torch.from_numpy(static_golden["img48x40_gray"]).unsqueeze(1)
    assert np.array_equal((fine_grained(images) * 255).round(), static_golden["gray_in_fine_u8"])
    assert np.abs(spectral_residual(images).numpy() - static_golden["gray_in_spectral"]).max() < 2e-4


def test_a_flat_image_has_no_fine_grained_saliency():
    assert fine_grained(torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)).eq(0).all()


def test_float_bytes_matches_opencv_on_floats(static_golden):
    maps = float_bytes(torch.from_numpy(static_golden["sm_normalised"]))
    expected = static_golden["sm_float_map_official_u8"]
    assert np.array_equal((maps * 255).round(), expected)  # recorded on a CPU with fused multiply-adds


def tiny_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )


class TinyTransformer(nn.Module):
    """Attends to patches of 4 x 4 pixels and averages them."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, tokens, tokens)[0]).mean(1))


@pytest.mark.parametrize("name", sorted(SOURCES))
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (1, 3, 20, 36)])
def test_every_source_returns_one_map_per_image(name, shape, casm_file):
    half = (0.5, 0.5, 0.5)
    model = build_model("resnet20", 5) if name == "cam" else tiny_network()
    model = TinyTransformer() if name == "attention" else model
    source = build_source(name, mean=half, std=half, model=model, num_images=9, casm=casm_file)
    images, targets = torch.randn(shape), torch.eye(5)[: shape[0]]
    kept = images.clone()
    source.start_batch(Batch(images, None, None, torch.arange(shape[0])))
    saliency = source(images, targets)
    assert saliency.shape == (shape[0], *shape[2:]) and saliency.min() >= 0 and saliency.isfinite().all()
    assert torch.equal(images, kept) and not saliency.requires_grad
    alone = source(images[-1:], targets[-1:])[0]  # a map must not depend on the rest of the batch
    torch.testing.assert_close(alone, saliency[-1])
    if source.per_image:
        torch.testing.assert_close(source(images[:1], targets[:1])[0], saliency[0])
    assert source.per_image == (name != "bank")


# ---- Class activation maps ----


@pytest.mark.parametrize("name", ["resnet20", "imagenet_resnet18", "preactresnet18", "wrn16_8", "resnext29_4_24"])
def test_cam_averages_to_the_logit_of_its_class(name):
    model = build_model(name, 4, 32).train()
    images, targets = torch.randn(3, 3, 32, 32), torch.eye(4)[[1, 3, 0]]
    source = CAM(model)
    saliency = source(images, targets)
    assert model.training, "the mode must be restored"
    logits, features = model.eval().forward_features(images)
    layer = getattr(model, model.last_layer)
    maps = torch.einsum("bchw,kc->bkhw", model.final_maps(features[-1]), layer.weight)  # for all classes
    torch.testing.assert_close(maps.mean((2, 3)) + layer.bias, logits)
    expected = F.interpolate(maps.clamp_min(0)[range(3), [1, 3, 0]][:, None], (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(saliency, expected)


def test_cam_refuses_a_network_without_an_average_before_its_linear_layer():
    with pytest.raises(ValueError, match="Sequential has no average"):
        CAM(tiny_network())


# ---- The gradient ----


def test_gradient_of_an_image_does_not_depend_on_the_batch():
    model, images, targets = (
        tiny_network().double().eval(),
        torch.randn(4, 3, 12, 12).double(),
        torch.eye(5).double()[:4],
    )
    pixels = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(pixels), targets, reduction="sum"), pixels)
    for reduction, expected in (
        ("rms", gradient.square().mean(1).sqrt()),
        ("mean_abs", gradient.abs().mean(1)),
    ):
        saliency = Gradient(model, reduction=reduction)(images, targets)
        torch.testing.assert_close(saliency, expected.float())


def test_only_training_mode_updates_the_running_statistics():
    model, images, targets = tiny_network(), torch.randn(4, 3, 12, 12), torch.eye(5)[:4]
    model[1].eval()  # a layer that the user has frozen
    state = {key: value.clone() for key, value in model.state_dict().items()}
    Gradient(model, mode="eval")(images, targets)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    Gradient(model, mode="train")(images, targets)
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])
    assert model.training and not model[1].training, "the mode of every layer must be restored"


def test_clean_weight_adds_the_weighted_clean_gradient():
    model, images, targets = tiny_network(), torch.randn(4, 3, 12, 12), torch.eye(5)[:4]
    model[5].bias.requires_grad_(False)
    Gradient(model, mode="train")(images, targets)
    assert all(p.grad is None for p in model.parameters()) and not model[5].bias.requires_grad
    Gradient(model, mode="train", clean_weight=0.3)(images, targets)
    expected = torch.autograd.grad(0.3 * F.cross_entropy(model(images), targets), model[5].weight)[0]
    torch.testing.assert_close(model[5].weight.grad, expected)


def test_blur_spreads_a_point_and_keeps_its_mass():
    point = torch.zeros(1, 9, 9)
    point[0, 4, 4] = 1
    blurred = blur(point, 1.0, 5)
    kernel = torch.tensor([0.0545, 0.2442, 0.4026, 0.2442, 0.0545])
    torch.testing.assert_close(blurred[0, 2:7, 2:7], kernel.outer(kernel), atol=1e-4, rtol=0)
    torch.testing.assert_close(blur(torch.ones(1, 6, 6), 2.0, 5), torch.ones(1, 6, 6))


def test_saliency_size_shrinks_the_pass_and_not_the_maps():
    sizes = []
    model = tiny_network()
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    saliency = Gradient(model, saliency_size=16, mode="train")(torch.randn(2, 3, 32, 32), torch.eye(5)[:2])
    assert sizes == [(16, 16)] and saliency.shape == (2, 32, 32) and model[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match="clean loss"):
        Gradient(model, saliency_size=16, clean_weight=1.0)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_gradients(precision):
    model, images, targets = tiny_network().eval(), torch.randn(4, 3, 12, 12), torch.eye(5)[:4]
    with torch.no_grad():
        model[5].weight.mul_(1e-4)  # gradients of about 1e-8, below the range of float16
    exact = Gradient(model)(images, targets).flatten(1)
    approximate = Gradient(model, precision=precision)(images, targets).flatten(1)
    assert approximate.dtype == torch.float32 and F.cosine_similarity(exact, approximate).min() > 0.98


def test_clean_gradient_uses_the_grad_scaler():
    class Scaler:
        def scale(self, loss):
            return 1024 * loss

    model, images, targets = tiny_network(), torch.randn(4, 3, 12, 12), torch.eye(5)[:4]
    plain, scaled = (Gradient(model, clean_weight=0.5, scaler=scaler) for scaler in (None, Scaler()))
    saliency = plain(images, targets)
    gradient = model[5].weight.grad.clone()
    model.zero_grad()
    torch.testing.assert_close(scaled(images, targets), 1024 * saliency)
    torch.testing.assert_close(model[5].weight.grad, 1024 * gradient)


# ---- The bank ----


def make_batch(count=4, size=8, augment=True, index=None) -> Batch:
    shift = torch.randint(-2, 3, (2, count)) if augment else None
    flip = torch.rand(count) < 0.5 if augment else None
    index = torch.arange(count) if index is None else index
    return Batch(torch.randn(count, 3, size, size), None, index, index, shift, flip)


def test_bank_undoes_crops_and_flips():
    """A bright spot of the original, learned through several crops and flips, is found through another one."""
    pixels = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    spots = torch.tensor([[4, 4], [4, 11], [11, 5], [9, 10]])
    for image, (row, column) in enumerate(spots):
        pixels[image, row, column] = 255
    bank = Bank(4, bank_size=16, bank_momentum=0.0)
    for _ in range(3):
        batch = make_batch(4, 16)
        seen = crop_and_flip(pixels, batch.loaded_index, *batch.shift, batch.flip).permute(0, 3, 1, 2).float()
        bank.start_batch(batch)
        bank.after_backward(seen, torch.ones(4, 1, 16, 16))
    for image, (row, column) in enumerate(spots):
        assert bank.maps[image].flatten().argmax() == row * 16 + column
    batch = make_batch(4, 16)
    bank.start_batch(batch)
    shown = crop_and_flip(pixels, batch.loaded_index, *batch.shift, batch.flip)[..., 0].float()
    assert torch.equal(bank(batch.images).flatten(1).argmax(1), shown.flatten(1).argmax(1))
    assert torch.equal(bank(batch.images[2:]), bank(batch.images)[2:]), "the end of a batch can be requested alone"


def test_bank_updates_only_visible_cells():
    bank, batch = Bank(2, bank_size=2, bank_momentum=0.5), make_batch(2, 8, augment=False)
    bank.start_batch(batch)
    grad, coverage = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    coverage[0, :, :4] = 1  # only the upper half of the first image is visible; its left part is salient
    grad[0, :, :4, :4], grad[0, :, :4, 4:] = 3.0, 1.0
    bank.after_backward(grad, coverage)
    torch.testing.assert_close(bank.maps[0].float(), torch.tensor([[1.25, 0.75], [1.0, 1.0]]))
    assert bank.maps[1].eq(1).all(), "maps of images that are not visible must not change"
    grad[0] = float("nan")
    bank.after_backward(grad, coverage)
    assert bank.maps.isfinite().all()


def test_bank_divides_by_the_weight_of_each_pixel():
    bank, batch = Bank(1, bank_size=2, bank_momentum=0.0), make_batch(1, 8, augment=False)
    bank.start_batch(batch)
    coverage = torch.ones(1, 1, 8, 8)
    coverage[..., 4:] = 0.5
    bank.after_backward(coverage.expand(-1, 3, -1, -1) * 2.0, coverage)
    assert bank.maps.eq(1).all()


def test_bank_undoes_random_resized_crops():
    """The crop is the upper right quarter of the file, flipped: its left half is the right edge of the file."""
    bank, batch = Bank(1, bank_size=4, bank_momentum=0.0), make_batch(1, 8, augment=False)
    batch = batch._replace(box=torch.tensor([[0.0, 0.5, 0.5, 1.0]]), flip=torch.tensor([True]))
    bank.start_batch(batch)
    grad = torch.ones(1, 3, 8, 8)
    grad[..., :4] = 3.0  # left half of the crop
    bank.after_backward(grad, torch.ones(1, 1, 8, 8))
    expected = torch.ones(4, 4)
    expected[:2, 2:] = torch.tensor([0.5, 1.5])  # mean 1 over the visible cells, as before
    torch.testing.assert_close(bank.maps[0].float(), expected)
    shown = bank(batch.images)[0]
    torch.testing.assert_close(shown[4, [0, 7]], torch.tensor([1.5, 0.625]), rtol=0, atol=0.13)
    assert shown[:, 0].min() > shown[:, 7].max()


def test_bank_sync_merges_the_maps_of_all_processes():
    """Each process calls sync(); the reduction returns the sum of what both contribute."""
    banks = [Bank(3, bank_size=2), Bank(3, bank_size=2)]
    for image, bank in enumerate(banks):
        bank.start_batch(make_batch(1, 8, augment=False)._replace(loaded_index=torch.tensor([image])))
        bank.after_backward(torch.randn(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    learned = torch.stack([banks[0].maps[0], banks[1].maps[1], torch.ones(2, 2).half()])
    contributions = [
        [bank.updated.half() for bank in banks],
        [bank.maps * bank.updated.view(-1, 1, 1) for bank in banks],
    ]
    for bank in banks:
        reduced = iter(contributions)
        bank.sync(lambda own, reduced=reduced: sum(next(reduced)))
    assert all(torch.equal(bank.maps, learned) and not bank.updated.any() for bank in banks)


def test_bank_state_and_its_error_without_a_batch():
    bank, other = Bank(3, bank_size=4), Bank(3, bank_size=4)
    with pytest.raises(ValueError, match=r"call start_images\(index\)"):
        bank(torch.randn(2, 3, 8, 8))
    bank.start_batch(make_batch(3))
    bank.after_backward(torch.randn(3, 3, 8, 8), torch.ones(3, 1, 8, 8))
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.maps, bank.maps) and not bank.maps.eq(1).all()


# ---- Building ----


def test_static_source_undoes_the_normalisation(static_golden):
    images = recorded_images(static_golden, "32")
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    normalised = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    source = build_source("fine_grained", mean=mean, std=std)
    assert torch.equal(source(normalised, None), fine_grained(images))


def test_build_source_errors_list_sources_and_missing_options():
    with pytest.raises(ValueError, match="fine_grained"):
        build_source("fine", mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="gradient needs model"):
        build_source("gradient")
