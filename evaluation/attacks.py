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
from evaluation import ATTACKS
from evaluation.context import Alter

FGSM_EPS = (4 / 255, 8 / 255)
AT_ONCE = 2**21  # pixels of the images that are attacked at a time: 41 of 224 a side
PGD_EPS, PGD_STEPS, PGD_STEP_SIZE = 4 / 255, 20, 2 / 255

LogitsFn = Callable[[torch.Tensor], torch.Tensor]  # pixels (B, 3, H, W) in 0..1 -> logits (B, K)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, K), (B,) -> (B,): the usual one, log(1 + exp(other classes - true class)), with an exact gradient.

    Its gradient at the true logit is p - 1. As usually computed that is 0 in float32 once 1 - p is below 3e-8, as it is
    for a third of what a CIFAR network is shown, and the step goes a wrong way: an attack looks weaker than it is.
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

    def alter(self, classify: LogitsFn, seed: int) -> Alter:
        """The attack on this classifier, as what a test does to a batch: (pixels, labels, index) -> pixels.

        PGD begins at a place in the ball that depends on the seed and the image, not on its batch or the classifier;
        of attacks with different eps, at the same place of each ball.
        """

        def alter(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            count = max(1, AT_ONCE // (pixels.shape[2] * pixels.shape[3]))  # a gradient keeps all layers of each image
            parts = zip(pixels.split(count), labels.split(count), index.split(count), strict=True)
            return torch.cat([attacked(*part) for part in parts])

        def attacked(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            if self.name == "fgsm":
                return fgsm(classify, pixels, labels, self.eps)
            drawn = uniform(index, tuple(pixels.shape[1:]), seed=seed, purpose="pgd start", device=pixels.device)
            start = 2 * drawn - 1
            return pgd(classify, pixels, labels, self.eps, self.steps, self.step_size, start)

        return alter


def format_eps(eps: float) -> str:
    """`8/255` for what is a whole number of 255, else the number."""
    levels = round(eps * 255)
    return f"{levels}/255" if 0 < levels < 255 and abs(levels - eps * 255) < 1e-6 else f"{eps:g}"


def build_attacks(
    names: Iterable[str],
    eps: Iterable[float] | None = None,
    steps: Iterable[int] | None = None,
    step_size: float | None = None,
) -> list[Attack]:
    """The attacks asked for, each once: by name, then by eps, then by steps.

    eps None: 4/255 and 8/255 for fgsm, 4/255 for pgd; given: for both. steps None: 20. step_size None: 2/255, or eps
    where that is smaller. Raises UserError for a step size of 0, ValueError for an unknown name.
    """
    if step_size == 0:
        raise UserError("--step_size 0: PGD would stay where it begins; give more than 0")
    given = None if eps is None else tuple(eps)
    steps = (PGD_STEPS,) if steps is None else tuple(steps)
    found = []
    for name in names:
        if name == "pgd":
            for one in (PGD_EPS,) if given is None else given:
                size = min(PGD_STEP_SIZE, one) if step_size is None else step_size
                found += [Attack(name, one, number, size) for number in steps]
        else:
            found += [Attack(name, one) for one in (FGSM_EPS if given is None else given)]
    return list(dict.fromkeys(found))
