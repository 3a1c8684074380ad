"""Class activation maps, as a source of saliency.

Zhou et al., "Learning Deep Features for Discriminative Localization", arXiv 1512.04150, Sec. 2: the maps in front of
the global average, weighted as the linear layer weights their means for the class.
"""

import torch
from torch import nn
from torch.nn import functional as F

from saliency.base import Source
from saliency.gradient import in_mode


class CAM(Source):
    """The maps of `model`, one of our networks (models.stages.Staged), in evaluation mode: what speaks against the
    class is cut off, the rest enlarged to the size of the image. targets with several classes weight the maps of each.
    """

    def __init__(self, model: nn.Module, *, precision: torch.dtype | None = None):
        if not hasattr(model, "forward_features"):
            raise ValueError(f"{type(model).__name__} has no average in front of a linear layer, which a CAM needs")
        self.model, self.precision = model, precision

    @torch.no_grad()
    def __call__(self, images, targets):
        with in_mode(self.model, "eval"), torch.autocast(images.device.type, self.precision, bool(self.precision)):
            maps = self.model.pooled(self.model.forward_features(images)[1][-1]).float()
        weights = getattr(self.model, self.model.last_layer).weight.float()  # (K, C)
        cam = torch.einsum("bchw,bc->bhw", maps, targets @ weights).clamp_min(0)
        return F.interpolate(cam.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
