"""Wide ResNets for small images.

Zagoruyko and Komodakis, arXiv 1605.07146, with the parameter names of the codes of Puzzle Mix, Co-Mixup, SAGE and
R-Mix. As in these codes, every convolution has a bias, the second convolution of a block has the stride, the shortcut
takes the input before batch norm, and the last batch norm has momentum 0.9.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.stages import StagedNetwork


class WideBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WideResNet(StagedNetwork):
    """Wide ResNet: (B, 3, H, W) -> (B, num_classes). depth = 6n + 4 layers.

    widen: factor of the channels. stride: stride of the first stage, 1 for 32 pixels, 2 for 64.
    """

    stages = ("layer1", "layer2", "layer3")
    raw_stem = True

    def __init__(self, depth: int, widen: int, num_classes: int, stride: int = 1, dropout: float = 0.0):
        super().__init__()
        per_stage = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1)
        width = 16
        for stage, channels in enumerate((16 * widen, 32 * widen, 64 * widen)):
            blocks = []
            for step in [stride if stage == 0 else 2] + [1] * (per_stage - 1):
                blocks.append(WideBlock(width, channels, step, dropout))
                width = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(width, momentum=0.9)
        self.linear = nn.Linear(width, num_classes)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv1(images)

    def final_maps(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(maps))
