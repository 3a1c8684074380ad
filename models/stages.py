"""What all our classifiers are: a stem, stages one after the other, and a linear layer on the mean of the last maps."""

import torch
from torch import nn


class StagedNetwork(nn.Module):
    """(B, 3, H, W) -> (B, num_classes), and what lies between."""

    stages: tuple[str, ...] = ()  # names of the modules, shallow to deep
    last_layer: str = "linear"  # name of the linear layer
    raw_stem: bool = False  # whether the stem ends in a bare convolution, without batch norm and ReLU

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C, h, w), what the first stage takes."""
        raise NotImplementedError

    def final_maps(self, maps: torch.Tensor) -> torch.Tensor:
        """The last stage's maps (B, C, h, w) -> those that are averaged for the linear layer."""
        return maps

    def head(self, maps: torch.Tensor) -> torch.Tensor:
        """The last stage's maps (B, C, h, w) -> logits (B, num_classes)."""
        return getattr(self, self.last_layer)(self.final_maps(maps).mean((2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        for name in self.stages:
            maps = getattr(self, name)(maps)
        return self.head(maps)

    def forward_features(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, num_classes), and the maps behind the stem and behind each stage, each (B, C, h, w)."""
        features = [self.stem(images)]
        for name in self.stages:
            features.append(getattr(self, name)(features[-1]))
        return self.head(features[-1]), features
