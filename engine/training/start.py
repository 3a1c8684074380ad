"""How a run starts: options, device, processes, and whether it resumes an earlier run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config.parser import Parser
from engine.runtime.checkpoint import Checkpoint, read_checkpoint
from engine.runtime.device import choose_device, choose_precision, setup_backends
from engine.runtime.distributed import (
    broadcast_from_main,
    check_same_value,
    init_processes,
    load_across_restarts,
    restart_count,
    store_across_restarts,
)
from engine.training.run_folder import RunFolder, choose_run_folder, find_resume
from engine.training.running_sums import EpochStats

MACHINE_OPTIONS = {"data_dir", "val_data_dir", "data_small", "data_large", "device", "workers", "debug"}


@dataclass(frozen=True)
class RunKind:
    """What a kind of run has of its own: classifiers, detectors, saliency maps."""

    name: str  # of its checkpoints: a key of engine.runtime.checkpoint.KINDS
    resolve: Callable[[Parser, dict, dict], dict]  # (parser, typed options, saved options) -> every option
    check_resume: Callable[..., None]  # raises UserError where typed options are not those of the saved run
    runs_of: Callable[[dict], tuple[Path, str]]  # options -> the folder of such runs, and how unnamed ones begin
    format_epoch: Callable[[dict, int], str]  # (row of the log, epochs) -> the printed line
    columns: Sequence[str]  # of log.csv
    metric: str | None = None  # column of the log by which the best epoch is chosen
    best_columns: Sequence[str] = ()  # of the best epoch, kept beside its metric
    timed_parts: Sequence[str] = ()  # parts of the step that have a column NAME_seconds
    progress_unit: str = "epoch"  # or "step": what a resumed run says that it continues after
    draw_nonfinite: Callable | None = None  # (path, evidence, classes): draw the batch whose loss was not finite
    find_resume: Callable = find_resume  # (options, runs_of) -> the checkpoint to resume, or None
    choose_folder: Callable = choose_run_folder  # (options, checkpoint to resume, runs_of) -> where the run is kept
    folder_type: type[RunFolder] = RunFolder
    stats_type: type[EpochStats] = EpochStats
    nonfinite_remedy: str = "a lower --lr, --clip_grad 1, or --amp bf16 or off"  # against a loss that is not finite


@dataclass
class Start:
    """What a run starts from."""

    kind: RunKind
    options: dict
    saved: Checkpoint | None  # of the run to resume
    folder: Path
    device: torch.device
    precision: torch.dtype | None  # of autocast; None: float32
    where: str  # device and precision, for the log
    notes: list[str] = field(default_factory=list)

    @property
    def saved_epoch(self) -> int:
        """The epoch, counted from 0, that the saved state belongs to: the one under way, or else the last finished."""
        return len(self.saved["history"]) - (not self.saved["inside"]) if self.saved else 0


def start_run(parser: Parser, typed: dict, options: dict, notes: list[str], kind: RunKind) -> Start:
    """Set up device, processes, seeds and precision, and find out where the run starts. In this order:

    1. It resumes the run that --checkpoint names, exactly.
    2. After torchrun has restarted the processes, it resumes itself.
    3. Otherwise it is a new run: with the weights of another run (--init_from),
    4. or with pretrained weights (--pretrained),
    5. or with random weights.

    The script loads the weights of 3 and 4 once the network is built. Raises UserError for a run that cannot be
    resumed, and rather than write over another run.
    """
    device = start_processes(options["device"], options.get("timeout", 0.0))
    options, saved, folder = resume_or_start(parser, typed, options, kind)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, text = choose_precision(options["amp"], device)
    return Start(kind, options, saved, folder, device, precision, f"{device}, {text}", notes)


def start_processes(device: str, timeout: float) -> torch.device:
    """The device of this process, after it has met the others under torchrun. timeout: in seconds."""
    chosen = choose_device(device)
    init_processes(chosen, timeout)
    return chosen


def resume_or_start(parser: Parser, typed: dict, options: dict, kind: RunKind) -> tuple[dict, Checkpoint | None, Path]:
    """The options (those of the run that is resumed, if one is), its checkpoint, and the folder of the run."""
    if earlier := load_across_restarts("run folder"):
        last = broadcast_from_main(lambda: str(path) if (path := Path(earlier) / "last.pt").exists() else None)
        options = {**options, "checkpoint": last, "overwrite": last is None}
    elif restart_count() and options["name"]:  # restarted by other means than those that keep the folder's name
        options = {**options, "checkpoint": options["checkpoint"] or "auto"}
    alike = {key: value for key, value in options.items() if key not in MACHINE_OPTIONS}
    check_same_value("options", alike, "start every process with the same command")
    resume = broadcast_from_main(lambda: kind.find_resume(options, kind.runs_of))
    saved = broadcast_from_main(lambda: read_checkpoint(resume, kind.name)) if resume else None
    if saved:
        kind.check_resume(typed, saved["config"], force=options.get("force_config", False))
        options = kind.resolve(parser, typed, saved["config"])
    folder = Path(earlier or broadcast_from_main(lambda: kind.choose_folder(options, resume, kind.runs_of)))
    store_across_restarts("run folder", str(folder))
    return options, saved, folder
