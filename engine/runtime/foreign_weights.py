"""Weights from other code bases: find them in a file, rename their keys, load them into our networks."""

from pathlib import Path

import torch

from engine.errors import UserError
from engine.runtime.checkpoint import check_finite, is_checkpoint, list_first_keys, shorten_list
from engine.runtime.distributed import is_main_process
from engine.runtime.safe_unpickle import Placeholder

WEIGHT_KEYS = (  # where codes keep the weights, in the order of preference
    "model",
    "model_state_dict",
    "state_dict",
    "net",
    "state_dict_classifier",
    "network",
    "model_state",
    "params",
    "weights",
    "backbone",
    "encoder",
    "student",
)
AVERAGE_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "teacher")
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "encoder_q.")  # names that no network starts with
PARTS = ("backbone.", "encoder.")  # the same if all keys have them; a ViT has an encoder, too
COUNTERS = ("n_averaged", "total_ops", "total_params")  # of torch's AveragedModel and of thop; not weights


def extract_weights(content, path: Path, *, averaged: bool = False, kind: str = "classifier") -> dict:
    """Return the state dict in the content of a file, with our key names.

    The file may be one of our checkpoints, a bare state dict, or in a layout of the published codes. kind: `classifier`
    or `detector`. averaged: return the weight average. path: for messages. Prints which of several state dicts and what
    part of one is used. Raises UserError if there are no such weights, if they are NaN or infinite, or if they are of
    the other kind.
    """
    if averaged:
        states = find_states(content, AVERAGE_KEYS) if isinstance(content, dict) else {}
        if not states.keys() - {""}:
            raise UserError(f"{path}: has no weight average, since it was trained without --ema")
    else:
        states = find_states(content, WEIGHT_KEYS + AVERAGE_KEYS)
    if not states:
        raise UserError(explain_missing(content, path))
    (key, state), *others = states.items()
    if others and not is_checkpoint(content):
        print_note(f"{path}: the weights under {key} are used, not those under {', '.join(name for name, _ in others)}")
    weights = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    weights = {name: value for name, value in weights.items() if name.rpartition(".")[2] not in COUNTERS}
    weights = remove_prefixes(weights, path)
    check_finite(path, weights)

    # ---- Check the kind ----
    detector = any(key.startswith(("roi_heads.", "rpn.")) for key in weights)
    if detector and kind == "classifier":
        raise UserError(
            f"{path}: this is a detector; expected a classifier\nuse it with detect.py --frcnn_checkpoint {path}, and "
            "--image_path for your own pictures"
        )
    if not detector and kind == "detector":
        raise UserError(
            f"{path}: this is not a detector (first keys: {list_first_keys(weights)}); expected one\n"
            "use classifiers with detect.py --backbone_checkpoint, evaluate.py or cam.py"
        )
    return weights if detector else rename_replication_keys(weights)


def find_states(content, keys: tuple[str, ...]) -> dict[str, dict]:
    """Return the state dicts under the keys, also one inside another, by their keys; "" is the content itself."""
    if not isinstance(content, dict):
        return {}
    found = {}
    for key in keys:
        inner = content.get(key)
        nested = {"": inner} if is_state_dict(inner) else find_states(inner, keys)
        found |= {f"{key}.{name}" if name else key: state for name, state in nested.items()}
    return found or ({"": content} if is_state_dict(content) else {})


def is_state_dict(content) -> bool:
    """Return whether all keys are texts and at least half of the entries are tensors."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return False
    tensors = sum(isinstance(value, torch.Tensor) for value in content.values())
    return tensors > 0 and tensors >= len(content) / 2


def explain_missing(content, path: Path) -> str:
    """Return the message for a file in which no weights are found."""
    objects = {"": content, **content} if isinstance(content, dict) else {"": content}
    for key, value in objects.items():
        if isinstance(value, Placeholder) and (not key or key in WEIGHT_KEYS + AVERAGE_KEYS):
            where, part = (f" under {key}", f"['{key}']") if key else ("", "")
            return (
                f"{path}: a whole pickled object{where}, which is not opened because that could run code; expected a "
                "state dict\nif you trust the file and have its code, save its weights: "
                f"torch.save(torch.load('{path}', weights_only=False){part}.state_dict(), 'weights.pt')"
            )
    return (
        f"{path}: no weights found (first keys: {list_first_keys(content)}); expected a state dict, or one under the "
        f"key {', '.join(WEIGHT_KEYS[:-1])} or {WEIGHT_KEYS[-1]}"
    )


def remove_prefixes(weights: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Remove the names of wrappers from the start of the keys, as in `module._orig_mod.`.

    Entries outside the wrapper, such as the weights of a loss, are left out with a note.
    """
    left_out = []
    while prefix := find_prefix(weights):
        left_out += [key for key in weights if not key.startswith(prefix)]
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if left_out:
        print_note(f"{path}: left out, being no part of the network: {shorten_list(left_out)}")
    return weights


def find_prefix(weights: dict[str, torch.Tensor]) -> str | None:
    """Return the first wrapper that the keys begin with, or None."""
    whole = (prefix for prefix in PARTS if weights and all(key.startswith(prefix) for key in weights))
    some = (prefix for prefix in WRAPPERS if any(key.startswith(prefix) for key in weights))
    return next(some, next(whole, None))


def print_note(line: str) -> None:
    """Print a note in the main process."""
    if is_main_process():
        print(f"note: {line}", flush=True)


def rename_replication_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of the SaliencyMix replication's CIFAR ResNets to torchvision's. Other state dicts are unchanged.

    Its projection convolutions have a bias, and ours have none. It is folded into the batch norm that follows by
    subtracting it from the running mean.
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


def select_rows(
    own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], heads: list[str], rows: dict[int, int]
) -> dict[str, torch.Tensor]:
    """Return the last layers of `own`, with some rows from the weights. heads, rows: see load_weights()."""
    keys = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    selected = {key: own[key].clone() for key in keys if key in own and key in weights}
    for key, values in selected.items():
        values[list(rows)] = weights[key][list(rows.values())].to(values)
    return selected


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    path: Path,
    *,
    num_classes: int,
    heads: list[str],
    new_head: bool = False,
    name: str = "",
    matches: list[str] | None = None,
    rows: dict[int, int] | None = None,
) -> bool:
    """Load weights into a network; every key must match. Returns whether the last layer keeps its initial weights.

    heads: names of the layers with a row per class. new_head: keep their initial weights if the number of classes
    differs. path, name: of the file and of the network, for messages. matches: names of the models that the weights
    fit, for messages. rows: class -> class of the weights, for the classes whose rows of the last layer are loaded;
    None: both have the same classes. Raises UserError, which names what does not fit.
    """
    own = model.state_dict()
    key = next((key for head in heads if (key := f"{head}.weight") in weights), None)
    shape = tuple(weights[key].shape) if key else None
    if shape and shape[0] != num_classes:
        if not new_head:
            raise UserError(
                f"{path}: the network has {shape[0]} classes ({key} is {' x '.join(map(str, shape))}), but the "
                f"data has {num_classes}\nto fine-tune it with a new last layer, train with --init_from {path}"
            )
        prefixes = tuple(f"{head}." for head in heads)
        weights = {**weights, **{key: own[key] for key in own if key.startswith(prefixes)}}
    elif rows is not None:
        weights = {**weights, **select_rows(own, weights, heads, rows)}
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    mismatched = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or mismatched:
        remedy = f"\nthe weights fit {' or '.join(matches)}: use --model {matches[0]}" if matches else ""
        raise UserError(
            f"{path}: weights of another architecture{name and f' than {name}'}; missing: {shorten_list(missing)}; "
            f"unexpected: {shorten_list(unexpected)}; different shape: {shorten_list(mismatched)}{remedy}"
        )
    own.update(weights)  # in place: own also holds the versions of the modules, without which MNASNet loads nothing
    model.load_state_dict(own)
    return bool(shape and shape[0] != num_classes)
