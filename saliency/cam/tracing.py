"""Find the maps and the classification head of any network by tracing one forward pass, function call by function call.

Nothing needs to be known of its modules: an average in front of a linear layer is recognised by its inputs and outputs.
"""

import difflib
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saliency.cam.layouts import Layout, LayoutWatch, find_layout
from saliency.gradient import in_mode

AVERAGES = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}  # functions that can average whole maps
ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention", "_native_multi_head_attention"}
POOLINGS = AVERAGES | {"adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "amax"}


class TraceResult(NamedTuple):
    """What a traced forward pass has shown. Calls of pooling functions and of linear layers are numbered separately."""

    pooling: int | None  # the last call that pools whole maps; None if attention follows it
    average: int | None  # the global average that cam needs
    linear: int | None  # the linear layer after it; None: the averages are the logits
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
    recorder, modules = CallRecorder(), modules_by_name(model)
    returned: dict[str, tuple[tuple[int, int, int], int, int]] = {}  # name -> (C, h, w), poolings and attention before

    def make_hook(name):
        def hook(module, given, result):
            channels_last = recorder.channels_last
            if layout := find_layout(result, images.shape[-2:], channels_last, len(images)):
                returned.pop(name, None)  # a module that is called again counts where it returns last
                returned[name] = tuple(layout(result).shape[1:]), len(recorder.poolings), len(recorder.attention)
                recorder.channels_last = channels_last  # the line above calls functions that are watched, too

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    try:
        with recorder, torch.autocast(images.device.type, enabled=False):
            logits = validate_logits(model(images), images)
    finally:
        for handle in handles:
            handle.remove()

    pooling = max((i for i, call in enumerate(recorder.poolings) if call.whole), default=None)
    if recorder.attention and (pooling is None or pooling < recorder.attention[-1]):
        pooling, reason = None, "the last one before the last attention"
        before = [name for name, (_, _, attention) in returned.items() if attention < len(recorder.attention)]
    elif pooling is None:
        before, reason = [name for name in returned if isinstance(modules[name], nn.Conv2d)], "the last convolution"
    else:
        reason = "the last one before the average pooling"
        before = [name for name, (_, poolings, _) in returned.items() if poolings <= pooling]
    average, linear = find_head(recorder, logits)
    shapes = {name: shape for name, (shape, *_) in returned.items()}
    return TraceResult(pooling, average, linear, shapes, before[-1] if before else None, reason)


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
    """Records each pooling, linear layer and attention of a forward pass, in order."""

    def __init__(self):
        super().__init__()
        self.poolings: list[RecordedCall] = []
        self.linears: list[RecordedCall] = []
        self.attention: list[int] = []  # number of poolings before each

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        maps = find_pooled_maps(func, args, kwargs)
        result = func(*args, **kwargs)
        self.watch(func, args, kwargs, result)
        if maps is not None:
            value, name, count = result[0] if isinstance(result, tuple) else result, func.__name__, maps.shape[:2]
            single = value.shape[:2] == count and value.numel() == count.numel()
            average = single and name in AVERAGES and is_close(value.flatten(1), maps.mean((2, 3)))
            self.poolings.append(
                RecordedCall(None, value, value.clone(), single or name.startswith("adaptive"), average)
            )
        elif func is F.linear:
            given = args[0] if args else kwargs["input"]
            self.linears.append(RecordedCall(given, result, given.clone()))
        elif getattr(func, "__name__", "") in ATTENTION:
            self.attention.append(len(self.poolings))
        return result


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare with a tolerance for half-precision rounding."""
    return torch.allclose(one, other, rtol=1e-2, atol=1e-5, equal_nan=True)


class PoolingTap(TorchFunctionMode):
    """Captures the input of pooling call `number` of a forward pass and makes it require a gradient.

    Also collects the weights of the linear layers.
    """

    layout: Layout = staticmethod(lambda maps: maps)

    def __init__(self, number: int):
        super().__init__()
        self.number, self.count = number, 0
        self.maps: torch.Tensor | None = None
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        maps = find_pooled_maps(func, args, kwargs)
        if maps is not None:
            if self.count == self.number:
                self.maps = maps.requires_grad_()
            self.count += 1
        elif func is F.linear:
            self.weights.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **kwargs)


def find_pooled_maps(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """Return the maps (B, C, h, w) that `func` pools, or None. Of nested functions only the outermost is seen."""
    if getattr(func, "__name__", "") not in POOLINGS:
        return None
    given = args[0] if args else kwargs.get("input")
    return given if isinstance(given, torch.Tensor) and given.dim() == 4 else None


class LayerTap(LayoutWatch):
    """Captures the output of `module` and makes it require a gradient. `layout` makes maps (B, C, h, w) of it.

    The network continues with a copy, because a ReLU may overwrite it in place. size: height and width of the images.
    """

    def __init__(self, module: nn.Module, name: str, size: tuple[int, int]):
        super().__init__()
        self.module, self.name, self.size = module, name, size
        self.maps: torch.Tensor | None = None
        self.layout: Layout | None = None

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.capture)
        return super().__enter__()

    def __exit__(self, *problem):
        self.handle.remove()
        super().__exit__(*problem)

    def capture(self, module, given, output):
        self.layout = find_layout(output, self.size, self.channels_last)
        if self.layout is None:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"layer {self.name!r} must return maps (B, C, h, w), but it returns {got}")
        self.maps = output.detach().requires_grad_()
        return self.maps.clone()


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
            + " (cam.py --list_layers lists them)"
        )
    return modules[name]


@contextmanager
def eval_no_grad(model: nn.Module):
    """Run the model in evaluation mode, outside inference mode and uncompiled.

    Gradients can be enabled inside. Calls inside a compiled graph could not be traced.
    """
    with in_mode(model, "eval"), torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield
