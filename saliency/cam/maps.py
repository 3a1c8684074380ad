"""Activation maps: where a classifier, whichever it is, sees a class.

A are the activations of a layer, K maps of h x w; y is the score of the class before the softmax, g = dy/dA.

* cam: sum_k w_k A_k, w the weights of the class in the linear layer behind the global average. Zhou et al., arXiv
  1512.04150, Sec. 2.
* gradcam: ReLU sum_k mean(g_k) A_k. Selvaraju et al., arXiv 1610.02391, Sec. 3.
* gradcam++: as gradcam, with sum_xy alpha_k ReLU(g_k) for the mean. Chattopadhyay et al., arXiv 1710.11063, Eq. 19.
* layercam: ReLU sum_k ReLU(g_k) A_k, place by place. Jiang et al., "LayerCAM", IEEE Trans. Image Process. 30, 2021.
* scorecam: ReLU sum_k s_k A_k, s the softmax over k of y for the image seen through A_k. Wang et al., arXiv 1910.01279.

Where nobody names a layer, A is what the last pooling of the whole map takes. Nothing need be known of the network: one
forward pass is followed, function call by function call (saliency/cam/tracing.py).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from saliency import CAM_METHODS
from saliency.cam.tracing import (
    LayerTap,
    PoolingTap,
    TraceResult,
    eval_no_grad,
    find_layer,
    trace_network,
    unwrap,
    validate_logits,
)
from saliency.gradient import FP16_SCALE, freeze_parameters

PROBE_SIZE = 64  # side in pixels of an image that almost every network takes


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
        if method not in CAM_METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(CAM_METHODS)}")
        if method == "cam" and layer is not None:
            raise ValueError(f"cam has no choice of layers ({layer!r}): it weighs the maps that are averaged")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.method, self.layer = unwrap(model), method, layer
        self.batch_size, self.precision, self.progress = batch_size, precision, progress or iter
        self.module = None if layer is None else find_layer(self.model, layer)
        self.trace: TraceResult | None = None  # what the first call learns about the network
        self.logits: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft = targets.is_floating_point()
        if images.dim() != 4 or targets.dim() != 1 + soft or len(targets) != len(images):
            raise ValueError(
                "images must be (B, 3, H, W) and targets labels (B,) or weights (B, K), got "
                f"{tuple(images.shape)} and {tuple(targets.shape)} of {targets.dtype}"
            )
        with eval_no_grad(self.model), torch.autocast(images.device.type, enabled=False):
            images, targets = (given.clone() if given.is_inference() else given.detach() for given in (images, targets))
            if self.trace is None and self.module is None:
                self.use_trace(trace_network(self.model, images[:1]))
            if self.method == "cam":
                return self.cam(images, targets)
            if self.method == "scorecam":
                return self.scorecam(images, targets)
            return FORMULAS[self.method](*self.gradients(images, targets))

    def use_trace(self, trace: TraceResult) -> None:
        """Take the maps where the trace found them. Raises ValueError if there are none that the method can take."""
        name = type(self.model).__name__
        if self.method == "cam" and trace.average is None:
            raise ValueError(f"{name} has no average in front of one linear layer, which cam needs: take gradcam")
        if trace.pooling is None and trace.default is None:
            raise ValueError(f"{name} neither pools maps nor has a convolution: name a layer")
        if trace.pooling is None:
            self.layer, self.module = trace.default, find_layer(self.model, trace.default)
        self.trace = trace

    def forward(self, images: torch.Tensor, tap: PoolingTap | LayerTap) -> tuple[torch.Tensor, torch.Tensor]:
        """A (B, C, h, w), as the network made it, and logits (B, K) float32."""
        with tap, torch.autocast(images.device.type, self.precision, bool(self.precision)):
            logits = self.model(images)
        if tap.maps is None:
            raise ValueError(f"the forward pass of {type(self.model).__name__} makes no use of {self.layer!r}")
        logits = validate_logits(logits, images).float()
        self.logits = logits.detach()
        return tap.maps, logits

    def make_tap(self) -> PoolingTap | LayerTap:
        if self.module is not None:
            return LayerTap(self.module, self.layer)
        return PoolingTap(self.trace.pooling)

    @torch.no_grad()
    def cam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        tap = PoolingTap(self.trace.average)
        maps, _ = self.forward(images, tap)
        if self.trace.linear is None:  # the averages are the scores
            weights = torch.eye(maps.shape[1], device=maps.device)
        else:
            weights = tap.weights[self.trace.linear].detach().float()  # (K, C)
        weights = targets.float() @ weights if targets.is_floating_point() else weights[targets]
        return weighted_sum(maps.detach().float(), weights)

    def gradients(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and g, each (B, C, h, w) float32. Nothing asks for a gradient but A, so the graph begins there."""
        with torch.enable_grad(), freeze_parameters(self.model):
            maps, logits = self.forward(images, self.make_tap())
            if not logits.requires_grad:
                raise ValueError(f"the scores of {type(self.model).__name__} do not depend on {self.layer!r}")
            scale = FP16_SCALE if self.precision is torch.float16 else 1.0
            (gradients,) = torch.autograd.grad(class_scores(logits, targets).sum() * scale, maps)
        return maps.detach().float(), gradients.float() / scale

    @torch.no_grad()
    def scorecam(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        maps = self.forward(images, self.make_tap())[0].detach().float()
        weights = self.channel_scores(images, targets, maps).softmax(1)
        return weighted_sum(maps, weights).relu()

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
            return class_scores(logits.float().expand(len(targets), -1), targets)

        result = score(torch.zeros_like(images[:1]), targets).repeat_interleave(channels)
        for pairs in self.progress(varied.split(self.batch_size) if len(varied) else ()):
            mask = F.interpolate(flat[pairs], images.shape[-2:], mode="bilinear", align_corners=True)
            low, high = mask.amin((2, 3), keepdim=True), mask.amax((2, 3), keepdim=True)
            mask = (mask - low) / (high - low + 1e-8)
            owner = pairs // channels
            result[pairs] = score(images[owner] * mask, targets[owner])
        return result.view(count, channels)


def weighted_sum(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w), (B, C) -> (B, h, w); no matrix product, which CUDA may round to TF32."""
    return (maps * weights[:, :, None, None]).sum(1)


def class_scores(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits (B, K), labels (B,) or weights (B, K) -> (B,)."""
    if targets.is_floating_point():
        return (logits * targets).sum(1)
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1)


def normalize_maps(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, h, w), each from 0 to 1, float32. A map that is constant or not finite becomes zeros."""
    maps = maps.float()
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    good = span.isfinite() & (span > 0)
    return torch.where(good, (maps - low) / torch.where(good, span, 1), 0)


def upsample_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w) -> (B, *size), from 0 to 1: normalised, resized bilinearly, and normalised again."""
    return normalize_maps(resize_maps(normalize_maps(maps), size))


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
