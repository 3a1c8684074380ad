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
MAX_ROUNDS = 240  # if the host can check whether the auction is over
MAX_ROUNDS_NO_SYNC = 48  # if it cannot, because it would wait for the device


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
    own = torch.arange(rows * columns, device=block_saliency.device).repeat(batch, 1)
    unit = t_eps / max(rows - 1, columns - 1, 1) ** 2
    moves = can_improve(block_saliency, needed, unit)
    if block_saliency.device.type != "cpu":  # selecting those images would make the host wait for the device
        return run_auction(block_saliency, needed & moves.view(-1, 1, 1), unit, may_sync=False)
    which = moves.nonzero().squeeze(1)
    return (
        own.index_copy_(0, which, run_auction(block_saliency[which], needed[which], unit, may_sync=True))
        if len(which)
        else own
    )


def run_auction(block_saliency: torch.Tensor, needed: torch.Tensor, unit: float, may_sync: bool) -> torch.Tensor:
    """As solve_transport(), where unit is the cost of one step and may_sync says whether the host may read results."""
    # ---- Start: every block at its own place, all prices 0 ----
    batch, rows, columns = block_saliency.shape
    places = rows * columns
    own = torch.arange(places, device=block_saliency.device).expand(batch, places)
    unassigned = (needed & (envelope(block_saliency, unit, 2) - block_saliency > SLACK)).view(-1)
    # one dummy entry at the end receives the writes of padding and of lost bids
    end, cost = batch * places, unit * squared_distances(rows, columns, block_saliency.device)
    block = own.flatten()
    owner = append_entry(torch.where(needed.view(-1) & ~unassigned, block, -1), -1)
    block, unassigned = append_entry(block, 0), append_entry(unassigned, False)
    price = block_saliency.new_zeros(end + 1)
    for number in range(MAX_ROUNDS if may_sync else MAX_ROUNDS_NO_SYNC):
        bidder, real = find_bidders(unassigned[:-1], end // 8, may_sync)
        if len(bidder) == 0:
            break
        # ---- Each unassigned place bids for its best block ----
        image, place = bidder // places, bidder % places
        net = block_saliency.view(batch, places) - price[:-1].view(batch, places)
        best, wanted = (net[image] - cost[place]).topk(2)
        wanted = image * places + wanted[:, 0]
        bid = price[wanted] + best[:, 0] - best[:, 1] + SLACK * 2 ** (number // SLACK_DOUBLING_ROUNDS)
        bid = torch.where(real, bid, -1.0)
        # ---- Each block goes to the highest bid; of equal bids the first place wins ----
        highest = torch.full_like(price, -1.0).scatter_reduce_(0, wanted, bid, "amax")
        leads = real & (bid == highest[wanted])
        first = torch.full_like(owner, places).scatter_reduce_(0, wanted, torch.where(leads, place, places), "amin")
        won = leads & (first[wanted] == place)
        loser = owner[wanted]
        unassigned[torch.where(won & (loser >= 0), image * places + loser, end)] = True
        unassigned[torch.where(won, bidder, end)] = False
        taken = torch.where(won, wanted, end)
        price[taken], owner[taken] = bid, place
        block[torch.where(won, bidder, end)] = wanted % places
    # ---- Images that ran out of rounds keep all their blocks in place ----
    unfinished = unassigned[:-1].view(batch, places).any(1, keepdim=True)
    return torch.where(unfinished, own, block[:-1].view(batch, places))


def append_entry(values: torch.Tensor, last) -> torch.Tensor:
    """Append one entry to a vector."""
    return torch.cat([values, values.new_full((1,), last)])


def find_bidders(unassigned: torch.Tensor, max_bidders: int, may_sync: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the unassigned places, and which of them are real.

    Without may_sync there are always max_bidders indices, some of them padding, because counting would make the host
    wait.
    """
    if may_sync:
        indices = unassigned.nonzero().squeeze(1)
        return indices, torch.ones_like(indices, dtype=torch.bool)
    slot = unassigned.cumsum(0) - 1
    indices = slot.new_zeros(max_bidders + 1)
    indices[torch.where(unassigned & (slot < max_bidders), slot, max_bidders)] = torch.arange(
        len(unassigned), device=unassigned.device
    )
    return indices[:max_bidders], torch.arange(max_bidders, device=unassigned.device) <= slot[-1]


def move_blocks(images: torch.Tensor, block: torch.Tensor, image: torch.Tensor, rows: int, columns: int):
    """Show block `block` (B', N) of image number `image` (B',) at each place, in one gather: (B', C, H, W).

    images (B, C, H, W), cut into rows x columns = N blocks.
    """
    _, channels, height, width = images.shape
    block_height, block_width = height // rows, width // columns
    strips = images.permute(0, 2, 3, 1).reshape(-1, block_width * channels)  # one pixel row of one block each
    row, column = (block // columns).view(-1, rows, 1, columns), (block % columns).view(-1, rows, 1, columns)
    line = torch.arange(block_height, device=images.device).view(1, 1, -1, 1)
    index = (image.view(-1, 1, 1, 1) * height + row * block_height + line) * columns + column
    moved = strips.index_select(0, index.flatten()).view(len(block), height, width, channels)
    return moved.permute(0, 3, 1, 2)
