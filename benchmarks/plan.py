"""Read a plan: rows of training options, each to be run with several seeds.

A plan is an INI file. The section [plan] has what all rows share; every other section is a part, with a row a line:

    [plan]
    script = train.py                # or imagenet_train.py; this is the default
    metric = top1                    # what is compared, as in evaluation.compare; this is the default
    seeds = 0 1 2
    options = --recipe rmix --dataset cifar10 --epochs 60

    [first]
    none = 20 min --method none
    cutmix = --method cutmix

Parts are run in their order: the first seed of all rows of a part, then the second seed of all. `20 min` is an
estimate for one seed, from which the time that is left is computed. A part may have seeds of its own, and may name rows
of earlier parts to train them with further seeds:

    [more seeds]
    seeds = 3 4
    rows = none cutmix
"""

import configparser
import json
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import models
from engine.config.option_types import format_option, run_name, seed_list
from engine.config.parser import Parser
from engine.config.resolve import read_options
from engine.errors import UserError, suggest_closest
from engine.training.console import CLASSIFIER
from engine.training.pretrained import resolve_pretrained
from evaluation.compare.groups import get_result_options
from evaluation.compare.metrics import METRICS
from evaluation.compare.runs import Run

COMMON = "plan"  # the section of what all rows share
KEYS = {"script": "train.py", "metric": "top1", "seeds": "0", "options": ""}  # of this section -> default
SEEDS, ROWS = "seeds", "rows"  # entries of the other sections that are no rows: seeds of their own, and earlier rows
SCRIPTS = ("train.py", "imagenet_train.py")
OWN_OPTIONS = {"name", "seed", "seeds", "checkpoint", "config", "force_config", "root_dir", "overwrite", "log_off"}
OWN_OPTIONS |= {"evaluate", "profile", "list_models", "resize_to", "no_progress"}  # a row cannot set them
COMMAND_OPTIONS = {"data_dir", "device"}  # options of reproduce.py, for all rows
NEEDED = {"ema_top1": ("ema", "ema_ramp"), "valid_top1": ("valid_labels_per_class",)}  # metric -> one of these options
MINUTES = re.compile(r"(\d+(?:\.\d+)?) *min\b")


@dataclass(frozen=True)
class Row:
    """A row of a plan. words: its options and those that all rows share, as typed. minutes: of one seed; None: not
    estimated.
    """

    part: str
    name: str
    words: list[str]
    minutes: float | None


@dataclass(frozen=True)
class PlannedRun:
    """A row with one of its seeds. metric: what is compared. options: all of them, resolved. folder: of the run."""

    row: Row
    script: str
    metric: str
    seed: int
    options: dict
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def command(self) -> str:
        """The command that trains this run alone."""
        return shlex.join(["python", self.script, *self.row.words, "--seed", str(self.seed)])


def read_plan(path: Path, root: Path) -> list[PlannedRun]:
    """Return the runs of a plan in the order in which they are trained. root: folder of the runs.

    Raises UserError, with the row, for a plan that is malformed; wrong options of a row are usage errors.
    """
    sections = read_sections(path)
    common = {key: sections[COMMON].get(key, default) for key, default in KEYS.items()}
    seeds = read_seeds(path, common[SEEDS])
    for key, choices in {"script": SCRIPTS, "metric": METRICS}.items():
        if common[key] not in choices:
            raise UserError(f"{path}: {key} = {common[key]}: choose from {', '.join(choices)}")
    rows = list(read_rows(path, sections, common["options"]))
    if not rows:
        raise UserError(f"{path}: no rows; add a section, such as [first], with a line such as none = --method none")
    options = {row.name: resolve_row(path, common["script"], row) for row in rows}
    if needed := NEEDED.get(common["metric"]):
        lacking = [name for name, own in options.items() if not any(map(own.get, needed))]
        if lacking:
            flags = " or ".join(f"--{key}" for key in needed)
            raise UserError(f"{path}: metric = {common['metric']}: row {lacking[0]} needs {flags}")
    folders = {name: locate_run(own, root, name) for name, own in options.items()}
    by_name = {row.name: row for row in rows}
    planned = {}  # (row, seed) -> its run, in the order of training
    for part in sections.sections():
        again = read_earlier_rows(path, part, sections, by_name)
        own_seeds = read_seeds(path, sections[part][SEEDS]) if part != COMMON and SEEDS in sections[part] else seeds
        for seed in own_seeds:
            for row in (*again, *(row for row in rows if row.part == part)):
                folder = folders[row.name] / f"seed_{seed}"
                if (row.name, seed) in planned:
                    raise UserError(f"{path}: [{part}]: row {row.name} has seed {seed} already; name other seeds")
                planned[row.name, seed] = PlannedRun(
                    row, common["script"], common["metric"], seed, options[row.name], folder
                )
    return list(planned.values())


def read_seeds(path: Path, text: str) -> list[int]:
    """Return the seeds of an entry such as `0 1 2`. Raises UserError for other text and for repeated seeds."""
    try:
        seeds = [seed for word in text.split() for seed in seed_list(word)]
    except ArgumentTypeError as error:
        raise UserError(f"{path}: seeds: {error}") from error
    if not seeds or len({*seeds}) < len(seeds):
        raise UserError(f"{path}: seeds = {text}: name each seed once, such as seeds = 0 1 2")
    return seeds


def read_earlier_rows(path: Path, part: str, sections: configparser.ConfigParser, rows: dict[str, Row]) -> list[Row]:
    """Return the rows of other parts that a part names. rows: all of them by name."""
    names = sections[part].get(ROWS, "").split() if part != COMMON else []
    if unknown := [name for name in names if name not in rows]:
        raise UserError(f"{path}: [{part}]: rows: no row {unknown[0]}{suggest_closest(unknown[0], rows)}")
    if len({*names}) < len(names):
        raise UserError(f"{path}: [{part}]: rows = {' '.join(names)}: name each row once")
    return [rows[name] for name in names]


def read_sections(path: Path) -> configparser.ConfigParser:
    """Return the sections of a plan. Raises UserError if the file cannot be read, or without a section [plan]."""
    sections = configparser.ConfigParser(
        interpolation=None,
        delimiters=("=",),
        comment_prefixes=("#",),
        inline_comment_prefixes=("#",),
        default_section="",
    )
    sections.optionxform = str  # names keep their case
    try:
        text = path.read_text(encoding="utf-8")
        sections.read_string(text, source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the plan cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except configparser.DuplicateOptionError as error:
        raise UserError(f"{path}, line {error.lineno}: a second row {error.option}; give it another name") from error
    except configparser.MissingSectionHeaderError as error:
        raise UserError(f"{path}, line {error.lineno}: expected a section such as [{COMMON}] first") from error
    except configparser.ParsingError as error:
        line = error.errors[0][0]
        found = text.splitlines()[line - 1].strip()
        raise UserError(f"{path}, line {line}: expected NAME = OPTIONS or [PART], found {found}") from error
    except configparser.Error as error:
        first = " ".join(str(error).split())
        raise UserError(f"{path}: not a plan ({first}); write [PART] lines, and NAME = OPTIONS for each row") from error
    if COMMON not in sections:
        raise UserError(f"{path}: no section [{COMMON}]; add one with the lines seeds = 0 1 2 and options = ...")
    if unknown := sections[COMMON].keys() - KEYS.keys():
        key = min(unknown)
        hint = (
            suggest_closest(key, KEYS) or f"; choose from {', '.join(KEYS)}, and put rows into a section of their own"
        )
        raise UserError(f"{path}: unknown entry {key} in [{COMMON}]{hint}")
    return sections


def read_rows(path: Path, sections: configparser.ConfigParser, common: str) -> Iterator[Row]:
    """Yield the rows. common: the options that all of them share."""
    to_name, seen = run_name("--output"), {}
    for part in sections.sections():
        for name, text in sections[part].items() if part != COMMON else ():
            if name in (SEEDS, ROWS):
                continue
            try:
                to_name(name)
                found = MINUTES.match(text)
                words = shlex.split(f"{common} {text[found.end() if found else 0 :]}".replace("\n", " "))
            except (ArgumentTypeError, ValueError) as error:
                raise UserError(f"{path}: row {name}: {error}") from error
            if name in seen:
                raise UserError(f"{path}: row {name} is in [{seen[name]}] and in [{part}]; give one another name")
            seen[name] = part
            yield Row(part, name, words, float(found[1]) if found else None)


@cache
def build_parser(script: str) -> Parser:
    return import_module(Path(script).stem).build_parser()


def resolve_row(path: Path, script: str, row: Row) -> dict:
    """Return all options of a row, as config.json will have them. Wrong ones are usage errors that name the row."""
    parser = build_parser(script)
    parser.prog = f"{path}: row {row.name}"
    typed, _ = read_options(parser, row.words)
    for keys, remedy in (
        (OWN_OPTIONS, "reproduce.py sets this for each run; leave it out"),
        (COMMAND_OPTIONS, "give this to reproduce.py, for all rows"),
    ):
        if own := typed.keys() & keys:
            parser.error(f"{', '.join(f'--{key}' for key in sorted(own))}: {remedy}")
    return json.loads(json.dumps(resolve_pretrained(parser, typed, {}, models)))


def locate_run(options: dict, root: Path, name: str) -> Path:
    """Return the folder of the runs of a row, that of --seeds. root: folder of all runs."""
    return CLASSIFIER.locate_runs({**options, "root_dir": str(root)})[0] / name


def check_row(planned: PlannedRun, found: Run) -> None:
    """Raise UserError if the run in the folder of a planned run has other options."""
    wanted = get_result_options(Run(planned.folder, {"options": planned.options}, [], None, ""))
    options = get_result_options(found)
    changed = sorted(key for key in {*wanted, *options} if wanted.get(key) != options.get(key))
    if changed:
        pairs = [f"--{key} {format_value(options.get(key))} -> {format_value(wanted.get(key))}" for key in changed]
        raise UserError(
            f"row {planned.row.name}: the run in {planned.folder} has other options (run -> plan: {'; '.join(pairs)}); "
            "give the row another name, or delete that folder to train it anew"
        )


def format_value(value) -> str:
    return "-" if value is None else format_option(value)
