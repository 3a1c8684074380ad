"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

import time

from engine import configure
from engine.cli import Parser, UserError, read_config, run
from engine.mixing_options import GROUPS, mixing_options
from engine.options import data_options, device_options, training_options
from mixing import ALIASES as METHOD_ALIASES
from mixing import MIXERS, compose, hyper_parameters
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, matching_models, parameter_counts
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source, source_parameters


def build_parser() -> Parser:
    parser = Parser("Train a classifier on small images with a mixing method. With no option at all: a demonstration.")
    training_options(parser, models=MODELS, model_aliases=MODEL_ALIASES, methods=MIXERS, method_aliases=METHOD_ALIASES)
    data_options(parser)
    mixing_options(parser, sources=SOURCES, source_aliases=SOURCE_ALIASES)
    device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    try:
        typed, notes = configure.translate(parser.read(argv))
    except ValueError as error:
        parser.error(str(error))
    options = settle(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        return print("\n".join(f"{name:16} {count:>12,} parameters" for name, count in parameter_counts().items()))
    if options["evaluate"]:
        return evaluate_once(typed, parser)

    import torch  # after the options, so that --help answers at once

    from engine.batches import Batches
    from engine.checkpoint import read_checkpoint
    from engine.classifier import start_from
    from engine.data import load_data
    from engine.device import choose_device, choose_precision, prepare
    from engine.log import RunFolder, add_trackers, find_resume, run_folder
    from engine.loop import Stopwatch, each_source, predict, profile, scores, train_one_epoch
    from engine.loss import LOSSES, cross_entropy_scale
    from engine.progress import Progress, bars_wanted, over
    from engine.report import announce, draw_epoch, finish, line_of, print_profile, result_of
    from engine.training import build_parts, peak_memory_mb, pick, save, stop_well

    resume = find_resume(options)
    saved = read_checkpoint(resume) if resume else None
    if saved:
        configure.check_resume(typed, saved["config"], force=options["force_config"])
        options = settle(parser, typed, saved["config"])
    folder = run_folder(options, resume)

    device = choose_device(options["device"])
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    data = load_data(progress=over, **pick(options, load_data))
    feed = {"device": device, "mean": data.mean, "std": data.std, **pick(options, ["workers", "channels_last"])}
    augment = {"augment": options["trad_augment"], "padding": options["crop_padding"]}
    train = Batches(data.train, shuffle=True, **pick(options, ["batch_size", "drop_last", "seed"]), **augment, **feed)
    held_out = {name: Batches(part, 500, **feed) for name, part in (("test", data.test), ("valid", data.valid)) if part}
    if len(train) == 0:
        raise UserError(
            f"--batch_size {options['batch_size']}: only {len(data.train)} training images; take a smaller one"
        )

    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    model = build_model(options["model"], len(data.classes), data.image_size, options["dropout"])
    model = model.to(device, memory_format=layout)
    if options["init_from"] and not saved:
        notes.append(start_from(model, options["init_from"], len(data.classes), matching_models))

    normalised = {"mean": data.mean, "std": data.std}
    try:
        mixer = compose(options["method"], options | normalised)
        mixer.check_size(data.image_size, data.image_size)
        parts = build_parts(model, mixer, options, steps_per_epoch=len(train), precision=precision)
        share = {**normalised, "model": model, "images_count": len(data.train), "device": device}
        share |= {"training_loss": LOSSES[options["loss"]], "precision": precision, "scaler": parts.scaler}
        share |= {"cross_entropy_scale": cross_entropy_scale(options["loss"], len(data.classes))}
        share |= pick(options, ["saliency_size", "bank_size", "bank_momentum"])
        banks = {}  # methods that take turns share one

        def make_source(one):
            name = options["saliency"] or one.default_source
            source = banks.get(name) or build_source(name, **share | one.gradient_options)
            return banks.setdefault(name, source) if source.learns else source

        source = mixer.build_source(make_source)
        parts.sources = each_source(source)
    except ValueError as error:
        parser.error(str(error))
    if options["compile"]:
        model.compile()
    step = {
        "loss_fn": LOSSES[options["loss"]],
        "num_classes": len(data.classes),
        "precision": precision,
        **{"scheduler": parts.scheduler, "scaler": parts.scaler, "ema": parts.ema},
        **pick(options, ["label_smoothing", "clip_grad"]),
    }
    if options["profile"]:
        table = profile(options["profile"], model, mixer, source, train, parts.optimizer, **step)
        return print_profile(table, options["batch_size"])

    history, best = [], {"value": -1.0, "epoch": 0, "split": "valid" if data.valid else "test"}
    if saved:
        parts.load(saved)
        history, best = saved["history"], saved["best"]
        if saved["precision"] != str(precision):
            notes.append(
                f"before it computed in {saved['precision']}: from here on it is not the run it would have been"
            )
    log = RunFolder(folder, off=options["log_off"], anew=options["overwrite"] and not saved)
    add_trackers(log, options)
    log.write_config(options, device)
    log.write_log(history)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, parts.sources))
    if parts.sources and not any(hasattr(one, "gradient") for one in parts.sources):
        read -= configure.OF_THE_GRADIENT
        if options["clean_lam"] or {"comixup", "sage"} & set(options["method"]):
            notes.append("only --saliency gradient trains on the clean images too; here the mixed ones are all")
    if unread := configure.without_effect(typed, parser.group_of(*GROUPS), read):
        notes.append(f"without effect with --method {' '.join(options['method'])}: {', '.join(unread)}")
    announce(log, options, data, where=f"{device}, {precision_text}", notes=notes, done=len(history))

    bar, warned = bars_wanted(options["no_progress"]), False

    def test(network, batches: Batches) -> dict[str, float]:
        with Progress("evaluating", len(batches), bar=bar, lines=False) as shown:
            return scores(*predict(network, batches, progress=shown))

    for epoch in range(len(history), options["epochs"]):
        mixer.start_epoch(epoch, options["epochs"], len(train))
        watch, begin, lr = Stopwatch(device), time.perf_counter(), parts.optimizer.param_groups[0]["lr"]
        with stop_well(log, parts):
            with Progress(f"epoch {epoch + 1}/{options['epochs']}", len(train), bar=bar) as shown:
                row = train_one_epoch(
                    *(model, mixer, source, train, parts.optimizer),
                    **step,
                    epoch=epoch,
                    watch=watch,
                    look_every=options["print_freq"],
                    progress=shown,
                )
            row |= {"epoch": epoch + 1, "lr": lr, "seconds": time.perf_counter() - begin}
            row |= {f"{part}_seconds": watch.seconds().get(part, 0.0) for part in ("mixing", "saliency")}
            row |= {"images_per_second": row.pop("images") / row["seconds"], "peak_memory_mb": peak_memory_mb(device)}
            if (epoch + 1) % options["eval_every"] == 0 or epoch + 1 == options["epochs"]:
                for name, batches in held_out.items():
                    row |= {f"{name}_{key}": value for key, value in test(model, batches).items()}
                if parts.ema:
                    row["ema_top1"] = test(parts.ema.module, held_out["test"])["top1"]
            history.append(row)
            improved = row.get(f"{best['split']}_top1", -1.0) > best["value"]
            if improved:
                best = best | {"value": row[f"{best['split']}_top1"], "epoch": epoch + 1, "test_top1": row["test_top1"]}
            steps = (epoch + 1) * len(train)
            save(log, parts, options, data, history, best, steps=steps, improved=improved, precision=str(precision))
        log.write_log(history)
        log.track(row)
        log.say(line_of(row, options["epochs"], train.skipped))
        if not warned and (unusable := int(mixer.unusable)):
            warned = True
            log.say(f"note: {unusable} saliency maps were all zero or no numbers, and were taken as uniform")
        draw_epoch(log, options, history, parts, source, data)

    if saved and saved["epoch"] >= options["epochs"]:
        again = test(model, held_out["test"])
        log.say(f"this run was finished already; evaluated again: loss {again['loss']:.4f}, top-1 {again['top1']:.2f}")
    result = result_of(history, best)
    finish(log, result)
    return result


def settle(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option, filled in and checked; a contradiction ends with a usage error."""
    options = configure.fill_in(typed, saved, parser.defaults)
    try:
        configure.check_together(options, typed)
    except ValueError as error:
        parser.error(str(error))
    return options


def evaluate_once(typed: dict, parser: Parser) -> dict:
    """--evaluate: loss and accuracy of --checkpoint on the test images."""
    from engine.classifier import SavedClassifier, accuracy_line, predict_test
    from engine.data import load_data
    from engine.device import choose_device, prepare
    from engine.log import find_resume
    from engine.loop import scores
    from engine.progress import over
    from engine.training import pick

    place = find_resume(configure.fill_in(typed, {}, parser.defaults))
    if place is None:
        raise UserError("--checkpoint auto: there is no such run to evaluate")
    file = SavedClassifier(place)
    if not file.options and "dataset" not in typed:
        parser.error(f"--dataset: {place} does not say what it was trained on; name it")
    options = configure.fill_in(typed, file.options, parser.defaults)
    device = choose_device(options["device"])
    prepare(device, seed=0, deterministic=options["deterministic"])
    data = load_data(progress=over, **pick(options, load_data))
    print("\n".join([data.test.summary("test"), *(f"note: {line}" for line in data.warnings)]))
    name = typed.get("model") or file.options.get("model")
    model = file.build(
        build_model, matching_models, model=name, num_classes=len(data.classes), image_size=data.image_size
    )
    result = scores(*predict_test(model, data, device=device, **pick(options, ["workers", "channels_last"]))[:2])
    print(f"{place}: loss {result['loss']:.4f}\n{accuracy_line(result)}")
    return result


if __name__ == "__main__":
    run(main)
