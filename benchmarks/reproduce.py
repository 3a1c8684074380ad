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
from engine.errors import Terminated, UserError, suggest_closest
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
        help="stop after this many minutes; run again to resume",
    )
    parser.option("--jobs", type=int_at_least(1), default=1, help="runs at a time")
    parser.option(
        "--threads",
        type=int_at_least(1),
        default=1,
        help="CPU threads of a run; another number changes the last digits",
    )
    parser.group("data and output")
    parser.option("--data_dir", metavar="DIR", default="data", help="folder that contains the dataset")
    parser.option("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option("--output", "-o", metavar="DIR", shown="runs/PLAN", help="folder of the runs and the comparison")
    parser.option(
        "--csv",
        metavar="FILE",
        shown="results.csv in --output",
        help="table of all runs; lines of other plans in it stay",
    )
    parser.option("--debug", type=boolean, default=False, help="show the traceback of an error")
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
        status = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        return f"{self.planned.name} {status}: {self.read_error()}; see {self.log}"

    def read_error(self) -> str:
        """Return the error message of the script, or else its last line."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        command = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
        lines = lines[command + 1 :] or ["no output"]
        name = f"{self.planned.script}: "
        starts = [number for number, line in enumerate(lines) if line.startswith(name)]
        return "; ".join(lines[starts[-1] :]).removeprefix(name) if starts else lines[-1]


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
    """Whether to stop: after SIGTERM or Ctrl-C, when the terminal is closed, or when the time is up."""

    def __init__(self, minutes: float | None):
        self.end = time.monotonic() + 60 * minutes if minutes else None
        self.signal: int | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take these signals as requests within the block."""
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # otherwise it was started by nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self, number: int, frame) -> None:
        self.signal = number
        if number == signal.SIGHUP:  # what is printed would raise an error
            sys.stdout = sys.stderr = open(os.devnull, "w")

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
    if in_a_row == MAX_FAILURES and waiting:
        failures.append(f"after {MAX_FAILURES} failures in a row the others were not tried; remove the cause first")
    return failures


def describe_start(job: Job) -> str:
    from plan_results import find_state

    if not job.process:
        return f"another process trains it; waiting for its end (if it is gone, delete {job.planned.folder / '.lock'})"
    state = find_state(job.planned)
    return f"resumes after epoch {state.epoch} of {state.epochs}" if state.epoch else "starts"


def stop_processes(processes: list[subprocess.Popen]) -> None:
    """Let training processes save their state and end."""
    if any(process.poll() is None for process in processes):
        print("stopping: the runs save their state", flush=True)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SAVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@releasing_claims
def main(argv: list[str] | None = None) -> None:
    """Train the runs of a plan and write the results."""
    parser = build_parser()
    options = read_options(parser, argv)
    stop = Stop(options["minutes"])
    options |= {key: str(Path(options[key]).resolve()) for key in ("plan", "data_dir")}
    plan = Path(options["plan"])
    output = Path(options["output"] or Path("runs", plan.stem)).resolve()
    options |= {"output": str(output), "csv": Path(options["csv"] or output / "results.csv").resolve()}

    from plan import read_plan
    from plan_results import check_table, compare, find_state, format_states, write_results, write_seed_summaries

    from engine.runtime.files import check_output_folder
    from engine.training.run_folder import explain_folder_errors

    # ---- Plan ----
    runs = read_plan(plan, output)
    names = {planned.row.name for planned in runs}
    if unknown := sorted(set(options["rows"] or ()) - names):
        parser.error(f"--rows: no row {unknown[0]}{suggest_closest(unknown[0], names) or '; --list shows all'}")
    for planned in runs:
        find_state(planned)  # raises UserError for a row whose options have changed
    if options["list"]:
        print(format_states(runs))
        return
    check_output_folder(output, f"--output {output}")
    check_table(options["csv"], plan.stem, runs)
    lock = output / ".lock"
    with explain_folder_errors(output, "--output"):
        claimed = claim(lock)
    if not claimed:
        raise UserError(f"{output} is in use by {read_owner(lock)}; wait for its end, or choose another --output")

    # ---- Train ----
    chosen = [planned for planned in runs if not options["rows"] or planned.row.name in options["rows"]]
    with stop.on_signals():
        failures = train_plan(chosen, options, stop, lambda: write_results(options["csv"], plan.stem, runs))

    # ---- Results ----
    write_results(options["csv"], plan.stem, runs)
    write_seed_summaries(runs)
    places = [options["csv"], *compare(runs, output / "compare")]
    finished = sum(find_state(planned).finished for planned in chosen)
    print(f"{finished} of {len(chosen)} runs are finished; results in {' and '.join(map(str, places))}")
    again = "run the same command again to continue"
    if failures and finished < len(chosen):
        raise UserError("\n".join([*failures, again]))
    if stop.signal == signal.SIGTERM:
        raise Terminated(again)
    if finished < len(chosen):
        print(again)
    if stop.signal:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main)
