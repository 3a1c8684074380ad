"""Read CIFAR-10 and CIFAR-100 from their Python pickles without executing code from them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.errors import UserError
from engine.runtime.safe_unpickle import load_arrays


class Layout(NamedTuple):
    """The files that the archive of a data set unpacks to."""

    folder: str
    train: list[str]
    test: str
    meta: str
    label_key: str
    names_key: str
    sizes: dict[str, int]  # of the official files, in bytes


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
        {"data_batch_1": 31035704, "data_batch_2": 31035320, "data_batch_3": 31035999, "data_batch_4": 31035696}
        | {"data_batch_5": 31035623, "test_batch": 31035526, "batches.meta": 158},
    ),
    "cifar100": Layout(
        "cifar-100-python",
        ["train"],
        "test",
        "meta",
        "fine_labels",
        "fine_label_names",
        {"train": 155249918, "test": 31049707, "meta": 1473},
    ),
}


def find_cifar(name: str, data_dir: Path, files: list[str], download: bool) -> Path:
    """Return the folder with these files and the class names; download the data set if allowed.

    Raises UserError with the paths that were tried.
    """
    layout = LAYOUTS[name]
    needed = [*files, layout.meta]
    folders = [data_dir / layout.folder, data_dir]
    for folder in folders:
        missing = [file for file in needed if not (folder / file).is_file()]
        if not missing:
            return folder
        if folder.name == layout.folder and folder.is_dir():
            raise UserError(
                f"{name} in {folder} is incomplete: {', '.join(missing)} missing\n"
                "put the missing files there, or delete the folder to download it again"
            )
    reason = ""
    if download:
        try:
            from torchvision import datasets

            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](str(data_dir), download=True)
            return folders[0]
        except Exception as error:
            reason = f"; the download failed ({type(error).__name__}: {error})"
    sizes = ", ".join(f"{file} ({layout.sizes[file]:,} bytes)" for file in needed)
    raise UserError(
        f"{name} not found: looked for {sizes} in {' and '.join(map(str, folders))}{reason}\n"
        f"unpack the Python version of {name} there, or name its folder with --data_dir; --dataset shapes needs no "
        "files"
    )


def read_cifar(name: str, folder: Path, files: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read images uint8 (N, 32, 32, 3) and labels (N,) long from the named files."""
    contents = [read_pickle(folder / file, LAYOUTS[name].sizes[file]) for file in files]
    pixels = np.concatenate([content["data"] for content in contents]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for content in contents for label in content[LAYOUTS[name].label_key]]
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(labels)


def read_class_names(name: str, folder: Path) -> list[str]:
    layout = LAYOUTS[name]
    return list(read_pickle(folder / layout.meta, layout.sizes[layout.meta])[layout.names_key])


def read_pickle(path: Path, size: int) -> dict:
    """Read one file. If it is damaged, raises UserError with its expected and its actual size."""
    try:
        with open(path, "rb") as file:
            content = load_arrays(file, encoding="latin1")
        if "data" in content and content["data"].shape[1:] != (3072,):
            raise ValueError(f"each image has shape {content['data'].shape[1:]}, expected (3072,)")
        return content
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): expected {size:,} bytes, found "
            f"{path.stat().st_size:,}\ndelete it, then unpack or download the archive again"
        ) from error
