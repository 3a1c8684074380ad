"""Train saliency maps: python -m saliency.casm train DATA --classifier FILE --reproduce L100"""

import time
from pathlib import Path

from engine.cli import Parser, UserError
from engine.options import one_device_options
from saliency.casm.options import casm_parser, train_options, where_options


def build_parser() -> Parser:
    parser = casm_parser(
        "train",
        "Train a decoder that draws, without a label, a mask of what a classifier needs; with a pool of its past "
        "states (L100, L1000), of what any classifier would need.",
    )
    where_options(parser)
    train_options(parser)
    one_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Train; returns the last row of the history."""
    parser = build_parser()
    typed = parser.read(argv)

    import torch

    from engine.batches import Batches
    from engine.checkpoint import read_checkpoint
    from engine.data import load_data
    from engine.device import choose_device, choose_precision, prepare
    from engine.image_files import RandomView
    from engine.progress import Progress, bars_wanted, over
    from engine.training import pick
    from models import build_model
    from saliency.casm.network import ENDING, Casm, build_decoder
    from saliency.casm.pool import ClassifierPool, megabytes
    from saliency.casm.record import Record, line_of
    from saliency.casm.settle import (
        choose_classifier,
        fill_in,
        find_resume,
        go_on,
        notes_on_masks,
        notes_on_pool,
        notes_on_skill,
        pool_on_host,
    )
    from saliency.casm.training import NotFinite, build_parts, evaluate, iterations_of, train_one_epoch

    resume = find_resume(parser, typed)
    saved = read_checkpoint(resume, kind="casm") if resume else None
    options = go_on(parser, typed, saved["config"]) if saved else fill_in(parser, typed)
    device = choose_device(options["device"])
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    record = Record(resume or Path(options["casms_path"]) / (options["name"] + ENDING), options, anew=not saved)

    data = load_data(progress=over, **pick(options, load_data))
    notes = list(data.warnings)
    if saved:
        classifier = build_model(options["model"], len(data.classes), data.image_size)
    else:
        options["model"], classifier, told = choose_classifier(parser, options, data)
        notes += told
    if options["crop_padding"] is None:
        options["crop_padding"] = data.image_size // 16
    network = Casm(classifier, build_decoder(classifier, options["width"], options["upsample"]))
    network = network.to(device, memory_format=torch.channels_last)
    size = megabytes(classifier)
    host = pool_on_host(options["pool_device"], options["f_size"] * size, device)
    room = {"device": "cpu" if host else device, "pinned": host and device.type == "cuda"}
    parts = build_parts(
        network,
        ClassifierPool(**pick(options, ["f_size", "smf"]), **room),
        precision=precision,
        **pick(options, build_parts),
    )

    feed = {"device": device, "mean": data.mean, "std": data.std, "workers": options["workers"]}
    own = {"padding": options["crop_padding"]}
    if not isinstance(data.train.pixels, torch.Tensor):
        own = {"view": RandomView(data.image_size)}
    train = Batches(data.train, options["batch_size"], shuffle=True, augment=True, seed=options["seed"], **own, **feed)
    test = Batches(data.test, options["batch_size"], **feed)
    iterations = iterations_of(len(train), options["pot"])
    print(data.train.summary("train") + "\n" + data.test.summary("val"))
    print(
        f"{options['model']}: {options['epochs']} epochs of {iterations} iterations of {options['batch_size']} images, "
        f"{'adversarial' if options['adversarial'] else 'entropy'} form, lambda_r {options['lambda_r']:g}, classifier "
        f"{'trained along' if parts.learns else 'fixed'}, on {device}, {precision_text}; writing {record.place}"
    )
    if parts.judge:
        print("\n".join(notes_on_pool(options, iterations, size, "host" if host else "GPU")))
    for note in notes:
        print(f"note: {note}")

    step = {**pick(options, ["hp", "lambda_r", "adversarial"]), "precision": precision}
    judged = {key: step[key] for key in ("lambda_r", "adversarial", "precision")}
    schedule = {**pick(options, ["pot", "lr", "lr_casme", "lrde"]), "look_every": options["print_freq"]}
    history = []
    if saved:
        history = saved["history"]
        parts.load(saved, record.read_pool(saved))
        print(f"continuing after epoch {len(history)}")
        if saved["precision"] != str(precision):
            print(f"note: before it computed in {saved['precision']}: it is not the run it would have been")
    else:
        skill = evaluate(network, Batches(data.test.spread(1000), options["batch_size"], **feed), **judged)["accuracy"]
        print("\n".join(notes_on_skill(skill, len(data.classes))), flush=True)

    bar = bars_wanted(options["no_progress"])
    with record.stopping_well():
        for epoch in range(len(history), options["epochs"]):
            begin, title = time.perf_counter(), f"epoch {epoch + 1}/{options['epochs']}"
            try:
                with Progress(title, iterations, bar=bar) as shown:
                    row = train_one_epoch(parts, train, epoch=epoch, progress=shown, **schedule, **step)
                with Progress("evaluating", len(test), bar=bar, lines=False) as shown:
                    held = evaluate(network, test, progress=shown, **judged)
            except NotFinite as error:
                raise UserError(
                    f"{title}: {error}\ntry a lower --lr or --lr-casme, or --amp off; {record.way_on()}"
                ) from error
            row = {"epoch": epoch + 1, **row, **{f"val_{key}": value for key, value in held.items()}}
            history.append(row | {"seconds": time.perf_counter() - begin})
            record.save(parts, data, history, str(precision))
            record.write_log(history)
            print(
                "\n".join([line_of(history[-1], options["epochs"]), *notes_on_masks(row, options["lambda_r"])]),
                flush=True,
            )
    print(f"masks drawn in {record.draw_masks(network, Batches(data.test.spread(8), 8, **feed), data)}")
    return history[-1]
