"""One training run: resume, evaluate each epoch, save checkpoints, shut down cleanly on signals."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import Terminated, UserError
from engine.runtime.checkpoint import Checkpoint, DataInfo, make_checkpoint, save_checkpoint
from engine.runtime.device import seed_rank_generator
from engine.runtime.distributed import all_reduce_sum, average_buffers, barrier, is_main_process, world_size
from engine.runtime.memory import peak_memory_mb
from engine.runtime.preemption import PreemptionGuard
from engine.runtime.progress import Progress, use_progress_bar
from engine.training.monitor import EpochMonitor
from engine.training.run_folder import get_opencv_versions, public_options
from engine.training.running_sums import EpochStats, NonFiniteLoss, TrainingInterrupted
from engine.training.schedule import StepSchedule
from engine.training.start import Start
from engine.training.trackers import add_trackers


class Run:
    """The progress of a run, and the folder where it is kept; for classifiers, detectors and saliency maps.

    start: the options, and the checkpoint to resume. state: what learns; engine.training.state.TrainingState is one.
    data: what a checkpoint says of the data. schedule: steps of each epoch. total_steps: where the last epoch is cut
    short. split: the images on which the best epoch is chosen. extra: further entries of its checkpoints.
    """

    def __init__(
        self,
        start: Start,
        state,
        data: DataInfo,
        schedule: StepSchedule,
        *,
        epochs: int,
        total_steps: int | None = None,
        split: str = "test",
        extra: dict | None = None,
    ):
        self.kind, self.options, self.where = start.kind, start.options, start.where
        self.state, self.data, self.schedule, self.precision = state, data, schedule, start.precision
        self.last_epoch, self.total_steps = epochs, total_steps or schedule.first_step(epochs)
        self.extra = extra or {}
        self.history: list[dict] = []
        self.best = {"value": -1.0, "epoch": 0, "split": split}
        self.stats: EpochStats | None = None  # of the epoch under way
        self.epoch_start: dict = {"seconds": 0.0, "lr": None}  # of that epoch
        self.notes: list[str] = []  # on how a resumed run differs
        self.warned_maps = False
        self.bar = use_progress_bar(self.options["no_progress"]) and is_main_process()
        self.guard = PreemptionGuard()
        seed_rank_generator(self.options["seed"])
        if start.saved:
            self.load_checkpoint(start.saved)
        self.finished_before = bool(start.saved) and not self.epochs
        off = self.options.get("log_off", False) or not is_main_process()
        fresh = self.options["overwrite"] and not start.saved
        self.log = self.kind.folder_type(start.folder, off=off, fresh=fresh, columns=self.kind.columns)

    @property
    def epochs(self) -> range:
        """The epochs that are still to come, counted from 0."""
        return range(len(self.history), self.last_epoch)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last one may be cut short."""
        first = self.schedule.first_step(epoch)
        return min(self.schedule.first_step(epoch + 1), self.total_steps) - first

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.schedule.first_step(len(self.history)) + (self.stats.step if self.stats else 0)

    def load_checkpoint(self, saved: Checkpoint) -> None:
        """Restore a checkpoint, and note in which way the run will differ from one that was never interrupted."""
        self.history, self.best, self.epoch_start = saved["history"], saved["best"], saved["before"]
        if saved["inside"]:  # the state of the method says where in the epoch it is
            self.start_epoch(len(self.history))
        self.stats = self.state.load_state_dict(saved)
        if self.stats:
            self.notes.append(f"epoch {len(self.history) + 1} goes on after {self.stats.step} of its steps")
        if saved["precision"] != str(self.precision):
            self.notes.append(
                f"before it computed in {saved['precision']}: from here on it is not the run it would have been"
            )
        if (processes := len(saved["rng"])) != world_size():
            self.notes.append(
                f"{processes} processes saved this run and {world_size()} continue it: the images of each step are the "
                "same, random draws, batch statistics and what a method learns are not; it is not the run it would "
                "have been"
            )

    def log_header(self, lines: list[str], notes: list[str]) -> None:
        """Begin the files of the run, say what is about to run, and listen to SIGTERM from here on."""
        add_trackers(self.log, self.options)
        self.log.write_config(self.options, self.state.device, kind=self.kind.name)
        self.log.write_log(self.history)
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        place = "" if self.log.off else f"; writing to {self.log.path}"
        if len(both := get_opencv_versions()) > 1:
            notes = [*notes, f"{' and '.join(both)} overwrite each other's files: uninstall all but one"]
        for line in [*lines, f"on {self.where}{processes}{place}", *(f"note: {one}" for one in [*self.notes, *notes])]:
            self.log.say(line)
        done = len(self.history) if self.kind.progress_unit == "epoch" else self.step
        if done and self.epochs:
            self.log.say(f"continuing after {self.kind.progress_unit} {done}")
        self.guard.install()

    def start_epoch(self, epoch: int) -> None:
        if self.state.mixer:
            self.state.mixer.start_epoch(epoch, self.last_epoch, self.steps_in(epoch))

    @contextmanager
    def monitor(self, epoch: int) -> Iterator[EpochMonitor]:
        """Around the training of an epoch: what watches it."""
        if self.stats is None:
            self.start_epoch(epoch)
            self.stats = self.kind.stats_type()
            self.epoch_start = {"seconds": 0.0, "lr": self.state.optimizer.param_groups[0]["lr"]}
        self.begun = time.perf_counter() - self.epoch_start["seconds"]
        steps = self.steps_in(epoch)
        with Progress(f"epoch {epoch + 1}/{self.last_epoch}", steps, bar=self.bar) as progress:
            monitor = EpochMonitor(
                self.state.device,
                self.stats,
                progress=progress,
                stop_requested=self.guard.requested,
                after_step=self.save_within_epoch,
                log_every=self.options["print_freq"],
                first_step=self.schedule.first_step(epoch),
            )
            yield monitor
        for network in self.state.networks:
            average_buffers(network)
        self.state.sync_sources()
        self.epoch_start["seconds"] = time.perf_counter() - self.begun
        self.part_seconds = monitor.watch.seconds()

    def save_within_epoch(self) -> None:
        """Save every --save_iters steps, where a kind of run has this option."""
        every = self.options.get("save_iters")
        if every and self.step % every == 0 and self.stats.step < self.steps_in(len(self.history)):
            self.epoch_start["seconds"] = time.perf_counter() - self.begun
            self.save()

    def is_evaluated(self, epoch: int) -> bool:
        """Whether --eval_every names this epoch; the last one is always evaluated."""
        every = self.options["eval_every"]
        return epoch + 1 == self.last_epoch or bool(every) and (epoch + 1) % every == 0

    def end_epoch(self, row: dict, *, also: list[str] | tuple = (), remark: str = "") -> dict:
        """The epoch of this row of the log is done: save, log. Returns the whole row.

        also: names of further checkpoints to write. remark: the end of the printed line.
        """
        epoch, seconds = len(self.history) + 1, self.epoch_start["seconds"]
        row |= {"epoch": epoch, "lr": self.epoch_start["lr"], "seconds": seconds}
        row |= {"images_per_second": row.pop("images") / seconds, "peak_memory_mb": peak_memory_mb(self.state.device)}
        row |= {f"{part}_seconds": self.part_seconds.get(part, 0.0) for part in self.kind.timed_parts}
        step = self.step
        complete = step == self.schedule.first_step(epoch)
        if self.kind.progress_unit == "step":
            row["iteration"] = step
        metric = self.kind.metric and self.kind.metric.format(split=self.best["split"])
        if row.get(metric, -1.0) > self.best["value"]:
            self.best |= {"value": row[metric], "epoch": epoch} | {key: row[key] for key in self.kind.best_columns}
            also = [*also, "best.pt"]
        if (every := self.options.get("save_every")) and epoch % every == 0:
            also = [*also, f"epoch_{epoch:03d}.pt"]
        self.history.append(row)
        self.stats = None if complete else self.stats
        self.save(also=also, step=step)
        self.stats = None
        self.log.write_log(self.history)
        self.log.track(row)
        self.log.say(self.kind.format_epoch(row, self.last_epoch) + remark)
        self.warn_unusable_maps()

    def warn_unusable_maps(self) -> None:
        """Say once that maps of the saliency source could not be used. Every process calls it."""
        unusable = 0
        if self.state.mixer and not self.warned_maps:
            unusable = int(all_reduce_sum(torch.as_tensor(self.state.mixer.replaced_maps)))
        if unusable:
            self.warned_maps = True
            self.log.say(f"note: {unusable} saliency maps were all zero or no numbers, and were taken as uniform")

    def save(self, also: list[str] | tuple = (), step: int | None = None) -> None:
        """Write the checkpoints `also`, and last.pt last of all: only then the epoch counts as done. Every process
        calls it. step: optimizer steps so far, where the history already counts an epoch that was cut short.
        """
        if self.options.get("log_off"):
            return
        state = self.state.state_dict(self.stats)
        if self.log.off:
            return
        content = make_checkpoint(
            data=self.data,
            state=state,
            kind=self.kind.name,
            epoch=len(self.history),
            step=self.step if step is None else step,
            precision=str(self.precision),
            config=public_options(self.options),
            history=self.history,
            best=self.best,
            before=self.epoch_start,
            **self.extra,
        )
        self.log.save(content, also)

    @contextmanager
    def save_on_interrupt(self) -> Iterator[None]:
        """Around an epoch: after SIGTERM, Ctrl-C or a loss that is not finite, what is worth saving is saved, and the
        message says how to resume.
        """
        try:
            yield
        except NonFiniteLoss as error:
            raise self.explain_nonfinite(error) from error
        except TrainingInterrupted as stopped:
            self.guard.restore()
            self.state.sync_sources()
            self.epoch_start["seconds"] = time.perf_counter() - self.begun
            self.save()
            barrier()
            saved = self.log.last.exists()
            remedy = f"continue with {self.log.resume_flag} {self.log.last}" if saved else self.how_to_resume()
            raise Terminated(f"{stopped.stats.step} steps into the epoch; {remedy}") from None
        except UserError as error:  # such as a file that cannot be read
            saved = not self.log.off and self.log.last.exists()
            raise UserError(f"{error}; then {self.how_to_resume()}" if saved else str(error)) from error
        except KeyboardInterrupt:
            if is_main_process():
                print(f"\n{self.how_to_resume()}", file=sys.stderr)
            raise

    def how_to_resume(self) -> str:
        if self.log.off or not self.log.last.exists():
            return "no epoch was finished, so nothing is kept"
        return f"what was saved last is kept: continue with {self.log.resume_flag} {self.log.last}"

    def explain_nonfinite(self, error: NonFiniteLoss) -> UserError:
        """Save the evidence of a NaN or infinite loss; the error that ends the run."""
        saved = ""
        if not self.log.off:
            evidence = {"model": self.state.model.state_dict(), "step": error.step, "index": error.index}
            evidence |= {"weights_of_step": error.now, **error.evidence}
            save_checkpoint(self.log.nonfinite, evidence)
            saved = f"; weights and the batch's image numbers are in {self.log.nonfinite}"
            if self.kind.draw_nonfinite:
                self.kind.draw_nonfinite(self.log.nonfinite.with_suffix(".png"), error.evidence, self.data.classes)
        barrier()  # the process that ends first ends the others, and so would the one that saves
        scaler, lr = self.state.scaler, self.state.optimizer.param_groups[0]["lr"]
        scale = f", loss scale {scaler.get_scale():g}" if scaler and scaler.is_enabled() else ""
        return UserError(
            f"{error}, lr by now {lr:g}{scale}{saved}\ntry {self.kind.nonfinite_remedy}; {self.how_to_resume()}"
        )
