"""Write the tables of the results in README.md and docs/, and docs/results.png, from docs/results.csv and docs/card.md.

    python benchmarks/fill_in_results.py

A table stands between two comments, of which the first says what it has:

    <!-- results: accuracy PLAN PART ... -->            the rows of parts of a plan, compared with its row `none`
    <!-- results: summary PLAN ROW ... -->              these rows in fewer columns, the largest difference first
    <!-- results: differences PLAN ROW - ROW ... -->    differences of pairs of rows
    <!-- results: averaging PLAN PART ... -->           what the averaged weights add to the accuracy of each row
    <!-- results: validation PLAN -->                   accuracies on validation images, by which a recipe was chosen
    <!-- results: card -->                              the classifiers of docs/card.md, a row each
    <!-- end -->
"""

import csv
import math
import re
import statistics
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from common import ROOT
from matplotlib.figure import Figure

from engine.drawing.figures import save_figure
from engine.drawing.tables import format_markdown
from evaluation.compare.statistics import CONFIDENCE, PairedDifference, Spread, pair_by_seed, spread, t_quantile

PAGES = ("README.md", "docs/results.md", "docs/evaluate.md")
CSV, FIGURE, CARD = (ROOT / "docs" / name for name in ("results.csv", "results.png", "card.md"))
BASELINE = "none"
DRAWN, DRAWN_PARTS = "cpu_cifar10", ("figures", "methods")  # the plan of the figure, and the parts that it shows
FINISHED, MISSING = "finished", "-"
OPENING = "<!-- results: "
CARD_COLUMNS = {  # row of the card -> column of the table
    "top-1 accuracy (%)": "top-1 (%)",
    "negative log-likelihood": "NLL",
    "ECE (%)": "ECE (%)",
    "temperature": "temperature",
    "ECE after temperature scaling (%)": "ECE, scaled (%)",
    "accuracy under FGSM 4/255 (%)": "FGSM 4/255 (%)",
    "mean accuracy, built-in corruptions (%)": "corruptions (%)",
    "mean accuracy, occlusion by random patches (%)": "random patches (%)",
    "OOD AUROC on cifar100, MSP (%)": "OOD AUROC (%)",
}
BLOCK = re.compile(rf"({OPENING}(.*?) -->\n)((?!<!-- results).)*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Results:
    """The runs of a plan. rows: row -> its runs, as lines of results.csv, in the order of the plan."""

    plan: str
    rows: dict[str, list[dict[str, str]]]

    def get_row(self, name: str) -> list[dict[str, str]]:
        if name not in self.rows:
            raise SystemExit(f"no row {name} in plan {self.plan} of {CSV.name}")
        return self.rows[name]

    def list_part(self, parts: list[str]) -> list[str]:
        """Return the names of the rows of some parts."""
        names = [name for name, runs in self.rows.items() if runs[0]["part"] in parts]
        if not names:
            raise SystemExit(f"no part {' '.join(parts)} in plan {self.plan} of {CSV.name}")
        return names

    def get_values(self, name: str, column: str = "last_top1") -> dict[int, float]:
        """Return seed -> value of a column, of the finished runs of a row."""
        runs = [run for run in self.get_row(name) if run["status"] == FINISHED and run[column]]
        return {int(run["seed"]): float(run[column]) for run in runs}

    @cached_property
    def noise(self) -> tuple[float, int]:
        """The standard deviation of an accuracy around the effects of its row and its seed, and its degrees of freedom.

        It is that of a randomised block design, the seeds being the blocks: the residuals of a least-squares fit over
        all finished runs. Three runs alone would say little about the noise of a row.
        """
        runs = [(row, seed, value) for row in self.rows for seed, value in self.get_values(row).items()]
        effects = {**dict.fromkeys(row for row, _, _ in runs), **dict.fromkeys(seed for _, seed, _ in runs)}
        columns = {effect: number for number, effect in enumerate(effects)}
        design, values = np.zeros((len(runs), len(columns))), np.array([value for _, _, value in runs])
        for number, (row, seed, _) in enumerate(runs):
            design[number, [columns[row], columns[seed]]] = 1
        solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
        freedom = len(runs) - int(rank)
        residuals = values - design @ solution
        return math.sqrt(float(residuals @ residuals) / freedom) if freedom else math.nan, freedom

    def compare(self, ours: str, theirs: str = BASELINE) -> PairedDifference:
        """Return the differences of a row to another one by seed, with an interval from the noise of all rows."""
        values = [self.get_values(name) if name in self.rows or name != BASELINE else {} for name in (ours, theirs)]
        paired = pair_by_seed(ours, values[0], theirs, values[1])
        std, freedom = self.noise
        if not paired.by_seed or not freedom:
            return replace(paired, interval=None)
        half = t_quantile(freedom, (1 + CONFIDENCE) / 2) * std * math.sqrt(2 / len(paired.by_seed))
        return replace(paired, interval=(paired.spread.mean - half, paired.spread.mean + half))

    def format_mean(self, name: str, column: str = "last_top1") -> str:
        """Return mean and standard deviation as in `54.31 ± 0.42`."""
        return format_spread(spread(list(self.get_values(name, column).values())))

    def find_seconds(self, name: str) -> dict[str, float]:
        """Return machine -> seconds of an epoch: the median of the run there that other work slowed least."""
        fastest: dict[str, float] = {}
        for run in self.get_row(name):
            if run["status"] == FINISHED and run["epoch_seconds"]:
                seconds = float(run["epoch_seconds"])
                fastest[run["machine"]] = min(seconds, fastest.get(run["machine"], seconds))
        return fastest

    def format_cost(self, name: str) -> str:
        """Return the seconds of an epoch relative to those of the baseline on the same machine."""
        ours, theirs = (self.find_seconds(row) if row in self.rows else {} for row in (name, BASELINE))
        ratios = [seconds / theirs[machine] for machine, seconds in ours.items() if theirs.get(machine)]
        return f"{ratios[0]:.2f}" if ratios else MISSING

    def count_seeds(self, name: str) -> str:
        """Return how many seeds are finished, as in `3`, or `3 of 5` if more are planned."""
        planned = self.get_row(name)
        finished = sum(run["status"] == FINISHED for run in planned)
        return f"{finished}" if finished == len(planned) else f"{finished} of {len(planned)}"


def read_results(plan: str) -> Results:
    """Return the runs of a plan in results.csv."""
    rows: dict[str, list[dict[str, str]]] = {}
    try:
        with open(CSV, encoding="utf-8", newline="") as file:
            for run in csv.DictReader(file):
                if run["plan"] == plan:
                    rows.setdefault(run["row"], []).append(run)
    except OSError as error:
        raise SystemExit(f"{CSV}: {error.strerror}") from error
    if not rows:
        command = f"python benchmarks/reproduce.py benchmarks/plans/{plan}.ini --csv {CSV}"
        raise SystemExit(f"no plan {plan} in {CSV.name}; train it: {command}")
    return Results(plan, rows)


def format_spread(found: Spread | None) -> str:
    return found.format().replace("+-", "±") if found else MISSING


def format_difference(difference: PairedDifference) -> list[str]:
    """Return the mean of the differences, with the number of pairs if it is not that of all runs, and its interval."""
    if not difference.spread:
        return [MISSING, MISSING]
    pairs = f" (n = {difference.spread.n})" if difference.unpaired else ""
    return [f"{difference.spread.mean:+.2f}{pairs}", format_interval(difference.interval)]


def format_interval(interval: tuple[float, float] | None) -> str:
    return "{:+.2f} to {:+.2f}".format(*interval) if interval else MISSING


def make_accuracy_table(results: Results, parts: list[str]) -> str:
    listed = results.list_part(parts)
    names = [name for name in listed if results.get_values(name)]
    waiting = ", ".join(f"`{name}`" for name in listed if name not in names)
    notes = [f"Not trained yet: {waiting}."] if waiting else []
    if not names:
        return notes[0] + "\n"
    head = ["row", "n", "last epoch (%)", "difference to none", "95 % interval", "best epoch, on test images (%)"]
    table = [[*head, "seconds an epoch", "relative to none"]]
    runs = [run for name in names for run in results.rows[name]]
    finished = [run for run in runs if run["status"] == FINISHED]
    evaluated = any(run["best_epoch"] != run["epochs"] for run in finished)  # more often than once
    for name in names:
        row = [f"`{name}`", results.count_seeds(name), results.format_mean(name)]
        row += [MISSING, MISSING] if name == BASELINE else format_difference(results.compare(name))
        row += [results.format_mean(name, "best_top1") if evaluated else MISSING]
        row += [" / ".join(f"{seconds:.1f}" for seconds in results.find_seconds(name).values()) or MISSING]
        table.append([*row, results.format_cost(name)])
    filled = [column for column in zip(*table, strict=True) if {*column[1:]} != {MISSING}]
    return "\n\n".join([format_markdown(list(zip(*filled, strict=True))), *notes, *describe_origin(runs)]) + "\n"


def describe_origin(runs: list[dict[str, str]]) -> list[str]:
    """Return a line with the machines and commits of some runs; none if none has begun."""
    machines, commits = (
        sorted({part for run in runs for part in run[key].split("; ") if part}) for key in ("machine", "commit")
    )
    if not machines:
        return []
    return [f"Trained on {'; '.join(machines)}" + (f", commit {', '.join(commits)}" if commits else "") + "."]


def make_summary_table(results: Results, names: list[str]) -> str:
    table = [["method", "seeds", "last epoch (%)", "difference to none", "95 % interval", "training time"]]
    differences = {name: results.compare(name) for name in names}
    ranks = {name: -one.spread.mean if one.spread else math.inf for name, one in differences.items()}
    for name in sorted(names, key=ranks.get):
        row = [f"`{name}`", results.count_seeds(name), results.format_mean(name)]
        row += [MISSING, MISSING] if name == BASELINE else format_difference(differences[name])
        table.append([*row, results.format_cost(name)])
    return format_markdown(table) + "\n"


def make_difference_table(results: Results, words: list[str]) -> str:
    if len(words) % 3 or {*words[1::3]} != {"-"}:
        raise SystemExit("give pairs as ROW - ROW")
    table = [["difference", "n", "mean", "95 % interval", "by seed"]]
    for ours, theirs in zip(words[::3], words[2::3], strict=True):
        results.get_row(theirs)
        one = results.compare(ours, theirs)
        by_seed = ", ".join(f"{seed}: {value:+.2f}" for seed, value in one.by_seed.items()) or MISSING
        mean, interval = format_difference(one)
        table.append([f"`{ours}` - `{theirs}`", str(len(one.by_seed)), mean.split(" ")[0], interval, by_seed])
    return format_markdown(table) + "\n"


def make_averaging_table(results: Results, parts: list[str]) -> str:
    """Compare the averaged weights with the last ones of the same run.

    The noise is that of all rows of these parts: the deviations of the differences from the mean of their row.
    """
    gains: dict[str, list[float]] = {}
    for name in results.list_part(parts):
        averaged, last = results.get_values(name, "last_ema_top1"), results.get_values(name)
        gains[name] = [value - last[seed] for seed, value in averaged.items()]
    means = {name: statistics.fmean(own) for name, own in gains.items() if own}
    freedom = sum(len(gains[name]) - 1 for name in means)
    squares = sum((value - mean) ** 2 for name, mean in means.items() for value in gains[name])
    table = [["row", "n", "averaged weights (%)", "minus last weights", "95 % interval"]]
    for name, own in gains.items():
        cells = [MISSING, MISSING]
        if own:
            cells[0] = f"{means[name]:+.2f}"
        if own and freedom:
            half = t_quantile(freedom, (1 + CONFIDENCE) / 2) * math.sqrt(squares / freedom / len(own))
            cells[1] = format_interval((means[name] - half, means[name] + half))
        row = [f"`{name}`", results.count_seeds(name), results.format_mean(name, "last_ema_top1")]
        table.append([*row, *cells])
    return format_markdown(table) + "\n"


def make_validation_table(results: Results, words: list[str]) -> str:
    table = [["row", "n", "validation images (%)"]]
    for name in results.rows:
        table.append([f"`{name}`", results.count_seeds(name), results.format_mean(name, "last_valid_top1")])
    return format_markdown(table) + "\n"


def make_card_table() -> str:
    """Return the most important rows of the card as columns, a row for each classifier."""
    lines = [line for line in CARD.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    (_, *names), _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    rows = {title: values for title, *values in rows}
    if missing := CARD_COLUMNS.keys() - rows.keys():
        raise SystemExit(f"no row {min(missing)} in {CARD.name}")
    methods = [f"`{name.removesuffix('/seed_0')}`" for name in names]
    columns = [["method", *methods], *([head, *rows[title]] for title, head in CARD_COLUMNS.items())]
    return format_markdown(list(zip(*columns, strict=True))) + "\n"


TABLES = {"accuracy": make_accuracy_table, "summary": make_summary_table}
TABLES |= {"differences": make_difference_table, "averaging": make_averaging_table, "validation": make_validation_table}


def make_table(request: str) -> str:
    """Return the table that a comment asks for."""
    kind, *words = request.split()
    if kind not in (*TABLES, "card"):
        raise SystemExit(f"{OPENING}{request} -->: choose from {', '.join(TABLES)}, card")
    try:
        return make_card_table() if kind == "card" else TABLES[kind](read_results(words[0]), words[1:])
    except SystemExit as error:
        raise SystemExit(f"{OPENING}{request} -->: {error}") from error


def fill_in(page: str) -> str:
    """Return the text of a page with its tables as results.csv has them."""
    if len(BLOCK.findall(page)) != page.count(OPENING):
        raise SystemExit(f"a table has no <!-- end -->: {page.count(OPENING)} begin, {len(BLOCK.findall(page))} end")
    return BLOCK.sub(lambda found: f"{found[1]}\n{make_table(found[2])}\n{found[4]}", page)


def make_figure(results: Results) -> Figure:
    """Draw the difference of each row to `none`: each seed, the mean and its interval, with the cost beside it."""
    names = [name for name, runs in results.rows.items() if name != BASELINE and runs[0]["part"] in DRAWN_PARTS]
    differences = [results.compare(name) for name in names]
    drawn = sorted((one for one in differences if one.spread), key=lambda one: one.spread.mean)
    figure = Figure(figsize=(7.2, 1.2 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#666666", linewidth=0.8)
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}
    for height, one in enumerate(drawn):
        axes.plot([*one.by_seed.values()], [height] * len(one.by_seed), "|", color="#56b4e9", markersize=9)
        mean = one.spread.mean
        low, high = one.interval or (mean, mean)
        axes.plot([low, high], [height, height], color="#0072b2", linewidth=1.2)
        without_zero = one.interval and not low <= 0 <= high
        axes.plot(mean, height, "o", color="#0072b2", markerfacecolor="#0072b2" if without_zero else "white")
        axes.annotate(f"{results.format_cost(one.label)} x", (1.01, height), **beside)
    axes.annotate("time", (1.01, len(drawn) - 0.25), **beside)
    axes.set(yticks=range(len(drawn)), yticklabels=[one.label for one in drawn], ylim=(-0.6, len(drawn) - 0.1))
    axes.set_xlabel("top-1 accuracy minus that of none (percentage points)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")
    save_figure(make_figure(read_results(DRAWN)), FIGURE)


if __name__ == "__main__":
    main()
