"""ResNets for small images; those for large images are in models/imagenet_resnet.py.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385: resnet18 to resnet152 are the networks of
Table 1 with torchvision's parameter names, but with a 3x3 stem and no max-pooling; resnet20 to resnet110 are the narrow
networks of Sec. 4.2 (16-32-64 channels, parameter-free shortcuts, option A). resnext50 is the ResNeXt-50 (32x4d) of Xie
et al., "Aggregated Residual Transformations", arXiv 1611.05431, Table 1, with the same stem.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.stages import StagedNetwork


def init_kaiming(model: nn.Module) -> None:
    """Initialise every convolution with He initialisation in fan-out mode, as in torchvision's ResNet."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    expansion = 1
    last_norm = "bn2"  # last batch norm of the residual branch

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(nn.Module):
    """Bottleneck block with the stride on the 3x3 convolution, as in torchvision ("v1.5").

    groups, group_width: of the 3x3 convolution in the first stage; the width doubles in each of the following stages.
    """

    expansion = 4
    last_norm = "bn3"
    groups, group_width = 1, 64

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        inner = channels * self.groups * self.group_width // 64
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNeXtBottleneck(Bottleneck):
    """Bottleneck block of a ResNeXt (32x4d)."""

    groups, group_width = 32, 4


TABLE_1 = {  # depth -> block, and number of blocks per stage
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(StagedNetwork):
    """ResNet with torchvision's parameter names: (B, 3, H, W) -> (B, num_classes).

    stride, kernel: stride and kernel size of the stem, which has no max-pooling.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")
    last_layer = "fc"

    def __init__(
        self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int, stride: int = 1, kernel: int = 3
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, (depth, channels) in enumerate(zip(depths, (64, 128, 256, 512), strict=True)):
            blocks = []
            for index in range(depth):
                step = 2 if stage > 0 and index == 0 else 1
                downsample = None
                if step != 1 or width != channels * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(width, channels * block.expansion, 1, step, bias=False),
                        nn.BatchNorm2d(channels * block.expansion),
                    )
                blocks.append(block(width, channels, step, downsample))
                width = channels * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, num_classes)
        init_kaiming(self)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the first stage: (B, 3, H, W) -> (B, 64, H / stride, W / stride)."""
        return F.relu(self.bn1(self.conv1(images)))


class NarrowBlock(nn.Module):
    """Basic block with a parameter-free shortcut (option A).

    Where the shape changes, the shortcut takes every second pixel and pads the channels with zeros, half on each side.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return F.relu(out + x)


class NarrowResNet(StagedNetwork):
    """Narrow ResNet: (B, 3, H, W) -> (B, num_classes). depth = 6n + 2 layers, 16-32-64 channels."""

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, num_classes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, channels in enumerate((16, 32, 64)):
            blocks = []
            for step in [1 if stage == 0 else 2] + [1] * ((depth - 2) // 6 - 1):
                blocks.append(NarrowBlock(width, channels, step))
                width = channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)
        init_kaiming(self)

    def stem(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(images)))


def resnet(depth: int, num_classes: int, stride: int = 1) -> ResNet:
    return ResNet(*TABLE_1[depth], num_classes, stride)


def resnext50(num_classes: int, stride: int = 1) -> ResNet:
    return ResNet(ResNeXtBottleneck, TABLE_1[50][1], num_classes, stride)
