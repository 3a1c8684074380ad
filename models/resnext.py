"""ResNeXt-29 (4x24) for small images.

Xie et al., "Aggregated Residual Transformations", arXiv 1611.05431, with the parameter names of the codes of Co-Mixup,
SAGE and R-Mix.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from models.stages import StagedNetwork


class ResNeXtBlock(nn.Module):
    def __init__(self, in_channels: int, inner: int, channels: int, stride: int, cardinality: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = nn.Conv2d(inner, inner, 3, stride, 1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn_reduce(self.conv_reduce(x)))
        out = F.relu(self.bn(self.conv_conv(out)))
        return F.relu(self.bn_expand(self.conv_expand(out)) + shortcut)


class ResNeXt29(StagedNetwork):
    """ResNeXt-29: (B, 3, H, W) -> (B, num_classes). stride: stride of the stem, 1 for 32 pixels, 2 for 64."""

    stages = ("stage_1", "stage_2", "stage_3")
    last_layer = "classifier"

    def __init__(self, cardinality: int, base_width: int, num_classes: int, stride: int = 1):
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, stride, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        width = 64
        for stage, channels in enumerate((256, 512, 1024)):
            inner = cardinality * base_width * 2**stage
            blocks = []
            for step in (1 if stage == 0 else 2, 1, 1):
                blocks.append(ResNeXtBlock(width, inner, channels, step, cardinality))
                width = channels
            self.add_module(f"stage_{stage + 1}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn_1(self.conv_1_3x3(images)))
