"""Device and precision of a run, its random generators, and the settings of the backends."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.runtime import distributed
from engine.runtime.device import (
    choose_device,
    choose_precision,
    disable_tf32,
    get_rng_state,
    get_tf32,
    keep_freed_memory,
    set_rng_state,
    set_tf32,
    setup_backends,
)

CPU = torch.device("cpu")


def test_errors_explain_unavailable_devices_and_precisions():
    assert choose_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device; torch"):
            choose_device("cuda")
    with pytest.raises(UserError, match="auto, cpu"):
        choose_device("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0), "set_device needs an index"
        assert choose_device("cuda:1").index == 1
        for name, value in (("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
            patch.setenv(name, value)
        with pytest.raises(UserError, match="2 CUDA devices, counted from 0, for 3 processes"):
            choose_device("auto")  # the main process, which prints the errors, raises it too
    with pytest.raises(UserError, match="bf16 or off"):
        choose_precision("fp16", CPU)
    assert choose_precision("off", CPU)[0] is None and choose_precision("bf16", CPU)[0] is torch.bfloat16
    dtype, text = choose_precision("auto", CPU)
    assert (dtype is torch.bfloat16) == text.startswith("bfloat16")
    keep_freed_memory()


def test_rng_state_is_restored_exactly(tmp_path):
    torch.save(get_rng_state(CPU), tmp_path / "rng.pt")
    first = torch.rand(3), np.random.rand(3), random.random()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), CPU)
    assert (
        torch.equal(first[0], torch.rand(3)) and (first[1] == np.random.rand(3)).all() and first[2] == random.random()
    )


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_process_that_sees_one_gpu_takes_it(monkeypatch, local_rank):
    """As under Slurm with --gpus-per-task 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 0)


def test_processes_that_share_a_gpu_are_refused(monkeypatch):
    """As under torchrun on a machine with one GPU: all processes see the same one."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    gpus = ["GPU-b", "GPU-a", "GPU-a"]
    monkeypatch.setattr(distributed, "all_gather_object", lambda own: gpus)
    with pytest.raises(UserError, match=r"processes 1 and 2 have the same GPU \(GPU-a\).*\nlower --nproc_per_node"):
        distributed.check_own_gpus(torch.device("cuda", 0))
    distributed.check_own_gpus(CPU)
    gpus[2] = "GPU-c"
    distributed.check_own_gpus(torch.device("cuda", 0))


@pytest.fixture
def kept_tf32():
    """Restore the TF32 settings after the test."""
    before = get_tf32()
    yield
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.fp32_precision = "none"
    set_tf32(*before)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has the older flags only")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_set_where_other_code_has_set_the_newer_options(kept_tf32, precision):
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision
    with disable_tf32():  # a library call, before any setup_backends()
        assert get_tf32() == (False, False)
        read_older_flags(False)
    assert get_tf32() == (precision == "tf32",) * 2
    for deterministic in (False, True):
        torch.backends.fp32_precision = precision
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
            patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that setup_backends() leaves no trace
            setup_backends(CPU, seed=0, deterministic=deterministic)
        read_older_flags(not deterministic)
        with disable_tf32():
            read_older_flags(False)
        assert get_tf32() == (not deterministic,) * 2
        read_older_flags(not deterministic)


def read_older_flags(expected: bool) -> None:
    """Check the flags that torch.compile reads. torch raises an error if they disagree with the newer options."""
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is expected
    conv = torch.backends.cudnn.conv.fp32_precision
    assert conv == torch.backends.cuda.matmul.fp32_precision == ("tf32" if expected else "ieee")
