"""Replace the background of images, to measure how much a prediction depends on what surrounds the object.

Kim et al., "Co-Mixup", ICLR 2021, arXiv 2102.03065, Sec. 5: x' = M x + (1 - M) r, where M is the union of the
ground-truth boxes, and r is either another image or the image with Gaussian noise. The authors published ready-made
images and not the level of the noise. Here the images are computed from the seed and the position of an image, so that
every classifier sees the same ones.
"""

import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from engine.data import sample_rng
from engine.data.folders import FileList, describe_folder
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.listing import filter_images, walk_files
from engine.data.views import View
from engine.errors import UserError
from engine.runtime.safe_unpickle import load_arrays
from evaluation.localization import Boxes

PICKLES = ("input.pkl", "label.pkl", "bbox.pkl")
REMEDY = "--background_dir needs a file of the same name for every image, or the files " + ", ".join(PICKLES)


def build_object_mask(boxes: Boxes, height: int, width: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the union of each image's ground-truth boxes (n, 4) as a mask (B, 1, H, W) bool on the device.

    An image without known boxes (None) counts as all object, so it stays as it is.
    """
    whole = torch.tensor([[0, height, 0, width]])
    known = [whole if each is None else each.cpu() for each in boxes]
    padded = torch.nn.utils.rnn.pad_sequence(known, batch_first=True) if known else torch.zeros(0, 0, 4)
    padded = padded.to(device, non_blocking=True).unsqueeze(-1)
    y1, y2, x1, x2 = padded.unbind(2)  # (B, n, 1) each; padding boxes are empty
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    in_rows, in_columns = ((rows >= y1) & (rows < y2)).float(), ((columns >= x1) & (columns < x2)).float()
    return (in_rows.mT @ in_columns > 0).unsqueeze(1)


def replace_background(pixels: torch.Tensor, mask: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Take `others` outside the mask. pixels, others (B, 3, H, W), mask (B, 1, H, W) bool -> (B, 3, H, W)."""
    return torch.where(mask, pixels, others)


def add_background_noise(
    pixels: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, seed: int, std: float
) -> torch.Tensor:
    """Add Gaussian noise outside the mask (B, 1, H, W) bool to pixels (B, 3, H, W) in 0..1, and clip to 0..1.

    index (B,): positions in the set, which determine the noise together with the seed. std: in units of the pixels.
    """
    noise = sample_rng.normal(index, pixels.shape[1:], seed=seed, purpose="background noise", device=pixels.device)
    return torch.where(mask, pixels, (pixels + std * noise).clamp(0, 1))


def draw_partner(index: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return (B,) long: the positions of the images used as backgrounds for those at index (B,), in a set of `count`.

    It is never the image itself; all others are equally likely. Raises ValueError if there is no other image.
    """
    if count < 2:
        raise ValueError(f"each background comes from another image: expected at least 2 images, got {count}")
    drawn = sample_rng.uniform(index, (), seed=seed, purpose="background image")
    offset = 1 + (drawn * (count - 1)).long()  # below count, since the draws have 24 bits and stay below 1
    return (index + offset) % count


def read_background_dir(path: Path | str, image_set: ImageSet, view: View) -> ImageSet:
    """Return the versions of an image set's images that a folder holds, in the same order and with the same labels.

    A file is found by its path below the folder without the extension, or else by its name if that is unique. The
    ground-truth boxes of the original images are kept, so the images must show the same view, at any size. Raises
    UserError that names what is missing.
    """
    path = Path(path)
    if image_set.files is None:
        raise UserError(
            f"--background_dir {path}: {image_set.origin} has no image files to match by name\n"
            "leave the option out and use --background rep or noise"
        )
    if not path.is_dir():
        raise UserError(f"--background_dir {path}: no such folder\n{REMEDY}")
    wanted = image_set.files.names()
    found, originals = FileNames(filter_images(walk_files(path))), FileNames(wanted)
    files = [found.match(name, originals) for name in wanted]
    missing = [name for name, file in zip(wanted, files, strict=True) if file is None]
    if missing:
        more = " ..." if len(missing) > 3 else ""
        raise UserError(
            f"--background_dir {path}: no image for {len(missing):,} of {len(image_set):,}: "
            f"{', '.join(missing[:3])}{more}\n{REMEDY}{describe_folder(path)}"
        )
    names = FileList(path, files)
    names.upright = image_set.files.upright
    return replace(image_set, pixels=ImageFiles(names, view), origin=str(path), files=names)


class FileNames:
    """File names that can be looked up without their extensions."""

    def __init__(self, names: list[str]):
        self.by_path = {os.path.splitext(name)[0]: name for name in names}
        self.by_stem = {PurePosixPath(path).name: name for path, name in self.by_path.items()}
        self.counts = Counter(PurePosixPath(path).name for path in self.by_path)

    def match(self, name: str, others: "FileNames") -> str | None:
        """Return the file of that path, else the one of that name if it is unique both here and among `others`."""
        path = os.path.splitext(name)[0]
        stem = PurePosixPath(path).name
        unique = self.counts[stem] == others.counts[stem] == 1
        return self.by_path.get(path) or (self.by_stem[stem] if unique else None)


def has_pickles(path: Path | str) -> bool:
    """Return whether the folder holds the files of a pickled set."""
    return all((Path(path) / name).is_file() for name in PICKLES)


def read_pickles(path: Path | str, classes: list[str], size: int) -> tuple[ImageSet, Boxes]:
    """Read a set as published with Co-Mixup: return the size x size centre crops of its images, and their boxes.

    input.pkl: images (H, W, 3) uint8 of any size; label.pkl: their classes; bbox.pkl: their boxes (n, 4) as x0, y0, x1,
    y1 in 0..1. Unpickling cannot run code. The whole set is held in memory (10 GB for a published one). Raises
    UserError for other content.
    """
    try:
        images, labels, relative_boxes = (load_pickle(Path(path) / name) for name in PICKLES)
        labels = torch.tensor([int(label) for label in labels])
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()} do not fit {len(classes)} classes")
        pixels, boxes = torch.empty(len(labels), size, size, 3, dtype=torch.uint8), []
        for out, image, relative in zip(pixels.numpy(), images, relative_boxes, strict=True):
            if image.dtype != np.uint8 or min(image.shape[:2]) < size:
                raise ValueError(f"an image is {image.dtype} {image.shape}; expected uint8 of at least {size} pixels")
            margin = (np.array(image.shape[:2]) - size) / 2
            top, left = np.round(margin).astype(int)  # rounded as in torchvision's CenterCrop; the boxes are not
            out[:] = image[top : top + size, left : left + size]
            cropped = np.clip(relative * np.array(image.shape)[[1, 0, 1, 0]] - margin[[1, 0, 1, 0]], 0, size)
            x0, y0, x1, y1 = cropped.astype(np.int64).T
            visible = (y1 > y0) & (x1 > x0)
            boxes.append(torch.from_numpy(np.stack([y0, y1, x0, x1], 1)[visible]))
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"--background_dir {path}: {', '.join(PICKLES)} hold no image set ({error})\n{REMEDY}"
        ) from error
    return ImageSet(pixels, labels, classes, str(path)), boxes


def load_pickle(path: Path):
    with open(path, "rb") as file:
        return load_arrays(file)
