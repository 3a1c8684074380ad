"""Images without the object, or without all the rest.

Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", arXiv 1805.08249: masked-in, masked-out and
inpainted images. What is hidden is black, and inpainting is OpenCV's of 8-bit images, as in the authors' code.
"""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch

INPAINT_RADIUS = 3  # pixels around a missing one that OpenCV reads


def mask_in(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1, selected bool (B, H, W) -> the same shape: what is not selected is `fill`."""
    return torch.where(selected.unsqueeze(1), pixels, fill)


def mask_out(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1, selected bool (B, H, W) -> the same shape: what is selected is `fill`."""
    return torch.where(selected.unsqueeze(1), fill, pixels)


def inpaint(pixels: torch.Tensor, selected: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """mask_out() in 8 bit, the selected pixels filled in from around them by Telea's method: pixels (B, 3, H, W) in
    0..1, selected bool (B, H, W) -> the same shape, on the same device.

    255 * pixels is cut to 8 bit, so what is not selected becomes floor(255 * pixels) / 255. An image that is selected
    as a whole has nothing to fill it from and stays `fill`, which also has a small effect on the others: OpenCV takes
    gradients across the edge of a hole. Uses as many threads as torch does.
    """
    hidden = (255 * mask_out(pixels, selected, fill)).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    holes = selected.to(torch.uint8).cpu().numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        filled = np.stack(list(threads.map(inpaint_image, hidden, holes)))
    return torch.from_numpy(filled).to(pixels.device).permute(0, 3, 1, 2).to(pixels.dtype) / 255


def inpaint_image(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """image uint8 (H, W, 3), hole uint8 (H, W), not 0 where it is to be filled -> uint8 (H, W, 3)."""
    if hole.all() or not hole.any():
        return image
    return cv2.inpaint(image, hole, INPAINT_RADIUS, cv2.INPAINT_TELEA)
