"""Which device, which precision, and the switches that make it fast or exact."""

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.runtime.distributed import local_world_size, rank, rank_environment

FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}  # Linux names of the CPU features that run bfloat16 faster than float32


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps; under torchrun auto and cuda are the GPU of this process's place on its machine.

    Raises UserError for a device that is not there.
    """
    _, count, place = rank_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{place}"  # torch wants the number in some places
    elif count > 1 and name != "cpu":
        raise UserError(f"--device {name}: several processes take --device auto, cuda or cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: give auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}, but finds no driver or GPU"
            if torch.version.cuda
            else "a build without CUDA"
        )
        raise UserError(
            f"--device {name}: no CUDA device; torch {torch.__version__} is {built}. --device cpu always works"
        )
    wanted = max(device.index + 1, local_world_size()) if device.type == "cuda" else 0
    if wanted > torch.cuda.device_count():  # in all processes of the machine, so that the first one can say it
        processes = f" for {local_world_size()} processes: --nproc_per_node is their number" if count > 1 else ""
        raise UserError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0{processes}"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: no such device here. --device cpu always works")
    return device


def cpu_has_fast_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return bool(FAST_BF16_FLAGS & set(flags))


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """--amp -> the autocast type (None: float32) and a phrase for the log."""
    if name == "auto":
        if device.type == "cuda":
            fast, why = torch.cuda.get_device_capability(device) >= (8, 0), "the GPU"
        else:
            fast, why = device.type == "cpu" and cpu_has_fast_bf16(), "the processor"
        return (
            (torch.bfloat16, f"bfloat16 ({why} runs it faster)")
            if fast
            else (None, f"float32 ({why} has no fast bfloat16)")
        )
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    return {"off": (None, "float32"), "bf16": (torch.bfloat16, "bfloat16"), "fp16": (torch.float16, "float16")}[name]


def setup_backends(device: torch.device, *, seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch, and set the backends for speed, or for exactness."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def seed_rank_generator(seed: int, *, anew: bool = False) -> None:
    """From here on each process draws numbers of its own: with equal ones all would draw the same lam and box.

    The first process, and so a plain run, goes on with what it has, unless `anew`.
    """
    if rank() or anew:
        torch.manual_seed((seed * 0x9E3779B1 + rank() * 0x85EBCA77) % 2**63)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TensorFloat-32, so that an evaluation does not depend on the device."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def keep_freed_memory() -> None:
    """Keep freed memory instead of giving it back and asking for it again at every step (docs/measurements.md)."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not the GNU C library
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):  # old libraries take 32 MiB at most
        mallopt(m_trim_threshold, (1 << 31) - 1)


def get_rng_state(device: torch.device) -> dict:
    """The states of the generators of this process and of the device, in a form that a weights-only load accepts."""
    version, words, position, has_gauss, gauss = np.random.get_state()
    python_version, python_words, python_gauss = random.getstate()
    return {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [version, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "device": accelerator(device).get_rng_state() if accelerator(device) else None,
    }


def accelerator(device: torch.device):
    """torch.cuda or torch.mps, whose get_rng_state and set_rng_state mean the current device; None on a CPU."""
    return {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)


def set_rng_state(state: dict, device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    version, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((version, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if accelerator(device) and state["device"] is not None:
        accelerator(device).set_rng_state(state["device"])


def autocast(device: torch.device, precision: torch.dtype | None):
    return torch.autocast(device.type, precision) if precision else nullcontext()
