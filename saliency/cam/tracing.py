"""Find the maps and the classification head of any network by tracing one forward pass, function call by function call.

Nothing needs to be known of its modules: an average in front of a linear layer is recognised by its inputs and outputs.
"""

import difflib
import math
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..gradient import in_mode
from .attention import AttentionCall, AttentionCounter, find_key_grid, relates_places
from .layouts import LayoutWatch, TokenRules, find_layout, find_token_rules
from .taps import AVERAGES, channels_first, find_pooling


class TraceResult(NamedTuple):
    """What a traced forward pass has shown.

    Calls of pooling functions, of linear layers and of attention functions are numbered separately.
    """

    size: tuple[int, int]  # height and width of the image
    pooling: int | None  # the last call that pools whole maps; None if attention follows it
    average: int | None  # the global average that cam needs
    linear: int | None  # the linear layer after it; None: the averages are the logits
    attention: int | None  # the last attention between all places of an image, whose weights can be read
    layers: dict[str, tuple[int, int, int]]  # name -> (C, h, w), in the order in which the modules return
    default: str | None  # the last layer before that pooling; without one, before the last attention or convolution
    reason: str  # the same in words


class RecordedCall(NamedTuple):
    """A call of a pooling function or of a linear layer."""

    input: torch.Tensor | None  # of a linear layer; None for a pooling
    output: torch.Tensor
    vector: torch.Tensor  # a copy of the output of a pooling, or of the input of a linear layer
    whole: bool = False  # whether a pooling is adaptive (VGG: to 7x7) or returns one number per map
    average: bool = False  # whether that number is the mean


class RecordedAttention(NamedTuple):
    """A call of an attention function."""

    poolings: int  # number of poolings before
    layer: str | None  # the last layer that returned before the module that calls it began
    readable: bool  # whether it relates all places of an image


def list_layers(model: nn.Module, images: torch.Tensor | int) -> list[tuple[str, tuple[int, int, int], str]]:
    """List the modules of `model` that can be named as a layer, in the order in which they return.

    Returns tuples of name, (C, h, w) and, for the layer whose maps are used by default, why; "" for the others. It may
    be followed by a function such as a ReLU. images (B, 3, H, W), or the side in pixels of a black image.
    """
    model = unwrap(model)
    with eval_no_grad(model):
        trace = trace_network(model, black_image(model, images) if isinstance(images, int) else images[:1])
    return [(name, shape, trace.reason if name == trace.default else "") for name, shape in trace.layers.items()]


def black_image(model: nn.Module, side: int) -> torch.Tensor:
    """Return an image (1, 3, side, side) of zeros, with the dtype and on the device of the model."""
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(1, 3, side, side, dtype=like.dtype, device=like.device)


@torch.no_grad()
def trace_network(model: nn.Module, images: torch.Tensor) -> TraceResult:
    """Trace one forward pass of images (1, 3, H, W)."""
    modules = modules_by_name(model)
    recorder = CallRecorder(images, find_token_rules(model))
    handles = [model.register_forward_pre_hook(recorder.enter)]
    for name, module in modules.items():
        if not isinstance(module, nn.Softmax):  # it is part of the attention of the module around it
            handles.append(module.register_forward_pre_hook(recorder.enter))
            handles.append(module.register_forward_hook(partial(recorder.leave, name)))
    try:
        with recorder, torch.autocast(images.device.type, enabled=False):
            logits = validate_logits(model(images), images)
    finally:
        for handle in handles:
            handle.remove()

    layers, attention = recorder.layers, recorder.attention
    pooling = max((i for i, call in enumerate(recorder.poolings) if call.whole), default=None)
    if attention and (pooling is None or pooling < attention[-1].poolings):
        pooling, before, reason = None, [attention[-1].layer], "the last one before the last attention"
    elif pooling is None:
        before, reason = [name for name in layers if isinstance(modules[name], nn.Conv2d)], "the last convolution"
    else:
        before = [name for name, (_, poolings) in layers.items() if poolings <= pooling]
        reason = "the last one before the average pooling"
    average, linear = find_head(recorder, logits)
    readable = max((i for i, call in enumerate(attention) if call.readable), default=None)
    shapes = {name: shape for name, (shape, _) in layers.items()}
    return TraceResult(
        recorder.size, pooling, average, linear, readable, shapes, before[-1] if before else None, reason
    )


def find_head(recorder: "CallRecorder", logits: torch.Tensor) -> tuple[int | None, int | None]:
    """Return the numbers of the global average and of the linear layer that compute the logits; see TraceResult.

    The output of one must be the very memory of the input of the other, with unchanged values: otherwise an operation
    that has no effect yet, such as a scale of 1, may lie between.
    """
    poolings, linears = recorder.poolings, recorder.linears
    last = max((i for i, call in enumerate(linears) if shares_memory(call.output, logits)), default=None)
    for i, pooling in reversed(list(enumerate(poolings))):
        if pooling.average and last is None and shares_memory(pooling.output, logits):
            return i, None
        if pooling.average and last is not None and shares_memory(pooling.output, linears[last].input):
            vectors = pooling.vector.flatten(), linears[last].vector.flatten()
            return (i, last) if torch.allclose(*vectors, rtol=0, atol=0, equal_nan=True) else (None, None)
    return None, None


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


class CallRecorder(LayoutWatch):
    """Records each pooling, linear layer and attention of a forward pass of `images`, and the layers that return maps.

    enter() and leave() are forward hooks of the modules.
    """

    def __init__(self, images: torch.Tensor, rules: TokenRules):
        super().__init__()
        self.images, self.size, self.rules = len(images), tuple(images.shape[-2:]), rules
        self.layers: dict[str, tuple[tuple[int, int, int], int]] = {}  # name -> (C, h, w), number of poolings before
        self.poolings: list[RecordedCall] = []
        self.linears: list[RecordedCall] = []
        self.attention: list[RecordedAttention] = []
        self.counter = AttentionCounter()
        self.running: list[str | None] = []  # for each module that runs, the last layer that returned before it began

    def enter(self, module: nn.Module, given: tuple) -> None:
        self.running.append(next(reversed(self.layers), None))

    def leave(self, name: str, module: nn.Module, given: tuple, result) -> None:
        self.running.pop()
        channels_last = self.channels_last
        if layout := find_layout(result, self.size, channels_last, self.images, self.rules.prefixes):
            self.layers.pop(name, None)  # a module that is called again counts where it returns last
            self.layers[name] = tuple(layout(result).shape[1:]), len(self.poolings)
            self.channels_last = channels_last  # the line above calls functions that are watched, too

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        pooled = find_pooling(func, args, kwargs, self.size, self.rules)
        maps = pooled and pooled[1](pooled[0])
        result = func(*args, **kwargs)
        self.watch(func, args, kwargs, result)
        if pooled:
            self.record_pooling(func.__name__, maps, pooled[1] is channels_first, result)
        elif func is F.linear:
            given = args[0] if args else kwargs["input"]
            self.linears.append(RecordedCall(given, result, given.clone()))
        elif call := self.counter.watch(func, args, kwargs, result):
            self.record_attention(call)
        return result

    def record_pooling(self, name: str, maps: torch.Tensor, is_plain: bool, result) -> None:
        """is_plain: the maps are (B, C, h, w) as the network holds them, so that the dimensions pooled are unknown."""
        value, count = result[0] if isinstance(result, tuple) else result, maps.shape[:2]
        single = not is_plain or value.shape[:2] == count and value.numel() == count.numel()
        average = single and name in AVERAGES and is_close(value.flatten(1), maps.mean((2, 3)))
        self.poolings.append(RecordedCall(None, value, value.clone(), single or name.startswith("adaptive"), average))

    def record_attention(self, call: AttentionCall) -> None:
        names, before = list(self.layers), self.running[-1]
        near = names[names.index(before) :] if before else names
        places = {math.prod(self.layers[name][0][1:]) for name in near}
        grid = find_key_grid(call, self.size, self.images, self.rules)
        readable = grid is not None and relates_places(call, grid, places)
        layer = before or (names[-1] if names else None)
        self.attention.append(RecordedAttention(len(self.poolings), layer, readable))


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare with a tolerance for half-precision rounding."""
    return torch.allclose(one, other, rtol=1e-2, atol=1e-5, equal_nan=True)


def validate_logits(logits, images: torch.Tensor) -> torch.Tensor:
    """Return the logits. Raises ValueError unless they are (B, K)."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the network must return logits (B, K), but it returns {got} for a batch of {len(images)}")
    return logits


def unwrap(model: nn.Module) -> nn.Module:
    """Remove the wrapper of torch.compile."""
    return getattr(model, "_orig_mod", model)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules inside `model` by dotted name, without the wrappers of torch.compile."""
    return {name.replace("._orig_mod", ""): unwrap(module) for name, module in model.named_modules() if name}


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return a module by dotted name. Raises ValueError, with the closest name, if there is none."""
    modules = modules_by_name(model)
    if name not in modules:
        nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        raise ValueError(
            f"{type(model).__name__} has no layer {name!r}"
            + "".join(f"; the nearest is {near!r}" for near in nearest)
            + " (list_layers() of saliency.cam and cam.py --list_layers list them)"
        )
    return modules[name]


@contextmanager
def eval_no_grad(model: nn.Module):
    """Run the model in evaluation mode, outside inference mode and uncompiled.

    Gradients can be enabled inside. Calls inside a compiled graph could not be traced.
    """
    with in_mode(model, "eval"), torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield
