"""The run folder: configuration, log, checkpoints and result of a run."""

import csv
import glob
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from engine.errors import UserError, suggest_closest
from engine.runtime.checkpoint import Checkpoint, find_checkpoint, get_versions, save_checkpoint
from engine.runtime.claim import check_claim, claim, read_owner
from engine.runtime.device import describe_machine
from engine.runtime.files import write_atomic, write_json

SECRET_OPTIONS = {"wandb_key"}
CHECKPOINTS = ("last.pt", "previous.pt", "epoch_*.pt", "phase_*.pt", "best.pt")
FIGURES = ("curves.*", "precision_recall.*", "vis/epoch_*", "vis/page_*")
RUN_FILES = (*CHECKPOINTS, *FIGURES, "log.txt", "log.csv", "result.json", "results.json", "nonfinite.*")
NAMES_SHOWN = 5  # of other runs, in a message
SIDE_FILES = ".*.part*"  # of a process that was killed while it wrote


def locate_classifier_runs(options: dict) -> tuple[Path, str]:
    """Return the parent folder of all runs of this data set and model, and the prefix of runs without a --name."""
    folder = options["model"].replace(":", "_")  # timm:NAME: Windows and scp take no colon in a path
    return Path(options["root_dir"]) / options["dataset"] / folder, "+".join(options["method"])


def find_resume(options: dict, locate_runs: Callable) -> Path | None:
    """Return the checkpoint that --checkpoint names, or None if there is none.

    `auto` is last.pt of the run --name or, without a name, of the newest run of the method. Raises UserError if a named
    file does not exist.
    """
    if options["checkpoint"] != "auto":
        return find_checkpoint(options["checkpoint"]) if options["checkpoint"] else None
    parent, prefix = locate_runs(options)
    dated = sorted(parent.glob(f"{prefix}_????????-??????*"), key=lambda path: path.name)
    dated = [path for path in dated if not any(path.glob("seed_*"))]  # a folder of --seeds is no run
    folder = parent / options["name"] if options["name"] else dated[-1] if dated else parent
    return folder / "last.pt" if (folder / "last.pt").exists() else None


class RunFolder:
    """The files of a run.

    off: write nothing, as in all processes but the main one. fresh: delete the files of an earlier run in the folder,
    so that none is mistaken for one of this run. columns: of log.csv. Raises UserError if the folder cannot be created.
    """

    resume_flag, parent_flag, suffix = "--checkpoint", "--root_dir", ""

    def __init__(self, path: Path, *, off: bool = False, fresh: bool = False, columns: Sequence[str] = ()):
        self.path, self.off, self.columns = Path(path), off, columns
        self.earlier = {} if fresh else read_config(self.path / "config.json")  # of the run before it was resumed
        self.trackers = []
        if not off:
            with explain_folder_errors(self.path, self.parent_flag):
                self.get_lock(self.path).parent.mkdir(parents=True, exist_ok=True)
                for stale in self.list_stale(fresh):
                    stale.unlink(missing_ok=True)

    @staticmethod
    def get_lock(path: Path) -> Path:
        """Return the file by which a process claims the run folder `path`."""
        return path / ".lock"

    @staticmethod
    def find(checkpoint: Path) -> Path | None:
        """Return the run folder of a checkpoint; None if the file lies elsewhere."""
        return checkpoint.parent if (checkpoint.parent / "config.json").is_file() else None

    @staticmethod
    def list_runs(parent: Path) -> list[str]:
        """Return the names of the runs in a folder that can be resumed."""
        return sorted(file.parent.name for file in parent.glob("*/last.pt"))

    @staticmethod
    def find_namesakes(parent: Path, name: str) -> list[Path]:
        """Return the runs of this name on other data sets or models."""
        return sorted(file.parent for file in parent.parent.parent.glob(f"*/*/{glob.escape(name)}/last.pt"))

    @staticmethod
    def list_seeds(path: Path) -> list[str]:
        """Return the names of the runs of --seeds in the folder that they share."""
        return sorted(file.parent.name for file in path.glob("seed_*/last.pt"))

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise UserError, with the remedy, if the folder already holds a run or runs of --seeds."""
        if seeds := RunFolder.list_seeds(path):
            raise UserError(
                f"{path} already holds {', '.join(seeds)}, runs of --seeds\nresume all of them with --seeds and "
                f"--checkpoint auto, one with --checkpoint {path / seeds[0]}, or choose another --name"
            )
        if (path / "last.pt").exists():
            raise UserError(
                f"{path} already holds a run\nresume it with --checkpoint auto --name {path.name}, replace it with "
                "--overwrite, or choose another --name"
            )
        if not (path / "previous.pt").exists() and count_lines(path / "log.csv") < 2:
            return  # no epoch was finished
        kept = [file for pattern in CHECKPOINTS for file in sorted(path.glob(pattern), reverse=True)]
        remedy = f"resume it with --checkpoint {kept[0]}" if kept else "choose another --name"
        raise UserError(f"{path} holds a run whose last.pt is missing\n{remedy}, or replace the run with --overwrite")

    def list_stale(self, fresh: bool) -> Iterator[Path]:
        """Yield the side files of killed processes and, if fresh, the files of an earlier run."""
        for pattern in (SIDE_FILES, *(RUN_FILES if fresh else ())):
            yield from self.path.glob(pattern)

    @property
    def last(self) -> Path:
        """The checkpoint from which the run resumes."""
        return self.path / "last.pt"

    @property
    def nonfinite(self) -> Path:
        """The file for the weights and the batch of a NaN or infinite loss."""
        return self.path / "nonfinite.pt"

    def save(self, content: Checkpoint, also: Sequence[str] = ()) -> None:
        """Write the checkpoints named in `also`, then last.pt; the last.pt before it becomes previous.pt."""
        check_claim(self.get_lock(self.path))
        for name in also:
            save_checkpoint(self.path / name, content)
        save_checkpoint(self.last, content, keep_previous=True)

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        print(text, flush=True)
        if not self.off:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def write_config(self, options: dict, device: torch.device, kind: str, **more) -> None:
        """Write config.json. more: entries besides the options and the circumstances of the run."""
        if self.off:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        commit = get_git_commit()
        write_json(
            self.path / "config.json",
            {
                "kind": kind,
                "options": get_public_options(options),
                **more,
                "versions": {**get_versions(), "opencv": get_opencv_versions()},
                "device": name,
                "command": hide_secrets(sys.argv),
                "commit": commit,
                "machines": add_distinct(self.earlier.get("machines"), describe_machine(device)),
                "commits": add_distinct(self.earlier.get("commits"), commit),
            },
        )

    def write_log(self, history: list[dict]) -> None:
        """Rewrite log.csv from all epochs so far, so that an interrupted run neither loses nor repeats a row."""
        if self.off:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: format_value(value) for key, value in row.items()} for row in history)
        write_atomic(self.path / "log.csv", lambda side: side.write_text(text.getvalue(), encoding="utf-8"))

    def track(self, row: dict) -> None:
        for tracker in self.trackers:
            tracker(row)

    def write_result(self, result: dict) -> None:
        if not self.off:
            write_json(self.path / "result.json", result)


def read_config(path: Path) -> dict:
    """Return the content of a config.json; {} if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def add_distinct(values: list | None, value) -> list:
    """Return the values with a further one, unless it is among them."""
    return list(dict.fromkeys([*(values or []), value]))


def count_lines(path: Path) -> int:
    """Return the number of lines of a text file, 0 if there is none."""
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


@contextmanager
def explain_folder_errors(path: Path, parent_flag: str) -> Iterator[None]:
    """Raise UserError for a run folder that cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot create the run folder {path}: {error.strerror}; choose another place with {parent_flag}"
        ) from error


def describe_search(options: dict, locate_runs: Callable, folder_type: type[RunFolder]) -> str:
    """Return where a resume with `auto` has looked in vain, and which runs it could have meant, for a message."""
    (parent, prefix), name = locate_runs(options), options["name"]
    text = str(parent / ((name or f"{prefix}_date-time") + folder_type.suffix))
    if names := folder_type.list_runs(parent):
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        text += f"; runs in {parent}: {', '.join(names[:NAMES_SHOWN])}{more}{suggest_closest(name or prefix, names)}"
    if name and (others := folder_type.find_namesakes(parent, name)):
        text += f"; a run of this name is in {others[0]}"
    return text


def writes_files(options: dict) -> bool:
    return not (options.get("log_off") or options.get("profile"))


def claim_folder(path: Path, folder_type: type[RunFolder], wait: float = 0.0) -> Path:
    """Claim a run folder for this process and return it. wait: seconds to wait for another process to end.

    Raises UserError if another process has it.
    """
    lock = folder_type.get_lock(path)
    with explain_folder_errors(path, folder_type.parent_flag):
        claimed = claim(lock, wait=wait)
    if not claimed:
        raise UserError(
            f"{path} is in use: {read_owner(lock)} writes to it\nstop that process or wait for its end; a second run "
            f"needs another --name; if that machine is gone, delete {lock}"
        )
    return path


def claim_new_folder(options: dict, locate_runs: Callable, folder_type: type[RunFolder]) -> Path:
    """Claim a folder for a new run: that of --name, or the first free one of NAME, NAME-2 ... with the date as NAME.

    For classifiers it is root_dir/dataset/model/NAME. With --log_off and --profile, which write no files, it stays
    unclaimed. Raises UserError if the folder of --name is in use or already holds another run.
    """
    parent, prefix = locate_runs(options)
    if options["name"]:
        path = parent / (options["name"] + folder_type.suffix)
        if writes_files(options):
            claim_folder(path, folder_type)
            if not options["overwrite"]:
                folder_type.check_free(path)
        return path
    base = f"{prefix}_{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        path = parent / (base + (f"-{number}" if number > 1 else "") + folder_type.suffix)
        with explain_folder_errors(path, folder_type.parent_flag):
            if not path.exists() and (not writes_files(options) or claim(folder_type.get_lock(path), new=True)):
                return path


def get_public_options(options: dict) -> dict:
    """Return the options that may be written to a file: all but secrets."""
    return {key: value for key, value in options.items() if key not in SECRET_OPTIONS}


def format_value(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def get_opencv_versions() -> dict[str, str]:
    """Return the version of each installed OpenCV distribution; two of them overwrite each other's files.

    Reads the package metadata, since importing cv2 is slow.
    """
    versions = {}
    for name in ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def get_git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def hide_secrets(words: list[str]) -> list[str]:
    """Return a command line with the values of secret options replaced by ***."""
    hidden, skip = [], False
    for word in words:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        hidden.append(
            "***" if skip else f"{word.split('=')[0]}=***" if name in SECRET_OPTIONS and "=" in word else word
        )
        skip = name in SECRET_OPTIONS and "=" not in word
    return hidden
