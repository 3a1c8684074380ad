"""The same two problems solved by graph cuts, as the authors of PuzzleMix and Co-Mixup do it, for comparison.

It solves one image after the other on the CPU, by alpha-beta swaps of the gco library (Boykov, Veksler and Zabih, PAMI
2001; package gco-wrapper). The package is imported on request only, because importing it changes numpy. This file needs
numpy, which comes with it.
"""

import numpy as np
import torch

from . import import_gco
from .comixup_energy import Labelling, objective

MASK_SCALE = 1000  # times the number of blocks: scale of the costs before they are rounded to integers
LABEL_SCALE = 100_000  # the same for Co-Mixup
SOFT_BONUS = 5e-4  # per block of a soft label


def to_integers(values: torch.Tensor | np.ndarray, scale: float) -> np.ndarray:
    """Scale and round values to int32."""
    return np.ascontiguousarray(np.rint(np.asarray(values, dtype=np.float64) * scale), dtype=np.int32)


def solve_mask(unary: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return labels (n, n, B) long for a problem of mixing/solvers/puzzlemix_mask.py.

    Each image starts from all labels 0.
    """
    gco = import_gco()
    count, rows, columns, batch = unary.shape
    scale = MASK_SCALE * rows * columns
    labels = np.arange(count)
    table = np.ascontiguousarray(np.square(labels[:, None] - labels), dtype=np.int32)
    costs = to_integers(unary.permute(3, 1, 2, 0).cpu(), scale)
    edges = [to_integers(edge.permute(2, 0, 1).cpu(), scale / (count - 1) ** 2) for edge in (down, right)]
    found = [
        gco.cut_grid_graph(costs[image], table, edges[0][image], edges[1][image], algorithm="swap")
        for image in range(batch)
    ]
    return torch.from_numpy(np.stack(found, -1).reshape(rows, columns, batch)).long().to(unary.device)


def solve_labelling(
    cost: torch.Tensor,
    compatibility: torch.Tensor,
    *,
    beta: float,
    gamma: float,
    thres: float,
    thres_type: str = "hard",
    sweeps: int = 4,
    resolve: bool = True,
) -> Labelling:
    """Return a labelling for problems of mixing/solvers/comixup_energy.py, optimising one output after the other.

    Arguments as there. It starts from random labels. From the second sweep on, soft labels of the inputs in use are
    tried; in the last sweep, outputs that show the same inputs are separated.
    """
    gco = import_gco()
    parts, m, h, w = cost.shape
    costs, similarity = cost.double().cpu().numpy(), compatibility.double().cpu().numpy()
    sources = torch.randint(m, (parts, m, h, w, 1)).expand(-1, -1, -1, -1, 2).numpy().copy()
    edges = [to_integers(np.full(shape, beta / (h * w)), LABEL_SCALE / 4) for shape in ((h - 1, w), (h, w - 1))]
    for part in range(parts):
        counts = np.stack([count_blocks(one, m) for one in sources[part]])
        for sweep in range(sweeps):
            extra = duplicate_costs(counts, gamma / (h * w)) if resolve and sweep == sweeps - 1 else np.zeros((m, m))
            for output in range(m):
                overlap = similarity[part] @ (counts.sum(0) - counts[output])
                level = thres * h * w
                active = np.where(overlap > level, overlap if thres_type == "hard" else overlap - level, 0.0)
                site = np.moveaxis(costs[part], 0, -1) + 2 * gamma / (h * w) * active + extra[output]
                pair = np.array([(j, j) for j in range(m)] + (soft_labels(counts[output]) if sweep else []))
                trial = site[..., pair].mean(-1) - SOFT_BONUS * (pair[:, 0] != pair[:, 1])
                unary, pairwise = to_integers(trial, LABEL_SCALE), pairwise_costs(pair, m)
                cut = gco.cut_grid_graph(unary, pairwise, *edges, algorithm="swap")
                sources[part, output] = pair[cut.reshape(h, w)]
                counts[output] = count_blocks(sources[part, output], m)
    sources = torch.from_numpy(sources).to(cost.device)
    z = torch.nn.functional.one_hot(sources, m).float().mean(-2)
    terms = objective(z, cost, compatibility, beta=beta, gamma=gamma, thres=thres, thres_type=thres_type)
    return Labelling(sources, z.sum((2, 3)), sum(terms))


def count_blocks(sources: np.ndarray, m: int) -> np.ndarray:
    """Count the blocks of one output, sources (h, w, 2), that are taken from each of m inputs."""
    return np.bincount(sources.ravel(), minlength=m) / 2


def soft_labels(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of the (up to) three inputs that an output shows most."""
    used = [int(j) for j in np.argsort(-counts, kind="stable")[:3] if counts[j] > 0]
    return [(a, b) for place, a in enumerate(used) for b in used[place + 1 :]]


def pairwise_costs(labels: np.ndarray, m: int) -> np.ndarray:
    """Return 4 |z - z'|^2 / 2 for all pairs of labels (L, 2), as integers."""
    z = np.zeros((len(labels), m))
    np.add.at(z, (np.arange(len(labels))[:, None], labels), 0.5)
    return to_integers(2 * np.square(z[:, None] - z).sum(-1), 1)


def duplicate_costs(counts: np.ndarray, cost: float) -> np.ndarray:
    """Return extra costs (m, m) for outputs that show the same set of two or more inputs.

    Of two such outputs, the earlier one pays for the first input of the set, the later one for the second.
    """
    extra, used = np.zeros_like(counts, dtype=np.float64), counts > 0
    for one in range(len(counts)):
        for other in range(one + 1, len(counts)):
            if used[one].sum() > 1 and (used[one] == used[other]).all():
                first, second = np.flatnonzero(used[one])[:2]
                extra[one, first] += cost
                extra[other, second] += cost
    return extra
