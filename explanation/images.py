"""Picture files as people have them: found, opened the way a viewer shows them, and names for what is made of them."""

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

MAX_NAME_BYTES = 60  # of a part of a file's name; file systems take 255 in all


def find_images(words: list[str]) -> list[Path]:
    """The image files that words name: files, folders (their own files), and patterns, which some shells do not expand.
    Each once, in the order of the words. Raises UserError for a word that names none.
    """
    found = []
    for word in words:
        path = Path(word)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            try:
                files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
            except OSError as error:
                raise UserError(f"--image_path {path}: the folder cannot be read ({error.strerror})") from error
        elif any(letter in word for letter in "*?["):
            files = [Path(name) for name in sorted(glob(word, recursive=True))]
        else:
            raise UserError(f"--image_path {word}: no such file or folder")
        if not path.is_file():
            files = [file for file in files if filter_images([file.name]) and not file.is_dir()]
        if not files:
            problem = "no pictures in this folder" if path.is_dir() else "no picture fits this pattern"
            raise UserError(f"--image_path {word}: {problem}\npictures end in {' '.join(sorted(IMAGE_EXTENSIONS))}")
        found += files
    return list(dict.fromkeys(found))


def open_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), read-only: turned as the EXIF data say, transparent parts on white, the first of several
    frames. Raises BadImage for what is no picture, and for one of more pixels than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large, or with odd EXIF data
            with Image.open(path) as image:
                image.load()
                return np.asarray(blend_on_white(to_8bit(apply_orientation(image))))
    except Image.DecompressionBombError as error:
        raise BadImage(f"{path}: too large to be opened ({str(error).split(',')[0]}); make it smaller") from error
    except Exception as error:
        empty = path.is_file() and not path.stat().st_size
        raise BadImage(f"{path}: {'the file is empty' if empty else describe_error(error)}") from error


def apply_orientation(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say."""
    image.getexif()  # Pillow keeps what it has parsed; left in info, exif_transpose would write the data anew, which
    for key in ("exif", "Raw profile type exif"):  # fails where they are damaged
        image.info.pop(key, None)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def to_8bit(image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits, which Pillow would clip at 255; those in floating point end at 1, 255 or
    65535, whichever holds them all.
    """
    if image.mode not in ("I", "F"):
        return image  # convert_to_rgb() knows the modes that say they have 16
    values = np.asarray(image, np.float64)
    top = next((top for top in (1, 255) if image.mode == "F" and values.max() <= top), 65535)
    return Image.fromarray((255 / top * values).clip(0, 255).astype(np.uint8))


def blend_on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB."""
    if image.mode.startswith("I;16") or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return convert_to_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def chunk(
    pictures: Iterable[tuple[Path, np.ndarray]], max_count: int = 32, max_pixels: int = 2**26
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Files with their pictures, in groups of at most max_count that have at most max_pixels together."""
    group, pixels = [], 0
    for file, picture in pictures:
        size = picture.shape[0] * picture.shape[1]
        if group and (len(group) == max_count or pixels + size > max_pixels):
            yield group
            group, pixels = [], 0
        group.append((file, picture))
        pixels += size
    if group:
        yield group


def iter_images(files: list[Path], on_bad_image: str) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file with its picture. One that cannot be read raises UserError; on_bad_image skip: it is left out, and
    printed.
    """
    for file in files:
        try:
            yield file, open_image(file)
        except BadImage as error:
            if on_bad_image == "stop":
                remedy = "replace the file, or skip unreadable files with --on_bad_image skip"
                raise UserError(f"a picture cannot be read: {error}\n{remedy}") from error
            print_line(f"note: left out: {error}")


def print_line(text: str) -> None:
    """Print; names of files need not be valid text."""
    print(text.encode(errors="replace").decode(), flush=True)


def unique_stems(files: list[Path]) -> list[str]:
    """What each picture is called in the names of the files made of it: no two alike, whatever the case."""
    stems = [slugify(file.stem) for file in files]
    for longer in (lambda file: file.name, lambda file: f"{file.parent.name}_{file.name}"):
        counts = Counter(stem.lower() for stem in stems)
        pairs = zip(files, stems, strict=True)
        stems = [slugify(longer(file)) if counts[stem.lower()] > 1 else stem for file, stem in pairs]
    is_unique = len({stem.lower() for stem in stems}) == len(stems)
    return stems if is_unique else [f"{stem}_{number}" for number, stem in enumerate(stems, 1)]


@cache
def slugify(name: str) -> str:
    """A name as part of a file's name."""
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "_"
