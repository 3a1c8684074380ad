"""The run folder: configuration, log, checkpoints and result of a run."""

import csv
import io
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint, find_checkpoint, get_versions, save_checkpoint
from engine.runtime.files import write_atomic, write_json

SECRET_OPTIONS = {"wandb_key"}


def locate_classifier_runs(options: dict) -> tuple[Path, str]:
    """Return the parent folder of all runs of this data set and model, and the prefix of runs without a --name."""
    return Path(options["root_dir"]) / options["dataset"] / options["model"], "+".join(options["method"])


def find_resume(options: dict, locate_runs: Callable) -> Path | None:
    """Return the checkpoint that --checkpoint names, or None if there is none.

    `auto` is last.pt of the run --name or, without a name, of the newest run of the method. Raises UserError if a named
    file does not exist.
    """
    if options["checkpoint"] != "auto":
        return find_checkpoint(options["checkpoint"]) if options["checkpoint"] else None
    parent, prefix = locate_runs(options)
    dated = sorted(parent.glob(f"{prefix}_????????-??????*"), key=lambda path: path.name)
    folder = parent / options["name"] if options["name"] else dated[-1] if dated else parent
    return folder / "last.pt" if (folder / "last.pt").exists() else None


def choose_run_folder(options: dict, resume: Path | None, locate_runs: Callable) -> Path:
    """Return the folder to write to: that of the resumed run, else a new one, for classifiers
    root_dir/dataset/model/name.

    resume: the checkpoint to resume from. Raises UserError if the folder already holds another run.
    """
    if resume and (resume.parent / "config.json").is_file():
        return resume.parent
    parent, prefix = locate_runs(options)
    if options["name"]:
        folder = parent / options["name"]
    else:
        base = f"{prefix}_{datetime.now():%Y%m%d-%H%M%S}"
        names = (base + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
        folder = next(parent / name for name in names if not (parent / name).exists())
    if (folder / "last.pt").exists() and not options["overwrite"] and not options["log_off"]:
        raise UserError(
            f"{folder} already holds a run\nresume it with --checkpoint auto --name {folder.name}, replace it with "
            "--overwrite, or choose another --name"
        )
    if (folder / "previous.pt").exists() and not options["overwrite"] and not options["log_off"]:
        raise UserError(
            f"{folder} holds a run whose last.pt is missing\nresume from the epoch before with --checkpoint "
            f"{folder / 'previous.pt'}, or replace the run with --overwrite"
        )
    return folder


class RunFolder:
    """The files of a run.

    off: write nothing, as in all processes but the main one. fresh: delete the checkpoints of an earlier run in the
    folder, so that none is mistaken for one of this run. columns: of log.csv. Raises UserError if the folder cannot be
    created.
    """

    resume_flag = "--checkpoint"

    def __init__(self, path: Path, *, off: bool = False, fresh: bool = False, columns: Sequence[str] = ()):
        self.path, self.off, self.columns = Path(path), off, columns
        self.trackers = []
        if not off:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                for stale in [*self.path.glob("*.pt"), *self.path.glob(".*.part")] if fresh else []:
                    stale.unlink()
            except OSError as error:
                raise UserError(
                    f"cannot create the run folder {self.path}: {error.strerror}; choose another place with --root_dir"
                ) from error

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
        for name in also:
            save_checkpoint(self.path / name, content)
        save_checkpoint(self.last, content, keep_previous=True)

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        print(text, flush=True)
        if not self.off:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def write_config(self, options: dict, device: torch.device, kind: str) -> None:
        if self.off:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        write_json(
            self.path / "config.json",
            {
                "kind": kind,
                "options": get_public_options(options),
                "versions": {**get_versions(), "opencv": get_opencv_versions()},
                "device": name,
                "command": hide_secrets(sys.argv),
                "commit": get_git_commit(),
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
