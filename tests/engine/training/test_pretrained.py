"""--pretrained: weights of a library from its cache or a file, and the images that they are made for."""

import pytest
import torch
from torchvision.models import get_model

import models
import train
from engine.errors import UserError
from engine.training.pretrained import load_pretrained_weights, resolve_pretrained

pytestmark = pytest.mark.usefixtures("hub_cache")


def resolve(*words: str, config: dict | None = None) -> dict:
    parser = train.build_parser()
    return resolve_pretrained(parser, parser.read(["--dataset", "shapes", *words]), config or {}, models)


def load(options: dict, classes: int = 4) -> tuple[torch.nn.Module, str]:
    shape = {"model_args": options["model_args"]}
    network = models.build_model(options["model"], classes, options["image_size"], **shape)
    return network, load_pretrained_weights(network, options, classes, models)


def get_images(options: dict) -> tuple:
    return options["norm"], options["image_size"], options["interpolation"]


def test_the_images_are_those_of_the_weights_unless_typed():
    assert get_images(resolve("--model", "torchvision:mobilenet_v2", "--pretrained")) == ("imagenet", 224, "bilinear")
    assert get_images(resolve("--model", "torchvision:googlenet", "--pretrained"))[0] == "half"
    inception = resolve("--model", "torchvision:inception_v3", "--pretrained", "--image_size", "96", "--norm", "own")
    assert get_images(inception) == ("own", 96, "bilinear")
    saved = {"norm": "imagenet", "image_size": 64, "interpolation": "bilinear"}
    assert get_images(resolve("--model", "torchvision:swin_t", "--pretrained", config=saved)) == tuple(saved.values())
    assert get_images(resolve("--model", "torchvision:mobilenet_v2"))[0] == "own"


def test_images_of_timm():
    pytest.importorskip("timm")
    assert get_images(resolve("--model", "timm:vit_tiny_patch16_224", "--pretrained")) == ("half", 224, "bicubic")
    clip = resolve("--model", "timm:vit_base_patch32_clip_224", "--pretrained", "openai")
    assert get_images(clip) == ("clip", 224, "bicubic")


@pytest.mark.parametrize("classes", [4, 1000])
def test_weights_from_the_cache_of_torch_hub(hub_cache, classes):
    weights = get_model("mobilenet_v3_small").state_dict()
    torch.save(weights, hub_cache / "mobilenet_v3_small-047dcff4.pth")
    network, note = load(resolve("--model", "torchvision:mobilenet_v3_small", "--pretrained"), classes)
    own = network.state_dict()
    kept = [key for key in own if not torch.equal(own[key], weights[key])] if classes == 1000 else None
    assert kept in (None, []) and torch.equal(own["features.0.0.weight"], weights["features.0.0.weight"])
    assert ("the last layer is new for 4 classes" in note) == (classes == 4) and "images of 224 pixels" in note


def test_weights_of_our_networks_are_those_of_torchvision(hub_cache):
    weights = get_model("resnet18").state_dict()
    torch.save(weights, hub_cache / "resnet18-f37072fd.pth")
    network, note = load(resolve("--model", "imagenet_resnet18", "--pretrained"))
    assert torch.equal(network.state_dict()["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


def test_a_file_in_half_precision_is_the_remedy_for_weights_that_are_missing(hub_cache, tmp_path):
    options = resolve("--model", "torchvision:mobilenet_v3_small", "--pretrained")
    with pytest.raises(
        UserError, match=f"put the file mobilenet_v3_small-.* into {hub_cache}, or give a copy"
    ) as caught:
        load(options)
    assert len(str(caught.value).splitlines()) == 2
    weights = {key: value.half() for key, value in get_model("mobilenet_v3_small").state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    network, note = load(options | {"pretrained": str(tmp_path / "weights.pt")})
    assert torch.equal(network.state_dict()["features.0.0.weight"], weights["features.0.0.weight"].float())
    assert str(tmp_path / "weights.pt") in note


def test_position_embeddings_are_interpolated_to_the_size_of_the_run(tmp_path):
    timm = pytest.importorskip("timm")
    saved = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    torch.save(saved, tmp_path / "vit.pt")
    words = ("--model_args", "depth=1", "patch_size=8", "--image_size", "32", "--pretrained", str(tmp_path / "vit.pt"))
    own = load(resolve("--model", "timm:vit_tiny_patch16_224", *words))[0].state_dict()
    assert own["pos_embed"].shape == (1, 17, 192)
    assert torch.equal(own["blocks.0.mlp.fc1.weight"], saved["blocks.0.mlp.fc1.weight"])


def test_weights_of_timm_come_from_the_cache_of_hugging_face(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    hub, save = pytest.importorskip("huggingface_hub.constants"), pytest.importorskip("safetensors.torch").save_file
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    options = resolve("--model", "timm:resnet10t", "--pretrained", "--image_size", "64")
    with pytest.raises(UserError, match=f"folder models--timm--resnet10t.c3_in1k .*{tmp_path}, or give a copy"):
        load(options)
    folder = tmp_path / "models--timm--resnet10t.c3_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    weights = timm.create_model("resnet10t").state_dict()
    save(weights, folder / "snapshots" / "abc" / "model.safetensors")
    network, note = load(options)
    assert torch.equal(network.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    assert "the last layer is new for 4 classes" in note and network.fc.out_features == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("torchvision:mobilenet_v2", "--pretrained", "V3"), "available: IMAGENET1K_V1, IMAGENET1K_V2"),
        (("resnet18", "--pretrained"), "no pretrained weights for resnet18; they exist for imagenet_resnet18"),
        (("timm:resnet10t", "--pretrained", "a1"), "no weights a1 for resnet10t; its tags are c3_in1k"),
    ],
)
def test_weights_that_do_not_exist_are_a_usage_error(words, message, capsys):
    pytest.importorskip("timm")
    with pytest.raises(SystemExit):
        resolve("--model", *words)
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1
