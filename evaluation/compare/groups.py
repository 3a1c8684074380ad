"""Sort runs into groups that differ in nothing but their seed, and name the groups by what distinguishes them."""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import models
import saliency
from engine.config.legacy_options import translate_saved
from engine.config.mixing_options import add_mixing_options
from engine.config.option_types import format_option
from engine.config.options import DATASETS, add_data_options, add_device_options, add_imagenet_options
from engine.config.parser import Parser
from engine.config.recipes import COMMON
from engine.config.resolve import RULES
from engine.config.training_options import add_training_options
from engine.config.unused_options import SCHEDULER_OPTIONS
from evaluation.compare.runs import FINISHED, RUNNING, LeftOut, Run

RESULT_OPTIONS = {"epochs", "amp"}  # may change when a run is resumed, and yet change its results
NEUTRAL_OPTIONS = (RULES.changeable | RULES.per_call) - RESULT_OPTIONS  # never change what a run learns, but for its
NEUTRAL_OPTIONS |= {"seed", "seeds", "deterministic", "channels_last"}  # random numbers and the last digits
FIRST_IN_LABELS = [
    "method_weights",
    "labels",
    "recipe",
    "model",
    "model_args",
    "saliency",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
]
UNSET = "-"
NESTED_OPTIONS = {"method_options", "phase_options"}  # of recipes: too long for a label


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only, by seed. label: names them within one comparison."""

    label: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == FINISHED]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.status != FINISHED]

    @property
    def options(self) -> dict:
        """The options that decide the results, with the defaults of those that an older run does not know."""
        return get_result_options(self.runs[0])


@cache
def get_default_options() -> dict:
    """Return the defaults of the options that may be missing in the config.json of an older run."""
    parser, methods = Parser(""), SimpleNamespace(MIXERS={}, ALIASES={})  # their names matter to no default
    add_training_options(parser, methods=methods, models=models, recipes=["auto"], large_images=True)
    add_imagenet_options(parser)
    add_data_options(parser, DATASETS)
    add_mixing_options(parser, sources=saliency)
    add_device_options(parser)
    return COMMON | {key: value for key, value in parser.defaults.items() if value is not None}


def get_result_options(run: Run) -> dict:
    """Return the options of a run that decide its results, without its seed. Values that set nothing are left out, and
    so are options that the learning rate schedule of the run does not read.
    """
    saved = translate_saved(run.options)
    options = get_default_options() | {key: value for key, value in saved.items() if value is not None}
    unread = {key for key, readers in SCHEDULER_OPTIONS.items() if options.get("scheduler") not in readers}
    ignored = NEUTRAL_OPTIONS | unread
    return {key: value for key, value in options.items() if key not in ignored and value not in ([], {}, "")}


def group_runs(runs: list[Run]) -> tuple[list[Group], list[LeftOut]]:
    """Return the groups, in the order of their first runs, and the runs that repeat the seed of another one."""
    members: list[tuple[dict, dict[int, Run]]] = []
    left_out = []
    for run in runs:
        options = get_result_options(run)
        seeds = next((found for known, found in members if known == options), None)
        if seeds is None:
            members.append((options, seeds := {}))
        kept = max(seeds.get(run.seed, run), run, key=rank_progress)  # of equals, the first
        if run.seed in seeds:
            other = run if kept is not run else seeds[run.seed]
            left_out.append(LeftOut(other.folder, f"has the options and the seed {run.seed} of {kept.folder}"))
        seeds[run.seed] = kept
    labels = make_labels([options for options, _ in members])
    groups = [
        Group(label, [seeds[seed] for seed in sorted(seeds)]) for label, (_, seeds) in zip(labels, members, strict=True)
    ]
    return groups, left_out


def rank_progress(run: Run) -> tuple[bool, bool, int]:
    """Return how much a run can say: a finished one most, then one that still runs, then the longest."""
    return run.status == FINISHED, run.status == RUNNING, run.epoch


def make_labels(options: list[dict]) -> list[str]:
    """Return a name for each set of options: the method, and as few further options as distinguish all of them."""
    labels = ["+".join(own["method"]) for own in options]
    keys = {key for own in options for key in own} - NESTED_OPTIONS - {"method"}
    keys = [*(key for key in FIRST_IN_LABELS if key in keys), *sorted(keys - {*FIRST_IN_LABELS})]
    for label in set(labels):
        split_label(labels, [k for k, own in enumerate(labels) if own == label], options, keys)
    counts = [labels[:k].count(label) for k, label in enumerate(labels)]  # they differ in a recipe's method options
    return [f"{label} ({count + 1})" if count else label for label, count in zip(labels, counts, strict=True)]


def split_label(labels: list[str], same: list[int], options: list[dict], keys: list[str]) -> None:
    """Complete, in place, the labels at the positions `same`, which are equal so far, by options of `keys` that differ
    among them.
    """
    for key in keys if len(same) > 1 else ():
        values = [format_value(options[k].get(key)) for k in same]
        if len(set(values)) > 1:
            for k, value in zip(same, values, strict=True):
                labels[k] += f", {key} {value}" if value != UNSET else ""
            for value in set(values):
                split_label(labels, [k for k, own in zip(same, values, strict=True) if own == value], options, keys)
            return


def format_value(value) -> str:
    """Return the value of an option as text; UNSET for an option that is not set."""
    if isinstance(value, dict):
        return " ".join(f"{key}={format_value(own)}" for key, own in value.items())
    return UNSET if value is None else format_option(value)
