"""The parts of a training run that are specific to detectors: schedule, log, evaluation and results."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from detection import report
from detection.dataset import DetectionSet
from detection.evaluate import EvalResult, evaluate, report_result
from detection.loader import DetectionLoader
from detection.loop import LOSS_NAMES
from detection.resolve import KIND, check_resume_options, locate_detector_runs, resolve_resumed_options
from engine.config.select import select_kwargs
from engine.errors import UserError
from engine.runtime.distributed import is_main_process
from engine.runtime.text import format_count
from engine.training.run import Run
from engine.training.start import RunKind, Start

EVALUATION_OPTIONS = ("test_set", "test_annotations", "score_thr", "nms_thr", "max_dets")  # they change the metrics
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
    """Return the console line of an epoch. row: its row of log.csv."""
    terms = "  ".join(f"{name} {row[key]:.3f}" for key, name in LOSS_NAMES.items())
    text = (
        f"epoch {row['epoch']}/{epochs}  step {row['iteration']}  lr {row['lr']:.4g}  loss {row['loss']:.4f}  {terms}"
    )
    for key, name in (("map07", "VOC07 mAP@0.5"), ("coco_ap", "COCO AP"), ("ema_map07", "averaged VOC07 mAP@0.5")):
        text += f"  {name} {row[key]:.2f}" if row.get(key) is not None else ""
    waiting = 100 * row["data_seconds"] / row["seconds"]
    return f"{text}  {row['seconds']:.1f} s  {row['images_per_second']:.2f} images/s  waiting for data {waiting:.1f} %"


def draw_nonfinite(path: Path, evidence: dict, classes: list[str]) -> None:
    """Draw the images and ground-truth boxes of the batches whose loss was NaN or infinite."""
    report.draw_batches(path, evidence["batches"], classes)


DETECTOR = RunKind(
    name=KIND,
    resolve=resolve_resumed_options,
    check_resume=check_resume_options,
    locate_runs=locate_detector_runs,
    format_epoch=format_epoch,
    columns=LOG_COLUMNS,
    metric="map07",
    timed_parts=["data"],
    progress_unit="step",
    draw_nonfinite=draw_nonfinite,
    data_remedy="pass its data with --data_dir (coco: --train_annotations), or start a new run from its weights with "
    "--frcnn_checkpoint",
)


MAIN_METRICS = {"coco": ("coco_ap", "COCO AP")}  # data set -> column that selects the best epoch, and its name
VOC_METRIC = ("map07", "VOC07 mAP@0.5")  # of all other data sets


def choose_kind(dataset: str) -> RunKind:
    """Return the kind of run that selects its best epoch by the main metric of a data set."""
    return replace(DETECTOR, metric=MAIN_METRICS.get(dataset, VOC_METRIC)[0])


@dataclass
class DataInfo:
    """The description of a detector's data that its checkpoints store."""

    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: None = None  # images may have any size


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, schedule: list[int], gammas: list[float], warmup_iters: int
) -> LambdaLR:
    """Build a scheduler that is stepped once per optimizer step.

    The learning rate rises linearly from a thousandth of its value during warmup_iters steps, and is multiplied by a
    factor at each step in `schedule`. gammas: one factor for all drops, or one per drop.
    """
    factors = gammas * len(schedule) if len(gammas) == 1 else gammas

    def factor(step: int) -> float:
        warmup = 1.0 if step >= warmup_iters else 1e-3 + (1 - 1e-3) * step / warmup_iters
        return warmup * math.prod(gamma for start, gamma in zip(schedule, factors, strict=True) if step >= start)

    return LambdaLR(optimizer, factor)


def reopen_last_epoch(start: Start, steps: int) -> None:
    """Prepare a saved run to resume, if --iters had ended it within an epoch or the evaluation changed.

    If more steps are to follow, the last epoch is reopened. If other images or thresholds are evaluated, the search
    for the best epoch starts over. steps: optimizer steps per epoch. Raises UserError if the run has already made more
    steps than --iters.
    """
    saved, options = start.saved, start.options
    if not saved:
        return
    if saved["step"] > options["iters"]:
        raise UserError(
            f"--iters {options['iters']:,}: the run has already made {format_count(saved['step'], 'step')}\n"
            "give a larger number or omit --iters; to only evaluate the run, use --evaluate --frcnn_checkpoint"
        )
    history = saved["history"]  # a run that was killed in its last evaluation has made all steps but lacks the last row
    if not history or history[-1]["iteration"] < options["iters"]:
        saved["history"] = history[: saved["step"] // steps]
    else:
        saved["inside"] = None
    if changed := [f"--{key}" for key in EVALUATION_OPTIONS if saved["config"].get(key) != options[key]]:
        saved["best"] |= {"value": -1.0, "epoch": 0}
        start.notes.append(f"{' '.join(changed)} changed: the best epoch is chosen among the epochs from here on")


def describe_run(
    train: DetectionSet,
    test: DetectionSet,
    backbone: dict,
    steps: int,
    *,
    neck: str,
    recipe: str,
    iters: int,
    frcnn_checkpoint: str | None,
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
    """Return the lines that describe a run before it starts.

    backbone: model and path of the backbone. steps: optimizer steps per epoch. The parameters by name are options.
    """
    drops = f"dropping at steps {' '.join(map(str, schedule))}" if schedule else "without drops"
    start = f"; starts from the detector {frcnn_checkpoint}" if frcnn_checkpoint else ""
    total, epoch, warmup = (format_count(count, "step") for count in (iters, steps, warmup_iters))
    side = f"{min_size[0]}" if len(min_size) == 1 else f"{min(min_size)} to {max(min_size)}"
    return [
        train.summary("training"),
        test.summary("test"),
        f"Faster R-CNN, neck {neck}, backbone {backbone.get('model')} from {backbone.get('path')}{start}; "
        f"recipe {recipe}: {total} ({iters / steps:.1f} epochs of {epoch}), batch {batch_size}, "
        f"lr {lr:g} {drops}, warm-up {warmup}, weight decay {weight_decay:g}",
        f"shorter side {side}, longer side at most {max_size} pixels; {trainable_layers} of 5 layers trained, "
        f"batch norm {norm}, augmentation {augment}, {'with' if use_difficult else 'without'} {train.flag} objects, "
        f"seed {seed}",
    ]


def evaluate_epoch(run: Run, test: DetectionLoader) -> tuple[EvalResult | None, dict[str, float]]:
    """Evaluate the detector, and its weight average if there is one, after an epoch.

    Returns the result (None outside the main process) and the columns of log.csv.
    """
    run.save()  # an evaluation takes long: if the run is killed during it, the epoch must not be lost
    result = run_evaluation(run, run.state.model, test)
    columns = result.row if result else {}
    if run.state.ema and (averaged := run_evaluation(run, run.state.ema.module, test)):
        columns["ema_map07"] = averaged.row.get("map07")
    return result, columns


def run_evaluation(run: Run, detector: torch.nn.Module, test: DetectionLoader) -> EvalResult | None:
    """Evaluate a detector with the options of a run."""
    return evaluate(detector, test, count_difficult=run.options["coco_count_difficult"], bar=run.bar)


def draw_epoch(run: Run) -> None:
    """Draw curves.png every ten epochs and at the end."""
    if not run.log.off and (len(run.history) % 10 == 0 or not run.epochs):
        title = f"Faster R-CNN, {run.options['dataset']}"
        path = run.log.path / f"curves.{run.options['figure_format']}"
        report.draw_training_curves(path, run.history, title, dpi=run.options["dpi"])


def finish_run(run: Run, result: EvalResult | None, test: DetectionLoader) -> dict | None:
    """Print, save and draw the results of a finished run. Returns the content of results.json; None in other processes.

    result: the evaluation of the last epoch. A run that had already finished is evaluated here again.
    """
    options, best = run.options, run.best
    if run.finished_before:
        result = run_evaluation(run, run.state.model, test)
        run.log.say("this run is already finished; evaluated again:")
    run.guard.restore()
    if not is_main_process():
        return None
    if run.finished_before:
        draw_epoch(run)  # perhaps with another --dpi or --figure_format
    content = {
        "iterations": options["iters"],
        "training_seconds": sum(row["seconds"] for row in run.history),
        "best": best,
        "backbone": run.extra["backbone"],
        "started_from": options["frcnn_checkpoint"],
        "recipe": options["recipe"],
    }
    content |= report.summarize(
        result.voc, result.coco, len(test.image_set), **select_kwargs(options, report.summarize)
    )
    report_result(run.log, result, test.image_set, content, **select_kwargs(options, report_result))
    if best["value"] >= 0:
        column, name = MAIN_METRICS.get(options["dataset"], VOC_METRIC)
        run.log.say(
            f"last epoch: {name} {result.row.get(column, math.nan):.2f} %; best {best['value']:.2f} % at epoch "
            f"{best['epoch']} (chosen on the test images)"
        )
    else:
        run.log.say("no best.pt: average precision is undefined on these test images; last.pt has the last weights")
    return content
