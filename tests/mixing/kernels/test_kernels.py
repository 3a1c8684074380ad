"""Where Triton kernels run, and what happens where they cannot."""

import sys

import pytest
import torch
from compile_ahead import CAPABILITIES, Build, compile_ahead, count_instructions

import train
from mixing import PuzzleMix, kernels, note_torch_solvers

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU on which the test kernel runs; returns a function that changes what happens."""
    pytest.importorskip("triton")
    from mixing.kernels import probe

    def set_up(capability=(9, 0), failure=None):
        def run(device):
            if failure:
                raise failure

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(probe, "run_probe", run)
        kernels.find_obstacle.cache_clear()

    set_up()
    yield set_up
    kernels.find_obstacle.cache_clear()


def test_kernels_run_on_cuda_and_nowhere_else(gpu):
    assert kernels.use_kernels("auto", CUDA) and kernels.use_kernels("triton", CUDA)
    assert not kernels.use_kernels("torch", CUDA) and not kernels.use_kernels("auto", CPU)
    assert note_torch_solvers(["puzzlemix"], "auto", CUDA) == []


@pytest.mark.parametrize(
    "trouble, words",
    [
        ({"capability": (6, 1)}, "compute capability 6.1, and Triton needs 7.0"),
        ({"failure": PermissionError(13, "Permission denied: '.triton'")}, "Permission denied"),
        ({"failure": RuntimeError("Failed to find C compiler.\nmore")}, "RuntimeError: Failed to find C compiler.)"),
    ],
)
def test_where_kernels_cannot_run_the_torch_solvers_do_and_one_line_says_why(gpu, trouble, words):
    gpu(**trouble)
    assert not kernels.use_kernels("auto", CUDA)
    (note,) = note_torch_solvers(["puzzlemix", "rmix"], "auto", CUDA)
    assert words in note and "\n" not in note
    assert note_torch_solvers(["rmix"], "auto", CUDA) == [] == note_torch_solvers(["sage"], "torch", CUDA)
    with pytest.raises(ValueError, match="use auto or torch"):
        kernels.use_kernels("triton", CUDA)


def test_an_old_triton_is_not_used(gpu, monkeypatch):
    """The test kernel runs there, but the others do not compile."""
    monkeypatch.setattr("mixing.kernels.probe.VERSION", (3, 3))
    (note,) = note_torch_solvers(["puzzlemix"], "auto", CUDA)
    assert "triton 3.3 is too old; the kernels need 3.4, which comes with torch 2.8" in note


def test_without_triton_the_torch_solvers_run(gpu, monkeypatch):
    monkeypatch.delitem(sys.modules, "mixing.kernels.probe")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in note_torch_solvers(["sage"], "auto", CUDA)[0]


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="kernels must be auto, triton or torch, got 'cuda'"):
        PuzzleMix(kernels="cuda")


def test_triton_kernels_on_a_cpu_are_a_usage_error(tmp_path, capsys):
    words = ["--dataset", "shapes", "--method", "puzzlemix", "--kernels", "triton", "--device", "cpu", "--epochs", "1"]
    with pytest.raises(SystemExit) as stop:
        train.main([*words, "--limit", "48", "--root_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert (
        "kernels triton: Triton kernels need a CUDA device, and this is cpu; use auto or torch"
        in capsys.readouterr().err
    )


def test_the_test_kernel_runs():
    pytest.importorskip("triton")
    from mixing.kernels.probe import run_probe

    run_probe(CUDA if torch.cuda.is_available() else CPU)


def test_the_test_kernel_compiles_for_all_gpus():
    pytest.importorskip("triton")
    from mixing.kernels.probe import add_one

    for usage in compile_ahead([Build(add_one, {"values": "*fp32"}, {"COUNT": 32}, 1, gpu) for gpu in CAPABILITIES]):
        assert usage.spilled == usage.shared == 0 and usage.registers <= 32 and usage.resident == 32
        assert 0 < usage.instructions < 100 and usage.loops == []


def test_innermost_loops_are_counted_from_label_to_branch():
    line = "        /*0{:03x}*/                   {} ;"
    words = ["MOV", ".L_x_0:", "FADD", ".L_x_1:", "FMUL", "FADD", "@P0 BRA `(.L_x_1)", "BRA `(.L_x_0)", "EXIT"]
    words += [".L_x_2:", "BRA `(.L_x_2)", "NOP"]
    code = [word if word.startswith(".") else line.format(16 * place, word) for place, word in enumerate(words)]
    assert count_instructions("\n".join(code)) == (9, [3])
