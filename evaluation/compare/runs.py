"""Find run folders, and read the options, the log and the state of the training runs in them."""

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.errors import explain_missing
from engine.runtime.claim import is_claimed
from engine.training.run_folder import RunFolder
from saliency.casm.network import SUFFIX as CASM_SUFFIX

RUN_FILES = ("config.json", "log.csv", "last.pt", "result.json")  # any of them makes a folder a run folder
COMPARED = "only runs of train.py and imagenet_train.py are compared"
FINISHED, RUNNING, STOPPED = "finished", "running", "stopped"


class LeftOut(NamedTuple):
    """A folder that the comparison leaves out, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: left out: {self.reason}"


@dataclass(frozen=True)
class Run:
    """A training run of a classifier, as its folder has it.

    folder: of the run. config: content of config.json. history: the rows of log.csv, one per finished epoch, as
    numbers; an empty cell has no entry. result: content of result.json, or None. status: FINISHED, RUNNING (a process
    has claimed the folder) or STOPPED (killed or interrupted before its last epoch).
    """

    folder: Path
    config: dict
    history: list[dict]
    result: dict | None
    status: str

    @property
    def options(self) -> dict:
        return self.config["options"]

    @property
    def method(self) -> str:
        return "+".join(self.options["method"])

    @property
    def seed(self) -> int:
        return self.options["seed"]

    @property
    def epochs(self) -> int:
        """The number of epochs that the run is to have."""
        return self.options["epochs"]

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    @property
    def commit(self) -> str | None:
        return self.config.get("commit")

    @property
    def device(self) -> str | None:
        return self.config.get("device")

    @property
    def mixed_images(self) -> list[Path]:
        """The pictures of mixed batches that --vis_epoch has drawn, from the first epoch to the last."""
        return sorted(self.folder.glob("vis/epoch_*"), key=split_numbers)

    def describe_status(self) -> str:
        """Return the status for a person, such as `running, epoch 3 of 200`."""
        return self.status if self.status == FINISHED else f"{self.status}, epoch {self.epoch} of {self.epochs}"


def find_runs(words: list[str]) -> tuple[list[Run], list[LeftOut]]:
    """Read all runs that the words name: run folders, folders that hold runs at any depth, and patterns of them.

    Each run comes once, in the order of the words. Returns the runs, and the folders that cannot be read.
    """
    runs, left_out = {}, []
    for word in words:
        for path in expand_word(word):
            folders = list(list_runs(path)) if path.is_dir() else [path]
            if not folders:
                left_out.append(LeftOut(path, "no run in this folder"))
            for folder in folders:
                if (key := folder.resolve()) in runs:
                    continue
                try:
                    runs[key] = read_run(folder)
                except ValueError as error:
                    runs[key] = None
                    left_out.append(LeftOut(folder, str(error)))
    return [run for run in runs.values() if run], left_out


def expand_word(word: str) -> list[Path]:
    """Return the paths that a word of the command line names: itself, or what matches it as a pattern."""
    if os.path.exists(word):
        return [Path(word)]
    found = [Path(match) for match in glob.glob(word, recursive=True)]
    return sorted(found, key=split_numbers) or [Path(word)]


def list_runs(path: Path) -> Iterator[Path]:
    """Yield all run folders, `path` itself among them, and all checkpoints of mask networks in it."""
    for parent, folders, files in os.walk(path):
        if any(name in files for name in RUN_FILES):
            yield Path(parent)
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(CASM_SUFFIX))
        folders.sort(key=split_numbers)


def split_numbers(path: Path | str) -> list:
    """Return a key by which seed_10 comes after seed_2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises ValueError, with the reason, if it does not hold a run that can be compared."""
    if not folder.is_dir():
        raise ValueError(explain_file(folder))
    config, history = read_config(folder / "config.json"), read_log(folder / "log.csv")
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else None
    if len(history) >= config["options"]["epochs"]:
        status = FINISHED
    else:
        status = RUNNING if is_claimed(RunFolder.get_lock(folder)) else STOPPED
    return Run(folder, config, history, result, status)


def explain_file(path: Path) -> str:
    """Return why a path that is not a folder cannot be compared."""
    if not path.exists():
        return explain_missing(path, "no such folder")
    return f"a casm run; {COMPARED}" if path.suffix == CASM_SUFFIX else "a file, not a run folder"


def read_config(path: Path) -> dict:
    """Read the config.json of a classifier's run. Raises ValueError for any other file."""
    if not path.is_file():
        raise ValueError("it has no config.json, so the options of the run are not known")
    config = read_json(path)
    options = config.get("options")
    if not isinstance(options, dict):
        raise ValueError("its config.json is not that of a run")
    kind = config.get("kind", "classifier")
    if kind != "classifier":
        raise ValueError(f"a {kind} run; {COMPARED}")
    types = {"method": list, "seed": int, "epochs": int, "dataset": str}
    if missing := [f"--{key}" for key, kind in types.items() if not isinstance(options.get(key), kind)]:
        raise ValueError(f"its config.json does not set {' '.join(missing)}")
    return config


def read_json(path: Path) -> dict:
    """Read a JSON file that holds a dictionary. Raises ValueError if it is damaged or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is damaged: it does not hold a dictionary")
    return content


def read_log(path: Path) -> list[dict]:
    """Read the rows of log.csv as numbers; [] if there is no file yet. Raises ValueError if it is damaged."""
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"log.csv cannot be read ({type(error).__name__}: {error})") from error
    if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError("log.csv is damaged: its epochs are not 1, 2, 3 ...")
    return [{**row, "epoch": int(row["epoch"])} for row in rows]
