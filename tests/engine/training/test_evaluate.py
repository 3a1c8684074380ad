"""Initial weights of a run."""

import torch

import models
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
