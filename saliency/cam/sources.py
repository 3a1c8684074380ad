"""Class activation maps as saliency sources."""

import torch
from torch import nn

from saliency.base import Source
from saliency.cam.maps import PROBE_SIZE, ActivationMaps, resize_maps
from saliency.cam.tracing import black_image, eval_no_grad, trace_network


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
            with eval_no_grad(self.model):
                trace = trace_network(self.model, black_image(self.model, PROBE_SIZE))
        except (RuntimeError, AssertionError, ValueError):
            return  # it takes images of another size alone: the first batch will tell
        self.maps.use_trace(trace)

    def __call__(self, images, targets):
        return resize_maps(self.maps(images, targets.float()).clamp_min(0), images.shape[-2:])


class GradCAM(CAM):
    """The same by Grad-CAM, for any network that has maps. The score of soft targets is their mean of the logits."""

    method = "gradcam"


class GradCAMpp(GradCAM):
    method = "gradcam++"


class LayerCAM(GradCAM):
    method = "layercam"
