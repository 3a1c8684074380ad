"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

import time
from pathlib import Path

from engine.cli import Parser, UserError, read_config, run
from engine.options import (
    check_resume,
    check_together,
    data_options,
    device_options,
    mixing_options,
    training_options,
    translate,
    without_effect,
)
from engine.recipes import fill_in
from mixing import ALIASES as METHOD_ALIASES
from mixing import MIXERS, compose, hyper_parameters
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, matching_models, parameter_counts
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source


def build_parser() -> Parser:
    parser = Parser(
        "Train a classifier on small images with a mixing method. With no option at all: a demonstration on drawn shapes."
    )
    training_options(parser, models=MODELS, model_aliases=MODEL_ALIASES, methods=MIXERS, method_aliases=METHOD_ALIASES)
    data_options(parser)
    mixing_options(parser, sources=SOURCES, source_aliases=SOURCE_ALIASES)
    device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    try:
        typed, notes = translate(parser.read(argv))
        options = fill_in(typed, read_config(typed["config"]) if "config" in typed else {}, parser.defaults)
        check_together(options)
    except ValueError as error:
        parser.error(str(error))
    if options["list_models"]:
        return print(
            "\n".join(f"{name:16} {count:>12,} parameters (10 classes)" for name, count in parameter_counts().items())
        )

    import torch  # after the options, so that --help answers at once

    from engine.batches import Batches
    from engine.checkpoint import read_checkpoint
    from engine.data import load_data
    from engine.device import choose_device, choose_precision, prepare
    from engine.log import RunFolder, add_trackers, find_run, line_of, result_of
    from engine.loop import Stopwatch, predict, scores, train_one_epoch
    from engine.loss import LOSSES
    from engine.progress import Progress, bars_wanted, over
    from engine.training import build_parts, peak_memory_mb, pick, save, stop_well

    if options["evaluate"]:
        return evaluate_once(typed, parser.defaults)
    folder, resume = find_run(options)
    saved = read_checkpoint(resume) if resume else None
    if saved:
        if not options["force_config"]:
            check_resume(typed, saved["config"])
        options = fill_in(typed, saved["config"], parser.defaults)

    device = choose_device(options["device"])
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    data = load_data(progress=over, **pick(options, load_data))
    feed = {
        "device": device,
        "mean": data.mean,
        "std": data.std,
        "workers": options["workers"],
        "channels_last": options["channels_last"],
    }
    held_out = {name: Batches(part, 500, **feed) for name, part in (("test", data.test), ("valid", data.valid)) if part}
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    model = build_model(options["model"], len(data.classes), data.image_size, options["dropout"]).to(
        device, memory_format=layout
    )
    if options["init_from"] and not saved:
        notes += start_from(model, options["init_from"], len(data.classes))
    train = Batches(
        data.train,
        options["batch_size"],
        shuffle=True,
        augment=options["trad_augment"],
        padding=options["crop_padding"],
        drop_last=options["drop_last"],
        seed=options["seed"],
        **feed,
    )
    if len(train) == 0:
        raise UserError(
            f"--batch_size {options['batch_size']}: there are only {len(data.train)} training images, and --drop_last leaves out "
            "a short batch; take a smaller --batch_size"
        )
    try:
        mixer, source = compose(
            options["method"],
            options,
            lambda default: build_source(
                (options["saliency"] or default) if default else None, mean=data.mean, std=data.std
            ),
        )
    except ValueError as error:
        parser.error(str(error))
    parts = build_parts(model, mixer, options, steps_per_epoch=len(train), precision=precision)
    if options["compile"]:
        model.compile()
    step = {
        "loss_fn": LOSSES[options["loss"]],
        "num_classes": len(data.classes),
        "scheduler": parts.scheduler,
        "scaler": parts.scaler,
        "precision": precision,
        "label_smoothing": options["label_smoothing"],
        "clip_grad": options["clip_grad"],
        "ema": parts.ema,
    }
    if options["profile"]:
        return profile(options["profile"], parts, source, train, step)

    history, best = [], {"value": -1.0, "epoch": 0, "split": "valid" if data.valid else "test"}
    if saved:
        parts.load(saved)
        history, best = saved["history"], saved["best"]
    log = RunFolder(folder, off=options["log_off"])
    add_trackers(log, options)
    log.write_config(options, device)
    log.write_log(history)
    announce(log, typed, options, parser, data, notes, f"{device}, {precision_text}", source, done=len(history))

    for epoch in range(len(history), options["epochs"]):
        mixer.start_epoch(epoch, options["epochs"])
        rate, watch, begin = parts.scheduler.get_last_lr()[0], Stopwatch(device), time.perf_counter()
        with (
            stop_well(log, parts, epoch),
            Progress(
                f"epoch {epoch + 1}/{options['epochs']}", len(train), bar=bars_wanted(options["no_progress"])
            ) as bar,
        ):
            row = train_one_epoch(
                model,
                mixer,
                source,
                train,
                parts.optimizer,
                epoch=epoch,
                watch=watch,
                look_every=options["print_freq"],
                progress=lambda step, loss, acc, show=bar.show: show(step, f"loss {loss:.4f}  acc {100 * acc:.2f}"),
                **step,
            )
            seconds = time.perf_counter() - begin
            row |= {
                "epoch": epoch + 1,
                "lr": rate,
                "seconds": seconds,
                "images_per_second": row.pop("images") / seconds,
                "peak_memory_mb": peak_memory_mb(device),
                **{f"{part}_seconds": watch.seconds().get(part, 0.0) for part in ("mixing", "saliency")},
            }
            if (epoch + 1) % options["eval_every"] == 0 or epoch + 1 == options["epochs"]:
                for name, batches in held_out.items():
                    row |= {f"{name}_{key}": value for key, value in scores(*predict(model, batches)).items()}
                if parts.ema:
                    row["ema_top1"] = scores(*predict(parts.ema.module, held_out["test"]))["top1"]
            history.append(row)
            improved = row.get(f"{best['split']}_top1", -1.0) > best["value"]
            if improved:
                best = {
                    "value": row[f"{best['split']}_top1"],
                    "epoch": epoch + 1,
                    "split": best["split"],
                    "test_top1": row["test_top1"],
                }
            save(
                log,
                parts,
                options=options,
                history=history,
                best=best,
                steps=(epoch + 1) * len(train),
                classes=data.classes,
                image_size=data.image_size,
                mean=data.mean,
                std=data.std,
                improved=improved,
                save_every=options["save_every"],
            )
        log.write_log(history)
        log.track(row)
        log.say(
            line_of(row, options["epochs"]) + (f", {train.skipped} unreadable files skipped" if train.skipped else "")
        )
        draw_epoch(log, options, history, mixer, source, data, device)

    result = result_of(history, best)
    log.write_result(result)
    finish(
        log,
        result,
        was_finished=bool(saved) and len(saved["history"]) == len(history) and saved["epoch"] >= options["epochs"],
    )
    return result


def start_from(model, path: str, num_classes: int) -> list[str]:
    """Load the weights of `path` into the network; the last layer starts anew where the classes differ. Returns notes."""
    from engine.checkpoint import load_weights
    from engine.classifier import SavedClassifier

    file = SavedClassifier(path)
    fresh = load_weights(
        model, file.weights, path, num_classes=num_classes, new_head=True, matches=matching_models(file.weights)
    )
    return [
        f"--init_from {path}: weights taken"
        + (f", but the last layer starts anew with {num_classes} classes" if fresh else "")
    ]


def evaluate_once(typed: dict, defaults: dict) -> dict:
    """--evaluate: the accuracy of --checkpoint on the test images, in float32."""
    import torch

    from engine.batches import Batches
    from engine.classifier import SavedClassifier
    from engine.data import load_data
    from engine.device import choose_device
    from engine.log import find_run
    from engine.loop import predict, scores
    from engine.progress import over
    from engine.training import pick

    place = find_run(fill_in(typed, {}, defaults))[1]
    if place is None:
        raise UserError("--checkpoint auto: there is no such run to evaluate")
    file = SavedClassifier(place)
    options = fill_in(typed, file.options, defaults)
    device = choose_device(options["device"])
    data = load_data(progress=over, **pick(options, load_data))
    model = file.build(
        build_model,
        matching_models,
        model=typed.get("model"),
        num_classes=len(data.classes),
        image_size=data.image_size,
    )
    test = Batches(data.test, 500, device=device, mean=data.mean, std=data.std, workers=options["workers"])
    result = scores(*predict(model.to(device, memory_format=torch.channels_last), test))
    print(f"{place}: loss {result['loss']:.4f}")
    print("  ".join(f"Top-{key[3:]} Accuracy: {value:.2f}%" for key, value in result.items() if key.startswith("top")))
    return result


def profile(steps: int, parts, source, train, step: dict) -> dict:
    """--profile: milliseconds of each part of a step, after ten steps to warm up."""
    from engine.loop import Stopwatch, train_one_epoch

    train_one_epoch(parts.model, parts.mixer, source, train, parts.optimizer, epoch=0, max_steps=10, **step)
    watch, done = Stopwatch(train.device), 0
    while done < steps:
        run_now = min(steps - done, len(train))
        train_one_epoch(
            parts.model,
            parts.mixer,
            source,
            train,
            parts.optimizer,
            epoch=done + 1,
            max_steps=run_now,
            watch=watch,
            **step,
        )
        done += run_now
    table = {part: 1000 * watch.seconds().get(part, 0.0) / done for part in ("data", "saliency", "mixing", "network")}
    total = sum(table.values())
    print(f"{done} steps of {train.batch_size} images, {total:.2f} ms each")
    for part, milliseconds in table.items():
        print(f"  {part:9} {milliseconds:9.2f} ms  {100 * milliseconds / total:5.1f} %")
    return table


def announce(
    log, typed: dict, options: dict, parser: Parser, data, notes: list[str], where: str, source, done: int
) -> None:
    """What is about to run, on what, and everything the user may want to know before waiting for it."""
    read = set().union(*map(hyper_parameters, options["method"])) | ({"saliency"} if source else set())
    unread = without_effect(typed, parser.group_of, read)
    if unread:
        notes = [*notes, f"without effect with --method {' '.join(options['method'])}: {', '.join(unread)}"]
    if options["scheduler"] == "multistep" and min(options["schedule"]) >= options["epochs"]:
        notes = [
            *notes,
            f"--schedule {' '.join(map(str, options['schedule']))}: the lr never drops in {options['epochs']} epochs",
        ]
    for name, part in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        if part:
            log.say(part.summary(name))
    peak = (options["max_lr"] or options["lr"]) if options["scheduler"] == "onecycle" else options["lr"]
    dropout = f", dropout {options['dropout']}" if options["dropout"] else ""
    log.say(
        f"{' '.join(options['method'])}: {options['model']}{dropout}, recipe {options['recipe']}: {options['epochs']} epochs, "
        f"batch {options['batch_size']}, {options['scheduler']}, lr {peak:g}, weight decay {options['weight_decay']:g}, loss {options['loss']}, "
        f"{'crop and flip' if options['trad_augment'] else 'no augmentation'}, seed {options['seed']}"
    )
    log.say(f"on {where}" + ("" if log.off else f"; writing to {log.path}"))
    for note in [*notes, *data.warnings]:
        log.say(f"note: {note}")
    if 0 < done < options["epochs"]:
        log.say(f"continuing after epoch {done}")


def draw_epoch(log, options: dict, history: list[dict], mixer, source, data, device) -> None:
    """curves.png every ten epochs and at the end; a picture of a mixed batch when --vis_epoch says so."""
    from engine import draw

    epoch, last = len(history), len(history) == options["epochs"]
    what = f"{' '.join(options['method'])}, {options['model']}, {options['dataset']}"
    if not log.off and (epoch % 10 == 0 or last):
        draw.curves(log.path / "curves.png", history, what)
    if not log.off and options["vis_epoch"] and epoch % options["vis_epoch"] == 0:
        path = log.path / "vis" / f"epoch_{epoch:03d}_{'+'.join(options['method'])}.png"
        draw_mixed(path, mixer, source, data, device, f"{what}, epoch {epoch}")


def draw_mixed(path: Path, mixer, source, data, device, title: str) -> None:
    """Eight training images, mixed among themselves. Draws of its own: training goes on as if there had been no picture."""
    import torch
    from torch.nn import functional as F

    from engine import draw
    from engine.batches import Batches

    few = Batches(
        data.train.take(torch.arange(min(8, len(data.train)))), 8, device=device, mean=data.mean, std=data.std
    )
    batch = next(few.epoch())
    targets = F.one_hot(batch.labels, len(data.classes)).float()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(1)
        for _ in range(20):  # a method that mixes every other batch should show a mixed one
            mixed, soft = mixer(batch.images, targets, source)
            if not torch.equal(mixed, batch.images):
                break
    draw.mixed_batch(
        path,
        images=batch.images,
        targets=targets,
        saliency=source(batch.images, targets) if source else None,
        mixed=mixed,
        soft=soft,
        mean=data.mean,
        std=data.std,
        classes=data.classes,
        title=title,
    )


def finish(log, result: dict, was_finished: bool) -> None:
    if was_finished:
        log.say("this run was finished already; its result again:")
    best = result["best"]
    log.say(
        f"test top-1: last epoch {result['last_top1']:.2f}, best {best['test_top1']:.2f} (epoch {best['epoch']}, chosen on the "
        f"{best['split']} images), median of the last ten {result['median_of_last_ten_top1']:.2f}"
    )
    if not log.off:
        log.say(f"in {log.path}: log.csv, curves.png, result.json, last.pt, best.pt")


if __name__ == "__main__":
    run(main)
