"""Classifiers by the names of torchvision's networks, from files."""

import pytest
import torch
from torchvision.models import get_model

import evaluate
import models
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import infer_arguments, load_classifier, normalize


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
    assert infer_arguments("vit_b_16", weights) == {"image_size": 384}


def test_evaluation_tells_that_a_network_takes_no_images_of_a_size(tmp_path):
    save_torchvision(tmp_path / "f.pt", "squeezenet1_1", num_classes=10)
    words = ["--model_path", f"squeezenet1_1={tmp_path / 'f.pt'}", "--dataset", "shapes", "--device", "cpu"]
    with pytest.raises(UserError, match=r"squeezenet1_1 cannot take images of 16 pixels .*\n.*--image_size"):
        evaluate.main([*words, "--image_size", "16", "--limit", "10"])
