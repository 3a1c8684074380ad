import argparse
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from engine.config.option_types import pixel_fraction
from engine.data.datasets import load_evaluation
from engine.errors import UserError
from engine.inference.classifier import load_classifier
from evaluation.attacks import Attack, build_attacks, compute_pixel_gradient, cross_entropy, fgsm, pgd


def make_convnet(classes: int = 3) -> nn.Module:
    """Return a network with trainable weights, and batch norm whose statistics would change in training mode."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, classes)).eval()


def make_linear(size: tuple[int, int]) -> tuple[nn.Module, torch.Tensor]:
    """Return a network of two classes, and the sign of its gradient for each label, (2, 3, H, W), a constant."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], 2))
    weights = network[1].weight.detach()
    return network, (weights.flip(0) - weights).sign().view(2, 3, *size)


@pytest.fixture(scope="module")
def trained():
    """A small network and images that it classifies: four patterns in noise, half of them with inverted sign."""
    torch.manual_seed(0)
    patterns, labels = 0.1 * torch.randn(4, 3, 8, 8), torch.arange(200) % 4
    signs = torch.randint(0, 2, (200, 1, 1, 1)) * 2 - 1
    pixels = (0.5 + signs * patterns[labels] + 0.1 * torch.randn(200, 3, 8, 8)).clamp(0, 1)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 4)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(network.parameters(), 0.005)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(pixels), labels).backward()
        optimizer.step()
    return network.requires_grad_(False).eval(), pixels, labels


@torch.no_grad()
def compute_accuracy(model, pixels, labels) -> float:
    return (model(pixels).argmax(1) == labels).float().mean().item()


# ---- Attacks ----


@pytest.mark.parametrize("case", range(20))
def test_pixels_stay_in_the_eps_ball_and_in_range(case):
    draw = torch.Generator().manual_seed(case)
    height, width, batch, steps = (int(torch.randint(1, 8, (), generator=draw)) for _ in range(4))
    eps, step_size = (float(torch.rand((), generator=draw)) ** 2 for _ in range(2))
    pixels = torch.rand(batch, 3, height, width, generator=draw).mul(1.4).sub(0.2).clamp(0, 1)  # many exactly 0 or 1
    labels = torch.randint(0, 3, (batch,), generator=draw)
    start = (2 * torch.rand(pixels.shape, generator=draw) - 1).mul(3).clamp(-1, 1)
    network, before = make_convnet(), pixels.clone()
    attacked = [fgsm(network, pixels, labels, eps), pgd(network, pixels, labels, eps, steps, step_size, start)]
    attacked.append(pgd(network, pixels, labels, eps, steps, 2 * eps))
    for one in attacked:
        assert one.shape == pixels.shape and one.dtype == torch.float32 and not one.requires_grad
        assert (one - pixels).abs().max() <= eps + 1e-6 and one.min() >= 0 and one.max() <= 1
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("attack", [Attack("fgsm", 0.0), Attack("pgd", 0.0, 3, 0.0), Attack("pgd", 0.0, 2, 0.1)])
def test_eps_0_gives_the_clean_pixels(attack):
    pixels, labels = torch.rand(5, 3, 6, 4), torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(attack.make_transform(make_convnet(), seed=3)(pixels, labels, torch.arange(5)), pixels)


def test_fgsm_steps_along_the_gradient_sign():
    network, signs = make_linear((2, 3))
    pixels, labels = torch.rand(6, 3, 2, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = (pixels + 0.1 * signs[labels]).clamp(0, 1)
    assert torch.equal(fgsm(network, pixels, labels, 0.1), expected)
    assert (expected == 1).any() and (expected == 0).any(), "the case covers clipping"


def test_pgd_by_hand():
    network, signs = make_linear((2, 3))
    pixels, labels = torch.full((2, 3, 2, 3), 0.5), torch.tensor([0, 1])
    up = signs[labels]

    def perturb(*args) -> torch.Tensor:
        return (pgd(network, pixels, labels, 0.1, *args) - pixels) * up

    def assert_all_equal(found: torch.Tensor, value: float) -> None:
        torch.testing.assert_close(found, torch.full_like(found, value))

    assert_all_equal(perturb(2, 0.04), 0.08)
    assert_all_equal(perturb(3, 0.04), 0.1)
    assert_all_equal(perturb(1, 0.03, -up), -0.07)  # from the opposite side of the ball
    assert_all_equal(perturb(4, 0.03, -up / 2), 0.07)


def test_pgd_is_at_least_as_strong_as_fgsm(trained):
    network, pixels, labels = trained
    eps, index = 0.04, torch.arange(len(labels))
    clean, once = (
        compute_accuracy(network, pixels, labels),
        compute_accuracy(network, fgsm(network, pixels, labels, eps), labels),
    )
    found = []
    for steps in (1, 5, 20):
        transform = Attack("pgd", eps, steps, eps / 4).make_transform(network, seed=0)
        found.append(compute_accuracy(network, transform(pixels, labels, index), labels))
    assert clean > 0.98 and 0.05 < once < 0.9, "the attack changes some predictions, but not all"
    assert found[0] > found[1] > found[2] and found[2] < once


def test_the_random_start_depends_only_on_the_image_and_the_seed():
    network, _ = make_linear((4, 5))
    pixels, labels = torch.rand(7, 3, 4, 5), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    index = torch.tensor([5, 0, 12, 3, 900, 2, 7])
    transform = Attack("pgd", 0.2, 2, 0.01).make_transform(network, seed=1)
    whole = transform(pixels, labels, index)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    parts = [transform(pixels[one], labels[one], index[one]) for one in order.split(3)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert not torch.equal(Attack("pgd", 0.2, 2, 0.01).make_transform(network, seed=2)(pixels, labels, index), whole)
    transform = Attack("pgd", 0.2, 1, 0.0).make_transform(make_linear((40, 50))[0], seed=1)
    start = transform(torch.full((2, 3, 40, 50), 0.5), labels[:2], index[:2])
    assert start.min() < 0.31 and start.max() > 0.69 and not torch.equal(start[0], start[1]), "starts cover the ball"


# ---- Gradient ----


def test_the_gradient_is_that_of_the_summed_cross_entropy():
    network, pixels, labels = make_convnet().double(), torch.rand(4, 3, 5, 7).double(), torch.tensor([0, 2, 1, 1])
    inputs = pixels.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(network(inputs), labels, reduction="sum"), inputs)
    logits = network(pixels).detach()
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none"))
    found = compute_pixel_gradient(network.float(), pixels.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_gradients_of_confident_predictions_are_exact(margin):
    """If 1 - p underflows in float32, the usual cross-entropy loses the true class, and signs are wrong."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3)).requires_grad_(False)
    network[1].bias[0] = margin
    pixels, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    inputs = pixels.double().requires_grad_()
    usual = F.cross_entropy(network.double()(inputs), labels, reduction="sum")
    (expected,) = torch.autograd.grad(usual, inputs)
    found = compute_pixel_gradient(network.float(), pixels, labels)
    if margin < 30:  # a larger margin underflows in float64 too
        assert torch.equal(found.sign(), expected.float().sign())
    weights = network[1].weight
    share = (pixels.flatten(1) @ weights[1:].T + network[1].bias[1:]).softmax(1)
    assert torch.equal(found.sign().flatten(1), (share @ weights[1:] - weights[0]).sign())


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_network_is_unchanged_in_every_autograd_mode(mode, frozen):
    network = make_convnet().requires_grad_(not frozen)
    network[1].train()  # a layer in another mode than the network
    network[1].momentum = 0.0
    pixels, labels = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    expected = compute_pixel_gradient(network, pixels, labels)
    with mode():
        gradient = compute_pixel_gradient(network, pixels.clone(), labels.clone())  # cloned here: inference tensors
        transform = Attack("pgd", 0.1, 2, 0.05).make_transform(network, seed=0)
        attacked = transform(pixels.clone(), labels.clone(), torch.arange(4))
    torch.testing.assert_close(gradient, expected)
    assert not gradient.requires_grad and not attacked.requires_grad and not torch.equal(attacked, pixels)
    assert all(one.grad is None and one.requires_grad == (not frozen) for one in network.parameters())
    assert network[1].training and not network[0].training and not network.training


def test_a_compiled_classifier_has_the_same_gradient():
    network = make_convnet().requires_grad_(False)
    pixels, labels = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    expected = compute_pixel_gradient(network, pixels, labels)
    compiled = torch.compile(network, backend="aot_eager")
    with torch.no_grad():
        compiled(pixels)
        torch.testing.assert_close(compute_pixel_gradient(compiled, pixels, labels), expected)


# ---- Options ----


def test_default_attacks():
    fast = [Attack("fgsm", 4 / 255), Attack("fgsm", 8 / 255)]
    assert build_attacks(["fgsm", "pgd"]) == [*fast, Attack("pgd", 4 / 255, 20, 2 / 255)]
    assert build_attacks(["fgsm"]) == fast and build_attacks([]) == []


def test_eps_is_for_both_attacks_and_each_number_of_steps_is_an_attack():
    found = build_attacks(["pgd", "fgsm", "pgd"], [1 / 255, 0.03, 1 / 255], [5, 20])
    titles = ["PGD 1/255, 5 steps", "PGD 1/255, 20 steps", "PGD 0.03, 5 steps", "PGD 0.03, 20 steps"]
    assert [one.title for one in found] == [*titles, "FGSM 1/255", "FGSM 0.03"]
    assert [one.step_size for one in found] == [1 / 255, 1 / 255, 2 / 255, 2 / 255, None, None]
    assert build_attacks(["pgd"], [1 / 255], [1], 0.5) == [Attack("pgd", 1 / 255, 1, 0.5)]
    assert build_attacks(["pgd"], [0.0]) == [Attack("pgd", 0.0, 20, 0.0)]


@pytest.mark.parametrize(
    "eps, text", [(8 / 255, "8/255"), (0.03, "0.03"), (0.0, "0"), (1.0, "1"), (0.5 / 255, "0.00196078")]
)
def test_titles_show_eps_as_a_fraction_of_255(eps, text):
    assert Attack("fgsm", eps).title == f"FGSM {text}"
    assert Attack("pgd", eps, 1, 0.1).title == f"PGD {text}, 1 step"


@pytest.mark.parametrize(
    "text, value", [("8/255", 8 / 255), ("0.03", 0.03), ("0", 0), ("1", 1), (" 2 / 255 ", 2 / 255), ("3e-2", 0.03)]
)
def test_pixel_fractions_are_parsed(text, value):
    assert pixel_fraction(text) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("8", r"expected a value between 0 and 1, got '8'; write 8/255$"),
        ("256", r"got '256'$"),
        ("300/255", r"got '300/255'$"),
        ("-1/255", r"got '-1/255'$"),
        ("nan", r"got 'nan'$"),
        ("inf", r"got 'inf'$"),
        ("1/0", "a fraction such as 8/255, got '1/0'$"),
        ("8/", "a number or a fraction"),
        ("1/2/3", "a number or a fraction"),
        ("eight", "a number or a fraction"),
    ],
)
def test_invalid_pixel_fractions_are_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message) as caught:
        pixel_fraction(text)
    assert "\n" not in str(caught.value)


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match="fgsm or pgd, got 'cw'"):
        build_attacks(["cw"])
    with pytest.raises(ValueError, match="got 1.5"):
        Attack("fgsm", 1.5)
    for steps, size in [(0, 0.1), (1, None), (1, -0.1), (1, float("nan"))]:
        with pytest.raises(ValueError, match=f"got {steps} and {size}"):
            Attack("pgd", 0.1, steps, size)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        pgd(make_convnet(), torch.rand(1, 3, 4, 4), torch.zeros(1, dtype=torch.long), 0.1, 0, 0.1)
    with pytest.raises(UserError, match="--step_size 0: .*more than 0"):
        build_attacks(["pgd"], step_size=0.0)


@pytest.mark.gpu
def test_attacks_never_synchronise_with_the_host():
    network = make_convnet().cuda().requires_grad_(False)
    pixels, labels, index = torch.rand(8, 3, 16, 20), torch.arange(8) % 3, torch.arange(8)
    inputs, labels_there = pixels.cuda(), labels.cuda()
    transforms = [attack.make_transform(network, seed=0) for attack in build_attacks(["fgsm", "pgd"], [0.1], [1, 5])]
    for transform in transforms:  # warm-up: CUDA initialises on first use
        transform(inputs, labels_there, index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [transform(inputs, labels_there, index) for transform in transforms]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    network.cpu()
    for one, transform in zip(found, transforms, strict=True):
        same = (one.cpu() - transform(pixels, labels, index)).abs() < 1e-6
        assert same.float().mean() > 0.95, "equal except where the gradient is almost 0"


def test_large_images_are_attacked_in_chunks():
    """The graph of a whole batch would keep every activation of every image; the result is the same."""
    counts, weight = [], torch.randn(3, 10)

    def model(pixels):
        counts.append(len(pixels))
        return pixels.mean((2, 3)) @ weight

    pixels, labels, index = torch.rand(3, 3, 1024, 1024), torch.arange(3), torch.arange(3)
    (attack,) = build_attacks(["pgd"], [0.1], [2])
    transform = attack.make_transform(model, 0)
    found = transform(pixels, labels, index)
    assert counts == [2, 2, 1, 1]
    torch.testing.assert_close(
        torch.cat([transform(pixels[n : n + 1], labels[n : n + 1], index[n : n + 1]) for n in range(3)]), found
    )


@pytest.mark.data
def test_the_usual_cross_entropy_makes_the_attack_weaker(real_data):
    """docs/methods.md: what float32 costs FGSM at 4/255, on the first 500 test images of CIFAR-10."""
    image_set = load_evaluation("cifar10", data_dir=str(real_data), limit=500)
    file = load_classifier(str(real_data / "weights" / "resnet20_cifar10.pt"), models)
    file.network.requires_grad_(False)
    pixels = (image_set.pixels.permute(0, 3, 1, 2).float() / 255).requires_grad_()
    logits = file(pixels)
    (usual,) = torch.autograd.grad(F.cross_entropy(logits, image_set.labels, reduction="sum"), pixels)
    exact = compute_pixel_gradient(file, pixels, image_set.labels)
    saturated = logits.softmax(1).gather(1, image_set.labels.unsqueeze(1)).eq(1).float().mean()
    adversarial = [(pixels.detach() + 4 / 255 * gradient.sign()).clamp(0, 1) for gradient in (exact, usual)]
    accuracies = [100 * compute_accuracy(file, one, image_set.labels) for one in adversarial]
    assert 100 * float(saturated) == pytest.approx(30, abs=1) and accuracies == pytest.approx([11.2, 17.6], abs=1)
    assert torch.equal(adversarial[0], fgsm(file, pixels.detach(), image_set.labels, 4 / 255))
