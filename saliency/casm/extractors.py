"""Where masks come from when they are scored: trained decoders, any source of saliency, naive masks, your own file."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import Classifier
from saliency import build_source
from saliency.casm.boxes import rectangles as rectangles_around
from saliency.casm.network import Casm, SavedCasm

BASICS = ("load_model", "get_masks_and_check_predictions")
CENTRE = 158 / 224  # of the side: the published naive box, half of the area


@dataclass
class Masks:
    """What is said of a batch: masks (B, H, W) float in 0..1 on the device; whether the classifier is right about the
    images, (B,) bool; rectangles (B, 4) as y1, y2, x1, x2, where the extractor draws its own.
    """

    masks: torch.Tensor
    correct: torch.Tensor
    rectangles: torch.Tensor | None = None


@dataclass
class Extractor:
    """A name, and a function of normalised images (B, 3, H, W) and labels (B,) on the device, -1 for a class it does
    not know, to Masks.

    classes: in the order of its labels, empty where they are not known. options: what it was trained with, as far as
    that is known: where its data lie. path: the file it came from.
    """

    name: str
    masks_of: Callable[[torch.Tensor, torch.Tensor], Masks]
    mean: tuple[float, ...] = STATISTICS["imagenet"][0]
    std: tuple[float, ...] = STATISTICS["imagenet"][1]
    image_size: int | None = None
    classes: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    path: str = ""
    classifier: torch.nn.Module | None = None
    count: int | None = None  # of its network's classes; None: it takes those of the data, whichever they are


def casm_extractor(saved: SavedCasm, device: torch.device) -> Extractor:
    """A trained decoder, on the device."""
    network: Casm = saved.network.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        masks, logits = network(images)
        return Masks(masks[:, 0], logits.argmax(1) == labels)

    return Extractor(
        *(saved.name, masks_of, saved.mean, saved.std, saved.image_size, saved.classes, saved.options),
        path=str(saved.path),
        classifier=network.classifier,
        count=len(saved.classes) or 1000,
    )


def classifier_extractor(known: Classifier, device: torch.device) -> Extractor:
    """What a plain classifier knows, for extractors that look through it; it draws no masks itself."""
    network = known.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    shown = (known.name, None, known.mean, known.std, known.image_size, known.classes, known.options, known.path)
    return Extractor(*shown, network, known.count)


def source_extractor(name: str, classifier: Extractor) -> Extractor:
    """A source of saliency, of the true class where it asks for one, each map divided by its largest value."""
    network = classifier.classifier
    source = build_source(name, model=network, mean=classifier.mean, std=classifier.std)

    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        with torch.no_grad():
            logits = network(images)
        targets = F.one_hot(labels.clamp_min(0), logits.shape[1]).float()
        return Masks(scale_to_peak(source(images, targets).float()), logits.argmax(1) == labels)

    return share_batches(classifier, f"{name} of {classifier.name}", masks_of)


def naive_extractor(name: str, classifier: Extractor | None) -> Extractor:
    """The published naive masks: `max`, all of the image, and `center`, half of its area in the middle. Without a
    classifier its answer counts as right, as published.
    """

    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        count, _, height, width = images.shape
        masks = images.new_zeros(count, height, width)
        if name == "max":
            masks += 1
        else:
            top, left = ((round(side * (1 - CENTRE) / 2)) for side in (height, width))
            masks[:, top : height - top, left : width - left] = 1
        if classifier is None:
            return Masks(masks, torch.ones_like(labels, dtype=torch.bool))
        with torch.no_grad():
            return Masks(masks, classifier.classifier(images).argmax(1) == labels)

    return share_batches(classifier, name, masks_of) if classifier else Extractor(name, masks_of)


def share_batches(like: Extractor, name: str, masks_of: Callable) -> Extractor:
    """An extractor that sees the same images as `like`."""
    return replace(like, name=name, masks_of=masks_of)


def scale_to_peak(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, H, W) >= 0, each divided by its largest value; zero maps stay."""
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def basics_extractor(file: str, path: str) -> Extractor:
    """The extractor of a Python file with load_model(path) and get_masks_and_check_predictions(images, targets, model).

    It gets and gives numpy arrays: images (B, 3, H, W) float32, targets (B,), -1 for a class unknown to the network ->
    masks (B, H, W) in 0..1, rectangles (B, H, W) of 0 and 1, and whether the prediction is right, (B,). The file may
    also say image_size, mean, std (of pixels in 0..1) and classes. Raises UserError for a file without the two.
    """
    if not Path(file).is_file():
        raise UserError(f"--basics {file}: no such file")
    try:
        spec = importlib.util.spec_from_loader(Path(file).stem, SourceFileLoader(Path(file).stem, file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--basics {file}: cannot be run ({type(error).__name__}: {error})") from error
    if missing := [name for name in BASICS if not callable(getattr(module, name, None))]:
        raise UserError(f"--basics {file}: no function {' and no '.join(missing)}; {' and '.join(BASICS)} are wanted")
    try:
        model = module.load_model(path)
    except Exception as error:
        raise UserError(
            f"--basics {file}: load_model({path!r}) failed ({type(error).__name__}: {error})\nits path comes from "
            "--casms-path"
        ) from error

    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        try:
            answer = module.get_masks_and_check_predictions(images.cpu().numpy(), labels.cpu().numpy(), model)
        except Exception as error:
            raise UserError(f"--basics {file}: {BASICS[1]} failed ({type(error).__name__}: {error})") from error
        masks, rectangles, correct = (torch.as_tensor(one, device=images.device) for one in answer)
        shape = (len(images), *images.shape[-2:])
        got = [tuple(one.shape) for one in (masks, rectangles, correct)]
        if got != [shape, shape, shape[:1]]:
            raise UserError(
                f"--basics {file}: for images {tuple(images.shape)} masks and rectangles must be {shape} and "
                f"correctness {shape[:1]}, got {', '.join(map(str, got))}"
            )
        return Masks(masks.float(), correct.bool(), rectangles_around(rectangles > 0.5))

    own = {key: getattr(module, key) for key in ("mean", "std", "image_size", "classes") if hasattr(module, key)}
    return Extractor(Path(path).stem if path else Path(file).stem, masks_of, **own, path=path or file)


TOY_EXTRACTORS = ("zero", "one", "random56", "random224")


def toy_extractor(name: str, like: Extractor | None, seed: int) -> Extractor:
    """The published naive masks: `zero`, `one`, and a fair coin for each block of a 56th of the side (`random56`) or
    each pixel (`random224`). Sees the images that `like` does.
    """
    generator = torch.Generator().manual_seed(seed)

    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        count, _, height, width = images.shape
        side = max(1, height // 56) if name == "random56" else 1
        if name in ("zero", "one"):
            masks = images.new_full((count, height, width), float(name == "one"))
        else:
            coins = torch.rand(count, -(-height // side), -(-width // side), generator=generator) < 0.5
            masks = coins.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width].float()
        return Masks(masks.to(images.device), torch.ones_like(labels, dtype=torch.bool))

    return share_batches(like, name, masks_of) if like else Extractor(name, masks_of)
