"""A detector's run: from epoch to epoch, taken up where it stopped, judged, kept, and ended well before its time."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models.detection import FasterRCNN

from detection import report
from detection.dataset import DetectionSet
from detection.evaluate import EvalResult, evaluate, report_result
from detection.loader import DetectionLoader
from detection.loop import LOSS_NAMES, train_one_epoch
from detection.resolve import KIND, check_resume_options, detector_runs, resolve_resumed
from engine.errors import UserError
from engine.runtime.device import seed_rank_generator
from engine.runtime.distributed import average_buffers, is_main_process, world_size, wrap_ddp
from engine.runtime.memory import peak_memory_mb
from engine.runtime.preemption import PreemptionGuard
from engine.runtime.progress import Progress, use_progress_bar
from engine.training.ema import ModelEma
from engine.training.run import RunKind, resume_notes
from engine.training.run_folder import RunFolder, get_opencv_versions
from engine.training.running_sums import EpochStats, NonFiniteLoss
from engine.training.shutdown import graceful_shutdown
from engine.training.state import TrainingState, save
from engine.training.stopwatch import Stopwatch
from engine.training.trackers import add_trackers

DETECTOR = RunKind(KIND, resolve_resumed, check_resume_options, detector_runs)
EVALUATION_OPTIONS = ("test_set", "score_thr", "nms_thr", "max_dets")  # options that change what is measured
LOG_COLUMNS = [
    *("epoch", "iteration", "lr", "loss", *LOSS_NAMES),
    *("map07", "map", "coco_ap", "ema_map07", "seconds", "images_per_second", "data_seconds", "peak_memory_mb"),
]


@dataclass
class DataInfo:
    """What a checkpoint says of the data of a detector."""

    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    image_size: None = None  # images are of any size


def build_training_state(
    detector: FasterRCNN,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: list[int],
    gammas: list[float],
    warmup_iters: int,
    ema: float,
    precision: torch.dtype | None,
) -> TrainingState:
    """Optimizer and schedule, stepped once an iteration. The rate rises from a thousandth of it in a straight line over
    warmup_iters, and drops by a factor at each iteration of `schedule`.
    """
    device = next(detector.parameters()).device
    learning = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(learning, lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
    factors = gammas * len(schedule) if len(gammas) == 1 else gammas

    def factor(step: int) -> float:
        warm = 1.0 if step >= warmup_iters else 1e-3 + (1 - 1e-3) * step / warmup_iters
        return warm * math.prod(by for start, by in zip(schedule, factors, strict=True) if step >= start)

    scaler = torch.amp.GradScaler(device.type) if precision is torch.float16 else None
    average = ModelEma(detector, ema) if ema else None
    return TrainingState(detector, None, optimizer, LambdaLR(optimizer, factor), scaler, average)


def check_same_data(saved: dict | None, train: DetectionSet) -> None:
    """Raise UserError where a run would go on with other training images."""
    if saved and (saved["classes"], saved["images"]) != (train.classes, len(train)):
        raise UserError(
            f"the run to continue was trained on {saved['images']:,} images of {len(saved['classes'])} classes, here "
            f"are {len(train):,} of {len(train.classes)}\nname its data with --data_dir, or start a new run from its "
            "weights with --frcnn_checkpoint"
        )


class Run:
    """What a run has measured so far, and where it is kept. backbone: where its backbone came from; saved: a checkpoint
    to go on from.
    """

    def __init__(
        self,
        folder: Path,
        parts: TrainingState,
        options: dict,
        known: DataInfo,
        *,
        steps: int,
        precision: torch.dtype | None,
        backbone: dict,
        saved: dict | None = None,
    ):
        self.folder, self.parts, self.options, self.known = folder, parts, options, known
        self.steps, self.precision, self.backbone = steps, precision, backbone
        self.network = wrap_ddp(parts.model)
        seed_rank_generator(options["seed"])
        self.history: list[dict] = []
        self.best = {"value": -1.0, "epoch": 0, "split": "test"}
        self.tally: EpochStats | None = None  # of the epoch under way when the run was stopped
        self.before = {"seconds": 0.0, "lr": None}  # of that epoch
        self.begun = 0.0
        self.notes: list[str] = []
        self.done = saved["step"] if saved else 0
        if self.done > options["iters"]:
            raise UserError(
                f"--iters {options['iters']:,}: the run has made {self.done:,} steps\ngive more, or leave it out; to "
                "evaluate what is there, say --evaluate --frcnn_checkpoint"
            )
        told = saved["history"] if saved else []  # a run killed in its last evaluation has done its steps, but no row
        self.finished_before = bool(told) and told[-1]["iteration"] >= options["iters"]
        self.judged: EvalResult | None = None
        if saved:
            self.go_on_from(saved)
        self.anew = options["overwrite"] and not saved
        self.bar = use_progress_bar(options["no_progress"]) and is_main_process()
        self.sign = PreemptionGuard()

    @property
    def epochs(self) -> range:
        """Those that are still to come; the last one may be cut short by --iters."""
        return range(len(self.history), math.ceil(self.options["iters"] / self.steps))

    def steps_of(self, epoch: int) -> int:
        return min(self.steps, self.options["iters"] - epoch * self.steps)

    def go_on_from(self, saved: dict) -> None:
        """Take up a checkpoint, and note what will not be as it would have been."""
        self.best, self.before = saved["best"], saved["before"]
        whole = saved["history"] if self.finished_before else saved["history"][: self.done // self.steps]
        self.history = whole  # without the row of a last epoch that was cut short: it goes on now
        self.tally = self.parts.load(saved)
        if self.finished_before:
            self.tally = None
        elif self.tally:
            self.notes.append(f"epoch {len(self.history) + 1} goes on after {self.tally.step} of its steps")
        self.notes += resume_notes(saved, self.precision)
        if differ := [f"--{key}" for key in EVALUATION_OPTIONS if saved["config"][key] != self.options[key]]:
            self.best |= {"value": -1.0, "epoch": 0}
            self.notes.append(f"{' '.join(differ)} changed: the best epoch is sought anew from here on")

    def begin(self, train: DetectionSet, test: DetectionSet, notes: list[str], where: str) -> None:
        """Start the files of the run and say what is about to happen."""
        off = self.options["log_off"] or not is_main_process()
        self.log = RunFolder(self.folder, off=off, anew=self.anew, columns=LOG_COLUMNS)
        add_trackers(self.log, self.options)
        self.log.write_config(self.options, self.parts.device, kind=KIND)
        self.log.write_log(self.history)
        where += f", {world_size()} processes" if world_size() > 1 else ""
        log_header(self.log, self.options, train, test, self.backbone, self.steps, where=where)
        for note in [*notes, *self.notes, *train.warnings, *test.warnings]:
            self.log.say(f"note: {note}")
        if 0 < self.done < self.options["iters"]:
            self.log.say(f"continuing after step {self.done}")
        self.sign.install()

    def train(self, epoch: int, feed: DetectionLoader) -> dict:
        """One epoch; the row of the log."""
        if self.tally is None:
            self.tally = EpochStats()
            self.before = {"seconds": 0.0, "lr": self.parts.optimizer.param_groups[0]["lr"]}
        watch, self.begun = Stopwatch(self.parts.device), time.perf_counter() - self.before["seconds"]
        steps, first = self.steps_of(epoch), epoch * self.steps
        with Progress(f"epoch {epoch + 1}/{self.epochs.stop}", steps, bar=self.bar) as shown:
            row = train_one_epoch(
                *(self.parts.model, feed, self.parts.optimizer),
                **{"epoch": epoch, "steps": steps, "first_step": first, "network": self.network},
                **{"scheduler": self.parts.scheduler, "scaler": self.parts.scaler, "ema": self.parts.ema},
                **{"precision": self.precision, "clip_grad": self.options["clip_grad"]},
                **{"tally": self.tally, "watch": watch, "stop": self.sign.requested, "keep": self.keep_inside},
                **{"look_every": self.options["print_freq"], "progress": shown},
            )
        seconds = time.perf_counter() - self.begun
        row |= {"epoch": epoch + 1, "iteration": first + steps, "lr": self.before["lr"], "seconds": seconds}
        row |= {"images_per_second": row.pop("images") / seconds, "data_seconds": watch.seconds().get("data", 0.0)}
        return row | {"peak_memory_mb": peak_memory_mb(self.parts.device)}

    def keep_inside(self, tally: EpochStats) -> None:
        """--save_iters: after a step, save where the run stands."""
        every, step = self.options["save_iters"], len(self.history) * self.steps + tally.step
        if every and step % every == 0 and tally.step < self.steps_of(len(self.history)):
            self.before["seconds"] = time.perf_counter() - self.begun
            self.save()

    @contextmanager
    def ending_well(self) -> Iterator[None]:
        """Around an epoch: however it ends, what was done is kept and the way to go on is told."""

        def keep(tally: EpochStats) -> None:
            self.sign.restore()
            self.before["seconds"] = time.perf_counter() - self.begun
            self.save()

        with graceful_shutdown(self.log, self.parts, keep):
            try:
                yield
            except NonFiniteLoss as error:
                if not self.log.off:
                    report.draw_batches(self.log.path / "nonfinite.png", error.evidence["batches"], self.known.classes)
                raise
            except UserError as error:  # as of a file that cannot be read
                last = self.log.path / "last.pt"
                kept = f"; then continue with --checkpoint {last}" if last.exists() and not self.log.off else ""
                raise UserError(f"{error}{kept}") from error

    def evaluate(self, feed: DetectionLoader) -> dict[str, float]:
        """The columns of the log, in the epochs that --eval_every names and in the last one."""
        epoch, every = len(self.history) + 1, self.options["eval_every"]
        for network in self.parts.networks:
            average_buffers(network)
        if epoch != self.epochs.stop and not (every and epoch % every == 0):
            return {}
        self.before["seconds"] = time.perf_counter() - self.begun
        self.save()  # an evaluation takes long: a kill shall not cost the epoch
        self.judged = self.judge(self.parts.model, feed)
        columns = self.judged.row if self.judged else {}
        if self.parts.ema and (averaged := self.judge(self.parts.ema.module, feed)):
            columns["ema_map07"] = averaged.row.get("map07")
        return columns

    def judge(self, detector: FasterRCNN, feed: DetectionLoader) -> EvalResult | None:
        return evaluate(detector, feed, count_difficult=self.options["coco_count_difficult"], bar=self.bar)

    def keep(self, row: dict) -> None:
        """The epoch of this row is done: checkpoints, log, curves."""
        if row["iteration"] % self.steps == 0:
            self.tally = None
        self.history.append(row)
        also, epoch = [], row["epoch"]
        if row.get("map07", -1.0) > self.best["value"]:
            self.best |= {"value": row["map07"], "epoch": epoch}
            also.append("best.pt")
        if self.options["save_every"] and epoch % self.options["save_every"] == 0:
            also.append(f"epoch_{epoch:03d}.pt")
        self.save(also=also, steps=row["iteration"])
        self.tally = None
        self.log.write_log(self.history)
        self.log.track(row)
        self.log.say(format_epoch(row, self.epochs.stop))
        if not self.log.off and (epoch % 10 == 0 or epoch == self.epochs.stop):
            report.draw_training_curves(
                self.log.path / "curves.png", self.history, f"Faster R-CNN, {self.options['dataset']}"
            )

    def save(self, also: list[str] | tuple = (), steps: int | None = None) -> None:
        """steps: finished ones, where the history tells them already."""
        if steps is None:
            steps = len(self.history) * self.steps + (self.tally.step if self.tally else 0)
        save(
            *(self.log, self.parts, self.options, self.known, self.history, self.best),
            **{"steps": steps, "precision": str(self.precision), "also": also, "tally": self.tally},
            before=self.before,
            further={"kind": KIND, "backbone": self.backbone, "images": self.known.images},
        )

    def finish(self, feed: DetectionLoader) -> dict | None:
        """The numbers under every protocol, and the pictures; returns what results.json holds."""
        if self.finished_before:
            self.judged = self.judge(self.parts.model, feed)
            self.log.say("this run was finished already; evaluated again:")
        self.sign.restore()
        if not is_main_process():
            return None
        training = {
            **{"iterations": self.options["iters"], "training_seconds": sum(row["seconds"] for row in self.history)},
            **{"best": self.best, "backbone": self.backbone, "recipe": self.options["recipe"]},
        }
        result = report_result(self.log, self.judged, feed.part, self.options, training)
        if self.best["value"] >= 0:
            self.log.say(
                f"last epoch: VOC07 mAP@0.5 {self.judged.row.get('map07', math.nan):.2f}; best "
                f"{self.best['value']:.2f} (epoch {self.best['epoch']}, chosen on the test images)"
            )
        return result


def log_header(
    log: RunFolder, options: dict, train: DetectionSet, test: DetectionSet, backbone: dict, steps: int, *, where: str
) -> None:
    """What is about to run, on what."""
    for name, part in (("train", train), ("test", test)):
        log.say(part.summary(name))
    drops = " ".join(map(str, options["schedule"])) or "never"
    sizes = options["min_size"]
    side = f"{sizes[0]}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    difficult = "with" if options["use_difficult"] else "without"
    log.say(
        f"Faster R-CNN, {options['neck']}, on {backbone.get('model')} from {backbone.get('path')}; recipe "
        f"{options['recipe']}: {options['iters']:,} steps ({options['iters'] / steps:.1f} epochs of {steps:,}), batch "
        f"{options['batch_size']}, lr {options['lr']:g}, dropping at {drops}, warm-up {options['warmup_iters']}, "
        f"weight decay {options['weight_decay']:g}"
    )
    log.say(
        f"shorter side {side}, longer at most {options['max_size']}; {options['trainable_layers']} of 5 layers learn, "
        f"batch norm {options['norm']}, augmentation {options['augment']}, {difficult} difficult objects, seed "
        f"{options['seed']}"
    )
    log.say(f"on {where}" + ("" if log.off else f"; writing to {log.path}"))
    if len(both := get_opencv_versions()) > 1:
        log.say(f"note: {' and '.join(both)} overwrite each other's files: uninstall all but one")


def format_epoch(row: dict, epochs: int) -> str:
    """One epoch in a line."""
    terms = "  ".join(f"{name} {row[key]:.3f}" for key, name in LOSS_NAMES.items())
    text = (
        f"epoch {row['epoch']}/{epochs}  step {row['iteration']}  lr {row['lr']:.4g}  loss {row['loss']:.4f}  {terms}"
    )
    for key, name in (("map07", "VOC07 mAP@0.5"), ("coco_ap", "COCO AP"), ("ema_map07", "averaged VOC07 mAP@0.5")):
        text += f"  {name} {row[key]:.2f}" if row.get(key) is not None else ""
    waiting = 100 * row["data_seconds"] / row["seconds"]
    return f"{text}  {row['seconds']:.1f} s  {row['images_per_second']:.2f} images/s  waiting for data {waiting:.1f} %"
