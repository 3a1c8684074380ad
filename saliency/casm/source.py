"""A trained mask decoder as a source of saliency: it needs no label, no gradient and not the network in training."""

from pathlib import Path

import torch
from torch.nn import functional as F

from engine.errors import UserError
from saliency.base import Source
from saliency.casm.boxes import find_centroids
from saliency.casm.network import load_casm

GRID = 56  # cells a side at least, on which the middle of an object is looked for: those of the published decoder
FAR = 1.5  # factor between the sides of two sizes from which images are scaled


class CASM(Source):
    """The masks of the file `casm`, made by python -m saliency.casm train, in 0..1.

    mean, std: normalisation of the images it will be asked about, which is changed to that of the file. Images whose
    side differs by more than 1.5 from those of the file are scaled for the pass, and the masks scaled back. precision:
    autocast type. A mask that is constant says nothing and becomes zero, so that methods count it.
    """

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
                f"--casm {casm}: no such file; python -m saliency.casm train makes one\nif that of a run has moved, "
                "name its new place with --casm and --force_config"
            )
        saved = load_casm(casm)
        self.network = saved.network.to(device, memory_format=torch.channels_last)
        self.size, self.precision = saved.image_size, precision
        own, given = (
            torch.tensor([mean, std]).view(2, 3, 1, 1) for mean, std in ((saved.mean, saved.std), (mean, std))
        )
        # (image * given std + given mean - own mean) / own std
        self.scale, self.shift = ((given[1] / own[1]).to(device), ((given[0] - own[0]) / own[1]).to(device))
        self.same = torch.equal(own, given)

    @torch.no_grad()
    def __call__(self, images, targets):
        size = images.shape[-2:]
        seen = images if self.same else images * self.scale + self.shift
        near = self.size / FAR <= min(size) and max(size) <= self.size * FAR
        if not near:
            seen = F.interpolate(seen, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(images.device.type, self.precision, bool(self.precision)):
            masks = self.network.masks(seen)
        if not near:
            how = {"mode": "area"} if max(size) < self.size else {"mode": "bilinear", "align_corners": False}
            masks = F.interpolate(masks, size, **how)
        constant = masks.amax((2, 3), keepdim=True) - masks.amin((2, 3), keepdim=True) < 1e-4
        return masks.masked_fill(constant, 0.0)[:, 0]

    def points(self, saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column, each (B,) long, of the middle of the object in maps (B, H, W): masks have flat tops, whose
        first maximum is a corner. Where a map tells nothing, a uniformly drawn pixel.
        """
        count, height, width = saliency.shape
        # the masks of large images have cells of several pixels: on these the middle is the same, and found sooner
        finest = max(1, min(height, width) // GRID)
        cell = next(side for side in range(finest, 0, -1) if height % side == 0 and width % side == 0)
        middle = (find_centroids(F.avg_pool2d(saliency, cell)) + 0.5) * cell - 0.5
        size = torch.tensor([height, width], device=saliency.device)
        anywhere = torch.rand(count, 2, device=saliency.device) * size
        rows, columns = torch.where(middle.isnan(), anywhere, (middle + 0.5)).floor().long().unbind(1)
        return rows, columns
