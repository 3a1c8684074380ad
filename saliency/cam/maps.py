"""Activation maps: the places in an image that speak for a class, for any classifier.

A are the K maps of h x w that a layer outputs, y is the score of the class before the softmax, and g = dy/dA.

* cam: sum_k w_k A_k, where w are the weights of the class in the linear layer after the global average. Zhou et al.,
  arXiv 1512.04150, Sec. 2.
* gradcam: ReLU sum_k mean(g_k) A_k. Selvaraju et al., arXiv 1610.02391, Sec. 3.
* gradcam++: as gradcam, with sum_xy alpha_k ReLU(g_k) instead of the mean. Chattopadhyay et al., arXiv 1710.11063,
  Eq. 19.
* layercam: ReLU sum_k ReLU(g_k) A_k at each place. Jiang et al., "LayerCAM", IEEE Trans. Image Process. 30, 2021.
* scorecam: ReLU sum_k s_k A_k, where s is the softmax over k of y for the image masked by A_k. Wang et al., arXiv
  1910.01279.
* attention: the attention of the last layer to each place, for transformers, whatever the class
  (saliency/cam/attention.py).

If no layer is named, A is the input of the last pooling of whole maps. The network needs no special interface: one
forward pass is traced, function call by function call (saliency/cam/tracing.py).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .. import CAM_METHODS, FIXED_LAYER
from ..gradient import FP16_SCALE, freeze_parameters
from .layouts import find_token_rules
from .taps import AttentionTap, LayerTap, PoolingTap
from .tracing import (
    TraceResult,
    black_image,
    eval_no_grad,
    find_layer,
    trace_network,
    unwrap,
    validate_logits,
)

PROBE_SIZE = 64  # side in pixels of an image that almost every network accepts


def gradcam(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu()


def gradcam_plus_plus(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    square, cube = gradients.square(), gradients**3
    alpha = square / (2 * square + maps.sum((2, 3), keepdim=True) * cube + 1e-6)  # 0 where the gradient is 0
    return ((alpha * gradients.relu()).sum((2, 3), keepdim=True) * maps).sum(1).relu()


def layercam(maps: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return (gradients.relu() * maps).sum(1).relu()


FORMULAS = {"gradcam": gradcam, "gradcam++": gradcam_plus_plus, "layercam": layercam}


class ActivationMaps:
    """maps(images, targets) -> (B, h, w) float32, at the resolution of the layer, unscaled. `cam` can be negative.

    images (B, 3, H, W) are normalised. targets are class indices (B,) long, or weights of the classes (B, K) float.
    `logits` (B, K) float32 are those of the last call. The network, compiled or not, runs in evaluation mode and
    eagerly. Its parameters need not require gradients and get none; its state is restored.

    * layer: dotted name of the module whose output is A; if it is called twice, the last call counts. It may be
      (B, C, h, w), (B, h, w, C) or tokens (B, h * w, C), with or without class token and registers, which are left
      out. None: the input of the last pooling before the classifier or, if nothing is pooled, the input of the last
      attention (ViT) or the output of the last convolution.
    * batch_size: masked images per forward pass of scorecam. progress: wraps the iterable of these batches, like tqdm.
    * precision: type for autocast; None: float32.

    Raises ValueError for an unknown method or layer, for a layer that does not output maps or does not affect the
    class, and, when called, for a network without an average in front of a single linear layer (cam) or without an
    attention between all places of an image (attention).
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
        if method not in CAM_METHODS:
            raise ValueError(f"unknown method {method!r}; choose from {', '.join(CAM_METHODS)}")
        if method in FIXED_LAYER and layer is not None:
            raise ValueError(f"{method} takes no layer ({layer!r}): it always uses {FIXED_LAYER[method]}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.method, self.layer = unwrap(model), method, layer
        self.batch_size, self.precision, self.progress = batch_size, precision, progress or iter
        self.module = None if layer is None else find_layer(self.model, layer)
        self.is_named = layer is not None
        self.rules = find_token_rules(self.model)
        self.trace: TraceResult | None = None  # of the first call
        self.logits: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft = targets.is_floating_point()
        if images.dim() != 4 or targets.dim() != 1 + soft or len(targets) != len(images):
            raise ValueError(
                "images must be (B, 3, H, W) and targets (B,) class indices or (B, K) weights, got "
                f"{tuple(images.shape)} and {tuple(targets.shape)} of {targets.dtype}"
            )
        with eval_no_grad(self.model), torch.autocast(images.device.type, enabled=False):
            images, targets = (given.clone() if given.is_inference() else given.detach() for given in (images, targets))
            # whether windows of attention cover the whole image depends on its size
            is_other_size = self.method == "attention" and self.trace and self.trace.size != images.shape[-2:]
            if self.module is None and (self.trace is None or is_other_size):
                self.use_trace(trace_network(self.model, images[:1]))
            if self.method in ("cam", "scorecam", "attention"):
                return getattr(self, self.method)(images, targets)
            return FORMULAS[self.method](*self.gradients(images, targets))

    def use_trace(self, trace: TraceResult) -> None:
        """Use the maps that the trace has found. Raises ValueError if the method cannot use any of them."""
        name = type(self.model).__name__
        if self.method == "cam" and trace.average is None:
            raise ValueError(f"{name} has no average in front of a single linear layer, which cam needs: use gradcam")
        if self.method == "attention" and trace.attention is None:
            size = "x".join(map(str, trace.size))
            raise ValueError(f"{name} has no attention between all places of images of {size} pixels: use gradcam")
        if self.method not in FIXED_LAYER and trace.pooling is None:
            if trace.default is None:
                raise ValueError(f"{name} has neither a pooling of maps nor a convolution: name a layer")
            self.layer, self.module = trace.default, find_layer(self.model, trace.default)
        self.trace = trace

    def forward(
        self, images: torch.Tensor, tap: PoolingTap | LayerTap | AttentionTap
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A in the dtype of the network, as the network holds it (tap.layout), and logits (B, K) float32."""
        with tap, torch.autocast(images.device.type, self.precision, bool(self.precision)):
            logits = self.model(images)
        if tap.maps is None:
            raise ValueError(f"the forward pass of {type(self.model).__name__} does not use {self.layer!r}")
        logits = validate_logits(logits, images).float()
        self.logits = logits.detach()
        return tap.maps, logits

    def make_tap(self, images: torch.Tensor) -> PoolingTap | LayerTap:
        if self.module is not None:
            return LayerTap(self.module, self.layer, images.shape[-2:], self.rules)
        return PoolingTap(self.trace.pooling, images.shape[-2:], self.rules)

    @torch.no_grad()
    def cam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tap = PoolingTap(self.trace.average, images.shape[-2:], self.rules)
        maps, _ = self.forward(images, tap)
        maps = tap.layout(maps)
        if self.trace.linear is None:  # the averages are the logits
            weights = torch.eye(maps.shape[1], device=maps.device)
        else:
            weights = tap.weights[self.trace.linear].detach().float()  # (K, C)
        weights = targets.float() @ weights if targets.is_floating_point() else weights[targets]
        return weighted_sum(maps.detach().float(), weights)

    def gradients(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and g, each (B, C, h, w) float32. Only A requires a gradient, so the autograd graph starts there."""
        with torch.enable_grad(), freeze_parameters(self.model):
            tap = self.make_tap(images)
            held, logits = self.forward(images, tap)
            if not logits.requires_grad:
                raise ValueError(f"the logits of {type(self.model).__name__} do not depend on {self.layer!r}")
            scale = FP16_SCALE if self.precision is torch.float16 else 1.0
            (gradient,) = torch.autograd.grad(class_scores(logits, targets).sum() * scale, held)
        maps, gradients = tap.layout(held.detach()).float(), tap.layout(gradient).float() / scale
        # only for a layer that the user has named are the values read, which waits for the device
        lacks_token = self.is_named and gradients.numel() < gradient.numel()
        if lacks_token and gradient.any() and not gradients.any():
            name = type(self.model).__name__
            raise ValueError(f"{name} uses only the class token of {self.layer!r}: name an earlier layer")
        return maps, gradients

    @torch.no_grad()
    def attention(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tap = AttentionTap(self.trace.attention, images.shape[-2:], len(images), self.rules)
        return self.forward(images, tap)[0]

    @torch.no_grad()
    def scorecam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tap = self.make_tap(images)
        held, _ = self.forward(images, tap)
        maps = tap.layout(held.detach()).float()
        weights = self.channel_scores(images, targets, maps).softmax(1)
        return weighted_sum(maps, weights).relu()

    def channel_scores(self, images: torch.Tensor, targets: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Return the score of the class for the image masked by each map, (B, C).

        maps (B, C, h, w) are upsampled and scaled to 0..1. A constant map masks everything: for all of them, one black
        image is passed.
        """
        count, channels = maps.shape[:2]
        varied = (maps.amax((2, 3)) != maps.amin((2, 3))).flatten().nonzero().squeeze(1)  # (image, channel) pairs
        flat = maps.flatten(0, 1).unsqueeze(1)  # (B * C, 1, h, w)

        def score(images, targets):
            with torch.autocast(images.device.type, self.precision, bool(self.precision)):
                logits = self.model(images)
            return class_scores(logits.float().expand(len(targets), -1), targets)

        result = score(torch.zeros_like(images[:1]), targets).repeat_interleave(channels)
        for pairs in self.progress(varied.split(self.batch_size) if len(varied) else ()):
            mask = F.interpolate(flat[pairs], images.shape[-2:], mode="bilinear", align_corners=True)
            low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
            mask = (mask - low) / (high - low + 1e-8)
            owner = pairs // channels
            result[pairs] = score(images[owner] * mask, targets[owner])
        return result.view(count, channels)


def choose_methods(model: nn.Module, methods: list[str] | None, side: int) -> tuple[list[str], str]:
    """Return those of the methods that the network has, and a note on what became of cam, or "".

    None stands for cam, or gradcam if the network has no cam. If cam is all that is asked for it is returned, and
    calling it raises an error. side: of a square image, in pixels.
    """
    wanted = methods or ["cam"]
    if "cam" not in wanted or methods == ["cam"]:
        return wanted, ""
    with eval_no_grad(unwrap(model)):
        if trace_network(unwrap(model), black_image(unwrap(model), side)).average is not None:
            return wanted, ""
    found = [name for name in wanted if name != "cam"] or ["gradcam"]
    return found, f"no cam, which needs an average in front of a single linear layer; using {', '.join(found)}"


def weighted_sum(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum maps (B, C, h, w) with weights (B, C): (B, h, w). Not a matrix product, which CUDA may round to TF32."""
    return (maps * weights[:, :, None, None]).sum(1)


def class_scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the score (B,) of the class in logits (B, K). targets: class indices (B,) or weights (B, K)."""
    if targets.is_floating_point():
        return (logits * targets).sum(1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def normalize_maps(maps: torch.Tensor) -> torch.Tensor:
    """Scale each map (B, h, w) to 0..1, in float32. A map that is constant, NaN or infinite becomes all zero."""
    maps = maps.float()
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    good = span.isfinite() & (span > 0)
    return torch.where(good, (maps - low) / torch.where(good, span, 1), 0)


def upsample_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Normalise maps (B, h, w), resize them bilinearly to `size` = (H, W), and normalise them again."""
    return normalize_maps(resize_maps(normalize_maps(maps), size))


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps (B, h, w) bilinearly to `size` = (H, W)."""
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
