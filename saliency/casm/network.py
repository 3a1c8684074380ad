"""A classifier and the decoder that reads its maps, together and out of a file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.checkpoint import first_keys, is_ours, read_file
from engine.classifier import SavedClassifier
from engine.cli import UserError
from engine.data import STATISTICS
from models import build_model, matching_models
from saliency.casm.decoder import MaskDecoder

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
        return made_of(Path(path), content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no mask decoder of ours or of the published program ({type(error).__name__}: {error})\n"
            "make one with python -m saliency.casm train"
        ) from error


def made_of(path: Path, content) -> SavedCasm:
    """What load_casm makes of the content of a file."""
    if is_ours(content) and "decoder" in content:
        options = content["config"]
        decoder, width, upsample = content["decoder"], options["width"], options["upsample"]
    elif isinstance(content, dict) and "state_dict_decoder" in content:
        options = {"model": PUBLISHED}
        decoder, width = renamed(content["state_dict_decoder"]), 64
        upsample = getattr(content.get("args"), "upsample", "nearest")
    else:
        raise UserError(
            f"{path}: holds no mask decoder (found: {first_keys(content)})\n"
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


def renamed(decoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
