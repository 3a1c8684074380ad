"""A trained classifier out of a file: ours, which says what it is, or another code's, which is told by its shapes."""

from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint import extract_weights, is_ours, load_weights, read_file
from engine.cli import UserError


class SavedClassifier:
    """The content of a model file. `options` are those it was trained with; empty where the file does not say."""

    def __init__(self, path: Path, averaged: bool = False):
        self.path, self.content = Path(path), read_file(path)
        self.weights = extract_weights(self.content, self.path, averaged=averaged)
        ours = is_ours(self.content)
        self.options = self.content["config"] if ours else {}
        self.epoch = self.content.get("epoch") if isinstance(self.content, dict) else None

    def build(
        self, build_model: Callable, matching_models: Callable, *, model: str | None, num_classes: int, image_size: int
    ) -> torch.nn.Module:
        """The network with these weights. model None: the one in the file, else the one whose shapes fit. Raises UserError."""
        name = model or self.options.get("model")
        matches = [] if name and self.options else matching_models(self.weights, image_size)
        if not name and not matches:
            raise UserError(
                f"{self.path}: the file does not say which network it is and none of ours fits; name it with --model"
            )
        network = build_model(name or matches[0], num_classes, image_size)
        load_weights(network, self.weights, self.path, num_classes=num_classes, matches=matches)
        return network
