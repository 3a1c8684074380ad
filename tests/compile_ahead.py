"""Compile Triton kernels for GPUs that need not be there, and read from the machine code what a program of each needs.

The tests of a kernel family make a Build for each variant of their kernels and hand all of them to compile_ahead() at
once. It compiles in another process, because the tests themselves run kernels interpreted where there is no GPU.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field

import pytest
from support import ROOT

CAPABILITIES = (80, 90, 100)  # A100; H100 and H200; B200
REGISTERS = 65_536  # of a multiprocessor
SHARED_KILOBYTES = {80: 164, 90: 228, 100: 228}  # of a multiprocessor
MAX_WARPS, MAX_PROGRAMS = 64, 32  # on a multiprocessor


@dataclass(frozen=True)
class Build:
    """One variant of a kernel.

    kernel: the function. signature: types of its arguments, without the constants, such as {"x": "*fp32", "n": "i32"};
    pointers count as aligned to 16 bytes, as torch allocates tensors. constants: values of its tl.constexpr arguments.
    warps: of 32 threads. capability: of the GPU, times 10. options: others of the compiler.
    """

    kernel: object
    signature: dict[str, str]
    constants: dict[str, int | float | bool] = field(default_factory=dict)
    warps: int = 4
    capability: int = 90
    options: dict[str, bool | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What a program needs: registers per thread, spilled bytes per thread, bytes of shared memory; its instructions.

    loops: the instructions of each innermost loop, in the order of the code.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    loops: list[int]
    warps: int
    capability: int

    @property
    def resident(self) -> int:
        """The number of programs that run on a multiprocessor at the same time."""
        per_warp = -(-self.registers // 8) * 8 * 32  # registers are handed out in units of 8 per thread
        by_shared = SHARED_KILOBYTES[self.capability] * 1024 // (self.shared + 1024)  # 1 KB is for the system
        return min(REGISTERS // per_warp // self.warps, by_shared, MAX_WARPS // self.warps, MAX_PROGRAMS)


def compile_ahead(builds: list[Build]) -> list[Usage]:
    """Compile all builds, about 2 s each. Skips the test where Triton or its tools for NVIDIA GPUs are missing."""
    pytest.importorskip("triton")
    from triton import knobs

    for tool in (knobs.nvidia.ptxas, knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm):
        try:
            tool.path  # noqa: B018  (it raises if the tool is missing)
        except RuntimeError as error:
            pytest.skip(str(error))
    jobs = [vars(build) | {"kernel": [build.kernel.fn.__module__, build.kernel.fn.__name__]} for build in builds]
    compiler = start_compiler()
    print(json.dumps(jobs), file=compiler.stdin, flush=True)
    answer = json.loads(compiler.stdout.readline())
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return [Usage(**usage) for usage in answer["usages"]]


@functools.cache
def start_compiler() -> subprocess.Popen:
    """Start the process that compiles until its input ends, with this process. It imports torch once for all tests."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)


# ---- In the other process ----


def compile_kernel(
    kernel: list[str], signature: dict, constants: dict, warps: int, capability: int, options: dict
) -> Usage:
    """Compile one variant. kernel: module and name."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel[0]), kernel[1])
    types = {name: "constexpr" if name in constants else signature[name] for name in function.arg_names}
    pointers = [place for place, type_ in enumerate(types.values()) if type_.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
    source = ASTSource(function, types, constants, aligned)
    options = {"num_warps": warps, **options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled, instructions, loops = read_machine_code(compiled.asm["cubin"])
    return Usage(registers, spilled, compiled.metadata.shared, instructions, loops, warps, capability)


def read_machine_code(cubin: bytes) -> tuple[int, int, int, list[int]]:
    """Return registers, spilled bytes, instructions and the instructions of the innermost loops."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, code = (
            subprocess.run([tool.path, *words, file.name], capture_output=True, text=True, check=True).stdout
            for tool, words in ((knobs.nvidia.cuobjdump, ["-res-usage"]), (knobs.nvidia.nvdisasm, ["-c"]))
        )
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", used)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, *count_instructions(code)


def count_instructions(code: str) -> tuple[int, list[int]]:
    """Return the number of instructions of disassembled code, and of each innermost loop, from label to branch back."""
    labels, loops, count = {}, [], 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
            if branch and labels.get(branch[1], count) < count - 1:  # not a branch to itself, which ends the code
                loops.append((labels[branch[1]], count))
    inner = [one for one in loops if not any(one[0] <= other[0] and other[1] < one[1] for other in loops)]
    return count, [end - start for start, end in inner]


def answer(jobs: list[dict]) -> dict:
    try:
        return {"usages": [asdict(compile_kernel(**job)) for job in jobs]}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
