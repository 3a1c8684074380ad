"""Checkpoints: written so that a kill cannot damage them, read so that no file can run code.

Our own format is a dictionary of tensors, strings, numbers, lists and dictionaries. It loads with weights_only=True.
"""

import json
import os
import pickle
import platform
import shutil
import zipfile
from pathlib import Path
from typing import Protocol, TypedDict

import torch

from engine.errors import UserError, explain_missing, get_first_error_line
from engine.runtime.files import delay_interrupt, make_side_path, write_atomic
from engine.runtime.safe_unpickle import PLACEHOLDER_PICKLE

FORMAT = 2
MADE_BY = "saliency-mixing: evaluate.py --export"  # in the description of every exported file


class Checkpoint(TypedDict, total=False):
    """The content of a checkpoint of any kind of run. make_checkpoint() builds it, read_checkpoint() reads it."""

    format: int  # FORMAT
    kind: str  # a key of KINDS; if missing: classifier
    epoch: int  # number of finished epochs
    step: int  # number of finished optimizer steps
    precision: str  # of the network: "None" (float32), "torch.bfloat16" or "torch.float16"
    config: dict  # every option of the run
    history: list[dict]  # one row of the log per finished epoch
    best: dict  # value, epoch and split of the best epoch so far
    before: dict | None  # of the unfinished epoch: seconds spent so far, and lr at its start
    inside: list[dict] | None  # of the unfinished epoch: sums and batch statistics of each process
    model: dict  # this and the next four are state dicts
    optimizer: dict
    scheduler: dict
    scaler: dict | None
    ema: dict | None
    method: list[dict | None]  # state of the mixer in each process
    saliency: list[dict]  # state of each saliency source
    rng: list[dict]  # states of the random generators in each process
    classes: list[str]  # class names of the data
    titles: list[str]  # class names to display; if missing: classes
    num_classes: int
    images: int  # number of training images
    image_size: int | None  # side in pixels; None: images of any size
    mean: list[float]  # of the normalisation, per channel
    std: list[float]
    versions: dict[str, str]  # of Python and the packages
    backbone: dict  # detectors: origin of the backbone
    decoder: dict  # saliency maps: state dict of the mask decoder
    decoder_optimizer: dict
    pool: str | None  # saliency maps: name of the file with past classifiers


def get_versions() -> dict[str, str]:
    """Return the versions of Python, torch, torchvision and numpy."""
    import numpy
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
    }


class DataInfo(Protocol):
    """What a checkpoint records about the data. engine.data.image_set.Data satisfies it."""

    classes: list[str]  # class names
    image_size: int | None  # side in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]  # mean and std per channel


def make_checkpoint(*, data: DataInfo, state: dict, **values) -> Checkpoint:
    """Return a checkpoint. state: the training state's state_dict(). values: further entries of Checkpoint."""
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
    """Write `content` to `path` atomically; Ctrl-C is delayed until it is written.

    keep_previous: keep the file that was there as previous.pt. Raises UserError if the file cannot be written.
    """
    path = Path(path)

    def link_previous() -> None:
        if keep_previous and path.exists():
            link_or_copy(path, path.with_name("previous.pt"))

    with delay_interrupt():
        try:
            write_atomic(path, lambda side: torch.save(content, side), before_rename=link_previous)
        except UserError as error:
            raise UserError(f"{error}, then resume the run with --checkpoint") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system has no hard links. An existing `target` is
    replaced atomically.
    """
    side = make_side_path(target)
    try:
        os.link(source, side)
    except OSError:
        shutil.copyfile(source, side)
    os.replace(side, target)


KINDS = {  # kind of checkpoint -> its description in messages
    "classifier": "a classifier (from train.py or imagenet_train.py)",
    "casm": "a saliency-map network (from python -m saliency.casm train)",
    "detector": "a detector (from detect.py)",
    "weights": "the weights of a classifier alone (from evaluate.py --export)",
}


OTHER_USES = {  # kind of checkpoint wanted -> what to do with a file of weights instead
    "classifier": "evaluate it with evaluate.py, or start a new run from its weights with --init_from",
    "casm": "evaluate it with python -m saliency.casm eval",
    "detector": "evaluate it with --evaluate --frcnn_checkpoint, or start a new run from it with --frcnn_checkpoint",
}


def read_checkpoint(path: Path, kind: str = "classifier") -> Checkpoint:
    """Read a checkpoint of our own format to the CPU. kind: a key of KINDS.

    Raises UserError, which names the file and the fault, if the file is missing, damaged, or of another format or kind.
    """
    content = read_file(path)
    if not is_checkpoint(content):
        raise UserError(
            f"{path}: not a checkpoint that a run can resume from (found: {list_first_keys(content)})\n"
            f"{OTHER_USES[kind]}"
        )
    if (found := content.get("kind", "classifier")) != kind:
        use = f"; {OTHER_USES[kind]}" if found == "weights" else ""
        raise UserError(
            f"{path}: this is a checkpoint of {KINDS.get(found, found)}\nexpected one of {KINDS[kind]}{use}"
        )
    check_finite(path, *(content.get(key) for key in ("model", "ema", "decoder")))
    return content


def check_finite(path: Path, *states: dict | None) -> None:
    """Raise UserError if a state dict holds NaN or infinite values. path: of the file that it comes from."""
    values = [item for state in states if state for item in state.items() if isinstance(item[1], torch.Tensor)]
    if broken := [key for key, value in values if value.is_floating_point() and not value.isfinite().all()]:
        raise UserError(
            f"{path}: the weights are NaN or infinite ({shorten_list(broken)})\nuse another file, such as a checkpoint "
            "of an earlier epoch"
        )


def is_checkpoint(content) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def find_checkpoint(path: str) -> Path:
    """Return the path of a checkpoint file; a run folder stands for its last.pt. Raises UserError if there is none."""
    file = Path(path)
    if file.is_dir():
        file = file / "last.pt"
    if not file.is_file():
        missing = "no such file; give a checkpoint, or a run folder with last.pt"
        raise UserError(f"{file}: {explain_missing(path, missing)}")
    return file


def read_file(path: Path):
    """Read any file of weights to the CPU, without running code from it.

    Objects other than tensors and plain containers become placeholders. Raises UserError if the file is missing or
    damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {explain_missing(path)}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in (".onnx", ".pt2"):
        raise UserError(
            f"{path}: an exported program, of which the weights cannot be read\ngive the run or the file that it was "
            "exported from, or its weights: --export weights.safetensors"
        )
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):  # torch does not verify the checksums
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"checksum of {broken} does not match")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=PLACEHOLDER_PICKLE)
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: a TorchScript program; expected a state dict\nsave its weights where you trust it: "
                f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pt')"
            ) from error
        previous = path.with_name("previous.pt")
        remedy = "copy or download the file again"
        if path.name == "last.pt" and previous.is_file():
            remedy = f"resume from the epoch before with --checkpoint {previous}"
        reason = get_first_error_line(error)
        raise UserError(
            f"{path} ({size} bytes) is damaged or not a checkpoint ({type(error).__name__}: {reason})\n{remedy}"
        ) from error


def read_safetensors(path: Path) -> dict:
    """Read the weights in a .safetensors file; of one that write_safetensors() made, a Checkpoint of kind `weights`.

    Raises UserError if the file is damaged, or if the package is missing.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{path}: reading this file needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            weights, texts = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        return parse_description(texts) | {"model": weights} if texts.get("made_by") == MADE_BY else weights
    except Exception as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from error


def write_safetensors(path: Path, weights: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    """Write weights with the description of their classifier, as evaluation.export.describe() makes it."""
    from safetensors.torch import save

    weights = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    path.write_bytes(save(weights, {"format": "pt"} | texts))  # save_file() makes a file that others cannot read


def parse_description(texts: dict[str, str]) -> dict:
    """Return the entries of a Checkpoint that the description of an exported classifier holds."""
    found = {}
    for key, text in texts.items():
        try:
            found[key] = json.loads(text)
        except ValueError:  # a plain text, such as the name of the network
            found[key] = text
    options = ("model", "model_args", "dataset", "norm", "num_classes", "image_size", "interpolation")
    config = {key: found[key] for key in options if key in found} | {"eval_resize": found["resize"]}
    entries = {key: found.get(key) for key in ("epoch", "num_classes", "image_size", "mean", "std")}
    titles = found.get("classes", [])  # of a network of a library, they do not name the classes of a data set
    classes = titles if "dataset" in found else []
    return Checkpoint(format=FORMAT, kind="weights", config=config, titles=titles, classes=classes, **entries)


def list_first_keys(content) -> str:
    """Return the first five keys of a dictionary, or the type of anything else, for an error message."""
    if isinstance(content, dict):
        return ", ".join(map(str, list(content)[:5])) or "an empty dictionary"
    return type(content).__name__


def shorten_list(names: list[str]) -> str:
    """Return the first three names and the number of the others, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
