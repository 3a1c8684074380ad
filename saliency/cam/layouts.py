"""In which order a layer returns its maps: channels first, channels last (Swin, ConvNeXt), or as tokens (ViT)."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Layout = Callable[[torch.Tensor], torch.Tensor]  # brings the output of a layer into the form (B, C, h, w)
CLASS_TOKENS = (0, 1)  # how many tokens may come before those of the grid
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


def find_layout(output, size: tuple[int, int], channels_last: bool, count: int | None = None) -> Layout | None:
    """Return how the output of a layer becomes maps (B, C, h, w); None if it holds none.

    A grid must have the proportions of the images. size: their height and width. channels_last: see LayoutWatch; it
    decides where the proportions do not, as for 64 channels of 64 x 64. count: B; None: any.
    """
    if not isinstance(output, torch.Tensor) or count not in (None, len(output)):
        return None
    if output.dim() == 4:
        first, last = (is_grid(shape, size) for shape in (output.shape[2:], output.shape[1:3]))
        if first and not (last and channels_last):
            return lambda maps: maps
        return (lambda maps: maps.permute(0, 3, 1, 2)) if last else None
    if output.dim() == 3 and channels_last:
        for tokens in CLASS_TOKENS:
            places = output.shape[1] - tokens
            height = round(math.sqrt(places * size[0] / size[1]))
            if places > 1 and places % height == 0 and is_grid((height, places // height), size):
                return lambda maps: maps[:, tokens:].transpose(1, 2).unflatten(2, (height, -1))
    return None


def is_grid(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether maps of this height and width have the proportions of images of `size`, but for rounding."""
    (h, w), (height, width) = shape, size
    return h == w if height == width else abs(h * width - w * height) < height + width
