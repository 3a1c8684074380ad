"""PuzzleMix's transport: which block of an image is shown where, so that its salient blocks lie where it is visible.

Kim et al., ICML 2020, arXiv 2009.06962, Sec. 3.3. Showing block i at place j costs t_eps d_ij - s_i, with the squared
distance d on the grid and the block's saliency s; only the places where the image is visible count, and no block is
shown twice. That is an assignment problem, in which nearly every block already lies where it should: an auction
(Bertsekas, Annals of Operations Research 1988) that starts from there touches only the few others.
"""

from functools import cache

import torch

SLACK = 1e-4  # a place is content with a block this much worse than the best: bounds the loss of each place
DOUBLES_AFTER = 24  # rounds after which the slack doubles, so that a war of prices ends
ROUNDS = 240  # at most, where the host can see that all is settled
ROUNDS_UNSEEN = 48  # on a device that the host must not wait for


@cache
def squared_distances(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(N, N): squared distance of places on the grid, in steps."""
    r, c = torch.arange(rows, device=device), torch.arange(columns, device=device)
    r, c = r.repeat_interleave(columns).float(), c.repeat(rows).float()
    return (r.unsqueeze(1) - r).square() + (c.unsqueeze(1) - c).square()


def envelope(values: torch.Tensor, unit: float, power: int) -> torch.Tensor:
    """(B, rows, columns): for each place the maximum over all places of values - unit * distance^power, along rows and
    then along columns.
    """
    for dim in (1, 2):
        steps = torch.arange(values.shape[dim], device=values.device)
        cost = unit * (steps.unsqueeze(1) - steps).abs().pow(power)  # to, from
        values = (values.unsqueeze(dim) - (cost.unsqueeze(-1) if dim == 1 else cost)).amax(dim + 1)
    return values


def can_improve(salient: torch.Tensor, needed: torch.Tensor, unit: float) -> torch.Tensor:
    """(B,) whether moving blocks gains more than SLACK at any place; arguments as those of transport().

    By linear-programming duality. Blocks only ever trade places for the sake of one that is not visible where it lies.
    Let pi_j be the least s_k + unit |j - k| over the visible places k, in steps along the grid. With the prices s - pi
    for visible blocks and 0 for the others no place wants another visible block, since steps never exceed the squared
    distance. So all stay where they are unless some s_i - unit d_ij of an invisible block i exceeds pi_j.
    """
    kept = -envelope((-salient).masked_fill(~needed, -torch.inf), unit, 1)
    offered = envelope(salient.masked_fill(needed, -torch.inf), unit, 2)
    return (needed & (offered - kept > SLACK)).flatten(1).any(1)


def transport(salient: torch.Tensor, needed: torch.Tensor, t_eps: float) -> torch.Tensor:
    """The block shown at each place, (B, N) long, for images cut into rows x columns = N blocks.

    salient (B, rows, columns): saliency of each block. needed, of the same shape, bool: the places where the image is
    visible. Their blocks are distinct; every other place keeps its own. t_eps: price of a move along the longer side.
    """
    batch, rows, columns = salient.shape
    own = torch.arange(rows * columns, device=salient.device).repeat(batch, 1)
    unit = t_eps / max(rows - 1, columns - 1, 1) ** 2
    moves = can_improve(salient, needed, unit)
    if salient.device.type != "cpu":  # the host must not wait to hear which images those are
        return auction(salient, needed & moves.view(-1, 1, 1), unit, seen=False)
    which = moves.nonzero().squeeze(1)
    return own.index_copy_(0, which, auction(salient[which], needed[which], unit, seen=True)) if len(which) else own


def auction(salient: torch.Tensor, needed: torch.Tensor, unit: float, seen: bool) -> torch.Tensor:
    """As transport(), with unit the price of one step. seen: whether the host may look at how far it has come."""
    batch, rows, columns = salient.shape
    places = rows * columns
    own = torch.arange(places, device=salient.device).expand(batch, places)
    waiting = (needed & (envelope(salient, unit, 2) - salient > SLACK)).view(-1)
    # one dummy entry at the end takes what a round has nothing to write for
    end, cost = batch * places, unit * squared_distances(rows, columns, salient.device)
    block = own.flatten()
    owner = append_entry(torch.where(needed.view(-1) & ~waiting, block, -1), -1)
    block, waiting, price = append_entry(block, 0), append_entry(waiting, False), salient.new_zeros(end + 1)
    for number in range(ROUNDS if seen else ROUNDS_UNSEEN):
        bidder, real = find_bidders(waiting[:-1], end // 8, seen)
        if len(bidder) == 0:
            break
        image, place = bidder // places, bidder % places
        net = salient.view(batch, places) - price[:-1].view(batch, places)
        best, wanted = (net[image] - cost[place]).topk(2)
        wanted = image * places + wanted[:, 0]
        bid = price[wanted] + best[:, 0] - best[:, 1] + SLACK * 2 ** (number // DOUBLES_AFTER)
        bid = torch.where(real, bid, -1.0)
        highest = torch.full_like(price, -1.0).scatter_reduce_(0, wanted, bid, "amax")
        leads = real & (bid == highest[wanted])
        first = torch.full_like(owner, places).scatter_reduce_(0, wanted, torch.where(leads, place, places), "amin")
        won = leads & (first[wanted] == place)
        loser = owner[wanted]
        waiting[torch.where(won & (loser >= 0), image * places + loser, end)] = True
        waiting[torch.where(won, bidder, end)] = False
        taken = torch.where(won, wanted, end)
        price[taken], owner[taken] = bid, place
        block[torch.where(won, bidder, end)] = wanted % places
    unsettled = waiting[:-1].view(batch, places).any(1, keepdim=True)
    return torch.where(unsettled, own, block[:-1].view(batch, places))


def append_entry(values: torch.Tensor, last) -> torch.Tensor:
    return torch.cat([values, values.new_full((1,), last)])


def find_bidders(waiting: torch.Tensor, most: int, seen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the waiting places, and which of them are real: at most `most` with padding where not `seen`."""
    if seen:
        found = waiting.nonzero().squeeze(1)
        return found, torch.ones_like(found, dtype=torch.bool)
    slot = waiting.cumsum(0) - 1
    found = slot.new_zeros(most + 1)
    found[torch.where(waiting & (slot < most), slot, most)] = torch.arange(len(waiting), device=waiting.device)
    return found[:most], torch.arange(most, device=waiting.device) <= slot[-1]


def move_blocks(images: torch.Tensor, block: torch.Tensor, image: torch.Tensor, rows: int, columns: int):
    """(B', C, H, W): at every place the block `block` (B', N) of image number `image` (B',), in one gather.

    images (B, C, H, W), cut into rows x columns = N blocks.
    """
    _, channels, height, width = images.shape
    tall, wide = height // rows, width // columns
    strips = images.permute(0, 2, 3, 1).reshape(-1, wide * channels)  # one line of one block each
    row, column = (block // columns).view(-1, rows, 1, columns), (block % columns).view(-1, rows, 1, columns)
    line = torch.arange(tall, device=images.device).view(1, 1, -1, 1)
    index = (image.view(-1, 1, 1, 1) * height + row * tall + line) * columns + column
    moved = strips.index_select(0, index.flatten()).view(len(block), height, width, channels)
    return moved.permute(0, 3, 1, 2)
