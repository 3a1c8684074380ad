"""Explainers: a classifier and the methods that map where it sees a class in a picture."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import models
from engine.config.phases import LARGE_SIDE, default_eval_resize
from engine.data.class_names import find_class, read_titles
from engine.data.image_set import STATISTICS
from engine.data.views import Box, CenterCrop, FixedView, SquashedView, center_offset
from engine.errors import UserError
from engine.inference.classifier import Classifier, load_classifier, make_names_unique, normalize
from engine.runtime.device import autocast
from engine.runtime.progress import progress_bar
from explanation.images import slugify
from saliency.cam.maps import ActivationMaps, normalize_maps
from saliency.cam.tracing import list_layers
from saliency.casm.network import load_casm


class Explanation(NamedTuple):
    """Where a classifier sees one class in a picture, according to one method."""

    classifier: Classifier
    method: str
    target: int  # the class
    probabilities: torch.Tensor  # (K,), of all classes for this picture
    heatmap: torch.Tensor  # (h, w) in 0..1
    box: Box  # the part of the picture that the classifier saw


@dataclass(frozen=True)
class Explainer:
    """methods: name -> a function of normalised images (B, 3, S, S) and classes (B,) that gives maps (B, h, w) in 0..1.
    targets: the classes to explain; -1 is the most probable one, -2 the next.
    """

    classifier: Classifier
    methods: dict[str, Callable]
    targets: list[int]
    view: FixedView
    device: torch.device

    def explain(self, pictures: list[np.ndarray]) -> list[list[Explanation]]:
        """Pictures uint8 (H, W, 3) -> for each of them an explanation per method and target."""
        crops, boxes = zip(*(crop_for_model(picture, self.view) for picture in pictures), strict=True)
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float() / 255
        images = normalize(pixels, self.classifier.mean, self.classifier.std)
        explanations = [[] for _ in pictures]
        with translate_errors(self.classifier.name, self.view.size):
            with torch.no_grad():
                probabilities = self.classifier(pixels).softmax(1)
            if not probabilities.isfinite().all():
                raise UserError(f"{self.classifier.name}: its scores are not finite: the weights are damaged")
            ranking = probabilities.argsort(1, descending=True)
            for (method, compute_maps), target in product(self.methods.items(), self.targets):
                classes = ranking[:, -target - 1] if target < 0 else torch.full_like(ranking[:, 0], target)
                maps = compute_maps(images, classes).cpu()
                columns = zip(classes.tolist(), probabilities.cpu(), maps, boxes, strict=True)
                for row, column in zip(explanations, columns, strict=True):
                    row.append(Explanation(self.classifier, method, *column))
        return explanations


def make_cam_explainer(
    classifier: Classifier,
    *,
    method: list[str],
    layer: str | None,
    target_class: list[str],
    image_size: int | None,
    resize: str,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype | None,
) -> Explainer:
    """Activation maps of a classifier. The parameters are named after the options of cam.py."""
    view = make_view(image_size or classifier.image_size, resize)
    targets = [target for word in target_class for target in parse_target_class(word, classifier)]
    network = classifier.network.to(device).requires_grad_(False)
    settings = {"batch_size": batch_size, "precision": precision}
    settings["progress"] = partial(progress_bar, desc="scorecam", unit="batch")

    def make_map_function(name: str) -> Callable:
        with translate_errors(classifier.name, view.size):
            maps = ActivationMaps(network, name, layer=None if name == "cam" else layer, **settings)
        return lambda images, classes: normalize_maps(maps(images, classes))

    methods = {name: make_map_function(name) for name in method}
    return Explainer(classifier, methods, list(dict.fromkeys(targets)), view, device)


def make_casm_explainer(
    casm: str,
    labels: str | None,
    image_size: int | None,
    resize: str,
    device: torch.device,
    precision: torch.dtype | None,
) -> Explainer:
    """The masks of the trained decoder in the file `casm`, which depend on no class."""
    saved = load_casm(casm)
    network = saved.network.to(device).eval().requires_grad_(False)
    count = len(saved.classes) or 1000
    classifier = Classifier(
        saved.name, network.classifier, saved.mean, saved.std, num_classes=count, titles=saved.classes
    )
    set_titles(classifier, labels)

    @torch.no_grad()
    def compute_masks(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, precision):
            return network.predict_masks(images)[:, 0].float()

    view = make_view(image_size or saved.image_size, resize)
    return Explainer(classifier, {"casm": compute_masks}, [-1], view, device)


@contextmanager
def translate_errors(name: str, size: int) -> Iterator[None]:
    """Raises UserError where the classifier `name` does not serve for a method, or for images of `size` pixels."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if "memory" in str(error) or "CUDA" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name} cannot take images of {size} pixels ({reason})\nset --image_size") from error


def make_view(size: int, resize: str) -> FixedView:
    """How a picture is cut out for a network that takes images of size x size. resize: as --resize has it."""
    side = default_eval_resize(size) if size > LARGE_SIDE else size
    views = {"keep": CenterCrop(size, side), "square": SquashedView(size, side), "whole": SquashedView(size, size)}
    return views[resize]


def crop_for_model(picture: np.ndarray, view: FixedView) -> tuple[np.ndarray, Box]:
    """uint8 (H, W, 3) -> what the view shows of it, (size, size, 3), and which part of the picture that is.

    Only this part of the resized picture is computed; its pixels are those that resizing the whole picture would give.
    """
    height, width = sides = picture.shape[:2]
    _, resized = view.plan(height, width, None)
    starts = np.array(center_offset(view.size, *resized))
    (y1, x1), (y2, x2) = starts * sides / resized, (starts + view.size) * sides / resized
    box = (x1, y1, min(x2, width), min(y2, height))  # rounding must not step over the border
    pixels = Image.fromarray(picture).resize((view.size, view.size), Image.Resampling.BILINEAR, box=box)
    return np.array(pixels), (*round_to_pixels(y1, y2, height), *round_to_pixels(x1, x2, width))


def round_to_pixels(begin: float, end: float, side: int) -> tuple[int, int]:
    """A half-open range inside 0..side, of at least one pixel."""
    first = min(round(begin), side - 1)
    return first, min(max(round(end), first + 1), side)


def load_classifiers(
    model_path: list[str], model: str | None, weights: str, image_size: int | None, norm: str | None, labels: str | None
) -> list[Classifier]:
    """Each once, with a name of its own, and with the class names of the file `labels` where one is given."""
    settings = {"model": model, "weights": weights, "image_size": image_size}
    classifiers = [load_classifier(word, models, **settings) for word in dict.fromkeys(model_path)]
    make_names_unique(classifiers)
    slugs = [slugify(one.name).lower() for one in classifiers]
    counts = Counter(slugs)
    for number, (one, slug) in enumerate(zip(classifiers, slugs, strict=True), 1):
        set_titles(one, labels)
        if counts[slug] > 1:  # cut short, they would name the same files
            one.name = f"{number} {one.name}"
        if norm:
            one.mean, one.std = STATISTICS[norm]
        elif one.path and not one.options and not one.is_torchvision and one.image_size <= LARGE_SIDE:
            print(f"note: {one.path} does not say how its images were normalised; taken: as imagenet (--norm)")
    return classifiers


def set_titles(classifier: Classifier, labels: str | None) -> None:
    """Call its classes what the file `labels` calls them."""
    if labels:
        classifier.titles = read_titles(labels)
        if len(classifier.titles) != classifier.num_classes:
            counts = f"{len(classifier.titles)} names, {classifier.name} has {classifier.num_classes} classes"
            raise UserError(f"--labels {labels}: {counts}\none name a line, in the order of the classes")


def parse_target_class(word: str, classifier: Classifier) -> list[int]:
    """The classes that a word of --target_class means, as an Explainer takes them."""
    if word.lower() == "predicted":
        return [-1]
    if top := re.fullmatch(r"top([0-9]+)", word.lower()):
        if not 1 <= int(top[1]) <= classifier.num_classes:
            raise UserError(
                f"--target_class {word}: of {classifier.name} there are top1 to top{classifier.num_classes}"
            )
        return [-rank for rank in range(1, int(top[1]) + 1)]
    try:
        return [find_class(word, classifier.titles, classifier.num_classes)]
    except ValueError as error:
        raise UserError(f"--target_class {word}: {classifier.name}: {error}") from error


def print_layers(classifier: Classifier, image_size: int | None) -> dict:
    """The layers whose maps can be taken, in the order of the forward pass."""
    side = image_size or classifier.image_size
    with translate_errors(classifier.name, side):
        found = list_layers(classifier.network, side)
    print(f"{classifier.name}: layer and shape (channels, height, width)")
    for name, shape, is_default in found:
        print(f"  {name:40} {' x '.join(map(str, shape))}{'   the last before the average' if is_default else ''}")
    return {"model": classifier.name, "layers": [name for name, _, _ in found]}
