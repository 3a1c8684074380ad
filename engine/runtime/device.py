"""Choose device and precision, seed the generators, and set the backends for speed or for exactness."""

import ctypes
import os
import platform
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.runtime.distributed import local_world_size, rank, rank_environment
from engine.runtime.text import format_count

# CPU features, by their Linux names, with which bfloat16 runs faster than float32
FAST_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def choose_device(name: str) -> torch.device:
    """Return the device for --device: auto, cpu, cuda, cuda:N or mps.

    auto is cuda if there is a GPU, else cpu. With several processes, cuda is the GPU whose index is the local rank. A
    process that sees a single GPU takes that one, since job schedulers show each process its own; init_processes()
    checks that no two share it. Raises UserError if the device does not exist.
    """
    _, world_size, local_rank = rank_environment()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    num_gpus = torch.cuda.device_count()
    if name == "cuda":
        name = f"cuda:{0 if num_gpus == 1 else local_rank}"  # some torch functions, such as set_device, need the index
    elif world_size > 1 and name != "cpu":
        raise UserError(f"--device {name}: with several processes, use --device auto, cuda or cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown device; choose auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        build = (
            f"is built for CUDA {torch.version.cuda} but finds no driver or GPU"
            if torch.version.cuda
            else "is built without CUDA"
        )
        raise UserError(f"--device {name}: no CUDA device; torch {torch.__version__} {build}; use --device cpu")
    needed = max(device.index + 1, local_world_size() if num_gpus > 1 else 1) if device.type == "cuda" else 0
    if needed > num_gpus:  # the same error in all processes of the machine: the first one prints it
        gpus = f"there are {num_gpus} CUDA devices, counted from 0"
        if world_size > 1:
            gpus += f", for {local_world_size()} processes; start fewer with --nproc_per_node"
        raise UserError(f"--device {name}: {gpus}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: not available on this machine; use --device cpu")
    return device


def cpu_has_fast_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return bool(FAST_BF16_FLAGS & set(flags))


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the autocast dtype for --amp (None: float32), and its description for the log.

    auto is bfloat16 if the device computes faster in it than in float32. Raises UserError for fp16 on a CPU.
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = device.type == "cpu" and cpu_has_fast_bf16()
        if fast:
            return torch.bfloat16, "bfloat16 (fast on this device)"
        return None, "float32 (bfloat16 is not fast on this device)"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    return {"off": (None, "float32"), "bf16": (torch.bfloat16, "bfloat16"), "fp16": (torch.float16, "float16")}[name]


def describe_machine(device: torch.device) -> str:
    """Return the name of the GPU, or that of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{find_processor()}, {format_count(torch.get_num_threads(), 'thread')}"


def find_processor() -> str:
    """Return the name of the processor, or its architecture where the system does not name it."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def setup_backends(device: torch.device, *, seed: int, deterministic: bool) -> None:
    """Seed Python, numpy and torch, and set the backends for speed or, if deterministic, for bit-exact results."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    set_tf32(not deterministic, not deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before cuBLAS starts
        torch.use_deterministic_algorithms(True)


def seed_rank_generator(seed: int, *, include_main: bool = False) -> None:
    """Seed torch's generator differently in each process. Otherwise all would draw the same lam and the same box.

    The main process, and so a run of a single process, keeps the state of its generator unless include_main.
    """
    if rank() or include_main:
        torch.manual_seed((seed * 0x9E3779B1 + rank() * 0x85EBCA77) % 2**63)


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Compute without TensorFloat-32 in the block, so that an evaluation does not depend on the device."""
    before = get_tf32()
    set_tf32(False, False)
    try:
        yield
    finally:
        set_tf32(*before)


def get_tf32() -> tuple[bool, bool]:
    """Return whether matrix products and convolutions may compute in TensorFloat-32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9: the older flags cannot be read once other code has set these
        return matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
    return matmul.allow_tf32, cudnn.allow_tf32


def set_tf32(matmul: bool, convolution: bool) -> None:
    """Set whether matrix products and convolutions may compute in TensorFloat-32.

    Since torch 2.9 each operation has a setting of its own, which wins over the older flags. torch.compile still reads
    the flags, and torch raises an error where the two disagree. So both are set.
    """
    cudnn = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32 = matmul, convolution
    if hasattr(cudnn, "conv"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if matmul else "ieee"
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if convolution else "ieee"


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for reuse. By default it returns large blocks to the system and requests
    them again at every step, which takes time (docs/measurements.md).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # the C library is not glibc
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):  # old versions allow at most 32 MiB
        mallopt(m_trim_threshold, (1 << 31) - 1)


def get_rng_state(device: torch.device) -> dict:
    """Return the states of the Python, numpy and torch generators, that of the device included, in types that
    torch.load(weights_only=True) accepts.
    """
    version, words, position, has_gauss, gauss = np.random.get_state()
    python_version, python_words, python_gauss = random.getstate()
    return {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [version, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "device": get_accelerator(device).get_rng_state() if get_accelerator(device) else None,
    }


def get_accelerator(device: torch.device):
    """Return torch.cuda or torch.mps, whose rng functions act on the current device; None for a CPU."""
    return {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore what get_rng_state() returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    version, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((version, words.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if get_accelerator(device) and state["device"] is not None:
        get_accelerator(device).set_rng_state(state["device"])


def autocast(device: torch.device, precision: torch.dtype | None):
    """Return the autocast context of a precision; None, float32, is a context that does nothing."""
    return torch.autocast(device.type, precision) if precision else nullcontext()
