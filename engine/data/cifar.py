"""CIFAR-10 and CIFAR-100 from their python pickles, without letting a pickle run anything."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.errors import UserError
from engine.runtime.safe_unpickle import load_arrays


class Layout(NamedTuple):
    """What the archive of a set unpacks to."""

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


def find_cifar(name: str, data_dir: Path, download: bool) -> Path:
    """The folder with the files, fetched if need be. Raises UserError that says what was looked for where."""
    layout = LAYOUTS[name]
    needed = [*layout.train, layout.test, layout.meta]
    places = [data_dir / layout.folder, data_dir]
    for place in places:
        missing = [file for file in needed if not (place / file).is_file()]
        if not missing:
            return place
        if place.name == layout.folder and place.is_dir():
            raise UserError(
                f"{name} in {place} is incomplete: {', '.join(missing)} missing\ndelete the folder and try again, "
                "or put the files there"
            )
    reason = ""
    if download:
        try:
            from torchvision import datasets

            {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](str(data_dir), download=True)
            return places[0]
        except Exception as error:
            reason = f"; downloading it failed ({type(error).__name__}: {error})"
    sizes = ", ".join(f"{file} ({layout.sizes[file]:,} bytes)" for file in needed)
    raise UserError(
        f"{name} not found: looked for {sizes} in {' and '.join(map(str, places))}{reason}\nunpack the python version "
        f"of {name} there, or name its place with --data_dir; --dataset shapes needs no files"
    )


def read_cifar(name: str, place: Path, files: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 32, 32, 3) and labels (N,) long of the named files."""
    contents = [read_pickle(place / file, LAYOUTS[name].sizes[file]) for file in files]
    pixels = np.concatenate([content["data"] for content in contents]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for content in contents for label in content[LAYOUTS[name].label_key]]
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(labels)


def read_class_names(name: str, place: Path) -> list[str]:
    layout = LAYOUTS[name]
    return list(read_pickle(place / layout.meta, layout.sizes[layout.meta])[layout.names_key])


def read_pickle(path: Path, size: int) -> dict:
    """One file, whole. Raises UserError with the expected and the found size when it is damaged."""
    try:
        with open(path, "rb") as file:
            content = load_arrays(file, encoding="latin1")
        if "data" in content and content["data"].shape[1:] != (3072,):
            raise ValueError(f"an image has {content['data'].shape[1:]} numbers")
        return content
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): expected {size:,} bytes, found "
            f"{path.stat().st_size:,}\ndelete it and unpack or download the archive again"
        ) from error
