"""Activation maps drawn over their images, and saved."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from engine.data.views import Box
from engine.errors import UserError
from engine.runtime.files import write_atomic

MAX_SHOWN_SIDE = 480  # longest side in pixels of a small copy


def place_on_image(heat: torch.Tensor, box: Box, stretch: bool) -> np.ndarray:
    """A map (h, w) in 0..1 of what lies in the box -> float32, as large as the box; stretch: again from 0 to 1."""
    y1, y2, x1, x2 = box
    inside = F.interpolate(heat[None, None].float(), (y2 - y1, x2 - x1), mode="bilinear")[0, 0].numpy()
    low, high = inside.min(), inside.max()
    if stretch and high > low:  # in place: it may have as many pixels as a photograph
        inside -= low
        inside /= high - low
    return inside


def draw_frame(inside: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """A map as large as the box -> float32 (height, width), 0 outside of the box."""
    y1, y2, x1, x2 = box
    whole = np.zeros((height, width), np.float32)
    whole[y1:y2, x1:x2] = inside
    return whole


def downscale_for_display(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), with sides of at most SHOWN pixels."""
    scale = MAX_SHOWN_SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def save_image(place: Path, picture: np.ndarray) -> None:
    """uint8 (H, W, 3) as a .png, in a folder that is made. Raises UserError where that cannot be."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {place.parent}: the folder cannot be made ({error.strerror}); name another"
        ) from error
    _, coded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_atomic(place, lambda side: side.write_bytes(coded))


def save_map(place: Path, values: np.ndarray) -> None:
    """As a .npy, in a folder that is there."""

    def write(side: Path) -> None:
        with open(side, "wb") as file:  # np.save would give a name of its own to it
            np.save(file, values)

    write_atomic(place, write)
