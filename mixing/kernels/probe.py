"""The smallest kernel: whether Triton can compile and run anything on a device."""

import torch
import triton
import triton.language as tl

from . import launch

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@triton.jit
def add_one(values, COUNT: tl.constexpr):
    place = values + tl.arange(0, COUNT)
    tl.store(place, tl.load(place) + 1)


def run_probe(device: torch.device) -> None:
    """Compile and run a kernel, and wait for it. Raises RuntimeError if its result is wrong."""
    values = torch.zeros(32, device=device)
    launch(add_one, (1,), values, COUNT=len(values))
    if values.sum().item() != len(values):
        raise RuntimeError("its result is wrong")
