"""Draw random numbers per image: they depend only on (seed, purpose or epoch, index in the set).

Counters are hashed with splitmix64 (Steele, Lea and Flood, OOPSLA 2014). There is no generator state, so an image gets
the same numbers in a batch of any size, in any process, on any device, and for every classifier in a comparison.
"""

import math
import zlib

import torch

GOLDEN, FIRST, SECOND = (
    -0x61C8864680B583EB,
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # constants of splitmix64, as signed int64
CROP_TRIES, DRAWS_PER_TRY = 10, 4  # attempts at a random crop, random numbers per attempt


def mix_bits(key: torch.Tensor) -> torch.Tensor:
    """Apply the output function of splitmix64. int64 arithmetic wraps around like uint64."""
    key = (key ^ shift_right(key, 30)) * FIRST
    key = (key ^ shift_right(key, 27)) * SECOND
    return key ^ shift_right(key, 31)


def shift_right(key: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros (logical shift)."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def expand_keys(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Return the next `count` splitmix64 outputs from each key: keys (B,) -> (B, count)."""
    return mix_bits(keys.unsqueeze(1) + torch.arange(1, count + 1, device=keys.device) * GOLDEN)


def hash_indices(
    index: torch.Tensor, shape: tuple[int, ...], seed: int, purpose: str, device: torch.device | str | None
) -> torch.Tensor:
    """Return int64 (B, *shape) of 64 random bits. index (B,): indices in the set. purpose: separates uses of a seed."""
    index = index.to(device or index.device, torch.int64, non_blocking=True)  # does not block the CPU
    start = torch.full((), seed, dtype=torch.int64, device=index.device) * GOLDEN + zlib.crc32(purpose.encode())
    return expand_keys(mix_bits(mix_bits(start) + index * GOLDEN), math.prod(shape)).view(-1, *shape)


def uniform(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """Draw float32 (B, *shape), uniform in [0, 1), on `device` or else on the device of index (B,)."""
    return shift_right(hash_indices(index, shape, seed, purpose, device), 40).float() * 2.0**-24


def normal(
    index: torch.Tensor, shape: tuple[int, ...], *, seed: int, purpose: str, device: torch.device | str | None = None
) -> torch.Tensor:
    """Draw float32 (B, *shape), standard normal (Box-Muller), on `device` or else on the device of index (B,)."""
    bits = hash_indices(index, shape, seed, purpose, device)
    radius = ((shift_right(bits, 32).float() + 0.5) * 2.0**-32).log().mul(-2).sqrt()  # from the upper 32 bits
    return radius * torch.cos((bits & 0xFFFFFFFF).float() * (2.0**-32 * 2 * math.pi))


def hash_samples(seed: int, epoch: int, index: list[int]) -> torch.Tensor:
    """Return int64 (B,): a hash key for each sample of an epoch."""
    key = mix_bits(torch.tensor((seed + 2**63) % 2**64 - 2**63))
    return mix_bits(mix_bits(key + epoch) + torch.tensor(index, dtype=torch.int64))


def draw_crop_numbers(seed: int, epoch: int, index: list[int]) -> torch.Tensor:
    """Draw float64 (B, CROP_TRIES, DRAWS_PER_TRY) in [0, 1) for engine.data.views.RandomCrop."""
    bits = expand_keys(hash_samples(seed, epoch, index), CROP_TRIES * DRAWS_PER_TRY)
    return (shift_right(bits, 11).double() * 2.0**-53).view(-1, CROP_TRIES, DRAWS_PER_TRY)
