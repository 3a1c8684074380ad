"""Trained classifiers from files: ours, which say what they are, or of other codes, inferred from their shapes."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from engine.data.image_set import STATISTICS, get_statistics
from engine.errors import UserError, suggest_closest
from engine.runtime.checkpoint import is_checkpoint, read_file
from engine.runtime.foreign_weights import extract_weights, load_weights


def find_best_checkpoint(path: Path | str) -> Path:
    """A file, or the best.pt of a run folder."""
    place = Path(path)
    if place.is_dir() and not (place / "best.pt").is_file():
        last = f"; its last.pt is {place / 'last.pt'}" if (place / "last.pt").is_file() else ", or the folder of a run"
        raise UserError(f"{place}: this folder holds no best.pt; give a file{last}")
    return place / "best.pt" if place.is_dir() else place


class SavedClassifier:
    """The content of a model file, or of the best.pt of a run folder. options: those it was trained with; classes,
    image_size: of its images. Empty or None if the file does not say. content: of the file, if it is read already.
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
        """Mean and std of its images; those of ImageNet if the file does not say."""
        norm, trained = self.options.get("norm", "own"), self.options.get("dataset") or "imagenet"
        return get_statistics(trained, norm)

    def build(
        self,
        build_model: Callable,
        find_matching_models: Callable,
        *,
        model: str | None,
        num_classes: int,
        image_size: int,
    ) -> torch.nn.Module:
        """The network with these weights. model None: the one whose shapes fit; `resnet50` also means the one of that
        name with the other stem. Raises UserError if none fits.
        """
        matches = find_matching_models(self.weights)
        if model:
            model = next(iter(find_matching_models(self.weights, like=model)), model)
        if not model and not matches:
            raise UserError(
                f"{self.path}: the file does not say which network it is and none of ours fits; name it with --model"
            )
        try:
            network = build_model(model or matches[0], num_classes, image_size)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        load_weights(network, self.weights, self.path, num_classes=num_classes, matches=matches)
        return network


def build_torchvision(name: str, weights: dict[str, torch.Tensor], path: Path | str) -> torch.nn.Module:
    """torchvision's classifier `name` in evaluation mode, with weights of whatever precision and number of classes, in
    float32. path: theirs. Raises UserError if they are another network's.
    """
    from torchvision.models import get_model

    if name.startswith("densenet"):  # torchvision's own files have older names
        weights = {re.sub(r"(denselayer\d+\.(norm|relu|conv))\.", r"\1", key): value for key, value in weights.items()}
    extra = {"transform_input": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = get_model(name, weights=None, num_classes=count_torchvision_classes(name, weights), **extra)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds no {name}: {str(error).splitlines()[1].strip()[:100]} ...") from error
    return network.eval()


@dataclass
class Classifier:
    """A trained network and what its file says of it. Called with pixels (B, 3, H, W) in 0..1, it returns logits (B, K)
    in float32.

    classes: in the order of the logits, empty if the file does not say; titles: the same, to be read by people.
    image_size: side in pixels of the images it was made for; None: not known. options: those it was trained with.
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
    is_torchvision: bool = False  # whether the network is one of torchvision's
    resize: int | None = None  # shorter side that images are resized to before the crop, if its weights say so

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalize(pixels, self.mean, self.std)).float()

    def title(self, index: int) -> str:
        """The name of a class, or its number if it has no name."""
        return self.titles[index] if index < len(self.titles) else str(index)


def normalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1 -> the same shape, as a network was trained to see it."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def load_classifier(
    word: str,
    models: ModuleType,
    *,
    model: str | None = None,
    image_size: int | None = None,
    averaged: bool = False,
    weights: str = "IMAGENET1K_V1",
) -> Classifier:
    """The classifier that a word means, on the CPU: a file or run folder, of ours or of another code; NAME, a network
    of torchvision with torchvision's weights; or NAME=FILE.

    models: the package models. model: the network of a file that does not say which, one of ours or torchvision's.
    image_size: of a file that does not say it. weights: which of torchvision's; later ones than the first were trained
    with Mixup and CutMix. Raises UserError for any other word, and for weights that are not available.
    """
    name, equals, file = word.partition("=")
    if Path(word).exists() or not (equals or is_torchvision_model(word)):
        name, file = model, word
    if not file:
        return load_torchvision(name, None, models, weights)
    if not Path(file).exists() and not equals and model is None:
        raise UserError(
            f"classifier {word!r}: no such file or run folder, and no network of torchvision's"
            f"{suggest_closest(word, torchvision_names())}\nsay NAME for torchvision's network with its weights for "
            f"ImageNet, NAME=FILE for one with other weights"
        )
    saved = SavedClassifier(file, averaged=averaged)
    fits = models.find_matching_models(saved.weights, like=name)
    if not fits and name and is_torchvision_model(name):
        return load_torchvision(name, saved, models, weights)
    if name and name not in models.MODELS and name not in models.ALIASES and not fits:
        names = [*models.MODELS, *torchvision_names()]
        raise UserError(f"--model {name}: neither ours nor torchvision's{suggest_closest(name, names)}")
    if not (name := name or saved.options.get("model")) and not fits:
        raise UserError(
            f"{saved.path}: the file does not say which network it is, and none of ours fits\nname it with --model; if "
            f"it is one of torchvision's, say NAME={file}"
        )
    side = image_size or saved.image_size or (224 if fits and fits[0] in models.IMAGENET_MODELS else 32)
    return build_saved(saved, name, models, side, Path(file).resolve().name if Path(file).is_dir() else saved.path.stem)


def build_saved(
    saved: SavedClassifier, model: str | None, models: ModuleType, image_size: int, name: str
) -> Classifier:
    """The classifier of a file, as one of our networks. model: see SavedClassifier.build(). name: of the classifier."""
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


def make_names_unique(classifiers: list[Classifier]) -> None:
    """Extend names that are not unique by folders of their paths, as many as it takes. The same file keeps one name."""
    for count in range(2, max(len(Path(one.path).parts) for one in classifiers) + 1):
        uses = Counter(name for name, _ in {(one.name, one.path) for one in classifiers})
        for one in classifiers:
            if uses[one.name] > 1:
                one.name = str(Path(*Path(one.path).parts[-count:]))


def torchvision_names() -> list[str]:
    from torchvision.models import list_models

    return list_models()


def is_torchvision_model(name: str) -> bool:
    """Whether torchvision has a classifier of this name."""
    from torchvision import models as torchvision_models

    return name in torchvision_models.list_models(module=torchvision_models)


def load_torchvision(name: str, saved: SavedClassifier | None, models: ModuleType, weights: str) -> Classifier:
    """torchvision's network with the weights of a file, else its own. Images are normalised as for its own weights."""
    from torchvision.models import get_model_weights

    own = get_model_weights(name).__members__.get(weights)
    if saved is None and own is None:
        available = ", ".join(one.name for one in get_model_weights(name)) or "none"
        raise UserError(
            f"classifier {name}: torchvision has no {weights} weights of it (there are: {available})\n"
            f"give them as {name}=FILE"
        )
    try:
        state = saved.weights if saved else models.download_weights(own.url)
    except ValueError as error:
        raise UserError(f"classifier {name}: {error}, or give it as {name}=FILE") from error
    path = str(saved.path) if saved else own.url
    network = build_torchvision(name, state, path)
    num_classes = count_torchvision_classes(name, state)
    titles = list(own.meta["categories"]) if own and len(own.meta["categories"]) == num_classes else []
    mean, std = map(tuple, (own.transforms().mean, own.transforms().std) if own else STATISTICS["imagenet"])
    side, resize = (own.transforms().crop_size[0], own.transforms().resize_size[0]) if own else (224, 256)
    classifier = Classifier(
        name, network, mean, std, num_classes=num_classes, image_size=side, titles=titles, path=path
    )
    classifier.is_torchvision, classifier.resize = True, resize
    return classifier


def count_torchvision_classes(name: str, weights: dict[str, torch.Tensor]) -> int:
    """The number of classes that weights of torchvision's network `name` are for; 1000 if they lack its last layer."""
    from torchvision.models import get_model

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        layers = get_model(name, weights=None, **extra).named_modules()
        linear = [key for key, layer in layers if count_outputs(layer) == 1000]
    head = weights.get(f"{linear[-1]}.weight") if linear else None
    return 1000 if head is None else len(head)


def count_outputs(layer: torch.nn.Module) -> int:
    """Outputs of a layer that may be a classifier's last one; 0 for other layers."""
    if isinstance(layer, torch.nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, torch.nn.Conv2d) else 0
