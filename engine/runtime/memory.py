"""Measure peak memory use."""

import sys

import torch


def get_peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory use so far in MiB: of torch's allocator on CUDA, of the process on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
