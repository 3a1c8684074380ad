"""Pictures as people have them: opened the way they are looked at, and cut out the way a classifier sees them."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from engine.cli import UserError
from engine.folders import only_images
from engine.image_files import Box, StillView, as_rgb, corner, resized, what_is_wrong


def find_pictures(words: list[str]) -> list[Path]:
    """The image files that words mean: files, folders (their own files), and patterns, which shells on some systems
    hand on. Each once, in the order of the words. Raises UserError for a word that means none.
    """
    found = []
    for word in words:
        place = Path(word)
        if place.is_dir():
            files = [place / name for name in only_images(sorted(os.listdir(place)))]
        elif place.exists() or not any(letter in word for letter in "*?["):
            files = [place]
        else:
            files = [Path(name) for name in sorted(matches(word))]
        if missing := [str(file) for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: no such file")
        if not files:
            raise UserError(f"{word}: {'no pictures in this folder' if place.is_dir() else 'fits no file'}")
        found += files
    return list(dict.fromkeys(found))


def matches(pattern: str) -> list[str]:
    from glob import glob

    return only_images(glob(pattern, recursive=True))


def open_picture(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), turned as its EXIF data say, on white where it is transparent; of several frames the first.

    Raises UserError for what is no picture, and for one of more pixels than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(as_rgb(image)).copy()
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: too large to be opened ({str(error).split(',')[0]})\nmake it smaller first"
        ) from error
    except Exception as error:
        reason = "the file is empty" if path.is_file() and not path.stat().st_size else what_is_wrong(error)
        raise UserError(f"{path}: no picture that can be read ({reason})") from error


def seen_by(picture: np.ndarray, view: StillView) -> tuple[np.ndarray, Box]:
    """uint8 (H, W, 3) -> what the view shows of it, (size, size, 3), and which part of the picture that is."""
    height, width = picture.shape[:2]
    _, (rows, columns) = view.plan(height, width, None)
    down, across = corner(view.size, rows, columns)
    pixels = resized(picture, rows, columns)[down : down + view.size, across : across + view.size]
    sides = (down * height / rows, (down + view.size) * height / rows)
    sides += (across * width / columns, (across + view.size) * width / columns)
    return pixels, tuple(round(side) for side in sides)


def spread_out(heat: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """A map (h, w) of what lies in the box -> float32 (height, width), 0 outside of it."""
    y1, y2, x1, x2 = box
    whole = np.zeros((height, width), np.float32)
    inside = F.interpolate(torch.from_numpy(heat)[None, None].float(), (y2 - y1, x2 - x1), mode="bilinear")
    whole[y1:y2, x1:x2] = inside[0, 0].numpy()
    return whole
