"""A classifier and the decoder that reads its maps, together and out of a file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.runtime.checkpoint import is_checkpoint, list_first_keys, read_file
from models import build_model, matching_models

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


ENDING = ".chk"
PUBLISHED = "imagenet_resnet50"  # the only network of the published program


class Casm(nn.Module):
    """images (B, 3, H, W) -> masks (B, 1, H, W) in 0..1, logits (B, K)."""

    def __init__(self, classifier: nn.Module, decoder: MaskDecoder):
        super().__init__()
        self.classifier, self.decoder = classifier, decoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = self.classifier.forward_features(images)
        return self.decoder(features, images.shape[-2:]), logits.float()

    def masks(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward(images)[0]


def build_decoder(classifier: nn.Module, width: int = 64, upsample: str = "nearest") -> MaskDecoder:
    """A fresh decoder for the maps of one of our networks."""
    return MaskDecoder(feature_channels(classifier), width, upsample, lateral_zero=classifier.raw_stem)


@torch.no_grad()
def feature_channels(classifier: nn.Module) -> list[int]:
    """Channels of the maps behind the stem and behind each stage."""
    training = classifier.training
    weight = next(classifier.parameters())
    features = classifier.eval().forward_features(torch.zeros(1, 3, 32, 32, device=weight.device))[1]
    classifier.train(training)
    return [maps.shape[1] for maps in features]


@dataclass
class SavedCasm:
    """What a file of saliency.casm train holds, or one of the published program. `network` is on the CPU, in evaluation
    mode, without gradients.
    """

    path: Path
    network: Casm
    classes: list[str]  # empty where the file does not say: 1000 of ImageNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    options: dict
    epoch: int | None

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(ENDING)


def load_casm(path: Path | str) -> SavedCasm:
    """Raises UserError for anything that is no such file; nothing in it can run."""
    content = read_file(Path(path))
    try:
        return describe_decoder(Path(path), content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no mask decoder of ours or of the published program ({type(error).__name__}: {error})\n"
            "make one with python -m saliency.casm train"
        ) from error


def describe_decoder(path: Path, content) -> SavedCasm:
    """What load_casm makes of the content of a file."""
    if is_checkpoint(content) and "decoder" in content:
        options = content["config"]
        decoder, width, upsample = content["decoder"], options["width"], options["upsample"]
    elif isinstance(content, dict) and "state_dict_decoder" in content:
        options = {"model": PUBLISHED}
        decoder, width = rename_published_keys(content["state_dict_decoder"]), 64
        upsample = getattr(content.get("args"), "upsample", "nearest")
    else:
        raise UserError(
            f"{path}: holds no mask decoder (found: {list_first_keys(content)})\n"
            "make one with python -m saliency.casm train; a plain classifier goes to --classifier"
        )
    size = content.get("image_size", 224)
    classifier = SavedClassifier(path, content=content).build(
        build_model,
        matching_models,
        model=options["model"],
        num_classes=len(content.get("classes", [])) or 1000,
        image_size=size,
    )
    network = Casm(classifier, build_decoder(classifier, width, upsample))
    try:
        network.decoder.load_state_dict(decoder)
    except RuntimeError as error:
        raise UserError(f"{path}: its decoder does not fit {options['model']}: {str(error).splitlines()[1]}") from error
    mean, std = content.get("mean"), content.get("std")
    mean, std = (mean, std) if mean else STATISTICS["imagenet"]
    return SavedCasm(
        path,
        network.eval().requires_grad_(False),
        list(content.get("classes", [])),
        tuple(mean),
        tuple(std),
        size,
        options,
        content.get("epoch"),
    )


def rename_published_keys(decoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published program's names of the decoder's weights in ours."""
    names = {}
    for key, value in decoder.items():
        part, _, rest = key.removeprefix("module.").partition(".")
        layer, _, leaf = rest.partition(".")
        if part == "final":
            names[f"final.{leaf}"] = value
        else:  # conv1x1_2.1.bias: of the second lateral, its batch norm
            names[f"laterals.{int(part.removeprefix('conv1x1_')) - 1}.{('conv', 'bn')[int(layer)]}.{leaf}"] = value
    return names


def casm_files(places: list[str]) -> list[Path]:
    """The files that --casms-path means: files, and of folders every .chk in them. UserError if there is none."""
    found = []
    for place in map(Path, places):
        if place.is_dir():
            held = sorted(place.glob(f"*{ENDING}"))
            if not held:
                raise UserError(
                    f"--casms-path {place}: no file ending in {ENDING} there; make one with train. DATA goes first"
                )
            found += held
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"--casms-path {place}: no such file or folder")
    return found
