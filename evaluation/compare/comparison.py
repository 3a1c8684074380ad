"""A comparison: groups of runs with their figures, their differences, and what makes the comparison unfair."""

from dataclasses import dataclass

from engine.errors import UserError, suggest_closest
from engine.runtime.text import format_count
from evaluation.compare.fairness import find_option_differences, list_warnings
from evaluation.compare.groups import Group, group_runs
from evaluation.compare.metrics import METRICS, Metric
from evaluation.compare.runs import LeftOut, Run
from evaluation.compare.statistics import (
    GroupFigures,
    PairedDifference,
    compare_with_baseline,
    get_curve,
    measure_group,
)

TEST_SET_OPTIONS = ("dataset", "num_classes", "limit")  # and the number of classes that a newer run records


@dataclass(frozen=True)
class Comparison:
    """Everything that a table, a figure or a page shows.

    metric: what is compared. groups: runs that differ in their seed only, in the order of the command line. figures: of
    each group, from its finished runs. baseline: the group of which differences are taken; None if no group has a
    finished run. differences: of every other group that has a finished run. option_differences: option -> its value in
    each group as text, for the options that differ. warnings: one line each. left_out: folders that are not compared.
    """

    metric: Metric
    groups: list[Group]
    figures: list[GroupFigures]
    baseline: Group | None
    differences: list[PairedDifference]
    option_differences: dict[str, list[str]]
    warnings: list[str]
    left_out: list[LeftOut]


def compare_runs(
    runs: list[Run], left_out: list[LeftOut], metric: str = "top1", baseline: str | None = None
) -> Comparison:
    """Return the comparison of runs. left_out: folders that could not be read.

    metric: a key of METRICS. baseline: label of a group; None: the first group without mixing, else the first group.
    Raises UserError if no run is left to compare, and for a baseline that there is not.
    """
    runs, other_data = leave_out_other_data(runs)
    runs, unmeasured = leave_out_unmeasured(runs, METRICS[metric])
    groups, repeated = group_runs(runs)
    left_out = [*left_out, *other_data, *unmeasured, *repeated]
    if not groups:
        reasons = "\n".join(map(str, left_out))
        raise UserError(f"no run to compare\n{reasons}")
    base = find_baseline(groups, baseline)
    return Comparison(
        metric=METRICS[metric],
        groups=groups,
        figures=[measure_group(group, METRICS[metric]) for group in groups],
        baseline=base,
        differences=[
            compare_with_baseline(group, base, METRICS[metric])
            for group in groups
            if base and group is not base and group.finished
        ],
        option_differences=find_option_differences(groups),
        warnings=list_warnings(groups),
        left_out=left_out,
    )


def find_baseline(groups: list[Group], label: str | None) -> Group | None:
    """Return the group with this label; None: the first that is finished and does not mix, else the first finished."""
    if label is None:
        finished = [group for group in groups if group.finished]
        unmixed = [group for group in finished if group.options["method"] == ["none"]]
        return next(iter([*unmixed, *finished]), None)
    found = {group.label: group for group in groups}
    if label not in found:
        hint = suggest_closest(label, found)
        raise UserError(f"--baseline {label}: no such group{hint}\nthe groups are: {'; '.join(found)}")
    if not found[label].finished:
        raise UserError(
            f"--baseline {label}: none of its runs is finished\nchoose another group, or wait for their end"
        )
    return found[label]


def leave_out_other_data(runs: list[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Keep the runs that are tested on the images of the most common data set; leave out the others."""
    tested = [describe_test_set(run) for run in runs]
    most = max(tested, key=lambda own: sum(not find_conflicts(own, other) for other in tested), default={})
    kept, left_out = [], []
    for run, own in zip(runs, tested, strict=True):
        if conflicts := find_conflicts(own, most):
            reason = f"tested on other images ({', '.join(conflicts)}); compare such runs by themselves"
            left_out.append(LeftOut(run.folder, reason))
        else:
            kept.append(run)
    return kept, left_out


def describe_test_set(run: Run) -> dict:
    """Return what decides on which images and classes a run is tested; None for what is not known."""
    found = {key: run.options.get(key) for key in TEST_SET_OPTIONS}
    return found | {"num_classes": run.config.get("classes", found["num_classes"])}


def find_conflicts(own: dict, other: dict) -> list[str]:
    """Return what differs between two results of describe_test_set(), where both are known."""
    known = [key for key, value in own.items() if value is not None and other[key] is not None]
    return [f"{key} {own[key]}, not {other[key]}" for key in known if own[key] != other[key]]


def leave_out_unmeasured(runs: list[Run], metric: Metric) -> tuple[list[Run], list[LeftOut]]:
    """Keep the runs that log the metric, or that have not evaluated an epoch yet; leave out the others."""
    missing = [bool(get_curve(run, METRICS["top1"])) and not get_curve(run, metric) for run in runs]
    kept = [run for run, out in zip(runs, missing, strict=True) if not out]
    reason = f"its log has no {metric.column}"
    return kept, [LeftOut(run.folder, reason) for run, out in zip(runs, missing, strict=True) if out]


def describe_groups(groups: list[Group]) -> str:
    """Return how many runs are compared, for the terminal."""
    runs = sum(len(group.runs) for group in groups)
    return f"{format_count(runs, 'run')} in {format_count(len(groups), 'group')}"
