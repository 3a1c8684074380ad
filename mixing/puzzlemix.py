"""PuzzleMix: keep of each of two images the blocks that matter, and move salient blocks to where they show.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3. As in the authors' code, the mask is found first, without transport,
and the transport after it, once; the pairwise term of the mask is (m - m')^2.
"""

import math

import torch
from torch.nn import functional as F

from mixing.base import Mixer
from mixing.ops import (
    block_means,
    check_divides,
    check_probability,
    draw_lam,
    draw_partner,
    normalize_sum,
    upsample_blocks,
)
from mixing.solvers import puzzlemix_mask
from mixing.solvers.puzzlemix_transport import move_blocks, transport

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # unary (L, n, n, B), down (n-1, n, B), right (n, n-1, B)


def border_differences(cells: torch.Tensor, partner: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute differences across the borders of blocks, for all four choices of the image on either side.

    cells (B, C, g, g): images in 0..1, averaged over cells; g a multiple of n. Returns the borders between upper and
    lower blocks (4, B, n-1, n) and between left and right ones (4, B, n, n-1). The four: both sides from the image, the
    first from it and the second from the partner, the reverse, both from the partner.
    """
    found = []
    for grid in (cells, cells.transpose(2, 3)):
        strips = grid.unflatten(2, (n, -1))
        first, second = strips[:, :, :-1, -1], strips[:, :, 1:, 0]  # (B, C, n-1, g): the cells on either side
        pairs = ((first, second), (first, second[partner]), (first[partner], second))
        own, over, back = ((one - other).abs_().mean(1).unflatten(-1, (n, -1)).mean(-1) for one, other in pairs)
        found.append(torch.stack([own, over, back, own[partner]]))
    return found[0], found[1].transpose(2, 3)


def build_mask_problem(
    salient: torch.Tensor,
    cells: torch.Tensor | None,
    partner: torch.Tensor,
    lam: torch.Tensor,
    *,
    n_labels: int,
    beta: float,
    gamma: float,
    eta: float,
) -> Problem:
    """Sec. 3.2 as a problem of mixing.solvers.puzzlemix_mask, label 0 for the image and the last label for its partner.

    salient (B, n, n): block saliency, each map with sum 1. cells: see border_differences; None without the local term.
    lam (): share of the image that the prior prefers.
    """
    n, steps = salient.shape[-1], n_labels - 1
    smooth = beta / (16 * n)
    keep, give = salient[partner], salient.clone()  # price of keeping the image: losing the partner's saliency
    down = salient.new_full((len(salient), n - 1, n), smooth)
    right = salient.new_full((len(salient), n, n - 1), smooth)
    if cells is not None and gamma:
        local = smooth * gamma / 2
        vertical, horizontal = border_differences(cells, partner, n)
        for (own, over, back, other), weight, keeps, gives in (
            (vertical, down, (keep[:, :-1], keep[:, 1:]), (give[:, :-1], give[:, 1:])),
            (horizontal, right, (keep[:, :, :-1], keep[:, :, 1:]), (give[:, :, :-1], give[:, :, 1:])),
        ):  # of the first block at each border and of the second, in place
            keeps[0].add_(local * (over + own))
            gives[0].add_(local * (back + other))
            keeps[1].add_(local * (back + own))
            gives[1].add_(local * (over + other))
            weight += local * (over + back - own - other)
    label = torch.arange(n_labels, device=salient.device, dtype=torch.float32).view(-1, 1, 1, 1) / steps
    keep, give = keep.permute(1, 2, 0), give.permute(1, 2, 0)
    unary = torch.lerp(keep.unsqueeze(0), give.unsqueeze(0), label)
    for costs, price in zip(unary, prior(lam, n_labels, eta / n**2), strict=True):
        costs += price
    return unary, down.permute(1, 2, 0).contiguous(), right.permute(1, 2, 0).contiguous()


def prior(lam: torch.Tensor, n_labels: int, weight: float) -> list[float]:
    """The cost of each label: weight times minus the logarithm of a binomial with mean share lam, () on the host."""
    steps, lam = n_labels - 1, float(lam)
    chances = [math.comb(steps, k) * lam ** (steps - k) * (1 - lam) ** k for k in range(n_labels)]
    return [-weight * math.log(chance + 1e-8) for chance in chances]


def mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    partner: torch.Tensor,
    mask: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor, int, int] | None = None,
    partners: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 2: mask T(image) + (1 - mask) T'(partner), targets by the mean of the mask (B, n, n), 1 where the image
    shows.

    blocks: what each place shows of the image and of the partner (see transport), and rows and columns of that grid;
    None: nothing moves. partners: images that the partners are taken from, if others than `images`.
    """
    partners = images if partners is None else partners
    if blocks:
        own, other, *grid = blocks
        first = move_blocks(images, own, torch.arange(len(images), device=images.device), *grid)
        second = move_blocks(partners, other, partner, *grid)
    else:
        first, second = images, partners[partner]
    mixed = torch.lerp(second, first, upsample_blocks(mask, *images.shape[-2:]).to(images.dtype))
    if images.is_contiguous():  # the blocks come back with the channels last
        mixed = mixed.contiguous()
    return mixed, torch.lerp(targets[partner], targets, mask.mean((1, 2)).unsqueeze(1).to(targets.dtype))


def largest_divisor(side: int, most: int) -> int:
    """The largest divisor of `side` that is not above `most`."""
    return next(n for n in range(min(side, most), 0, -1) if side % n == 0)


class PuzzleMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha), one a batch; so is the number of blocks along a side, out of block_num.

    n_labels: 2 to 4 mask values from 0 to 1. beta, gamma, eta: weights of label smoothness, of the differences across
    borders relative to it, and of the prior. neigh_size: side in pixels of the cells those differences are taken
    between. transport, t_eps, t_size: whether blocks move, at which price, and the side in pixels of the blocks that
    move; -1: those of the mask. clean_lam: weight of the clean loss. adv_p, adv_eps: chance that an image of a pair
    gets adversarial noise, and its size in units of 1/255. mean, std: normalisation of the images. mix_prob: chance
    that a batch is mixed.

    After a call `energy`, `bound` (B,) and `mask` (B, n, n) hold what the solver found.
    """

    default_source = "gradient"

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        block_num: tuple[int, ...] = (2, 4, 8, 16),
        n_labels: int = 3,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        neigh_size: int = 4,
        transport: bool = True,
        t_eps: float = 0.8,
        t_size: int = -1,
        clean_lam: float = 0.0,
        adv_p: float = 0.0,
        adv_eps: float = 10.0,
        mix_prob: float = 1.0,
        solver: str = "parallel",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie between 0 and 1, got {gamma}: above, the mask problem is not submodular")
        if not 2 <= n_labels <= 4:
            raise ValueError(f"n_labels must be 2, 3 or 4, got {n_labels}")
        if min(mixup_alpha, beta, eta, t_eps, clean_lam, adv_eps) < 0:
            raise ValueError("mixup_alpha, beta, eta, t_eps, clean_lam and adv_eps must not be negative")
        if not block_num or min(block_num) < 1 or neigh_size < 1 or not (t_size > 0 or t_size == -1):
            raise ValueError(f"block_num {block_num}, neigh_size {neigh_size} and t_size {t_size} must be positive")
        if solver not in SOLVERS:
            raise ValueError(f"solver must be {' or '.join(SOLVERS)}, got {solver!r}")
        self.mixup_alpha, self.block_num, self.n_labels = mixup_alpha, tuple(block_num), n_labels
        self.weights = {"n_labels": n_labels, "beta": beta, "gamma": gamma, "eta": eta}
        self.neigh_size, self.transport, self.t_eps, self.t_size = neigh_size, transport, t_eps, t_size
        self.clean_lam, self.adv_eps, self.adv_p = clean_lam, adv_eps / 255, check_probability("adv_p", adv_p)
        self.mix_prob, self.solve = check_probability("mix_prob", mix_prob), SOLVERS[solver]()
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    @property
    def gradient_options(self):
        return {"mode": "train" if self.clean_lam else "eval", "clean_weight": self.clean_lam}

    def check_size(self, height, width):
        for count in self.block_num:
            check_divides("block_num", count, height, width)
        if self.transport and self.t_size > 0 and (height % self.t_size or width % self.t_size):
            raise ValueError(f"t_size {self.t_size} does not divide {height}x{width} pixels")

    def mix_batch(self, images, targets, source):
        self.check_size(*images.shape[-2:])
        if self.mean.device != images.device:  # once: a copy in every step would hold up the device
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        n = self.block_num[int(torch.randint(len(self.block_num), ()))]
        lam, partner = draw_lam(self.mixup_alpha, images), draw_partner(images)
        noisy = (torch.rand(2) < self.adv_p).tolist()
        noise = None
        if any(noisy):
            saliency, noise = self.find_noise(source, images, targets)
        else:
            saliency = self.compute_saliency(source, images, targets)
        with torch.no_grad():
            self.mask, blocks = self.plan(images.detach(), saliency, partner, lam, n)
        self.set_weight(images, lambda mask=self.mask: mask)
        own, others = (self.add_noise(images, noise) if wanted else images for wanted in noisy)
        return mix(own, targets, partner, self.mask, blocks, others)

    def plan(self, images: torch.Tensor, saliency: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor, n: int):
        """Mask (B, n, n) and what moves (see mix) for images (B, C, H, W) and their saliency (B, H, W)."""
        height, width = images.shape[-2:]
        tall, wide = height // n, width // n
        cells = None
        if self.weights["gamma"]:
            cell = largest_divisor(tall, self.neigh_size), largest_divisor(wide, self.neigh_size)
            cells = F.avg_pool2d(images.float(), cell) * self.std
        salient = normalize_sum(block_means(saliency, n, n))
        problem = build_mask_problem(salient, cells, partner, lam, **self.weights)
        labels, self.bound = self.solve(*problem)
        self.energy = puzzlemix_mask.energy(labels, *problem)
        mask = 1 - labels.permute(2, 0, 1) / (self.n_labels - 1)
        if not self.transport:
            return mask, None
        rows, columns = n, n
        if self.t_size > 0:
            rows, columns = height // largest_divisor(tall, self.t_size), width // largest_divisor(wide, self.t_size)
            if rows > n or columns > n:
                salient = normalize_sum(block_means(saliency, rows, columns))
        shown = upsample_blocks(mask, rows, columns).squeeze(1)
        blocks = transport(torch.cat([salient, salient[partner]]), torch.cat([shown > 0, shown < 1]), self.t_eps)
        return mask, (*blocks.chunk(2), rows, columns)

    def find_noise(self, source, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Saliency (B, H, W) at noised images, and adversarial noise (B, C, H, W) of pixels in 0..1."""
        if not source.has_gradient:
            raise ValueError("adversarial noise (adv_p) needs the signed pixel gradient: use the source `gradient`")
        reach = self.adv_eps
        noise = torch.empty_like(images).uniform_(-reach, reach)
        gradient = source.gradient(self.add_noise(images, noise), targets)
        saliency = self.replace_invalid_maps(source.reduce(gradient))
        noise = (noise + (reach + 2 / 255) * gradient.sign()).clamp_(-reach, reach)  # the sign of NaN is 0
        return saliency, noise * torch.rand(())

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """images with noise added to their pixels in 0..1, which stay there."""
        pixels = torch.addcmul(self.mean, images, self.std)
        return ((pixels + noise).clamp(0, 1) - self.mean) / self.std


def load_graph_cuts():
    from mixing.solvers.graphcut import import_gco, solve_mask

    import_gco()  # now rather than at the first batch
    return lambda *problem: (solve_mask(*problem), None)


SOLVERS = {"parallel": lambda: puzzlemix_mask.solve, "gco": load_graph_cuts}
