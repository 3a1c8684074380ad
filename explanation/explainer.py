"""Compute heatmaps of single images: an explainer is a classifier with one or more methods."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import models
from engine.config.phases import LARGE_SIDE, default_eval_resize
from engine.data.class_names import find_class
from engine.data.image_set import STATISTICS
from engine.data.pictures import slugify
from engine.data.views import Box, CenterCrop, FixedView, SquashedView, center_offset
from engine.errors import UserError
from engine.inference.classifier import Classifier, load_classifier, make_names_unique, normalize, translate_errors
from engine.inference.metrics import rank_classes
from engine.runtime.device import autocast
from engine.runtime.progress import progress_bar
from saliency import FIXED_LAYER
from saliency.cam.maps import ActivationMaps, choose_methods, normalize_maps
from saliency.cam.tracing import list_layers
from saliency.casm.network import load_casm


class Explanation(NamedTuple):
    """The heatmap of one image for one classifier, method and class."""

    classifier: Classifier
    method: str
    predicted: int  # index of the most probable class
    target: int  # index of the class of the heatmap
    probabilities: torch.Tensor  # (K,), of all classes for this image
    heatmap: torch.Tensor  # (h, w) in 0..1
    box: Box  # the part of the image that the classifier saw


@dataclass(frozen=True)
class Explainer:
    """A classifier, the methods that explain it, and the classes to explain."""

    classifier: Classifier
    methods: dict[str, Callable]  # name -> function of normalised images (B, 3, S, S), classes (B,) -> maps (B, h, w)
    targets: list[int]  # class indices; -1 is the most probable class, -2 the next
    view: FixedView  # selects the part of an image that the classifier sees
    device: torch.device

    def explain(self, images: list[np.ndarray]) -> list[list[Explanation]]:
        """Explain images uint8 (H, W, 3) of any sizes. Returns, for each, an explanation per method and target.

        Raises UserError if the classifier cannot take the images or its outputs are NaN or infinite.
        """
        crops, boxes = zip(*(crop_for_model(image, self.view) for image in images), strict=True)
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float() / 255
        inputs = normalize(pixels, self.classifier.mean, self.classifier.std)
        explanations = [[] for _ in images]
        with translate_errors(self.classifier.name, self.view.size):
            with torch.no_grad():
                logits = self.classifier(pixels)
            if not logits.isfinite().all():
                raise UserError(f"{self.classifier.name}: the outputs are NaN or infinite\nuse undamaged weights")
            ranking, probabilities = rank_classes(logits), logits.softmax(1).cpu()
            for (method, compute_maps), target in product(self.methods.items(), self.targets):
                classes = ranking[:, -target - 1] if target < 0 else torch.full_like(ranking[:, 0], target)
                maps = compute_maps(inputs, classes).cpu()
                columns = zip(ranking[:, 0].tolist(), classes.tolist(), probabilities, maps, boxes, strict=True)
                for row, column in zip(explanations, columns, strict=True):
                    row.append(Explanation(self.classifier, method, *column))
        return explanations


def make_cam_explainer(
    classifier: Classifier,
    *,
    method: list[str] | None,
    layer: str | None,
    target_class: list[str],
    image_size: int | None,
    resize: str,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype | None,
) -> Explainer:
    """Make an explainer that draws activation maps. The parameters by name are options of cam.py.

    method None: cam, or gradcam for a network without cam.
    """
    side = None if image_size else classifier.resize  # before the crop, as for these weights
    view = make_view(image_size or classifier.image_size, resize, side, classifier.interpolation)
    targets = [target for word in target_class for target in parse_target_class(word, classifier)]
    network = classifier.network.to(device).requires_grad_(False)
    settings = {"batch_size": batch_size, "precision": precision}
    settings["progress"] = partial(progress_bar, desc="scorecam", unit="batch")

    def make_map_function(name: str) -> Callable:
        with translate_errors(classifier.name, view.size):
            maps = ActivationMaps(network, name, layer=None if name in FIXED_LAYER else layer, **settings)
        return lambda images, classes: normalize_maps(maps(images, classes))

    with translate_errors(classifier.name, view.size):
        method, note = choose_methods(network, method, view.size)
    if note:
        print(f"note: {classifier.name}: {note}")
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
    """Make an explainer that draws the masks of the trained network in the file `casm`, which depend on no class.

    The parameters are options of cam.py.
    """
    saved = load_casm(casm)
    network = saved.network.to(device).eval().requires_grad_(False)
    count = len(saved.classes) or 1000
    classifier = Classifier(
        saved.name, network.classifier, saved.mean, saved.std, num_classes=count, titles=saved.classes
    )
    if labels:
        classifier.set_titles(labels, "labels")

    @torch.no_grad()
    def compute_masks(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, precision):
            return network.predict_masks(images)[:, 0].float()

    view = make_view(image_size or saved.image_size, resize)
    return Explainer(classifier, {"casm": compute_masks}, [-1], view, device)


def make_view(size: int, resize: str, side: int | None = None, interpolation: str | None = None) -> FixedView:
    """Return how an image is resized and cropped to size x size pixels.

    resize: a value of --resize. side: of the image before the crop; None: the usual one. interpolation: `bilinear`
    (None) or `bicubic`.
    """
    side = side or (default_eval_resize(size) if size > LARGE_SIDE else size)
    smooth = interpolation or "bilinear"
    if resize == "keep":
        return CenterCrop(size, side, smooth)
    return SquashedView(size, side if resize == "square" else size, smooth)


def crop_for_model(image: np.ndarray, view: FixedView) -> tuple[np.ndarray, Box]:
    """Resize and crop an image uint8 (H, W, 3) as the view does.

    Returns the crop (size, size, 3) and its box y1, y2, x1, x2 in the image. Only the crop is computed; its pixels
    equal those of resizing the whole image.
    """
    height, width = sides = image.shape[:2]
    _, resized = view.plan(height, width, None)
    starts = np.array(center_offset(view.size, *resized))
    (y1, x1), (y2, x2) = starts * sides / resized, (starts + view.size) * sides / resized
    box = (x1, y1, min(x2, width), min(y2, height))  # rounding must not exceed the border
    method = Image.Resampling[view.interpolation.upper()]
    pixels = Image.fromarray(image).resize((view.size, view.size), method, box=box)
    return np.array(pixels), (*round_to_pixels(y1, y2, height), *round_to_pixels(x1, x2, width))


def round_to_pixels(start: float, end: float, side: int) -> tuple[int, int]:
    """Round to a half-open range inside 0..side of at least one pixel."""
    first = min(round(start), side - 1)
    return first, min(max(round(end), first + 1), side)


def load_classifiers(
    model_path: list[str],
    model: str | None,
    model_args: dict | None,
    weights: str,
    image_size: int | None,
    norm: str | None,
    labels: str | None,
) -> list[Classifier]:
    """Load each classifier once and give it a unique name. The parameters are options of cam.py."""
    settings = {"model": model, "model_args": model_args, "weights": weights, "image_size": image_size}
    classifiers = [load_classifier(path, models, **settings) for path in dict.fromkeys(model_path)]
    make_names_unique(classifiers)
    slugs = [slugify(classifier.name).lower() for classifier in classifiers]
    counts = Counter(slugs)
    for number, (classifier, slug) in enumerate(zip(classifiers, slugs, strict=True), 1):
        if labels:
            classifier.set_titles(labels, "labels")
        if counts[slug] > 1:  # truncated names must not lead to the same output files
            classifier.name = f"{number} {classifier.name}"
        if norm:
            classifier.mean, classifier.std = STATISTICS[norm]
        elif classifier.norm_note:
            print(f"note: {classifier.norm_note}")
        elif not classifier.knows_norm and classifier.image_size <= LARGE_SIDE:
            print(
                f"note: {classifier.path} does not store the normalisation of its images; assuming that of imagenet "
                "(set --norm)"
            )
    return classifiers


def parse_target_class(word: str, classifier: Classifier) -> list[int]:
    """Convert a value of --target_class to the targets of an Explainer."""
    if word.lower() == "predicted":
        return [-1]
    if top := re.fullmatch(r"top([0-9]+)", word.lower()):
        if not 1 <= int(top[1]) <= classifier.num_classes:
            raise UserError(
                f"--target_class {word}: must be top1 to top{classifier.num_classes}, the number of classes of "
                f"{classifier.name}"
            )
        return [-rank for rank in range(1, int(top[1]) + 1)]
    try:
        return [find_class(word, classifier.titles, classifier.num_classes)]
    except ValueError as error:
        raise UserError(f"--target_class {word}: {classifier.name}: {error}") from error


def print_layers(classifier: Classifier, image_size: int | None) -> dict:
    """Print the layers that --layer accepts, in the order of the forward pass. Returns the model and their names."""
    side = image_size or classifier.image_size
    with translate_errors(classifier.name, side):
        layers = list_layers(classifier.network, side)
    print(f"{classifier.name}: layer and shape (channels, height, width)")
    for name, shape, reason in layers:
        default = f"   (default: {reason})" if reason else ""
        print(f"  {name:40} {' x '.join(map(str, shape))}{default}")
    return {"model": classifier.name, "layers": [name for name, _, _ in layers]}
