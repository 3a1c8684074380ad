"""Masked-in, masked-out and inpainted images.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249. As in the authors' code, hidden
pixels are black, and OpenCV inpaints 8-bit images.
"""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch

INPAINT_RADIUS = 3  # in pixels, as published


def mask_in(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Keep the selected pixels and set the others to `fill`: (B, 3, H, W) in 0..1, selected bool (B, H, W)."""
    return torch.where(selected.unsqueeze(1), pixels, fill)


def mask_out(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Set the selected pixels to `fill` and keep the others: (B, 3, H, W) in 0..1, selected bool (B, H, W)."""
    return torch.where(selected.unsqueeze(1), fill, pixels)


def inpaint(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Fill in the selected pixels from their surroundings by Telea's method: (B, 3, H, W) in 0..1, selected bool
    (B, H, W). Return the same shape on the same device.

    255 * pixels is truncated to 8 bits, so pixels that are not selected become floor(255 * pixels) / 255. An image that
    is selected as a whole has no surroundings and becomes `fill`. The value of `fill` has a small effect on other
    images too, because OpenCV computes gradients across the edge of a hole. Uses as many threads as torch.
    """
    hidden = (255 * mask_out(pixels, selected, fill)).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    holes = selected.to(torch.uint8).cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        filled = np.stack(list(threads.map(inpaint_image, hidden, holes)))
    return torch.from_numpy(filled).to(pixels.device).permute(0, 3, 1, 2).to(pixels.dtype) / 255


def inpaint_image(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Inpaint an image (H, W, 3) uint8 where `hole` (H, W) uint8 is not 0."""
    if hole.all() or not hole.any():
        return image
    return cv2.inpaint(image, hole, INPAINT_RADIUS, cv2.INPAINT_TELEA)
