"""The classifiers that judge altered images: torchvision's, or any that we can read; and which of their classes is
which of the data's.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model_weights, list_models

from engine.classifier import SavedClassifier, torchvision_network
from engine.cli import UserError, closest
from engine.data import STATISTICS
from models import IMAGENET_MODELS, build_model, class_count, matching_models
from models.imagenet_resnet import fetch

PUBLISHED = (  # torchvision's names of the 17 networks of the published program
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
)
PRETRAINED = "IMAGENET1K_V1"
IMAGENET_CLASSES = 1000


@dataclass
class Judge:
    """Called with pixels (B, 3, H, W) in 0..1 it gives logits (B, K) float32. classes: in the order of the logits;
    empty where the file does not say. count: K.
    """

    name: str
    network: nn.Module  # in evaluation mode, without gradients
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] = field(default_factory=list)
    count: int = IMAGENET_CLASSES

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalised(pixels, self.mean, self.std)).float()


def normalised(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1 -> the same shape, as a network was trained to see it."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def load_judges(words: list[str], device: torch.device) -> list[Judge]:
    """A word is torchvision's NAME, with its ImageNet weights, NAME=FILE, with those of a file, or a file or run folder
    of ours. No two have one name. Raises UserError for anything else, and for weights that cannot be had.
    """
    words = list(dict.fromkeys(words))
    judges = [judge_of(word) for word in words]
    often = Counter(judge.name for judge in judges)
    for word, judge in zip(words, judges, strict=True):
        judge.name = word if often[judge.name] > 1 else judge.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges


def judge_of(word: str) -> Judge:
    """The judge that a word means, on the CPU."""
    names = list_models()
    name, equals, file = word.partition("=")
    if equals and name in names:
        return of_torchvision(name, SavedClassifier(file).weights, file)
    if word in names:
        url = published_weights(word).url
        try:
            return of_torchvision(word, fetch(url), url)
        except ValueError as error:
            raise UserError(f"classifier {word}: {error}, or give it as {word}=FILE") from error
    if Path(word).exists():
        return of_file(word)
    raise UserError(
        f"classifier {word!r}: neither a file, nor a run folder, nor a network of torchvision's{closest(name, names)}\n"
        "say NAME for torchvision's network with its weights for ImageNet, NAME=FILE for one with other weights"
    )


def published_weights(name: str):
    """torchvision's entry for its first ImageNet weights of a network. Raises UserError where there are none."""
    found = getattr(get_model_weights(name), PRETRAINED, None)
    if found is None:
        raise UserError(f"classifier {name}: torchvision has no {PRETRAINED} weights of it\ngive them as {name}=FILE")
    return found


def of_torchvision(name: str, weights: dict[str, torch.Tensor], path: str) -> Judge:
    """Normalised as torchvision's own weights of this network want it."""
    network = torchvision_network(name, weights, path)
    own = getattr(get_model_weights(name), PRETRAINED, None)
    mean, std = (own.transforms().mean, own.transforms().std) if own else STATISTICS["imagenet"]
    return Judge(name, network, tuple(mean), tuple(std), count=len(next(reversed(weights.values()))))


def of_file(place: str) -> Judge:
    """A classifier of ours, called after its run folder or its file."""
    file = SavedClassifier(place)
    name, fits = file.options.get("model"), matching_models(file.weights)
    if not name and not fits:
        raise UserError(
            f"{file.path}: the file does not say which network it is, and none of ours fits\n"
            f"if it is one of torchvision's, say NAME={place}"
        )
    count = class_count(file.weights)
    size = file.image_size or (224 if fits and fits[0] in IMAGENET_MODELS else 32)
    network = file.build(build_model, matching_models, model=name, num_classes=count, image_size=size)
    own = Path(place).resolve().name if Path(place).is_dir() else file.path.stem
    return Judge(own, network.eval(), *file.statistics, file.classes, count)


def load_resnets(folder: str, device: torch.device) -> list[Judge]:
    """Every file of a folder as a ResNet-50 of the PyTorch ImageNet example, called after its file. Raises UserError
    for a folder without files, and for a file of anything else.
    """
    files = [one for one in sorted(Path(folder).iterdir()) if one.is_file()] if Path(folder).is_dir() else []
    if not files:
        raise UserError(f"--resnets-path {folder}: no such folder, or no file in it")
    judges = [of_torchvision("resnet50", SavedClassifier(file).weights, str(file)) for file in files]
    for file, judge in zip(files, judges, strict=True):
        judge.name = file.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges


def label_map(
    part_classes: list[str], classes: list[str], class_list: str | None = None, count: int | None = IMAGENET_CLASSES
) -> torch.Tensor:
    """long (len(part_classes),): the position of each class of the data among those of a network; -1 where it is none
    of them.

    classes: the network's; where they are not known (empty), those of class_list, a file; and without one both are
    taken to be the same, sorted by name, if there are `count` of each: of ImageNet those sort by their WordNet ids.
    count None: of a network that takes any number. Raises UserError where that cannot be, for a class_list of other
    than `count` classes, and where no class is known.
    """
    if not classes and class_list:
        classes = read_class_list(class_list)
        if count not in (None, len(classes)):
            raise UserError(f"--class_list {class_list}: {len(classes)} classes, where the network has {count}")
    if not classes and count not in (None, len(part_classes)):
        raise UserError(
            f"the data has {len(part_classes)} classes, the network {count}, and its file does not name them\n"
            "name them, in the order of the network, in a file: --class_list FILE, one a line or a .csv with a column "
            "wnid"
        )
    place = {name: position for position, name in enumerate(classes or part_classes)}
    if not place.keys() & set(part_classes):
        raise UserError(
            f"the network knows none of the classes of the data ({', '.join(part_classes[:3])} ...): its own are "
            f"{', '.join(list(place)[:3])} ..."
        )
    return torch.tensor([place.get(name, -1) for name in part_classes])


def read_class_list(file: str) -> list[str]:
    """Classes, one a line (of a line `n01440764 tench, ...` the WordNet id alone), or in the column wnid or class of a
    .csv. Raises UserError for another file, and for a class that comes twice.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UserError(f"--class_list {file}: cannot be read ({reason})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if file.lower().endswith(".csv"):
        rows = list(csv.DictReader(lines))
        column = next((name for name in ("wnid", "class") if rows and name in rows[0]), None)
        if column is None:
            raise UserError(f"--class_list {file}: no column wnid and none called class in its first line")
        names = [row[column] for row in rows]
    else:
        names = [re.sub(r"^(n\d{8})\s.*", r"\1", line) for line in lines]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UserError(f"--class_list {file}: {twice[0]!r} is there more than once")
    return names
