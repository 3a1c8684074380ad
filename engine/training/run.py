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
from engine.runtime.memory import get_peak_memory_mb
from engine.runtime.preemption import PreemptionGuard
from engine.runtime.progress import Progress, use_progress_bar
from engine.runtime.text import format_count
from engine.training.monitor import EpochMonitor
from engine.training.optimizer import get_lr
from engine.training.run_folder import get_opencv_versions, get_public_options
from engine.training.running_sums import EpochStats, NonFiniteLoss, TrainingInterrupted
from engine.training.schedule import StepSchedule
from engine.training.start import Start
from engine.training.trackers import add_trackers


class Run:
    """The progress and the folder of one training run, of a classifier, a detector or saliency maps.

    Args:
        start: the options and, if the run is resumed, its checkpoint.
        state: model, optimizer and all else with a state, such as engine.training.state.TrainingState.
        data: what checkpoints record about the data.
        schedule: number of optimizer steps in each epoch.
        epochs: number of epochs.
        total_steps: number of optimizer steps, if the last epoch is cut short.
        split: `test` or `valid`, the images on which the best epoch is chosen.
        extra: further entries for the checkpoints.
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
        self.kind, self.options, self.device_text = start.kind, start.options, start.device_text
        self.state, self.data, self.schedule, self.precision = state, data, schedule, start.precision
        self.last_epoch, self.total_steps = epochs, total_steps or schedule.first_step(epochs)
        self.extra = extra or {}
        self.history: list[dict] = []
        self.best = {"value": -1.0, "epoch": 0, "split": split}
        self.stats: EpochStats | None = None  # of the current epoch, None between epochs
        self.epoch_start: dict = {"seconds": 0.0, "lr": None}  # time spent on it so far; lr at its start
        self.notes: list[str] = []  # how the run differs from one that was never interrupted
        self.warned_maps = False
        self.bar = use_progress_bar(self.options["no_progress"]) and is_main_process()
        self.guard = PreemptionGuard()
        seed_rank_generator(self.options["seed"])
        if start.saved:
            self.load_checkpoint(start.saved)
        self.finished_before = bool(start.saved) and not self.epochs
        off = self.options.get("log_off", False) or not is_main_process()
        self.log = self.kind.folder_type(start.folder, off=off, fresh=not start.saved, columns=self.kind.columns)

    @property
    def epochs(self) -> range:
        """The remaining epochs, counted from 0."""
        return range(len(self.history), self.last_epoch)

    def count_steps(self, epoch: int) -> int:
        """Return the number of optimizer steps in an epoch; the last epoch may be cut short."""
        first = self.schedule.first_step(epoch)
        return min(self.schedule.first_step(epoch + 1), self.total_steps) - first

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        return self.schedule.first_step(len(self.history)) + (self.stats.step if self.stats else 0)

    def load_checkpoint(self, saved: Checkpoint) -> None:
        """Restore a checkpoint, and note how the run will differ from one that was never interrupted."""
        self.history, self.best, self.epoch_start = saved["history"], saved["best"], saved["before"]
        if saved["inside"]:  # the method needs its epoch before its state: that says how far into the epoch it is
            self.start_epoch(len(self.history))
        if self.kind.progress_unit == "epoch" and "scheduler" in saved:
            self.move_schedule(saved)
        self.stats = self.state.load_state_dict(saved)
        if self.stats:
            epoch, steps = len(self.history) + 1, self.count_steps(len(self.history))
            self.notes.append(f"epoch {epoch} resumes after {self.stats.step} of its {format_count(steps, 'step')}")
        if saved["precision"] != str(self.precision):
            before, now = format_precision(saved["precision"]), format_precision(str(self.precision))
            self.notes.append(
                f"precision changes from {before} to {now}: results will differ from an uninterrupted run"
            )
        if (processes := len(saved["rng"])) != world_size():
            self.notes.append(
                f"saved by {format_count(processes, 'process')}, resumed by {world_size()}: each step sees the same "
                "images, but random draws, batch statistics and what a method has learned change; results will differ "
                "from an uninterrupted run"
            )

    def move_schedule(self, saved: Checkpoint) -> None:
        """Move the saved schedule, which counts steps, to the current epoch, where --force_config changed the number of
        steps per epoch.
        """
        step = self.schedule.first_step(len(self.history))
        step += saved["inside"][0]["tally"]["step"] if saved["inside"] else 0
        if step != saved["step"]:
            saved["scheduler"]["last_epoch"] = step
            self.notes.append("the number of steps per epoch changes; the learning rate continues from the same epoch")

    def log_header(self, lines: list[str], notes: list[str], **config) -> None:
        """Write the first files of the run, print lines and notes, and handle SIGTERM from here on.

        config: further entries of config.json.
        """
        add_trackers(self.log, self.options)
        config |= {"precision": format_precision(str(self.precision)), "classes": len(self.data.classes)}
        config["parameters"] = sum(parameter.numel() for parameter in self.state.model.parameters())
        self.log.write_config(self.options, self.state.device, kind=self.kind.name, **config)
        self.log.write_log(self.history)
        processes = f", {world_size()} processes" if world_size() > 1 else ""
        folder = "" if self.log.off else f"; writing to {self.log.path}"
        lines = [*lines, f"running on {self.device_text}{processes}{folder}"]
        done = len(self.history) if self.kind.progress_unit == "epoch" else self.step
        if done and self.epochs:
            lines.append(f"resuming after {self.kind.progress_unit} {done}")
        if len(packages := get_opencv_versions()) > 1:
            notes = [*notes, f"{' and '.join(packages)} overwrite each other's files: uninstall all but one"]
        for line in [*lines, *(f"note: {note}" for note in [*self.notes, *notes])]:
            self.log.say(line)
        self.guard.install()

    def start_epoch(self, epoch: int) -> None:
        if self.state.mixer:
            self.state.mixer.start_epoch(epoch, self.last_epoch, self.count_steps(epoch))

    @contextmanager
    def monitor(self, epoch: int) -> Iterator[EpochMonitor]:
        """Yield the monitor of an epoch, which the training loop reports to; afterwards synchronise the processes."""
        if self.stats is None:
            self.start_epoch(epoch)
            self.stats = self.kind.stats_type()
            self.epoch_start = {"seconds": 0.0, "lr": get_lr(self.state.optimizer)}
        self.begun = time.perf_counter() - self.epoch_start["seconds"]
        steps = self.count_steps(epoch)
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
        """Save every --save_iters steps, if this kind of run has the option."""
        every = self.options.get("save_iters")
        if every and self.step % every == 0 and self.stats.step < self.count_steps(len(self.history)):
            self.epoch_start["seconds"] = time.perf_counter() - self.begun
            self.save()

    def should_evaluate(self, epoch: int) -> bool:
        """Return whether to evaluate after this epoch: every --eval_every epochs, and after the last one."""
        every = self.options["eval_every"]
        return epoch + 1 == self.last_epoch or bool(every) and (epoch + 1) % every == 0

    def end_epoch(self, row: dict, *, also: list[str] | tuple = (), remark: str = "") -> dict:
        """Finish an epoch: complete its row of the log, save checkpoints, log and print. Returns the row.

        also: names of further checkpoints to write. remark: text to append to the printed line.
        """
        epoch, seconds = len(self.history) + 1, self.epoch_start["seconds"]
        row |= {"epoch": epoch, "lr": self.epoch_start["lr"], "seconds": seconds}
        images = row.pop("images")
        row |= {"images_per_second": images / seconds, "peak_memory_mb": get_peak_memory_mb(self.state.device)}
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
        self.log.say(self.kind.format_epoch(row, self.last_epoch, self.options) + remark)
        for note in self.state.graphs.take_notes():
            self.log.say(f"note: {note}")
        self.warn_unusable_maps(images)

    def warn_unusable_maps(self, images: int) -> None:
        """Print a note in the first epoch with unusable saliency maps. All processes must call it.

        images: number of images in the epoch.
        """
        unusable = 0
        if self.state.mixer and not self.warned_maps:
            unusable = int(all_reduce_sum(torch.as_tensor(self.state.mixer.replaced_maps)))
        if unusable:
            self.warned_maps = True
            self.log.say(
                "note: saliency maps replaced by a uniform map because they were all zero (as where the loss is 0, "
                f"or nothing speaks for the class) or NaN: {unusable:,} of {images:,}; harmless if rare"
            )

    def save(self, also: list[str] | tuple = (), step: int | None = None) -> None:
        """Write the checkpoints named in `also`, then last.pt. All processes must call it.

        last.pt comes last, because from then on the epoch counts as done. step: optimizer steps so far, if the history
        already counts an epoch that was cut short.
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
            config=get_public_options(self.options),
            history=self.history,
            best=self.best,
            before=self.epoch_start,
            **self.extra,
        )
        self.log.save(content, also)

    @contextmanager
    def save_on_interrupt(self) -> Iterator[None]:
        """Wrap an epoch: after SIGTERM save a checkpoint, after a NaN or infinite loss save the evidence, and in any
        case say how to resume.

        Raises Terminated after SIGTERM, and UserError after a NaN or infinite loss or a file that cannot be read.
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
            remedy = f"resume with {self.log.resume_flag} {self.log.last}" if saved else self.format_resume_hint()
            raise Terminated(f"{format_count(stopped.stats.step, 'step')} into the epoch; {remedy}") from None
        except UserError as error:  # such as a file that cannot be read
            saved = not self.log.off and self.log.last.exists()
            raise UserError(f"{error}; then {self.format_resume_hint()}" if saved else str(error)) from error
        except KeyboardInterrupt:
            if is_main_process():
                print(f"\n{self.format_resume_hint()}", file=sys.stderr)
            raise

    def format_resume_hint(self) -> str:
        if self.log.off or not self.log.last.exists():
            return "there is no checkpoint to resume from"
        return f"resume with {self.log.resume_flag} {self.log.last}"

    def explain_nonfinite(self, error: NonFiniteLoss) -> UserError:
        """Save the evidence of a NaN or infinite loss. Returns the error that ends the run."""
        saved = ""
        if not self.log.off:
            evidence = {"model": self.state.model.state_dict(), "step": error.step, "index": error.index}
            evidence |= {"weights_of_step": error.now, **error.evidence}
            save_checkpoint(self.log.nonfinite, evidence)
            saved = f"; the weights and the indices of the batch's images are in {self.log.nonfinite}"
            if self.kind.draw_nonfinite:
                self.kind.draw_nonfinite(self.log.nonfinite.with_suffix(".png"), error.evidence, self.data.classes)
        barrier()  # the first process that exits ends all others: wait for the one that saves
        scaler, lr = self.state.scaler, get_lr(self.state.optimizer)
        scale = f", loss scale {scaler.get_scale():g}" if scaler and scaler.is_enabled() else ""
        resume = f"{self.log.resume_flag} {self.log.last}" if not self.log.off and self.log.last.exists() else None
        remedies = list_nonfinite_remedies(self.kind.lower_rate(self.options), self.options, self.precision, resume)
        return UserError(f"{error}, current lr {lr:g}{scale}{saved}\n{'; or '.join(remedies)}")


def list_nonfinite_remedies(
    lower_rate: tuple[str, bool], options: dict, precision: torch.dtype | None, resume: str | None
) -> list[str]:
    """Return what can be done after a NaN or infinite loss, with options that this run takes and does not have yet.

    lower_rate: see RunKind. resume: the option that resumes the run; None: it has no checkpoint.
    """
    rate, rate_changes = lower_rate
    clip = "--clip_grad 1" if options.get("clip_grad", 1) == 0 or options.get("clip_grad", 1) > 1 else ""
    amp = {torch.float16: "--amp bf16 or off", torch.bfloat16: "--amp off"}.get(precision, "")
    if resume is None:
        return [f"start another run with {' or '.join(filter(None, (rate, clip, amp)))}"]
    forced = " or ".join(filter(None, (rate if rate_changes else "", clip)))
    return [
        *([f"resume with {resume} --force_config and {forced}"] if forced else []),
        *([f"resume with {resume} and {amp}"] if amp else []),
        *([] if rate_changes else [f"start another run with {rate}"]),
    ]


def format_precision(name: str) -> str:
    """Return the name of a precision for a person. name: as in a checkpoint, such as `None` or `torch.bfloat16`."""
    return "float32" if name == "None" else name.removeprefix("torch.")
