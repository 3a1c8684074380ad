"""In which order a layer returns its maps: channels first, channels last (Swin, ConvNeXt), or as tokens (ViT).

Tokens of the grid may follow others: a class token, a distillation token, registers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Layout = Callable[[torch.Tensor], torch.Tensor]  # brings the output of a layer into the form (B, C, h, w)
PREFIXES = (0, 1)  # how many tokens may come before those of the grid, unless the network says it
MOVES = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims")  # functions that reorder dimensions


class LayoutWatch(TorchFunctionMode):
    """Follows in a forward pass whether the channels come last, from the functions that act on them.

    Linear layers and layer norm act on the last dimension, convolutions and batch norm on the second.
    """

    channels_last = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.watch(func, args, kwargs or {}, result)
        return result

    def watch(self, func: Callable, args: tuple, kwargs: dict, result) -> None:
        """Take note of a call of `func` with its result."""
        name = getattr(func, "__name__", "")
        if not isinstance(result, torch.Tensor) or result.dim() not in (3, 4):
            return
        if func is F.linear or name == "layer_norm":
            self.channels_last = True
        elif name in ("conv2d", "batch_norm"):
            self.channels_last = False
        elif name in MOVES:
            order = find_order(func, args, kwargs, result.dim())
            if order in ((0, 2, 3, 1), (0, 3, 1, 2)):
                self.channels_last = order == (0, 2, 3, 1)
            elif order == (0, 2, 1):
                self.channels_last = not self.channels_last


def find_order(func: Callable, args: tuple, kwargs: dict, dims: int) -> tuple[int, ...]:
    """Return the order into which a call of one of MOVES brings the dimensions of its input, however it is written."""
    probe = torch.empty(tuple(range(dims)), device="meta")  # each dimension is as long as its number
    return tuple(func(probe, *args[1:], **{key: value for key, value in kwargs.items() if key != "input"}).shape)


class TokenRules(NamedTuple):
    """What a network says of its tokens.

    prefixes: how many tokens may come before those of the grid, the most likely first. has_class: whether the first of
    them, if there are any, is read by the classifier.
    """

    prefixes: tuple[int, ...] = PREFIXES
    has_class: bool = True


def find_token_rules(model: nn.Module) -> TokenRules:
    """Return the rules of a network, as far as it states them as timm's do."""
    stating = next((module for module in model.modules() if hasattr(module, "num_prefix_tokens")), model)
    pooling, token = getattr(stating, "global_pool", "token"), getattr(stating, "cls_token", None)
    count = getattr(stating, "num_prefix_tokens", token.shape[1] if isinstance(token, torch.Tensor) else 0)
    has_class = not isinstance(pooling, str) or pooling in ("token", "")
    return TokenRules((count, 0) if count else PREFIXES, has_class)


def find_layout(
    output, size: tuple[int, int], channels_last: bool, count: int | None = None, prefixes: tuple[int, ...] = PREFIXES
) -> Layout | None:
    """Return how the output of a layer becomes maps (B, C, h, w); None if it holds none.

    A grid must have the proportions of the images. size: their height and width. channels_last: see LayoutWatch; it
    decides where the proportions do not, as for 64 channels of 64 x 64. count: B; None: any. prefixes: see TokenRules.
    """
    if not isinstance(output, torch.Tensor) or count not in (None, len(output)):
        return None
    if output.dim() == 4:
        first, last = (is_grid(shape, size) for shape in (output.shape[2:], output.shape[1:3]))
        if first and not (last and channels_last):
            return lambda maps: maps
        return (lambda maps: maps.permute(0, 3, 1, 2)) if last else None
    if output.dim() == 3 and channels_last and (found := find_token_grid(output.shape[1], size, prefixes)):
        prefix, height, _ = found
        return lambda maps: maps[:, prefix:].transpose(1, 2).unflatten(2, (height, -1))
    return None


def find_token_grid(
    count: int, size: tuple[int, int], prefixes: tuple[int, ...] = PREFIXES
) -> tuple[int, int, int] | None:
    """Return how many of `count` tokens come before those of the grid, and its height and width; None: there is none.

    size: height and width of the images. A grid has at least two places.
    """
    for prefix in prefixes:
        places = count - prefix
        height = round(math.sqrt(max(places, 0) * size[0] / size[1]))
        if places > 1 and height and places % height == 0 and is_grid((height, places // height), size):
            return prefix, height, places // height
    return None


def is_grid(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether maps of this height and width have the proportions of images of `size`, but for rounding."""
    (h, w), (height, width) = shape, size
    return h == w if height == width else abs(h * width - w * height) < height + width
