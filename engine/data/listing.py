"""List the files and folders of a folder. Names that begin with a dot are never listed."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

IMAGE_EXTENSIONS = set(".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .jp2 .tif .tiff .ppm .pgm .pbm .pnm".split())
KNOWN_EXTENSIONS = IMAGE_EXTENSIONS | set(".txt .csv .tsv .xml .json .yaml .md .html .db .ini".split())


def list_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in a folder; an empty list if it does not exist."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if is_visible(entry.name) and entry.is_dir())


def list_images(root: Path) -> list[str]:
    """Return the sorted names of the image files in a folder; an empty list if it does not exist."""
    return filter_images(os.listdir(root)) if root.is_dir() else []


def walk_files(root: str | os.PathLike, folder: str = "") -> Iterator[str]:
    """Yield all files in a folder and its subfolders, as paths relative to root.

    Links to folders are followed, except links to a parent folder.
    """
    here = os.path.join(root, folder) if folder else root
    with os.scandir(here) as entries:
        entries = sorted((entry for entry in entries if is_visible(entry.name)), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():
            yield os.path.join(folder, entry.name)
        elif not (entry.is_symlink() and f"{os.path.realpath(here)}/".startswith(f"{os.path.realpath(entry.path)}/")):
            yield from walk_files(root, os.path.join(folder, entry.name))


def filter_images(names: Iterable[str]) -> list[str]:
    """Return the names or paths of image files, sorted."""
    return sorted(name for name in names if get_extension(name) in IMAGE_EXTENSIONS and is_visible(name))


def filter_unknown(names: Iterable[str]) -> list[str]:
    """Return the names or paths of files that may be images but have an unknown ending, sorted; lists are left out."""
    return sorted(name for name in names if get_extension(name) not in KNOWN_EXTENSIONS)


def get_extension(name: str) -> str:
    return f".{name.rpartition('.')[2].lower()}"


def is_visible(name: str) -> bool:
    return not name.startswith(".", name.rfind("/") + 1)
