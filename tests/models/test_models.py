"""Tests of the networks: keys, shapes, outputs, matching by shape, pretrained weights."""

import zlib

import numpy as np
import pytest
import torch
import torchvision

from models import (
    IMAGENET_ALIASES,
    IMAGENET_MODELS,
    MODELS,
    build_model,
    count_classes,
    count_parameters,
    find_matching_models,
    get_stem_stride,
)
from models.imagenet_resnet import PRETRAINED, load_pretrained, zero_init

RECORDED = ["preactresnet18", "wrn16_8", "wrn28_10", "resnext29_4_24"]


def make_recorded_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights behind the recorded logits: each tensor is drawn by a legacy generator seeded with its key."""
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape))
        if key.endswith("running_var"):
            z = np.exp(0.2 * z)
        elif key.endswith(("running_mean", "bias")):
            z = 0.1 * z
        elif key.replace("weight", "running_var") in state:
            z = 1 + 0.1 * z
        else:
            z = z * np.sqrt(2 / np.prod(value.shape[1:]))
        state[key] = torch.tensor(z.astype(np.float32))
    return state


def compute_logits(name: str, classes: int, image_size: int, images: np.ndarray) -> torch.Tensor:
    model = build_model(name, classes, image_size).eval()
    model.load_state_dict(make_recorded_weights(model))
    with torch.no_grad():
        return model(torch.from_numpy(images))


@pytest.mark.parametrize("name", RECORDED)
def test_keys_shapes_and_logits_equal_those_of_the_published_code(name, network_golden):
    with torch.device("meta"):
        state = build_model(name, 100).state_dict()
    assert list(state) == list(network_golden[f"model_{name}_keys"])
    assert [",".join(map(str, v.shape)) for v in state.values()] == list(network_golden[f"model_{name}_shapes"])
    expected = torch.from_numpy(network_golden[f"model_{name}_logits"])
    logits = compute_logits(name, 100, 32, network_golden["model_x"])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_stem_has_stride_two_at_64_pixels(network_golden):
    expected = torch.from_numpy(network_golden["model_preactresnet18_stride2_logits"])
    logits = compute_logits("preactresnet18", 200, 64, network_golden["model_x64"])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (get_stem_stride(32), get_stem_stride(64)) == (1, 2)


PARAMETERS = {  # with 100 classes; resnet20 to 110 with 10, Table 6 of arXiv 1512.03385
    "preactresnet18": 11_217_316,
    "wrn16_8": 11_012_036,
    "wrn28_10": 36_546_980,
    "wrn28_8": 23_409_092,
    "resnext29_4_24": 4_937_252,
}


def test_parameter_counts_match_the_papers():
    counts = count_parameters(MODELS, 100)
    assert counts.keys() == MODELS.keys()
    assert {name: counts[name] for name in PARAMETERS} == PARAMETERS
    narrow = count_parameters(["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"])
    millions = {name: round(count / 1e6, 2) for name, count in narrow.items()}
    assert millions == {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.73}
    assert counts["resnet18"] < counts["resnet34"] < counts["resnet50"] < counts["resnet101"] < counts["resnet152"]


TWINS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)} | {"resnext50": "resnext50_32x4d"}


@pytest.mark.parametrize("name", TWINS)
def test_resnets_have_torchvision_parameter_names(name):
    with torch.device("meta"):
        ours = build_model(name, 1000).state_dict()
        theirs = getattr(torchvision.models, TWINS[name])().state_dict()
    assert list(ours) == list(theirs)
    different = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert different == ["conv1.weight"] and ours["conv1.weight"].shape == (64, 3, 3, 3)


ANY_SIZE_MODELS = [
    "resnet18",
    "resnet50",
    "preactresnet50",
    "resnet20",
    "wrn16_8",
    "resnext29_4_24",
    "resnext50",
    "imagenet_resnet18",
]


def test_resnext50_computes_what_torchvision_does_behind_the_stem():
    ours, theirs = build_model("resnext50", 7).eval(), torchvision.models.resnext50_32x4d(num_classes=7).eval()
    theirs.conv1, theirs.maxpool = ours.conv1, torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", ANY_SIZE_MODELS)
@pytest.mark.parametrize("size", [32, 64])
def test_networks_accept_any_image_size_and_their_stages_exist(name, size):
    model = build_model(name, 7, size).eval()
    for stage in model.stages:
        model.get_submodule(stage)
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 7)


def test_narrow_resnet_pads_the_shortcut_with_zeros_on_both_sides():
    block = build_model("resnet20", 10).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut remains
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and out[:, :8].eq(0).all() and out[:, 24:].eq(0).all()


def test_network_is_found_by_its_shapes_for_any_number_of_classes():
    with torch.device("meta"):
        state = build_model("preactresnet34", 37).state_dict()
    assert find_matching_models(state) == ["preactresnet34"]
    assert find_matching_models({k: v for k, v in state.items() if "num_batches" not in k}) == ["preactresnet34"]
    assert find_matching_models(dict(sorted(state.items()))) == ["preactresnet34"], (
        "the order of the keys does not matter"
    )
    assert find_matching_models({"weight": torch.zeros(3)}) == []
    with pytest.raises(ValueError, match="resnet20"):
        build_model("resnet21", 10)


def build_torchvision(name: str, num_classes: int = 1000) -> torch.nn.Module:
    return getattr(torchvision.models, name.removeprefix("imagenet_"))(weights=None, num_classes=num_classes)


@pytest.mark.parametrize("name", IMAGENET_MODELS)
def test_imagenet_resnets_have_the_keys_and_shapes_of_torchvision(name):
    with torch.device("meta"):
        ours, other = build_model(name, 1000, 224).state_dict(), build_torchvision(name).state_dict()
    assert list(ours) == list(other)
    assert [value.shape for value in ours.values()] == [value.shape for value in other.values()]


@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_resnet50"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 75, 50)])
def test_imagenet_resnets_have_the_initialisation_and_outputs_of_torchvision(name, shape):
    torch.manual_seed(3)
    other = build_torchvision(name, 7)
    torch.manual_seed(3)
    ours = build_model(name, 7, 224)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), other.state_dict().values(), strict=True))
    images = torch.randn(shape)
    for training in (True, False):  # the second uses running statistics that the first has updated
        with torch.no_grad():
            expected = other.train(training)(images)
            assert (ours.train(training)(images) - expected).abs().max() <= 1e-6 * expected.abs().max().clamp_min(1)


def test_imagenet_resnets_have_the_published_parameter_counts():
    counts = count_parameters(MODELS, 1000)
    published = [11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808]
    assert [counts[name] for name in IMAGENET_MODELS] == published


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50", "imagenet_resnet18", "imagenet_resnet50"])
def test_zero_init_makes_every_block_the_identity(name):
    model = build_model(name, 1000).eval()
    zero_init(model)
    x = torch.rand(1, *[model.fc.in_features, 2, 2])  # block outputs are non-negative
    with torch.no_grad():
        assert torch.equal(model.layer4[1](x), x)
    scales = [module.weight for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    zeros = [scale.eq(0).all() for scale in scales]
    assert sum(zeros) == sum(len(getattr(model, stage)) for stage in model.stages)
    assert all(zero or scale.eq(1).all() for zero, scale in zip(zeros, scales, strict=True))
    assert model.fc.bias.eq(0).all() and abs(model.fc.weight.std().item() - 0.01) < 1e-4


@pytest.mark.parametrize("name", ["resnet20", "preactresnet18", "wrn16_8", "resnext29_4_24"])
def test_zero_init_rejects_networks_with_other_blocks(name):
    with torch.device("meta"):
        model = build_model(name, 10)
    with pytest.raises(ValueError, match="use one of resnet18, .*imagenet_resnet152"):
        zero_init(model)


@pytest.mark.parametrize("size", [129, 224])
def test_networks_for_small_images_reject_large_ones_and_name_a_replacement(size):
    for name, remedy in (("resnet50", "use imagenet_resnet50"), ("wrn16_8", "use one of imagenet_resnet18, ")):
        with pytest.raises(ValueError, match=f"{name} is for .* at most 128 .* at {size} .*{remedy}"):
            build_model(name, 10, size)
    with torch.device("meta"):
        build_model("resnet50", 10, 128)
        build_model("imagenet_resnet50", 10, size)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_matches_only_itself(name):
    with torch.device("meta"):
        state = build_model(name, 12).state_dict()
    assert (
        find_matching_models(state) == find_matching_models(state, like=name) == [name] and count_classes(state) == 12
    )


def test_name_selects_the_variant_that_matches_the_weights():
    with torch.device("meta"):
        small, large = build_model("resnet50", 10).state_dict(), build_torchvision("resnet50").state_dict()
    assert find_matching_models(small, like="resnet50") == ["resnet50"]
    assert IMAGENET_ALIASES["resnet50"] == "imagenet_resnet50" and "preactresnet50" not in IMAGENET_ALIASES
    assert find_matching_models(large, like="resnet50") == ["imagenet_resnet50"]
    assert find_matching_models(large, like="resnet34") == find_matching_models(small, like="imagenet_resnet50") == []
    assert find_matching_models(large, like="wideresnet") == find_matching_models(large, like="densenet121") == []
    assert find_matching_models({**small, "fc.bias": small["fc.bias"][:3]}) == [], "a last layer that fits no classes"


@pytest.mark.parametrize("name", ["densenet121", "vgg11", "mobilenet_v3_small", "vit_b_16", "resnext50_32x4d"])
def test_weights_of_other_networks_match_none(name):
    with torch.device("meta"):
        state = build_torchvision(name).state_dict()
    assert find_matching_models(state) == [] and count_classes(state) in (0, 1000)
    assert count_classes({"fc.bias": None}) == count_classes({"linear.bias": 3}) == 0


def test_pretrained_weights_are_imagenet1k_v1():
    assert list(PRETRAINED) == IMAGENET_MODELS
    for name, url in PRETRAINED.items():
        weights = torchvision.models.get_model_weights(name.removeprefix("imagenet_"))
        assert url == weights.IMAGENET1K_V1.url


@pytest.mark.parametrize("classes", [1000, 5])
def test_pretrained_weights_load_and_a_different_number_of_classes_keeps_the_last_layer(hub_cache, classes):
    weights = {key: torch.full_like(value, 2) for key, value in build_torchvision("resnet18").state_dict().items()}
    torch.save(
        {key: value for key, value in weights.items() if "num_batches" not in key},  # as in old files
        hub_cache / "resnet18-f37072fd.pth",
    )
    model = build_model("imagenet_resnet18", classes)
    head = model.fc.weight.clone()
    assert load_pretrained(model, "resnet18") is (classes != 1000)
    assert model.layer4[1].bn2.running_var.eq(2).all() and model.conv1.weight.eq(2).all()
    assert torch.equal(model.fc.weight, head if classes != 1000 else torch.full_like(head, 2))


def test_unavailable_pretrained_weights_are_explained(hub_cache):
    with torch.device("meta"):
        model, small = build_model("imagenet_resnet50", 10), build_model("resnet50", 10)
    with pytest.raises(ValueError, match="no route to host") as caught:
        load_pretrained(model, "imagenet_resnet50")
    assert f"put the file resnet50-0676ba61.pth into {hub_cache}" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    (hub_cache / "resnet50-0676ba61.pth").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="resnet50-0676ba61.pth is damaged .*\ndelete it"):
        load_pretrained(model, "imagenet_resnet50")
    for network, name in ((small, "resnet50"), (model, "wrn16_8")):
        with pytest.raises(ValueError, match="no ImageNet weights for .* imagenet_resnet18, "):
            load_pretrained(network, name)
