"""A trained mask decoder as a saliency source. It needs no labels, no gradients and not the network being trained."""

from pathlib import Path

import torch
from torch.nn import functional as F

from engine.errors import UserError
from saliency.base import Source
from saliency.casm.boxes import find_centroids
from saliency.casm.network import load_casm

MIN_GRID = 56  # least cells per side when the center of an object is located: the grid of the published decoder
MAX_SIZE_RATIO = 1.5  # images whose side differs by more than this factor are resized


class CASM(Source):
    """Masks in 0..1 of the checkpoint `casm`, made by python -m saliency.casm train.

    mean, std: normalization of the images that will be passed; it is converted to that of the checkpoint. Images whose
    side differs from that of the checkpoint by more than a factor of 1.5 are resized, and their masks resized back.
    precision: autocast dtype. A constant mask holds no information and becomes zero, so that mixing methods report it.
    """

    per_image = True

    def __init__(
        self,
        casm: str,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str = "cpu",
        precision: torch.dtype | None = None,
    ):
        if not Path(casm).is_file():
            raise UserError(
                f"--casm {casm}: no such file; make one with python -m saliency.casm train\nto resume a run whose file "
                "has moved, give its new path with --casm and --force_config"
            )
        saved = load_casm(casm)
        self.network = saved.network.to(device, memory_format=torch.channels_last)
        self.size, self.precision = saved.image_size, precision
        target, given = (
            torch.tensor([mean, std]).view(2, 3, 1, 1) for mean, std in ((saved.mean, saved.std), (mean, std))
        )
        # (image * given std + given mean - target mean) / target std
        self.scale, self.shift = ((given[1] / target[1]).to(device), ((given[0] - target[0]) / target[1]).to(device))
        self.same_normalization = torch.equal(target, given)

    @torch.no_grad()
    def __call__(self, images, targets):
        size = images.shape[-2:]
        inputs = images if self.same_normalization else images * self.scale + self.shift
        resize = min(size) < self.size / MAX_SIZE_RATIO or max(size) > self.size * MAX_SIZE_RATIO
        if resize:
            inputs = F.interpolate(inputs, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(images.device.type, self.precision, bool(self.precision)):
            masks = self.network.predict_masks(inputs)
        if resize:
            options = {"mode": "area"} if max(size) < self.size else {"mode": "bilinear", "align_corners": False}
            masks = F.interpolate(masks, size, **options)
        constant = masks.amax((2, 3), keepdim=True) - masks.amin((2, 3), keepdim=True) < 1e-4
        return masks.masked_fill(constant, 0.0)[:, 0]

    def points(self, saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row and column, (B,) long each, of the center of the object in maps (B, H, W).

        Masks have flat tops, whose first maximum is a corner of the object, so this is the centroid of the largest
        component. For a constant map it is a uniformly drawn pixel.
        """
        count, height, width = saliency.shape
        # Masks of large images consist of cells of several pixels. Their centers are the same and faster to find.
        max_cell = max(1, min(height, width) // MIN_GRID)
        cell = next(side for side in range(max_cell, 0, -1) if height % side == 0 and width % side == 0)
        centers = (find_centroids(F.avg_pool2d(saliency, cell)) + 0.5) * cell - 0.5
        drawn = torch.rand(count, 2, device=saliency.device)
        random_points = torch.stack([drawn[:, 0] * height, drawn[:, 1] * width], 1)
        rows, columns = torch.where(centers.isnan(), random_points, (centers + 0.5)).floor().long().unbind(1)
        return rows, columns
