"""White-box attacks: FGSM and PGD in the maximum norm, to measure accuracy on adversarial images.

FGSM: Goodfellow et al., ICLR 2015, arXiv 1412.6572, Sec. 4. PGD: Madry et al., ICLR 2018, arXiv 1706.06083, Sec. 2.1.
Both perturb each pixel by at most eps before the images are normalised, and keep pixels in 0..1.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from engine.data.sample_rng import uniform
from engine.errors import UserError
from evaluation.context import Transform
from evaluation.task_options import ATTACKS

FGSM_EPS = (4 / 255, 8 / 255)
CHUNK_PIXELS = 2**21  # pixels attacked at a time: 41 images of 224 x 224
PGD_EPS, PGD_STEPS, PGD_STEP_SIZE = 4 / 255, 20, 2 / 255

LogitsFn = Callable[[torch.Tensor], torch.Tensor]  # pixels (B, 3, H, W) in 0..1 -> logits (B, K)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy (B,) of logits (B, K) as log(1 + exp(other classes - true class)).

    This form has an exact gradient. At the true logit it is p - 1. The usual form gives 0 in float32 once 1 - p is
    below 3e-8, as for a third of CIFAR-10's test images; the steps then go in a wrong direction, and the attack looks
    weaker than it is.
    """
    true = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    others = logits.masked_fill(true, -torch.inf).logsumexp(1)
    return F.softplus(others - logits.masked_fill(~true, 0).sum(1))


def compute_pixel_gradient(model: LogitsFn, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the summed cross-entropy with respect to the pixels, float32 (B, 3, H, W).

    Parameters get no gradient. It also works inside no_grad and inference_mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels = pixels.detach().clone().requires_grad_()  # a clone, because inference tensors cannot require gradients
        loss = cross_entropy(model(pixels).float(), labels).sum()
        (gradient,) = torch.autograd.grad(loss, pixels)
    return gradient.float()


def fgsm(model: LogitsFn, pixels: torch.Tensor, labels: torch.Tensor, eps: float) -> torch.Tensor:
    """Take one step of size eps along the sign of the gradient. pixels (B, 3, H, W) in 0..1, labels (B,) -> pixels."""
    return (pixels + eps * compute_pixel_gradient(model, pixels, labels).sign()).clamp(0, 1)


def pgd(
    model: LogitsFn,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    steps: int,
    step_size: float,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take steps along the sign of the gradient, each projected to the eps-ball (maximum norm) and to 0..1.

    pixels (B, 3, H, W) in 0..1, labels (B,) -> pixels of the last step. start (B, 3, H, W) in -1..1: the initial
    perturbation in units of eps; None: no perturbation. Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"PGD takes at least one step, got {steps}")
    low, high = (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1)
    adversarial = pixels if start is None else (pixels + eps * start).clamp(low, high)
    for _ in range(steps):
        gradient = compute_pixel_gradient(model, adversarial, labels)
        adversarial = (adversarial + step_size * gradient.sign()).clamp(low, high)
    return adversarial


@dataclass(frozen=True)
class Attack:
    """The settings of an attack: fgsm, or pgd with steps and step_size. eps and step_size are for pixels in 0..1."""

    name: str
    eps: float
    steps: int = 1
    step_size: float | None = None  # pgd only

    def __post_init__(self):
        if self.name not in ATTACKS:
            raise ValueError(f"attack must be {' or '.join(ATTACKS)}, got {self.name!r}")
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be in 0..1, got {self.eps}")
        if self.name == "pgd" and (self.steps < 1 or self.step_size is None or not self.step_size >= 0):
            raise ValueError(f"pgd needs steps and a step_size, got {self.steps} and {self.step_size}")

    @property
    def title(self) -> str:
        """The name in tables: `FGSM 8/255`, `PGD 4/255, 20 steps`."""
        text = f"{self.name.upper()} {format_eps(self.eps)}"
        return text if self.name == "fgsm" else f"{text}, {self.steps} step{'s' if self.steps > 1 else ''}"

    def make_transform(self, model: LogitsFn, seed: int) -> Transform:
        """Return the attack on this model as a function of pixels (B, 3, H, W) in 0..1, labels (B,) and index (B,).

        The random start of PGD depends on the seed and the image, not on its batch or the model. Attacks of different
        eps start at the same point relative to eps.
        """

        def attack_chunk(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            if self.name == "fgsm":
                return fgsm(model, pixels, labels, self.eps)
            drawn = uniform(index, tuple(pixels.shape[1:]), seed=seed, purpose="pgd start", device=pixels.device)
            return pgd(model, pixels, labels, self.eps, self.steps, self.step_size, 2 * drawn - 1)

        def attack(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            # in chunks, because the autograd graph keeps the activations of all images
            size = max(1, CHUNK_PIXELS // pixels[0, 0].numel())
            chunks = zip(pixels.split(size), labels.split(size), index.split(size), strict=True)
            return torch.cat([attack_chunk(*chunk) for chunk in chunks])

        return attack


def format_eps(eps: float) -> str:
    """Return `8/255` for a multiple of 1/255, otherwise the number."""
    levels = round(eps * 255)
    return f"{levels}/255" if 0 < levels < 255 and abs(levels - eps * 255) < 1e-6 else f"{eps:g}"


def build_attacks(
    names: Iterable[str],
    eps: Iterable[float] | None = None,
    steps: Iterable[int] | None = None,
    step_size: float | None = None,
) -> list[Attack]:
    """Return each attack once: by name, then by eps, then by steps.

    eps: for both attacks; None: 4/255 and 8/255 for fgsm, 4/255 for pgd. steps None: 20. step_size None: 2/255, or eps
    if that is smaller. Raises UserError for a step size of 0, ValueError for an unknown name.
    """
    if step_size == 0:
        raise UserError("--step_size 0: PGD would never leave its start; give more than 0")
    fgsm_eps, pgd_eps = (FGSM_EPS, (PGD_EPS,)) if eps is None else [tuple(eps)] * 2
    steps = (PGD_STEPS,) if steps is None else tuple(steps)
    attacks = []
    for name in names:
        if name == "pgd":
            for bound in pgd_eps:
                size = min(PGD_STEP_SIZE, bound) if step_size is None else step_size
                attacks += [Attack(name, bound, count, size) for count in steps]
        else:
            attacks += [Attack(name, bound) for bound in fgsm_eps]
    return list(dict.fromkeys(attacks))
