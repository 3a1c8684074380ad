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
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.Image import Transpose
from torch.nn import functional as F

from engine.classifier import Classifier, normalised
from engine.cli import UserError
from engine.files import write_atomic
from engine.folders import ENDINGS, only_images
from engine.image_files import BadImage, Box, StillView, as_rgb, corner, what_is_wrong

ORIENTATION = 0x112  # tag of EXIF, and what its values call for
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE}
TURNS |= {6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
SHOWN = 480  # longest side in pixels of a small copy
NAME_BYTES = 60  # that a part of a file's name may have; file systems take 255 in all


def find_pictures(words: list[str]) -> list[Path]:
    """The image files that words mean: files, folders (their own files), and patterns, which some shells hand on. Each
    once, in the order of the words. Raises UserError for a word that means none.
    """
    found = []
    for word in words:
        place = Path(word)
        if place.is_file():
            files = [place]
        elif place.is_dir():
            files = [place / name for name in listed(place) if not name.startswith(".")]
        elif any(letter in word for letter in "*?["):
            files = [Path(name) for name in sorted(glob(word, recursive=True))]
        else:
            raise UserError(f"--image_path {word}: no such file or folder")
        if not place.is_file():
            files = [file for file in files if only_images([file.name]) and not file.is_dir()]
        if not files:
            what = "no pictures in this folder" if place.is_dir() else "no picture fits this pattern"
            raise UserError(f"--image_path {word}: {what}\npictures end in {' '.join(sorted(ENDINGS))}")
        found += files
    return list(dict.fromkeys(found))


def listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--image_path {folder}: the folder cannot be read ({error.strerror})") from error


def open_picture(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), not to be written to: turned as its EXIF data say, on white where it is transparent, and of
    several frames the first.

    Raises BadImage for what is no picture, and for one of more pixels than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large, or with odd EXIF data
            with Image.open(path) as image:
                image.load()
                return np.asarray(on_white(eight_bits(upright(image))))
    except Image.DecompressionBombError as error:
        raise BadImage(f"{path}: too large to be opened ({str(error).split(',')[0]}); make it smaller") from error
    except Exception as error:
        empty = path.is_file() and not path.stat().st_size
        raise BadImage(f"{path}: {'the file is empty' if empty else what_is_wrong(error)}") from error


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF data say. Pillow's own function also writes these data anew, which fails where they are damaged."""
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, which Pillow would cut off at 255. Floating point is taken to end at 1."""
    if image.mode not in ("I", "F"):
        return image  # as_rgb() knows the modes that say they have 16
    values = np.asarray(image, np.float64)
    top = next((top for top in (1, 255) if image.mode == "F" and values.max() <= top), 65535)
    return Image.fromarray((255 / top * values).clip(0, 255).astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """In RGB."""
    if image.mode.startswith("I;16") or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return as_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def grouped(
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


def opened(
    files: list[Path], on_bad_image: str = "stop", tell: Callable[[str], None] = print
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each file with its picture. Raises UserError for one that cannot be read; on_bad_image skip: tells so."""
    for file in files:
        try:
            yield file, open_picture(file)
        except BadImage as error:
            if on_bad_image == "stop":
                remedy = "replace the file, or leave such files out with --on_bad_image skip"
                raise UserError(f"a picture cannot be read: {error}\n{remedy}") from error
            tell(f"note: left out: {error}")


def seen_by(picture: np.ndarray, view: StillView) -> tuple[np.ndarray, Box]:
    """uint8 (H, W, 3) -> what the view shows of it, (size, size, 3), and which part of the picture that is.

    Of the whole resized picture only this part is ever computed; it is the same as if all were.
    """
    sides = picture.shape[:2]
    _, plan = view.plan(*sides, None)
    starts = corner(view.size, *plan)
    (y1, y2), (x1, x2) = (
        (start * side / resized, (start + view.size) * side / resized)
        for start, side, resized in zip(starts, sides, plan, strict=True)
    )
    around = (x1, y1, min(x2, sides[1]), min(y2, sides[0]))  # rounding must not step over the border
    pixels = Image.fromarray(picture).resize((view.size, view.size), Image.Resampling.BILINEAR, box=around)
    return np.array(pixels), (*whole_pixels(y1, y2, sides[0]), *whole_pixels(x1, x2, sides[1]))


def whole_pixels(begin: float, end: float, side: int) -> tuple[int, int]:
    """Half-open, inside 0..side, at least one pixel."""
    first = min(round(begin), side - 1)
    return first, min(max(round(end), first + 1), side)


def spread_out(heat: torch.Tensor, box: Box, stretch: bool) -> np.ndarray:
    """A map (h, w) in 0..1 of what lies in the box -> float32, as large as the box; stretch: again from 0 to 1."""
    y1, y2, x1, x2 = box
    inside = F.interpolate(heat[None, None].float(), (y2 - y1, x2 - x1), mode="bilinear")[0, 0].numpy()
    low, high = inside.min(), inside.max()
    if stretch and high > low:  # in place: it may have as many pixels as a photograph
        inside -= low
        inside /= high - low
    return inside


def framed(inside: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """A map as large as the box -> float32 (height, width), 0 outside of the box."""
    y1, y2, x1, x2 = box
    whole = np.zeros((height, width), np.float32)
    whole[y1:y2, x1:x2] = inside
    return whole


# what is seen


class Sight(NamedTuple):
    """What a classifier sees in a picture, by one method and for one class."""

    classifier: Classifier
    method: str
    target: int
    chances: torch.Tensor  # (K,): what it takes the picture for
    heat: torch.Tensor  # (h, w) in 0..1
    box: Box  # part of the picture that it is about


class Looker:
    """A classifier and the methods that ask it: name -> a function of images (B, 3, S, S) and classes (B,) that gives
    maps (B, h, w) in 0..1. wanted: the classes that are asked for; -1 is the most probable one, -2 the next.
    """

    def __init__(
        self,
        classifier: Classifier,
        methods: dict[str, Callable],
        wanted: list[int],
        view: StillView,
        device: torch.device,
    ):
        self.classifier, self.methods, self.wanted = classifier, methods, wanted
        self.view, self.device = view, device

    @property
    def count(self) -> int:
        """How many maps a picture gets."""
        return len(self.methods) * len(self.wanted)

    def look(self, pictures: list[np.ndarray]) -> list[list[Sight]]:
        """What it sees in each of the pictures, uint8 (H, W, 3)."""
        crops, boxes = zip(*(seen_by(picture, self.view) for picture in pictures), strict=True)
        pixels = torch.from_numpy(np.stack(crops)).to(self.device).permute(0, 3, 1, 2).float() / 255
        return asked(self.classifier.name, self.view.size, lambda: self.ask(pixels, boxes))

    def ask(self, pixels: torch.Tensor, boxes: list[Box]) -> list[list[Sight]]:
        """The same of what is cut out of the pictures, (B, 3, S, S) in 0..1."""
        with torch.no_grad():
            chances = self.classifier(pixels).softmax(1)
        if not chances.isfinite().all():
            raise UserError(f"{self.classifier.name}: its scores are not finite: the weights are damaged")
        images = normalised(pixels, self.classifier.mean, self.classifier.std)
        order, found = chances.argsort(1, descending=True), [[] for _ in boxes]
        for method, maps_of in self.methods.items():
            for wanted in self.wanted:
                targets = order[:, -wanted - 1] if wanted < 0 else torch.full_like(order[:, 0], wanted)
                columns = zip(targets.tolist(), chances.cpu(), maps_of(images, targets).cpu(), boxes, strict=True)
                for sights, column in zip(found, columns, strict=True):
                    sights.append(Sight(self.classifier, method, *column))
        return found


def asked(name: str, size: int, ask: Callable):
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


# files


def scaled_down(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), with sides of at most SHOWN pixels."""
    scale = SHOWN / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def save_picture(place: Path, picture: np.ndarray) -> None:
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


def labels_of(files: list[Path]) -> list[str]:
    """What each picture is called in the names of the files made of it: no two alike, whatever the case."""
    names = [plain(file.stem) for file in files]
    for longer in (lambda file: file.name, lambda file: f"{file.parent.name}_{file.name}"):
        often = Counter(name.lower() for name in names)
        names = [
            plain(longer(file)) if often[name.lower()] > 1 else name for file, name in zip(files, names, strict=True)
        ]
    alike = len({name.lower() for name in names}) < len(names)
    return [f"{name}_{number}" for number, name in enumerate(names, 1)] if alike else names


@cache
def plain(name: str) -> str:
    """A name as part of a file's name."""
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    return name.encode()[:NAME_BYTES].decode(errors="ignore") or "_"
