"""PuzzleMix: keep the salient blocks of two images, and move salient blocks to where they are visible.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3. As in the authors' code, the mask is optimised first, without
transport, and the transport once after it. The pairwise term of the mask is (m - m')^2.

mixing/solvers/puzzlemix_mask.py finds the mask, mixing/solvers/puzzlemix_transport.py the transport, and on CUDA the
Triton kernels of mixing/kernels/ do.
"""

import math

import torch
from torch.nn import functional as F

from .base import Mixer
from .kernels import check_mode, use_kernels
from .ops import (
    block_means,
    check_divides,
    check_probability,
    draw_lam,
    draw_partner,
    normalize_sum,
    upsample_blocks,
)
from .solvers import check_solver, puzzlemix_mask, puzzlemix_transport
from .solvers.puzzlemix_transport import move_blocks

MaskProblem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # unary (L, n, n, B), down (n-1, n, B), right (n, n-1, B)


def border_differences(cells: torch.Tensor, partner: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean absolute colour differences across block borders: phi_11, phi_12, phi_21, phi_22.

    phi_ab takes the upper (or left) block from image a of the pair and the lower (or right) block from image b, where 1
    is the image and 2 its partner. cells (B, C, g, g): images in 0..1, averaged over cells; g is a multiple of n. The
    borders between upper and lower blocks are (4, B, n-1, n), those between left and right blocks (4, B, n, n-1).
    """
    differences = []
    for grid in (cells, cells.transpose(2, 3)):
        strips = grid.unflatten(2, (n, -1))
        first, second = strips[:, :, :-1, -1], strips[:, :, 1:, 0]  # (B, C, n-1, g): the cells at each border
        pairs = ((first, second), (first, second[partner]), (first[partner], second))
        phi_11, phi_12, phi_21 = ((a - b).abs_().mean(1).unflatten(-1, (n, -1)).mean(-1) for a, b in pairs)
        differences.append(torch.stack([phi_11, phi_12, phi_21, phi_11[partner]]))
    return differences[0], differences[1].transpose(2, 3)


def build_mask_problem(
    block_saliency: torch.Tensor,
    cells: torch.Tensor | None,
    partner: torch.Tensor,
    lam: torch.Tensor,
    *,
    n_labels: int,
    beta: float,
    gamma: float,
    eta: float,
) -> MaskProblem:
    """Build the mask problem of Sec. 3.2: the arguments of puzzlemix_mask.solve().

    Label 0 keeps the image, the last label its partner. block_saliency (B, n, n): maps that each sum to 1. cells: see
    border_differences(), or None to leave out the local term. lam (): the mean of the mask that the prior prefers.
    """
    n = block_saliency.shape[-1]
    smooth = beta / (16 * n)
    # keeping the image loses the saliency of the partner, and the reverse
    keep_cost, drop_cost = block_saliency[partner], block_saliency.clone()
    down = block_saliency.new_full((len(block_saliency), n - 1, n), smooth)
    right = block_saliency.new_full((len(block_saliency), n, n - 1), smooth)
    if cells is not None and gamma:
        local = smooth * gamma / 2
        vertical, horizontal = border_differences(cells, partner, n)
        for (phi_11, phi_12, phi_21, phi_22), weight, keep, drop in (
            (vertical, down, (keep_cost[:, :-1], keep_cost[:, 1:]), (drop_cost[:, :-1], drop_cost[:, 1:])),
            (horizontal, right, (keep_cost[..., :-1], keep_cost[..., 1:]), (drop_cost[..., :-1], drop_cost[..., 1:])),
        ):  # keep[0] is a view of the blocks above (or left of) each border, keep[1] of those below (or right of) it
            keep[0].add_(local * (phi_12 + phi_11))
            drop[0].add_(local * (phi_21 + phi_22))
            keep[1].add_(local * (phi_21 + phi_11))
            drop[1].add_(local * (phi_12 + phi_22))
            weight += local * (phi_12 + phi_21 - phi_11 - phi_22)
    label = torch.arange(n_labels, device=block_saliency.device, dtype=torch.float32).view(-1, 1, 1, 1) / (n_labels - 1)
    keep_cost, drop_cost = keep_cost.permute(1, 2, 0), drop_cost.permute(1, 2, 0)
    unary = torch.lerp(keep_cost.unsqueeze(0), drop_cost.unsqueeze(0), label)
    for costs, prior_cost in zip(unary, prior_costs(lam, n_labels, eta / n**2), strict=True):
        costs += prior_cost
    return unary, down.permute(1, 2, 0).contiguous(), right.permute(1, 2, 0).contiguous()


def prior_costs(lam: torch.Tensor, n_labels: int, weight: float) -> list[float]:
    """Return the cost of each label: -weight * log of a binomial whose mean share is lam. lam () is on the CPU."""
    K, lam = n_labels - 1, float(lam)
    probabilities = [math.comb(K, k) * lam ** (K - k) * (1 - lam) ** k for k in range(n_labels)]
    return [-weight * math.log(probability + 1e-8) for probability in probabilities]


def move_pairs(
    images: torch.Tensor,
    partners: torch.Tensor,
    partner: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor, int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return T(image) and T'(partner) of Eq. 2, each (B, C, H, W): the images, and partners[partner], with their blocks
    moved. Arguments as in mix(); images may also be maps of them.
    """
    if not blocks:
        return images, partners[partner]
    image_blocks, partner_blocks, *grid = blocks
    first = move_blocks(images, image_blocks, torch.arange(len(images), device=images.device), *grid)
    return first, move_blocks(partners, partner_blocks, partner, *grid)


def mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    partner: torch.Tensor,
    mask: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor, int, int] | None = None,
    partners: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix by Eq. 2, mask T(image) + (1 - mask) T'(partner), and weight the targets by the mean of the mask.

    mask (B, n, n): 1 where the image shows. blocks: the blocks of the image and of the partner to show at each place
    (see solve_transport()), then the rows and columns of their grid; None: nothing moves. partners: images to take the
    partners from, if not `images` (adversarial noise).
    """
    first, second = move_pairs(images, images if partners is None else partners, partner, blocks)
    mixed = torch.lerp(second, first, upsample_blocks(mask, *images.shape[-2:]).to(images.dtype))
    if images.is_contiguous():  # move_blocks() returns channels-last memory
        mixed = mixed.contiguous()
    return mixed, torch.lerp(targets[partner], targets, mask.mean((1, 2)).unsqueeze(1).to(targets.dtype))


def largest_divisor(side: int, maximum: int) -> int:
    """Return the largest divisor of `side` that is at most `maximum`."""
    return next(n for n in range(min(side, maximum), 0, -1) if side % n == 0)


class PuzzleMix(Mixer):
    """lam ~ Beta(mixup_alpha, mixup_alpha) and the number of blocks per side (from block_num) are drawn once per batch.

    n_labels: number of mask values between 0 and 1, 2 to 4. beta: weight of the smoothness of the mask. gamma: weight
    of the colour differences across block borders, relative to beta. eta: weight of the prior on the mean of the mask.
    neigh_size: side in pixels of the cells between which the differences are taken.

    transport: whether blocks move. t_eps: cost of a move. t_size: side in pixels of the blocks that move; -1: as in the
    mask. clean_lam: weight of the clean loss that is also trained on. adv_p: probability that the images of a batch get
    adversarial noise of at most adv_eps / 255; it is drawn a second time for the partners. mix_prob: probability that a
    batch is mixed.

    solver: `parallel` (ours) or `gco` (the authors' graph cuts, one image at a time). kernels: see
    mixing.kernels.use_kernels().

    mean, std: the normalisation of the images, because colour differences and adversarial noise refer to pixels in
    0..1.

    After a call, `energy` (B,) is the energy that the solver reached, `bound` its lower bound, (B,) or None, and `mask`
    is (B, n, n).
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
        kernels: str = "auto",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie between 0 and 1, got {gamma}: above 1 the mask problem is not submodular")
        if not 2 <= n_labels <= 4:
            raise ValueError(f"n_labels must be 2, 3 or 4, got {n_labels}")
        if min(mixup_alpha, beta, eta, t_eps, clean_lam, adv_eps) < 0:
            raise ValueError(
                f"mixup_alpha {mixup_alpha}, beta {beta}, eta {eta}, t_eps {t_eps}, clean_lam {clean_lam} and "
                f"adv_eps {adv_eps} must not be negative"
            )
        if not block_num or min(block_num) < 1 or neigh_size < 1 or not (t_size > 0 or t_size == -1):
            raise ValueError(
                f"block_num {block_num}, neigh_size {neigh_size}, t_size {t_size}: must be positive, t_size or -1"
            )
        self.mixup_alpha, self.block_num, self.n_labels = mixup_alpha, tuple(block_num), n_labels
        self.weights = {"n_labels": n_labels, "beta": beta, "gamma": gamma, "eta": eta}
        self.neigh_size, self.transport, self.t_eps, self.t_size = neigh_size, transport, t_eps, t_size
        self.clean_lam, self.adv_eps, self.adv_p = clean_lam, adv_eps / 255, check_probability("adv_p", adv_p)
        self.mix_prob = check_probability("mix_prob", mix_prob)
        self.solver, self.kernels = check_solver(solver), check_mode(kernels)
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    @property
    def gradient_options(self):
        return {"mode": "train" if self.clean_lam else "eval", "clean_weight": self.clean_lam}

    def check_size(self, height, width):
        for count in self.block_num:
            check_divides("block_num", count, height, width)
        if self.transport and self.t_size > 0 and (height % self.t_size or width % self.t_size):
            raise ValueError(f"t_size {self.t_size} does not divide {height}x{width} pixels: use -1")

    def mix_batch(self, images, targets, source):
        self.check_size(*images.shape[-2:])
        if self.mean.device != images.device:  # only once: a copy in each step would synchronise with the device
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        n = self.block_num[int(torch.randint(len(self.block_num), ()))]
        lam, partner = draw_lam(self.mixup_alpha, images), draw_partner(images)
        noisy = (torch.rand(2) < self.adv_p).tolist()  # the images, the partners
        noise = None
        if any(noisy):
            saliency, noise = self.compute_noise(source, images, targets)
        else:
            saliency = self.compute_saliency(source, images, targets)
        with torch.no_grad():
            self.mask, blocks = self.solve_mask_and_transport(images.detach(), saliency, partner, lam, n)
        self.set_weight(images, lambda mask=self.mask: mask, partner)
        self.move_maps = lambda maps: [one[:, 0] for one in move_pairs(*[maps.unsqueeze(1)] * 2, partner, blocks)]
        first, partners = (self.add_noise(images, noise) if is_noisy else images for is_noisy in noisy)
        return mix(first, targets, partner, self.mask, blocks, partners)

    def solve_mask_and_transport(
        self, images: torch.Tensor, saliency: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor, n: int
    ):
        """Return the mask (B, n, n) and the `blocks` of mix().

        images (B, C, H, W), saliency (B, H, W), partner (B,), lam (); n: blocks per side.
        """
        height, width = images.shape[-2:]
        block_height, block_width = height // n, width // n
        cells = None
        if self.weights["gamma"]:
            cell = largest_divisor(block_height, self.neigh_size), largest_divisor(block_width, self.neigh_size)
            cells = F.avg_pool2d(images.float(), cell) * self.std  # the mean would cancel in the differences
        block_saliency = normalize_sum(block_means(saliency, n, n))
        labels, self.energy, self.bound = self.solve_mask(block_saliency, cells, partner, lam)
        mask = 1 - labels.permute(2, 0, 1) / (self.n_labels - 1)
        if not self.transport:
            return mask, None
        rows, columns = n, n
        if self.t_size > 0:
            rows = height // largest_divisor(block_height, self.t_size)
            columns = width // largest_divisor(block_width, self.t_size)
            if rows > n or columns > n:
                block_saliency = normalize_sum(block_means(saliency, rows, columns))
        grid_mask = upsample_blocks(mask, rows, columns).squeeze(1)
        hidden = torch.arange(2, device=mask.device).view(2, 1, 1, 1)  # the value that hides the image, its partner
        needed = (grid_mask != hidden).flatten(0, 1)
        blocks = self.solve_transport(torch.cat([block_saliency, block_saliency[partner]]), needed)
        return mask, (*blocks.chunk(2), rows, columns)

    def solve_mask(self, block_saliency: torch.Tensor, cells: torch.Tensor | None, partner: torch.Tensor, lam):
        """Return labels (n, n, B) long, their energy (B,), and a lower bound of the energy, (B,) or None.

        Arguments as in build_mask_problem().
        """
        if self.solver == "parallel" and use_kernels(self.kernels, block_saliency.device):
            from .kernels import puzzlemix_mask as kernels

            return kernels.solve(*kernels.build_mask_problem(block_saliency, cells, partner, lam, **self.weights))
        problem = build_mask_problem(block_saliency, cells, partner, lam, **self.weights)
        if self.solver == "gco":
            from .solvers import graphcut

            labels = graphcut.solve_mask(*problem)
            return labels, puzzlemix_mask.energy(labels, *problem), None
        return puzzlemix_mask.solve(*problem)

    def solve_transport(self, block_saliency: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        """Return the block to show at each place, (B, N) long, for N = rows x columns blocks (B, rows, columns)."""
        if use_kernels(self.kernels, block_saliency.device):
            from .kernels import puzzlemix_transport as kernels

            return kernels.solve_transport(block_saliency, needed, self.t_eps)
        return puzzlemix_transport.solve_transport(block_saliency, needed, self.t_eps)

    def compute_noise(self, source, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the saliency (B, H, W) of randomly noised images, and adversarial noise (B, C, H, W).

        The noise is added to pixels in 0..1.
        """
        if not source.has_gradient:
            raise ValueError("adversarial noise (adv_p) needs the signed pixel gradient: use the source gradient")
        eps = self.adv_eps
        noise = torch.empty_like(images).uniform_(-eps, eps)
        gradient = source.gradient(self.add_noise(images, noise), targets)
        saliency = self.replace_invalid_maps(source.reduce(gradient))
        noise = (noise + (eps + 2 / 255) * gradient.sign()).clamp_(-eps, eps)  # the sign of NaN is 0
        return saliency, noise * torch.rand(())

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Add noise to the pixels, measured in 0..1, and clip them to that range."""
        pixels = torch.addcmul(self.mean, images, self.std)
        return ((pixels + noise).clamp(0, 1) - self.mean) / self.std
