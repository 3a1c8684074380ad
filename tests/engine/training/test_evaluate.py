"""Initial weights of a run."""

import re

import pytest
import torch

import models
from engine.errors import UserError
from engine.training.evaluate import load_initial_weights
from models import build_model


def test_init_from_matches_the_last_layer_by_class_name(tmp_path):
    saved, model = build_model("resnet20", 3), build_model("resnet20", 3)
    content = {"format": 2, "config": {}, "classes": ["cat", "dog", "owl"], "model": saved.state_dict()}
    torch.save(content, tmp_path / "last.pt")
    weight, bias = model.linear.weight.detach().clone(), model.linear.bias.detach().clone()

    note = load_initial_weights(model, str(tmp_path / "last.pt"), ["owl", "yak", "cat"], models, "resnet20")
    with torch.no_grad():
        assert torch.equal(model.linear.weight[[0, 2]], saved.linear.weight[[2, 0]])
        assert torch.equal(model.linear.bias[[0, 2]], saved.linear.bias[[2, 0]])
        assert torch.equal(model.linear.weight[1], weight[1]) and model.linear.bias[1] == bias[1], "yak is new"
        assert torch.equal(model.conv1.weight, saved.conv1.weight)
    assert "by name for 2 of 3 classes, and new for the others" in note

    note = load_initial_weights(model, str(tmp_path / "last.pt"), ["cat", "dog", "owl"], models, "resnet20")
    assert torch.equal(model.linear.weight, saved.linear.weight) and note.endswith("weights loaded")


@pytest.mark.parametrize(
    ("name", "model_args", "size", "heads"),
    [
        ("torchvision:squeezenet1_1", {}, 32, ["classifier.1"]),  # a convolution as its head
        ("torchvision:densenet121", {}, 32, ["classifier"]),  # its weights have the keys of earlier versions
        ("timm:deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 12}, 16, ["head", "head_dist"]),
    ],
)
def test_init_from_takes_weights_of_a_library_with_another_head(tmp_path, name, model_args, size, heads):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    shape = {"image_size": size, "model_args": model_args}
    saved, model = build_model(name, 7, **shape).state_dict(), build_model(name, 3, **shape)
    earlier = {re.sub(r"(denselayer\d+\.(norm|relu|conv))", r"\1.", key): value.half() for key, value in saved.items()}
    torch.save(earlier, tmp_path / "net.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    note = load_initial_weights(model, str(tmp_path / "net.pt"), ["a", "b", "c"], models, name)
    assert note.endswith("the last layer is newly initialised for 3 classes")
    for key, value in model.state_dict().items():
        own = key.rpartition(".")[0] in heads
        assert torch.equal(value, before[key] if own else saved[key].half().to(value.dtype)), key


def test_init_from_names_the_network_of_a_run_with_its_arguments(tmp_path):
    name, arguments = "torchvision:squeezenet1_1", {"dropout": 0.1}
    state = build_model(name, 2, 32, model_args=arguments).state_dict()
    content = {"format": 2, "config": {"model": name, "model_args": arguments}, "classes": ["a", "b"], "model": state}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="use --model torchvision:squeezenet1_1 --model_args dropout=0.1$"):
        load_initial_weights(build_model("resnet20", 2), str(tmp_path / "last.pt"), ["a", "b"], models, "resnet20")


def test_init_from_refuses_weights_of_another_network(tmp_path):
    torch.save(build_model("torchvision:squeezenet1_1", 7, 32).state_dict(), tmp_path / "net.pt")
    model = build_model("torchvision:squeezenet1_0", 3, 32)
    with pytest.raises(UserError, match="net.pt: weights of another architecture than torchvision:squeezenet1_0; miss"):
        load_initial_weights(model, str(tmp_path / "net.pt"), ["a", "b", "c"], models, "torchvision:squeezenet1_0")
