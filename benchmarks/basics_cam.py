"""An extractor for --basics of `python -m saliency.casm score` and `eval`: class activation maps of MobileNetV2.

    python -m saliency.casm score DATA --annotation-path boxes.csv --class-list classes.csv \
        --basics benchmarks/basics_cam.py --casms-path mobilenet_v2.pt

Zhou et al., arXiv 1512.04150: the last feature maps, weighted by the weights of the linear layer for the predicted
class and scaled to 0..1. The box is that of the largest connected component above 0.3.
"""

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

image_size = 257  # in pixels; the extractor could also define mean, std and classes
THRESHOLD = 0.3


def load_model(path: str):
    """Return the network with the weights of this file, a state dict."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = mobilenet_v2(weights=None)
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
    return model.eval()


@torch.no_grad()
def get_masks_and_check_predictions(images: np.ndarray, targets: np.ndarray, model):
    """Return masks (B, H, W) in 0..1, their boxes as masks (B, H, W) of 0 and 1, and which predictions are right, (B,).

    images (B, 3, H, W): normalised. targets (B,): class indices.
    """
    maps = model.features(torch.from_numpy(images))
    linear = model.classifier[1]
    classes = linear(maps.mean((2, 3))).argmax(1)
    cams = torch.einsum("bchw,bc->bhw", maps, linear.weight[classes]).unsqueeze(1)
    cams = F.interpolate(cams, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = cams.amin((1, 2), keepdim=True), cams.amax((1, 2), keepdim=True)
    masks = ((cams - low) / (high - low).clamp_min(1e-12)).numpy()
    return masks, np.stack([mask_largest_box(mask > THRESHOLD) for mask in masks]), classes.numpy() == targets


def mask_largest_box(selected: np.ndarray) -> np.ndarray:
    """Return a mask (H, W) that is 1 in the box of the largest connected component of `selected` (H, W) bool."""
    count, _, boxes, _ = cv2.connectedComponentsWithStats(selected.astype(np.uint8), connectivity=4)
    box = np.zeros(selected.shape, np.float32)
    if count > 1:
        left, top, width, height, _ = boxes[1 + boxes[1:, cv2.CC_STAT_AREA].argmax()]
        box[top : top + height, left : left + width] = 1
    return box
