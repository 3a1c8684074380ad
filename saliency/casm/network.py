"""The mask decoder, its network with the classifier as encoder, and the loading of both from a file.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249. Details follow the authors' code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import models
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.runtime.checkpoint import check_finite, is_checkpoint, list_first_keys, read_file
from models.stages import run_stages

UPSAMPLE_MODES = ("nearest", "bilinear")
SUFFIX = ".chk"  # of CASM checkpoints
PUBLISHED_MODEL = "imagenet_resnet50"  # the only architecture of the published program


class Lateral(nn.Module):
    """1x1 convolution, batch norm, ReLU: (B, C, h, w) -> (B, width, h, w)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(features)))


class MaskDecoder(nn.Module):
    """Predict masks in 0..1 from the feature maps of a classifier, shallow to deep.

    The first feature map is used as it is, or through its own lateral (lateral_zero), which it needs unless it comes
    after batch norm and ReLU. All others pass a lateral and are upsampled to the grid of the first. A 3x3 convolution
    and a sigmoid compute the mask on that grid, and `upsample` (`nearest` or `bilinear`) enlarges it to the image.

    channels: of each feature map. width: channels of the laterals.
    """

    def __init__(self, channels: list[int], width: int = 64, upsample: str = "nearest", lateral_zero: bool = False):
        super().__init__()
        if upsample not in UPSAMPLE_MODES:
            raise ValueError(f"upsample must be nearest or bilinear, got {upsample!r}")
        self.upsample, self.lateral_zero = upsample, lateral_zero
        first, *deeper = channels
        self.laterals = nn.ModuleList(Lateral(count, width) for count in ([first] if lateral_zero else []) + deeper)
        self.widths = [width if lateral_zero else first] + [width] * len(deeper)
        self.final = nn.Conv2d(sum(self.widths), 1, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # as published, though it nearly saturates the sigmoid
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Return masks (B, 1, *size). features: one (B, C, h, w) for each entry of `channels`."""
        mask = self.predict_on_grid(features)
        if mask.shape[-2:] == tuple(size):
            return mask
        corners = {"align_corners": False} if self.upsample == "bilinear" else {}
        return F.interpolate(mask, tuple(size), mode=self.upsample, **corners)

    def predict_on_grid(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return masks (B, 1, h, w) in float32 on the grid of the first feature map.

        The published program upsamples every lateral and convolves all of them at once. Upsampling commutes with sums
        over channels. So each level is first reduced to the nine taps of the convolution on its own small grid, then
        nine maps are upsampled in place of 64, and the taps are shifted and summed last. The result is the same.
        """
        levels = [] if self.lateral_zero else [features[0]]
        rest = features if self.lateral_zero else features[1:]
        levels += [lateral(one) for lateral, one in zip(self.laterals, rest, strict=True)]
        grid = features[0].shape[-2:]
        weights = self.final.weight[0].split(self.widths)  # each (width, 3, 3)
        taps = 0
        for level, weight in zip(levels, weights, strict=True):
            level_taps = F.conv2d(level, weight.flatten(1).t()[:, :, None, None])  # (B, 9, h, w)
            level_taps = level_taps.to(torch.promote_types(level_taps.dtype, torch.float32))
            if level_taps.shape[-2:] != grid:
                level_taps = F.interpolate(level_taps, grid, mode="bilinear", align_corners=False)
            taps = taps + level_taps
        # fold() adds a tap where a convolution would read it, so the order of the taps is reversed
        folded = F.fold(taps.flip(1).flatten(2), grid, 3, padding=1)
        return torch.sigmoid(folded + self.final.bias.to(folded.dtype).view(1, 1, 1, 1))


class CasmNetwork(nn.Module):
    """A classifier and a mask decoder: images (B, 3, H, W) -> masks (B, 1, H, W) in 0..1, logits (B, K)."""

    def __init__(self, classifier: nn.Module, decoder: MaskDecoder):
        super().__init__()
        self.classifier, self.decoder = classifier, decoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = run_stages(self.classifier, images)
        return self.decoder(features, images.shape[-2:]), logits.float()

    def predict_masks(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward(images)[0]


def build_decoder(classifier: nn.Module, width: int = 64, upsample: str = "nearest") -> MaskDecoder:
    """Return a new decoder for the feature maps of a classifier that names its stages."""
    return MaskDecoder(
        get_feature_channels(classifier), width, upsample, lateral_zero=getattr(classifier, "raw_stem", False)
    )


@torch.no_grad()
def get_feature_channels(classifier: nn.Module) -> list[int]:
    """Return the number of channels of the feature maps after the stem and after each stage."""
    training = classifier.training
    weight = next(classifier.parameters())
    features = run_stages(classifier.eval(), torch.zeros(1, 3, 32, 32, device=weight.device))[1]
    classifier.train(training)
    return [one.shape[1] for one in features]


@dataclass
class SavedCasm:
    """The content of a checkpoint of saliency.casm train or of the published program.

    `network` is on the CPU, in evaluation mode, and its parameters do not require gradients.
    """

    path: Path
    network: CasmNetwork
    classes: list[str]  # empty if the file does not name them: those of ImageNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    options: dict
    epoch: int | None

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)


def load_casm(path: Path | str) -> SavedCasm:
    """Load a CASM checkpoint, without running code that the file may hold. Raises UserError for any other file."""
    content = read_file(Path(path))
    try:
        return build_saved_casm(Path(path), content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a CASM checkpoint of this or of the published program ({type(error).__name__}: {error})\n"
            "make one with python -m saliency.casm train"
        ) from error


def build_saved_casm(path: Path, content) -> SavedCasm:
    """Build the network that the content of a checkpoint describes. path: for messages."""
    if is_checkpoint(content) and "decoder" in content:
        options = content["config"]
        decoder, width, upsample = content["decoder"], options["width"], options["upsample"]
    elif isinstance(content, dict) and "state_dict_decoder" in content:
        options = {"model": PUBLISHED_MODEL}
        decoder, width = rename_published_keys(content["state_dict_decoder"]), 64
        upsample = getattr(content.get("args"), "upsample", "nearest")
    else:
        raise UserError(
            f"{path}: holds no mask decoder (found: {list_first_keys(content)})\n"
            "make one with python -m saliency.casm train, or pass a plain classifier by --classifier"
        )
    check_finite(path, decoder)
    classes, image_size = list(content.get("classes", [])), content.get("image_size", 224)
    shape = {"num_classes": len(classes) or 1000, "image_size": image_size}
    classifier = SavedClassifier(path, content=content).build(models, model=options["model"], **shape)
    network = CasmNetwork(classifier, build_decoder(classifier, width, upsample))
    try:
        network.decoder.load_state_dict(decoder)
    except RuntimeError as error:
        raise UserError(
            f"{path}: its decoder does not fit {options['model']}: {str(error).splitlines()[1].strip()}"
        ) from error
    mean, std = (content["mean"], content["std"]) if content.get("mean") else STATISTICS["imagenet"]
    return SavedCasm(
        path=path,
        network=network.eval().requires_grad_(False),
        classes=classes,
        mean=tuple(mean),
        std=tuple(std),
        image_size=image_size,
        options=options,
        epoch=content.get("epoch"),
    )


def rename_published_keys(decoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the decoder's state-dict keys from those of the published program to ours."""
    renamed = {}
    for key, value in decoder.items():
        module, _, rest = key.removeprefix("module.").partition(".")
        layer, _, leaf = rest.partition(".")
        if module == "final":
            renamed[f"final.{leaf}"] = value
        else:  # for example conv1x1_2.1.bias: batch norm of the second lateral
            number = int(module.removeprefix("conv1x1_")) - 1
            renamed[f"laterals.{number}.{('conv', 'bn')[int(layer)]}.{leaf}"] = value
    return renamed


def find_casm_files(paths: list[str]) -> list[Path]:
    """Return the files of --casms-path, including every .chk file of folders. Raises UserError if a path has none."""
    checkpoints = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(path.glob(f"*{SUFFIX}"))
            if not files:
                raise UserError(
                    f"--casms-path {path}: no {SUFFIX} file in this folder; make one with python -m saliency.casm "
                    "train. DATA must come before --casms-path"
                )
            checkpoints += files
        elif path.is_file():
            checkpoints.append(path)
        else:
            raise UserError(f"--casms-path {path}: no such file or folder")
    return checkpoints
