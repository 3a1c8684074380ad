"""Pictures as people have them: opened the way they are looked at, cut out the way a classifier sees them, and what is
made of them named after them.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from engine.data.decode import BadImage, convert_to_rgb, describe_error
from engine.data.folders import ENDINGS, filter_images
from engine.errors import UserError

ORIENTATION = 0x112  # tag of EXIF, and what its values call for
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE}
TURNS |= {6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
NAME_BYTES = 60  # that a part of a file's name may have; file systems take 255 in all


def find_images(words: list[str]) -> list[Path]:
    """The image files that words mean: files, folders (their own files), and patterns, which some shells hand on. Each
    once, in the order of the words. Raises UserError for a word that means none.
    """
    found = []
    for word in words:
        place = Path(word)
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = [place / name for name in read_image_list(place) if not name.startswith(".")]
        elif any(letter in word for letter in "*?["):
            files = [Path(name) for name in sorted(glob(word, recursive=True))]
        else:
            raise UserError(f"--image_path {word}: no such file or folder")
        if not place.is_file():
            files = [file for file in files if filter_images([file.name]) and not file.is_dir()]
        if not files:
            what = "no pictures in this folder" if place.is_dir() else "no picture fits this pattern"
            raise UserError(f"--image_path {word}: {what}\npictures end in {' '.join(sorted(ENDINGS))}")
        found += files
    return list(dict.fromkeys(found))


def read_image_list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--image_path {folder}: the folder cannot be read ({error.strerror})") from error


def open_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), not to be written to: turned as its EXIF data say, on white where it is transparent, and of
    several frames the first.

    Raises BadImage for what is no picture, and for one of more pixels than Pillow takes for safe.
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
    """As its EXIF data say. Pillow's own function also writes these data anew, which fails where they are damaged."""
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def to_8bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut off at 255. Floating point is taken to end at 1."""
    if image.mode not in ("I", "F"):
        return image  # as_rgb() knows the modes that say they have 16
    values = np.asarray(image, np.float64)
    top = next((top for top in (1, 255) if image.mode == "F" and values.max() <= top), 65535)
    return Image.fromarray((255 / top * values).clip(0, 255).astype(np.uint8))


def blend_on_white(image: Image.Image) -> Image.Image:
    """In RGB."""
    if image.mode.startswith("I;16") or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return convert_to_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def chunk(
    pictures: Iterable[tuple[Path, np.ndarray]], most: int = 32, pixels: int = 2**26
) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Pictures with their files, `most` at a time; fewer where they have more than `pixels` pixels together."""
    group, held = [], 0
    for file, picture in pictures:
        size = picture.shape[0] * picture.shape[1]
        if group and (len(group) == most or held + size > pixels):
            yield group
            group, held = [], 0
        group.append((file, picture))
        held += size
    if group:
        yield group


def iter_images(
    files: list[Path], on_bad_image: str = "stop", tell: Callable[[str], None] = print
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file with its picture. Raises UserError for one that cannot be read; on_bad_image skip: tells so."""
    for file in files:
        try:
            yield file, open_image(file)
        except BadImage as error:
            if on_bad_image == "stop":
                remedy = "replace the file, or leave such files out with --on_bad_image skip"
                raise UserError(f"a picture cannot be read: {error}\n{remedy}") from error
            tell(f"note: left out: {error}")


def unique_stems(files: list[Path]) -> list[str]:
    """What each picture is called in the names of the files made of it: no two alike, whatever the case."""
    names = [slugify(file.stem) for file in files]
    for longer in (lambda file: file.name, lambda file: f"{file.parent.name}_{file.name}"):
        often = Counter(name.lower() for name in names)
        names = [
            slugify(longer(file)) if often[name.lower()] > 1 else name for file, name in zip(files, names, strict=True)
        ]
    alike = len({name.lower() for name in names}) < len(names)
    return [f"{name}_{number}" for number, name in enumerate(names, 1)] if alike else names


@cache
def slugify(name: str) -> str:
    """A name as part of a file's name."""
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    return name.encode()[:NAME_BYTES].decode(errors="ignore") or "_"
