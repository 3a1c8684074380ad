"""Random numbers that belong to an image: they depend on (seed, purpose, position in the set) alone.

A counter is hashed instead of a generator being asked, so that the same image gets the same numbers in a batch of any
size, in any process, on any device, and for every classifier that is compared.
"""

import math
import zlib

import torch

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as signed


def scrambled(key: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64, which wraps around."""
    key = (key ^ shifted(key, 30)) * FIRST
    key = (key ^ shifted(key, 27)) * SECOND
    return key ^ shifted(key, 31)


def shifted(key: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def hashed(
    index: torch.Tensor, shape: tuple[int, ...], seed: int, purpose: str, device: torch.device | str | None
) -> torch.Tensor:
    """int64 (B, *shape), all 64 bits random. index (B,): positions in the set. purpose: tells uses of a seed apart."""
    index = index.to(device or index.device, torch.int64, non_blocking=True)  # the host need not wait
    start = torch.full((), seed, dtype=torch.int64, device=index.device) * GOLDEN + zlib.crc32(purpose.encode())
    key = scrambled(scrambled(start) + index * GOLDEN)  # (B,)
    steps = torch.arange(1, math.prod(shape) + 1, device=index.device) * GOLDEN
    return scrambled(key.unsqueeze(1) + steps).view(-1, *shape)


def uniform(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape) in [0, 1), on the device given, else that of index (B,)."""
    return shifted(hashed(index, shape, seed, purpose, device), 40).float() * 2.0**-24


def normal(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape) of mean 0 and deviation 1 (Box and Muller), on the device given, else that of index (B,)."""
    bits = hashed(index, shape, seed, purpose, device)
    radius = ((shifted(bits, 32).float() + 0.5) * 2.0**-32).log().mul(-2).sqrt()  # the upper half of the bits
    return radius * torch.cos((bits & 0xFFFFFFFF).float() * (2.0**-32 * 2 * math.pi))
