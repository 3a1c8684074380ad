"""Decode image files into RGB uint8 pixels.

OpenCV decodes JPEGs, at a half, a quarter or an eighth of the size if the crop stays large enough, and torch's
anti-aliased uint8 kernel resizes them. On one core this takes about half of Pillow's time, and the pixels equal
Pillow's to within one level of 255 (except for reduced decoding). Pillow reads the header and every file that is not a
plain JPEG. Both ignore the EXIF orientation.
"""

import io
import os

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from engine.data.views import CenterCrop, View, center_offset

OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class BadImage(Exception):
    """Raised for an image file that cannot be decoded."""


def describe_error(error: Exception) -> str:
    """Return the decoder's message. Pillow's own message names a Python object instead of the file."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def decode_center(path: str | os.PathLike, size: int) -> np.ndarray:
    """Resize the shorter side to `size`, then crop the centre: RGB uint8 (size, size, 3)."""
    out = np.empty((size, size, 3), np.uint8)
    decode_into(out, path, CenterCrop(size, size), None)
    return out


def decode_into(out: np.ndarray, path: str | os.PathLike, view: View, draws: torch.Tensor | None) -> list[float]:
    """Decode an image into out, RGB uint8 (size, size, 3).

    Returns the box that is visible in it: y1, y2, x1, x2 as fractions of the image. Raises BadImage.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
        with Image.open(io.BytesIO(raw)) as image:
            height, width = image.height, image.width
            (y1, y2, x1, x2), (rows, columns) = view.plan(height, width, draws)
            pixels, reduced = load_pixels(image, raw, min((y2 - y1) // rows, (x2 - x1) // columns) // view.margin)
    except Exception as error:
        raise BadImage(f"{path}: {describe_error(error)}") from error
    top, left, h, w = (side // reduced for side in (y1, x1, y2 - y1, x2 - x1))
    pixels = resize_image(pixels[top : top + h, left : left + w], rows, columns)
    down, across = center_offset(view.size, rows, columns)
    cv2.cvtColor(pixels[down : down + view.size, across : across + view.size], cv2.COLOR_BGR2RGB, dst=out)
    return [reduced * top / height, reduced * (top + h) / height, reduced * left / width, reduced * (left + w) / width]


def load_pixels(image: Image.Image, raw: bytes, max_reduction: int) -> tuple[np.ndarray, int]:
    """Decode an image whose header has been read.

    Returns BGR uint8 pixels and the factor 1, 2, 4 or 8, at most max_reduction, by which they are reduced.
    """
    # OpenCV pads a truncated JPEG without an error, so only complete ones go to it; Pillow rejects truncated files
    if image.format == "JPEG" and image.mode in ("RGB", "L") and raw.endswith(b"\xff\xd9"):
        reduced = next(divisor for divisor in (8, 4, 2, 1) if divisor <= max(max_reduction, 1))
        try:
            pixels = cv2.imdecode(np.frombuffer(raw, np.uint8), OPENCV_FLAGS[reduced] | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            pixels = None
        if pixels is not None and pixels.shape[:2] == (-(-image.height // reduced), -(-image.width // reduced)):
            return pixels, reduced
    return np.asarray(convert_to_rgb(image))[:, :, ::-1].copy(), 1


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB with 8 bits per channel."""
    if image.mode.startswith("I;16"):  # Pillow would clip values at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def resize_image(pixels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (rows, columns, 3), bilinear with anti-aliasing."""
    if pixels.shape[:2] == (rows, columns):
        return pixels
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # torch sees this as channels_last: 1.5x faster
    images = F.interpolate(images, (rows, columns), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1)[0].numpy()
