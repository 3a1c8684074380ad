"""Find image files, open them as an image viewer shows them, and name the output files."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.data.decode import BadImage, convert_to_rgb, describe_error
from engine.data.folders import IMAGE_EXTENSIONS, filter_images
from engine.errors import UserError

MAX_NAME_BYTES = 60  # of each part of a file name; file systems allow 255 bytes in total


def find_images(patterns: list[str]) -> list[Path]:
    """Return the image files that `patterns` match, each once, in their order.

    A pattern is a file, a folder (without its subfolders) or a glob pattern, which some shells do not expand. Raises
    UserError for a pattern without images.
    """
    images = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            try:
                files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
            except OSError as error:
                raise UserError(f"--image_path {path}: the folder cannot be read ({error.strerror})") from error
        elif any(letter in pattern for letter in "*?["):
            files = [Path(name) for name in sorted(glob(pattern, recursive=True))]
        else:
            raise UserError(f"--image_path {pattern}: no such file or folder")
        if not path.is_file():
            files = [file for file in files if filter_images([file.name]) and not file.is_dir()]
        if not files:
            problem = "no images in this folder" if path.is_dir() else "no image matches this pattern"
            raise UserError(
                f"--image_path {pattern}: {problem}\nimage files end in {' '.join(sorted(IMAGE_EXTENSIONS))}"
            )
        images += files
    return list(dict.fromkeys(images))


def open_image(path: Path) -> np.ndarray:
    """Open an image as RGB uint8 (H, W, 3), read-only.

    The EXIF orientation is applied, transparent parts are blended on white, and the first of several frames is used.
    Raises BadImage for invalid files and for images with more pixels than Pillow considers safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large images and unusual EXIF data
            with Image.open(path) as image:
                image.load()
                return np.asarray(blend_on_white(to_8bit(apply_orientation(image))))
    except Image.DecompressionBombError as error:
        raise BadImage(f"{path}: too large to open ({str(error).split(',')[0]}); reduce its size") from error
    except Exception as error:
        empty = path.is_file() and not path.stat().st_size
        raise BadImage(f"{path}: {'the file is empty' if empty else describe_error(error)}") from error


def apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate and flip an image in place according to its EXIF data."""
    image.getexif()  # Pillow caches the parsed data
    for key in ("exif", "Raw profile type exif"):  # otherwise exif_transpose rewrites the data, and fails if damaged
        image.info.pop(key, None)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def to_8bit(image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits to 0..255; Pillow would clip them.

    The range of floating-point values is taken as 0..1, 0..255 or 0..65535, the smallest that contains them all.
    """
    if image.mode not in ("I", "F"):
        return image  # convert_to_rgb() handles the modes of 16 bits
    values = np.asarray(image, np.float64)
    top = next((top for top in (1, 255) if image.mode == "F" and values.max() <= top), 65535)
    return Image.fromarray((255 / top * values).clip(0, 255).astype(np.uint8))


def blend_on_white(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent parts are blended on white."""
    if image.mode.startswith("I;16") or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return convert_to_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def chunk(
    images: Iterable[tuple[Path, np.ndarray]], max_count: int = 32, max_pixels: int = 2**26
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Group files and images: at most max_count images and, if several, max_pixels pixels per group."""
    group, pixels = [], 0
    for file, image in images:
        size = image.shape[0] * image.shape[1]
        if group and (len(group) == max_count or pixels + size > max_pixels):
            yield group
            group, pixels = [], 0
        group.append((file, image))
        pixels += size
    if group:
        yield group


def iter_images(files: list[Path], on_bad_image: str) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each file with its image uint8 (H, W, 3).

    An unreadable file raises UserError if on_bad_image is `stop`; with `skip` it is skipped with a note.
    """
    for file in files:
        try:
            yield file, open_image(file)
        except BadImage as error:
            if on_bad_image == "stop":
                remedy = "replace the file, or skip unreadable files with --on_bad_image skip"
                raise UserError(f"an image cannot be read: {error}\n{remedy}") from error
            print_line(f"note: skipped: {error}")


def print_line(text: str) -> None:
    """Print a line that may contain file names with invalid characters."""
    print(text.encode(errors="replace").decode(), flush=True)


def unique_stems(files: list[Path]) -> list[str]:
    """Return a stem for the output files of each image; all differ, even if case is ignored."""
    stems = [slugify(file.stem) for file in files]
    for longer in (lambda file: file.name, lambda file: f"{file.parent.name}_{file.name}"):
        counts = Counter(stem.lower() for stem in stems)
        pairs = zip(files, stems, strict=True)
        stems = [slugify(longer(file)) if counts[stem.lower()] > 1 else stem for file, stem in pairs]
    is_unique = len({stem.lower() for stem in stems}) == len(stems)
    return stems if is_unique else [f"{stem}_{number}" for number, stem in enumerate(stems, 1)]


@cache
def slugify(name: str) -> str:
    """Convert a name to a valid part of a file name, of at most MAX_NAME_BYTES bytes."""
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "_"
