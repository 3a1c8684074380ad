"""Activation maps: where a classifier, whichever it is, sees a class.

A are the activations of a layer, K maps of h x w; y is the score of the class before the softmax, g = dy/dA.

* cam: sum_k w_k A_k, w the weights of the class in the linear layer behind the global average. Zhou et al., arXiv
  1512.04150, Sec. 2.
* gradcam: ReLU sum_k mean(g_k) A_k. Selvaraju et al., arXiv 1610.02391, Sec. 3.
* gradcam++: as gradcam, with sum_xy alpha_k ReLU(g_k) for the mean. Chattopadhyay et al., arXiv 1710.11063, Eq. 19.
* layercam: ReLU sum_k ReLU(g_k) A_k, place by place. Jiang et al., "LayerCAM", IEEE Trans. Image Process. 30, 2021.
* scorecam: ReLU sum_k s_k A_k, s the softmax over k of y for the image seen through A_k. Wang et al., arXiv 1910.01279.

Where nobody names a layer, A is what the last pooling of the whole map takes. Nothing need be known of the network: one
forward pass is followed, function call by function call.
"""

import difflib
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saliency.base import Source
from saliency.gradient import FP16_SCALE, frozen, in_mode

METHODS = ("cam", "gradcam", "gradcam++", "layercam", "scorecam")
AVERAGES = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}  # functions that may average a map as a whole
POOLINGS = AVERAGES | {"adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "amax"}
PROBE_SIZE = 64  # side in pixels of an image that almost every network takes

# the formulas: maps, gradients (B, C, h, w) -> (B, h, w)


def gradcam(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu()


def gradcam_plus_plus(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    square, cube = gradients.square(), gradients**3
    alpha = square / (2 * square + maps.sum((2, 3), keepdim=True) * cube + 1e-6)  # 0 where the gradient is
    return ((alpha * gradients.relu()).sum((2, 3), keepdim=True) * maps).sum(1).relu()


def layercam(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.relu() * maps).sum(1).relu()


FORMULAS = {"gradcam": gradcam, "gradcam++": gradcam_plus_plus, "layercam": layercam}


class ActivationMaps:
    """maps(images, targets) -> (B, h, w) float32, as large as the layer's, not scaled. `cam` may be negative.

    images (B, 3, H, W) are normalised; targets are labels (B,) or, as weights of the classes, (B, K). logits (B, K)
    float32 are those of the last call. The network, compiled or not, runs in evaluation mode and eagerly; its
    parameters need not require gradients and get none, and it is left as it was.

    layer: dotted name of the module whose output, (B, C, h, w), is A; of several calls the last counts. None: what is
    pooled as a whole in front of the classifier, or, if nothing is (ViT), the output of the last convolution.
    batch_size: how many masked images scorecam passes at a time. precision: autocast type. progress: goes around
    scorecam's batches, as tqdm does.

    Raises ValueError for an unknown method or layer, for a layer without maps or that the class does not depend on, and
    for cam, when called, if the network has no average in front of one linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "cam",
        *,
        layer: str | None = None,
        batch_size: int = 32,
        precision: torch.dtype | None = None,
        progress: Callable | None = None,
    ):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        if method == "cam" and layer is not None:
            raise ValueError(f"cam has no choice of layers ({layer!r}): it weighs the maps that are averaged")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.method, self.layer = bare(model), method, layer
        self.batch_size, self.precision, self.progress = batch_size, precision, progress or iter
        self.module = None if layer is None else find_layer(self.model, layer)
        self.found: Found | None = None  # what the first call learns about the network
        self.logits: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft = targets.is_floating_point()
        if images.dim() != 4 or targets.dim() != 1 + soft or len(targets) != len(images):
            raise ValueError(
                "images must be (B, 3, H, W) and targets labels (B,) or weights (B, K), got "
                f"{tuple(images.shape)} and {tuple(targets.shape)} of {targets.dtype}"
            )
        with as_judge(self.model), torch.autocast(images.device.type, enabled=False):
            images, targets = (given.clone() if given.is_inference() else given.detach() for given in (images, targets))
            if self.found is None and self.module is None:
                self.settle(probe(self.model, images[:1]))
            if self.method == "cam":
                return self.cam(images, targets)
            if self.method == "scorecam":
                return self.scorecam(images, targets)
            return FORMULAS[self.method](*self.gradients(images, targets))

    def settle(self, found: "Found") -> None:
        """Where the maps are from now on. Raises ValueError if there are none that the method can take."""
        name = type(self.model).__name__
        if self.method == "cam" and found.average is None:
            raise ValueError(f"{name} has no average in front of one linear layer, which cam needs: take gradcam")
        if found.pooling is None and found.default is None:
            raise ValueError(f"{name} neither pools maps nor has a convolution: name a layer")
        if found.pooling is None:
            self.layer, self.module = found.default, find_layer(self.model, found.default)
        self.found = found

    def forward(self, images: torch.Tensor, tap: "PoolingTap | LayerTap") -> tuple[torch.Tensor, torch.Tensor]:
        """A (B, C, h, w), as the network made it, and logits (B, K) float32."""
        with tap, torch.autocast(images.device.type, self.precision, bool(self.precision)):
            logits = self.model(images)
        if tap.maps is None:
            raise ValueError(f"the forward pass of {type(self.model).__name__} makes no use of {self.layer!r}")
        logits = checked(logits, images).float()
        self.logits = logits.detach()
        return tap.maps, logits

    def tap(self) -> "PoolingTap | LayerTap":
        if self.module is not None:
            return LayerTap(self.module, self.layer)
        return PoolingTap(self.found.pooling)

    @torch.no_grad()
    def cam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tap = PoolingTap(self.found.average)
        maps, _ = self.forward(images, tap)
        if self.found.linear is None:  # the averages are the scores
            weights = torch.eye(maps.shape[1], device=maps.device)
        else:
            weights = tap.weights[self.found.linear].detach().float()  # (K, C)
        weights = targets.float() @ weights if targets.is_floating_point() else weights[targets]
        return torch.einsum("bchw,bc->bhw", maps.detach().float(), weights)

    def gradients(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and g, each (B, C, h, w) float32. Nothing asks for a gradient but A, so the graph begins there."""
        with torch.enable_grad(), frozen(self.model):
            maps, logits = self.forward(images, self.tap())
            if not logits.requires_grad:
                raise ValueError(f"the scores of {type(self.model).__name__} do not depend on {self.layer!r}")
            scale = FP16_SCALE if self.precision is torch.float16 else 1.0
            (gradients,) = torch.autograd.grad(scores(logits, targets).sum() * scale, maps)
        return maps.detach().float(), gradients.float() / scale

    @torch.no_grad()
    def scorecam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        maps = self.forward(images, self.tap())[0].detach().float()
        weights = self.channel_scores(images, targets, maps).softmax(1)
        return torch.einsum("bchw,bc->bhw", maps, weights).relu()

    def channel_scores(self, images: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """(B, C): the score of the class for an image through each of its maps (B, C, h, w), enlarged and 0 to 1.

        A map that is the same everywhere lets nothing through: for all of these a black image is passed once.
        """
        count, channels = maps.shape[:2]
        varied = (maps.amax((2, 3)) != maps.amin((2, 3))).flatten().nonzero().squeeze(1)  # pairs of image and channel
        flat = maps.flatten(0, 1).unsqueeze(1)  # (B * C, 1, h, w)

        def score(images, targets):
            with torch.autocast(images.device.type, self.precision, bool(self.precision)):
                logits = self.model(images)
            return scores(logits.float().expand(len(targets), -1), targets)

        result = score(torch.zeros_like(images[:1]), targets).repeat_interleave(channels)
        for pairs in self.progress(varied.split(self.batch_size) if len(varied) else ()):
            mask = F.interpolate(flat[pairs], images.shape[-2:], mode="bilinear", align_corners=True)
            low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
            mask = (mask - low) / (high - low + 1e-8)
            owner = pairs // channels
            result[pairs] = score(images[owner] * mask, targets[owner])
        return result.view(count, channels)


def scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits (B, K), labels (B,) or weights (B, K) -> (B,)."""
    if targets.is_floating_point():
        return (logits * targets).sum(1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def stretched(maps: torch.Tensor) -> torch.Tensor:
    """Each of (B, h, w) from 0 to 1, float32. One that is the same everywhere, or not finite, becomes zeros."""
    maps = maps.float()
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    good = span.isfinite() & (span > 0)
    return torch.where(good, (maps - low) / torch.where(good, span, 1), 0)


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, *size), from 0 to 1: stretched, scaled bilinearly, and stretched again."""
    return stretched(scaled(stretched(maps), size))


def scaled(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


# where the maps are


class Found(NamedTuple):
    """What a pass showed. Function calls are counted from 0: poolings and linear layers apart."""

    pooling: int | None  # the last that pools maps as a whole
    average: int | None  # the one that cam takes,
    linear: int | None  # and the linear layer behind it; None: its averages are the logits
    layers: dict[str, tuple[int, int, int]]  # name -> (C, h, w), in the order in which modules end
    default: str | None  # the last of them before that pooling; if nothing is pooled, the last convolution


class Call(NamedTuple):
    """Of a function that pools maps, or of a linear layer."""

    given: torch.Tensor | None  # to a linear layer
    result: torch.Tensor
    vector: torch.Tensor  # a copy of what leaves the pooling, or of what the linear layer takes
    whole: bool = False  # whether a pooling is adaptive, as VGG's to 7x7, or leaves one number a map,
    average: bool = False  # which is the mean


def layers(model: nn.Module, images: torch.Tensor | int) -> list[tuple[str, tuple[int, int, int], bool]]:
    """The modules of `model` that can be named as a layer, in the order in which they end: name, (C, h, w), and whether
    it is the last before the layer that is taken when none is named (a function such as a ReLU may lie between).

    images (B, 3, H, W), or a side in pixels: then a black image is passed. A module whose maps have their channels last
    (Swin's blocks) cannot be told from the others: its shape shows it.
    """
    model = bare(model)
    with as_judge(model):
        found = probe(model, black_image(model, images) if isinstance(images, int) else images[:1])
    return [(name, shape, name == found.default) for name, shape in found.layers.items()]


def black_image(model: nn.Module, side: int) -> torch.Tensor:
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(1, 3, side, side, dtype=like.dtype, device=like.device)


@torch.no_grad()
def probe(model: nn.Module, images: torch.Tensor) -> Found:
    """Follow one forward pass of images (1, 3, H, W)."""
    recorder, modules = Recorder(), named(model)
    ended: dict[str, tuple[tuple[int, int, int], int]] = {}  # name -> (C, h, w), how many poolings went before

    def note(name):
        def hook(module, given, result):
            if is_maps(result, len(images)):
                ended.pop(name, None)  # a module that is used again stands where it ends last
                ended[name] = tuple(result.shape[1:]), len(recorder.poolings)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        with recorder, torch.autocast(images.device.type, enabled=False):
            logits = checked(model(images), images)
    finally:
        for handle in handles:
            handle.remove()

    last = max((i for i, call in enumerate(recorder.poolings) if call.whole), default=None)
    if last is None:
        before = [name for name in ended if isinstance(modules[name], nn.Conv2d)]
    else:
        before = [name for name, (_, poolings) in ended.items() if poolings <= last]
    shapes = {name: shape for name, (shape, _) in ended.items()}
    return Found(last, *find_head(recorder.poolings, recorder.linears, logits), shapes, before[-1] if before else None)


def find_head(poolings: list[Call], linears: list[Call], logits: torch.Tensor) -> tuple[int | None, int | None]:
    """Numbers of the average and of the linear layer behind it that make the logits; see Found.

    What the one gives must be the very memory that the other takes, and unchanged: a scale that is still 1 may lie
    between otherwise.
    """
    last = max((i for i, call in enumerate(linears) if same_memory(call.result, logits)), default=None)
    for i, pooling in reversed(list(enumerate(poolings))):
        if pooling.average and last is None and same_memory(pooling.result, logits):
            return i, None
        if pooling.average and last is not None and same_memory(pooling.result, linears[last].given):
            vectors = pooling.vector.flatten(), linears[last].vector.flatten()
            return (i, last) if torch.allclose(*vectors, rtol=0, atol=0, equal_nan=True) else (None, None)
    return None, None


def same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


class Recorder(TorchFunctionMode):
    """Keeps every pooling and every linear layer of a pass, in their order."""

    def __init__(self):
        super().__init__()
        self.poolings: list[Call] = []
        self.linears: list[Call] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        maps = pooled(func, args, kwargs)
        result = func(*args, **kwargs)
        if maps is not None:
            value, name, count = result[0] if isinstance(result, tuple) else result, func.__name__, maps.shape[:2]
            single = value.shape[:2] == count and value.numel() == count.numel()
            average = single and name in AVERAGES and close(value.flatten(1), maps.mean((2, 3)))
            self.poolings.append(Call(None, value, value.clone(), single or name.startswith("adaptive"), average))
        elif func is F.linear:
            given = args[0] if args else kwargs["input"]
            self.linears.append(Call(given, result, given.clone()))
        return result


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to the rounding of half precision."""
    return torch.allclose(one, other, rtol=1e-2, atol=1e-5, equal_nan=True)


class PoolingTap(TorchFunctionMode):
    """Takes what goes into the pooling call `number` of a pass, as what gradients are asked for: maps (B, C, h, w).
    Also collects the weights of the linear layers.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number, self.count = number, 0
        self.maps: torch.Tensor | None = None
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        maps = pooled(func, args, kwargs)
        if maps is not None:
            if self.count == self.number:
                self.maps = maps.requires_grad_()
            self.count += 1
        elif func is F.linear:
            self.weights.append(args[1] if len(args) > 1 else kwargs["weight"])
        return func(*args, **kwargs)


def pooled(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The maps (B, C, h, w) that `func` pools, if it does. Of a function that calls another only the first is seen."""
    if getattr(func, "__name__", "") not in POOLINGS:
        return None
    given = args[0] if args else kwargs.get("input")
    return given if isinstance(given, torch.Tensor) and given.dim() == 4 else None


class LayerTap:
    """Takes the output of `module`, as what gradients are asked for; a copy goes on, which a ReLU may overwrite."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.maps: torch.Tensor | None = None

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self.take)
        return self

    def __exit__(self, *problem):
        self.handle.remove()

    def take(self, module, given, output):
        if not is_maps(output):
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(f"layer {self.name!r} must give maps (B, C, h, w), it gives {got}")
        self.maps = output.detach().requires_grad_()
        return self.maps.clone()


def is_maps(output, count: int | None = None) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == 4 and count in (None, len(output))


def checked(logits, images: torch.Tensor) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the network must give logits (B, K), it gives {got} for {len(images)} images")
    return logits


def bare(model: nn.Module) -> nn.Module:
    """Without the shell of torch.compile."""
    return getattr(model, "_orig_mod", model)


def named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules inside `model` by dotted name; shells of torch.compile do not count."""
    return {name.replace("._orig_mod", ""): bare(module) for name, module in model.named_modules() if name}


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Raises ValueError, with the nearest name, if there is no such module."""
    modules = named(model)
    if name not in modules:
        nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)
        raise ValueError(
            f"{type(model).__name__} has no layer {name!r}"
            + "".join(f"; the nearest is {near!r}" for near in nearest)
            + " (--list_layers lists them)"
        )
    return modules[name]


@contextmanager
def as_judge(model: nn.Module):
    """In evaluation mode, able to give gradients, and not compiled: what a compiled graph calls cannot be seen."""
    with in_mode(model, "eval"), torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
        yield


# sources


class CAM(Source):
    """The class activation map of `model` in evaluation mode: what speaks against the class is cut off, the rest
    enlarged to the size of the image. targets with several classes weight the maps of each.

    Raises ValueError if the network has no average in front of one linear layer.
    """

    method = "cam"

    def __init__(self, model: nn.Module, *, precision: torch.dtype | None = None):
        self.maps = ActivationMaps(model, self.method, precision=precision)
        self.model, self.precision = self.maps.model, precision
        try:
            with as_judge(self.model):
                found = probe(self.model, black_image(self.model, PROBE_SIZE))
        except (RuntimeError, AssertionError, ValueError):
            return  # it takes images of another size alone: the first batch will tell
        self.maps.settle(found)

    def __call__(self, images, targets):
        return scaled(self.maps(images, targets.float()).clamp_min(0), images.shape[-2:])


class GradCAM(CAM):
    """The same by Grad-CAM, for any network that has maps. The score of soft targets is their mean of the logits."""

    method = "gradcam"


class GradCAMpp(GradCAM):
    method = "gradcam++"


class LayerCAM(GradCAM):
    method = "layercam"
