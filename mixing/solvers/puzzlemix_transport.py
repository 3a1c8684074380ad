"""PuzzleMix's transport: choose which block of an image to show at each place, so that its salient blocks are visible.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.3. Showing block i at place j costs t_eps d_ij - s_i, where d is the
squared distance on the grid and s the saliency of the block. Only the places where the image is visible count, and no
block is shown twice. This is an assignment problem in which nearly every block is already in the right place, so it is
solved by an auction (Bertsekas, Annals of Operations Research 1988) that starts from there and touches only the few
others.
"""

from functools import cache

import torch

SLACK = 1e-4  # epsilon of the auction at first: each place gets a block at most this much worse than its best one
SLACK_DOUBLING_ROUNDS = 24  # the slack doubles after so many rounds, so that price wars end; few auctions take so long
MAX_ROUNDS = 1000  # a guard: once the slack exceeds all differences in value, an auction ends; 218 rounds were seen
MAX_BIDS = 2**24  # values of a block for a place that are in memory at once where the host does not count the bidders


@cache
def squared_distances(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return the squared distances between all places on the grid, in blocks: (N, N)."""
    r, c = torch.arange(rows, device=device), torch.arange(columns, device=device)
    r, c = r.repeat_interleave(columns).float(), c.repeat(rows).float()
    return (r.unsqueeze(1) - r).square() + (c.unsqueeze(1) - c).square()


def envelope(values: torch.Tensor, unit: float, power: int) -> torch.Tensor:
    """Return, for each place, the maximum over all places of values - unit * distance^power: (B, rows, columns).

    The maximum is taken along rows and then along columns; the distance to the given power is the sum of both parts.
    """
    for dim in (1, 2):
        steps = torch.arange(values.shape[dim], device=values.device)
        cost = unit * (steps.unsqueeze(1) - steps).abs().pow(power)  # (to, from)
        values = (values.unsqueeze(dim) - (cost.unsqueeze(-1) if dim == 1 else cost)).amax(dim + 1)
    return values


def can_improve(block_saliency: torch.Tensor, needed: torch.Tensor, unit: float) -> torch.Tensor:
    """Return for which images moving blocks gains more than SLACK at any place, (B,) bool.

    Arguments as in solve_transport(), with unit the cost of one step. By linear-programming duality: blocks only trade
    places for the sake of a block that is not visible where it is. Let pi_j be the minimum of s_k + unit |j - k| over
    the visible places k, in steps along the grid. With prices s - pi for visible blocks and 0 for the others, no place
    prefers another visible block, because the number of steps never exceeds the squared distance. So every block stays
    unless s_i - unit d_ij of an invisible block i exceeds pi_j somewhere.
    """
    kept = -envelope((-block_saliency).masked_fill(~needed, -torch.inf), unit, 1)
    offered = envelope(block_saliency.masked_fill(needed, -torch.inf), unit, 2)
    return (needed & (offered - kept > SLACK)).flatten(1).any(1)


def solve_transport(block_saliency: torch.Tensor, needed: torch.Tensor, t_eps: float) -> torch.Tensor:
    """Return the block to show at each place, (B, N) long, for images cut into rows x columns = N blocks.

    block_saliency (B, rows, columns): saliency of each block. needed (B, rows, columns) bool: the places where the
    image is visible. Their blocks are distinct; every other place keeps its own. t_eps: cost of a move along the longer
    side.
    """
    batch, rows, columns = block_saliency.shape
    unit = t_eps / max(rows - 1, columns - 1, 1) ** 2
    moves = can_improve(block_saliency, needed, unit)
    if block_saliency.device.type != "cpu":  # selecting those images would make the host wait for the device
        most_bidders = min(batch * rows * columns, MAX_BIDS // (rows * columns))
        return run_auction(block_saliency, needed & moves.view(-1, 1, 1), unit, most_bidders)
    block = torch.arange(rows * columns).repeat(batch, 1)
    which = moves.nonzero().squeeze(1)
    if len(which):
        block[which] = run_auction(block_saliency[which], needed[which], unit)
    return block


def run_auction(
    block_saliency: torch.Tensor, needed: torch.Tensor, unit: float, most_bidders: int | None = None
) -> torch.Tensor:
    """As solve_transport(), where unit is the cost of one step.

    most_bidders: how many places can bid in a round; None: all, and the host counts them.
    """
    # ---- Start: every block at its own place, all prices 0 ----
    batch, rows, columns = block_saliency.shape
    places = rows * columns
    # one more image, in which no place is needed, receives the writes of padding and of lost bids
    end, block_saliency, needed = batch * places, append_image(block_saliency), append_image(needed)
    cost = unit * squared_distances(rows, columns, block_saliency.device)
    index = torch.arange(end + places, device=block_saliency.device)
    unassigned = (needed & (envelope(block_saliency, unit, 2) - block_saliency > SLACK)).view(-1)
    needed, saliency, price = needed.view(-1), block_saliency.view(-1), block_saliency.new_zeros(end + places)
    block, owner = index.clone(), torch.where(unassigned, -1, index)  # of each place; of each block
    waiting = torch.ones((), dtype=torch.bool, pin_memory=price.is_cuda)
    for number in range(MAX_ROUNDS):
        # the host does not wait for CUDA: it sees the end of the auction late, and rounds after the end change nothing
        waiting.copy_(unassigned.any(), non_blocking=True)
        if not waiting:
            break
        # ---- Each unassigned place bids for its best block ----
        bidder = find_bidders(unassigned, most_bidders, padding=end)
        image, place = bidder // places, bidder % places
        net = (saliency - price).view(-1, places)[image] - cost[place]
        best, wanted = net.max(1)  # of equal blocks the first, on every device
        second = net.scatter_(1, wanted.unsqueeze(1), -torch.inf).amax(1)
        wanted = torch.add(wanted, image, alpha=places)
        bid = price[wanted] + best - second + SLACK * 2 ** (number // SLACK_DOUBLING_ROUNDS)
        # ---- Each block goes to the highest bid; of equal bids the first place wins ----
        rank = (bid.view(torch.int32).long() << 32) - place  # the bits of positive numbers are in their order
        won = rank == torch.zeros_like(index).scatter_reduce_(0, wanted, rank, "amax")[wanted]
        taken = torch.where(won, wanted, end)
        price[taken], owner[taken], block[bidder] = bid, bidder, wanted
        unassigned = needed & (owner[block] != index)
    return block[:end].view(batch, places) % places


def append_image(values: torch.Tensor) -> torch.Tensor:
    """Append an image of zeros to values (B, rows, columns)."""
    return torch.cat([values, torch.zeros_like(values[:1])])


def find_bidders(unassigned: torch.Tensor, most: int | None, padding: int) -> torch.Tensor:
    """Return the indices of the unassigned places; not None: of the first `most`, padded to that number."""
    if most is None:
        return unassigned.nonzero().squeeze(1)
    slot = torch.where(unassigned, unassigned.cumsum(0) - 1, most).clamp_max_(most)
    bidder = torch.full_like(slot[: most + 1], padding)
    bidder[slot] = torch.arange(len(slot), device=slot.device)
    return bidder[:most]


@cache
def number_strips(rows: int, columns: int, height: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of each strip of an image, (N, height), and the pixel rows of a block, (height, 1).

    A strip is one pixel row of one block; strips are counted in the order of the pixels. height: that of a block.
    """
    block, line = torch.arange(rows * columns, device=device).unsqueeze(1), torch.arange(height, device=device)
    return (block // columns * height + line) * columns + block % columns, line.unsqueeze(1)


def move_blocks(images: torch.Tensor, block: torch.Tensor, image: torch.Tensor, rows: int, columns: int):
    """Show block `block` (B', N) of image number `image` (B',) at each place, in one gather: (B', C, H, W).

    images (B, C, H, W), cut into rows x columns = N blocks.
    """
    _, channels, height, width = images.shape
    strips = images.permute(0, 2, 3, 1).reshape(-1, width // columns * channels)
    number, line = number_strips(rows, columns, height // rows, images.device)
    index = number[block.view(-1, rows, 1, columns), line]
    index = torch.add(index, image.view(-1, 1, 1, 1), alpha=height * columns)
    moved = strips.index_select(0, index.flatten()).view(len(block), height, width, channels)
    return moved.permute(0, 3, 1, 2)
