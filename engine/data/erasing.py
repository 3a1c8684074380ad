"""Erase a random rectangle of normalised images, filled with noise: Random Erasing (Zhong et al., arXiv 1708.04896).

The rectangles are distributed as those of torchvision's RandomErasing, the pixels are standard normal (its `random`,
timm's `pixel`). Rectangles are drawn on the CPU and filled on the device, where the noise of all epochs lies ready, so
that no step waits for the device or copies to it. All depends only on (seed, epoch, index).
"""

import math

import torch

from engine.data.sample_rng import uniform

SCALE, RATIO = (0.02, 0.33), (0.3, 3.3)  # area as a fraction of the image; height / width
TRIES = 10  # of a rectangle that fits into the image; afterwards the image stays as it is
MIN_NOISE = 2**20  # numbers; a rectangle takes a run of them from a random position on


class RandomErasing:
    """Erases a rectangle of each image of size x size pixels with this probability."""

    def __init__(self, probability: float, *, size: int, seed: int, device: torch.device):
        self.probability, self.seed = probability, seed
        count = max(MIN_NOISE, 4 * 3 * size**2)
        self.noise = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(device)

    def __call__(self, images: torch.Tensor, index: torch.Tensor, epoch: int) -> torch.Tensor:
        """Erase rectangles of images (B, 3, H, W) in place. index (B,): indices in the set, on the CPU."""
        draws = uniform(index, (2 * TRIES + 4,), seed=self.seed, purpose=f"erased in epoch {epoch}")
        rectangles = place_rectangles(draws[:, :-1], self.probability, *images.shape[2:])
        for image, (y1, y2, x1, x2), start in zip(images, rectangles.T.tolist(), draws[:, -1].tolist(), strict=True):
            if y2 > y1:
                height, width = y2 - y1, x2 - x1
                count = 3 * height * width
                noise = self.noise.narrow(0, int(start * (len(self.noise) - count)), count)
                image[:, y1:y2, x1:x2] = noise.view(3, height, width)
        return images


def place_rectangles(draws: torch.Tensor, probability: float, height: int, width: int) -> torch.Tensor:
    """Return rectangles y1, y2, x1, x2 (4, B) from draws (B, 2 TRIES + 3) in [0, 1); empty: nothing is erased."""
    areas, shapes, rest = draws.split((TRIES, TRIES, 3), 1)
    down, across, chance = rest.unbind(1)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * areas)
    ratio = (math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * shapes).exp()
    h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)
    erased = fits.any(1) & (chance < probability)
    h, w = (side.gather(1, first).squeeze(1) * erased for side in (h, w))
    top, left = (down * (height - h + 1)).floor(), (across * (width - w + 1)).floor()
    return torch.stack([top, top + h, left, left + w]).long()
