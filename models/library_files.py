"""What weights of the networks of torchvision and timm look like in a file: their keys, head and image size."""

import math
import re
import warnings
from functools import cache

import torch
from torch import nn

from models import split_model_name
from models.library import BUILD_ARGUMENTS, construct, import_timm
from models.stages import StagedNetwork

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # start of the keys of auxiliary classifiers, which are not built


def get_timm_config(name: str):
    """Return timm's description of the pretrained weights of a network."""
    return import_timm().get_pretrained_cfg(name)


def convert_weights(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of weights of LIBRARY:NAME from earlier versions, and leave out auxiliary classifiers.

    Weights of other networks are returned as they are.
    """
    library, name = split_model_name(name)
    if library == "torchvision" and name.startswith("densenet"):  # torchvision's own files have the old names
        return {re.sub(r"(denselayer\d+\.(norm|relu|conv))\.", r"\1", key): value for key, value in weights.items()}
    if library == "torchvision" and name in BUILD_ARGUMENTS:
        return {key: value for key, value in weights.items() if not key.startswith(AUXILIARY)}
    return weights


def find_heads(network: nn.Module) -> list[str]:
    """Return the names of the layers that have a row per class: one, or two for a network with a distillation token."""
    if isinstance(network, StagedNetwork):
        return [network.last_layer]
    names = getattr(network, "pretrained_cfg", {}).get("classifier")  # timm's
    if names:
        return [names] if isinstance(names, str) else list(names)
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, layer in network.named_modules() if isinstance(layer, kinds)][-1:]


@cache
def construct_empty(library: str, name: str) -> nn.Module:
    """Return a network whose weights need no memory, to look at its layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return construct(library, name, 10)
        except NotImplementedError:  # RegNet reads its widths from a tensor
            return construct(library, name, 10).to("meta")


def count_library_classes(name: str, weights: dict[str, torch.Tensor]) -> int:
    """Return the number of classes of weights of LIBRARY:NAME; 0 if they lack its head."""
    keys = [f"{head}.weight" for head in find_heads(construct_empty(*split_model_name(name)))]
    return next((len(weights[key]) for key in keys if key in weights), 0)


def infer_image_size(weights: dict[str, torch.Tensor]) -> int | None:
    """Return the image size that the position embeddings of a vision transformer are for; None for other weights."""
    pairs = (("encoder.pos_embedding", "conv_proj.weight"), ("pos_embed", "patch_embed.proj.weight"))
    for positions, patches in pairs:  # of torchvision, of timm
        if {positions, patches} <= weights.keys() and weights[positions].ndim == 3:
            grid = math.isqrt(weights[positions].shape[1])  # the class token and others come on top
            return grid * weights[patches].shape[-1]
    return None
