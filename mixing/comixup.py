"""Co-Mixup: every mixed image is pieced together from several images of the batch, all of them chosen together.

Kim et al., ICLR 2021, arXiv 2102.03065, Sec. 3-4. A batch is cut, in order, into parts of m_part images, and each part
gives as many mixed images. Their blocks show much saliency and hang together, and their inputs differ from one image to
the next: mixing/solvers/comixup_energy.py has that problem, comixup_labelling.py its solver. Targets go by the area
that an input covers.
"""

import torch
from torch.distributions import Dirichlet

from mixing.base import Mixer
from mixing.ops import block_means, check_at_least, check_divides, check_probability, normalize_sum
from mixing.solvers.comixup_energy import Labelling
from mixing.solvers.comixup_labelling import solve

GRIDS = (2, 4, 8, 16)  # one of which m_block_num = -1 draws
WINDOW = 8  # side in pixels of the most salient place of an image
STARTS = {7: 2, 2: 8}  # inputs at least -> labellings to start from, of which the best one is pursued
ROUNDS = 2  # of simultaneous moves, for one sweep of the published solver through all outputs


def window_sums(values: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Sums over `size` neighbours along `dim`, which becomes shorter by size - 1."""
    count = values.shape[dim] - size + 1
    total = values.narrow(dim, 0, count).clone()
    for offset in range(1, size):
        total += values.narrow(dim, offset, count)
    return total


def most_salient_window(saliency: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """(B, 2): row and column, in steps of the stride, of the window with most of saliency (B, H, W); Sec. 4."""
    size = min(WINDOW, *saliency.shape[1:])
    sums = window_sums(window_sums(saliency, size, 1), size, 2)[:, ::stride, ::stride]
    first = sums.flatten(1).max(1).indices
    return torch.stack([first // sums.shape[2], first % sums.shape[2]], 1)


def compatibility(places: torch.Tensor, omega: float) -> torch.Tensor:
    """A (P, m, m) of Sec. 3: near the identity, larger the farther apart the inputs' places (P, m, 2) are (L1).

    Where all places are the same it is the identity.
    """
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).abs().sum(3).float()
    count = distance.shape[1]
    identity = torch.eye(count, device=distance.device)
    total = distance.sum((1, 2), keepdim=True)
    apart = torch.lerp(identity, distance * (count / total.clamp_min(1)), omega)
    return torch.where(total > 0, apart, identity)


def block_costs(saliency: torch.Tensor, prior: torch.Tensor, blocks: int, eta: float) -> torch.Tensor:
    """(P, m, h, h): price of every block of every input, minus its share of the input's saliency and of the prior.

    saliency (P, m, H, W); prior (P, m): a Dirichlet draw, shared by the outputs of a part; blocks: h.
    """
    share = normalize_sum(block_means(saliency, blocks, blocks))
    return -share - (eta / blocks**2) * (prior + 1e-8).log().unsqueeze(2).unsqueeze(3)


def assemble_images(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Mixed images (B, C, H, W): the blocks that sources (B, h, w, 2) names, half of each of the two.

    Differentiable with respect to images (B, C, H, W).
    """
    count, h, w, _ = sources.shape
    _, channels, height, width = images.shape
    tall, wide = height // h, width // w
    blocks = images.view(-1, channels, h, tall, w, wide).permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * tall * wide)
    site = torch.arange(h * w, device=images.device).view(1, h, w)
    first, second = (sources * (h * w) + site.unsqueeze(3)).flatten(0, 2).unbind(1)
    mixed = 0.5 * (blocks.index_select(0, first) + blocks.index_select(0, second))
    mixed = mixed.view(count, h, w, channels, tall, wide).permute(0, 3, 1, 4, 2, 5)
    mixed = mixed.reshape(count, channels, height, width)
    return mixed if images.is_contiguous() else mixed.contiguous(memory_format=torch.channels_last)


def mix_targets(targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Soft targets (P m, K) from targets of the same shape and counts (P, m, m), by area.

    In double precision, because a GPU may round the factors of a single-precision product.
    """
    share = counts.double() / counts[:1, :1].sum()
    return (share @ targets.double().view(*counts.shape[:2], -1)).flatten(0, 1).to(targets.dtype)


class CoMixup(Mixer):
    """mixup_alpha: of the Dirichlet prior. m_part: images of a part. m_block_num: blocks along a side; -1 draws 2, 4, 8
    or 16 for every batch. m_beta: smoothness; m_gamma: diversity; m_thres: share of an output's blocks up to which the
    other outputs may show an input for nothing, and m_thres_type what more of it costs: `hard` all, `soft` the excess.
    m_eta: weight of the prior; m_omega: of the distance between salient places, found with a window of 8 x 8 pixels
    that moves by m_stride. m_niter: effort of the solver. set_resolve: pull outputs apart that show the same inputs.
    clean_lam: weight of the clean loss whose gradient is also trained on; 0: none. mix_prob: chance of a batch.

    objective: what the solver minimised, of the last batch, one value a part, on the device.
    """

    default_source = "gradient"

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
        if solver not in SOLVERS:
            raise ValueError(f"solver must be {' or '.join(SOLVERS)}, got {solver!r}")
        self.mixup_alpha, self.m_part, self.m_block_num = mixup_alpha, m_part, m_block_num
        self.m_eta, self.m_omega, self.m_stride = m_eta, check_probability("m_omega", m_omega), m_stride
        self.problem = {"beta": m_beta, "gamma": m_gamma, "thres": m_thres, "thres_type": m_thres_type}
        self.effort = {"sweeps": m_niter, "resolve": set_resolve}
        self.clean_lam, self.mix_prob = clean_lam, check_probability("mix_prob", mix_prob)
        self.solve = SOLVERS[solver]()
        self.objective: torch.Tensor | None = None

    @property
    def gradient_options(self):
        return {"mode": "train" if self.clean_lam else "eval", "clean_weight": self.clean_lam}

    def check_size(self, height, width):
        for blocks in GRIDS if self.m_block_num == -1 else (self.m_block_num,):
            check_divides("m_block_num", blocks, height, width)

    def mix_batch(self, images, targets, source):
        self.weight_fn = None
        self.check_size(*images.shape[-2:])
        blocks = GRIDS[int(torch.randint(len(GRIDS), ()))] if self.m_block_num == -1 else self.m_block_num
        saliency = self.compute_saliency(source, images, targets)
        whole = len(images) // self.m_part * self.m_part  # the images of full parts; the last part may be shorter
        sources, soft, values = [], [], []
        for begin, end, size in ((0, whole, self.m_part), (whole, len(images), len(images) - whole)):
            if begin == end:
                continue
            labelling = self.label(saliency[begin:end].unflatten(0, (-1, size)), blocks)
            sources.append((labelling.sources + part_starts(begin, end, size, images.device)).flatten(0, 1))
            soft.append(mix_targets(targets[begin:end], labelling.counts))
            values.append(labelling.objective)
        self.objective = torch.cat(values)
        return assemble_images(images, torch.cat(sources)), torch.cat(soft)

    @torch.no_grad()
    def label(self, saliency: torch.Tensor, blocks: int) -> Labelling:
        """Which inputs every block of every output shows. saliency (P, m, H, W)."""
        parts, m = saliency.shape[:2]
        device = saliency.device
        parameters = torch.full((parts, m), float(self.mixup_alpha), device="cpu" if device.type == "mps" else device)
        prior = Dirichlet(parameters, validate_args=False).sample().to(device)  # MPS has no gamma draws
        cost = block_costs(saliency, prior, blocks, self.m_eta)
        if m == 1:  # an image alone stays as it is
            sources = torch.zeros(parts, 1, blocks, blocks, 2, dtype=torch.long, device=device)
            return Labelling(sources, torch.full_like(cost[:, :, :1, 0], blocks**2), cost.sum((1, 2, 3)))
        places = most_salient_window(saliency.flatten(0, 1), self.m_stride).view(parts, m, 2)
        return self.solve(cost, compatibility(places, self.m_omega), **self.problem, **self.effort)


def part_starts(begin: int, end: int, size: int, device: torch.device) -> torch.Tensor:
    """(P, 1, 1, 1, 1): where in the batch each part of the images begin:end starts."""
    return torch.arange(begin, end, size, device=device).view(-1, 1, 1, 1, 1)


def solve_in_parallel(cost, compatibility, *, sweeps: int, resolve: bool, **problem) -> Labelling:
    """mixing.solvers.comixup_labelling.solve from random starts."""
    parts, m = cost.shape[:2]
    starts = next(count for least, count in STARTS.items() if m >= least)
    order = torch.rand(parts, starts, m, device=cost.device).argsort(2)
    return solve(cost, compatibility, order, rounds=ROUNDS * sweeps, resolve=resolve, **problem)


def load_graph_cuts():
    from mixing.solvers.graphcut import import_gco, solve_labelling

    import_gco()  # now rather than at the first batch
    return solve_labelling


SOLVERS = {"parallel": lambda: solve_in_parallel, "gco": load_graph_cuts}
