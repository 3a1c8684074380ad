"""Classifiers by the names of the networks of torchvision and timm, from files and checkpoints."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import get_model

import evaluate
import models
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import load_classifier, make_names_unique, normalize


def save_torchvision(path, name: str, **arguments) -> torch.nn.Module:
    """Write the weights of a random network to `path`, and return it in evaluation mode."""
    torch.manual_seed(0)
    network = get_model(name, weights=None, **arguments)
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.mark.parametrize("name", ["regnet_y_400mf", "mnasnet0_5", "squeezenet1_1"])
def test_networks_of_every_family_load_from_a_file(tmp_path, name):
    network = save_torchvision(tmp_path / "f.pt", name, num_classes=7)
    classifier = load_classifier(f"{name}={tmp_path / 'f.pt'}", models)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(classifier(pixels), network(normalize(pixels, *STATISTICS["imagenet"])))
    assert classifier.num_classes == 7


@pytest.mark.parametrize("aux_logits", [True, False])
def test_googlenet_reads_images_as_torchvisions_weights_do(tmp_path, aux_logits):
    settings = {"init_weights": False, "num_classes": 7, "aux_logits": aux_logits}
    network = save_torchvision(tmp_path / "f.pt", "googlenet", transform_input=True, **settings)
    classifier = load_classifier(f"googlenet={tmp_path / 'f.pt'}", models)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(normalize(pixels, *STATISTICS["imagenet"]))
        torch.testing.assert_close(classifier(pixels), expected, rtol=1e-4, atol=1e-6)
        network.transform_input = False  # what --norm imagenet is for
        classifier.mean, classifier.std = STATISTICS["imagenet"]
        assert torch.equal(classifier(pixels), network(normalize(pixels, *STATISTICS["imagenet"])))
    assert "--norm imagenet is for weights trained without transform_input" in classifier.norm_note


def test_vit_is_built_for_the_image_size_of_its_weights():
    weights = {"encoder.pos_embedding": torch.zeros(1, 24**2 + 1, 4), "conv_proj.weight": torch.zeros(4, 3, 16, 16)}
    assert models.infer_image_size(weights) == 384
    theirs = {"pos_embed": torch.zeros(1, 8**2 + 2, 4), "patch_embed.proj.weight": torch.zeros(4, 3, 4, 4)}
    assert models.infer_image_size(theirs) == 32
    assert models.infer_image_size({"conv1.weight": torch.zeros(4, 3, 3, 3)}) is None


def test_evaluation_tells_that_a_network_takes_no_images_of_a_size(tmp_path):
    save_torchvision(tmp_path / "f.pt", "squeezenet1_1", num_classes=10)
    words = ["--model_path", f"squeezenet1_1={tmp_path / 'f.pt'}", "--dataset", "shapes", "--device", "cpu"]
    with pytest.raises(UserError, match=r"squeezenet1_1 takes no images of 16 pixels .*--image_size"):
        evaluate.main([*words, "--image_size", "16", "--limit", "10"])


# ---- Networks of timm, and of either library from checkpoints ----

TINY_VIT = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 3}


def save_checkpoint(path, network: torch.nn.Module, name: str, **entries) -> torch.nn.Module:
    """Write a checkpoint of a run of 4 classes at 16 pixels, and return the network in evaluation mode."""
    content = {"format": 2, "config": {"model": name, "model_args": TINY_VIT, "dataset": "shapes", "norm": "own"}}
    content |= {"classes": list("abcd"), "num_classes": 4, "image_size": 16, "epoch": 3}
    content |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(content | {"model": network.state_dict()} | entries, path)
    return network.eval()


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return models.build_model("timm:vit_tiny_patch16_224", 4, 16, model_args=TINY_VIT).eval()


def test_a_checkpoint_is_rebuilt_from_its_name_and_arguments_with_its_own_mean_and_std(tmp_path, vit):
    save_checkpoint(tmp_path / "best.pt", vit, "timm:vit_tiny_patch16_224")
    classifier = load_classifier(str(tmp_path), models)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(classifier(pixels), vit(normalize(pixels, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))))
    found = (classifier.model, classifier.name, classifier.classes, classifier.image_size, classifier.epoch)
    assert found == ("timm:vit_tiny_patch16_224", tmp_path.name, list("abcd"), 16, 3)
    assert classifier.knows_norm and not classifier.norm_note


def test_weights_without_a_name_need_the_name_and_the_arguments(tmp_path, vit):
    file, arguments = tmp_path / "f.pt", {key: value for key, value in TINY_VIT.items() if key != "img_size"}
    torch.save(vit.state_dict(), file)
    word = f"timm:vit_tiny_patch16_224={file}"
    classifiers = [
        load_classifier(word, models, model_args=arguments),
        load_classifier(str(file), models, model="timm:vit_tiny_patch16_224", model_args=arguments),
    ]
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for classifier in classifiers:
            assert torch.equal(classifier(pixels), vit(normalize(pixels, (0.5,) * 3, (0.5,) * 3)))
            assert (classifier.image_size, classifier.num_classes, classifier.interpolation) == (16, 4, "bicubic")
    with pytest.raises(UserError, match=r"weights of another architecture than timm:vit_tiny_patch16_224; missing: "):
        load_classifier(word, models, model_args=arguments | {"depth": 2})
    with pytest.raises(UserError, match=r"timm:vit_tiny_patch16_224 .*deep.* depth"):
        load_classifier(word, models, model_args={"deep": 2})
    with pytest.raises(UserError, match=r"--model timm:vit_tin: timm has no classifier 'vit_tin'; did you mean timm:"):
        load_classifier(str(file), models, model="timm:vit_tin")
    with pytest.raises(UserError, match=r"the file does not name its network.*\n.*--model.*give NAME=.*f\.pt"):
        load_classifier(str(file), models)


def test_a_missing_timm_is_named_for_a_checkpoint_and_for_a_name(tmp_path, vit, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", vit, "timm:vit_tiny_patch16_224")
    monkeypatch.setitem(sys.modules, "timm", None)
    for word in (str(tmp_path), "timm:vit_tiny_patch16_224", f"timm:vit_tiny_patch16_224={tmp_path / 'best.pt'}"):
        with pytest.raises(UserError, match=r"networks timm:NAME need the package timm: pip install timm"):
            load_classifier(word, models)


def test_evaluating_a_vision_transformer_at_another_image_size_is_one_line(tmp_path, vit):
    names = ["disc", "square", "triangle", "cross"]
    save_checkpoint(tmp_path / "best.pt", vit, "timm:vit_tiny_patch16_224", classes=names)
    words = ["--model_path", str(tmp_path), "--image_size", "24", "--limit", "10", "--device", "cpu"]
    with pytest.raises(UserError, match=r"cannot take images of 24 pixels .*\n.*--image_size"):
        evaluate.main(words)


def test_a_name_of_timm_has_its_pretrained_weights_and_their_inputs(monkeypatch):
    timm, given = pytest.importorskip("timm"), {}

    def create_model(name: str, pretrained: bool, **_):
        given.update(name=name, pretrained=pretrained)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1000))

    monkeypatch.setattr(timm, "create_model", create_model)
    classifier = load_classifier("timm:vit_tiny_patch16_224", models)
    assert given == {"name": "vit_tiny_patch16_224", "pretrained": True}
    assert (classifier.mean, classifier.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (classifier.image_size, classifier.resize, classifier.interpolation) == (224, 248, "bicubic")
    assert (classifier.title(0), classifier.title(999)) == ("tench", "toilet tissue")

    def fail(name: str, **_):
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    message = r"^classifier timm:vit_tiny_patch16_224: cannot load its weights from https://.*no connection\)\n"
    with pytest.raises(UserError, match=message + r".*give a file of weights as timm:vit_tiny_patch16_224=FILE"):
        load_classifier("timm:vit_tiny_patch16_224", models)


def test_runs_of_the_same_seed_get_the_names_of_their_folders():
    files = ["runs/none/seed_0/best.pt", "runs/cutmix/seed_0/best.pt", "none/other.pt", "cutmix/other.pt"]
    classifiers = [
        SimpleNamespace(name=name, path=path)
        for name, path in zip(["seed_0", "seed_0", "other", "other"], files, strict=True)
    ]
    make_names_unique(classifiers)
    assert [one.name for one in classifiers] == ["none/seed_0", "cutmix/seed_0", "none/other.pt", "cutmix/other.pt"]
