"""Start a run: options, device, processes, precision, and the earlier run to resume, if any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config.parser import Parser
from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint, read_checkpoint
from engine.runtime.claim import has_locks
from engine.runtime.device import choose_device, choose_precision, setup_backends
from engine.runtime.distributed import (
    broadcast_from_main,
    check_same_value,
    init_processes,
    is_main_process,
    load_across_restarts,
    restart_count,
    store_across_restarts,
)
from engine.runtime.text import format_count
from engine.training.run_folder import (
    RunFolder,
    claim_folder,
    claim_new_folder,
    describe_search,
    find_resume,
    writes_files,
)
from engine.training.running_sums import EpochStats

# options that may differ between processes
MACHINE_OPTIONS = {"data_dir", "val_data_dir", "data_small", "data_large", "device", "workers", "debug"}
MACHINE_OPTIONS |= {"train_annotations", "test_annotations", "images"}

RESTART_SECONDS = 30.0  # after a restart by torchrun: time for the earlier main process, perhaps elsewhere, to end


@dataclass(frozen=True)
class RunKind:
    """What distinguishes the kinds of runs: classifiers, detectors and saliency maps."""

    name: str  # of its checkpoints: a key of engine.runtime.checkpoint.KINDS
    resolve: Callable[[Parser, dict, dict], dict]  # (parser, typed options, saved options) -> every option
    check_resume: Callable[..., None]  # raises UserError if typed options contradict the saved run
    locate_runs: Callable[[dict], tuple[Path, str]]  # options -> parent folder, and prefix of runs without a name
    format_epoch: Callable[[dict, int, dict], str]  # (row of the log, epochs, options) -> the printed line
    columns: Sequence[str]  # of log.csv
    metric: str | None = None  # column of the log by which the best epoch is chosen
    best_columns: Sequence[str] = ()  # further columns of the best epoch to record
    timed_parts: Sequence[str] = ()  # parts of the step that have a column NAME_seconds
    progress_unit: str = "epoch"  # or "step", the unit in which a resumed run reports its progress
    draw_nonfinite: Callable | None = None  # (path, evidence, classes): draw the batch with a NaN or infinite loss
    find_resume: Callable = find_resume  # (options, locate_runs) -> the checkpoint to resume, or None
    folder_type: type[RunFolder] = RunFolder
    stats_type: type[EpochStats] = EpochStats
    # options -> the advice that lowers the learning rate, and whether --force_config applies it to a resumed run
    lower_rate: Callable[[dict], tuple[str, bool]] = lambda options: ("a lower --lr", True)
    data_remedy: str = "pass its data with --data_dir, or start a new run from its weights with --init_from"


@dataclass
class Start:
    """Everything that is decided before data and network are loaded."""

    kind: RunKind
    options: dict
    saved: Checkpoint | None  # of the run to resume; None: a new run
    folder: Path
    device: torch.device
    precision: torch.dtype | None  # of autocast; None: float32
    device_text: str  # device and precision, for the log
    notes: list[str] = field(default_factory=list)

    @property
    def saved_epoch(self) -> int:
        """The epoch, counted from 0, of the saved state: the unfinished epoch, if any, else the last finished one."""
        return len(self.saved["history"]) - (not self.saved["inside"]) if self.saved else 0


def start_run(parser: Parser, typed: dict, options: dict, notes: list[str], kind: RunKind) -> Start:
    """Set up device, processes, seeds and precision, and decide what the run starts from. The first that applies:

    1. After torchrun has restarted the processes, the last checkpoint of this run.
    2. With --checkpoint, that checkpoint, exactly.
    3. With --init_from, a new run with the weights of another run.
    4. With --pretrained, a new run with pretrained weights.
    5. A new run with random weights.

    The script loads the weights of 3 and 4 once the network is built. Raises UserError if a run cannot be resumed, or
    if the folder already holds another run.
    """
    device = start_processes(options["device"], options.get("timeout", 0.0))
    options, saved, folder = resume_or_start(parser, typed, options, kind, notes)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, text = choose_precision(options["amp"], device)
    return Start(kind, options, saved, folder, device, precision, f"{device}, {text}", notes)


def check_same_data(start: Start, classes: list[str], images: int) -> None:
    """Raise UserError if a run would resume on data of other classes or with another number of training images.

    With --force_config another number is only noted.
    """
    saved, remedy = start.saved or {}, start.kind.data_remedy
    before, count = saved.get("classes", classes), saved.get("images", images)
    if before != classes and len(before) == len(classes):
        raise UserError(
            f"the classes of the run to resume ({', '.join(before[:5])} ...) are not those of the data "
            f"({', '.join(classes[:5])} ...)\n{remedy}"
        )
    if (before, count) != (classes, images):
        change = (
            f"the run to resume was trained on {format_count(count, 'image')} of {format_count(len(before), 'class')}, "
            f"but this data has {format_count(images, 'image')} of {len(classes)}"
        )
        if before != classes or not start.options.get("force_config"):
            raise UserError(f"{change}\n{remedy}")
        start.notes.append(f"{change}; results will differ from an uninterrupted run")
    earlier_version = saved and "dpi" not in saved["config"]  # --limit was changed together with this option
    if earlier_version and start.options["limit"] and start.options["dataset"] != "shapes":
        start.notes.append("this run was started on the first images of --limit, which now spreads over the classes")


def start_processes(device: str, timeout: float) -> torch.device:
    """Choose the device of this process, join the process group under torchrun, and return the device.

    timeout: in seconds.
    """
    chosen = choose_device(device)
    init_processes(chosen, timeout)
    return chosen


def resume_or_start(
    parser: Parser, typed: dict, options: dict, kind: RunKind, notes: list[str]
) -> tuple[dict, Checkpoint | None, Path]:
    """Return the options, the checkpoint to resume (None: a new run), and the run folder. Adds to the notes.

    If a run is resumed, the options are those of its checkpoint, with the typed ones that may change.
    """
    store_key = f"run folder of {options['name']}"  # each of --seeds has its own
    if earlier := load_across_restarts(store_key):
        last = broadcast_from_main(lambda: str(path) if (path := Path(earlier) / "last.pt").exists() else None)
        options = {**options, "checkpoint": last, "overwrite": last is None}
    elif restart_count() and options["name"]:  # the store with the folder's path was lost, so find it by the name
        options = {**options, "checkpoint": options["checkpoint"] or "auto"}
    common = {key: value for key, value in options.items() if key not in MACHINE_OPTIONS}
    check_same_value("options", common, "start every process with the same command")
    resume = broadcast_from_main(lambda: kind.find_resume(options, kind.locate_runs))
    folder = earlier or (resume and kind.folder_type.find(resume))
    if folder and writes_files(options):  # before the checkpoint is read, which another process may replace
        wait = RESTART_SECONDS if restart_count() else 0.0
        broadcast_from_main(lambda: claim_folder(Path(folder), kind.folder_type, wait))
    saved = broadcast_from_main(lambda: read_checkpoint(resume, kind.name)) if resume else None
    if saved:
        trained = {**parser.defaults, **saved["config"]}  # options that are newer than the run had their defaults
        kind.check_resume(typed, trained, force=options.get("force_config", False))
        options = kind.resolve(parser, typed, saved["config"])
    if not folder:
        folder = broadcast_from_main(lambda: claim_new_folder(options, kind.locate_runs, kind.folder_type))
    store_across_restarts(store_key, str(folder))
    if is_main_process():
        notes[:0] = list_start_notes(options, resume, Path(folder), kind)
    return options, saved, Path(folder)


def list_start_notes(options: dict, resume: Path | None, folder: Path, kind: RunKind) -> list[str]:
    """Return notes if there was no run to resume, and if a second run in the folder could not be refused."""
    notes, flag = [], kind.folder_type.resume_flag
    if not resume and options[flag.strip("-")] == "auto":
        searched = describe_search(options, kind.locate_runs, kind.folder_type)
        notes.append(f"{flag} auto: A NEW RUN STARTS, for there is none to resume at {searched}")
    if writes_files(options) and not has_locks(kind.folder_type.get_lock(folder)):
        notes.append(f"{folder}: no locks on this file system; if two runs write there, the one that began first stops")
    return notes
