"""A function for each kind of saliency source. A source returns maps: `source(images, targets)` -> (B, H, W) >= 0.

images (B, C, H, W) are normalised floats, targets (B, K) floats whose rows sum to 1. A map is large where the object
is. `build_source(name, ...)` builds the same sources by the names of the command line.
"""

from collections.abc import Callable

import torch
from torch import nn

from .saliency import source_class
from .saliency.bank import Bank
from .saliency.cam.sources import CAM, Attention
from .saliency.gradient import Gradient
from .saliency.static import StaticSource

STATIC_METHODS = ("fine_grained", "spectral_residual", "spectral_residual_full", "float_bytes")
CAM_METHODS = ("cam", "gradcam", "gradcam++", "layercam")


def gradient_source(
    model: nn.Module,
    *,
    reduction: str = "rms",
    blur_sigma: float = 0.0,
    kernel_size: int = 5,
    mode: str = "eval",
    clean_weight: float = 0.0,
    follows_training_loss: bool = False,
    training_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    precision: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    saliency_size: int | None = None,
) -> Gradient:
    """Return the gradient of the loss of `model` with respect to the pixels, as `**mixer.gradient_options` wants it.

    model: images (B, C, H, W) -> logits (B, K); the network that is trained, or any other. The options from `reduction`
    to `follows_training_loss` are those that a mixer sets. With clean_weight > 0 a call also adds the gradient of
    clean_weight times the loss of these images to .grad of the parameters, so zero_grad() must come before the mixer.

    * training_loss(logits, targets): your mean loss, for mixers that follow it (SAGE); None: cross-entropy.
    * precision: type for autocast, such as torch.bfloat16; None: float32. scaler: your GradScaler, if you use one.
    * saliency_size: side in pixels to which images are resized for this pass, to save time; None: no resizing.

    Raises ValueError for an option out of range.
    """
    return Gradient(
        model,
        reduction=reduction,
        blur_sigma=blur_sigma,
        kernel_size=kernel_size,
        mode=mode,
        clean_weight=clean_weight,
        follows_training_loss=follows_training_loss,
        training_loss=training_loss,
        precision=precision,
        scaler=scaler,
        saliency_size=saliency_size,
    )


def static_source(mean: tuple[float, ...], std: tuple[float, ...], method: str = "fine_grained") -> StaticSource:
    """Return maps of the image alone, without a network.

    method: `fine_grained`, `spectral_residual` or `float_bytes`, whose maps are those of OpenCV, or
    `spectral_residual_full`, that of GuidedMixup. mean, std: the normalisation of your images, one number per channel
    for pixels in 0..1. Maps are computed for a whole batch on its device. Raises ValueError for an unknown method.
    """
    return _choose(method, STATIC_METHODS)(mean, std)


def cam_source(
    model: nn.Module,
    method: str = "cam",
    *,
    precision: torch.dtype | None = None,
    image_size: int | None = None,
) -> CAM:
    """Return class activation maps of `model`: `cam`, `gradcam`, `gradcam++` or `layercam`.

    model: images (B, C, H, W) -> logits (B, K). It runs in evaluation mode, and its state is restored. `cam` needs a
    global average in front of a single linear layer; the others take any network with maps. precision: type for
    autocast; None: float32. image_size: side of the images in pixels, for networks that accept one size only.

    Raises ValueError for an unknown method, and for a network without such maps.
    """
    return _choose(method, CAM_METHODS)(model, precision=precision, image_size=image_size)


def attention_source(
    model: nn.Module, *, precision: torch.dtype | None = None, image_size: int | None = None
) -> Attention:
    """Return the attention of the last layer of a transformer to each place of the image, whatever the class.

    model: images (B, C, H, W) -> logits (B, K). Arguments as for cam_source(). Raises ValueError for a network without
    an attention between all places of the image.
    """
    return Attention(model, precision=precision, image_size=image_size)


def bank_source(
    num_images: int, *, bank_size: int = 16, bank_momentum: float = 0.5, device: torch.device | str = "cpu"
) -> Bank:
    """Return a source without a pass of its own: it keeps a map of each training image, learned from training steps.

    num_images: size of the training set. bank_size: cells per side of a map. bank_momentum: weight of the old map when
    a cell is updated, in [0, 1). device: of the images. Raises ValueError for a value out of range.

    Call start_images(index), measure_coverage(mixed, images) and after_backward(images.grad, coverage) in each step:
    docs/methods.md has the loop.
    """
    return Bank(num_images, bank_size, bank_momentum, device)


def _choose(method: str, methods: tuple[str, ...]) -> type:
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(methods)}")
    return source_class(method)
