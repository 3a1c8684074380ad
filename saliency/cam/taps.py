"""Capture what a forward pass holds for a moment: the input of a pooling, the output of a layer, attention weights."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .attention import AttentionCounter, find_key_grid, read_map
from .layouts import Layout, LayoutWatch, TokenRules, find_layout

AVERAGES = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}  # functions that can average whole maps
REDUCTIONS = {"mean", "amax"}  # those of them that work on any dimensions
POOLINGS = AVERAGES | {"adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "amax"}


def channels_first(maps: torch.Tensor) -> torch.Tensor:
    """The layout of maps (B, C, h, w)."""
    return maps


def find_pooling(
    func: Callable, args: tuple, kwargs: dict, size: tuple[int, int], rules: TokenRules
) -> tuple[torch.Tensor, Layout] | None:
    """Return the maps that `func` pools, as the network holds them, and their layout; None: it pools no maps.

    They are (B, C, h, w), or (B, h, w, C) or tokens (B, N, C) of which a mean or maximum over all places is taken. Of
    nested functions only the outermost is seen. size: of the images.
    """
    name = getattr(func, "__name__", "")
    given = args[0] if args else kwargs.get("input")
    if name not in POOLINGS or not isinstance(given, torch.Tensor) or given.dim() not in (3, 4):
        return None
    dims = (args[1] if len(args) > 1 else kwargs.get("dim")) if name in REDUCTIONS else None
    dims = tuple(sorted(dim % given.dim() for dim in ([dims] if isinstance(dims, int) else dims or ())))
    if given.dim() == 4:
        return given, (lambda maps: maps.permute(0, 3, 1, 2)) if dims == (1, 2) else channels_first
    prefixes = (0, *(count for count in rules.prefixes if count))  # most networks pool the grid alone
    layout = find_layout(given, size, True, prefixes=prefixes) if dims == (1,) else None
    return layout and (given, layout)


class PoolingTap(TorchFunctionMode):
    """Captures the input of pooling call `number` of a forward pass and makes it require a gradient.

    `layout` makes maps (B, C, h, w) of it. Also collects the weights of the linear layers. size: of the images.
    """

    def __init__(self, number: int, size: tuple[int, int], rules: TokenRules):
        super().__init__()
        self.number, self.size, self.rules, self.count = number, size, rules, 0
        self.maps: torch.Tensor | None = None
        self.layout: Layout = channels_first
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if found := find_pooling(func, args, kwargs, self.size, self.rules):
            if self.count == self.number:
                maps, self.layout = found
                self.maps = maps.requires_grad_()
            self.count += 1
        elif func is F.linear:
            self.weights.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **kwargs)


class LayerTap(LayoutWatch):
    """Captures the output of `module` and makes it require a gradient. `layout` makes maps (B, C, h, w) of it.

    The network continues with a copy, because a ReLU may overwrite it in place. size: height and width of the images.
    """

    def __init__(self, module: nn.Module, name: str, size: tuple[int, int], rules: TokenRules):
        super().__init__()
        self.module, self.name, self.size, self.rules = module, name, size, rules
        self.maps: torch.Tensor | None = None
        self.layout: Layout | None = None

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.capture)
        return super().__enter__()

    def __exit__(self, *problem):
        self.handle.remove()
        super().__exit__(*problem)

    def capture(self, module, given, output):
        self.layout = find_layout(output, self.size, self.channels_last, prefixes=self.rules.prefixes)
        if self.layout is None:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"layer {self.name!r} must return maps (B, C, h, w), but it returns {got}")
        self.maps = output.detach().requires_grad_()
        return self.maps.clone()


class AttentionTap(TorchFunctionMode):
    """Reads the map (B, h, w) of attention call `number` of a forward pass; see attention.read_map().

    size: height and width of the images. count: B.
    """

    def __init__(self, number: int, size: tuple[int, int], count: int, rules: TokenRules):
        super().__init__()
        self.number, self.size, self.images, self.rules = number, size, count, rules
        self.counter = AttentionCounter()
        self.maps: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        call = self.counter.watch(func, args, kwargs or {}, result)
        if call and call.number == self.number:
            grid = find_key_grid(call, self.size, self.images, self.rules)
            self.maps = grid and read_map(call, grid, self.rules)
        return result
