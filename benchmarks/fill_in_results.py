"""Write the tables of README.md and docs/results.md, and docs/results.png, from docs/results.csv.

    python benchmarks/fill_in_results.py

A table stands between two comments, of which the first says what it has:

    <!-- results: accuracy PLAN PART ... -->            the rows of parts of a plan, compared with its row `none`
    <!-- results: summary PLAN ROW ... -->              fewer columns, these rows, the best first
    <!-- results: differences PLAN ROW - ROW ... -->    differences of pairs of rows
    <!-- results: choice PLAN -->                       accuracies on validation images, by which a recipe was chosen
    <!-- end -->
"""

import csv
import re

from common import ROOT
from matplotlib.figure import Figure

from engine.drawing.figures import save_figure
from engine.drawing.tables import format_markdown
from evaluation.compare.statistics import PairedDifference, Spread, pair_by_seed, spread

PAGES = ("README.md", "docs/results.md")
CSV, FIGURE = ROOT / "docs" / "results.csv", ROOT / "docs" / "results.png"
BASELINE = "none"
DRAWN, DRAWN_PARTS = "cpu_cifar10", ("figures", "methods")  # the plan of the figure, and the parts that it shows
FINISHED = "finished"
BLOCK = re.compile(r"(<!-- results: (\w+) (\w+)(.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = dict[str, list[dict[str, str]]]  # row of a plan -> its runs


def read_rows(plan: str) -> Rows:
    """Return the runs of a plan by row, in the order of the plan."""
    rows: Rows = {}
    with open(CSV, encoding="utf-8", newline="") as file:
        for run in csv.DictReader(file):
            if run["plan"] == plan:
                rows.setdefault(run["row"], []).append(run)
    if not rows:
        raise SystemExit(f"{CSV}: no plan {plan}; train it with benchmarks/reproduce.py --csv {CSV}")
    return rows


def get_values(runs: list[dict[str, str]], column: str = "last_top1") -> dict[int, float]:
    """Return seed -> value of a column, of the finished runs."""
    return {int(run["seed"]): float(run[column]) for run in runs if run["status"] == FINISHED}


def compare_rows(rows: Rows, ours: str, theirs: str = BASELINE) -> PairedDifference:
    return pair_by_seed(ours, get_values(rows[ours]), theirs, get_values(rows[theirs]))


def format_values(values: dict[int, float]) -> str:
    """Return mean and standard deviation as in `54.31 ± 0.42`, or `-` without values."""
    return format_spread(spread(list(values.values())))


def format_spread(found: Spread | None) -> str:
    return found.format().replace("+-", "±") if found else "-"


def format_interval(difference: PairedDifference) -> str:
    """Return the 95 % interval of a mean difference, or `-` for fewer than two seeds."""
    return "{:+.2f} to {:+.2f}".format(*difference.interval) if difference.interval else "-"


def format_mean(difference: PairedDifference) -> str:
    return f"{difference.spread.mean:+.2f}" if difference.spread else "-"


def format_cost(rows: Rows, name: str) -> str:
    """Return the minutes of training relative to those of the baseline, over the seeds that both have finished."""
    ours, theirs = (get_values(rows[row], "minutes") for row in (name, BASELINE))
    shared = ours.keys() & theirs.keys()
    return f"{sum(ours[seed] for seed in shared) / sum(theirs[seed] for seed in shared):.2f}" if shared else "-"


def describe_unfinished(runs: list[dict[str, str]]) -> str:
    """Return which seeds are not finished, or an empty text."""
    left = [run["seed"] for run in runs if run["status"] != FINISHED]
    return f" (seed{'s' * (len(left) > 1)} {', '.join(left)} not finished)" if left else ""


def make_accuracy_table(rows: Rows, names: list[str]) -> str:
    head = ["row", "n", "last epoch (%)", "difference to none", "95 % interval", "averaged weights (%)", "minutes"]
    table = [[*head, "relative to none"]]
    for name in names:
        values, difference = get_values(rows[name]), compare_rows(rows, name)
        row = [f"`{name}`{describe_unfinished(rows[name])}", str(len(values)), format_values(values)]
        row += ["", ""] if name == BASELINE else [format_mean(difference), format_interval(difference)]
        row += [format_values(get_values(rows[name], key)) for key in ("last_ema_top1", "minutes")]
        table.append([*row, format_cost(rows, name)])
    runs = [run for name in names for run in rows[name]]
    machines, commits = (sorted({run[key] for run in runs} - {""}) for key in ("machine", "commit"))
    return f"{format_markdown(table)}\n\nTrained on {'; '.join(machines)}, at commit {', '.join(commits)}.\n"


def make_summary_table(rows: Rows, names: list[str]) -> str:
    table = [["method", "seeds", "last epoch (%)", "difference to none", "95 % interval", "training time"]]
    means = {name: spread(list(get_values(rows[name]).values())) for name in names}
    for name in sorted(names, key=lambda name: -means[name].mean if means[name] else 0):
        difference = compare_rows(rows, name)
        row = [f"`{name}`", str(means[name].n if means[name] else 0), format_spread(means[name])]
        row += ["", ""] if name == BASELINE else [format_mean(difference), format_interval(difference)]
        table.append([*row, f"{format_cost(rows, name)} x"])
    return format_markdown(table) + "\n"


def make_difference_table(rows: Rows, pairs: list[tuple[str, str]]) -> str:
    table = [["difference", "n", "mean", "95 % interval", "by seed"]]
    for ours, theirs in pairs:
        one = compare_rows(rows, ours, theirs)
        by_seed = ", ".join(f"{value:+.2f}" for value in one.by_seed.values()) or "-"
        table.append([f"`{ours}` - `{theirs}`", str(len(one.by_seed)), format_mean(one), format_interval(one), by_seed])
    return format_markdown(table) + "\n"


def make_choice_table(rows: Rows) -> str:
    table = [["row", "validation images (%)"]]
    for name, runs in rows.items():
        table.append([f"`{name}`{describe_unfinished(runs)}", format_values(get_values(runs, "last_valid_top1"))])
    return format_markdown(table) + "\n"


def make_table(kind: str, plan: str, words: list[str]) -> str:
    """Return the table that a comment asks for."""
    rows = read_rows(plan)
    if kind == "accuracy":
        return make_accuracy_table(rows, [name for name, runs in rows.items() if runs[0]["part"] in words])
    if kind == "summary":
        return make_summary_table(rows, words)
    if kind == "differences":
        ours, signs, theirs = words[::3], words[1::3], words[2::3]
        assert {*signs} == {"-"}, words
        return make_difference_table(rows, list(zip(ours, theirs, strict=True)))
    assert kind == "choice", kind
    return make_choice_table(rows)


def fill_in(page: str) -> str:
    """Return the text of a page with its tables as results.csv has them."""
    return BLOCK.sub(lambda found: found[1] + make_table(found[2], found[3], found[4].split()) + found[5], page)


def make_figure(rows: Rows) -> Figure:
    """Draw the difference of each row to `none`: each seed, the mean and its interval, with the cost beside it."""
    names = [name for name, runs in rows.items() if name != BASELINE and runs[0]["part"] in DRAWN_PARTS]
    differences = [compare_rows(rows, name) for name in names]
    drawn = sorted((one for one in differences if one.interval), key=lambda one: one.spread.mean)
    figure = Figure(figsize=(7.2, 1.2 + 0.3 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#666666", linewidth=0.8)
    for height, one in enumerate(drawn):
        axes.plot([*one.by_seed.values()], [height] * len(one.by_seed), "|", color="#56b4e9", markersize=9)
        axes.plot(one.interval, [height, height], color="#0072b2", linewidth=1.2)
        certain = one.interval[0] > 0 or one.interval[1] < 0
        axes.plot(one.spread.mean, height, "o", color="#0072b2", markerfacecolor="#0072b2" if certain else "white")
        cost = f"{format_cost(rows, one.label)} x"
        axes.annotate(cost, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.annotate("time", (1.01, len(drawn) - 0.25), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set(yticks=range(len(drawn)), yticklabels=[one.label for one in drawn], ylim=(-0.6, len(drawn) - 0.1))
    axes.set_xlabel("top-1 accuracy minus that of none (percentage points)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")
    save_figure(make_figure(read_rows(DRAWN)), FIGURE)


if __name__ == "__main__":
    main()
