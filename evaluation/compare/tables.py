"""The tables of a comparison: for the terminal, as Markdown, CSV and JSON."""

import csv
import io
from dataclasses import asdict

from engine.drawing import tables
from evaluation.compare.comparison import Comparison
from evaluation.compare.groups import Group
from evaluation.compare.runs import Run
from evaluation.compare.statistics import (
    CONFIDENCE,
    GroupFigures,
    PairedDifference,
    Spread,
    get_curve,
    measure_run,
)

MISSING = "-"
SPLITS = {"test": "chosen on test images", "valid": "chosen on validation images"}


def format_spread(value: Spread | None, digits: int = 2) -> str:
    return MISSING if value is None else value.format(digits)


def choose_digits(minutes: float) -> int:
    """Return with how many decimals a time is written."""
    return 1 if minutes >= 10 else 2


def list_commits(group: Group) -> str:
    """Return the commits of a group's runs, short."""
    return " ".join(dict.fromkeys((run.commit or MISSING)[:7] for run in group.runs))


def describe_unfinished(group: Group) -> str:
    """Return the seeds that are not finished, with their status."""
    return "; ".join(f"seed {run.seed} {run.describe_status()}" for run in group.unfinished)


def make_group_rows(comparison: Comparison) -> list[list[str]]:
    """Return a header and one row per group."""
    splits = {figures.best_split for figures in comparison.figures if figures.best_split}
    best = f"best epoch, {SPLITS.get(next(iter(splits), ''), '')}" if len(splits) == 1 else "best epoch"
    header = ["", "n", "last epoch", best, "median of last ten", "epochs", "minutes", "images/s", "peak MiB", "commit"]
    unfinished = any(group.unfinished for group in comparison.groups)
    rows = [header + ["not finished"] * unfinished]
    for group, figures in zip(comparison.groups, comparison.figures, strict=True):
        chosen = f" ({figures.best_split})" if len(splits) > 1 and figures.best_split else ""
        row = [group.label, str(len(group.finished)), format_spread(figures.last)]
        row += [format_spread(figures.best) + chosen, format_spread(figures.median), str(group.runs[0].epochs)]
        row.append(format_spread(figures.minutes, choose_digits(figures.minutes.mean) if figures.minutes else 0))
        row.append(format_spread(figures.images_per_second, 0))
        row += [f"{figures.peak_memory_mb:.0f}" if figures.peak_memory_mb else MISSING, list_commits(group)]
        rows.append(row + [describe_unfinished(group) or MISSING] * unfinished)
    return rows


def make_difference_rows(differences: list[PairedDifference]) -> list[list[str]]:
    """Return a header and one row per group that is compared with the baseline."""
    rows = [
        ["", "n", "difference", f"{100 * CONFIDENCE:.0f} % interval of the mean", "by seed", "seeds without a partner"]
    ]
    for one in differences:
        interval = MISSING if one.interval is None else f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
        mean = MISSING
        if one.spread:
            mean = f"{one.spread.mean:+.2f}" + (f" +- {one.spread.std:.2f}" if one.spread.std is not None else "")
        by_seed = ", ".join(f"{seed}: {value:+.2f}" for seed, value in one.by_seed.items()) or MISSING
        unpaired = " ".join(map(str, one.unpaired)) or MISSING
        rows.append([one.label, str(len(one.by_seed)), mean, interval, by_seed, unpaired])
    return rows


def make_run_rows(comparison: Comparison) -> list[list[str]]:
    """Return a header and one row per run."""
    rows = [["run", "group", "seed", "status", "last epoch", "best epoch", "median of last ten", "minutes", "commit"]]
    for group in comparison.groups:
        for run in group.runs:
            row, texts = [str(run.folder), group.label, str(run.seed), run.describe_status()], [MISSING] * 4
            if get_curve(run, comparison.metric):
                own = measure_run(run, comparison.metric)
                texts = [f"{own.last:.2f}", f"{own.best:.2f} (epoch {own.best_epoch})", f"{own.median:.2f}"]
                texts.append(f"{own.minutes:.{choose_digits(own.minutes)}f}")
            rows.append([*row, *texts, (run.commit or MISSING)[:7]])
    return rows


def make_option_rows(comparison: Comparison) -> list[list[str]]:
    """Return a header and one row per option that differs between groups."""
    header = ["option", *(group.label for group in comparison.groups)]
    return [header, *([f"--{key}", *values] for key, values in comparison.option_differences.items())]


def format_text(comparison: Comparison) -> str:
    """Return the tables for the terminal."""
    parts = [f"{comparison.metric.title}, mean +- standard deviation of the sample over the seeds"]
    parts.append(tables.align_columns(make_group_rows(comparison)))
    if comparison.differences:
        parts.append(f"\n{describe_differences(comparison)}")
        parts.append(tables.align_columns(make_difference_rows(comparison.differences)))
    return "\n".join(parts)


def describe_differences(comparison: Comparison) -> str:
    return f"last epoch minus that of {comparison.baseline.label}, by seed, in percentage points"


def format_markdown(comparison: Comparison) -> str:
    """Return the whole comparison as a Markdown page."""
    sections = [
        f"# {comparison.metric.title}",
        f"Mean ± standard deviation of the sample (n - 1) over n finished runs that differ in their seed only.\n\n"
        f"{tables.format_markdown(make_group_rows(comparison))}",
        list_items("Read with care", comparison.warnings),
    ]
    if comparison.differences:
        title = describe_differences(comparison)
        sections.append(
            f"## Differences\n\nThe {title}.\n\n" + tables.format_markdown(make_difference_rows(comparison.differences))
        )
    sections.append("## Runs\n\n" + tables.format_markdown(make_run_rows(comparison)))
    if comparison.option_differences:
        sections.append("## Options that differ\n\n" + tables.format_markdown(make_option_rows(comparison)))
    sections.append(list_items("Left out", [f"{one.path}: {one.reason}" for one in comparison.left_out]))
    return "\n\n".join(filter(None, sections)).replace(" +- ", " ± ") + "\n"


def list_items(title: str, lines: list[str]) -> str:
    """Return a section with a list; nothing for no lines."""
    return "\n".join([f"## {title}", "", *(f"* {line}" for line in lines)]) if lines else ""


def make_group_record(group: Group, figures: GroupFigures) -> dict:
    """Return the figures of a group as a flat dictionary: mean, std and n of each, for CSV and JSON."""
    record = {"group": group.label, "method": "+".join(group.options["method"]), "n": len(group.finished)}
    for key in ("last", "best", "median", "minutes", "images_per_second"):
        value = getattr(figures, key)
        record |= {f"{key}_mean": value and value.mean, f"{key}_std": value and value.std}
    record |= {"best_split": figures.best_split, "peak_memory_mb": figures.peak_memory_mb}
    record |= {"epochs": group.runs[0].epochs, "seeds": " ".join(str(run.seed) for run in group.finished)}
    return record | {"commit": list_commits(group), "not_finished": describe_unfinished(group) or None}


def format_csv(comparison: Comparison) -> str:
    """Return one line per group."""
    pairs = zip(comparison.groups, comparison.figures, strict=True)
    records = [make_group_record(group, figures) for group, figures in pairs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def make_run_record(run: Run, comparison: Comparison) -> dict:
    """Return a run and its figures for JSON."""
    record = {"folder": str(run.folder), "seed": run.seed, "status": run.status, "epoch": run.epoch}
    record |= {"epochs": run.epochs, "commit": run.commit, "device": run.device}
    return record | (asdict(measure_run(run, comparison.metric)) if get_curve(run, comparison.metric) else {})


def make_json(comparison: Comparison) -> dict:
    """Return the whole comparison as plain dictionaries and lists."""
    pairs = zip(comparison.groups, comparison.figures, strict=True)
    return {
        "metric": comparison.metric.column,
        "baseline": comparison.baseline and comparison.baseline.label,
        "groups": [
            make_group_record(group, figures)
            | {"runs": [make_run_record(run, comparison) for run in group.runs], "options": group.options}
            for group, figures in pairs
        ],
        "differences": [asdict(one) for one in comparison.differences],
        "option_differences": comparison.option_differences,
        "warnings": comparison.warnings,
        "left_out": [{"path": str(one.path), "reason": one.reason} for one in comparison.left_out],
    }
