"""Test the ImageNet workflow on a small dataset: python benchmarks/flow.py --dataset tiny-imagenet --data_dir DIR

Makes resized copies and trains in three short phases, once without a break and once with a SIGTERM in the middle of
every phase, then evaluates; with one process and with several. Prints the training loss of each epoch, and whether the
final weights of the two runs are equal.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, read_options

from engine.config.option_types import choice, float_in_range, int_at_least
from engine.config.options import LARGE_DATASETS
from engine.config.parser import Parser
from engine.config.phases import parse_phases
from engine.errors import UserError
from engine.launch import run_main
from mixing import MIXERS

QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--data_dir", metavar="DIR", default="data", help="folder of the dataset")
    parser.option("--val_data_dir", metavar="DIR", help="separate folder of the evaluation images")
    parser.option(
        "--dataset", type=choice(LARGE_DATASETS), default="folder", metavar="NAME", help="name of the dataset"
    )
    parser.option("--num_classes", type=int_at_least(2), help="number of classes, if the data is a part of ImageNet")
    parser.option("--method", type=choice(MIXERS), default="rmix", metavar="NAME", help="mixing method")
    parser.option("--model", default="resnet18", metavar="NAME", help="network architecture")
    parser.option("--small", type=int_at_least(8), default=40, help="shorter side of the small copies")
    parser.option("--large", type=int_at_least(8), default=80, help="shorter side of the large copies")
    parser.option("--image_size", type=int_at_least(8), default=64, help="side of the evaluation images in pixels")
    parser.option(
        "--phases",
        metavar="PHASES",
        default="2:small:32:0.25:128,4:large:64:0.25:64,6:large:64:0.25:64",
        help="see imagenet_train.py",
    )
    parser.option("--lr", type=float_in_range(), default=0.05, help="learning rate at the start of each phase")
    parser.option(
        "--processes", type=int_at_least(1), nargs="+", default=[1, 2], metavar="N", help="numbers of processes to test"
    )
    parser.option("--workers", type=int_at_least(), default=2, help="image workers per process")
    parser.option(
        "--wait", type=float_in_range(), default=3.0, help="seconds between the start of a phase and its SIGTERM"
    )
    parser.option("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option("--work_dir", default="flow", metavar="DIR", help="folder for copies and runs; it is not deleted")
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = build_parser()
    options = read_options(parser, argv)
    flow = Flow(options)
    flow.resize()
    return {count: flow.compare_runs(count) for count in options["processes"]}


class Flow:
    """The commands of the workflow, for one set of options."""

    def __init__(self, options: dict):
        self.options, self.work = options, Path(options["work_dir"])
        self.phases = parse_phases(options["phases"])
        self.words = ["--dataset", options["dataset"], "--data_dir", options["data_dir"], "--device", options["device"]]
        for key in ("val_data_dir", "num_classes"):
            self.words += [f"--{key}", str(options[key])] if options[key] else []

    def call(self, *words, processes: int = 1, wait: bool = True) -> subprocess.Popen:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command = [*launcher, *map(str, words)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if wait else QUIET
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **output)
        if not wait:
            return process
        text, _ = process.communicate()
        if process.returncode:
            raise UserError(f"{' '.join(command)}\nfailed with exit code {process.returncode}:\n{text[-2000:]}")
        self.output = text
        return process

    def resize(self) -> None:
        begin = time.perf_counter()
        sizes = [self.options["small"], self.options["large"]]
        words = ["--data_dir", self.options["data_dir"], "--resize_to", *sizes, "--resize_dest", self.work / "copies"]
        self.call("imagenet_train.py", *words)
        print(f"copies: {self.output.strip().splitlines()[0]} ({time.perf_counter() - begin:.1f} s with start-up)")

    def train(self, name: str, processes: int, *words, wait: bool = True) -> subprocess.Popen:
        copies = {size: self.work / "copies" / str(self.options[size]) for size in ("small", "large")}
        given = ["--recipe", "fast100", "--method", self.options["method"], "--model", self.options["model"]]
        given += ["--data_small", copies["small"], "--data_large", copies["large"], "--phases", self.options["phases"]]
        given += ["--lr_points", self.build_lr_points(), "--image_size", self.options["image_size"], *self.words]
        given += ["--workers", self.options["workers"], "--root_dir", self.work / "runs", "--name", name]
        return self.call("imagenet_train.py", *given, "--no_progress", *words, processes=processes, wait=wait)

    def build_lr_points(self) -> str:
        """Return --lr_points: in every phase the rate falls from lr to a fifth of it, in the last to a hundredth."""
        lr, begin, points = self.options["lr"], 0, []
        for phase in self.phases:
            end = lr / (100 if phase is self.phases[-1] else 5)
            points += [f"{begin}:{lr:g}", f"{phase.end}:{end:g}"]
            begin = phase.end
        return ",".join(points)

    def run_folder(self, name: str) -> Path:
        return self.work / "runs" / self.options["dataset"] / f"imagenet_{self.options['model']}" / name

    def compare_runs(self, count: int) -> dict:
        """Train without a break, train again with a stop in every phase, compare the two runs, and evaluate."""
        import torch

        whole, stopped = f"whole_{count}", f"stopped_{count}"
        for name in (whole, stopped):
            shutil.rmtree(self.run_folder(name), ignore_errors=True)
        self.train(whole, count)
        stops = [self.stop_in(phase, stopped, count) for phase in range(len(self.phases))]
        self.train(stopped, count, "--checkpoint", "auto")
        one, other = (torch.load(self.run_folder(name) / "last.pt", weights_only=True) for name in (whole, stopped))
        equal = all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
        place = ["--dataset", self.options["dataset"], "--data_dir", self.options["data_dir"]]
        self.call("evaluate.py", "--model_path", self.run_folder(whole) / "last.pt", *place, processes=count)
        line = next(line for line in self.output.splitlines() if line.startswith("Top-1"))
        losses = [round(row["train_loss"], 3) for row in one["history"]]
        print(
            f"{count} process{'es' * (count > 1)}: train loss {' '.join(map(str, losses))}; stopped after steps "
            f"{stops}, weights {'equal' if equal else 'DIFFER'}; {line}"
        )
        return {"losses": losses, "equal": equal, "stops": stops, "top1": one["history"][-1]["test_top1"]}

    def stop_in(self, number: int, name: str, count: int) -> int:
        """Resume the run, send SIGTERM in the middle of a phase, and return the step at which the run stopped."""
        import torch

        last = self.run_folder(name) / "last.pt"
        begin = self.phases[number - 1].end if number else 0
        process = self.train(name, count, "--checkpoint", "auto", wait=False)
        log, marker = self.run_folder(name) / "log.txt", f"epoch {begin}/" if number else f"phase {len(self.phases)}:"
        while process.poll() is None and not (log.is_file() and marker in log.read_text()):
            time.sleep(0.1)
        time.sleep(self.options["wait"])
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        return torch.load(last, weights_only=True)["step"]


if __name__ == "__main__":
    run_main(main)
