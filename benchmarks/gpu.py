"""Show on a GPU what only a GPU can show, most telling first: python benchmarks/gpu.py --minutes 12 --data_dir data

Each part is a command of its own. After each part, gpu.json and gpu.md in the folder --output hold all results so far.
The last part trains R-Mix on CIFAR-100 for the rest of the time. Run again, the command skips finished parts
and resumes the training. With --device cpu, everything runs at tiny sizes, to try the benchmark itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, read_options

from engine.config.option_types import choice, float_in_range
from engine.config.options import SMALL_DATASETS
from engine.config.parser import Parser
from engine.errors import UserError
from engine.launch import run_main
from engine.runtime.files import write_atomic

SAVE_SECONDS = 20.0  # of each call, kept for stopping the last part and saving its checkpoint
TAIL_LINES = 60  # of the output of a part that are kept
TESTS = ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Part:
    """A command, and the question that it answers. minutes: its time limit; None: the rest of the time."""

    name: str
    question: str
    command: list[str]
    minutes: float | None


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0])
    parser.group("benchmark")
    parser.option("--minutes", type=float_in_range(0.1), default=12.0, help="time for this call, in minutes")
    parser.option("--parts", nargs="+", metavar="NAME", help="run these parts, even if they are finished")
    parser.option("--data_dir", metavar="DIR", default="data", help="folder of the dataset")
    parser.option(
        "--dataset", type=choice(SMALL_DATASETS), default="cifar100", metavar="NAME", help="dataset of the training run"
    )
    parser.option("--device", metavar="DEVICE", default="cuda", help="cuda, cuda:N, or cpu for tiny sizes")
    parser.option("--output", default="gpu_report", metavar="DIR", help="folder of the report and the training run")
    return parser


def build_parts(options: dict) -> list[Part]:
    """Return all parts, the most telling first."""
    tiny, device = options["device"] == "cpu", ["--device", options["device"]]
    data = ["--dataset", options["dataset"], "--data_dir", options["data_dir"]]
    mixing = ["benchmarks/mixing.py", *device]
    network = ["--model", "resnet20", "--batch_size", "20"] if tiny else ["--model", "preactresnet18"]
    steps = ["--steps", "1", "--repeats", "1"] if tiny else ["--steps", "10", "--repeats", "20"]
    large = ["--image_size", "64", "--batch_size", "4"] if tiny else ["--image_size", "224", "--batch_size", "64"]
    train = ["train.py", *device, *data, "--model", "resnet20" if tiny else "preactresnet18"]
    step = [*train, "--method", "puzzlemix", "--profile", "2" if tiny else "30", *(["--limit", "200"] if tiny else [])]
    run = ["--method", "rmix", "--root_dir", f"{options['output']}/runs", "--name", "gpu", "--checkpoint", "auto"]
    few = ["--steps", "1" if tiny else "5", "--repeats", "0", "--method", "rmix"]
    return [
        Part("waits", "Does the host ever wait in a step?", [*TESTS, "tests/engine", "-k", "synchronises"], 1.5),
        Part("resnet50", "Do a fused optimizer and 1x1 convolutions work?", [*mixing, "--model", "resnet50", *few], 1),
        Part(
            "imagenet_resnet50",
            "The same at the size of ImageNet",
            [*mixing, "--model", "imagenet_resnet50", *large, *few],
            1,
        ),
        Part("mixing", "What does a step of each method cost?", [*mixing, *network, *steps], 2.5),
        Part(
            "kernels", "Do the kernels give what the torch solvers give?", ["-m", "pytest", "tests/mixing/kernels"], 2
        ),
        Part(
            "torch_solvers",
            "What do the kernels save?",
            [*mixing, *network, *steps, "--kernels", "torch", "--method", "puzzlemix", "comixup", "sage"],
            1.5,
        ),
        Part(
            "resume",
            "Does a deterministic run resume exactly?",
            [*TESTS, "tests/test_train.py", "-k", "resumes_exactly and (none or puzzlemix or rmix)"],
            1.5,
        ),
        Part("step", "What are the parts of a step?", step, 1),
        Part("graph_step", "What does a captured step bring?", [*step, "--graph_step", "true"], 1),
        Part("compile", "What does a compiled network bring?", [*step, "--compile", "true"], 2),
        Part("train", "R-Mix, preactresnet18, until the time is up", [*train, *run], None),
    ]


def run_part(part: Part, limit: float) -> dict:
    """Run the command of a part for at most `limit` seconds, and return its record. Its output is shown as it comes."""
    command, begin = [sys.executable, *part.command], time.monotonic()
    print(f"\n== {part.name}: {part.question} (at most {limit:.0f} s)", flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, limit)
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        code = process.wait()
    except BaseException:  # Ctrl-C, for example
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begin
    return {
        "question": part.question,
        "command": " ".join(["python", *part.command]),
        "commit": find_commit(),
        "seconds": round(seconds, 1),
        "limit": round(limit, 1),
        "result": "finished" if code == 0 else "stopped at its time limit" if seconds >= limit else f"failed ({code})",
        "output": lines[-TAIL_LINES:],
    }


def describe_machine(device: str) -> dict:
    """Return the GPU and the versions that the results depend on."""
    import torch

    found = {"device": device, "torch": torch.__version__, "CUDA": torch.version.cuda}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found |= {"GPU": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory": f"{properties.total_memory / 2**30:.0f} GiB"}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    return found


def find_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def format_report(report: dict, parts: list[Part]) -> str:
    """Return the report as Markdown: the machine, a table of all parts, and their output."""
    lines = [
        "# On a GPU",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in report["machine"].items()),
    ]
    lines += ["", "| part | question | result | seconds |", "|---|---|---|---|"]
    for part in parts:
        record = report["parts"].get(part.name, {"result": "not yet run", "seconds": ""})
        lines.append(f"| {part.name} | {part.question} | {record['result']} | {record['seconds']} |")
    for name, record in report["parts"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"`{record['command']}`, commit {record['commit']}",
            "",
            "```text",
            *record["output"],
            "```",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    begin, parser = time.monotonic(), build_parser()
    options = read_options(parser, argv)
    options |= {key: str(Path(options[key]).resolve()) for key in ("data_dir", "output")}  # parts run in the repository
    parts, folder = build_parts(options), Path(options["output"])
    if unknown := set(options["parts"] or ()) - {part.name for part in parts}:
        parser.error(f"--parts {' '.join(unknown)}: choose from {', '.join(part.name for part in parts)}")
    check_device_and_data(options)
    folder.mkdir(parents=True, exist_ok=True)
    report = read_report(folder / "gpu.json", describe_machine(options["device"]))
    for part in parts:
        finished = report["parts"].get(part.name, {}).get("result") == "finished"
        left = 60 * options["minutes"] - SAVE_SECONDS - (time.monotonic() - begin)
        if finished and not options["parts"] or options["parts"] and part.name not in options["parts"]:
            continue
        if left <= 0:
            break
        report["parts"][part.name] = run_part(part, min(left, 60 * (part.minutes or options["minutes"])))
        for name, text in (("gpu.json", json.dumps(report, indent=1)), ("gpu.md", format_report(report, parts))):
            write_atomic(folder / name, lambda side, text=text: side.write_text(text))
    results = {part.name: report["parts"].get(part.name, {}).get("result", "not yet run") for part in parts}
    print(f"\nreport: {folder / 'gpu.md'}; " + "; ".join(f"{name}: {result}" for name, result in results.items()))
    if set(results.values()) != {"finished"}:
        print("run the same command again to finish the rest")
    return report


def check_device_and_data(options: dict) -> None:
    """Raise UserError now, and not after ten minutes, if the device or the data is missing."""
    from engine.data.datasets import load_data
    from engine.runtime.device import choose_device

    choose_device(options["device"])
    load_data(options["dataset"], limit=100, data_dir=options["data_dir"])


def read_report(path: Path, machine: dict) -> dict:
    """Return the report of earlier calls, or an empty one. Raises UserError if it is of another machine."""
    if not path.exists():
        return {"machine": machine, "parts": {}}
    report = json.loads(path.read_text())
    if report["machine"] != machine:
        changed = [key for key in machine if report["machine"].get(key) != machine[key]]
        values = ", ".join(f"{key} {report['machine'].get(key)} -> {machine[key]}" for key in changed)
        raise UserError(f"{path} is the report of another machine ({values})\ngive another folder with --output")
    return report


if __name__ == "__main__":
    run_main(main)
