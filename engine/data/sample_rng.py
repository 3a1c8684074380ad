"""Random numbers that belong to an image: they depend on (seed, purpose, position in the set) alone.

A counter is hashed instead of a generator being asked, so that the same image gets the same numbers in a batch of any
size, in any process, on any device, and for every classifier that is compared.
"""

import math
import zlib

import numpy as np
import torch

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as signed


def mix_bits(key: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) on int64, which wraps around."""
    key = (key ^ shift_right(key, 30)) * FIRST
    key = (key ^ shift_right(key, 27)) * SECOND
    return key ^ shift_right(key, 31)


def shift_right(key: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def hash_indices(
    index: torch.Tensor, shape: tuple[int, ...], seed: int, purpose: str, device: torch.device | str | None
) -> torch.Tensor:
    """int64 (B, *shape), all 64 bits random. index (B,): positions in the set. purpose: tells uses of a seed apart."""
    index = index.to(device or index.device, torch.int64, non_blocking=True)  # the host need not wait
    start = torch.full((), seed, dtype=torch.int64, device=index.device) * GOLDEN + zlib.crc32(purpose.encode())
    key = mix_bits(mix_bits(start) + index * GOLDEN)  # (B,)
    steps = torch.arange(1, math.prod(shape) + 1, device=index.device) * GOLDEN
    return mix_bits(key.unsqueeze(1) + steps).view(-1, *shape)


def uniform(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape) in [0, 1), on the device given, else that of index (B,)."""
    return shift_right(hash_indices(index, shape, seed, purpose, device), 40).float() * 2.0**-24


def normal(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """float32 (B, *shape) of mean 0 and deviation 1 (Box and Muller), on the device given, else that of index (B,)."""
    bits = hash_indices(index, shape, seed, purpose, device)
    radius = ((shift_right(bits, 32).float() + 0.5) * 2.0**-32).log().mul(-2).sqrt()  # the upper half of the bits
    return radius * torch.cos((bits & 0xFFFFFFFF).float() * (2.0**-32 * 2 * math.pi))


CROP_TRIES, DRAWS_PER_TRY = 10, 4  # random numbers a sample: tries at a crop, and what each needs


def crop_draws(seed: int, epoch: int, index: list[int]) -> np.ndarray:
    """(B, TRIES, NUMBERS) numbers in [0, 1) that depend on (seed, epoch, index) alone, by splitmix64.

    A hash and no generator: a quarter of a microsecond a sample, and no state that a worker could carry along.
    """
    key = sample_keys(seed, epoch, index)
    steps = np.arange(1, CROP_TRIES * DRAWS_PER_TRY + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mix_bits_numpy(key[:, None] + steps) >> np.uint64(11)) * 2.0**-53).reshape(-1, CROP_TRIES, DRAWS_PER_TRY)


def sample_keys(seed: int, epoch: int, index: list[int]) -> np.ndarray:
    """(B,) uint64, of a sample's own in that epoch of that seed."""
    key = mix_bits_numpy(np.array([seed % 2**64], np.uint64))
    return mix_bits_numpy(mix_bits_numpy(key + np.uint64(epoch)) + np.array(index, np.uint64))


def mix_bits_numpy(key: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014); uint64 wraps around."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))
