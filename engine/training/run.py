"""A run from epoch to epoch: taken up where it stopped, measured, kept, and ended well before its time."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from engine.config import resolve, resume_rules
from engine.config.parser import Parser
from engine.data.image_set import Data
from engine.data.loader import DeviceLoader
from engine.inference.predict import compute_scores, predict
from engine.runtime.checkpoint import read_checkpoint
from engine.runtime.device import seed_rank_generator
from engine.runtime.distributed import (
    all_reduce_sum,
    average_buffers,
    broadcast_from_main,
    check_same_value,
    is_main_process,
    load_across_restarts,
    restart_count,
    store_across_restarts,
    world_size,
    wrap_ddp,
)
from engine.runtime.memory import peak_memory_mb
from engine.runtime.preemption import PreemptionGuard
from engine.runtime.progress import Progress, use_progress_bar
from engine.training.console import draw_epoch, format_epoch, log_header, log_result, print_profile, summarize_history
from engine.training.loop import profile_steps, train_one_epoch
from engine.training.run_folder import RunFolder, choose_run_folder, classifier_runs, find_resume
from engine.training.running_sums import EpochStats
from engine.training.shutdown import graceful_shutdown
from engine.training.state import TrainingState, save, step_options, sync_sources
from engine.training.step_calendar import StepSchedule
from engine.training.stopwatch import Stopwatch
from engine.training.trackers import add_trackers

MACHINE_OPTIONS = {"data_dir", "val_data_dir", "data_small", "data_large", "device", "workers", "debug"}


class RunKind(NamedTuple):
    """What a kind of run has of its own where it is taken up again."""

    kind: str  # of its checkpoints
    settle: Callable  # (parser, typed, saved options) -> every option
    check_resume: Callable  # raises UserError where typed options are not those of the saved run
    runs_of: Callable  # options -> the folder of such runs, and how unnamed ones begin


CLASSIFIER = RunKind("classifier", resolve.resolve_options, resume_rules.check_resume_options, classifier_runs)


def resume_or_start(
    parser: Parser, typed: dict, options: dict, task: RunKind = CLASSIFIER
) -> tuple[dict, dict | None, Path]:
    """What --checkpoint says: the options (of the run that goes on), its checkpoint or None, and the run folder.

    After torchrun has started the processes anew, the run goes on by itself. Raises UserError.
    """
    if before := load_across_restarts("run folder"):
        last = broadcast_from_main(
            lambda: str(Path(before) / "last.pt") if (Path(before) / "last.pt").exists() else None
        )
        options = {**options, "checkpoint": last, "overwrite": last is None}
    elif restart_count() and options["name"]:  # started anew by other means than those that remember
        options = {**options, "checkpoint": options["checkpoint"] or "auto"}
    alike = {key: value for key, value in options.items() if key not in MACHINE_OPTIONS}
    check_same_value("options", alike, "start every process with the same command")
    resume = broadcast_from_main(lambda: find_resume(options, task.runs_of))
    saved = broadcast_from_main(lambda: read_checkpoint(resume, task.kind)) if resume else None
    if saved:
        task.check_resume(typed, saved["config"], force=options["force_config"])
        options = task.settle(parser, typed, saved["config"])
    folder = Path(before) if before else broadcast_from_main(lambda: choose_run_folder(options, resume, task.runs_of))
    store_across_restarts("run folder", str(folder))
    return options, saved, folder


def resume_notes(saved: dict, precision: torch.dtype | None) -> list[str]:
    """What makes the run that goes on from this checkpoint another one than it would have been."""
    notes = []
    if saved["precision"] != str(precision):
        notes.append(f"before it computed in {saved['precision']}: from here on it is not the run it would have been")
    if (before := len(saved["rng"])) != world_size():
        notes.append(
            f"{before} processes saved this run and {world_size()} continue it: the images of each step are the same, "
            "random draws, batch statistics and what a method learns are not; it is not the run it would have been"
        )
    return notes


class Run:
    """What a run has measured so far, and where it is kept. parts: what learns; saved: a checkpoint to go on from."""

    def __init__(
        self,
        folder: Path,
        parts: TrainingState,
        options: dict,
        data: Data,
        *,
        calendar: StepSchedule,
        precision: torch.dtype | None,
        saved: dict | None = None,
    ):
        self.folder, self.parts, self.options, self.data = folder, parts, options, data
        self.calendar, self.precision = calendar, precision
        if options["compile"]:
            parts.model.compile()
        self.network = wrap_ddp(parts.model)  # what forward is called on in training
        seed_rank_generator(options["seed"])
        self.step = step_options(parts, options, data, precision) | {"network": self.network}
        self.history: list[dict] = []
        self.best = {"value": -1.0, "epoch": 0, "split": "valid" if data.valid else "test"}
        self.tally: EpochStats | None = None  # of the epoch under way when the run was stopped
        self.before = {"seconds": 0.0, "lr": None}  # of that epoch
        self.begun = 0.0
        self.notes: list[str] = []
        self.finished_before = bool(saved) and saved["epoch"] >= options["epochs"]
        if saved:
            self.go_on_from(saved)
        self.told_of_maps, self.anew = False, options["overwrite"] and not saved
        self.bar = use_progress_bar(options["no_progress"]) and is_main_process()
        self.sign = PreemptionGuard()

    @property
    def epochs(self) -> range:
        """Those that are still to come."""
        return range(len(self.history), self.options["epochs"])

    def steps_of(self, epoch: int) -> int:
        return self.calendar.place(self.calendar.first_step(epoch))[2]

    def go_on_from(self, saved: dict) -> None:
        """Take up a checkpoint, and note what will not be as it would have been."""
        self.history, self.best, self.before = saved["history"], saved["best"], saved["before"]
        if saved["inside"]:  # the state of the method says where in the epoch it is
            self.start_epoch(len(self.history))
        self.tally = self.parts.load(saved)
        if self.tally:
            self.notes.append(f"epoch {len(self.history) + 1} goes on after {self.tally.step} of its steps")
        self.notes += resume_notes(saved, self.precision)

    def begin(self, notes: list[str], where: str) -> None:
        """Start the files of the run and say what is about to happen."""
        self.log = RunFolder(self.folder, off=self.options["log_off"] or not is_main_process(), anew=self.anew)
        add_trackers(self.log, self.options)
        self.log.write_config(self.options, self.parts.device)
        self.log.write_log(self.history)
        where += f", {world_size()} processes" if world_size() > 1 else ""
        log_header(self.log, self.options, self.data, where=where, notes=[*notes, *self.notes], done=len(self.history))
        self.sign.install()

    def start_epoch(self, epoch: int) -> None:
        self.parts.mixer.start_epoch(epoch, self.options["epochs"], self.steps_of(epoch))

    def profile(self, batches: DeviceLoader, source) -> None:
        """--profile: time some steps, and print where the time went."""
        common = (self.parts.model, self.parts.mixer, source, batches, self.parts.optimizer)
        print_profile(profile_steps(self.options["profile"], *common, **self.step), batches.batch_size)

    def train(self, epoch: int, batches: DeviceLoader, source) -> dict:
        """One epoch by engine.training.loop.train_one_epoch; the row of the log."""
        if self.tally is None:
            self.start_epoch(epoch)
            self.before = {"seconds": 0.0, "lr": self.parts.optimizer.param_groups[0]["lr"]}
        watch, self.begun = Stopwatch(self.parts.device), time.perf_counter() - self.before["seconds"]
        with Progress(f"epoch {epoch + 1}/{self.options['epochs']}", len(batches), bar=self.bar) as shown:
            row = train_one_epoch(
                *(self.parts.model, self.parts.mixer, source, batches, self.parts.optimizer),
                **self.step,
                epoch=epoch,
                watch=watch,
                look_every=self.options["print_freq"],
                progress=shown,
                tally=self.tally,
                stop=self.sign.requested,
                steps_before=self.calendar.first_step(epoch),
            )
        self.tally = None
        for network in self.parts.networks:
            average_buffers(network)
        sync_sources(self.parts)
        row |= {"epoch": epoch + 1, "lr": self.before["lr"], "seconds": time.perf_counter() - self.begun}
        row |= {f"{part}_seconds": watch.seconds().get(part, 0.0) for part in ("mixing", "saliency")}
        row |= {"images_per_second": row.pop("images") / row["seconds"]}
        return row | {"peak_memory_mb": peak_memory_mb(self.parts.device)}

    def ending_well(self):
        """Around an epoch: however it ends, what was done is kept and the way to go on is told."""

        def keep(tally: EpochStats) -> None:
            self.sign.restore()
            sync_sources(self.parts)
            self.before["seconds"] = time.perf_counter() - self.begun
            self.save(tally=tally)

        return graceful_shutdown(self.log, self.parts, keep)

    def test(self, network: torch.nn.Module, batches: DeviceLoader) -> dict[str, float]:
        """Loss and accuracies in percent; all processes share the work, and only the first one gets the numbers."""
        with Progress("evaluating", len(batches), bar=self.bar, lines=False) as shown:
            logits, labels = predict(network, batches, progress=shown)
        return compute_scores(logits, labels) if is_main_process() else {}

    def evaluate(self, held_out: dict[str, DeviceLoader]) -> dict[str, float]:
        """The columns of the log for the held-out parts, in the epochs that --eval_every names and in the last one."""
        epoch = len(self.history) + 1
        if epoch % self.options["eval_every"] and epoch != self.options["epochs"]:
            return {}
        columns = {
            f"{name}_{key}": value
            for name, batches in held_out.items()
            for key, value in self.test(self.parts.model, batches).items()
        }
        if self.parts.ema and (averaged := self.test(self.parts.ema.module, held_out["test"])):
            columns["ema_top1"] = averaged["top1"]
        return columns

    def keep(self, row: dict, source, batches: DeviceLoader, also: list[str] | None = None) -> None:
        """The epoch of this row, trained on `batches`, is done: checkpoints, log, pictures. also: further checkpoints
        to write.
        """
        self.history.append(row)
        epoch, split, also = row["epoch"], self.best["split"], list(also or [])
        if row.get(f"{split}_top1", -1.0) > self.best["value"]:
            self.best |= {"value": row[f"{split}_top1"], "epoch": epoch, "test_top1": row["test_top1"]}
            also.append("best.pt")
        if self.options["save_every"] and epoch % self.options["save_every"] == 0:
            also.append(f"epoch_{epoch:03d}.pt")
        self.save(also=also)
        self.log.write_log(self.history)
        self.log.track(row)
        self.log.say(format_epoch(row, self.options["epochs"], int(all_reduce_sum(torch.tensor(batches.skipped)))))
        if not self.told_of_maps and (unusable := int(all_reduce_sum(torch.as_tensor(self.parts.mixer.unusable)))):
            self.told_of_maps = True
            self.log.say(f"note: {unusable} saliency maps were all zero or no numbers, and were taken as uniform")
        draw_epoch(self.log, self.options, self.history, self.parts, source, self.data, batches.part)

    def save(self, also: list[str] | tuple = (), tally: EpochStats | None = None) -> None:
        steps = self.calendar.first_step(len(self.history)) + (tally.step if tally else 0)
        save(
            self.log,
            self.parts,
            self.options,
            self.data,
            self.history,
            self.best,
            steps=steps,
            precision=str(self.precision),
            also=also,
            tally=tally,
            before=self.before,
        )

    def finish(self, test_batches: DeviceLoader) -> dict | None:
        """The last lines; returns what result.json holds."""
        if self.finished_before:
            again = self.test(self.parts.model, test_batches)
            if is_main_process():
                accuracies = f"loss {again['loss']:.4f}, top-1 {again['top1']:.2f}"
                self.log.say(f"this run was finished already; evaluated again: {accuracies}")
        self.sign.restore()
        if not is_main_process():
            return None
        result = summarize_history(self.history, self.best)
        log_result(self.log, result)
        return result
