"""Weights from other code bases: find them in a file, rename their keys, load them into our networks."""

from pathlib import Path

import torch

from engine.errors import UserError
from engine.runtime.checkpoint import list_first_keys

WEIGHT_KEYS = ("model", "model_state_dict", "state_dict", "net", "state_dict_classifier")
PREFIXES = ("module.", "_orig_mod.", "model.")


def extract_weights(content, path: Path, *, averaged: bool = False, kind: str = "classifier") -> dict:
    """Return the state dict in the content of a file, with our key names.

    The file may be one of our checkpoints, a bare state dict, or in a layout of the published codes. kind: `classifier`
    or `detector`. averaged: return the weight average (`ema`) of one of our checkpoints. path: for messages. Raises
    UserError if there are no such weights, or if they are of the other kind.
    """
    if averaged:
        if not isinstance(content, dict) or not content.get("ema"):
            raise UserError(f"{path}: has no weight average, since it was trained without --ema")
        content = {"model": content["ema"]}

    # ---- Find the state dict ----
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    weights = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not weights or len(weights) < len(state) / 2:
        raise UserError(
            f"{path}: no weights found (first keys: {list_first_keys(content)}); expected a state dict, or one under "
            f"the key {', '.join(WEIGHT_KEYS[:-1])} or {WEIGHT_KEYS[-1]}"
        )

    # ---- Remove prefixes from the keys ----
    changed = True
    while changed:  # wrappers may be nested, as in `module._orig_mod.`
        changed = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in weights):
                weights, changed = {key[len(prefix) :]: value for key, value in weights.items()}, True

    # ---- Check the kind ----
    detector = any(key.startswith(("roi_heads.", "rpn.")) for key in weights)
    if detector and kind == "classifier":
        raise UserError(
            f"{path}: this is a detector; expected a classifier\nuse detectors with detect.py --frcnn_checkpoint"
        )
    if not detector and kind == "detector":
        raise UserError(
            f"{path}: this is not a detector (first keys: {list_first_keys(weights)}); expected one\n"
            "use classifiers with detect.py --backbone_checkpoint"
        )
    return weights if detector else rename_replication_keys(weights)


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


def load_weights(
    model: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    path: Path,
    *,
    num_classes: int,
    new_head: bool = False,
    matches: list[str] | None = None,
) -> bool:
    """Load weights into a network; every key must match. Returns whether the last layer keeps its initial weights.

    new_head: keep the initial weights of the last layer if the number of classes differs. path: for messages. matches:
    names of the models that the weights fit, for messages. Raises UserError, which names what does not fit.
    """
    own = model.state_dict()
    head = list(own)[-1].rsplit(".", 1)[0]  # the classifier is the last layer of each of our networks
    shape = tuple(weights[f"{head}.weight"].shape) if f"{head}.weight" in weights else None
    if shape and shape[0] != num_classes:
        if not new_head:
            raise UserError(
                f"{path}: the network has {shape[0]} classes ({head}.weight is {' x '.join(map(str, shape))}), but the "
                f"data has {num_classes}\nto fine-tune it with a new last layer, train with --init_from {path}"
            )
        weights = {**weights, **{key: own[key] for key in own if key.startswith(head + ".")}}
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    mismatched = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or mismatched:
        remedy = f"\nthe weights fit {' or '.join(matches)}: use --model {matches[0]}" if matches else ""
        raise UserError(
            f"{path}: weights of another architecture; missing: {shorten_list(missing)}; unexpected: "
            f"{shorten_list(unexpected)}; different shape: {shorten_list(mismatched)}{remedy}"
        )
    model.load_state_dict({key: weights.get(key, own[key]) for key in own})
    return bool(shape and shape[0] != num_classes)


def shorten_list(names: list[str]) -> str:
    """Return the first three names and the number of the others, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
