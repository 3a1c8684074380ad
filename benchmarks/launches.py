"""Count the launches of a training step of every method: python benchmarks/launches.py

No GPU is needed: the steps run on a fake CUDA device, whose tensors have no values (tests/fake_cuda.py). An operation
of torch counts as one launch, and so do a Triton kernel and the replay of a CUDA graph; views and allocations do not
count. `waits` says how often the host waits for the device. PreActResNet-18, batch 100, 32 pixels, bfloat16.
"""

import sys
import warnings

from common import ROOT, read_options

from engine.config.option_types import choice
from engine.config.parser import Parser
from engine.drawing.tables import format_markdown
from engine.errors import UserError
from engine.launch import run_main

KERNELS = {"auto": "those of a GPU that runs Triton", "torch": "none, torch solvers"}


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--method", nargs="+", metavar="NAME", shown="all", help="methods, as puzzlemix or 'puzzlemix 8'")
    parser.option("--kernels", type=choice(KERNELS), default="auto", metavar="MODE", help="auto or torch (solvers)")
    return parser


def main(argv: list[str] | None = None) -> dict[str, dict[str, int]]:
    options = read_options(build_parser(), argv)
    sys.path.insert(0, str(ROOT / "tests"))
    from fake_cuda import find_obstacle

    if obstacle := find_obstacle():
        raise UserError(f"no fake CUDA device: {obstacle}")
    from cuda_steps import PHASES, ROWS, count_row

    wanted = options["method"] or list(ROWS)
    rows = [row for row in ROWS if row in wanted or row.split()[0] in wanted]
    if unknown := [name for name in wanted if not any(name in (row, row.split()[0]) for row in rows)]:
        raise UserError(f"--method {unknown[0]}: unknown; choose from {', '.join(ROWS)}")
    warnings.simplefilter("ignore")
    result, cells = {}, [["launches per step", *PHASES, "total", "waits"]]
    for row in rows:
        counter = count_row(row, kernels=options["kernels"])
        result[row] = {**counter.launches, "total": sum(counter.launches.values()), "waits": counter.waits}
        cells.append([row, *(f"{number:,}" for number in result[row].values())])
    print(format_markdown(cells))
    return result


if __name__ == "__main__":
    run_main(main)
