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
from saliency.casm.boxes import find_rectangles
from saliency.casm.network import SavedCasm

REQUIRED_FUNCTIONS = ("load_model", "get_masks_and_check_predictions")
CENTER_BOX_SIDE = 158 / 224  # of the image's: the published naive box, half of the area
NAIVE_MASKS = ("max", "center")  # of score
TOY_MASKS = ("zero", "one", "random56", "random224")  # of eval


@dataclass
class MaskBatch:
    """masks (B, H, W) float in 0..1 on the device; correct (B,) bool: whether the classifier is right about the images;
    rectangles (B, 4) as y1, y2, x1, x2 where the extractor draws its own.
    """

    masks: torch.Tensor
    correct: torch.Tensor
    rectangles: torch.Tensor | None = None


Extract = Callable[[torch.Tensor, torch.Tensor], MaskBatch]


@dataclass
class Extractor:
    """A name, and a function of normalised images (B, 3, H, W) and labels (B,) on the device, -1 for a class it does
    not know, to MaskBatch.

    classes: in the order of its labels, empty where they are not known. options: those it was trained with, as far as
    they are known. path: the file it came from. num_classes: of its network; None where it takes any.
    """

    name: str
    extract: Extract | None
    mean: tuple[float, ...] = STATISTICS["imagenet"][0]
    std: tuple[float, ...] = STATISTICS["imagenet"][1]
    image_size: int | None = None
    classes: list[str] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    path: str = ""
    classifier: torch.nn.Module | None = None
    num_classes: int | None = None


def build_casm_extractor(saved: SavedCasm, device: torch.device) -> Extractor:
    """A trained decoder, on the device."""
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
    """A plain classifier, on the device, for extractors that are built on one. It draws no masks itself."""
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


def build_source_extractor(name: str, like: Extractor) -> Extractor:
    """A source of saliency that reads the classifier of `like`; it gets the true class where it asks for one. Each map
    is divided by its largest value.
    """
    network = like.classifier
    source = build_source(name, model=network, mean=like.mean, std=like.std)

    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        with torch.no_grad():
            logits = network(images)
        targets = F.one_hot(labels.clamp_min(0), logits.shape[1]).float()
        maps = source(images, targets).float()
        peaks = maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)  # an all-zero map stays
        return MaskBatch(maps / peaks, logits.argmax(1) == labels)

    return replace(like, name=f"{name} of {like.name}", extract=extract)


def build_naive_extractor(name: str, like: Extractor | None = None, *, seed: int = 0) -> Extractor:
    """The published naive masks, of images as `like` sees them.

    `max` and `one`: all of the image; `center`: half of its area in the middle; `zero`: nothing; a fair coin for each
    block of a 56th of the side (`random56`) or for each pixel (`random224`). For `max` and `center` the classifier of
    `like` says what is correct; without one, and for the others, everything counts as correct, as published.
    """
    generator = torch.Generator().manual_seed(seed)
    classifier = like.classifier if like and name in NAIVE_MASKS else None

    def draw(count: int, height: int, width: int) -> torch.Tensor:
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
        masks = draw(len(images), *images.shape[-2:]).to(images.device)
        correct = classifier(images).argmax(1) == labels if classifier else torch.ones_like(labels, dtype=torch.bool)
        return MaskBatch(masks, correct)

    return replace(like, name=name, extract=extract) if like else Extractor(name, extract)


def load_basics_extractor(file: str, path: str) -> Extractor:
    """The extractor of a Python file with load_model(path) and get_masks_and_check_predictions(images, targets, model).

    The latter takes and returns numpy arrays: images (B, 3, H, W) float32, targets (B,), -1 for a class unknown to the
    network -> masks (B, H, W) in 0..1, rectangles (B, H, W) of 0 and 1, and whether the prediction is right, (B,). The
    file may also define image_size, mean, std (of pixels in 0..1) and classes. Raises UserError for a file that cannot
    be run or lacks one of the two.
    """
    if not Path(file).is_file():
        raise UserError(f"--basics {file}: no such file")
    try:
        spec = importlib.util.spec_from_loader(Path(file).stem, SourceFileLoader(Path(file).stem, file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--basics {file}: cannot be run ({type(error).__name__}: {error})") from error
    defined = vars(module)
    if missing := [name for name in REQUIRED_FUNCTIONS if not callable(defined.get(name))]:
        raise UserError(
            f"--basics {file}: no function {' and no '.join(missing)}; {' and '.join(REQUIRED_FUNCTIONS)} are wanted"
        )
    try:
        model = module.load_model(path)
    except Exception as error:
        raise UserError(
            f"--basics {file}: load_model({path!r}) failed ({type(error).__name__}: {error})\nits path comes from "
            "--casms-path"
        ) from error

    def extract(images: torch.Tensor, labels: torch.Tensor) -> MaskBatch:
        try:
            answer = module.get_masks_and_check_predictions(images.cpu().numpy(), labels.cpu().numpy(), model)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--basics {file}: {REQUIRED_FUNCTIONS[1]} failed ({reason})") from error
        return check_basics_answer(file, images, answer)

    known = {key: defined[key] for key in ("mean", "std", "image_size", "classes") if key in defined}
    return Extractor(Path(path).stem if path else Path(file).stem, extract, path=path or file, **known)


def check_basics_answer(file: str, images: torch.Tensor, answer: tuple) -> MaskBatch:
    """The arrays of get_masks_and_check_predictions on the device. Raises UserError where their shapes are wrong."""
    masks, rectangles, correct = (torch.as_tensor(one, device=images.device) for one in answer)
    shape = (len(images), *images.shape[-2:])
    got = [tuple(one.shape) for one in (masks, rectangles, correct)]
    if got != [shape, shape, shape[:1]]:
        raise UserError(
            f"--basics {file}: for images {tuple(images.shape)} masks and rectangles must be {shape} and correctness "
            f"{shape[:1]}, got {', '.join(map(str, got))}"
        )
    return MaskBatch(masks.float(), correct.bool(), find_rectangles(rectangles > 0.5))
