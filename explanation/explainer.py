"""An explainer: a network and a method that together draw the activation map of an image."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from engine.data.views import Box, FixedView, center_offset
from engine.errors import UserError
from engine.inference.classifier import Classifier, normalize


def crop_for_model(picture: np.ndarray, view: FixedView) -> tuple[np.ndarray, Box]:
    """uint8 (H, W, 3) -> what the view shows of it, (size, size, 3), and which part of the picture that is.

    Of the whole resized picture only this part is ever computed; it is the same as if all were.
    """
    sides = picture.shape[:2]
    _, plan = view.plan(*sides, None)
    starts = center_offset(view.size, *plan)
    (y1, y2), (x1, x2) = (
        (start * side / resized, (start + view.size) * side / resized)
        for start, side, resized in zip(starts, sides, plan, strict=True)
    )
    around = (x1, y1, min(x2, sides[1]), min(y2, sides[0]))  # rounding must not step over the border
    pixels = Image.fromarray(picture).resize((view.size, view.size), Image.Resampling.BILINEAR, box=around)
    return np.array(pixels), (*full_image_pixels(y1, y2, sides[0]), *full_image_pixels(x1, x2, sides[1]))


def full_image_pixels(begin: float, end: float, side: int) -> tuple[int, int]:
    """Half-open, inside 0..side, at least one pixel."""
    first = min(round(begin), side - 1)
    return first, min(max(round(end), first + 1), side)


class Explanation(NamedTuple):
    """What a classifier sees in a picture, by one method and for one class."""

    classifier: Classifier
    method: str
    target: int
    chances: torch.Tensor  # (K,): what it takes the picture for
    heat: torch.Tensor  # (h, w) in 0..1
    box: Box  # part of the picture that it is about


class Explainer:
    """A classifier and the methods that ask it: name -> a function of images (B, 3, S, S) and classes (B,) that gives
    maps (B, h, w) in 0..1. wanted: the classes that are asked for; -1 is the most probable one, -2 the next.
    """

    def __init__(
        self,
        classifier: Classifier,
        methods: dict[str, Callable],
        wanted: list[int],
        view: FixedView,
        device: torch.device,
    ):
        self.classifier, self.methods, self.wanted = classifier, methods, wanted
        self.view, self.device = view, device

    @property
    def count(self) -> int:
        """How many maps a picture gets."""
        return len(self.methods) * len(self.wanted)

    def look(self, pictures: list[np.ndarray]) -> list[list[Explanation]]:
        """What it sees in each of the pictures, uint8 (H, W, 3)."""
        crops, boxes = zip(*(crop_for_model(picture, self.view) for picture in pictures), strict=True)
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float() / 255
        return run_network(self.classifier.name, self.view.size, lambda: self.ask(pixels, boxes))

    def ask(self, pixels: torch.Tensor, boxes: list[Box]) -> list[list[Explanation]]:
        """The same of what is cut out of the pictures, (B, 3, S, S) in 0..1."""
        with torch.no_grad():
            chances = self.classifier(pixels).softmax(1)
        if not chances.isfinite().all():
            raise UserError(f"{self.classifier.name}: its scores are not finite: the weights are damaged")
        images = normalize(pixels, self.classifier.mean, self.classifier.std)
        order, found = chances.argsort(1, descending=True), [[] for _ in boxes]
        for method, maps_of in self.methods.items():
            for wanted in self.wanted:
                targets = order[:, -wanted - 1] if wanted < 0 else torch.full_like(order[:, 0], wanted)
                columns = zip(targets.tolist(), chances.cpu(), maps_of(images, targets).cpu(), boxes, strict=True)
                for sights, column in zip(found, columns, strict=True):
                    sights.append(Explanation(self.classifier, method, *column))
        return found


def run_network(name: str, size: int, ask: Callable):
    """What a classifier answers. Raises UserError where it does not, for the method or for the size of the images."""
    try:
        return ask()
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except (RuntimeError, AssertionError) as error:
        if "memory" in str(error) or "CUDA" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name} cannot take images of {size} pixels ({reason})\nset --image_size") from error
