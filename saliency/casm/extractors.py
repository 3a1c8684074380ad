"""Extractors produce the masks to score: trained decoders, saliency sources, naive masks, or a user's Python file."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import Classifier, translate_errors
from saliency import build_source
from saliency.casm.boxes import find_rectangles
from saliency.casm.network import SavedCasm

REQUIRED_FUNCTIONS = ("load_model", "get_masks_and_check_predictions")
CENTER_BOX_SIDE = 158 / 224  # fraction of the image side, as published: half of the area
NAIVE_MASKS = ("max", "center")  # score --toy
TOY_MASKS = ("zero", "one", "random56", "random224")  # eval --toy


@dataclass
class MaskBatch:
    """The masks of a batch.

    masks (B, H, W) float in 0..1, on the device; correct (B,) bool: whether the classifier is right; rectangles (B, 4)
    as y1, y2, x1, x2, if the extractor computes its own.
    """

    masks: torch.Tensor
    correct: torch.Tensor
    rectangles: torch.Tensor | None = None


ExtractFunction = Callable[[torch.Tensor, torch.Tensor], MaskBatch]


@dataclass
class Extractor:
    """A named source of masks.

    extract: maps normalized images (B, 3, H, W) and labels (B,), -1 for unknown classes, to a MaskBatch. classes: in
    the order of its labels; empty if unknown. options: those it was trained with, as far as they are known. path: the
    file that it was loaded from. num_classes: of its network; None if it takes any number.
    """

    name: str
    extract: ExtractFunction | None
    mean: tuple[float, ...] = STATISTICS["imagenet"][0]
    std: tuple[float, ...] = STATISTICS["imagenet"][1]
    image_size: int | None = None
    classes: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    path: str = ""
    classifier: torch.nn.Module | None = None
    num_classes: int | None = None


def build_casm_extractor(saved: SavedCasm, device: torch.device) -> Extractor:
    """Return the extractor of a trained mask decoder, on the device."""
    network = saved.network.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        masks, logits = network(images)
        return MaskBatch(masks[:, 0], logits.argmax(1) == labels)

    return Extractor(
        name=saved.name,
        extract=extract,
        mean=saved.mean,
        std=saved.std,
        image_size=saved.image_size,
        classes=saved.classes,
        options=saved.options,
        path=str(saved.path),
        classifier=network.classifier,
        num_classes=len(saved.classes) or 1000,
    )


def wrap_classifier(classifier: Classifier, device: torch.device) -> Extractor:
    """Wrap a classifier, on the device, as a base for other extractors. It has no masks of its own."""
    return Extractor(
        name=classifier.name,
        extract=None,
        mean=classifier.mean,
        std=classifier.std,
        image_size=classifier.image_size,
        classes=classifier.classes,
        options=classifier.options,
        path=classifier.path,
        classifier=classifier.network.to(device, memory_format=torch.channels_last).requires_grad_(False),
        num_classes=classifier.num_classes,
    )


def build_source_extractor(name: str, base: Extractor) -> Extractor:
    """Return an extractor of the maps of a saliency source that reads the classifier of `base`.

    Class-specific sources get the true class. Each map is divided by its maximum. Raises UserError if the network
    has no such maps.
    """
    network = base.classifier
    try:
        source = build_source(name, model=network, mean=base.mean, std=base.std, image_size=base.image_size)
    except ValueError as error:
        raise UserError(f"--sources {name}: {error}") from error

    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        with torch.no_grad(), translate_errors(base.name, images.shape[-1]):
            logits = network(images)
        targets = F.one_hot(labels.clamp_min(0), logits.shape[1]).float()
        maps = source(images, targets).float()
        peaks = maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)  # an all-zero map stays zero
        return MaskBatch(maps / peaks, logits.argmax(1) == labels)

    return replace(base, name=f"{name} of {base.name}", extract=extract)


def build_naive_extractor(name: str, base: Extractor | None = None, *, seed: int = 0) -> Extractor:
    """Return an extractor of a published naive mask, for images as `base` takes them.

    `max` and `one` select the whole image, `center` a central box of half its area, and `zero` nothing. `random56` and
    `random224` toss a fair coin for each block of height // 56 pixels or for each pixel. For `max` and `center` the
    classifier of `base` decides which images are correct. Without one, and for the other masks, all images count as
    correct, as published.
    """
    generator = torch.Generator().manual_seed(seed)
    classifier = base.classifier if base and name in NAIVE_MASKS else None

    def draw_masks(count: int, height: int, width: int) -> torch.Tensor:
        if name in ("max", "one"):
            return torch.ones(count, height, width)
        masks = torch.zeros(count, height, width)
        if name == "center":
            top, left = (round(side * (1 - CENTER_BOX_SIDE) / 2) for side in (height, width))
            masks[:, top : height - top, left : width - left] = 1
        elif name != "zero":
            side = max(1, height // 56) if name == "random56" else 1
            coins = torch.rand(count, -(-height // side), -(-width // side), generator=generator) < 0.5
            masks = coins.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width].float()
        return masks

    @torch.no_grad()
    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        masks = draw_masks(len(images), *images.shape[-2:]).to(images.device)
        correct = classifier(images).argmax(1) == labels if classifier else torch.ones_like(labels, dtype=torch.bool)
        return MaskBatch(masks, correct)

    return replace(base, name=name, extract=extract) if base else Extractor(name, extract)


def load_basics_extractor(file: str, path: str) -> Extractor:
    """Load an extractor from a Python file that defines load_model(path) and get_masks_and_check_predictions(images,
    targets, model).

    The second function takes NumPy arrays: images (B, 3, H, W) float32, normalized, and targets (B,), -1 for unknown
    classes. It returns masks (B, H, W) in 0..1, rectangles (B, H, W) of 0 and 1, and whether the predictions are
    correct, (B,). The file may also define image_size, mean and std (of pixels in 0..1) and classes. Raises UserError
    if the file cannot be run or lacks one of the two functions.
    """
    if not Path(file).is_file():
        raise UserError(f"--basics {file}: no such file")
    try:
        spec = importlib.util.spec_from_loader(Path(file).stem, SourceFileLoader(Path(file).stem, file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--basics {file}: cannot run this file ({type(error).__name__}: {error})") from error
    names = vars(module)
    if missing := [name for name in REQUIRED_FUNCTIONS if not callable(names.get(name))]:
        raise UserError(
            f"--basics {file}: no function {' and no '.join(missing)}; define {' and '.join(REQUIRED_FUNCTIONS)}"
        )
    try:
        model = module.load_model(path)
    except Exception as error:
        raise UserError(
            f"--basics {file}: load_model({path!r}) failed ({type(error).__name__}: {error})\nits argument is the "
            "path given by --casms-path"
        ) from error

    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        try:
            outputs = module.get_masks_and_check_predictions(images.cpu().numpy(), labels.cpu().numpy(), model)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--basics {file}: {REQUIRED_FUNCTIONS[1]} failed ({reason})") from error
        return check_basics_outputs(file, images, outputs)

    attributes = {key: names[key] for key in ("mean", "std", "image_size", "classes") if key in names}
    return Extractor(Path(path).stem if path else Path(file).stem, extract, path=path or file, **attributes)


def check_basics_outputs(file: str, images: torch.Tensor, outputs: tuple) -> MaskBatch:
    """Return the arrays of get_masks_and_check_predictions as a MaskBatch. Raises UserError if a shape is wrong."""
    masks, rectangles, correct = (torch.as_tensor(one, device=images.device) for one in outputs)
    shape = (len(images), *images.shape[-2:])
    got = [tuple(one.shape) for one in (masks, rectangles, correct)]
    if got != [shape, shape, shape[:1]]:
        raise UserError(
            f"--basics {file}: for images {tuple(images.shape)} masks and rectangles must be {shape} and correct "
            f"{shape[:1]}, got {', '.join(map(str, got))}"
        )
    return MaskBatch(masks.float(), correct.bool(), find_rectangles(rectangles > 0.5))
