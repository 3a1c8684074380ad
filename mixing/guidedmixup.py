"""GuidedMixup: pair the images whose salient regions differ most, then blend each pixel by the ratio of the saliencies.

Kang and Kim, AAAI 2023, arXiv 2306.16612. The mix itself draws nothing. With the source `spectral_residual_full` it is
the method's SR variant, with `gradient` its AP variant.
"""

import torch

from .base import Mixer
from .kernels import check_mode, use_kernels
from .ops import blend, blend_pixels, blur_maps, check_blur, check_probability, draw_partner, normalize_sum

MIN_SALIENCY = 1e-12  # added to maps that sum to 1: where both are 0, the images have equal weights


def measure_distances(maps: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance between each two of the maps (B, H, W), over all pixels: (B, B) float32."""
    # a matrix product is several times faster than all differences, and double precision makes up for its cancellation
    flat = maps.flatten(1).to(torch.float32 if maps.device.type == "mps" else torch.float64)
    squares = flat.square().sum(1)
    distances = torch.addmm(squares + squares.unsqueeze(1), flat, flat.mT, alpha=-2)
    return distances.clamp_min(0).sqrt().float()


def pair_in_a_cycle(distance: torch.Tensor) -> torch.Tensor:
    """Return the partner of each image, (B,) long: the greedy cycle through all images along large distances.

    distance (B, B), symmetric. The cycle begins with the two images that are farthest from each other. Each next
    partner is the farthest image that is not yet in the cycle, and the last image gets the first one. Of equal
    distances the first in row-major order counts. Two images are each other's partners, a single one its own.
    """
    size = len(distance)
    left = distance.clone().fill_diagonal_(-torch.inf)  # -inf: cannot become a partner any more
    start = left.argmax()
    cycle = torch.empty(size, dtype=torch.long, device=distance.device)  # the images in the order of the cycle
    cycle[0] = start // size
    if size > 1:
        cycle[1] = start % size
    for step in range(1, size - 1):
        left.index_fill_(1, cycle[step - 1 : step], -torch.inf)
        torch.argmax(left.index_select(0, cycle[step : step + 1]), 1, out=cycle[step + 1 : step + 2])
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))


def weigh_pixels(maps: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Return the weight of each image at each pixel, (B, H, W): its share of its own saliency and of its partner's."""
    maps = maps + MIN_SALIENCY
    return maps / (maps + maps[partner])


class GuidedMixup(Mixer):
    """The weight of an image at a pixel is its saliency there, relative to the sum of its own and its partner's.

    The targets follow the mean weight. pairing: `greedy`, see pair_in_a_cycle(), or `random` (a permutation). Maps are
    blurred before they are compared, whatever their source: blur_sigma and kernel_size, in pixels, of a Gaussian;
    blur_sigma 0: not at all. mix_prob: probability that a batch is mixed; the paper has 0.5 for SR and 0.8 for AP.
    clean_lam: weight of the clean loss that is also trained on, with a gradient source. Raises ValueError for images
    that are too small for the blur.

    kernels: see mixing.kernels.use_kernels().
    """

    default_source = "spectral_residual_full"

    def __init__(
        self,
        pairing: str = "greedy",
        blur_sigma: float = 3.0,
        kernel_size: int = 7,
        clean_lam: float = 0.0,
        mix_prob: float = 0.5,
        kernels: str = "auto",
    ):
        if pairing not in ("greedy", "random"):
            raise ValueError(f"pairing must be greedy or random for guidedmixup, got {pairing!r}")
        if blur_sigma < 0 or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"blur_sigma must be >= 0 and kernel_size odd, got {blur_sigma} and {kernel_size}")
        if clean_lam < 0:
            raise ValueError(f"clean_lam must not be negative, got {clean_lam}")
        self.pairing, self.blur_sigma, self.kernel_size = pairing, blur_sigma, kernel_size
        self.clean_lam, self.mix_prob = clean_lam, check_probability("mix_prob", mix_prob)
        self.kernels = check_mode(kernels)

    @property
    def gradient_options(self):
        return {"mode": "train", "clean_weight": self.clean_lam}

    def check_size(self, height, width):
        check_blur(self.blur_sigma, self.kernel_size, height, width)

    def mix_batch(self, images, targets, source):
        self.check_size(*images.shape[-2:])
        saliency = self.compute_saliency(source, images, targets)
        with torch.no_grad():
            maps = normalize_sum(self.blur(saliency))
            partner = self.find_partner(maps) if self.pairing == "greedy" else draw_partner(images)
            weight = weigh_pixels(maps, partner)
        self.set_weight(images, lambda: weight, partner)
        mixed = blend_pixels(images, partner, weight.unsqueeze(1))
        return mixed, blend(targets, partner, weight.mean((1, 2)))

    def blur(self, saliency: torch.Tensor) -> torch.Tensor:
        return blur_maps(saliency, self.blur_sigma, self.kernel_size) if self.blur_sigma else saliency

    def find_partner(self, maps: torch.Tensor) -> torch.Tensor:
        """Return the partner of each image in the greedy cycle, (B,) long. maps (B, H, W) sum to 1."""
        distance = measure_distances(maps)
        if use_kernels(self.kernels, maps.device):
            from .kernels import guidedmixup as kernels

            return kernels.pair_in_a_cycle(distance)
        return pair_in_a_cycle(distance)
