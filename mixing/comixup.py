"""Co-Mixup: assemble each mixed image from blocks of several images of the batch, all mixed images chosen jointly.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 3-4. A batch is cut, in order, into parts of m_part images (the inputs),
and each part gives as many mixed images (the outputs). Salient blocks are kept, neighbouring blocks tend to come from
the same input, and outputs avoid inputs that many other outputs show. Targets follow the area that each input covers.

mixing/solvers/comixup_energy.py states the objective, mixing/solvers/comixup_labelling.py minimises it.
"""

import torch
from torch.distributions import Dirichlet

from .base import Mixer
from .kernels import check_mode, use_kernels
from .ops import block_means, check_at_least, check_divides, check_probability, normalize_sum
from .solvers import check_solver
from .solvers.comixup_energy import Labelling
from .solvers.comixup_labelling import solve

GRIDS = (2, 4, 8, 16)  # blocks per side to draw from if m_block_num is -1
WINDOW = 8  # side in pixels of the window that finds the most salient position
STARTS = {7: 2, 2: 8}  # minimum number of inputs -> number of initial labellings; the solver continues the best one
ROUNDS = 2  # rounds of simultaneous moves per sweep of the published solver through all outputs


def window_sums(values: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Sum over `size` neighbours along `dim`, which becomes shorter by size - 1."""
    count = values.shape[dim] - size + 1
    total = values.narrow(dim, 0, count).clone()
    for offset in range(1, size):
        total += values.narrow(dim, offset, count)
    return total


def most_salient_window(saliency: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Return the row and column of the most salient window of each map, (B, 2), in steps of the stride. Sec. 4."""
    size = min(WINDOW, *saliency.shape[1:])
    sums = window_sums(window_sums(saliency, size, 1), size, 2)[:, ::stride, ::stride]
    first = sums.flatten(1).max(1).indices
    return torch.stack([first // sums.shape[2], first % sums.shape[2]], 1)


def compatibility_matrix(positions: torch.Tensor, omega: float) -> torch.Tensor:
    """Return the compatibility matrix A (P, m, m) of Sec. 3.

    It is close to the identity; entries grow with the L1 distance between the most salient positions (P, m, 2) of two
    inputs. If all positions are equal, it is the identity, where the authors' code divides by zero.
    """
    distance = (positions.unsqueeze(2) - positions.unsqueeze(1)).abs().sum(3).float()
    count = distance.shape[1]
    identity = torch.eye(count, device=distance.device)
    total = distance.sum((1, 2), keepdim=True)
    apart = torch.lerp(identity, distance * (count / total.clamp_min(1)), omega)
    return torch.where(total > 0, apart, identity)


def block_costs(saliency: torch.Tensor, prior: torch.Tensor, blocks: int, eta: float) -> torch.Tensor:
    """Return the unary cost of showing each block of each input, (P, m, h, h).

    It is minus the share of the input's saliency in the block and minus eta / h^2 times the logarithm of the prior.
    saliency (P, m, H, W); prior (P, m): a Dirichlet draw shared by all outputs of a part; blocks: h.
    """
    share = normalize_sum(block_means(saliency, blocks, blocks))
    return -share - (eta / blocks**2) * (prior + 1e-8).log().unsqueeze(2).unsqueeze(3)


def assemble_images(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Assemble mixed images (B, C, H, W) from the two inputs, half of each, that `sources` names for each block.

    images (B, C, H, W); sources (B, h, w, 2) long. Differentiable with respect to the images.
    """
    count, h, w, _ = sources.shape
    _, channels, height, width = images.shape
    bh, bw = height // h, width // w  # height and width of a block
    blocks = images.view(-1, channels, h, bh, w, bw).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * bh * bw)
    site = torch.arange(h * w, device=images.device).view(1, h, w)
    first, second = (sources * (h * w) + site.unsqueeze(3)).flatten(0, 2).unbind(1)
    mixed = 0.5 * (blocks.index_select(0, first) + blocks.index_select(0, second))
    mixed = mixed.view(count, h, w, channels, bh, bw).permute(0, 3, 1, 4, 2, 5)
    mixed = mixed.reshape(count, channels, height, width)
    return mixed if images.is_contiguous() else mixed.contiguous(memory_format=torch.channels_last)


def mix_targets(targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return soft targets (P m, K): the targets (P m, K) weighted by the area of each input.

    counts (P, m, m): blocks of output i that show input j. Computed in double precision, because a GPU may round the
    factors of a single-precision product (TF32).
    """
    share = counts.double() / counts[:1, :1].sum()
    return (share @ targets.double().view(*counts.shape[:2], -1)).flatten(0, 1).to(targets.dtype)


class CoMixup(Mixer):
    """Hyper-parameters, with the symbol of the paper where it has one:

    * mixup_alpha: of the Dirichlet prior. m_eta (eta): weight of the prior.
    * m_part (m): images mixed with each other. m_block_num: blocks per side; -1 draws 2, 4, 8 or 16 for each batch.
    * m_beta (beta): weight of the smoothness. m_gamma (gamma): weight of the diversity.
    * m_thres: fraction of an image's blocks on which the other outputs may show an input at no cost. m_thres_type: what
      counts beyond it, `hard` (all of it) or `soft` (the excess).
    * m_omega (omega): weight of the distances in the compatibility matrix. m_stride: step in pixels of the 8 x 8 window
      that finds the most salient positions.
    * m_niter: effort, as the corresponding number of sweeps of the published solver. set_resolve: separate outputs that
      show the same inputs.
    * clean_lam: weight of the clean loss that is also trained on. mix_prob: probability that a batch is mixed.

    solver: `parallel` (ours) or `gco` (the authors' graph cuts, one output at a time). kernels: see
    mixing.kernels.use_kernels().

    After a call, `objective` is the value that the solver reached, one for each part of the batch, on the device.
    """

    default_source = "gradient"
    label_obstacle = "mixes more than two images"

    def __init__(
        self,
        mixup_alpha: float = 2.0,
        m_part: int = 20,
        m_block_num: int = 4,
        m_beta: float = 0.32,
        m_gamma: float = 1.0,
        m_thres: float = 0.83,
        m_thres_type: str = "hard",
        m_eta: float = 0.05,
        m_omega: float = 0.001,
        m_niter: int = 4,
        m_stride: int = 1,
        set_resolve: bool = True,
        clean_lam: float = 1.0,
        mix_prob: float = 1.0,
        solver: str = "parallel",
        kernels: str = "auto",
    ):
        if mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, got {mixup_alpha}")
        check_at_least("m_part", m_part, 2)
        check_at_least("m_niter", m_niter, 1)
        check_at_least("m_stride", m_stride, 1)
        if m_block_num < 1 and m_block_num != -1:
            raise ValueError(f"m_block_num must be positive, or -1 to draw it, got {m_block_num}")
        weights = {"m_beta": m_beta, "m_gamma": m_gamma, "m_thres": m_thres, "m_eta": m_eta, "clean_lam": clean_lam}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if m_thres_type not in ("hard", "soft"):
            raise ValueError(f"m_thres_type must be hard or soft, got {m_thres_type!r}")
        self.mixup_alpha, self.m_part, self.m_block_num = mixup_alpha, m_part, m_block_num
        self.m_eta, self.m_omega, self.m_stride = m_eta, check_probability("m_omega", m_omega), m_stride
        self.problem = {"beta": m_beta, "gamma": m_gamma, "thres": m_thres, "thres_type": m_thres_type}
        self.effort = {"sweeps": m_niter, "resolve": set_resolve}
        self.clean_lam, self.mix_prob = clean_lam, check_probability("mix_prob", mix_prob)
        self.solver, self.kernels = check_solver(solver), check_mode(kernels)
        self.objective: torch.Tensor | None = None

    @property
    def gradient_options(self):
        return {"mode": "train" if self.clean_lam else "eval", "clean_weight": self.clean_lam}

    def check_size(self, height, width):
        for blocks in GRIDS if self.m_block_num == -1 else (self.m_block_num,):
            check_divides("m_block_num", blocks, height, width)

    def mix_batch(self, images, targets, source):
        self.weight_fn = self.partner_fn = None
        self.check_size(*images.shape[-2:])
        blocks = GRIDS[int(torch.randint(len(GRIDS), ()))] if self.m_block_num == -1 else self.m_block_num
        saliency = self.compute_saliency(source, images, targets)
        num_full = len(images) // self.m_part * self.m_part  # images in full parts; the last part may be shorter
        sources, soft, values = [], [], []
        for begin, end, size in ((0, num_full, self.m_part), (num_full, len(images), len(images) - num_full)):
            if begin == end:
                continue
            labelling = self.solve_parts(saliency[begin:end].unflatten(0, (-1, size)), blocks)
            sources.append((labelling.sources + part_starts(begin, end, size, images.device)).flatten(0, 1))
            soft.append(mix_targets(targets[begin:end], labelling.counts))
            values.append(labelling.objective)
        self.objective = torch.cat(values)
        return assemble_images(images, torch.cat(sources)), torch.cat(soft)

    @torch.no_grad()
    def solve_parts(self, saliency: torch.Tensor, blocks: int) -> Labelling:
        """Choose which inputs each block of each output shows. saliency (P, m, H, W); blocks: per side."""
        parts, m = saliency.shape[:2]
        device = saliency.device
        parameters = torch.full((parts, m), float(self.mixup_alpha), device="cpu" if device.type == "mps" else device)
        prior = Dirichlet(parameters, validate_args=False).sample().to(device)  # MPS cannot draw gamma variates
        cost = block_costs(saliency, prior, blocks, self.m_eta)
        if m == 1:  # a single image stays as it is
            sources = torch.zeros(parts, 1, blocks, blocks, 2, dtype=torch.long, device=device)
            return Labelling(sources, torch.full_like(cost[:, :, :1, 0], blocks**2), cost.sum((1, 2, 3)))
        positions = most_salient_window(saliency.flatten(0, 1), self.m_stride).view(parts, m, 2)
        return self.find_labelling(cost, compatibility_matrix(positions, self.m_omega))

    def find_labelling(self, cost: torch.Tensor, compatibility: torch.Tensor) -> Labelling:
        """Return a labelling of low objective for costs (P, m, h, h) and compatibility (P, m, m) of m >= 2 inputs."""
        if self.solver == "gco":
            from .solvers.graphcut import solve_labelling

            return solve_labelling(cost, compatibility, **self.problem, **self.effort)
        parts, m = cost.shape[:2]
        starts = next(count for minimum, count in STARTS.items() if m >= minimum)
        order = torch.rand(parts, starts, m, device=cost.device).argsort(2)
        options = {**self.problem, "rounds": ROUNDS * self.effort["sweeps"], "resolve": self.effort["resolve"]}
        if use_kernels(self.kernels, cost.device):
            from .kernels import comixup as kernels

            return kernels.solve(cost, compatibility, order, **options)
        return solve(cost, compatibility, order, **options)


def part_starts(begin: int, end: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the index in the batch at which each part of images begin:end starts, (P, 1, 1, 1, 1)."""
    return torch.arange(begin, end, size, device=device).view(-1, 1, 1, 1, 1)
