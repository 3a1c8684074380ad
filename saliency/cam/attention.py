"""Read attention weights from the function calls of a forward pass, whatever the module that makes them.

The map is the attention of the last layer from the class token to the tokens of the grid, as a mean over the heads:
Chen et al., "TransMix", CVPR 2022, arXiv 2111.09833, Sec. 3.2. Abnar and Zuidema, "Quantifying Attention Flow in
Transformers", ACL 2020, arXiv 2005.00928, call it raw attention. A network that averages its tokens has no class token;
the mean over the queries takes its place. Fused attention never holds its weights: softmax(q k^T) is computed again for
the rows that are needed.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .layouts import TokenRules, find_token_grid

MULTI_HEAD, FUSED, EXPLICIT = "multi_head_attention_forward", "scaled_dot_product_attention", "softmax"
FUSED_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
Size = tuple[int, int]  # height, width
MULTI_HEAD_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class AttentionCall(NamedTuple):
    """An attention of `batch` images (or windows) from `queries` to `keys` tokens.

    read(rows): its weights from these queries, a slice, as a mean over the heads: (batch, rows, keys) float32. number:
    of the call in its pass. padding: height and width of the grid before and after the last padding of a grid
    (B, h, w, C) since the previous call.
    """

    batch: int
    queries: int
    keys: int
    read: Callable[[slice], torch.Tensor]
    number: int = 0
    padding: tuple[Size, Size] | None = None


class KeyGrid(NamedTuple):
    """Where the keys of an attention lie: `prefix` tokens, then those of a grid, of which only a part is the image."""

    prefix: int
    grid: Size
    image: Size


class AttentionCounter:
    """Numbers the attention calls of a forward pass."""

    def __init__(self):
        self.count = 0
        self.padding: tuple[Size, Size] | None = None

    def watch(self, func: Callable, args: tuple, kwargs: dict, result) -> AttentionCall | None:
        """Take note of a function call with its result. Returns what find_attention() does, with number and padding."""
        call = find_attention(func, args, kwargs, result)
        if call is None:
            self.padding = find_padding(func, args, kwargs, result) or self.padding
            return None
        call = call._replace(number=self.count, padding=self.padding)
        self.count, self.padding = self.count + 1, None
        return call


def find_attention(func: Callable, args: tuple, kwargs: dict, result) -> AttentionCall | None:
    """Return the attention that a function call has computed; None if it is no attention, or one without such rows."""
    name = getattr(func, "__name__", "")
    if name == MULTI_HEAD:
        call = MULTI_HEAD_SIGNATURE.bind(*args, **kwargs).arguments
        query, key = call["query"], call["key"]  # tokens first
        if query.dim() != 3 or call.get("attn_mask") is not None:
            return None
        return AttentionCall(query.shape[1], len(query), len(key), lambda rows: read_multi_head(call, rows))
    if name == FUSED:
        call = dict(zip(FUSED_ARGUMENTS, args, strict=False)) | kwargs
        query, key = call["query"], call["key"]
        if query.dim() != 4 or call.get("is_causal") or key.shape[1] not in (1, query.shape[1]):
            return None
        return AttentionCall(len(query), query.shape[2], key.shape[2], lambda rows: read_fused(call, rows))
    if name == EXPLICIT and isinstance(result, torch.Tensor) and result.dim() >= 4:
        dim, weights = args[1] if len(args) > 1 else kwargs.get("dim"), result.detach()
        if weights.dim() == 5 and weights.shape[1] == 1:  # (B, windows, heads, queries, keys) of MaxViT
            weights = weights.squeeze(1)
        if dim in (-1, result.dim() - 1) and weights.dim() == 4:
            batch, _, queries, keys = weights.shape
            return AttentionCall(batch, queries, keys, lambda rows: weights[:, :, rows].float().mean(1))
    return None


def read_multi_head(call: dict, rows: slice) -> torch.Tensor:
    """See AttentionCall. call: the arguments of torch's multi_head_attention_forward()."""
    given = call | {"query": call["query"][rows], "need_weights": True, "average_attn_weights": True}
    return F.multi_head_attention_forward(**given)[1].float()


def read_fused(call: dict, rows: slice) -> torch.Tensor:
    """See AttentionCall. call: the arguments of torch's scaled_dot_product_attention()."""
    query, key, mask, scale = call["query"], call["key"], call.get("attn_mask"), call.get("scale")
    with torch.autocast(query.device.type, enabled=False):
        scores = query[:, :, rows].float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])[:, :, rows]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1).mean(1)


def find_padding(func: Callable, args: tuple, kwargs: dict, result) -> tuple[Size, Size] | None:
    """Return height and width of a grid (B, h, w, C) before and after a call of F.pad that enlarges it for windows."""
    if getattr(func, "__name__", "") != "pad" or not isinstance(result, torch.Tensor) or result.dim() != 4:
        return None
    given = args[0] if args else kwargs["input"]
    return (tuple(given.shape[1:3]), tuple(result.shape[1:3])) if given.shape[3] == result.shape[3] else None


def find_key_grid(call: AttentionCall, size: Size, count: int, rules: TokenRules) -> KeyGrid | None:
    """Return where the keys lie; None if they are not the places of whole images, as in windows.

    size: height and width of the images. count: how many there are.
    """
    if call.batch != count:
        return None
    if call.padding and math.prod(call.padding[1]) == call.keys:  # one window, larger than the grid
        return KeyGrid(0, call.padding[1], call.padding[0])
    found = find_token_grid(call.keys, size, rules.prefixes)
    return found and KeyGrid(found[0], found[1:], found[1:])


def relates_places(call: AttentionCall, keys: KeyGrid, places: set[int]) -> bool:
    """Return whether a call relates places and not, by chance in the same number, channels.

    places: how many the layers in the module that makes the call have, and the last layer before it.
    """
    if keys.grid != keys.image:
        return math.prod(keys.image) in places
    return any({count, count + keys.prefix} & {call.queries, call.keys} for count in places)


def read_map(call: AttentionCall, keys: KeyGrid, rules: TokenRules) -> torch.Tensor:
    """Return the attention to the places of the images, (batch, h, w) float32.

    It comes from the class token or, without one, from all places, as a mean.
    """
    (height, width), (rows, columns) = keys.grid, keys.image
    if call.queries == 1 or (keys.prefix and rules.has_class):
        weights = call.read(slice(0, 1))
    elif call.queries != call.keys:
        weights = call.read(slice(None))
    else:
        weights = call.read(slice(keys.prefix, None)).unflatten(1, (height, width))[:, :rows, :columns].flatten(1, 2)
    return weights[:, :, keys.prefix :].mean(1).unflatten(1, (height, width))[:, :rows, :columns]
