"""RandAugment and TrivialAugment of torchvision, image by image where images are read, usually in a worker process.

RandAugment: Cubuk et al., arXiv 1909.13719. TrivialAugment: Mueller and Hutter, arXiv 2103.10158. torchvision's
transforms draw from torch's global generator, which is seeded for each image by (seed, epoch, index) and restored
afterwards. They run on Pillow images: faster than on tensors, and with bicubic interpolation.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from engine.data.augment import Augmentation, AutoAugment, crop_and_flip_drawn
from engine.data.image_files import ImageFiles
from engine.data.image_tensor import ImageTensor
from engine.data.sample_rng import hash_samples

STEPS_PER_LEVEL, LEVELS = 10, 10  # magnitudes from 0 to 10 in steps of 0.1


class RandAugment:
    """v2.RandAugment, operation by operation, so that each has a probability and a magnitude of its own."""

    def __init__(self, policy: AutoAugment, **drawing):
        self.policy = policy
        self.operation = v2.RandAugment(num_ops=1, num_magnitude_bins=STEPS_PER_LEVEL * LEVELS + 1, **drawing)

    def __call__(self, image: Image.Image) -> Image.Image:
        policy = self.policy
        for _ in range(policy.ops):
            if policy.prob < 1 and torch.rand(()) >= policy.prob:
                continue
            magnitude = policy.magnitude
            if policy.std:
                magnitude = min(max(magnitude + policy.std * torch.randn(()).item(), 0), LEVELS)
            self.operation.magnitude = round(STEPS_PER_LEVEL * magnitude)
            image = self.operation(image)
        return image


def build_policy(policy: AutoAugment, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    """Return the transform of an image. mean: colour in 0..1 that fills what an operation uncovers, as in timm."""
    drawing = {
        "interpolation": v2.InterpolationMode(policy.interpolation),
        "fill": [round(255 * value) for value in mean],
    }
    return RandAugment(policy, **drawing) if policy.policy == "rand" else v2.TrivialAugmentWide(**drawing)


class AugmentedImages:
    """Images that are cropped, flipped, resized and then changed by a policy where they are read.

    resize: a function of the pixels (B, H, W, 3) after crop and flip. draw: a function of the epoch that returns the
    order and the numbers of Augmentation.draw(), as engine.data.loader.draw_epoch() does.
    """

    def __init__(
        self,
        images: ImageFiles | ImageTensor,
        augmentation: Augmentation,
        mean: tuple[float, ...],
        *,
        resize: Callable[[torch.Tensor], torch.Tensor],
        draw: Callable[[int], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    ):
        self.images, self.augmentation, self.resize, self.draw = images, augmentation, resize, draw
        self.policy, self.drawn = build_policy(augmentation.auto, mean), (None, {})
        self.remedy = images.remedy

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: list[int], seed: int = 0, epoch: int = 0) -> tuple:
        """Read a batch; see ImageFiles.read()."""
        pixels, indices, boxes = self.images.read(index, seed, epoch)
        if pixels is None:
            return pixels, indices, boxes
        if len(indices) < len(index):  # unreadable files are skipped
            index = indices.tolist()
        if self.drawn[0] != epoch:
            self.drawn = epoch, self.draw(epoch)[1]
        drawn = {name: values[..., index] for name, values in self.drawn[1].items()}
        pixels = self.resize(crop_and_flip_drawn(pixels, None, drawn, self.augmentation.crop_padding_mode))
        with torch.random.fork_rng(devices=[]):
            for image, key in zip(pixels.numpy(), hash_samples(seed, epoch, index).tolist(), strict=True):
                torch.default_generator.manual_seed(key)
                image[:] = np.asarray(self.policy(Image.fromarray(image)))
        return pixels, indices, boxes
