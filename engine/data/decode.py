"""Decode image files into RGB uint8 pixels. All commands read image files with these functions.

OpenCV decodes JPEGs, at a half, a quarter or an eighth of the size if the crop stays large enough, and torch's
anti-aliased uint8 kernel resizes them. On one core this takes about half of Pillow's time, and the pixels equal
Pillow's to within one level of 255 (except for reduced decoding). Pillow reads the header and every file that is not a
plain JPEG. Of several frames, the first is read. Both ignore the EXIF orientation; turn_upright() applies it
where `upright` asks for it: to the user's own images, but not to published data sets, whose figures were made without.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from engine.data.resize import resize_pixels
from engine.data.views import CenterCrop, View, center_offset

OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF


class BadImage(Exception):
    """Raised for an image file that cannot be decoded."""


def describe_error(error: Exception) -> str:
    """Return the decoder's message, or a better one where Pillow's does not say what is wrong with the file."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large to open ({str(error).split(',')[0]}); reduce its size"
    return str(error) or type(error).__name__


@contextmanager
def open_header(path: str | os.PathLike, with_bytes: bool = True) -> Iterator[tuple[Image.Image, bytes]]:
    """Yield an image, of which only the header is decoded, and its bytes. Every error in the block becomes BadImage.

    with_bytes: read the whole file; otherwise only its header is read, and the bytes are empty.
    """
    try:
        raw = Path(path).read_bytes() if with_bytes else b""
        if with_bytes and not raw:
            raise ValueError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images and unusual EXIF data
            with Image.open(io.BytesIO(raw) if with_bytes else path) as image:
                yield image, raw
    except Exception as error:
        raise BadImage(f"{path}: {describe_error(error)}") from error


def read_header(path: str | os.PathLike) -> tuple[int, int, int]:
    """Return height, width and EXIF orientation (1: upright) of an image file, of which only the header is read.

    Raises BadImage.
    """
    with open_header(path, with_bytes=False) as (image, _):
        return image.height, image.width, get_orientation(image, getexif=Image.Image.getexif)


def decode_image(path: str | os.PathLike, upright: bool = False) -> np.ndarray:
    """Decode a whole image: RGB uint8 (H, W, 3). upright: apply the EXIF orientation. Raises BadImage."""
    with open_header(path) as (image, raw):
        orientation = get_orientation(image) if upright else 1
        pixels, _ = load_pixels(image, raw, 1)
        return cv2.cvtColor(turn_upright(pixels, orientation), cv2.COLOR_BGR2RGB)


def decode_center(path: str | os.PathLike, size: int) -> np.ndarray:
    """Turn upright, resize the shorter side to `size`, then crop the centre: RGB uint8 (size, size, 3)."""
    out = np.empty((size, size, 3), np.uint8)
    decode_into(out, path, CenterCrop(size, size), None, upright=True)
    return out


def decode_into(
    out: np.ndarray, path: str | os.PathLike, view: View, draws: torch.Tensor | None, upright: bool = False
) -> list[float]:
    """Decode an image into out, RGB uint8 (size, size, 3). upright: apply the EXIF orientation.

    Returns the box that is visible in it: y1, y2, x1, x2 as fractions of the image. Raises BadImage.
    """
    with open_header(path) as (image, raw):
        orientation = get_orientation(image) if upright else 1
        height, width = image.size if orientation > 4 else image.size[::-1]
        (y1, y2, x1, x2), (rows, columns) = view.plan(height, width, draws)
        pixels, reduced = load_pixels(image, raw, min((y2 - y1) // rows, (x2 - x1) // columns) // view.margin)
        pixels = turn_upright(pixels, orientation)
        top, left, h, w = (side // reduced for side in (y1, x1, y2 - y1, x2 - x1))
        pixels = resize_image(pixels[top : top + h, left : left + w], rows, columns, view.interpolation)
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
    """Convert an image of any mode to RGB with 8 bits per channel. Transparent parts are blended on white.

    Raises ValueError for grey values whose range is unknown.
    """
    if image.mode[0] in "IF":
        return Image.fromarray(scale_to_8bit(image)).convert("RGB")
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def scale_to_8bit(image: Image.Image) -> np.ndarray:
    """Scale grey values of more than 8 bits to uint8 (H, W); Pillow would clip them at 255.

    16-bit values range from 0 to 65535, floats from 0 to 1. Raises ValueError for all others.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})  # the tags of a TIFF
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        grey = (values >> (4 if tags.get(BITS_PER_SAMPLE) == (12,) else 8)).astype(np.uint8)
    elif image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        grey = (255 * values + 0.5).astype(np.uint8)
    else:
        raise ValueError(
            f"32-bit values (mode {image.mode}) of unknown range; save it with 8 or 16 bits, or as floats from 0 to 1"
        )
    return 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey


def get_orientation(image: Image.Image, getexif: Callable = lambda image: image.getexif()) -> int:
    """Return the EXIF orientation of an image that is not loaded yet: 1 (upright) to 8.

    getexif: returns the EXIF data. That of a PNG decodes the pixels to look behind them.
    """
    if image.format == "TIFF":  # Pillow itself turns these
        return 1
    try:
        orientation = getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data
        return 1
    return orientation if orientation in range(2, 9) else 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror pixels (H, W, 3) according to their EXIF orientation."""
    if orientation == 1:
        return pixels
    pixels = pixels.transpose(1, 0, 2) if orientation > 4 else pixels
    rows, columns = (-1 if orientation in flipped else 1 for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels[::rows, ::columns])


def resize_image(pixels: np.ndarray, rows: int, columns: int, interpolation: str = "bilinear") -> np.ndarray:
    """Resize uint8 (H, W, 3) to (rows, columns, 3) with anti-aliasing."""
    return resize_pixels(torch.from_numpy(pixels)[None], rows, columns, interpolation)[0].numpy()
