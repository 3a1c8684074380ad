"""Load trained classifiers from files: our checkpoints, which name their network, or weights of other codes.

For the latter, the network is inferred from the tensor shapes.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from engine.data.image_set import STATISTICS, get_statistics
from engine.errors import UserError, explain_missing, suggest_closest
from engine.runtime.checkpoint import is_checkpoint, read_file
from engine.runtime.foreign_weights import extract_weights, load_weights
from engine.runtime.text import tell_apart

# trained on pixels in -1..1; torchvision's transform_input turns images normalised for ImageNet into these
HALF_SCALED = ("googlenet", "inception_v3")


def find_best_checkpoint(path: Path | str) -> Path:
    """Return the path itself if it is a file, or the best.pt of a run folder. Raises UserError if that is missing."""
    path = Path(path)
    if path.is_dir() and not (path / "best.pt").is_file():
        last = f", such as {path / 'last.pt'}" if (path / "last.pt").is_file() else " or a run folder that has one"
        raise UserError(f"{path}: this folder contains no best.pt; give a checkpoint file{last}")
    return path / "best.pt" if path.is_dir() else path


class SavedClassifier:
    """The content of a model file, or of the best.pt of a run folder.

    options: options of the training run. classes, image_size: of the training images. All are empty or None if the file
    does not store them. averaged: use the averaged (EMA) weights. content: content of the file, if already read.
    """

    def __init__(self, path: Path | str, averaged: bool = False, content: dict | None = None):
        self.path = find_best_checkpoint(path)
        content = read_file(self.path) if content is None else content
        self.weights = extract_weights(content, self.path, averaged=averaged)
        self.options = content["config"] if is_checkpoint(content) else {}
        ours = content if is_checkpoint(content) else {}
        self.classes: list[str] = ours.get("classes", [])
        self.image_size: int | None = ours.get("image_size")
        self.best: dict | None = ours.get("best")
        epoch = content.get("epoch") if isinstance(content, dict) else None
        self.epoch = epoch if isinstance(epoch, int) else None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the training images; those of ImageNet if the file does not store them."""
        norm, dataset = self.options.get("norm", "own"), self.options.get("dataset") or "imagenet"
        return get_statistics(dataset, norm)

    def build(
        self,
        build_model: Callable,
        find_matching_models: Callable,
        *,
        model: str | None,
        num_classes: int,
        image_size: int,
    ) -> torch.nn.Module:
        """Build the network and load the weights.

        model: name of the network; None: the network whose tensor shapes match. A name such as `resnet50` also matches
        the network with the other stem, `imagenet_resnet50`. Raises UserError if no network matches.
        """
        matches = find_matching_models(self.weights)
        if model:
            model = next(iter(find_matching_models(self.weights, like=model)), model)
        if not model and not matches:
            raise UserError(
                f"{self.path}: the file does not name its network, and its tensors match none of ours; "
                "name the network with --model"
            )
        try:
            network = build_model(model or matches[0], num_classes, image_size)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        load_weights(network, self.weights, self.path, num_classes=num_classes, matches=matches)
        return network


def build_torchvision(name: str, weights: dict[str, torch.Tensor], path: Path | str) -> torch.nn.Module:
    """Build torchvision's classifier `name` in evaluation mode and float32 with the given weights.

    The weights may have any precision and number of classes. path: their origin, for messages. Raises UserError if they
    are of another network.
    """
    from torchvision.models import get_model

    if name.startswith("densenet"):  # torchvision's own files use the old key names
        weights = {re.sub(r"(denselayer\d+\.(norm|relu|conv))\.", r"\1", key): value for key, value in weights.items()}
    arguments = infer_arguments(name, weights)
    network = get_model(name, weights=None, **arguments)
    head, layer = last_layer(network)
    num_classes = len(weights.get(f"{head}.weight", layer.weight))
    if num_classes != len(layer.weight):
        network = get_model(name, weights=None, num_classes=num_classes, **arguments)
    state = OrderedDict(weights)
    state._metadata = {"": {"version": network._version}}  # MNASNet loads nothing without it
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold a {name}: {str(error).splitlines()[1].strip()[:100]} ...") from error
    return network.eval()


@dataclass
class Classifier:
    """A trained network with the metadata of its file. It maps pixels (B, 3, H, W) in 0..1 to float32 logits (B, K).

    classes: class names in the order of the logits; empty if the file does not store them. titles: class names to
    display. image_size: side in pixels of its training images; None: unknown. options: options of the training run.
    """

    name: str
    network: torch.nn.Module  # in evaluation mode
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] = field(default_factory=list)
    num_classes: int = 1000  # K
    image_size: int | None = None
    titles: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    path: str = ""
    epoch: int | None = None
    is_torchvision: bool = False  # whether the network is from torchvision
    resize: int | None = None  # shorter side before the crop, if its weights define it
    norm_note: str = ""  # what was assumed of the normalisation

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalize(pixels, self.mean, self.std)).float()

    def title(self, index: int) -> str:
        """Return the name of a class, or its index if it has no name."""
        return self.titles[index] if index < len(self.titles) else str(index)


def normalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Normalise pixels (B, 3, H, W) in 0..1 with mean and std."""
    mean, std = (make_channel_constant(tuple(values), pixels.device) for values in (mean, std))
    return (pixels - mean) / std


@lru_cache(maxsize=64)
def make_channel_constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return one number per channel as a tensor (3, 1, 1). It is made once per device, since each copy would wait."""
    with torch.inference_mode(False):  # so that a pass with gradients can use it, too
        return torch.tensor(values, device=device).view(3, 1, 1)


def load_classifier(
    name_or_path: str,
    models: ModuleType,
    *,
    model: str | None = None,
    image_size: int | None = None,
    averaged: bool = False,
    weights: str = "IMAGENET1K_V1",
) -> Classifier:
    """Load a classifier on the CPU.

    name_or_path: a file or run folder, of this repository or of other codes; NAME, a torchvision network with
    torchvision's weights; or NAME=FILE. models: the package models. model: network of a file that does not name it, one
    of ours or torchvision's. image_size: for a file that does not store it. weights: which weights of torchvision to
    use; later ones than IMAGENET1K_V1 were trained with Mixup and CutMix. Raises UserError for any other name_or_path,
    and for weights that are not available.
    """
    # ---- A torchvision network with its own weights ----
    name, equals, file = name_or_path.partition("=")
    if Path(name_or_path).exists() or not (equals or is_torchvision_model(name_or_path)):
        name, file = model, name_or_path
    if not file:
        return load_torchvision(name, None, models, weights)
    if not Path(file).exists() and not equals and model is None:
        unknown = (
            "no such file or run folder, and no torchvision network has this name"
            f"{suggest_closest(name_or_path, list_torchvision_models())}\ngive NAME for a torchvision network with its "
            f"ImageNet weights, or NAME=FILE for one with other weights"
        )
        raise UserError(f"classifier {name_or_path!r}: {explain_missing(name_or_path, unknown)}")
    # ---- A file: one of our networks, or else torchvision's ----
    saved = SavedClassifier(file, averaged=averaged)
    matches = models.find_matching_models(saved.weights, like=name)
    if not matches and name and is_torchvision_model(name):
        return load_torchvision(name, saved, models, weights)
    if name and name not in models.MODELS and name not in models.ALIASES and not matches:
        names = [*models.MODELS, *list_torchvision_models()]
        raise UserError(
            f"--model {name}: neither one of our networks nor one of torchvision's{suggest_closest(name, names)}"
        )
    if not (name := name or saved.options.get("model")) and not matches:
        raise UserError(
            f"{saved.path}: the file does not name its network, and its tensors match none of ours\nname the network "
            f"with --model; for a torchvision network, give NAME={file}"
        )
    side = image_size or saved.image_size or (224 if matches and matches[0] in models.IMAGENET_MODELS else 32)
    return build_saved(saved, name, models, side, Path(file).resolve().name if Path(file).is_dir() else saved.path.stem)


def build_saved(
    saved: SavedClassifier, model: str | None, models: ModuleType, image_size: int, name: str
) -> Classifier:
    """Build the classifier of a file as one of our networks. model: see SavedClassifier.build(). name: display name."""
    num_classes = models.count_classes(saved.weights)
    network = saved.build(
        models.build_model, models.find_matching_models, model=model, num_classes=num_classes, image_size=image_size
    )
    return Classifier(
        name,
        network.eval(),
        *saved.statistics,
        classes=saved.classes,
        num_classes=num_classes,
        image_size=image_size,
        titles=saved.classes,
        options=saved.options,
        path=str(saved.path),
        epoch=saved.epoch,
    )


@contextmanager
def translate_errors(name: str, size: int) -> Iterator[None]:
    """Raise UserError for errors of the classifier `name`, also if it takes no images of `size` pixels."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if "memory" in str(error) or "CUDA" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name} cannot take images of {size} pixels ({reason})\nset another --image_size") from error


def make_names_unique(classifiers: list[Classifier]) -> None:
    """Prefix ambiguous names with as many folders of their paths as necessary. The same file keeps one name."""
    names = tell_apart([one.name for one in classifiers], [Path(one.path) for one in classifiers])
    for one, name in zip(classifiers, names, strict=True):
        one.name = name


def list_torchvision_models() -> list[str]:
    """List the names of all torchvision models."""
    from torchvision.models import list_models

    return list_models()


def is_torchvision_model(name: str) -> bool:
    """Return whether torchvision has a classifier with this name."""
    from torchvision import models as torchvision_models

    return name in torchvision_models.list_models(module=torchvision_models)


def load_torchvision(name: str, saved: SavedClassifier | None, models: ModuleType, weights: str) -> Classifier:
    """Build torchvision's network with the weights of a file, or else with its own pretrained weights.

    Images are normalised as for the pretrained weights in both cases. Raises UserError if there are no weights.
    """
    from torchvision.models import get_model_weights

    preset = get_model_weights(name).__members__.get(weights)
    if saved is None and preset is None:
        available = ", ".join(one.name for one in get_model_weights(name)) or "none"
        raise UserError(
            f"classifier {name}: torchvision has no {weights} weights for it (available: {available})\n"
            f"give a file of weights as {name}=FILE"
        )
    try:
        state = saved.weights if saved else models.download_weights(preset.url)
    except ValueError as error:
        raise UserError(f"classifier {name}: {error}, or give a file of weights as {name}=FILE") from error
    path = str(saved.path) if saved else preset.url
    network = build_torchvision(name, state, path)
    num_classes = len(last_layer(network)[1].weight)
    titles = list(preset.meta["categories"]) if preset and len(preset.meta["categories"]) == num_classes else []
    mean, std = map(tuple, (preset.transforms().mean, preset.transforms().std) if preset else STATISTICS["imagenet"])
    side, resize = (preset.transforms().crop_size[0], preset.transforms().resize_size[0]) if preset else (224, 256)
    if getattr(network, "image_size", side) != side:  # a ViT, which takes images of one size
        side = resize = network.image_size
    note = ""
    if name in HALF_SCALED:
        mean, std = STATISTICS["half"]
        note = (
            f"{path}: images are scaled to -1..1, as for torchvision's weights of {name}; --norm imagenet is for "
            "weights trained without transform_input"
        )
    classifier = Classifier(
        name, network, mean, std, num_classes=num_classes, image_size=side, titles=titles, path=path
    )
    classifier.is_torchvision, classifier.resize, classifier.norm_note = True, resize, note if saved else ""
    return classifier


def infer_arguments(name: str, weights: dict[str, torch.Tensor]) -> dict:
    """Return the arguments of torchvision's constructor `name` that the weights imply, apart from num_classes."""
    if name in HALF_SCALED:  # files from other code often lack the auxiliary classifiers
        return {"init_weights": False, "aux_logits": any(key.lower().startswith("aux") for key in weights)}
    if name.startswith("vit_") and {"encoder.pos_embedding", "conv_proj.weight"} <= weights.keys():
        grid = math.isqrt(weights["encoder.pos_embedding"].shape[1] - 1)  # one more for the class token
        return {"image_size": grid * weights["conv_proj.weight"].shape[-1]}
    return {}


def last_layer(network: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """Return the name and the module of the last linear layer or convolution of one of torchvision's classifiers."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, kinds)][-1]
