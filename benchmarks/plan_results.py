"""The results of a plan: the state of its runs, the time that is left, the table of all runs, the comparison."""

import csv
import io
import statistics
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from plan import PlannedRun, check_row

from engine.drawing.tables import align_columns
from engine.errors import UserError
from engine.runtime.files import check_output_folder, write_atomic
from engine.runtime.text import format_count
from engine.training.seeds import read_finished_result, summarize_seeds
from evaluation.compare.__main__ import main as compare_runs
from evaluation.compare.metrics import METRICS
from evaluation.compare.runs import FINISHED, RUNNING, STOPPED, Run, read_run
from evaluation.compare.statistics import get_curve, measure_run

PROGRESS_SECONDS = 60.0  # between two lines of progress
WAITING = "not started"
COLUMNS = ["plan", "part", "row", "seed", "status", "epochs_done", "epochs", "last_top1", "best_top1", "best_epoch"]
COLUMNS += ["best_split", "median_top1", "last_valid_top1", "last_ema_top1", "minutes", "epoch_seconds"]
COLUMNS += ["machine", "commit", "command"]


@dataclass(frozen=True)
class State:
    """What has been done of a planned run. run: what its folder holds, None without one."""

    planned: PlannedRun
    run: Run | None
    status: str  # of evaluation.compare.runs, or WAITING

    @property
    def epochs(self) -> int:
        """The number of epochs that the run is to have."""
        return self.planned.options["epochs"]

    @property
    def finished(self) -> bool:
        return self.status == FINISHED

    @property
    def epoch(self) -> int:
        return self.run.epoch if self.run else 0

    def describe(self) -> str:
        """Return the state for a person, such as `stopped, epoch 3 of 60` or `finished, 84.10 %`."""
        if self.finished:
            return f"finished, {measure_run(self.run, METRICS[self.planned.metric]).last:.2f} %"
        return self.status if self.status == WAITING else f"{self.status}, epoch {self.epoch} of {self.epochs}"


def find_state(planned: PlannedRun) -> State:
    """Return what has been done of a planned run.

    A run is finished once result.json is written. Raises UserError if the folder holds a run with other options, or
    one whose files are damaged.
    """
    if not (planned.folder / "config.json").is_file():
        return State(planned, None, WAITING)
    try:
        run = read_run(planned.folder)
    except ValueError as error:
        remedy = "delete that folder to train it anew"
        raise UserError(f"row {planned.row.name}: {planned.folder}: {error}; {remedy}") from error
    check_row(planned, run)
    if run.status == FINISHED and not read_finished_result(planned.folder, planned.options):
        return State(planned, run, STOPPED)
    return State(planned, run, run.status)


def format_states(runs: list[PlannedRun]) -> str:
    """Return a table of all rows with the state of each seed."""
    seeds = list(dict.fromkeys(planned.seed for planned in runs))
    cells = {(planned.row.name, planned.seed): find_state(planned).describe() for planned in runs}
    rows = {planned.row.name: planned.row for planned in runs}.values()
    table = [["part", "row", "estimate", *(f"seed {seed}" for seed in seeds)]]
    for row in rows:
        estimate = f"{row.minutes:g} min" if row.minutes else "-"
        table.append([row.part, row.name, estimate, *(cells.get((row.name, seed), "") for seed in seeds)])
    return align_columns(table, left=range(2))


class Progress:
    """Prints what is being trained, and the time that is left.

    A run counts as many units of work as minutes are estimated for it; the epochs of this call show how long a unit
    takes here. Rows without an estimate count one unit.
    """

    def __init__(self, runs: list[PlannedRun], jobs: int):
        self.runs, self.jobs = runs, jobs
        self.estimated = all(planned.row.minutes for planned in runs)
        self.start = self.changed = self.shown = time.monotonic()
        self.first = self.done = self.measure()

    def measure(self) -> float:
        """Return the units of work that are done."""
        return sum(self.units(planned) * find_state(planned).epoch / planned.options["epochs"] for planned in self.runs)

    @staticmethod
    def units(planned: PlannedRun) -> float:
        return planned.row.minutes or 1.0

    def estimate_minutes(self) -> float | None:
        """Return the minutes that are left; None if nothing is known about them."""
        left = sum(map(self.units, self.runs)) - self.done
        if self.done > self.first:
            return left * (self.changed - self.start) / 60 / (self.done - self.first)
        return left / self.jobs if self.estimated else None

    def report(self, training: list[PlannedRun]) -> None:
        """Print a line about the runs that are being trained, at most one in PROGRESS_SECONDS."""
        if time.monotonic() - self.shown >= PROGRESS_SECONDS:
            self.say("; ".join(f"{planned.name}: {find_state(planned).describe()}" for planned in training))

    def say(self, text: str) -> None:
        """Print a line, with the number of finished runs and the time that is left."""
        self.shown = time.monotonic()
        if (done := self.measure()) > self.done:
            self.done, self.changed = done, self.shown
        finished = sum(find_state(planned).finished for planned in self.runs)
        minutes = self.estimate_minutes()
        known = minutes is not None and finished < len(self.runs)
        left = f", about {format_count(max(1, round(minutes)), 'minute')} left" if known else ""
        print(f"{datetime.now():%H:%M}  {text}  ({finished} of {len(self.runs)} runs finished{left})", flush=True)


def make_record(plan: str, planned: PlannedRun) -> dict:
    """Return the line of a run in the table. Accuracies and minutes are those of finished runs only."""
    state = find_state(planned)
    record = {"plan": plan, "part": planned.row.part, "row": planned.row.name, "seed": planned.seed}
    record |= {"status": state.status if state.status != RUNNING else STOPPED, "epochs_done": state.epoch}
    record |= {"epochs": state.epochs, "command": planned.command}
    if not state.run:
        return record
    machines = state.run.config.get("machines", [])  # a run of an earlier version has neither
    commits = [commit[:10] for commit in state.run.config.get("commits", [state.run.commit]) if commit]
    record |= {"machine": "; ".join(machines), "commit": "; ".join(commits)}
    if not state.finished:
        return record
    own = measure_run(state.run, METRICS["top1"])
    record |= {"last_top1": own.last, "best_top1": own.best, "best_epoch": own.best_epoch, "best_split": own.best_split}
    for key in ("valid_top1", "ema_top1"):
        curve = get_curve(state.run, METRICS[key])
        record[f"last_{key}"] = list(curve.values())[-1] if curve else None
    if planned.options["eval_every"] == 1:  # otherwise the last ten evaluations reach far back
        record["median_top1"] = own.median
    seconds = statistics.median(row["seconds"] for row in state.run.history)  # other work on the machine slows some
    return record | {"minutes": own.minutes, "epoch_seconds": seconds}


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the lines of an earlier table; [] without one. Raises UserError for any other file."""
    if not path.exists():
        return []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have added a mark
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the table cannot be read ({error}); choose another --csv") from error
    names = reader.fieldnames or COLUMNS
    if "plan" not in names or not {*names} <= {*COLUMNS}:
        raise UserError(f"{path} is not a table of this command; choose another --csv")
    return rows


def check_table(path: Path, plan: str, runs: list[PlannedRun]) -> None:
    """Raise UserError if the table cannot be written, or has finished runs of this plan that are not finished here."""
    waiting = {(planned.row.name, str(planned.seed)) for planned in runs if not find_state(planned).finished}
    lines = [row for row in read_table(path) if (row["plan"], row["status"]) == (plan, FINISHED)]
    if lost := sum((row["row"], row["seed"]) in waiting for row in lines):
        raise UserError(
            f"{path} has {format_count(lost, 'finished run')} of plan {plan} that --output does not have; give the "
            "--output that has them, or choose another --csv"
        )
    check_output_folder(path.parent, f"--csv {path}")


def write_results(path: Path, plan: str, runs: list[PlannedRun]) -> None:
    """Write the table of all runs, a line each. Lines of other plans in the file stay."""
    records = [make_record(plan, planned) for planned in runs]
    others = [row for row in read_table(path) if row["plan"] != plan]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    lines = [
        {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()} for row in records
    ]
    writer.writerows([*others, *lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda side: side.write_text(text.getvalue(), encoding="utf-8"))


def write_seed_summaries(runs: list[PlannedRun]) -> None:
    """Write seeds.json of each row anew: of two seeds that were trained at the same time, each lacks the other."""
    for folder in {planned.folder.parent for planned in runs}:
        own = [planned for planned in runs if planned.folder.parent == folder]
        results = {planned.seed: read_finished_result(planned.folder, planned.options) for planned in own}
        if finished := {seed: result for seed, result in results.items() if result}:
            with redirect_stdout(io.StringIO()):
                summarize_seeds(folder, finished, write=True)


def compare(runs: list[PlannedRun], folder: Path) -> list[Path]:
    """Compare the runs that have done an epoch: tables, figures and a page in `folder`. Returns the folders written."""
    begun = [str(planned.folder) for planned in runs if find_state(planned).epoch]
    if not begun:
        return []
    compare_runs([*begun, "--metric", runs[0].metric, "--out", str(folder), "--overwrite"])
    return [folder]
