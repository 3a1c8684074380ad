"""Static saliency: maps computed from the image alone, like those of OpenCV contrib, for a whole batch on any device.

The arithmetic follows OpenCV step by step, including its rounding to 8 bits, because the most salient pixel depends on
it. Only spectral_residual_full() is that of another code.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from .base import Source
from .gradient import blur

MAX_ROWS = 128  # above, spectral_residual_full() works on 128 x 128 pixels
SCALES = (12, 24, 28, 48, 56, 112)  # half widths in pixels of the centre-surround windows of fine_grained


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 RGB (B, 3, H, W) or grey (B, 1, H, W) to int32 (B, H, W) in 0..255.

    The weights are those of OpenCV's fixed-point arithmetic.
    """
    if images.shape[1] == 1:
        return images[:, 0].int()
    red, green, blue = images.int().unbind(1)
    return (9798 * red).add_(green, alpha=19235).add_(blue, alpha=3735).add_(16384) >> 15


def binomial_blur(image: torch.Tensor) -> torch.Tensor:
    """Blur an int32 image (B, H, W) with a 3x3 binomial kernel, rounding half up.

    Borders are reflected without repeating the edge pixel.
    """
    padded = F.pad(image.unsqueeze(1).float(), (1, 1, 1, 1), mode="reflect").squeeze(1)
    rows = (padded[:, :-2] + padded[:, 2:]).add_(padded[:, 1:-1], alpha=2)
    total = (rows[..., :-2] + rows[..., 2:]).add_(rows[..., 1:-1], alpha=2)
    return total.int().add_(8) >> 4


def center_surround(image: torch.Tensor, windows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the on-off map of an int32 grey image (B, H, W) in 0..255, an int32 map (B, H, W) in 0..255.

    Each pixel is compared with the mean of a window around it, at six scales. Where it is brighter (on) and where it is
    darker (off) is summed and scaled separately, then added. As in OpenCV, the sum is truncated to 8 bits, so a pixel
    that is strong in both wraps around. windows: a float image to sum in the windows instead, as OpenCV sums floats.
    """
    height, width = image.shape[-2:]
    if windows is None:
        integral = F.pad(image, (1, 0, 1, 0)).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
    else:  # products with triangular matrices, because CUDA's cumulative sum of floats is not deterministic
        exact = {"device": image.device, "dtype": torch.float32 if image.device.type == "mps" else torch.float64}
        below, beside = torch.ones(height + 1, height, **exact).tril(-1), torch.ones(width, width + 1, **exact).triu(1)
        integral = below @ windows.to(exact["dtype"]) @ beside
    centre = image.float()
    signed, unsigned = torch.zeros_like(image), torch.zeros_like(image)
    for scale, weight, neighbours in list_windows(height, width, image.device):
        sums = window_sums(window_sums(integral, 1, scale), 2, scale)
        surround = sums.sub_(image).float().div_(neighbours)
        difference = (centre - surround).int()  # truncated towards 0
        if windows is not None:
            difference.fmod_(256)  # OpenCV keeps 8 bits; only float windows can exceed them
        signed.add_(difference, alpha=weight)
        unsigned.add_(difference.abs_(), alpha=weight)
    on_off = torch.stack((unsigned + signed, unsigned - signed), 1) >> 1  # (B, 2, H, W)
    on_off = scale_to_255(on_off)
    most = on_off.amax((1, 2, 3)).clamp_min_(1).view(-1, 1, 1)
    return on_off.sum(1, dtype=torch.int32).mul_(255).div_(most, rounding_mode="floor") & 255


@cache
def list_windows(height: int, width: int, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """Return for each scale its half width, the number of scales that it stands for, and the number of pixels around
    each pixel in its window, (H, W) float32.

    Windows that contain the whole image all give the same map: the first of them stands for all.
    """
    whole = [scale for scale in SCALES if scale >= max(height, width)]
    rows, columns = torch.arange(height + 1, device=device), torch.arange(width + 1, device=device)
    windows = []
    for scale in [scale for scale in SCALES if scale not in whole] + whole[:1]:
        area = window_sums(rows, 0, scale).unsqueeze(1) * window_sums(columns, 0, scale)
        windows.append((scale, len(whole) if scale in whole else 1, (area - 1).float()))
    return windows


def window_sums(integral: torch.Tensor, dim: int, scale: int) -> torch.Tensor:
    """Sum over windows of 2 * scale positions along `dim`, index - scale + 1 to index + scale, clipped at the ends.

    integral: running sums along `dim` that start with a 0, so it is one longer than the result.
    """
    size = integral.shape[dim] - 1
    inner = max(0, size - scale)  # number of windows that end before the last position; as many begin after the first
    total = integral.narrow(dim, size, 1)
    rest = [size - inner if axis == dim else -1 for axis in range(integral.dim())]
    sums = torch.cat([integral.narrow(dim, size - inner + 1, inner), total.expand(rest)], dim)
    sums.narrow(dim, size - inner, inner).sub_(integral.narrow(dim, 1, inner))
    return sums


def scale_to_255(values: torch.Tensor) -> torch.Tensor:
    """Scale int32 maps (..., H, W) >= 0 to trunc(255 * values / maximum); an all-zero map stays zero."""
    share = values / values.amax((-2, -1), keepdim=True).clamp_min_(1)
    exact = share.double() if share.device.type != "mps" else share  # OpenCV multiplies the float32 quotient in double
    return (255 * exact).int()


def fine_grained(images: torch.Tensor) -> torch.Tensor:
    """Return fine-grained saliency, float32 (B, H, W) in 0..1, of uint8 images (B, 3, H, W) in RGB or (B, 1, H, W).

    Montabone and Soto, "Human detection using a mobile platform and novel features derived from a visual saliency
    mechanism", 2010.
    """
    return center_surround(binomial_blur(binomial_blur(to_grey(images)))).float() / 255


def resize_exact(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize int32 (B, H, W) to (B, size, size) like OpenCV's bit-exact mode.

    Bilinear with 8-bit weights, without anti-aliasing.
    """
    for dim in (1, 2):
        old = image.shape[dim]
        position = (torch.arange(size, device=image.device) + 0.5) * (old / size) - 0.5
        position = position.clamp(0, old - 1)
        first = position.floor()
        weight = ((position - first) * 256).round().int()
        first = first.long()
        second = (first + 1).clamp_max(old - 1)
        weight = weight.view(-1, 1) if dim == 1 else weight
        image = (256 - weight) * image.index_select(dim, first) + weight * image.index_select(dim, second)
    return (image + 32768) >> 16


def spectral_residual(images: torch.Tensor, size: int = 64, angle: Callable | None = None) -> torch.Tensor:
    """Return spectral-residual saliency, float32 (B, H, W) with a maximum of about 1.

    Hou and Zhang, "Saliency detection: a spectral residual approach", CVPR 2007.

    images uint8 (B, 3, H, W) in RGB or (B, 1, H, W). size: side of the square on which the spectrum is computed. angle:
    function for the phase of a complex tensor, if not the exact phase (OpenCV uses a polynomial).
    """
    small = resize_exact(to_grey(images), size)
    real = torch.float32 if images.device.type == "mps" else torch.float64
    spectrum = torch.fft.fft2(small.to(real))
    magnitude = spectrum.abs()
    log_magnitude = (magnitude + 1).log()
    padded = F.pad(log_magnitude.unsqueeze(1), (1, 1, 1, 1), mode="reflect")
    residual = log_magnitude - F.avg_pool2d(padded, 3, stride=1).squeeze(1)
    if angle:
        phase = torch.polar(torch.ones_like(magnitude), angle(spectrum))
    else:
        phase = torch.where(magnitude > 0, spectrum / magnitude, 1)
    reconstruction = torch.fft.ifft2(residual.exp() * phase, norm="forward").abs()
    kernel = (torch.arange(-2, 3, device=images.device, dtype=real).square() / -128).exp()  # sigma 8
    kernel = kernel / kernel.sum()
    blurred = F.pad(reconstruction.unsqueeze(1), (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5)).square()
    saliency = (blurred / blurred.amax((2, 3), keepdim=True)).float()
    return F.interpolate(saliency, images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def to_grey_fused(images: torch.Tensor) -> torch.Tensor:
    """Convert float32 (B, 3, H, W), in an order that OpenCV takes for BGR, to grey (B, H, W) by fused multiply-adds.

    A float64 holds the product of two float32 numbers, so each step rounds to float32 once, on any device.
    """
    real = torch.float32 if images.device.type == "mps" else torch.float64
    blue, green, red = torch.tensor([0.114, 0.587, 0.299]).tolist()  # the float32 numbers
    first, second, third = images.to(real).unbind(1)
    grey = (second * green).float()
    grey = (first * blue + grey).float()
    return (third * red + grey).float()


def float_bytes(images: torch.Tensor) -> torch.Tensor:
    """Return what OpenCV's fine-grained detector makes of float images, (B, H, W) in 0..1.

    The published SaliencyMix code passes normalised floats. OpenCV then reads the grey float image byte by byte: a
    "pixel" is one byte of the float32 numbers in the left quarter of the row, while the windows around it sum the
    numbers themselves. Almost nothing is subtracted, the map consists of these bytes, and the most salient point is
    nearly random. images (B, 3, H, W): normalised floats in RGB order, which the authors' code passes where BGR is
    expected.

    The maps are those of OpenCV on a CPU with fused multiply-adds (on x86 those with AVX2). Without them, as after
    cv2.setUseOptimized(False), OpenCV rounds differently, and every fourth peak is elsewhere.
    """
    smooth = to_grey_fused(images.float()).unsqueeze(1)
    for _ in range(2):  # exact products with powers of two: the same bytes with and without fused operations
        smooth = F.pad(smooth, (1, 1, 1, 1), mode="reflect")
        smooth = (smooth[..., :-2] + smooth[..., 2:]) * 0.25 + smooth[..., 1:-1] * 0.5
        smooth = (smooth[..., :-2, :] + smooth[..., 2:, :]) * 0.25 + smooth[..., 1:-1, :] * 0.5
    smooth = smooth.squeeze(1).contiguous()
    octets = smooth.view(torch.uint8)[..., : images.shape[-1]].int()
    return center_surround(octets, windows=smooth).float() / 255


def residual_of_log_spectrum(grey: torch.Tensor) -> torch.Tensor:
    """Return the magnitude of the image that has the spectral residual as its spectrum: (B, H, W).

    grey (B, H, W) float32. The phase is kept; the log magnitude loses its mean over 3 x 3 frequencies, where the
    borders are repeated.
    """
    spectrum = torch.fft.fft2(grey)
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()
    log_magnitude = magnitude.log()
    padded = F.pad(log_magnitude.unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    residual = log_magnitude - F.avg_pool2d(padded, 3, stride=1).squeeze(1)
    return torch.fft.ifft2(spectrum * (residual.exp() / magnitude)).abs()


def spectral_residual_full(images: torch.Tensor) -> torch.Tensor:
    """Return the spectral-residual saliency of GuidedMixup, float32 (B, H, W), of any scale.

    Kang and Kim, "GuidedMixup: an efficient mixup strategy guided by saliency maps", AAAI 2023.

    Unlike OpenCV, it takes the grey values of the normalised images, in full size up to 128 rows (else at 128 x 128
    pixels), and does not square the result, which is blurred with 7 x 7 pixels, sigma 3. An image whose grey is 0
    everywhere has an all-zero map. images (B, 3, H, W) or (B, 1, H, W): normalised floats of at least 4 x 4 pixels.
    """
    images, size = images.float(), images.shape[-2:]
    if images.shape[1] == 3:
        red, green, blue = images.unbind(1)
        images = (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    if size[0] > MAX_ROWS:
        images = resize_smoothly(images, (MAX_ROWS, MAX_ROWS))
    saliency = blur(residual_of_log_spectrum(images.squeeze(1)), 3.0, 7)
    return resize_smoothly(saliency.unsqueeze(1), size).squeeze(1) if size[0] > MAX_ROWS else saliency


def resize_smoothly(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


class StaticSource(Source):
    """A source that reads the image itself: it undoes the normalisation and rounds to 8 bits. Targets are ignored."""

    per_image = True
    capturable = ("compute_maps",)

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return self.compute_maps(images)

    def compute_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Return the maps (B, H, W) of normalised images (B, 3, H, W)."""
        raise NotImplementedError

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Convert normalised images (B, 3, H, W) to uint8."""
        if self.mean.device != images.device:  # only once: a copy in each step would synchronise with the device
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return ((images * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)


class FineGrained(StaticSource):
    """See fine_grained()."""

    def compute_maps(self, images):
        return fine_grained(self.pixels(images))


class SpectralResidual(StaticSource):
    """See spectral_residual()."""

    def compute_maps(self, images):
        return spectral_residual(self.pixels(images))


class SpectralResidualFull(StaticSource):
    """See spectral_residual_full(). It takes the normalised images as they are."""

    def compute_maps(self, images):
        return spectral_residual_full(images)


class FloatBytes(StaticSource):
    """See float_bytes()."""

    def compute_maps(self, images):
        return float_bytes(images)


class Uniform(Source):
    """No saliency: every map is 1 everywhere. Shows what a method does without saliency."""

    per_image = True

    def __call__(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return images.new_ones(len(images), *images.shape[-2:], dtype=torch.float32)
