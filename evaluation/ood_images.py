"""Load out-of-distribution (OOD) images: another data set, a folder of images, or noise."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.data.cifar import LAYOUTS
from engine.data.datasets import load_evaluation
from engine.data.folders import UNKNOWN_ENDING, FileList, describe_folder, describe_left_out
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.listing import filter_images, filter_unknown, walk_files
from engine.data.sample_rng import normal, uniform
from engine.data.views import CenterCrop
from engine.errors import UserError, explain_missing, suggest_closest
from evaluation.corruption_benchmarks import explain_os_errors

NOISE = ("noise", "uniform")
NOISE_COUNT = 1000
DATASETS = (*LAYOUTS, "tiny-imagenet", "imagenet", "shapes")


def load_ood_set(
    spec: str, *, image_size: int, data_dir: str = "data", limit: int = 0, on_bad_image: str = "stop"
) -> tuple[str, ImageSet]:
    """Return a short name for tables, and the images: square, image_size pixels a side, every label 0.

    spec: the name of a data set (its test images, in data_dir), NAME=DIR for one in another folder, a folder of images
    with any subfolders, `noise` (each value normal with mean 0.5 and standard deviation 0.25, clipped to 0..1) or
    `uniform`. Tensors of another size are resized; image files are cropped to the centre square. limit: at most this
    many images, spread over the set; 0: all. Raises UserError for any other spec, and if no image can be read.
    """
    name, pixels, origin, notes = find_pixels(spec, image_size, data_dir, limit, on_bad_image)
    files = pixels.files if isinstance(pixels, ImageFiles) else None
    image_set = ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.long), [name], origin, files=files, notes=notes)
    image_set = image_set.subsample(limit or len(image_set))
    if files is None:
        return name, replace(image_set, pixels=resize_images(image_set.pixels, image_size))
    first, error, _ = pixels.with_replacement().read([0])  # fail now, not after hours of work on the test images
    if first is None:
        remedy = "replace the file, or skip unreadable files with --on_bad_image skip"
        raise UserError(f"{origin}: {error}\n{'choose other images' if on_bad_image == 'skip' else remedy}")
    return name, image_set


def find_pixels(
    spec: str, image_size: int, data_dir: str, limit: int, on_bad_image: str
) -> tuple[str, torch.Tensor | ImageFiles, str, tuple[str, ...]]:
    """Return name, pixels, origin and notes of the images that `spec` stands for; see load_ood_set()."""
    name, _, root = spec.partition("=")
    root, view = root or data_dir, CenterCrop(image_size, image_size)
    with explain_os_errors(Path(root)):
        if spec in NOISE:
            return name, draw_noise(spec, image_size, min(limit or NOISE_COUNT, NOISE_COUNT)), f"{spec}, drawn", ()
        if name in DATASETS:
            side = image_size if name == "shapes" else None  # CIFAR images only exist at 32 pixels
            options = {"view": view, "image_size": side, "any_classes": True, "on_bad_image": on_bad_image}
            found = load_evaluation(name, data_dir=root, **options)
            return name, found.pixels, found.origin, found.notes
        if os.path.isdir(spec):
            files, notes = find_image_files(Path(spec))
            return Path(spec).resolve().name, ImageFiles(files, view, on_bad_image), spec, notes
    names = (*DATASETS, *NOISE)
    unknown = (
        f"neither a folder nor one of {', '.join(names)}{suggest_closest(name.lower(), names)}\ngive a folder of "
        "images, a data set, or NAME=DIR for a data set that is not in --data_dir"
    )
    raise UserError(f"--ood {spec}: {explain_missing(spec, unknown)}")


def find_image_files(root: Path) -> tuple[FileList, tuple[str, ...]]:
    """Return all image files in a folder and its subfolders, sorted, and notes on files that are not read."""
    found = list(walk_files(root))
    names = filter_images(found)
    if not names:
        remedy = f"give a folder with .jpg, .png or similar files{describe_folder(root)}"
        raise UserError(f"{root}: no images in this folder or its subfolders\n{remedy}")
    files = FileList(root, names)
    files.upright = True
    return files, describe_left_out(root, {("file", UNKNOWN_ENDING): filter_unknown(found)})


def draw_noise(kind: str, side: int, count: int) -> torch.Tensor:
    """Return noise images, uint8 (count, side, side, 3), the same at every call."""
    pixels = torch.empty(count, side, side, 3, dtype=torch.uint8)
    for index in torch.arange(count).split(4):  # fits into the CPU cache: twice as fast as 32 images of 224 pixels
        if kind == "uniform":
            pixels[index] = (256 * uniform(index, pixels.shape[1:], seed=0, purpose="uniform pictures")).byte()
        else:
            values = 0.5 + 0.25 * normal(index, pixels.shape[1:], seed=0, purpose="noise pictures")
            pixels[index] = (255 * values.clamp(0, 1)).round().byte()
    return pixels


def resize_images(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize uint8 images (N, H, W, 3) to (N, side, side, 3), bilinear with antialiasing."""
    if pixels.shape[1:3] == (side, side):
        return pixels
    result = torch.empty(len(pixels), side, side, 3, dtype=torch.uint8)
    for chunk, out in zip(pixels.split(256), result.split(256), strict=True):
        resized = F.interpolate(chunk.permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
        out.copy_(resized.permute(0, 2, 3, 1))
    return result
