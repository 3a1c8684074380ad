"""Check that killed runs resume exactly: python benchmarks/kills.py --kills 20

Trains each method twice: once without interruption, and once killed (SIGKILL) at random times and resumed with
`--checkpoint auto` until it is done. Every other kill is timed to hit a save. At the end, all tensors and all rows of
the log of the two runs must be equal.
"""

import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, read_options

from engine.config.option_types import int_at_least
from engine.config.parser import Parser
from engine.errors import UserError
from engine.launch import run_main
from mixing import MIXERS

TIMES = {"seconds", "images_per_second", "mixing_seconds", "saliency_seconds", "peak_memory_mb"}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.option("--kills", type=int_at_least(1), default=20, help="total number of kills")
    parser.option(
        "--method",
        nargs="+",
        default=["none", "mixup", "manifold", "cutmix", "saliencymix"],
        metavar="NAME",
        help="mixing methods",
    )
    parser.option("--epochs", type=int_at_least(2), default=8, help="epochs per run")
    parser.option("--seed", type=int_at_least(), default=0, help="seed of the times of the kills")
    options = read_options(parser, argv)
    rng, done = random.Random(options["seed"]), 0
    unknown = set(options["method"]) - MIXERS.keys()
    if unknown:
        parser.error(f"--method {' '.join(unknown)}: unknown method (choose from {', '.join(MIXERS)})")
    with tempfile.TemporaryDirectory() as folder:
        for number, method in enumerate(options["method"]):
            share = options["kills"] * (number + 1) // len(options["method"]) - done
            during_saves = compare(method, share, options["epochs"], Path(folder), rng)
            done += share
            print(
                f"{method}: {share} kills, {during_saves} during a save; weights, optimizer state and log are equal",
                flush=True,
            )
    print(f"{done} kills; all runs are equal to uninterrupted ones")


def compare(method: str, kills: int, epochs: int, root: Path, rng: random.Random) -> int:
    """Compare the two runs of a method; return how many kills hit a save. Raises UserError if the runs differ."""
    import torch

    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "shapes", "--limit", "600", "--method", method]
    command += ["--epochs", str(epochs), "--vis_epoch", "0", "--no_progress", "--root_dir", str(root)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin = time.monotonic()
    subprocess.run([*command, "--name", f"{method}_whole"], check=True, **quiet)
    epoch_time = (time.monotonic() - begin) / (epochs + 3)  # start-up takes about as long as three epochs
    runs = root / "shapes" / "resnet20"
    whole_run, killed_run = runs / f"{method}_whole", runs / f"{method}_killed"
    resume_command = [*command, "--name", killed_run.name, "--checkpoint", "auto"]
    killed = during_saves = 0
    while killed < kills:
        side_files = ".last.pt.part*" if killed % 4 == 1 else ".best.pt.part*"
        process = subprocess.Popen(resume_command, **quiet)
        end = time.monotonic() + rng.uniform(1, 3 + epochs / kills) * epoch_time
        hit = False
        while not hit and process.poll() is None and (killed % 2 or time.monotonic() < end):
            hit = killed % 2 and any(killed_run.glob(side_files)) and rng.random() < 0.3
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed, during_saves = killed + 1, during_saves + bool(hit)
        else:  # the run finished before the kill: start it again
            shutil.rmtree(killed_run)
    subprocess.run(resume_command, check=True, **quiet)
    one, two = (torch.load(run / "last.pt", weights_only=True) for run in (whole_run, killed_run))
    for part in ("model", "optimizer", "scheduler", "rng", "method", "best"):
        if not same_state(one[part], two[part]):
            raise UserError(f"{method}: {part} differs after {kills} kills")
    if read_log(whole_run) != read_log(killed_run):
        raise UserError(f"{method}: log.csv differs after {kills} kills")
    return during_saves


def same_state(a, b) -> bool:
    """Return whether two nested states are equal, bit for bit."""
    if hasattr(a, "equal"):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def read_log(run: Path) -> list[dict]:
    """Return the rows of log.csv without the columns that hold times."""
    with open(run / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


if __name__ == "__main__":
    run_main(main)
