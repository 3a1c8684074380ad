"""Saliency as the gradient of the loss with respect to the pixels, of the network in training.

Simonyan et al., arXiv 1312.6034, Sec. 3, in the forms of the methods that mix by it: root mean square over the channels
(Puzzle Mix, Co-Mixup, R-Mix) or mean of the absolute values with a Gaussian blur (SAGE).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from saliency.base import Source

FP16_SCALE = (
    1024.0  # of the summed loss: pixel gradients stay normal half-precision numbers, those of logits below 1024
)


class Gradient(Source):
    """Pixel gradients of `model`, in one of two modes.

    Input only (clean_weight 0): nothing but the pixels gets a gradient, which costs two thirds of a training step.
    Reuse (clean_weight > 0): clean_weight times the clean loss also goes into the parameters' .grad.

    reduction: `rms` or `mean_abs` over the channels. blur_sigma: of a Gaussian of kernel_size pixels with reflected
    borders; 0: no blur. mode: `eval` takes batch norm's running statistics; `train` those of the batch, and moves the
    running ones, as the training step does. training_loss(logits, targets): mean loss of the training step, which is
    differentiated if follows_training_loss; otherwise the cross-entropy times cross_entropy_scale is. precision:
    autocast type. scaler: the training step's GradScaler, or None. saliency_size: side in pixels to which the images
    are scaled for this pass, always in evaluation mode; None: their own size.
    """

    has_gradient = True

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: str = "rms",
        blur_sigma: float = 0.0,
        kernel_size: int = 5,
        mode: str = "eval",
        clean_weight: float = 0.0,
        follows_training_loss: bool = False,
        training_loss: Callable | None = None,
        cross_entropy_scale: float = 1.0,
        precision: torch.dtype | None = None,
        scaler=None,
        saliency_size: int | None = None,
    ):
        if reduction not in ("rms", "mean_abs"):
            raise ValueError(f"reduction must be rms or mean_abs, got {reduction!r}")
        if mode not in ("train", "eval"):
            raise ValueError(f"mode must be train or eval, got {mode!r}")
        if blur_sigma < 0 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"a blur needs a sigma >= 0 and an odd kernel, got {blur_sigma} and {kernel_size}")
        if saliency_size and clean_weight:
            raise ValueError(
                "saliency_size excludes a clean term, which would train on scaled images: add --clean_lam 0, or with "
                "sage --update_ratio 1"
            )
        self.model, self.reduction, self.mode = model, reduction, "eval" if saliency_size else mode
        self.blur_sigma, self.kernel_size = blur_sigma, kernel_size
        self.clean_weight, self.scaler = clean_weight, scaler
        self.loss_fn = training_loss if follows_training_loss and training_loss else self.cross_entropy
        self.cross_entropy_scale = cross_entropy_scale
        self.precision, self.saliency_size = precision, saliency_size

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.cross_entropy_scale * F.cross_entropy(logits, targets)

    def __call__(self, images, targets):
        return self.reduce(self.gradient(images, targets))

    def gradient(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pixels = images.detach()
        if self.saliency_size:
            if self.saliency_size > max(images.shape[-2:]):
                raise ValueError(f"saliency_size {self.saliency_size} is larger than the images: {tuple(images.shape)}")
            pixels = resize_images(pixels, self.saliency_size)
        pixels = pixels.clone().requires_grad_()
        precision = torch.autocast(pixels.device.type, self.precision) if self.precision else nullcontext()
        reuse = self.clean_weight > 0
        with (
            torch.enable_grad(),
            in_mode(self.model, self.mode),
            nullcontext() if reuse else freeze_parameters(self.model),
        ):
            with precision:
                logits = self.model(pixels)
            self.logits = logits.detach().float()
            loss = self.loss_fn(logits.float(), targets)
            if reuse:
                loss = self.clean_weight * loss
                (self.scaler.scale(loss) if self.scaler else loss).backward()
                gradient = pixels.grad
            else:
                scale = FP16_SCALE if self.precision is torch.float16 else 1.0
                (gradient,) = torch.autograd.grad(loss * (len(images) * scale), pixels)
        if self.saliency_size:
            gradient = F.interpolate(gradient.float(), images.shape[-2:], mode="bilinear", align_corners=False)
        return gradient.float()

    @torch.no_grad()
    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        saliency = gradient.square().mean(1).sqrt() if self.reduction == "rms" else gradient.abs().mean(1)
        return blur(saliency, self.blur_sigma, self.kernel_size) if self.blur_sigma else saliency


def resize_images(images: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def blur(saliency: torch.Tensor, sigma: float, kernel_size: int) -> torch.Tensor:
    """(B, H, W) -> (B, H, W): Gaussian blur with reflected borders, the edge pixel not repeated."""
    reach = kernel_size // 2
    taps = torch.arange(-reach, reach + 1, device=saliency.device, dtype=saliency.dtype)
    taps = (taps.square() / (-2 * sigma**2)).exp()
    taps = taps / taps.sum()
    padded = F.pad(saliency.unsqueeze(1), (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1)).squeeze(1)


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """`model` in training or evaluation mode; afterwards every layer as it was."""
    moved = [layer for layer in model.modules() if layer.training != (mode == "train")]
    for layer in moved:
        layer.training = mode == "train"
    try:
        yield
    finally:
        for layer in moved:
            layer.training = mode != "train"


@contextmanager
def freeze_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient: a compiled network gets a graph of its own, without weight gradients."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
