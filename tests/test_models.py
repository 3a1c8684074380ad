import zlib

import numpy as np
import pytest
import torch

from models import MODELS, build_model, matching_models, parameter_counts, stem_stride

RECORDED = ["preactresnet18", "wrn16_8", "wrn28_10", "resnext29_4_24"]


def drawn_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The deterministic weights of the recorded logits: each tensor from a legacy generator seeded by its key."""
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


def logits_of(name: str, classes: int, image_size: int, images: np.ndarray) -> torch.Tensor:
    model = build_model(name, classes, image_size).eval()
    model.load_state_dict(drawn_weights(model))
    with torch.no_grad():
        return model(torch.from_numpy(images))


@pytest.mark.parametrize("name", RECORDED)
def test_keys_shapes_and_logits_are_those_of_the_published_code(name, network_golden):
    with torch.device("meta"):
        state = build_model(name, 100).state_dict()
    assert list(state) == list(network_golden[f"model_{name}_keys"])
    assert [",".join(map(str, v.shape)) for v in state.values()] == list(network_golden[f"model_{name}_shapes"])
    expected = torch.from_numpy(network_golden[f"model_{name}_logits"])
    logits = logits_of(name, 100, 32, network_golden["model_x"])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_stem_has_stride_two_at_64_pixels(network_golden):
    expected = torch.from_numpy(network_golden["model_preactresnet18_stride2_logits"])
    logits = logits_of("preactresnet18", 200, 64, network_golden["model_x64"])
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (stem_stride(32), stem_stride(64)) == (1, 2)


PARAMETERS = {  # with 100 classes; resnet20 to 110 with 10, Table 6 of arXiv 1512.03385
    "preactresnet18": 11_217_316,
    "wrn16_8": 11_012_036,
    "wrn28_10": 36_546_980,
    "resnext29_4_24": 4_937_252,
}


def test_parameter_counts():
    counts = parameter_counts(100)
    assert counts.keys() == MODELS.keys()
    assert {name: counts[name] for name in PARAMETERS} == PARAMETERS
    narrow = parameter_counts(10)
    millions = {
        name: round(narrow[name] / 1e6, 2) for name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
    }
    assert millions == {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.73}
    assert counts["resnet18"] < counts["resnet34"] < counts["resnet50"] < counts["resnet101"] < counts["resnet152"]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_have_torchvisions_names(depth):
    import torchvision

    with torch.device("meta"):
        ours = build_model(f"resnet{depth}", 1000).state_dict()
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert list(ours) == list(theirs)
    different = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert different == ["conv1.weight"] and ours["conv1.weight"].shape == (64, 3, 3, 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preactresnet50", "resnet20", "wrn16_8", "resnext29_4_24"])
@pytest.mark.parametrize("size", [32, 64])
def test_any_image_size_gives_logits_and_the_named_stages_exist(name, size):
    model = build_model(name, 7, size).eval()
    for stage in model.stages:
        model.get_submodule(stage)
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 7)


def test_narrow_resnet_pads_the_shortcut_with_zeros_half_on_each_side():
    block = build_model("resnet20", 10).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and out[:, :8].eq(0).all() and out[:, 24:].eq(0).all()


def test_a_file_is_told_by_its_shapes_whatever_the_classes():
    with torch.device("meta"):
        state = build_model("preactresnet34", 37).state_dict()
    assert matching_models(state) == ["preactresnet34"]
    assert matching_models({k: v for k, v in state.items() if "num_batches" not in k}) == ["preactresnet34"]
    assert matching_models(dict(sorted(state.items()))) == ["preactresnet34"], "whatever the order"
    assert matching_models({"weight": torch.zeros(3)}) == []
    with pytest.raises(ValueError, match="resnet20"):
        build_model("resnet21", 10)
