"""Networks of torchvision and timm by name: names, constructor arguments, image sizes."""

import sys

import pytest
import torch

import models
import train
from models import build_model, check_model_name, split_model_name
from models.stages import has_stages, run_stages


def test_names_are_split_at_the_library_only():
    assert split_model_name("TIMM:vit_tiny_patch16_224") == ("timm", "vit_tiny_patch16_224")
    assert split_model_name("resnet18") == (None, "resnet18")
    assert split_model_name("C:/weights") == (None, "C:/weights")
    assert check_model_name("Torchvision:ResNet18") == "torchvision:resnet18"
    assert check_model_name("wrn28-10") == "wrn28_10"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torchvision:mobilenet_v22", "did you mean torchvision:mobilenet_v2"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier"),
        ("timm:vit_tiny_patch16_223", "did you mean timm:vit_tiny_patch16_224"),
        ("vit_tiny", "timm:NAME"),
    ],
)
def test_unknown_names_give_the_nearest(name, remedy):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=remedy):
        check_model_name(name)


def test_list_models_says_how_to_list_those_of_the_libraries():
    text = models.list_models(["resnet20"])
    assert "torchvision:NAME, where NAME is one of alexnet, convnext_base" in text and "vit_l_32" in text
    assert "timm.list_models" in text and all(len(line) <= 120 for line in text.splitlines())


def test_a_plain_name_of_torchvision_is_refused_with_its_full_name(capsys):
    with pytest.raises(SystemExit):
        train.build_parser().read(["--model", "vit_b_16"])
    assert "write torchvision:vit_b_16" in capsys.readouterr().err


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        build_model("timm:resnet18", 10)


@pytest.mark.parametrize(
    ("name", "size", "model_args", "message"),
    [
        (
            "torchvision:resnet18",
            32,
            {"drop_path": 0.1},
            "drop_path=0.1 .*unexpected keyword.*; its arguments are .*norm_layer",
        ),
        ("torchvision:resnet18", 32, {"num_classes": 3}, "num_classes is the number of classes of the data"),
        (
            "torchvision:resnet18",
            32,
            {"width_per_group": "wide"},
            r"with width_per_group=wide \([^;]*$",
        ),
        ("torchvision:resnet18", 32, {"width_pergroup": 8}, r"; did you mean width_per_group\?$"),
        ("torchvision:densenet121", 32, {"foo": 1}, r"; its arguments are \w+(, \w+){5}$"),
        ("torchvision:vit_b_32", 40, {}, "cannot be built with image_size=40 .*divisible.*; set another --image_size"),
        ("torchvision:alexnet", 32, {}, "takes no images of 32 pixels .*--image_size"),
        ("resnet20", 32, {"depth": 3}, "resnet20 takes no --model_args"),
    ],
)
def test_what_a_network_does_not_take_is_one_line(name, size, model_args, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, 4, size, model_args=model_args)
    assert "\n" not in str(caught.value)


def test_of_many_arguments_only_the_first_are_listed():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"its arguments are img_size(, \w+){11} and \d+ more$"):
        build_model("timm:vit_tiny_patch16_224", 4, model_args={"foo": 1})


def test_a_network_is_built_for_the_image_size_of_the_run():
    pytest.importorskip("timm")
    vit = build_model("timm:vit_tiny_patch16_224", 4, 48, model_args={"patch_size": 8, "depth": 1})
    assert vit.patch_embed.grid_size == (6, 6) and vit.training
    assert build_model("timm:vit_tiny_patch16_224", 4, 48, model_args={"img_size": 48, "depth": 1}).num_classes == 4
    assert torch.is_tensor(build_model("torchvision:vit_b_32", 4, 64)(torch.zeros(2, 3, 64, 64)))


def test_patches_that_leave_out_a_part_of_the_images_are_refused():
    pytest.importorskip("timm")
    small = {"depth": 1, "embed_dim": 24, "num_heads": 1}
    with pytest.raises(ValueError, match="no images of 30 pixels: its patches of 16 pixels would leave out 14"):
        build_model("timm:vit_tiny_patch16_224", 4, 30, model_args=small)
    assert build_model("timm:vit_tiny_patch16_224", 4, 30, model_args=small | {"patch_size": 5})
    own = build_model("timm:vit_so400m_patch14_siglip_384", 4, 384, model_args=small)
    assert own.patch_embed.grid_size == (27, 27)  # its weights were trained so


def test_building_draws_the_same_numbers_again():
    torch.manual_seed(0)
    first = build_model("torchvision:squeezenet1_1", 4, 64).state_dict()
    torch.manual_seed(0)
    models.library.list_arguments.cache_clear()
    again = build_model("torchvision:squeezenet1_1", 4, 64).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_the_stages_of_a_librarys_resnet_are_run_as_those_of_our_networks(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model, images = build_model(name, 5, 32).eval(), torch.randn(2, 3, 32, 32)
    logits, (stem, *features) = run_stages(model, images)
    torch.testing.assert_close(logits, model(images))
    assert len(features) == 4 and stem.min() >= 0
    for stage, given, output in zip(model.stages, [stem, *features], features, strict=False):
        torch.testing.assert_close(model.get_submodule(stage)(given), output)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not has_stages(build_model("torchvision:mobilenet_v2", 5, 32))
