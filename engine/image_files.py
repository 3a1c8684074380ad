"""Image files as uint8 pixels, decoded in worker processes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from engine.cli import UserError


class BadImage(Exception):
    """A file that cannot be decoded."""


def decode(path: Path, size: int) -> np.ndarray:
    """RGB uint8 (size, size, 3): the shorter side resized to `size` (bilinear, anti-aliased), then the centre."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            scale = size / min(image.size)
            if scale != 1:
                width, height = (max(size, round(side * scale)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (image.width - size) // 2, (image.height - size) // 2
            return np.array(image.crop((left, top, left + size, top + size)))
    except Exception as error:
        raise BadImage(f"{path}: {str(error) or type(error).__name__}") from error


class ImageFiles(Dataset):
    """Files as a sequence of (uint8 (size, size, 3), index of the file).

    on_bad_image: `stop`, or `skip` to let the next readable file, with its index, serve. An index tensor gives a
    sub-sequence.
    """

    def __init__(self, files: list[Path], size: int, on_bad_image: str = "stop"):
        self.files, self.size, self.on_bad_image = files, size, on_bad_image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            return ImageFiles([self.files[i] for i in index.tolist()], self.size, self.on_bad_image)
        for place in [*range(index, len(self.files)), *range(index)]:
            try:
                return torch.from_numpy(decode(self.files[place], self.size)), place
            except BadImage as error:
                if self.on_bad_image == "stop":
                    return None, str(error)  # raised here, it would come out of a worker as a page of text
        return None, "no file of this part can be read"

    def batches(self, order: list[list[int]], workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each list of indices: images uint8 (B, size, size, 3), and the indices (B,) of the files they are of."""
        workers = min(workers, os.cpu_count() or 1)  # more of them would only wait
        loader = DataLoader(
            self,
            batch_sampler=order,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            collate_fn=collate,
            worker_init_fn=use_one_thread,
            generator=torch.Generator(),  # the loader draws a number; it shall not be one of the run's
        )
        for pixels, places in loader:
            if pixels is None:
                raise UserError(
                    f"an image cannot be read: {places}\nreplace the file, or leave such files out with "
                    "--on_bad_image skip"
                )
            yield pixels, places

    def read_all(self, workers: int, progress: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Every image, uint8 (N, size, size, 3), and the indices (N,) of the files that served."""
        order = [list(range(start, min(start + 256, len(self)))) for start in range(0, len(self), 256)]
        bar = progress(self.batches(order, workers), total=len(order), desc="reading images", unit="batch")
        pixels, places = zip(*bar, strict=True)
        return torch.cat(pixels), torch.cat(places)


def collate(samples: list) -> tuple[torch.Tensor | None, torch.Tensor | str]:
    for pixels, problem in samples:
        if pixels is None:
            return None, problem
    return torch.stack([pixels for pixels, _ in samples]), torch.tensor([place for _, place in samples])


def use_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
