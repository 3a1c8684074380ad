"""Define the common structure of all classifiers: a stem, stages, global average pooling and a linear layer."""

import torch
from torch import nn


class StagedNetwork(nn.Module):
    """A classifier (B, 3, H, W) -> (B, num_classes) whose intermediate feature maps are accessible."""

    stages: tuple[str, ...] = ()  # names of the stage modules, shallow to deep
    last_layer: str = "linear"  # name of the linear layer
    raw_stem: bool = False  # whether the stem ends with a convolution, without batch norm and ReLU

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the first stage: (B, 3, H, W) -> (B, C, h, w)."""
        raise NotImplementedError

    def final_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """Map the output (B, C, h, w) of the last stage to the maps that are averaged for the linear layer."""
        return maps

    def head(self, maps: torch.Tensor) -> torch.Tensor:
        """Map the output (B, C, h, w) of the last stage to logits (B, num_classes)."""
        return getattr(self, self.last_layer)(self.final_maps(maps).mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        for name in self.stages:
            maps = getattr(self, name)(maps)
        return self.head(maps)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return logits (B, num_classes) and the outputs (B, C, h, w) of the stem and of each stage."""
        features = [self.stem(images)]
        for name in self.stages:
            features.append(getattr(self, name)(features[-1]))
        return self.head(features[-1]), features


def has_stages(model: nn.Module) -> bool:
    """Return whether a network names its stages, as StagedNetwork and the ResNets of models/library.py do."""
    return isinstance(getattr(model, "stages", None), tuple)


def run_stages(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what StagedNetwork.forward_features() does, for any network that names its stages.

    The stem of a library's network is all that comes before its first stage.
    """
    if isinstance(model, StagedNetwork):
        return model.forward_features(images)
    features: list[torch.Tensor] = []
    stages = [model.get_submodule(name) for name in model.stages]
    handles = [stages[0].register_forward_pre_hook(lambda _, given: features.append(given[0]))]
    handles += [stage.register_forward_hook(lambda _, given, output: features.append(output)) for stage in stages]
    try:
        return model(images), features
    finally:
        for handle in handles:
            handle.remove()
