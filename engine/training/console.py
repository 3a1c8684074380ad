"""Training a classifier: what its run prints, draws and keeps."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.config.phases import Phase
from engine.config.resolve import check_resume_options, resolve_options
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader
from engine.drawing import figures
from engine.runtime.distributed import all_reduce_sum, is_main_process
from engine.training.evaluate import evaluate_held_out
from engine.training.loop import StepConfig, profile_steps
from engine.training.run import Run
from engine.training.run_folder import RunFolder, classifier_runs
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


def describe_run(
    data: Data,
    plan: Sequence[Phase] = (),
    *,
    method: list[str],
    model: str,
    dropout: float,
    recipe: str,
    epochs: int,
    batch_size: int,
    scheduler: str,
    schedule: list[int],
    lr: float,
    max_lr: float | None,
    lr_points: str | None,
    weight_decay: float,
    loss: str,
    trad_augment: bool,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Lines on the data and on how the classifier is trained, and notes on what may be unexpected. The parameters by
    name are options.
    """
    notes, wide = list(data.warnings), model.startswith("wrn")
    parts = {"train": data.train, "valid": data.valid, "test": data.test}
    lines = [part.summary(name) for name, part in parts.items() if part]
    rate = lr_points if scheduler == "points" else f"{(scheduler == 'onecycle' and max_lr) or lr:g}"
    if scheduler == "multistep" and min(schedule) >= epochs:
        notes.append(f"--schedule {' '.join(map(str, schedule))}: in {epochs} epochs the lr never drops")
    if dropout and not wide:
        notes.append(f"--dropout {dropout:g}: {model} has none; only the wide networks have")
    lines.append(
        f"{' '.join(method)}: {model}{f', dropout {dropout:g}' if dropout and wide else ''}, recipe {recipe}: {epochs} "
        f"epochs, batch {batch_size}, {scheduler}, lr {rate}, weight decay {weight_decay:g}, loss {loss}, "
        f"{'crop and flip' if trad_augment else 'not augmented'}, seed {seed}"
    )
    for number, phase in enumerate(plan if len(plan) > 1 else [], 1):
        lines.append(
            f"phase {number}: to epoch {phase.end}, {phase.images} images, crops of {phase.crop} pixels from "
            f"{100 * phase.min_scale:g} % of the area on, batch {phase.batch_size}"
        )
    return lines, notes


def format_epoch(row: dict, epochs: int) -> str:
    """One epoch in a line."""
    text = f"epoch {row['epoch']}/{epochs}  lr {row['lr']:.4g}  train loss {row['train_loss']:.4f}"
    text += f"  acc of mixed labels {row['train_acc']:.2f}"
    for key, name, digits in (
        ("test_loss", "test loss", 4),
        ("test_top1", "top-1", 2),
        ("test_top5", "top-5", 2),
        ("valid_top1", "valid top-1", 2),
        ("ema_top1", "averaged top-1", 2),
    ):
        text += f"  {name} {row[key]:.{digits}f}" if key in row else ""
    return f"{text}  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"


def summarize_history(history: list[dict], best: dict) -> dict:
    """Last, best, and median and spread of the last ten evaluated epochs, of the top-1 accuracy on the test images."""
    tops = [row["test_top1"] for row in history if "test_top1" in row]
    return {
        "epochs": len(history),
        "last_top1": tops[-1],
        "last_top5": history[-1].get("test_top5"),
        "best": best,
        "median_of_last_ten_top1": statistics.median(tops[-10:]),
        "spread_of_last_ten_top1": max(tops[-10:]) - min(tops[-10:]),
        "training_seconds": sum(row["seconds"] for row in history),
    }


CLASSIFIER = RunKind(
    name="classifier",
    resolve=resolve_options,
    check_resume=check_resume_options,
    runs_of=classifier_runs,
    format_epoch=format_epoch,
    columns=LOG_COLUMNS,
    metric="{split}_top1",
    best_columns=["test_top1"],
    timed_parts=["mixing", "saliency"],
)


def finish_run(run: Run, test: DeviceLoader) -> dict | None:
    """The last lines of a run; returns what result.json holds, in the main process."""
    if run.finished_before:
        again = evaluate_held_out(run.state, {"test": test}, run.bar)
        if again:
            accuracies = f"loss {again['test_loss']:.4f}, top-1 {again['test_top1']:.2f}"
            run.log.say(f"this run was finished already; evaluated again: {accuracies}")
    run.guard.restore()
    if is_main_process():
        return log_result(run.log, summarize_history(run.history, run.best))
    return None


def log_result(log: RunFolder, result: dict) -> dict:
    """Print the last lines and write result.json."""
    best, top5 = result["best"], result["last_top5"]
    log.say(
        f"last epoch: top-1 accuracy {result['last_top1']:.2f} % (error {100 - result['last_top1']:.2f} %)"
        f"{f', top-5 accuracy {top5:.2f} %' if top5 is not None else ''}; best top-1 {best['test_top1']:.2f} % (epoch "
        f"{best['epoch']}, chosen on the {best['split']} images), median of the last ten "
        f"{result['median_of_last_ten_top1']:.2f} %"
    )
    if not log.off:
        log.write_result(result)
        log.say(f"in {log.path}: {', '.join(sorted(path.name for path in log.path.iterdir() if path.name[0] != '.'))}")
    return result


def count_skipped(loader: DeviceLoader) -> str:
    """The end of an epoch's line, where files could not be read."""
    skipped = int(all_reduce_sum(torch.tensor(loader.skipped)))
    return f"  {skipped} unreadable files skipped" if skipped else ""


def print_profile(state: TrainingState, loader: DeviceLoader, config: StepConfig, steps: int) -> None:
    """--profile: time some steps, and print where the time went."""
    table = profile_steps(state, loader, config, steps)
    total = sum(table.values())
    print(f"{total:.2f} ms a step of {loader.batch_size} images")
    for part, milliseconds in table.items():
        print(f"  {part:9} {milliseconds:9.2f} ms  {100 * milliseconds / total:5.1f} %")


def draw_epoch(run: Run, data: Data, trained: ImageSet) -> None:
    """curves.png every ten epochs and at the end; every --vis_epoch epochs a mixed batch of the images `trained` on.

    Every process mixes it, since batch norm may be over the images of all, and the main process draws it.
    """
    options, epoch, log = run.options, len(run.history), run.log
    if options["log_off"]:
        return
    methods = "+".join(options["method"])
    title = f"{methods}, {options['model']}, {options['dataset']}"
    if not log.off and (epoch % 10 == 0 or epoch == run.last_epoch):
        figures.draw_curves(log.path / "curves.png", run.history, title)
    if options["vis_epoch"] and epoch % options["vis_epoch"] == 0:
        path = None if log.off else log.path / "vis" / f"epoch_{epoch:03d}_{methods}.png"
        with run.state.preserved():
            draw_mixed_images(path, run.state, replace(data, train=trained), f"{title}, epoch {epoch}")


def draw_mixed_images(path: Path | None, state: TrainingState, data: Data, title: str) -> None:
    """Eight training images, mixed among themselves; without a path they are only mixed."""
    mixer, source, device = state.mixer, state.source, state.device
    spread = torch.linspace(0, len(data.train) - 1, min(8, len(data.train))).long()  # folders come sorted by class
    if mixer.batch_size:  # the eight again and again
        spread = spread.repeat(1 + mixer.batch_size // len(spread))[: mixer.batch_size]
    few = DeviceLoader(data.train.take(spread), len(spread), device=device, mean=data.mean, std=data.std)
    batch = next(few.epoch())._replace(loaded_index=spread.to(device))
    targets = F.one_hot(batch.labels, len(data.classes)).float()
    for one in state.sources:
        one.start_batch(batch)
    torch.manual_seed(1)
    for _ in range(20):  # a method that mixes every other batch should show a mixed one
        mixed, soft = mixer(batch.images, targets, source)
        if not torch.equal(mixed, batch.images):
            break
    maps = [one(batch.images, targets) for one in state.sources[:1]]
    if path is None:
        return
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
    )
