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

import torch

from engine.errors import UserError
from engine.runtime.files import delay_interrupt, write_atomic
from engine.runtime.safe_unpickle import PLACEHOLDER_PICKLE

FORMAT = 2


def get_versions() -> dict[str, str]:
    import numpy
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }


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


def read_checkpoint(path: Path, kind: str = "classifier") -> dict:
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
