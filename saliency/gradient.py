"""Saliency as the gradient of the loss with respect to the pixels, from the network that is being trained.

Simonyan et al., arXiv 1312.6034, Sec. 3, in the forms of the mixing methods: the root mean square over the channels
(Puzzle Mix, Co-Mixup, R-Mix), or the mean of the absolute values with a Gaussian blur (SAGE).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from .base import Source

# scale of the summed loss under float16: pixel gradients stay normal numbers, and those of the logits below 1024
FP16_SCALE = 1024.0


class Gradient(Source):
    """The gradient of the loss of `model` with respect to the pixels, in one of two modes.

    * Input only (clean_weight 0): no parameter gets a gradient. A call costs two thirds of a training step.
    * Reuse (clean_weight > 0): the call also adds the parameter gradients of clean_weight times the loss to .grad: the
      network is trained on the clean images too. Do not call zero_grad() between the mixer and the optimizer step.

    A mixer's gradient_options set these parameters:

    * reduction: `rms` or `mean_abs` over the channels.
    * blur_sigma: of a Gaussian blur with kernel_size pixels and reflected borders; 0: no blur.
    * mode: `eval` uses batch norm's running statistics; `train` those of the batch, and updates the running ones.
    * clean_weight: see above. follows_training_loss: differentiate training_loss instead of the cross-entropy.

    The training run sets the others:

    * training_loss(logits, targets): mean loss of the training step.
    * cross_entropy_scale: factor of the cross-entropy that brings it to the scale of the training loss.
    * precision: type for autocast; None: float32. scaler: the GradScaler of the training step, or None.
    * saliency_size: side in pixels to which the images are resized for this pass; None: no resizing. The pass then
      runs in evaluation mode in any case.
    """

    has_gradient = True
    network_passes = ("run_network",)

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
            raise ValueError(f"blur_sigma must be >= 0 and kernel_size odd, got {blur_sigma} and {kernel_size}")
        if saliency_size and clean_weight:
            raise ValueError(
                "saliency_size excludes a clean loss, which would train on resized images: set clean_weight to 0, in "
                "place of clean_lam or update_ratio"
            )
        self.model, self.reduction, self.mode = model, reduction, "eval" if saliency_size else mode
        self.blur_sigma, self.kernel_size = blur_sigma, kernel_size
        self.clean_weight, self.scaler = clean_weight, scaler
        self.loss_fn = training_loss if follows_training_loss and training_loss else self.cross_entropy
        self.cross_entropy_scale = cross_entropy_scale
        self.precision, self.saliency_size = precision, saliency_size
        self.per_image = self.mode == "eval" and not clean_weight

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.cross_entropy_scale * F.cross_entropy(logits, targets)

    def __call__(self, images, targets):
        return self.reduce(self.gradient(images, targets))

    def gradient(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient, self.logits = self.run_network(images, targets)
        return gradient

    def run_network(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient with respect to the images, (B, C, H, W), and the logits, (B, K), both in float32."""
        pixels = images.detach()
        if self.saliency_size:
            if self.saliency_size > max(images.shape[-2:]):
                raise ValueError(f"saliency_size {self.saliency_size} is larger than the images, {tuple(images.shape)}")
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
        return gradient.float(), logits.detach().float()

    @torch.no_grad()
    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        saliency = gradient.square().mean(1).sqrt() if self.reduction == "rms" else gradient.abs().mean(1)
        return blur(saliency, self.blur_sigma, self.kernel_size) if self.blur_sigma else saliency


def resize_images(images: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def blur(saliency: torch.Tensor, sigma: float, kernel_size: int) -> torch.Tensor:
    """Blur maps (B, H, W) with a Gaussian. Borders are reflected without repeating the edge pixel."""
    kernel = gaussian_kernel(sigma, kernel_size, saliency.device, saliency.dtype)
    padded = F.pad(saliency.unsqueeze(1), (kernel_size // 2,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).squeeze(1)


@cache
def gaussian_kernel(sigma: float, kernel_size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of a Gaussian blur along one axis, (kernel_size,), with sum 1."""
    reach = kernel_size // 2
    kernel = torch.arange(-reach, reach + 1, device=device, dtype=dtype)
    kernel = (kernel.square() / (-2 * sigma**2)).exp()
    return kernel / kernel.sum()


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Run the network in training or evaluation mode (mode `train` or `eval`), then restore the mode of each layer."""
    switched = [layer for layer in model.modules() if layer.training != (mode == "train")]
    for layer in switched:
        layer.training = mode == "train"
    try:
        yield
    finally:
        for layer in switched:
            layer.training = mode != "train"


@contextmanager
def freeze_parameters(model: nn.Module) -> Iterator[None]:
    """Set requires_grad of all parameters to False, then restore it.

    A compiled network is then compiled once more, to a graph that computes no weight gradients.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
