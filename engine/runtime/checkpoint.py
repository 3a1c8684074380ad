"""Checkpoints: written so that a kill cannot harm them, read so that no file can run code.

Our own format is a dictionary of tensors, text, numbers, lists and dictionaries, and loads with weights_only=True.
"""

import os
import pickle
import platform
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypedDict

import torch

from engine.errors import UserError
from engine.runtime.files import delay_interrupt, write_atomic
from engine.runtime.safe_unpickle import PLACEHOLDER_PICKLE

FORMAT = 2


class Checkpoint(TypedDict, total=False):
    """The content of a checkpoint, of whatever kind of run. make_checkpoint() writes it, read_checkpoint() reads it."""

    format: int  # FORMAT
    kind: str  # of KINDS; a classifier where it is missing
    epoch: int  # finished epochs
    step: int  # finished optimizer steps
    precision: str  # what the network computed in: "None" (float32), "torch.bfloat16", "torch.float16"
    config: dict  # every option of the run
    history: list[dict]  # a row of the log for each finished epoch
    best: dict  # value, epoch and split of the best epoch so far
    before: dict | None  # of the epoch under way: seconds it took so far, lr at its start
    inside: list[dict] | None  # where the epoch under way was stopped: sums and batch statistics of each process
    model: dict  # state dicts
    optimizer: dict
    scheduler: dict
    scaler: dict | None
    ema: dict | None
    method: list[dict | None]  # of the mixer, for each process
    saliency: list[dict]  # of each source
    rng: list[dict]  # random generators of each process
    classes: list[str]  # of the data
    num_classes: int
    image_size: int | None  # side in pixels; None where images are of any size
    mean: list[float]
    std: list[float]
    versions: dict[str, str]
    backbone: dict  # detectors: where the backbone came from
    images: int  # detectors: number of training images
    decoder: dict  # saliency maps: state dicts of the mask decoder and of its optimizer
    decoder_optimizer: dict
    pool: str | None  # saliency maps: name of the file of past classifiers


def get_versions() -> dict[str, str]:
    import numpy
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }


class DataInfo(Protocol):
    """What a checkpoint says of the data; engine.data.image_set.Data is one."""

    classes: list[str]
    image_size: int | None  # side in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_checkpoint(*, data: DataInfo, state: dict, **values) -> Checkpoint:
    """A checkpoint of these values. state: what the training state says of itself; the other names are Checkpoint's."""
    return Checkpoint(
        format=FORMAT,
        classes=list(data.classes),
        num_classes=len(data.classes),
        image_size=data.image_size,
        mean=list(data.mean),
        std=list(data.std),
        versions=get_versions(),
        **state,
        **values,
    )


def save_checkpoint(path: Path, content: dict, *, keep_previous: bool = False) -> None:
    """Write `content` to `path`; with keep_previous the file that was there stays as previous.pt. Ctrl-C waits."""
    path = Path(path)

    def put_by() -> None:
        if keep_previous and path.exists():
            link_or_copy(path, path.with_name("previous.pt"))

    with delay_interrupt():
        write_atomic(path, lambda side: torch.save(content, side), before_rename=put_by)


def link_or_copy(source: Path, target: Path) -> None:
    """`target` becomes a second name of `source` (a copy where the file system has no links), without a moment of
    absence.
    """
    side = target.with_name(f".{target.name}.part")
    with suppress(FileNotFoundError):
        side.unlink()
    try:
        os.link(source, side)
    except OSError:
        shutil.copyfile(source, side)
    os.replace(side, target)


KINDS = {  # what a checkpoint is of, and who makes it
    "classifier": "a classifier, made by train.py",
    "casm": "saliency maps, made by python -m saliency.casm train",
    "detector": "a detector, made by detect.py",
}


OTHER_USES = {  # of weights that are no checkpoint of ours
    "classifier": "evaluate it with evaluate.py, or start from its weights with --init_from",
    "casm": "evaluate it with python -m saliency.casm eval",
    "detector": "evaluate it with --evaluate --frcnn_checkpoint, or start from its weights with --frcnn_checkpoint",
}


def read_checkpoint(path: Path, kind: str = "classifier") -> Checkpoint:
    """A checkpoint of our own format, on the CPU. kind: of what. Raises UserError that names the file and what is wrong
    with it.
    """
    content = read_file(path)
    if not is_checkpoint(content):
        raise UserError(
            f"{path}: no checkpoint that training can continue from (found: "
            f"{list_first_keys(content)})\n{OTHER_USES[kind]}"
        )
    if (held := content.get("kind", "classifier")) != kind:
        raise UserError(f"{path}: a checkpoint of {KINDS.get(held, held)}\nhere one of {KINDS[kind]} is wanted")
    return content


def is_checkpoint(content) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def find_checkpoint(path: str) -> Path:
    """A file, or the last.pt in a run folder. Raises UserError if there is none."""
    place = Path(path)
    if place.is_dir():
        place = place / "last.pt"
    if not place.is_file():
        raise UserError(f"{place}: no such file; give a checkpoint or a run folder that holds one")
    return place


def read_file(path: Path):
    """Any file of weights, on the CPU; nothing in it can run. Raises UserError for a missing or damaged one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):  # torch does not compare the stored checksums
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"checksum of {broken} does not match")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=PLACEHOLDER_PICKLE)
    except Exception as error:
        previous = path.with_name("previous.pt")
        remedy = "copy or download it again"
        if path.name == "last.pt" and previous.is_file():
            remedy = f"the epoch before it is in {previous}: continue from there with --checkpoint {previous}"
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path} ({size} bytes) is damaged or no checkpoint ({type(error).__name__}: {reason})\n{remedy}"
        ) from error


def read_safetensors(path: Path) -> dict:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading .safetensors needs another package: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path}: damaged or no safetensors file ({error})") from error


def list_first_keys(content) -> str:
    if isinstance(content, dict):
        return ", ".join(map(str, list(content)[:5])) or "an empty dictionary"
    return type(content).__name__
