"""What a person reads and looks at while a classifier trains and when it is done."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from engine.config.phases import Phase
from engine.data.image_set import Data, ImageSet
from engine.data.loader import DeviceLoader
from engine.drawing import figures
from engine.training.run_folder import RunFolder, get_opencv_versions
from engine.training.state import TrainingState, preserve_state
from engine.training.stopwatch import flatten_sources


def log_header(log: RunFolder, options: dict, data: Data, *, where: str, notes: list[str], done: int) -> None:
    """What is about to run, on what, and everything the user may want to know before waiting for it."""
    for name, part in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if part:
            log.say(part.summary(name))
    one_cycle = options["scheduler"] == "onecycle"
    if options["scheduler"] == "multistep" and min(options["schedule"]) >= options["epochs"]:
        milestones = " ".join(map(str, options["schedule"]))
        notes = [*notes, f"--schedule {milestones}: in {options['epochs']} epochs the lr never drops"]
    rate = f"{(one_cycle and options['max_lr']) or options['lr']:g}"
    rate = options["lr_points"] if options["scheduler"] == "points" else rate
    method, model = " ".join(options["method"]), options["model"]
    wide = model.startswith("wrn")
    dropout = f", dropout {options['dropout']:g}" if options["dropout"] and wide else ""
    log.say(
        f"{method}: {model}{dropout}, recipe "
        f"{options['recipe']}: {options['epochs']} epochs, batch {options['batch_size']}, {options['scheduler']}, lr "
        f"{rate}, weight decay {options['weight_decay']:g}, loss "
        f"{options['loss']}, {'crop and flip' if options['trad_augment'] else 'not augmented'}, seed {options['seed']}"
    )
    log.say(f"on {where}" + ("" if log.off else f"; writing to {log.path}"))
    if options["dropout"] and not wide:
        notes = [*notes, f"--dropout {options['dropout']:g}: {model} has none; only the wide networks have"]
    if len(both := get_opencv_versions()) > 1:
        notes = [*notes, f"{' and '.join(both)} overwrite each other's files: uninstall all but one"]
    for note in [*notes, *data.warnings]:
        log.say(f"note: {note}")
    if 0 < done < options["epochs"]:
        log.say(f"continuing after epoch {done}")


def announce_phases(log: RunFolder, phases: list[Phase]) -> None:
    for number, phase in enumerate(phases if len(phases) > 1 else [], 1):
        log.say(
            f"phase {number}: to epoch {phase.end}, {phase.images} images, crops of {phase.crop} pixels from "
            f"{100 * phase.min_scale:g} % of the area on, batch {phase.batch_size}"
        )


def format_epoch(row: dict, epochs: int, skipped: int = 0) -> str:
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
    text += f"  {row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    return text + (f"  {skipped} unreadable files skipped" if skipped else "")


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


def log_result(log: RunFolder, result: dict) -> None:
    """The last lines of a run."""
    best = result["best"]
    top5 = f", top-5 accuracy {result['last_top5']:.2f} %" if result["last_top5"] is not None else ""
    log.say(
        f"last epoch: top-1 accuracy {result['last_top1']:.2f} % (error {100 - result['last_top1']:.2f} %){top5}; best "
        f"top-1 {best['test_top1']:.2f} % (epoch {best['epoch']}, chosen on the {best['split']} images), median of the "
        f"last ten {result['median_of_last_ten_top1']:.2f} %"
    )
    if not log.off:
        log.write_result(result)
        log.say(f"in {log.path}: {', '.join(sorted(path.name for path in log.path.iterdir() if path.name[0] != '.'))}")


def print_profile(table: dict[str, float], batch_size: int) -> None:
    total = sum(table.values())
    print(f"{total:.2f} ms a step of {batch_size} images")
    for part, milliseconds in table.items():
        print(f"  {part:9} {milliseconds:9.2f} ms  {100 * milliseconds / total:5.1f} %")


def draw_epoch(
    log: RunFolder, options: dict, history: list[dict], parts: TrainingState, source, data: Data, trained: ImageSet
) -> None:
    """curves.png every ten epochs and at the end; a picture of a mixed batch of the images `trained` on when
    --vis_epoch says so.

    Every process mixes it, since batch norm may be over the images of all, and the first one draws it.
    """
    if options["log_off"]:
        return
    epoch, methods = len(history), "+".join(options["method"])
    title = f"{methods}, {options['model']}, {options['dataset']}"
    if not log.off and (epoch % 10 == 0 or epoch == options["epochs"]):
        figures.draw_curves(log.path / "curves.png", history, title)
    if options["vis_epoch"] and epoch % options["vis_epoch"] == 0:
        path = None if log.off else log.path / "vis" / f"epoch_{epoch:03d}_{methods}.png"
        with preserve_state(parts):
            draw_mixed_images(
                path, parts.mixer, source, replace(data, train=trained), parts.device, f"{title}, epoch {epoch}"
            )


def draw_mixed_images(path: Path | None, mixer, source, data: Data, device: torch.device, title: str) -> None:
    """Eight training images, mixed among themselves; without a path they are only mixed."""
    spread = torch.linspace(0, len(data.train) - 1, min(8, len(data.train))).long()  # folders come sorted by class
    if mixer.batch_size:  # the eight again and again
        spread = spread.repeat(1 + mixer.batch_size // len(spread))[: mixer.batch_size]
    few = DeviceLoader(data.train.take(spread), len(spread), device=device, mean=data.mean, std=data.std)
    batch = next(few.epoch())._replace(loaded_index=spread.to(device))
    targets = F.one_hot(batch.labels, len(data.classes)).float()
    for one in flatten_sources(source):
        one.start_batch(batch)
    torch.manual_seed(1)
    for _ in range(20):  # a method that mixes every other batch should show a mixed one
        mixed, soft = mixer(batch.images, targets, source)
        if not torch.equal(mixed, batch.images):
            break
    maps = [one(batch.images, targets) for one in flatten_sources(source)[:1]]
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
