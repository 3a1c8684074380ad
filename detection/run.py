"""What a detector's run has of its own: its optimizer, its log, its result."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from detection import report
from detection.dataset import DetectionSet
from detection.evaluate import EvalResult, evaluate, report_result
from detection.loader import DetectionLoader
from detection.loop import LOSS_NAMES
from detection.resolve import KIND, check_resume_options, detector_runs, resolve_resumed
from engine.config.select import select_kwargs
from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint
from engine.runtime.distributed import is_main_process
from engine.training.run import Run
from engine.training.start import RunKind, Start

EVALUATION_OPTIONS = ("test_set", "score_thr", "nms_thr", "max_dets")  # options that change what is measured
LOG_COLUMNS = [
    "epoch",
    "iteration",
    "lr",
    "loss",
    *LOSS_NAMES,
    "map07",
    "map",
    "coco_ap",
    "ema_map07",
    "seconds",
    "images_per_second",
    "data_seconds",
    "peak_memory_mb",
]


def format_epoch(row: dict, epochs: int, options: dict) -> str:
    """One epoch in a line."""
    terms = "  ".join(f"{name} {row[key]:.3f}" for key, name in LOSS_NAMES.items())
    text = (
        f"epoch {row['epoch']}/{epochs}  step {row['iteration']}  lr {row['lr']:.4g}  loss {row['loss']:.4f}  {terms}"
    )
    for key, name in (("map07", "VOC07 mAP@0.5"), ("coco_ap", "COCO AP"), ("ema_map07", "averaged VOC07 mAP@0.5")):
        text += f"  {name} {row[key]:.2f}" if row.get(key) is not None else ""
    waiting = 100 * row["data_seconds"] / row["seconds"]
    return f"{text}  {row['seconds']:.1f} s  {row['images_per_second']:.2f} images/s  waiting for data {waiting:.1f} %"


def draw_nonfinite(path: Path, evidence: dict, classes: list[str]) -> None:
    """The images and boxes of the batches whose loss was not finite."""
    report.draw_batches(path, evidence["batches"], classes)


DETECTOR = RunKind(
    name=KIND,
    resolve=resolve_resumed,
    check_resume=check_resume_options,
    locate_runs=detector_runs,
    format_epoch=format_epoch,
    columns=LOG_COLUMNS,
    metric="map07",
    timed_parts=["data"],
    progress_unit="step",
    draw_nonfinite=draw_nonfinite,
)


@dataclass
class DataInfo:
    """What a checkpoint says of the data of a detector."""

    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: None = None  # images are of any size


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, schedule: list[int], gammas: list[float], warmup_iters: int
) -> LambdaLR:
    """The rate, stepped once an iteration, rises from a thousandth of it in a straight line over warmup_iters, and
    drops by a factor at each iteration of `schedule`. gammas: one factor for all drops, or one each.
    """
    factors = gammas * len(schedule) if len(gammas) == 1 else gammas

    def factor(step: int) -> float:
        warm = 1.0 if step >= warmup_iters else 1e-3 + (1 - 1e-3) * step / warmup_iters
        return warm * math.prod(by for start, by in zip(schedule, factors, strict=True) if step >= start)

    return LambdaLR(optimizer, factor)


def check_same_data(saved: Checkpoint | None, train: DetectionSet) -> None:
    """Raise UserError where a run would be resumed on other training images."""
    if saved and (saved["classes"], saved["images"]) != (train.classes, len(train)):
        raise UserError(
            f"the run to continue was trained on {saved['images']:,} images of {len(saved['classes'])} classes, here "
            f"are {len(train):,} of {len(train.classes)}\nname its data with --data_dir, or start a new run from its "
            "weights with --frcnn_checkpoint"
        )


def reopen_last_epoch(start: Start, steps: int) -> None:
    """Prepare a saved run whose last epoch was cut short by --iters: where it is to make more steps, that epoch is
    under way again; and where other images or thresholds are evaluated, the best epoch is sought anew.

    steps: optimizer steps of a whole epoch. Raises UserError where the run has made more steps than asked for.
    """
    saved, options = start.saved, start.options
    if not saved:
        return
    if saved["step"] > options["iters"]:
        raise UserError(
            f"--iters {options['iters']:,}: the run has made {saved['step']:,} steps\ngive more, or leave it out; to "
            "evaluate what is there, say --evaluate --frcnn_checkpoint"
        )
    history = saved["history"]  # a run killed in its last evaluation has made its steps, but has no row
    if not history or history[-1]["iteration"] < options["iters"]:
        saved["history"] = history[: saved["step"] // steps]
    else:
        saved["inside"] = None
    if differ := [f"--{key}" for key in EVALUATION_OPTIONS if saved["config"][key] != options[key]]:
        saved["best"] |= {"value": -1.0, "epoch": 0}
        start.notes.append(f"{' '.join(differ)} changed: the best epoch is sought anew from here on")


def describe_run(
    train: DetectionSet,
    test: DetectionSet,
    start_weights: dict,
    steps: int,
    *,
    neck: str,
    recipe: str,
    iters: int,
    batch_size: int,
    lr: float,
    schedule: list[int],
    warmup_iters: int,
    weight_decay: float,
    min_size: list[int],
    max_size: int,
    trainable_layers: int,
    norm: str,
    augment: str,
    use_difficult: bool,
    seed: int,
) -> list[str]:
    """What is about to run, on what. start_weights: model and path of the backbone. steps: of an epoch. The parameters
    by name are options.
    """
    drops = " ".join(map(str, schedule)) or "never"
    side = f"{min_size[0]}" if len(min_size) == 1 else f"{min(min_size)} to {max(min_size)}"
    return [
        train.summary("train"),
        test.summary("test"),
        f"Faster R-CNN, {neck}, on {start_weights.get('model')} from {start_weights.get('path')}; recipe {recipe}: "
        f"{iters:,} steps ({iters / steps:.1f} epochs of {steps:,}), batch {batch_size}, lr {lr:g}, dropping at "
        f"{drops}, warm-up {warmup_iters}, weight decay {weight_decay:g}",
        f"shorter side {side}, longer at most {max_size}; {trainable_layers} of 5 layers learn, batch norm {norm}, "
        f"augmentation {augment}, {'with' if use_difficult else 'without'} difficult objects, seed {seed}",
    ]


def evaluate_epoch(run: Run, test: DetectionLoader) -> tuple[EvalResult | None, dict[str, float]]:
    """What the detector finds on the test images, in the main process, and the columns of the log."""
    run.save()  # an evaluation takes long: a kill must not cost the epoch
    result = evaluate_detector_of(run, run.state.model, test)
    columns = result.row if result else {}
    if run.state.ema and (averaged := evaluate_detector_of(run, run.state.ema.module, test)):
        columns["ema_map07"] = averaged.row.get("map07")
    return result, columns


def evaluate_detector_of(run: Run, detector: torch.nn.Module, test: DetectionLoader) -> EvalResult | None:
    return evaluate(detector, test, count_difficult=run.options["coco_count_difficult"], bar=run.bar)


def draw_epoch(run: Run) -> None:
    """curves.png every ten epochs and at the end."""
    if not run.log.off and (len(run.history) % 10 == 0 or not run.epochs):
        title = f"Faster R-CNN, {run.options['dataset']}"
        report.draw_training_curves(run.log.path / "curves.png", run.history, title)


def finish_run(run: Run, result: EvalResult | None, test: DetectionLoader) -> dict | None:
    """The numbers under every protocol, and the pictures; returns what results.json holds.

    result: the evaluation of the last epoch; of a run that was finished before it is made now.
    """
    options, best = run.options, run.best
    if run.finished_before:
        result = evaluate_detector_of(run, run.state.model, test)
        run.log.say("this run was finished already; evaluated again:")
    run.guard.restore()
    if not is_main_process():
        return None
    content = {
        "iterations": options["iters"],
        "training_seconds": sum(row["seconds"] for row in run.history),
        "best": best,
        "backbone": run.extra["backbone"],
        "recipe": options["recipe"],
    }
    content |= report.summarize(result.voc, result.coco, len(test.part), **select_kwargs(options, report.summarize))
    report_result(run.log, result, test.part, content, **select_kwargs(options, report_result))
    if best["value"] >= 0:
        run.log.say(
            f"last epoch: VOC07 mAP@0.5 {result.row.get('map07', math.nan):.2f}; best {best['value']:.2f} (epoch "
            f"{best['epoch']}, chosen on the test images)"
        )
    return content
