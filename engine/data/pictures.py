"""Pictures that a user names: find the files, read them as an image viewer shows them, and name the output files."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from glob import glob
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine.data.decode import BadImage, decode_image
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.label_lists import format_examples
from engine.data.listing import IMAGE_EXTENSIONS, filter_images, filter_unknown, is_visible, list_images
from engine.data.views import View
from engine.errors import UserError, explain_missing

MAX_NAME_BYTES = 60  # of each part of a file name; file systems allow 255 bytes in total


def find_images(patterns: list[str], option: str) -> list[Path]:
    """Return the image files that `patterns` match, each once, in their order.

    A pattern is a file, a folder (without its subfolders) or a glob pattern, which some shells do not expand. option:
    the option of the command line that has the patterns, for messages. Raises UserError for a pattern without images.
    """
    images = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            images.append(path)
            continue
        entries = list_entries(pattern, option)
        found = filter_images(str(entry) for entry in entries if not entry.is_dir())
        if not found:
            problem = "no images in this folder" if path.is_dir() else "no image matches this pattern"
            raise UserError(f"{option} {pattern}: {problem}\nimage files end in {' '.join(sorted(IMAGE_EXTENSIONS))}")
        unread = filter_unknown(str(entry) for entry in entries if not entry.is_dir())
        unread += [f"{entry}/" for entry in entries if entry.is_dir() and list_images(entry)]
        if unread:
            print_line(
                f"note: {pattern}: not read, since these are subfolders or have no ending of an image: "
                f"{format_examples(unread)} ({len(unread)})"
            )
        images += map(Path, found)
    return list(dict.fromkeys(images))


def list_entries(pattern: str, option: str) -> list[Path]:
    """Return the visible entries of a folder, or the paths that a glob pattern matches, sorted."""
    path = Path(pattern)
    if path.is_dir():
        try:
            return sorted(entry for entry in path.iterdir() if is_visible(entry.name))
        except OSError as error:
            raise UserError(f"{option} {path}: the folder cannot be read ({error.strerror})") from error
    if any(letter in pattern for letter in "*?[") and "://" not in pattern:
        return [Path(name) for name in sorted(glob(pattern, recursive=True))]
    raise UserError(f"{option} {pattern}: {explain_missing(pattern)}")


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
    """Yield each file with its image, upright: RGB uint8 (H, W, 3).

    An unreadable file raises UserError if on_bad_image is `stop`; with `skip` it is skipped with a note.
    """
    for file in files:
        try:
            yield file, decode_image(file, upright=True)
        except BadImage as error:
            if on_bad_image == "stop":
                remedy = "replace the file, or skip unreadable files with --on_bad_image skip"
                raise UserError(f"an image cannot be read: {error}\n{remedy}") from error
            print_line(f"note: skipped: {error}")


def explain_unreadable(file: Path) -> str:
    """Return the name of a picture and why it cannot be read."""
    try:
        decode_image(file, upright=True)
    except BadImage as error:
        return str(error)
    return f"{file}: it could not be read at first"


def make_picture_set(files: list[Path], view: View, on_bad_image: str, option: str) -> ImageSet:
    """Return pictures, upright, as an image set without classes.

    The label of a picture is its position in `files`, so that predictions say which pictures were read. option: that
    named them, for messages.
    """
    names = FileList("", map(str, files))
    names.upright = True
    return ImageSet(ImageFiles(names, view, on_bad_image), torch.arange(len(files)), [], option, files=names)


def print_line(text: str) -> None:
    """Print a line, above the progress bar if there is one. It may contain file names with invalid characters."""
    with tqdm.external_write_mode():
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
