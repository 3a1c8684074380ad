"""Checkpoints: written so that a kill cannot harm them, read so that no file can run code.

Our own format is a dictionary of tensors, text, numbers, lists and dictionaries, and loads with weights_only=True.
"""

import argparse
import collections
import os
import pickle
import platform
import shutil
import types
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from engine.cli import UserError
from engine.files import interrupt_later, write_atomic

FORMAT = 2
WEIGHT_KEYS = ("model", "model_state_dict", "state_dict", "net", "state_dict_classifier")
PREFIXES = ("module.", "_orig_mod.", "model.")


def versions() -> dict[str, str]:
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

    with interrupt_later():
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
    if not is_ours(content):
        raise UserError(
            f"{path}: no checkpoint that training can continue from (found: {first_keys(content)})\n{OTHER_USES[kind]}"
        )
    if (held := content.get("kind", "classifier")) != kind:
        raise UserError(f"{path}: a checkpoint of {KINDS.get(held, held)}\nhere one of {KINDS[kind]} is wanted")
    return content


def is_ours(content) -> bool:
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
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=INERT_PICKLE)
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


class Inert:
    """Stands for every foreign object in a pickle. It takes whatever is done to it and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Inert()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __hash__(self):
        return 0


class InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors, storages and plain containers; every other class or function becomes Inert and is never
    imported.
    """

    def find_class(self, module: str, name: str):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return Inert


ALLOWED = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *factory: {},
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.storage", "TypedStorage"): torch.storage.TypedStorage,
    ("torch.storage", "UntypedStorage"): torch.storage.UntypedStorage,
}
INERT_PICKLE = types.SimpleNamespace(  # what torch.load asks of a pickle module
    __name__="inert_pickle",
    Unpickler=InertUnpickler,
    load=lambda file, **kwargs: InertUnpickler(file, **kwargs).load(),
    UnpicklingError=pickle.UnpicklingError,
)


def first_keys(content) -> str:
    if isinstance(content, dict):
        return ", ".join(map(str, list(content)[:5])) or "an empty dictionary"
    return type(content).__name__


def extract_weights(content, path: Path, *, averaged: bool = False, kind: str = "classifier") -> dict:
    """The state dict of a classifier in any of the layouts of the earlier codes, with today's names, or of a detector.

    averaged: the weight average (`ema`) of one of our own checkpoints. Raises UserError if there are no weights, or if
    they are of the other kind.
    """
    if averaged:
        if not isinstance(content, dict) or not content.get("ema"):
            raise UserError(f"{path}: holds no weight average; it was not trained with --ema")
        content = {"model": content["ema"]}
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    weights = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not weights or len(weights) < len(state) / 2:
        raise UserError(
            f"{path}: no weights found (first keys: {first_keys(content)}); expected a state dict, "
            f"or one under {', '.join(WEIGHT_KEYS)}"
        )
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in weights):
                weights, changed = {key[len(prefix) :]: value for key, value in weights.items()}, True
    detector = any(key.startswith(("roi_heads.", "rpn.")) for key in weights)
    if detector and kind == "classifier":
        raise UserError(
            f"{path}: holds a detector, and a classifier is wanted here\ndetectors go to detect.py --frcnn-checkpoint"
        )
    if not detector and kind == "detector":
        raise UserError(
            f"{path}: holds no detector, which is wanted here (first keys: {first_keys(weights)})\n"
            "classifiers go to detect.py --backbone-checkpoint"
        )
    return weights if detector else rename_replication(weights)


def rename_replication(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The CIFAR ResNets of the SaliencyMix replication in torchvision's names.

    Its projection convolutions have a bias: the batch norm behind them takes it off its running mean, and it is
    dropped.
    """
    if "conv0.weight" not in weights:
        return weights
    renamed = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] in ("conv0", "bn0"):
            parts[0] = parts[0][:-1] + "1"
        elif "projection" in parts:
            at = parts.index("projection")
            parts[at : at + 2] = ["downsample", "0" if parts[at + 1] == "convP" else "1"]
        elif len(parts) > 3 and parts[2].startswith("convBn"):
            parts[2:4] = [parts[3] + parts[2].removeprefix("convBn")]
        renamed[".".join(parts)] = value
    for key in [k for k in renamed if k.endswith("downsample.0.bias")]:
        mean = key.replace("0.bias", "1.running_mean")
        renamed[mean] = renamed[mean] - renamed.pop(key)
    return renamed


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    path: Path,
    *,
    num_classes: int,
    new_head: bool = False,
    matches: list[str] | None = None,
) -> bool:
    """Load strictly. new_head: leave the last layer fresh where the number of classes differs; returns whether it was
    left.

    matches: names of the networks that would fit, for the message. Raises UserError that tells what does not fit.
    """
    own = model.state_dict()
    head = list(own)[-1].rsplit(".", 1)[0]  # the classifier is the last layer of each of our networks
    shape = tuple(weights[f"{head}.weight"].shape) if f"{head}.weight" in weights else None
    if shape and shape[0] != num_classes:
        if not new_head:
            raise UserError(
                f"{path}: made for {shape[0]} classes ({head}.weight is {' x '.join(map(str, shape))}), the data has "
                f"{num_classes}\nto fine-tune it, train with --init_from {path}, which starts with a new last layer"
            )
        weights = {**weights, **{key: own[key] for key in own if key.startswith(head + ".")}}
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    misshapen = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or misshapen:
        fits = f"\nit fits {' or '.join(matches)}: give --model {matches[0]}" if matches else ""
        raise UserError(
            f"{path}: weights of another network; missing: {listed(missing)}; unexpected: {listed(unexpected)}; "
            f"of another shape: {listed(misshapen)}{fits}"
        )
    model.load_state_dict({key: weights.get(key, own[key]) for key in own})
    return bool(shape and shape[0] != num_classes)


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
