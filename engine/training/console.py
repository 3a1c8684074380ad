"""Training a classifier: the lines, pictures and results of its run."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.config.option_types import format_option
from engine.config.phases import Phase
from engine.config.resolve import check_resume_options, resolve_options
from engine.data.augment import Augmentation
from engine.data.image_set import Data, spread_over_classes
from engine.data.loader import DeviceLoader
from engine.drawing import figures
from engine.inference.metrics import list_unreadable
from engine.runtime.distributed import is_main_process
from engine.runtime.text import format_count
from engine.training.evaluate import evaluate_held_out
from engine.training.loop import profile_steps
from engine.training.network_step import StepConfig
from engine.training.run import Run
from engine.training.run_folder import RunFolder, locate_classifier_runs
from engine.training.start import RunKind
from engine.training.state import TrainingState

LOG_COLUMNS = [
    "epoch",
    "lr",
    "train_loss",
    "train_acc",
    "test_loss",
    "test_top1",
    "test_top5",
    "valid_loss",
    "valid_top1",
    "ema_top1",
    "seconds",
    "images_per_second",
    "mixing_seconds",
    "saliency_seconds",
    "peak_memory_mb",
]
UNMIXED_LABELS = {"none", "cutout"}  # methods that leave the labels as they are
SPLITS = {"train": "training", "valid": "validation", "test": "test"}  # key in options and log -> word for messages
UNREADABLE = {"test_unreadable": "test", "valid_unreadable": "validation"}  # key in the log -> word for messages
MEDIAN_EPOCHS = 10  # the last evaluated epochs whose median accuracy is reported


def describe_run(
    data: Data,
    plan: Sequence[Phase] = (),
    hyper_parameters: Sequence[dict[str, dict]] = (),
    augmentation: Augmentation | None = None,
    *,
    method: list[str],
    method_weights: list[float] | None,
    model: str,
    model_args: dict,
    dropout: float,
    recipe: str,
    epochs: int,
    batch_size: int,
    optimizer: str,
    scheduler: str,
    lr: float,
    max_lr: float | None,
    lr_points: str | None,
    weight_decay: float,
    loss: str,
    label_smoothing: float,
    clean_weight: float | None,
    labels: str | None,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Return lines that describe the data and the training, and notes on unexpected settings.

    plan: the phases of the run. hyper_parameters: of the methods, in each phase. augmentation: of the training images.
    The keyword-only parameters are the options of the same names.
    """
    notes, has_dropout = list(data.warnings), model.startswith("wrn")
    image_sets = {"train": data.train, "valid": data.valid, "test": data.test}
    lines = [image_set.summary(SPLITS[split]) for split, image_set in image_sets.items() if image_set]
    loss += f" with label smoothing {label_smoothing:g}" if label_smoothing else ""
    loss += f" + {clean_weight:g} x that of the unmixed batch" if clean_weight and method != ["none"] else ""
    traits = {"dropout": dropout} if dropout and has_dropout else model_args
    network = " and ".join(f"{key} {format_option(value)}" for key, value in traits.items())
    drawn = f" with weights {format_option(method_weights)}" if method_weights else ""
    drawn += f", label rule {labels}" if labels else ""
    rate = lr_points if scheduler == "points" else f"{(scheduler == 'onecycle' and max_lr) or lr:g}"
    if dropout and not has_dropout:
        notes.append(f"--dropout {dropout:g} is ignored: {model} has no dropout, only the wide ResNets (wrn...) have")
    lines.append(
        f"method {' '.join(method)}{drawn}, model {model}{network and f' with {network}'}, "
        f"recipe {recipe}: {format_count(epochs, 'epoch')}, batch size {batch_size}, "
        f"{'' if optimizer == 'sgd' else f'{optimizer}, '}"
        f"{'peak lr' if scheduler == 'onecycle' else 'lr'} {rate} ({scheduler}), weight decay {weight_decay:g}, "
        f"loss {loss}, {augmentation.describe() if augmentation else 'no augmentation'}, seed {seed}"
    )
    for number, phase in enumerate(plan if len(plan) > 1 else [], 1):
        lines.append(
            f"phase {number}: up to epoch {phase.end}, {phase.images} images, {phase.crop}-pixel crops of at least "
            f"{100 * phase.min_scale:g} % of the area, batch size {phase.batch_size}"
        )
    return lines + describe_methods(hyper_parameters), notes


def describe_methods(hyper_parameters: Sequence[dict[str, dict]]) -> list[str]:
    """Return a line with the hyper-parameters of each method, and further ones for phases in which they differ."""
    lines, before = [], {}
    for number, methods in enumerate(hyper_parameters, 1):
        for name, values in methods.items():
            texts = [f"{key} {format_option(value)}" for key, value in values.items() if value is not None]
            if texts and values != before.get(name):
                lines.append(f"{name}{f' in phase {number}' if number > 1 else ''}: {', '.join(texts)}")
        before = methods
    return lines


def format_epoch(row: dict, epochs: int, options: dict) -> str:
    """Return the printed line of an epoch. row: of the log. epochs: of the run."""
    mixed = "" if set(options["method"]) <= UNMIXED_LABELS else " (mixed labels, reads low)"
    trained, tested = (" (BCE)", " (cross-entropy)") if options["loss"] != "ce" else ("", "")  # not comparable
    text = f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  train loss{trained} {row['train_loss']:.4f}"
    text += f"  train acc{mixed} {row['train_acc']:.2f}"
    for key, name, digits in (
        ("test_loss", f"test loss{tested}", 4),
        ("test_top1", "top-1", 2),
        ("test_top5", "top-5", 2),
        ("valid_top1", "validation top-1", 2),
        ("ema_top1", "EMA top-1", 2),
    ):
        text += f"  {name} {row[key]:.{digits}f}" if key in row else ""
    text = "  ".join([text, *list_unreadable(row, UNREADABLE)])
    return f"{text}  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"


def get_top1_history(history: list[dict]) -> dict[int, float]:
    """Return epoch -> top-1 accuracy on the test images, in percent, of the epochs that were evaluated."""
    return {row["epoch"]: row["test_top1"] for row in history if "test_top1" in row}


def summarize_history(history: list[dict], best: dict) -> dict:
    """Return the content of result.json: last and best accuracy on the test images, and the median and the range over
    the last ten evaluated epochs, with the numbers of these epochs.
    """
    accuracies = get_top1_history(history)
    last_epochs = list(accuracies)[-MEDIAN_EPOCHS:]
    last_ten = [accuracies[epoch] for epoch in last_epochs]
    return {
        "epochs": len(history),
        "last_top1": last_ten[-1],
        "last_top5": history[-1].get("test_top5"),
        "test_unreadable": history[-1].get("test_unreadable", 0),
        "best": best,
        "median_of_last_ten_top1": statistics.median(last_ten),
        "spread_of_last_ten_top1": max(last_ten) - min(last_ten),
        "last_ten_epochs": last_epochs,
        "training_seconds": sum(row["seconds"] for row in history),
    }


def lower_classifier_rate(options: dict) -> tuple[str, bool]:
    """Return RunKind.lower_rate: how to train at a lower rate, and whether a resumed run can."""
    if options["scheduler"] == "points":  # they are absolute rates, and typed ones need the scheduler's name
        return "--scheduler points with lower --lr_points", True
    if options["scheduler"] == "onecycle":  # fixed for the run: see check_resume_options()
        return "a lower --max_lr" if options["max_lr"] else "a lower --lr", False
    return "a lower --lr", True


CLASSIFIER = RunKind(
    name="classifier",
    resolve=resolve_options,
    check_resume=check_resume_options,
    locate_runs=locate_classifier_runs,
    format_epoch=format_epoch,
    columns=LOG_COLUMNS,
    metric="{split}_top1",
    best_columns=["test_top1"],
    timed_parts=["mixing", "saliency"],
    lower_rate=lower_classifier_rate,
)


def finish_run(run: Run, test: DeviceLoader) -> dict | None:
    """Print the last lines of a run and write result.json. Returns its content, in the main process."""
    if run.finished_before:
        scores = evaluate_held_out(run.state, {"test": test}, run.bar)
        if scores:
            accuracies = f"test loss {scores['test_loss']:.4f}, top-1 {scores['test_top1']:.2f}"
            accuracies = ", ".join([accuracies, *list_unreadable(scores, UNREADABLE)])
            run.log.say(f"this run is already finished; evaluated again: {accuracies}")
    run.guard.restore()
    if not is_main_process():
        return None
    if run.finished_before and not run.log.off:
        draw_learning_curves(run)  # perhaps with another --dpi or --figure_format
    result = summarize_history(run.history, run.best)
    log_result(run.log, result)
    return result


def log_result(log: RunFolder, result: dict) -> None:
    """Print the last lines and write result.json."""
    best, top5, epochs = result["best"], result["last_top5"], result["last_ten_epochs"]
    text = f"last epoch: top-1 accuracy {result['last_top1']:.2f} % (error {100 - result['last_top1']:.2f} %)"
    text += f", top-5 accuracy {top5:.2f} %" if top5 is not None else ""
    text += f"; best top-1 {best['test_top1']:.2f} % at epoch {best['epoch']}"
    text += f" (chosen on the {SPLITS[best['split']]} images)"
    if len(epochs) == MEDIAN_EPOCHS:  # below that it would be hardly more than the last epoch
        text += f"; median of the last {MEDIAN_EPOCHS} evaluated epochs, {epochs[0]} to {epochs[-1]}: "
        text += f"{result['median_of_last_ten_top1']:.2f} %"
    log.say(text)
    if not log.off:
        log.write_result(result)
        names = sorted(path.name for path in log.path.iterdir() if path.name[0] != ".")
        log.say(f"files in {log.path}: {', '.join(names)}")


def format_remark(state: TrainingState, loader: DeviceLoader) -> str:
    """Return the end of an epoch's line: the seconds that its steps and its evaluation spent on compiling, and the
    number of unreadable training files. Empty if there were none.
    """
    count, seconds = loader.count_unreadable(), state.compile_clock.take() if state.compile_clock else 0.0
    compiling = f"  compiling took {seconds:.1f} s" if seconds else ""
    return compiling + (f"  {format_count(count, 'training file')} cannot be read: replaced by others" if count else "")


def print_profile(state: TrainingState, loader: DeviceLoader, config: StepConfig, steps: int) -> None:
    """--profile: time some steps, and print how long each part of a step takes.

    A step without mixing is estimated as data plus network: it does the same there, and nothing else.
    """
    table = profile_steps(state, loader, config, steps)
    total, images = sum(table.values()), min(loader.batch_size, len(loader.image_set))
    factor = total / (table["data"] + table["network"])
    print(f"{total:.2f} ms per step of {format_count(images, 'image')}, about {factor:.2f} times a step without mixing")
    for part, milliseconds in table.items():
        print(f"  {part:9} {milliseconds:9.2f} ms  {100 * milliseconds / total:5.1f} %")
    for note in state.graphs.take_notes():
        print(f"note: {note}")


def draw_epoch(run: Run, data: Data, train: DeviceLoader) -> None:
    """Draw curves.png every ten epochs and at the end, and a mixed batch of `train` every --vis_epoch epochs.

    Every process mixes the batch, since batch norm may be synchronised; the main process draws it.
    """
    options, epoch, log = run.options, len(run.history), run.log
    if options["log_off"]:
        return
    if not log.off and (epoch % 10 == 0 or epoch == run.last_epoch):
        draw_learning_curves(run)
    if options["vis_epoch"] and epoch % options["vis_epoch"] == 0:
        name = f"epoch_{epoch:03d}_{'+'.join(options['method'])}.{options['figure_format']}"
        path = None if log.off else log.path / "vis" / name
        title = f"{make_title(options)}, epoch {epoch}"
        with run.state.preserve_state():
            draw_mixed_images(path, run.state, data, train, title, dpi=options["dpi"])


def make_title(options: dict) -> str:
    """Return the title of the figures of a run."""
    return f"{'+'.join(options['method'])}, {options['model']}, {options['dataset']}"


def draw_learning_curves(run: Run) -> None:
    """Draw loss and accuracy over the epochs so far in curves.png, or .pdf or .svg."""
    options = run.options
    mixed = not set(options["method"]) <= UNMIXED_LABELS
    path = run.log.path / f"curves.{options['figure_format']}"
    style = {"loss": options["loss"], "mixed": mixed, "dpi": options["dpi"]}
    figures.draw_curves(path, run.history, make_title(options), **style)


def draw_mixed_images(
    path: Path | None, state: TrainingState, data: Data, train: DeviceLoader, title: str, *, dpi: int
) -> None:
    """Mix eight training images with each other and draw them, augmented as in training.

    path: None: mix only, as processes without files do.
    """
    mixer, source, device = state.mixer, state.source, state.device

    # ---- Batch ----
    indices = spread_over_classes(train.image_set.labels, 8)
    if mixer.batch_size:  # the method needs a batch of this size: repeat the eight images
        indices = indices.repeat(1 + mixer.batch_size // len(indices))[: mixer.batch_size]
    common = {"device": device, "mean": data.mean, "std": data.std}
    shown, augmentation = train.image_set.take(indices), train.augmentation
    loader = DeviceLoader(shown, len(indices), augmentation=augmentation, seed=train.seed, **common)
    batch = next(loader.epoch())._replace(loaded_index=indices.to(device))
    targets = F.one_hot(batch.labels, len(data.classes)).float()

    # ---- Mix ----
    for one in state.sources:
        one.start_batch(batch)
    torch.manual_seed(1)
    for _ in range(20):  # a method that mixes only some batches must show a mixed one
        mixed, soft = mixer(batch.images, targets, source)
        if not torch.equal(mixed, batch.images):
            break
    maps = [one(batch.images, targets) for one in state.sources[:1]]
    if path is None:
        return

    # ---- Draw ----
    figures.draw_mixed_batch(
        path,
        images=batch.images[:8],
        targets=targets[:8],
        saliency=maps[0][:8] if maps else None,
        mixed=mixed[:8],
        soft=soft[:8],
        mean=data.mean,
        std=data.std,
        classes=data.classes,
        title=title,
        dpi=dpi,
    )
