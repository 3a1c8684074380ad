"""Images whose background is another one: how much of an answer comes from around the object.

Kim et al., "Co-Mixup", ICLR 2021, arXiv 2102.03065, Sec. 5: x' = M x + (1 - M) r, where M is the union of the true
boxes, and r the same place of another image, or the image with Gaussian noise. Theirs were published ready-made and
without the level of the noise. Here they are made from the seed and the position of an image, so that every classifier
sees the same ones.
"""

import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from engine.data import sample_rng
from engine.data.folders import FileList, describe_folder, filter_images
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.views import View
from engine.errors import UserError
from engine.runtime.safe_unpickle import load_arrays
from evaluation.localization import Boxes

PICKLES = ("input.pkl", "label.pkl", "bbox.pkl")
REMEDY = "--background_dir needs a file of the same name for every image, or " + ", ".join(PICKLES)


def build_object_mask(boxes: Boxes, height: int, width: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The union of the true boxes (n, 4) of each image -> (B, 1, H, W) bool on the device.

    An image whose boxes are not known (None) counts as all object, and so stays as it is.
    """
    whole = torch.tensor([[0, height, 0, width]])
    known = [whole if each is None else each.cpu() for each in boxes]
    padded = torch.nn.utils.rnn.pad_sequence(known, batch_first=True) if known else torch.zeros(0, 0, 4)
    y1, y2, x1, x2 = padded.to(device).unsqueeze(-1).unbind(2)  # (B, n, 1) each; an added box is empty
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    tall, wide = ((rows >= y1) & (rows < y2)).float(), ((columns >= x1) & (columns < x2)).float()
    return (tall.mT @ wide > 0).unsqueeze(1)


def replace_background(pixels: torch.Tensor, mask: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """pixels, others (B, 3, H, W), mask (B, 1, H, W) bool -> the same places of `others` outside the mask."""
    return torch.where(mask, pixels, others)


def add_background_noise(
    pixels: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, seed: int, std: float
) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1, with Gaussian noise outside the mask (B, 1, H, W) bool, clipped to 0..1.

    index (B,): positions in the set, which determine the noise together with the seed. std: in units of the pixels.
    """
    noise = sample_rng.normal(index, pixels.shape[1:], seed=seed, purpose="background noise", device=pixels.device)
    return torch.where(mask, pixels, (pixels + std * noise).clamp(0, 1))


def draw_partner(index: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """index (B,): positions in a set of `count` images -> (B,) long: positions of the images that serve as their
    backgrounds. Never the image itself; all others are equally likely.
    """
    if count < 2:
        raise ValueError(f"a background comes from another image, and there are {count} in all")
    drawn = sample_rng.uniform(index, (), seed=seed, purpose="background image")
    step = 1 + (drawn * (count - 1)).long()  # never count: 24 random bits leave room below 1
    return (index + step) % count


def read_background_dir(place: Path | str, image_set: ImageSet, view: View) -> ImageSet:
    """Versions of the images of a set that a folder holds, in the same order and with the same labels.

    A file is found by its path below the folder without its extension; else by its name where that is unique. The true
    boxes stay those of the originals: the images must show the same, at any size. Raises UserError that names what is
    missing.
    """
    place = Path(place)
    if image_set.files is None:
        raise UserError(
            f"--background_dir {place}: {image_set.origin} has no image files that others could stand for\n"
            "leave it out: the images are made from the seed then"
        )
    if not place.is_dir():
        raise UserError(f"--background_dir {place}: no such folder\n{REMEDY}")
    wanted = image_set.files.names()
    found, originals = FileNames(list_images(place)), FileNames(wanted)
    files = [found.match(name, originals) for name in wanted]
    missing = [name for name, file in zip(wanted, files, strict=True) if file is None]
    if missing:
        more = " ..." if len(missing) > 3 else ""
        raise UserError(
            f"--background_dir {place}: no image for {len(missing):,} of {len(image_set):,}: "
            f"{', '.join(missing[:3])}{more}\n{REMEDY}{describe_folder(place)}"
        )
    names = FileList(place, files)
    return replace(image_set, pixels=ImageFiles(names, view), origin=str(place), files=names)


class FileNames:
    """Paths of files, looked up without their extensions."""

    def __init__(self, names: list[str]):
        self.by_path = {os.path.splitext(name)[0]: name for name in names}
        self.by_stem = {PurePosixPath(path).name: name for path, name in self.by_path.items()}
        self.counts = Counter(PurePosixPath(path).name for path in self.by_path)

    def match(self, name: str, others: "FileNames") -> str | None:
        """The file of that path; else the one of that name, if it is unique both here and among the others."""
        path = os.path.splitext(name)[0]
        stem = PurePosixPath(path).name
        unique = self.counts[stem] == others.counts[stem] == 1
        return self.by_path.get(path) or (self.by_stem[stem] if unique else None)


def list_images(place: Path) -> list[str]:
    """The images in a folder and its subfolders, relative to it, sorted."""
    found = []
    for folder, _, names in os.walk(place):
        found += [(Path(folder) / name).relative_to(place).as_posix() for name in filter_images(names)]
    return sorted(found)


def has_pickles(place: Path | str) -> bool:
    return all((Path(place) / name).is_file() for name in PICKLES)


def read_pickles(place: Path | str, classes: list[str], size: int) -> tuple[ImageSet, Boxes]:
    """A set as it was published with Co-Mixup: the centre crops, size x size, of its images, and their true boxes.

    input.pkl: images (H, W, 3) uint8, each of its own shape; label.pkl: their classes; bbox.pkl: their boxes (n, 4) as
    x0, y0, x1, y1 in 0..1. Unpickling runs no code. The whole set is held in memory (10 GB a published one). Raises
    UserError for other content.
    """
    try:
        images, labels, shares = (load_pickle(Path(place) / name) for name in PICKLES)
        labels = torch.tensor([int(label) for label in labels])
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, and {len(classes)} classes")
        pixels, boxes = torch.empty(len(labels), size, size, 3, dtype=torch.uint8), []
        for out, image, share in zip(pixels.numpy(), images, shares, strict=True):
            if image.dtype != np.uint8 or min(image.shape[:2]) < size:
                raise ValueError(f"an image of {image.dtype} {image.shape}, where uint8 of {size} pixels are wanted")
            spare = (np.array(image.shape[:2]) - size) / 2
            top, left = np.round(spare).astype(int)  # as torchvision's CenterCrop; the boxes move by the fraction
            out[:] = image[top : top + size, left : left + size]
            seen = np.clip(share * np.array(image.shape)[[1, 0, 1, 0]] - spare[[1, 0, 1, 0]], 0, size)
            x0, y0, x1, y1 = seen.astype(np.int64).T
            inside = (y1 > y0) & (x1 > x0)
            boxes.append(torch.from_numpy(np.stack([y0, y1, x0, x1], 1)[inside]))
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"--background_dir {place}: {', '.join(PICKLES)} hold no set ({error})\n{REMEDY}") from error
    return ImageSet(pixels, labels, classes, str(place)), boxes


def load_pickle(path: Path):
    with open(path, "rb") as file:
        return load_arrays(file)
