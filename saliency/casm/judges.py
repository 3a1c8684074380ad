"""The classifiers that judge altered images: torchvision's, or any that we can read."""

from collections import Counter
from pathlib import Path

import torch

import models
from engine.classifier import Classifier, load_classifier
from engine.cli import UserError

PUBLISHED = (  # torchvision's names of the 17 networks of the published program
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
)
IMAGENET_CLASSES = 1000


def load_judges(words: list[str], device: torch.device) -> list[Classifier]:
    """A word is torchvision's NAME, with its ImageNet weights, NAME=FILE, with those of a file, or a file or run folder
    of ours. No two have one name. Raises UserError for anything else, and for weights that cannot be had.
    """
    words = list(dict.fromkeys(words))
    judges = [load_classifier(word, models) for word in words]
    often = Counter(judge.name for judge in judges)
    for word, judge in zip(words, judges, strict=True):
        judge.name = word if often[judge.name] > 1 else judge.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges


def load_resnets(folder: str, device: torch.device) -> list[Classifier]:
    """Every file of a folder as a ResNet-50 of the PyTorch ImageNet example, called after its file. Raises UserError
    for a folder without files, and for a file of anything else.
    """
    files = [one for one in sorted(Path(folder).iterdir()) if one.is_file()] if Path(folder).is_dir() else []
    if not files:
        raise UserError(f"--resnets-path {folder}: no such folder, or no file in it")
    judges = [load_classifier(str(file), models, model="resnet50") for file in files]
    for file, judge in zip(files, judges, strict=True):
        judge.name = file.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges
