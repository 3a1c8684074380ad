"""Load trained classifiers: from our checkpoints, which name their network, from weights of other codes, or by the name
of a network of torchvision or timm.

The network of a file without a name is inferred from the tensor shapes if it is one of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

from engine.config.phases import LARGE_SIDE
from engine.data.class_names import read_titles
from engine.data.datasets import get_default_view
from engine.data.image_set import get_statistics
from engine.errors import UserError, explain_missing, get_first_error_line, suggest_closest
from engine.runtime.checkpoint import is_checkpoint, read_file
from engine.runtime.foreign_weights import extract_weights, load_weights
from engine.runtime.text import get_distinct_names


def find_best_checkpoint(path: Path | str) -> Path:
    """Return the path itself if it is a file, or the best.pt of a run folder. Raises UserError if that is missing."""
    path = Path(path)
    if path.is_dir() and not (path / "best.pt").is_file():
        last = f", such as {path / 'last.pt'}" if (path / "last.pt").is_file() else " or a run folder that has one"
        raise UserError(f"{path}: this folder contains no best.pt; give a checkpoint file{last}")
    return path / "best.pt" if path.is_dir() else path


class SavedClassifier:
    """The content of a model file, or of the best.pt of a run folder.

    options: options of the training run. model, model_args: its network. classes, num_classes, image_size: of the
    training images. titles: class names to display. All are empty or None if the file does not store them. averaged:
    use the averaged (EMA) weights. content: content of the file, if already read.
    """

    def __init__(self, path: Path | str, averaged: bool = False, content: dict | None = None):
        self.path = find_best_checkpoint(path)
        content = read_file(self.path) if content is None else content
        self.weights = extract_weights(content, self.path, averaged=averaged)
        ours = content if is_checkpoint(content) else {}
        self.options: dict = ours.get("config", {})
        self.model: str | None = self.options.get("model")
        self.model_args: dict = self.options.get("model_args") or {}
        self.classes: list[str] = ours.get("classes", [])
        self.titles: list[str] = ours.get("titles", self.classes)
        self.num_classes: int | None = ours.get("num_classes") or len(self.classes) or None
        self.image_size: int | None = ours.get("image_size")
        self.best: dict | None = ours.get("best")
        self.mean, self.std = ours.get("mean"), ours.get("std")
        epoch = content.get("epoch") if isinstance(content, dict) else None
        self.epoch = epoch if isinstance(epoch, int) else None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the training images; those of ImageNet if the file does not store them."""
        if self.mean and self.std:
            return tuple(self.mean), tuple(self.std)
        return get_statistics(self.options.get("dataset") or "imagenet", self.options.get("norm", "own"))

    def list_network_options(self) -> list[str]:
        """Return a list with the --model and --model_args of the network that the file names, or an empty list."""
        arguments = " ".join(f"{key}={value}" for key, value in self.model_args.items())
        return [f"{self.model} --model_args {arguments}" if arguments else self.model] if self.model else []

    def choose_arguments(self, name: str, model_args: dict | None) -> dict:
        """Return the arguments of the constructor of the network `name`: model_args, or those of the file if None."""
        return (self.model_args if name == self.model else {}) if model_args is None else model_args

    def identify(self, models: ModuleType, model: str | None = None) -> str:
        """Return the name of the network: `model`, else the one that the file names, else the one whose tensor shapes
        match.

        A name such as `resnet50` also matches the network with the other stem, `imagenet_resnet50`. Raises UserError
        for an unknown name, and if no network matches.
        """
        name = model or self.model
        if matches := models.find_matching_models(self.weights, like=name):
            return matches[0]
        if not name:
            raise UserError(
                f"{self.path}: the file does not name its network, and its tensors match none of ours\n"
                f"name the network with --model; for one of torchvision or timm, give NAME={self.path}"
            )
        try:
            return models.find_model_name(name)
        except ValueError as error:
            raise UserError(f"--model {name}: {error}" if model else f"{self.path}: {error}") from error

    def build(
        self,
        models: ModuleType,
        *,
        model: str | None = None,
        model_args: dict | None = None,
        num_classes: int,
        image_size: int,
    ) -> torch.nn.Module:
        """Build the network and load the weights.

        models: the package models. model: see identify(). model_args: arguments of its constructor; None: those of the
        file if it names this network. Raises UserError if no network matches or the weights do not fit.
        """
        name = self.identify(models, model)
        try:
            network = models.build_model(
                name, num_classes, image_size, model_args=self.choose_arguments(name, model_args)
            )
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        weights = models.convert_weights(name, self.weights)
        shape = {"num_classes": num_classes, "heads": models.find_heads(network)}
        load_weights(network, weights, self.path, name=name, matches=models.find_matching_models(weights), **shape)
        return network


@dataclass
class Classifier:
    """A trained network with the metadata of its file. It maps pixels (B, 3, H, W) in 0..1 to float32 logits (B, K).

    classes: class names in the order of the logits; empty if the file does not store them. titles: class names to
    display. image_size: side in pixels of its training images; None: unknown. options: options of the training run.
    """

    name: str  # to display
    network: torch.nn.Module  # in evaluation mode
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str] = field(default_factory=list)
    num_classes: int = 1000  # K
    image_size: int | None = None
    titles: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    path: str = ""
    model: str = ""  # name of the network; of a library: LIBRARY:NAME
    model_args: dict = field(default_factory=dict)  # of its constructor
    epoch: int | None = None
    knows_norm: bool = True  # whether mean and std are those of its training, not assumed
    knows_size: bool = True  # the same for image_size
    norm_note: str = ""  # what was assumed of the normalisation
    resize: int | None = None  # shorter side of its test images before the centre crop; None: unknown
    interpolation: str | None = None  # how its images are resized, if its weights or its run define it

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalize(pixels, self.mean, self.std)).float()

    @torch.no_grad()
    def check_size(self, size: int) -> None:
        """Raise UserError if the network takes no images of `size` pixels, as a vision transformer may."""
        like = next(self.network.parameters(), torch.empty(0))
        with translate_errors(self.name, size):
            self.network(torch.zeros(1, 3, size, size, device=like.device))

    def set_titles(self, file: str, option: str) -> None:
        """Read the class names to display from the file of an option. Raises UserError as read_titles() does."""
        self.titles = read_titles(file, option, self.num_classes, self.name)

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
    model_args: dict | None = None,
    image_size: int | None = None,
    averaged: bool = False,
    weights: str = "IMAGENET1K_V1",
) -> Classifier:
    """Load a classifier on the CPU.

    name_or_path: a file or run folder, of this repository or of other codes; torchvision:NAME, timm:NAME or a plain
    NAME of torchvision, with the pretrained weights of the library; or NAME=FILE. models: the package models. model,
    model_args: the network of a file that does not name it. image_size: for a file that does not store it. weights:
    which weights of torchvision to use; later ones than IMAGENET1K_V1 were trained with Mixup and CutMix. Raises
    UserError for any other name_or_path, and for weights that are not available.
    """
    name, file = split_name_and_file(name_or_path, models)
    if not file:
        return load_pretrained(name, models, weights=weights, model_args=model_args, title=name_or_path)
    if not (name or model or Path(file).exists()):
        unknown = (
            "no such file or run folder, and no torchvision network has this name"
            f"{suggest_closest(name_or_path, models.list_torchvision_names())}\ngive torchvision:NAME or timm:NAME for "
            "a network with its pretrained weights, or NAME=FILE for one with other weights"
        )
        raise UserError(f"classifier {name_or_path!r}: {explain_missing(name_or_path, unknown)}")
    saved = SavedClassifier(file, averaged=averaged)
    title = Path(file).resolve().name if Path(file).is_dir() else saved.path.stem
    given = {"model": name or model, "model_args": model_args, "image_size": image_size}
    return build_saved(saved, models, title=name or title, **given)


def split_name_and_file(name_or_path: str, models: ModuleType) -> tuple[str | None, str | None]:
    """Split NAME=FILE. The full name of a library's network has no file; a path that exists and any other word is a
    file without a name.

    Raises UserError for an unknown LIBRARY:NAME.
    """
    name, equals, file = name_or_path.partition("=")
    if Path(name_or_path).exists():
        return None, name_or_path
    if equals and file:
        return name, file
    try:
        library_name = models.find_library_name(name)
    except ValueError as error:
        raise UserError(f"classifier {name_or_path!r}: {error}") from error
    return (library_name, None) if library_name else (None, name_or_path)


def build_saved(
    saved: SavedClassifier,
    models: ModuleType,
    *,
    model: str | None,
    model_args: dict | None,
    image_size: int | None,
    title: str,
) -> Classifier:
    """Build the classifier of a file. title: its name to display. The others: see load_classifier()."""
    name, inputs = saved.identify(models, model), None
    if models.split_model_name(name)[0]:  # some of these networks are built for one image size
        inputs = models.get_input_settings(name)
        side = saved.image_size or models.infer_image_size(saved.weights) or image_size or inputs.size
    else:
        side = image_size or saved.image_size or (224 if name in models.IMAGENET_MODELS else 32)
    num_classes = saved.num_classes or models.count_classes(saved.weights, name) or 1000
    network = saved.build(models, model=name, model_args=model_args, num_classes=num_classes, image_size=side)
    classifier = Classifier(
        title,
        network.eval(),
        *saved.statistics,
        classes=saved.classes,
        num_classes=num_classes,
        image_size=side,
        titles=saved.titles,
        options=saved.options,
        path=str(saved.path),
        model=name,
        model_args=saved.choose_arguments(name, model_args),
        epoch=saved.epoch,
        knows_norm=bool(saved.options),
        knows_size=bool(inputs or image_size or saved.image_size),
        resize=find_eval_resize(saved, side),
        interpolation=saved.options.get("interpolation"),
    )
    if inputs and not saved.options:  # weights of the library, or made by another code for its network
        set_inputs(classifier, inputs)
        classifier.titles = models.get_class_titles(name, num_classes)
        if inputs.transform_input:
            classifier.norm_note = (
                f"{saved.path}: images are scaled to -1..1, as for torchvision's weights of {title}; --norm imagenet "
                "is for weights trained without transform_input"
            )
    return classifier


def find_eval_resize(saved: SavedClassifier, side: int) -> int:
    """Return the shorter side of the test images before the crop of `side` pixels.

    It is that of the training run, in proportion if `side` is another than there; for weights of other codes, the usual
    one of ImageNet or of small images.
    """
    if saved.image_size and (trained := saved.options.get("eval_resize")):
        return round(trained * side / saved.image_size)
    dataset = saved.options.get("dataset") or ("imagenet" if side > LARGE_SIDE else "folder")
    return get_default_view(dataset, side, None).resize


def load_pretrained(name: str, models: ModuleType, *, weights: str, model_args: dict | None, title: str) -> Classifier:
    """Build the network LIBRARY:NAME with the weights of its library. The parameters are those of build_saved().

    Raises UserError if there are no weights.
    """
    try:
        network, url = models.build_pretrained(name, weights, model_args)
    except ValueError as error:
        other = ", or give" if "\n" in str(error) else "\ngive"
        raise UserError(f"classifier {title}: {error}{other} a file of weights as {title}=FILE") from error
    inputs = models.get_input_settings(name, weights)
    num_classes = len(network.get_submodule(models.find_heads(network)[0]).weight)
    classifier = Classifier(title, network.eval(), inputs.mean, inputs.std, num_classes=num_classes)
    classifier.path, classifier.model, classifier.model_args = url, name, model_args or {}
    classifier.image_size = models.infer_image_size(network.state_dict()) or inputs.size
    classifier.titles = models.get_class_titles(name, num_classes, weights)
    set_inputs(classifier, inputs)
    return classifier


def set_inputs(classifier: Classifier, inputs) -> None:
    """Prepare images as for pretrained weights. inputs: what models.get_input_settings() returned."""
    classifier.mean, classifier.std, classifier.knows_norm = inputs.mean, inputs.std, True
    classifier.interpolation = inputs.interpolation
    classifier.resize = inputs.resize if classifier.image_size == inputs.size else classifier.image_size


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
        reason = get_first_error_line(error)
        raise UserError(f"{name} cannot take images of {size} pixels ({reason})\nset another --image_size") from error


def make_names_unique(classifiers: list[Classifier]) -> None:
    """Prefix ambiguous names with as many folders of their paths as necessary. The same file keeps one name.

    Two run folders become none/seed_0 and cutmix/seed_0, two files none/best.pt and cutmix/best.pt.
    """
    names, paths = [one.name for one in classifiers], [Path(one.path) for one in classifiers]
    paths = [path.parent if name == path.parent.name else path for name, path in zip(names, paths, strict=True)]
    names = get_distinct_names(names, paths)
    for one, name in zip(classifiers, names, strict=True):
        one.name = name
