"""Images of none of a network's classes, for out-of-distribution detection: other data sets, pictures, noise."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.data.cifar import LAYOUTS
from engine.data.datasets import load_evaluation
from engine.data.folders import FileList, describe_folder, filter_images, find_evaluation_images
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.sample_rng import normal, uniform
from engine.data.views import CenterCrop
from engine.errors import UserError, suggest_closest
from evaluation.corruption_benchmarks import explain_os_errors

NOISE = ("noise", "uniform")
NOISE_COUNT = 1000
DATASETS = (*LAYOUTS, "tiny-imagenet", "imagenet", "shapes")


def load_ood_set(
    word: str, *, image_size: int, data_dir: str = "data", limit: int = 0, on_bad_image: str = "stop"
) -> tuple[str, ImageSet]:
    """A short name for tables, and the images: square of image_size pixels, every label 0.

    word: the name of a data set (its test part, in data_dir), NAME=DIR for one in another place, a folder of pictures
    with any folders in it, `noise` (each value normal with mean 0.5 and deviation 0.25, clipped to 0..1) or `uniform`.
    Pixels of another size are resized, files cut to the centre square. limit: at most so many, from all over; 0: all.
    Raises UserError for a word that is none of these, and where no image is found or can be decoded.
    """
    name, pixels, origin = find_pixels(word, image_size, data_dir, limit, on_bad_image)
    files = pixels.files if isinstance(pixels, ImageFiles) else None
    image_set = ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.long), [name], origin, files=files)
    image_set = image_set.subsample(limit or len(image_set))
    if files is None:
        return name, replace(image_set, pixels=resize_images(image_set.pixels, image_size))
    first, fault, _ = image_set.pixels.read([0])  # now, not after hours with the images inside
    if first is None:
        remedy = "replace the file, or skip unreadable files with --on_bad_image skip"
        raise UserError(f"{origin}: {fault}\n{'name other pictures' if on_bad_image == 'skip' else remedy}")
    return name, image_set


def find_pixels(
    word: str, image_size: int, data_dir: str, limit: int, on_bad_image: str
) -> tuple[str, torch.Tensor | ImageFiles, str]:
    """Name, pixels and origin of what a word means; see load_ood_set()."""
    name, _, place = word.partition("=")
    place, view = place or data_dir, CenterCrop(image_size, image_size)
    with explain_os_errors(Path(place)):
        if word in NOISE:
            return name, draw_noise(word, image_size, min(limit or NOISE_COUNT, NOISE_COUNT)), f"{word}, drawn"
        if name == "imagenet":  # any part of it will do, where load_evaluation() asks for its 1000 classes
            found = find_evaluation_images(name, Path(place), None, None)
            return name, ImageFiles(found.files, view, on_bad_image), str(found.root)
        if name in DATASETS:
            side = image_size if name == "shapes" else None  # of CIFAR's 32 pixels nothing else can be asked
            found = load_evaluation(name, data_dir=place, view=view, image_size=side, on_bad_image=on_bad_image)
            return name, found.pixels, found.origin
        if os.path.isdir(word):
            return Path(word).resolve().name, ImageFiles(find_pictures(Path(word)), view, on_bad_image), word
    words = (*DATASETS, *NOISE)
    raise UserError(
        f"{word}: neither a folder nor one of {', '.join(words)}{suggest_closest(name.lower(), words)}\nname a folder "
        "of pictures, a data set, or NAME=DIR for a data set that is not in --data_dir"
    )


def find_pictures(root: Path) -> FileList:
    """All image files below root, sorted, without hidden files and folders and links to folders."""
    names = []

    def stop(error: OSError):  # os.walk would pass over a folder that must not be read
        raise error

    for folder, subfolders, files in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = filter_images([name for name in files if not name.startswith(".")])
        names += [os.path.relpath(os.path.join(folder, name), root) for name in visible]
    if not names:
        remedy = f"name a folder with .jpg, .png or the like{describe_folder(root)}"
        raise UserError(f"{root}: no images there or in its folders\n{remedy}")
    return FileList(root, sorted(names))


def draw_noise(kind: str, side: int, count: int) -> torch.Tensor:
    """uint8 (count, side, side, 3), the same at every call."""
    pixels = torch.empty(count, side, side, 3, dtype=torch.uint8)
    for index in torch.arange(count).split(4):  # stays in the CPU's cache: twice as fast as 32 at 224 pixels
        if kind == "uniform":
            pixels[index] = (256 * uniform(index, pixels.shape[1:], seed=0, purpose="uniform pictures")).byte()
        else:
            drawn = 0.5 + 0.25 * normal(index, pixels.shape[1:], seed=0, purpose="noise pictures")
            pixels[index] = (255 * drawn.clamp(0, 1)).round().byte()
    return pixels


def resize_images(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> (N, side, side, 3), bilinear and anti-aliased."""
    if pixels.shape[1:3] == (side, side):
        return pixels
    result = torch.empty(len(pixels), side, side, 3, dtype=torch.uint8)
    for some, out in zip(pixels.split(256), result.split(256), strict=True):
        small = F.interpolate(some.permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
        out.copy_(small.permute(0, 2, 3, 1))
    return result
