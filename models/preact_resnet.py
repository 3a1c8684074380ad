"""Pre-activation ResNets for small images.

He et al., "Identity Mappings in Deep Residual Networks", arXiv 1603.05027, with the parameter names of the codes of
Puzzle Mix, Co-Mixup, SAGE and R-Mix. As in these codes, neither batch norm nor ReLU follows the last stage.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.stages import StagedNetwork


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActBottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != 4 * channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return self.conv3(F.relu(self.bn3(out))) + shortcut


BLOCKS = {  # depth -> block, and number of blocks per stage
    18: (PreActBlock, (2, 2, 2, 2)),
    34: (PreActBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
    101: (PreActBottleneck, (3, 4, 23, 3)),
    152: (PreActBottleneck, (3, 8, 36, 3)),
}


class PreActResNet(StagedNetwork):
    """Pre-activation ResNet: (B, 3, H, W) -> (B, num_classes). stride: of the stem, 1 for 32 pixels, 2 for 64."""

    stages = ("layer1", "layer2", "layer3", "layer4")
    raw_stem = True

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride, 1, bias=False)
        width = 64
        for stage, (depth, channels) in enumerate(zip(depths, (64, 128, 256, 512), strict=True)):
            blocks = []
            for step in [1 if stage == 0 else 2] + [1] * (depth - 1):
                blocks.append(block(width, channels, step))
                width = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(width, num_classes)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv1(images)


def preactresnet(depth: int, num_classes: int, stride: int = 1) -> PreActResNet:
    return PreActResNet(*BLOCKS[depth], num_classes, stride)
