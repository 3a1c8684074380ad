"""Accuracy under attack: pixels moved by at most eps so that the classifier errs, with the whole network known.

FGSM: Goodfellow et al., ICLR 2015, arXiv 1412.6572, Sec. 4. PGD: Madry et al., ICLR 2018, arXiv 1706.06083, Sec. 2.1.
Both move pixels in 0..1, before they are normalised, and keep them there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.data.sample_rng import uniform
from engine.errors import UserError
from evaluation.context import Transform
from evaluation.options import ATTACKS

FGSM_EPS = (4 / 255, 8 / 255)
CHUNK_PIXELS = 2**21  # pixels of the images that are attacked at a time: 41 images of 224 pixels a side
PGD_EPS, PGD_STEPS, PGD_STEP_SIZE = 4 / 255, 20, 2 / 255

LogitsFn = Callable[[torch.Tensor], torch.Tensor]  # pixels (B, 3, H, W) in 0..1 -> logits (B, K)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, K), (B,) -> (B,): the cross-entropy as log(1 + exp(other classes - true class)), with an exact gradient.

    Its gradient at the true logit is p - 1. As usually computed that is 0 in float32 once 1 - p is below 3e-8, as it is
    for a third of what a CIFAR network is shown; then steps go a wrong way, and an attack looks weaker than it is.
    """
    true = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    others = logits.masked_fill(true, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.masked_fill(~true, 0).sum(1))


def compute_pixel_gradient(classify: LogitsFn, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed cross-entropy at the pixels alone, float32 (B, 3, H, W); also where gradients are off."""
    with torch.inference_mode(False), torch.enable_grad():
        moved = pixels.detach().clone().requires_grad_()  # a clone: inference tensors take no part in gradients
        loss = cross_entropy(classify(moved).float(), labels).sum()
        (gradient,) = torch.autograd.grad(loss, moved)
    return gradient.float()


def fgsm(classify: LogitsFn, pixels: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    """One step of eps along the sign of the gradient. pixels (B, 3, H, W) in 0..1, labels (B,) -> pixels in 0..1."""
    return (pixels + eps * compute_pixel_gradient(classify, pixels, labels).sign()).clamp(0, 1)


def pgd(
    classify: LogitsFn,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    steps: int,
    step_size: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Steps along the sign of the gradient, each projected to the ball of eps (maximum norm) and to 0..1; the last.

    pixels (B, 3, H, W) in 0..1, labels (B,) -> pixels. start (B, 3, H, W) in -1..1, of eps: where in the ball to begin;
    None: at the pixels themselves. ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"PGD takes at least one step, got {steps}")
    low, high = (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1)
    moved = pixels if start is None else (pixels + eps * start).clamp(low, high)
    for _ in range(steps):
        moved = (moved + step_size * compute_pixel_gradient(classify, moved, labels).sign()).clamp(low, high)
    return moved


@dataclass(frozen=True)
class Attack:
    """fgsm, or pgd with its steps and step_size; eps and step_size are of pixels in 0..1."""

    name: str
    eps: float
    steps: int = 1
    step_size: float | None = None  # pgd alone

    def __post_init__(self):
        if self.name not in ATTACKS:
            raise ValueError(f"attack must be {' or '.join(ATTACKS)}, got {self.name!r}")
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be in 0..1, got {self.eps}")
        if self.name == "pgd" and (self.steps < 1 or self.step_size is None or not self.step_size >= 0):
            raise ValueError(f"pgd needs steps and a step_size, got {self.steps} and {self.step_size}")

    @property
    def title(self) -> str:
        """For tables: `FGSM 8/255`, `PGD 4/255, 20 steps`."""
        text = f"{self.name.upper()} {format_eps(self.eps)}"
        return text if self.name == "fgsm" else f"{text}, {self.steps} step{'s' if self.steps > 1 else ''}"

    def make_transform(self, classify: LogitsFn, seed: int) -> Transform:
        """The attack on this classifier as a function of pixels (B, 3, H, W) in 0..1, labels (B,) and index (B,).

        PGD starts at a point of the ball that depends on the seed and the image, not on its batch or the classifier;
        attacks of different eps start at the same relative point.
        """

        def attack_chunk(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            if self.name == "fgsm":
                return fgsm(classify, pixels, labels, self.eps)
            drawn = uniform(index, tuple(pixels.shape[1:]), seed=seed, purpose="pgd start", device=pixels.device)
            return pgd(classify, pixels, labels, self.eps, self.steps, self.step_size, 2 * drawn - 1)

        def attack(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            size = max(
                1, CHUNK_PIXELS // pixels[0, 0].numel()
            )  # the graph of a gradient keeps all layers of all images
            chunks = zip(pixels.split(size), labels.split(size), index.split(size), strict=True)
            return torch.cat([attack_chunk(*chunk) for chunk in chunks])

        return attack


def format_eps(eps: float) -> str:
    """`8/255` for a multiple of 1/255, else the number."""
    levels = round(eps * 255)
    return f"{levels}/255" if 0 < levels < 255 and abs(levels - eps * 255) < 1e-6 else f"{eps:g}"


def build_attacks(
    names: Iterable[str],
    eps: Iterable[float] | None = None,
    steps: Iterable[int] | None = None,
    step_size: float | None = None,
) -> list[Attack]:
    """Each attack once: by name, then by eps, then by steps.

    eps None: 4/255 and 8/255 for fgsm, 4/255 for pgd; given: for both. steps None: 20. step_size None: 2/255, or eps
    where that is smaller. Raises UserError for a step size of 0, ValueError for an unknown name.
    """
    if step_size == 0:
        raise UserError("--step_size 0: PGD would stay where it begins; give more than 0")
    fgsm_eps, pgd_eps = (FGSM_EPS, (PGD_EPS,)) if eps is None else [tuple(eps)] * 2
    steps = (PGD_STEPS,) if steps is None else tuple(steps)
    found = []
    for name in names:
        if name == "pgd":
            for bound in pgd_eps:
                size = min(PGD_STEP_SIZE, bound) if step_size is None else step_size
                found += [Attack(name, bound, count, size) for count in steps]
        else:
            found += [Attack(name, bound) for bound in fgsm_eps]
    return list(dict.fromkeys(found))
