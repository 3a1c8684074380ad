"""A run from epoch to epoch: taken up where it stopped, measured, kept, and ended well before its time."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from engine import configure
from engine.batches import Batches
from engine.checkpoint import read_checkpoint
from engine.cli import Parser
from engine.data import Data
from engine.device import own_stream
from engine.distributed import (
    StopSign,
    average_buffers,
    check_same,
    is_first,
    of_first,
    ranks,
    recall,
    remember,
    restarts,
    total,
    wrap,
)
from engine.log import RunFolder, add_trackers, find_resume, run_folder, runs_of
from engine.loop import Stopwatch, Tally, predict, profile, scores, train_one_epoch
from engine.phases import Calendar
from engine.progress import Progress, bars_wanted
from engine.report import announce, draw_epoch, finish, line_of, print_profile, result_of
from engine.training import Parts, peak_memory_mb, save, share_what_was_learned, step_options, stop_well

OF_A_MACHINE = {"data_dir", "val_data_dir", "data_small", "data_large", "device", "workers", "debug"}


class Task(NamedTuple):
    """What a kind of run has of its own where it is taken up again."""

    kind: str  # of its checkpoints
    settle: Callable  # (parser, typed, saved options) -> every option
    check_resume: Callable  # raises UserError where typed options are not those of the saved run
    runs_of: Callable  # options -> the folder of such runs, and how unnamed ones begin


CLASSIFIER = Task("classifier", configure.settle, configure.check_resume, runs_of)


def take_up(parser: Parser, typed: dict, options: dict, task: Task = CLASSIFIER) -> tuple[dict, dict | None, Path]:
    """What --checkpoint says: the options (of the run that goes on), its checkpoint or None, and the run folder.

    After torchrun has started the processes anew, the run goes on by itself. Raises UserError.
    """
    if before := recall("run folder"):
        last = of_first(lambda: str(Path(before) / "last.pt") if (Path(before) / "last.pt").exists() else None)
        options = {**options, "checkpoint": last, "overwrite": last is None}
    elif restarts() and options["name"]:  # started anew by other means than those that remember
        options = {**options, "checkpoint": options["checkpoint"] or "auto"}
    alike = {key: value for key, value in options.items() if key not in OF_A_MACHINE}
    check_same("options", alike, "start every process with the same command")
    resume = of_first(lambda: find_resume(options, task.runs_of))
    saved = of_first(lambda: read_checkpoint(resume, task.kind)) if resume else None
    if saved:
        task.check_resume(typed, saved["config"], force=options["force_config"])
        options = task.settle(parser, typed, saved["config"])
    folder = Path(before) if before else of_first(lambda: run_folder(options, resume, task.runs_of))
    remember("run folder", str(folder))
    return options, saved, folder


def notes_on_going_on(saved: dict, precision: torch.dtype | None) -> list[str]:
    """What makes the run that goes on from this checkpoint another one than it would have been."""
    notes = []
    if saved["precision"] != str(precision):
        notes.append(f"before it computed in {saved['precision']}: from here on it is not the run it would have been")
    if (before := len(saved["rng"])) != ranks():
        notes.append(
            f"{before} processes saved this run and {ranks()} continue it: the images of each step are the same, "
            "random draws, batch statistics and what a method learns are not; it is not the run it would have been"
        )
    return notes


class Run:
    """What a run has measured so far, and where it is kept. parts: what learns; saved: a checkpoint to go on from."""

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        options: dict,
        data: Data,
        *,
        calendar: Calendar,
        precision: torch.dtype | None,
        saved: dict | None = None,
    ):
        self.folder, self.parts, self.options, self.data = folder, parts, options, data
        self.calendar, self.precision = calendar, precision
        if options["compile"]:
            parts.model.compile()
        self.network = wrap(parts.model)  # what forward is called on in training
        own_stream(options["seed"])
        self.step = step_options(parts, options, data, precision) | {"network": self.network}
        self.history: list[dict] = []
        self.best = {"value": -1.0, "epoch": 0, "split": "valid" if data.valid else "test"}
        self.tally: Tally | None = None  # of the epoch under way when the run was stopped
        self.before = {"seconds": 0.0, "lr": None}  # of that epoch
        self.begun = 0.0
        self.notes: list[str] = []
        self.finished_before = bool(saved) and saved["epoch"] >= options["epochs"]
        if saved:
            self.go_on_from(saved)
        self.told_of_maps, self.anew = False, options["overwrite"] and not saved
        self.bar = bars_wanted(options["no_progress"]) and is_first()
        self.sign = StopSign()

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
        self.notes += notes_on_going_on(saved, self.precision)

    def begin(self, notes: list[str], where: str) -> None:
        """Start the files of the run and say what is about to happen."""
        self.log = RunFolder(self.folder, off=self.options["log_off"] or not is_first(), anew=self.anew)
        add_trackers(self.log, self.options)
        self.log.write_config(self.options, self.parts.device)
        self.log.write_log(self.history)
        where += f", {ranks()} processes" if ranks() > 1 else ""
        announce(self.log, self.options, self.data, where=where, notes=[*notes, *self.notes], done=len(self.history))
        self.sign.watch()

    def start_epoch(self, epoch: int) -> None:
        self.parts.mixer.start_epoch(epoch, self.options["epochs"], self.steps_of(epoch))

    def profile(self, batches: Batches, source) -> None:
        """--profile: time some steps, and print where the time went."""
        common = (self.parts.model, self.parts.mixer, source, batches, self.parts.optimizer)
        print_profile(profile(self.options["profile"], *common, **self.step), batches.batch_size)

    def train(self, epoch: int, batches: Batches, source) -> dict:
        """One epoch by engine.loop.train_one_epoch; the row of the log."""
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
                stop=self.sign.raised,
                steps_before=self.calendar.first_step(epoch),
            )
        self.tally = None
        for network in self.parts.networks:
            average_buffers(network)
        share_what_was_learned(self.parts)
        row |= {"epoch": epoch + 1, "lr": self.before["lr"], "seconds": time.perf_counter() - self.begun}
        row |= {f"{part}_seconds": watch.seconds().get(part, 0.0) for part in ("mixing", "saliency")}
        row |= {"images_per_second": row.pop("images") / row["seconds"]}
        return row | {"peak_memory_mb": peak_memory_mb(self.parts.device)}

    def ending_well(self):
        """Around an epoch: however it ends, what was done is kept and the way to go on is told."""

        def keep(tally: Tally) -> None:
            self.sign.rest()
            share_what_was_learned(self.parts)
            self.before["seconds"] = time.perf_counter() - self.begun
            self.save(tally=tally)

        return stop_well(self.log, self.parts, keep)

    def test(self, network: torch.nn.Module, batches: Batches) -> dict[str, float]:
        """Loss and accuracies in percent; all processes share the work, and only the first one gets the numbers."""
        with Progress("evaluating", len(batches), bar=self.bar, lines=False) as shown:
            logits, labels = predict(network, batches, progress=shown)
        return scores(logits, labels) if is_first() else {}

    def evaluate(self, held_out: dict[str, Batches]) -> dict[str, float]:
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

    def keep(self, row: dict, source, batches: Batches, also: list[str] | None = None) -> None:
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
        self.log.say(line_of(row, self.options["epochs"], int(total(torch.tensor(batches.skipped)))))
        if not self.told_of_maps and (unusable := int(total(torch.as_tensor(self.parts.mixer.unusable)))):
            self.told_of_maps = True
            self.log.say(f"note: {unusable} saliency maps were all zero or no numbers, and were taken as uniform")
        draw_epoch(self.log, self.options, self.history, self.parts, source, self.data, batches.part)

    def save(self, also: list[str] | tuple = (), tally: Tally | None = None) -> None:
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

    def finish(self, test_batches: Batches) -> dict | None:
        """The last lines; returns what result.json holds."""
        if self.finished_before:
            again = self.test(self.parts.model, test_batches)
            if is_first():
                accuracies = f"loss {again['loss']:.4f}, top-1 {again['top1']:.2f}"
                self.log.say(f"this run was finished already; evaluated again: {accuracies}")
        self.sign.rest()
        if not is_first():
            return None
        result = result_of(self.history, self.best)
        finish(self.log, result)
        return result
