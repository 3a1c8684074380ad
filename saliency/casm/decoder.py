"""The mask decoder: from the maps of a classifier to one mask an image, without a label.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249, Sec. 3 and its public program.
"""

import torch
from torch import nn
from torch.nn import functional as F

UPSAMPLE = ("nearest", "bilinear")


class Lateral(nn.Module):
    """1x1 convolution, batch norm, ReLU: (B, C, h, w) -> (B, width, h, w)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(maps)))


class MaskDecoder(nn.Module):
    """Maps of a classifier, shallow to deep, to masks in 0..1.

    The first maps enter as they are, or through a lateral of their own (lateral_zero), which they need where they are
    neither normalised nor rectified. All others pass a lateral and are enlarged to the grid of the first. A 3x3
    convolution and a sigmoid make the mask on that grid, which `upsample` (`nearest` or `bilinear`) then enlarges.

    channels: of the maps. width: of the laterals.
    """

    def __init__(self, channels: list[int], width: int = 64, upsample: str = "nearest", lateral_zero: bool = False):
        super().__init__()
        if upsample not in UPSAMPLE:
            raise ValueError(f"upsample must be nearest or bilinear, got {upsample!r}")
        self.upsample, self.lateral_zero = upsample, lateral_zero
        first, *deeper = channels
        self.laterals = nn.ModuleList(Lateral(count, width) for count in ([first] if lateral_zero else []) + deeper)
        self.widths = [width if lateral_zero else first] + [width] * len(deeper)
        self.final = nn.Conv2d(sum(self.widths), 1, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # published so: the sigmoid starts nearly saturated
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """features: one (B, C, h, w) for each of `channels` -> (B, 1, *size)."""
        mask = self.on_grid(features)
        if mask.shape[-2:] == tuple(size):
            return mask
        corners = {"align_corners": False} if self.upsample == "bilinear" else {}
        return F.interpolate(mask, tuple(size), mode=self.upsample, **corners)

    def on_grid(self, features: list[torch.Tensor]) -> torch.Tensor:
        """The masks (B, 1, h, w) float32 on the grid of the first maps.

        The published program enlarges every lateral and convolves all of them at once. Mixing channels and enlarging
        commute, so here each level is reduced to the nine taps of the convolution on its own small grid, nine maps are
        enlarged in place of 64, and the taps are shifted and summed last: the same numbers at a fraction of the work.
        """
        maps = features if self.lateral_zero else features[1:]
        levels = ([] if self.lateral_zero else [features[0]]) + [
            lateral(one) for lateral, one in zip(self.laterals, maps, strict=True)
        ]
        grid = features[0].shape[-2:]
        weights = self.final.weight[0].split(self.widths)  # each (width, 3, 3)
        taps = 0
        for level, weight in zip(levels, weights, strict=True):
            one = F.conv2d(level, weight.flatten(1).t()[:, :, None, None])  # (B, 9, h, w)
            one = one.to(torch.promote_types(one.dtype, torch.float32))
            if one.shape[-2:] != grid:
                one = F.interpolate(one, grid, mode="bilinear", align_corners=False)
            taps = taps + one
        # folding adds what lies at (u, v) of a window, a tap takes it from there: the order is turned round
        folded = F.fold(taps.flip(1).flatten(2), grid, 3, padding=1)
        return torch.sigmoid(folded + self.final.bias.to(folded.dtype).view(1, 1, 1, 1))
