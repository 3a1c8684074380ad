"""Does a run survive being killed? python benchmarks/kills.py --kills 20

Trains each method once in peace, and once killed (SIGKILL) at random moments, every other time during a save, and
continued with `--checkpoint auto` until it is done. Then every tensor and every log row of the two must be equal.
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
    parser.option("--kills", type=int_at_least(1), default=20, help="in all")
    parser.option("--method", nargs="+", default=["none", "mixup", "manifold", "cutmix", "saliencymix"], metavar="NAME")
    parser.option("--epochs", type=int_at_least(2), default=8)
    parser.option("--seed", type=int_at_least(), default=0, help="of the moments")
    options = read_options(parser, argv)
    moments, done = random.Random(options["seed"]), 0
    unknown = set(options["method"]) - MIXERS.keys()
    if unknown:
        parser.error(f"--method {' '.join(unknown)}: there are {', '.join(MIXERS)}")
    with tempfile.TemporaryDirectory() as folder:
        for number, method in enumerate(options["method"]):
            share = options["kills"] * (number + 1) // len(options["method"]) - done
            during_saves = compare(method, share, options["epochs"], Path(folder), moments)
            done += share
            print(
                f"{method}: {share} kills, {during_saves} of them during a save; weights, optimizer and log equal",
                flush=True,
            )
    print(f"{done} kills, all runs ended equal")


def compare(method: str, kills: int, epochs: int, root: Path, moments: random.Random) -> int:
    """Raises UserError where the two runs differ; returns how many kills hit a save."""
    import torch

    command = [sys.executable, str(ROOT / "train.py"), "--dataset", "shapes", "--limit", "600", "--method", method]
    command += ["--epochs", str(epochs), "--vis_epoch", "0", "--no_progress", "--root_dir", str(root)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begin = time.monotonic()
    subprocess.run([*command, "--name", f"{method}_whole"], check=True, **quiet)
    epoch_time = (time.monotonic() - begin) / (epochs + 3)  # starting up takes about as long as three epochs
    runs = root / "shapes" / "resnet20"
    whole_run, killed_run = runs / f"{method}_whole", runs / f"{method}_killed"
    go_on = [*command, "--name", killed_run.name, "--checkpoint", "auto"]
    killed = during_saves = 0
    while killed < kills:
        side = killed_run / (".last.pt.part" if killed % 4 == 1 else ".best.pt.part")
        process = subprocess.Popen(go_on, **quiet)
        end = time.monotonic() + moments.uniform(1, 3 + epochs / kills) * epoch_time
        hit = False
        while not hit and process.poll() is None and (killed % 2 or time.monotonic() < end):
            hit = killed % 2 and side.exists() and moments.random() < 0.3
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed, during_saves = killed + 1, during_saves + bool(hit)
        else:  # it was done before: that was no kill, so begin anew
            shutil.rmtree(killed_run)
    subprocess.run(go_on, check=True, **quiet)
    one, two = (torch.load(run / "last.pt", weights_only=True) for run in (whole_run, killed_run))
    for part in ("model", "optimizer", "scheduler", "rng", "method", "best"):
        if not equal(one[part], two[part]):
            raise UserError(f"{method}: {part} differs after {kills} kills")
    if log_of(whole_run) != log_of(killed_run):
        raise UserError(f"{method}: log.csv differs after {kills} kills")
    return during_saves


def equal(a, b) -> bool:
    if hasattr(a, "equal"):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def log_of(run: Path) -> list[dict]:
    with open(run / "log.csv") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


if __name__ == "__main__":
    run_main(main)
