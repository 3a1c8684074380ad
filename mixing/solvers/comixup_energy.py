"""Co-Mixup's objective: which input, or which two inputs half and half, each block of each output shows.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 3. m outputs are assembled from m inputs on a grid of N blocks. The label
z_ik in {0, 1/2, 1}^m of block k of output i sums to 1: a hard label shows one input, a soft label two inputs, half of
each. With n_ij = sum_k z_ikj, the blocks that output i takes from input j:

    F(z) = sum_ik cost_k . z_ik + b/2 sum_i sum_kk' |z_ik - z_ik'|^2 + g sum_ij phi(q_ij) n_ij, q_i = A sum_i'!=i n_i'

k, k' are neighbouring blocks, A is the compatibility matrix, b = beta / N, g = gamma / N and t = thres N. The terms are
called unary, smoothness and diversity. phi(q) is q if q > t and 0 otherwise (`hard`), or max(q - t, 0) (`soft`): an
input becomes expensive if the other outputs show it on more than t blocks. The paper takes the maximum of tau and the
whole double sum; its code, which is followed here, has one threshold for each pair (i, j).
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Labelling(NamedTuple):
    """The result of a solver. Both sources of a hard label are the same input."""

    sources: torch.Tensor  # (P, m, h, w, 2) long: the two inputs that each block of each output shows
    counts: torch.Tensor  # (P, m, m): n, the blocks of output i taken from input j
    objective: torch.Tensor  # (P,): F


class Energy(NamedTuple):
    """The coefficients of F for P parts of a batch, in the form that the solver needs."""

    unary: torch.Tensor  # (h, w, P, 1, m): cost
    diagonal: torch.Tensor  # (P, 1, m): of A
    off_diagonal: torch.Tensor  # (P, m, m): the rest of A, transposed
    smoothness: float  # b
    diversity: float  # g
    shift: float  # phi(q) = threshold(q - shift, level, 0)
    level: float

    def overlap(self, counts: torch.Tensor) -> torch.Tensor:
        """Return q = A counts for counts (P, X, m).

        The small off-diagonal part is multiplied on its own, so that TF32 rounding does not matter.
        """
        return torch.baddbmm(self.diagonal * counts, counts, self.off_diagonal)

    def phi(self, shifted: torch.Tensor) -> torch.Tensor:
        """Return phi(q) for shifted = q - shift."""
        return F.threshold(shifted, self.level, 0.0)

    def repeat(self, times: int) -> "Energy":
        """Repeat each part `times` times, one copy after the other."""
        return self._replace(
            unary=self.unary.repeat_interleave(times, 2),
            diagonal=self.diagonal.repeat_interleave(times, 0),
            off_diagonal=self.off_diagonal.repeat_interleave(times, 0),
        )

    def coarsen(self, tall: int, wide: int) -> "Energy":
        """Return F for labellings that are constant on groups of tall x wide blocks.

        Each edge and each count then stands for several.
        """
        size = tall * wide
        if size == 1:
            return self
        h, w = self.unary.shape[:2]
        return self._replace(
            unary=self.unary.unflatten(1, (w // wide, wide)).sum(2).unflatten(0, (h // tall, tall)).sum(1),
            smoothness=self.smoothness * size**0.5,
            diversity=self.diversity * size**2,
            shift=self.shift / size,
            level=self.level / size,
        )


def build_energy(
    cost: torch.Tensor, compatibility: torch.Tensor, beta: float, gamma: float, thres: float, thres_type: str
) -> Energy:
    """Build the Energy of a problem. Raises ValueError for an unknown thres_type.

    cost (P, m, h, w): unary cost of showing an input on a block; compatibility (P, m, m): A. thres < 0 with `hard`
    counts every overlap.
    """
    if thres_type not in ("hard", "soft"):
        raise ValueError(f"m_thres_type must be hard or soft, got {thres_type!r}")
    blocks = cost.shape[-1] * cost.shape[-2]
    diagonal = compatibility.diagonal(dim1=1, dim2=2)
    return Energy(
        unary=cost.permute(2, 3, 0, 1).unsqueeze(3).contiguous(),
        diagonal=diagonal.unsqueeze(1),
        off_diagonal=(compatibility - torch.diag_embed(diagonal)).mT,
        smoothness=beta / blocks,
        diversity=gamma / blocks,
        shift=0.0 if thres_type == "hard" else thres * blocks,
        level=thres * blocks if thres_type == "hard" else 0.0,
    )


def objective(
    z: torch.Tensor,
    cost: torch.Tensor,
    compatibility: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    thres: float,
    thres_type: str = "hard",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the unary, smoothness and diversity term of F, each (P,), in the precision of the arguments.

    z (P, m, h, w, m): label of each block of each output. The other arguments are those of build_energy().
    """
    blocks = z.shape[2] * z.shape[3]
    unary = torch.einsum("pihwj,pjhw->p", z, cost)
    edges = (z[:, :, 1:] - z[:, :, :-1]).square().sum((1, 2, 3, 4))
    edges = edges + (z[:, :, :, 1:] - z[:, :, :, :-1]).square().sum((1, 2, 3, 4))
    counts = z.sum((2, 3))
    overlap = (counts.sum(1, keepdim=True) - counts) @ compatibility.mT
    energy = build_energy(cost, compatibility, beta, gamma, thres, thres_type)
    diversity = energy.diversity * (energy.phi(overlap - energy.shift) * counts).sum((1, 2))
    return unary, beta / blocks / 2 * edges, diversity
