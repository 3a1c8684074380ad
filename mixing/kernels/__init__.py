"""Triton kernels of the solvers, for CUDA devices. The torch solvers in mixing/solvers/ are the reference.

A kernel replaces hundreds of launches by one. Each module here has functions with the arguments and results of the
torch functions that they replace, and imports triton, which comes with torch's CUDA builds. So a module is only
imported where use_kernels() is True.
"""

from functools import cache

import torch

from .. import hyper_parameters

MODES = ("auto", "triton", "torch")
MIN_CAPABILITY = (7, 0)  # the oldest GPUs that Triton supports
MIN_TRITON = (3, 4)  # that of torch 2.8; 3.2 and 3.3 were tried and fail to compile some of the kernels


def check_mode(mode: str) -> str:
    """Return the mode. Raises ValueError for an unknown one."""
    if mode not in MODES:
        raise ValueError(f"kernels must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
    return mode


def use_kernels(mode: str, device: torch.device) -> bool:
    """Return whether the solvers run as Triton kernels on a device.

    mode: `torch`: never; `auto`: on CUDA, where a test kernel runs; `triton`: there, else ValueError with the reason.
    """
    if mode == "torch":
        return False
    obstacle = find_obstacle(device)
    if obstacle and mode == "triton":
        raise ValueError(f"kernels triton: {obstacle}; use auto or torch")
    return obstacle is None


def note_torch_solvers(names: list[str], mode: str, device: torch.device) -> list[str]:
    """Return a note if a method in `names` could use kernels on this CUDA device but falls back to the torch solvers.

    Raises ValueError as use_kernels() does.
    """
    if not any("kernels" in hyper_parameters(name) for name in names) or use_kernels(mode, device):
        return []
    if mode == "torch" or device.type != "cuda":
        return []
    return [f"no Triton kernels, so {' '.join(names)} runs slower torch solvers: {find_obstacle(device)}"]


@cache
def find_obstacle(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device; None: a test kernel was compiled and ran. Waits for it once."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {found}, and Triton needs {least}"
    try:
        from .probe import VERSION, run_probe

        if VERSION < MIN_TRITON:
            found, least = (".".join(map(str, pair)) for pair in (VERSION, MIN_TRITON))
            return f"triton {found} is too old; the kernels need {least}, which comes with torch 2.8"
        run_probe(device)
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    except Exception as error:  # no compiler, a cache folder that cannot be written, a driver that is too old
        return f"a test kernel failed ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return None


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Start a kernel on the device of its first tensor. The host does not wait. options: constants and `num_warps`."""
    first = next(value for value in args if isinstance(value, torch.Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*args, **options)
