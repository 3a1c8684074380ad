"""Train all runs of a plan and collect their results: python benchmarks/reproduce.py benchmarks/plans/cpu_cifar10.ini

Run again, the command skips finished runs and resumes stopped ones, which end with the weights of runs that were never
stopped. The folder --output can be copied to another machine and continued there.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, read_options

from engine.config.option_types import boolean, float_in_range, int_at_least, path
from engine.config.parser import Parser
from engine.errors import Terminated, UserError
from engine.launch import run_main
from engine.runtime.claim import claim, read_owner, releasing_claims

POLL_SECONDS = 0.2
MAX_FAILURES = 3  # in a row; then the cause is probably not a row, but the data or the device
SAVE_SECONDS = 300.0  # for a run to save its state after SIGTERM; then it is killed, and resumes after its last epoch


def build_parser() -> Parser:
    parser = Parser(__doc__.splitlines()[0], positional="PLAN")
    parser.group("plan")
    parser.option("plan", type=path, metavar="PLAN", help="file with rows of options of train.py and their seeds")
    parser.option("--rows", nargs="+", metavar="NAME", shown="all", help="train these rows only")
    parser.option("--list", type=boolean, default=False, help="show the state of all runs, and exit")
    parser.group("time")
    parser.option(
        "--minutes",
        type=float_in_range(0.01),
        shown="until all is done",
        help="stop after this time; run again to resume",
    )
    parser.option("--jobs", type=int_at_least(1), default=1, help="runs at a time")
    parser.option(
        "--threads", type=int_at_least(1), default=1, help="CPU threads of a run; with others the last digits differ"
    )
    parser.group("data and output")
    parser.option("--data_dir", metavar="DIR", default="data", help="folder that contains the dataset")
    parser.option("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option("--output", "-o", metavar="DIR", shown="runs/PLAN", help="folder of the runs and the comparison")
    parser.option(
        "--csv",
        metavar="FILE",
        shown="results.csv in --output",
        help="table of all runs; it keeps those of other plans",
    )
    return parser


@dataclass
class Job:
    """A planned run that is being trained. process: None if another process, perhaps elsewhere, trains it."""

    planned: object
    process: subprocess.Popen | None
    log: Path

    def has_ended(self) -> bool:
        from engine.runtime.claim import is_claimed
        from engine.training.run_folder import RunFolder

        if self.process:
            return self.process.poll() is not None
        return not is_claimed(RunFolder.get_lock(self.planned.folder))

    def explain_failure(self) -> str | None:
        """Return why the run has failed, None if it has not."""
        code = self.process.returncode if self.process else 0
        if code in (0, 143):
            return None
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{self.planned.name} failed ({f'signal {-code}' if code < 0 else code}): {last}; see {self.log}"


def start_job(planned, finished_seeds: list[int], options: dict) -> Job:
    """Start or resume a run. finished_seeds: of its row; --seeds summarises them together with this one."""
    from engine.runtime.claim import is_claimed
    from engine.training.run_folder import RunFolder

    log = Path(options["output"]) / "output" / f"{planned.row.name}_seed_{planned.seed}.txt"
    if is_claimed(RunFolder.get_lock(planned.folder)):
        return Job(planned, None, log)
    words = [planned.script, *planned.row.words, "--seeds", *map(str, [*finished_seeds, planned.seed])]
    words += ["--name", planned.row.name, "--checkpoint", "auto", "--root_dir", options["output"], "--no_progress"]
    words += ["--data_dir", options["data_dir"], "--device", options["device"]]
    return Job(planned, start_process(words, log, options["threads"]), log)


def start_process(words: list[str], log: Path, threads: int) -> subprocess.Popen:
    """Start a script of the repository. words: its name and its arguments. log: file to which its output is added."""
    environment = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print("$", shlex.join(["python", *words]), file=file, flush=True)
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which then sends SIGTERM
        )


class Stop:
    """Whether to stop: after SIGTERM or Ctrl-C, or when the time is up."""

    def __init__(self, minutes: float | None):
        self.end = time.monotonic() + 60 * minutes if minutes else None
        self.signal: int | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGTERM and Ctrl-C as requests within the block."""
        before = {number: signal.signal(number, self.request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        self.signal = number

    @property
    def requested(self) -> bool:
        return self.signal is not None or self.end is not None and time.monotonic() >= self.end


def train_plan(runs: list, options: dict, stop: Stop, after_run) -> list[str]:
    """Train the runs that are not finished until all are, or until `stop`. Returns a line for each that failed;
    MAX_FAILURES in a row end the training.

    after_run(): called when a run has ended.
    """
    from plan_results import Progress, find_state

    states = {planned.folder: find_state(planned) for planned in runs}
    waiting = [planned for planned in runs if not states[planned.folder].finished]
    progress, jobs, failures, in_a_row = Progress(runs, options["jobs"]), [], [], 0
    try:
        while (waiting or jobs) and not stop.requested and in_a_row < MAX_FAILURES:
            while waiting and len(jobs) < options["jobs"]:
                planned = waiting.pop(0)
                row = [one for one in runs if one.row is planned.row and one is not planned]
                job = start_job(planned, [one.seed for one in row if find_state(one).finished], options)
                jobs.append(job)
                progress.say(f"{planned.name}: {describe_start(job)}")
            time.sleep(POLL_SECONDS)
            progress.report([job.planned for job in jobs])
            for job in [job for job in jobs if job.has_ended()]:
                jobs.remove(job)
                failure, state = job.explain_failure(), find_state(job.planned)
                if not job.process and not state.finished:
                    waiting.insert(0, job.planned)
                    continue
                failures, in_a_row = (failures + [failure], in_a_row + 1) if failure else (failures, 0)
                progress.say(failure or f"{job.planned.name}: {state.describe()}")
                after_run()
    finally:
        stop_processes([job.process for job in jobs if job.process])
    return failures


def describe_start(job: Job) -> str:
    from plan_results import find_state

    if not job.process:
        return f"another process trains it; waiting for its end (if it is gone, delete {job.planned.folder / '.lock'})"
    state = find_state(job.planned)
    return f"resumes after epoch {state.epoch} of {state.epochs}" if state.epoch else "starts"


def stop_processes(processes: list[subprocess.Popen]) -> None:
    """Let training processes save their state and end."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@releasing_claims
def main(argv: list[str] | None = None) -> list[dict]:
    """Train the runs of a plan and write the results. Returns the rows of the table of all runs."""
    parser = build_parser()
    options = read_options(parser, argv)
    stop = Stop(options["minutes"])
    options |= {key: str(Path(options[key]).resolve()) for key in ("plan", "data_dir")}
    plan = Path(options["plan"])
    output = Path(options["output"] or ROOT / "runs" / plan.stem).resolve()
    options |= {"output": str(output), "csv": Path(options["csv"] or output / "results.csv").resolve()}

    from plan import read_plan
    from plan_results import compare, find_state, format_states, write_results

    # ---- Plan ----
    runs = read_plan(plan, output)
    if unknown := set(options["rows"] or ()) - {planned.row.name for planned in runs}:
        parser.error(f"--rows {' '.join(sorted(unknown))}: no such row; --list shows them")
    for planned in runs:
        find_state(planned)  # refuses a row whose options have changed
    if options["list"]:
        print(format_states(runs))
        return []
    lock = output / ".lock"
    if not claim(lock):
        raise UserError(f"{output} is in use by {read_owner(lock)}; wait for its end, or choose another --output")

    # ---- Train ----
    chosen = [planned for planned in runs if not options["rows"] or planned.row.name in options["rows"]]
    with stop.on_signals():
        failures = train_plan(chosen, options, stop, lambda: write_results(options["csv"], plan.stem, runs))

    # ---- Results ----
    rows = write_results(options["csv"], plan.stem, runs)
    compare(runs, output / "compare")
    finished = sum(find_state(planned).finished for planned in chosen)
    print(f"{finished} of {len(chosen)} runs are finished; results in {options['csv']} and {output / 'compare'}")
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    if finished < len(chosen):
        again = "run the same command again to continue"
        if failures:
            raise UserError("\n".join([*failures, again]))
        if stop.signal:
            raise Terminated(again)
        print(again)
    return rows


if __name__ == "__main__":
    run_main(main)
