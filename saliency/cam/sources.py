"""Class activation maps as saliency sources for mixing."""

import torch
from torch import nn

from ..base import Source
from .maps import PROBE_SIZE, ActivationMaps, resize_maps
from .tracing import black_image, eval_no_grad, trace_network


class CAM(Source):
    """The class activation map of `model` in evaluation mode, with negative values set to 0, at the size of the images.

    Soft targets weight the maps of their classes. image_size: side of the images in pixels; None: unknown. Raises
    ValueError if the network has no average in front of a single linear layer.
    """

    method = "cam"
    per_image = True
    probe_size: int | None = PROBE_SIZE  # of a black image on which the network is tried if image_size is unknown

    def __init__(self, model: nn.Module, *, precision: torch.dtype | None = None, image_size: int | None = None):
        self.maps = ActivationMaps(model, self.method, precision=precision)
        self.model, self.precision = self.maps.model, precision
        side = image_size or self.probe_size
        if side is None:
            return
        try:
            with eval_no_grad(self.model):
                trace = trace_network(self.model, black_image(self.model, side))
        except (RuntimeError, AssertionError, ValueError):
            return  # it only accepts other image sizes: the first call traces it
        self.maps.use_trace(trace)

    def __call__(self, images, targets):
        return resize_maps(self.maps(images, targets.float()).clamp_min(0), images.shape[-2:])


class GradCAM(CAM):
    """As CAM, but by Grad-CAM, for any network with maps. With soft targets, the score is their mean of the logits."""

    method = "gradcam"


class GradCAMpp(GradCAM):
    """As GradCAM, by Grad-CAM++."""

    method = "gradcam++"


class LayerCAM(GradCAM):
    """As GradCAM, by LayerCAM."""

    method = "layercam"


class Attention(CAM):
    """The attention of the last layer to each place of the image, for transformers; it depends on no target.

    See saliency/cam/attention.py. A call costs one forward pass. Raises ValueError for a network without an attention
    between all places of an image of this size.
    """

    method = "attention"
    probe_size = None  # whether windows cover the whole image depends on its size

    @property
    def logits(self) -> torch.Tensor | None:
        return self.maps.logits
