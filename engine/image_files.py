"""Image files: finding them in class folders, decoding them in worker processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from engine.cli import UserError

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, sorted; <class>/images/* counts as <class>/*. Raises UserError where there are none."""
    folders = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        folders[folder.name] = sorted(path for path in inner.iterdir() if path.suffix.lower() in ENDINGS)
    empty = [name for name, files in folders.items() if not files]
    if not folders or empty:
        what = f"no images in {', '.join(empty[:5])}" if folders else "no class folders"
        raise UserError(f"{root}: {what}; expected {root}/<class>/*.jpg (or .png, .JPEG ...){listing(root)}")
    return folders


def listing(folder: Path) -> str:
    """What is in a folder, for the end of a message."""
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    return f"; {folder} holds {', '.join(names[:6]) + (' ...' if len(names) > 6 else '') if names else 'nothing'}"


class BadImage(Exception):
    """A file that cannot be decoded."""


def decode(path: Path, size: int) -> np.ndarray:
    """RGB uint8 (size, size, 3): the shorter side resized to `size` (bilinear, anti-aliased), then the centre."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            width, height = image.size
            scale = size / min(width, height)
            if scale != 1:
                image = image.resize(
                    (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR
                )
            left, top = (image.width - size) // 2, (image.height - size) // 2
            return np.asarray(image.crop((left, top, left + size, top + size)))
    except Exception as error:
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


class ImageFiles(Dataset):
    """Files as a sequence of (uint8 (size, size, 3), number of files skipped). A bad file stops, or the next readable one serves.

    `files[index]` with an index tensor gives a sub-sequence.
    """

    def __init__(self, files: list[Path], size: int, on_bad_image: str = "stop"):
        self.files, self.size, self.on_bad_image = files, size, on_bad_image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            return ImageFiles([self.files[i] for i in index.tolist()], self.size, self.on_bad_image)
        for skipped in range(len(self.files)):
            try:
                pixels = decode(self.files[(index + skipped) % len(self.files)], self.size)
                return torch.from_numpy(pixels.copy()), skipped
            except BadImage as error:
                if self.on_bad_image == "stop":
                    return None, str(error)  # an exception would come out of a worker as a page of text
        return None, "no file of this part can be read"

    def batches(self, order: list[list[int]], workers: int) -> Iterator[tuple[torch.Tensor, int]]:
        """The images of each list of indices: uint8 (B, size, size, 3) and how many files were skipped."""
        loader = DataLoader(
            self,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=one_thread,
            generator=torch.Generator(),
            prefetch_factor=4 if workers else None,
        )  # own generator: draws nothing global
        for pixels, problem in loader:
            if pixels is None:
                raise UserError(
                    f"an image cannot be read: {problem}\nreplace the file, or leave such files out with --on_bad_image skip"
                )
            yield pixels, problem

    def read_all(self, workers: int, progress: Callable) -> torch.Tensor:
        """Every image, uint8 (N, size, size, 3)."""
        order = [list(range(start, min(start + 256, len(self)))) for start in range(0, len(self), 256)]
        bar = progress(self.batches(order, workers), total=len(order), desc="reading images", unit="batch")
        return torch.cat([pixels for pixels, _ in bar])


def collate(samples: list) -> tuple[torch.Tensor | None, int | str]:
    for pixels, problem in samples:
        if pixels is None:
            return None, problem
    return torch.stack([pixels for pixels, _ in samples]), sum(skipped > 0 for _, skipped in samples)


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)
