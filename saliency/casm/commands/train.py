"""Train saliency maps: python -m saliency.casm train DATA --classifier FILE --reproduce L100"""

import time
from pathlib import Path

from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.errors import UserError
from saliency.casm.options import casm_parser, train_options, where_options


def build_parser() -> Parser:
    parser = casm_parser(
        "train",
        "Train a decoder that draws, without a label, a mask of what a classifier needs; with a pool of its past "
        "states (L100, L1000), of what any classifier would need.",
    )
    where_options(parser)
    train_options(parser)
    add_single_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    """Train; returns the last row of the history."""
    parser = build_parser()
    typed = parser.read(argv)

    import torch

    from engine.config.select import select_kwargs
    from engine.data.datasets import load_data
    from engine.runtime.checkpoint import read_checkpoint
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.distributed import rank_environment
    from engine.runtime.progress import Progress, progress_bar, use_progress_bar
    from models import build_model
    from saliency.casm.network import SUFFIX, Casm, build_decoder
    from saliency.casm.run_files import CasmRun, format_epoch, log_header
    from saliency.casm.setup import (
        build_loaders,
        build_pool,
        choose_classifier,
        fill_from_data,
        find_resume,
        mask_notes,
        resolve_casm_options,
        resume_options,
        skill_notes,
    )
    from saliency.casm.training import (
        NonFiniteLoss,
        StepConfig,
        build_casm_state,
        count_iterations,
        evaluate,
        set_learning_rates,
        train_one_epoch,
    )

    if rank_environment()[1] > 1:
        parser.error("it trains in one process: leave torchrun away")
    resume = find_resume(parser, typed)
    saved = read_checkpoint(resume, kind="casm") if resume else None
    options = resume_options(parser, typed, saved["config"]) if saved else resolve_casm_options(parser, typed)
    device = choose_device(options["device"])
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    record = CasmRun(resume or Path(options["casms_path"]) / (options["name"] + SUFFIX), options, anew=not saved)

    # ---- Data ----
    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    if saved and saved["classes"] != data.classes:
        raise UserError(
            f"{resume}: the run knows other classes ({', '.join(saved['classes'][:5])} ...) than the data "
            f"({', '.join(data.classes[:5])} ...)\ncontinue it on its own data"
        )
    fill_from_data(options, data)

    # ---- Classifier, decoder and optimizers ----
    notes = []
    if saved:
        classifier = build_model(options["model"], len(data.classes), data.image_size)
    else:
        options["model"], classifier, notes = choose_classifier(
            parser, data, classifier=options["classifier"], arch=options["arch"]
        )
    network = Casm(classifier, build_decoder(classifier, options["width"], options["upsample"]))
    network = network.to(device, memory_format=torch.channels_last)
    pool = build_pool(classifier, **select_kwargs(options, build_pool))
    state = build_casm_state(network, pool, precision=precision, **select_kwargs(options, build_casm_state))

    # ---- Start or resume ----
    loading = select_kwargs(options, ["batch_size", "crop_padding", "seed", "workers"])
    train, test, few = build_loaders(data, device, **loading)
    iterations = count_iterations(len(train), options["pot"])
    log_header(record, data, state, iterations, where=f"{device}, {precision_text}", notes=notes)
    config = StepConfig(precision=precision, **select_kwargs(options, ["hp", "lambda_r", "adversarial"]))
    history = saved["history"] if saved else []
    if saved:
        state.load(saved, record.read_pool(saved))
        print(f"continuing after epoch {len(history)}", flush=True)
        if saved["precision"] != str(precision):
            print(f"note: before it computed in {saved['precision']}: it is not the run it would have been")
    else:
        skill = evaluate(network, few, config)["accuracy"]
        few.close()
        record.clear()
        print("\n".join(skill_notes(skill, len(data.classes))), flush=True)

    # ---- Training ----
    bar, rates = use_progress_bar(options["no_progress"]), select_kwargs(options, ["lr", "lr_casme", "lrde"])
    with record.stopping_well():
        for epoch in range(len(history), options["epochs"]):
            begin, title = time.perf_counter(), f"epoch {epoch + 1}/{options['epochs']}"
            set_learning_rates(state, epoch, **rates)
            try:
                with Progress(title, iterations, bar=bar) as progress:
                    schedule = {"epoch": epoch, "iterations": iterations, "log_every": options["print_freq"]}
                    row = train_one_epoch(state, train, config, **schedule, progress=progress)
                with Progress("evaluating", len(test), bar=bar, lines=False) as progress:
                    held_out = evaluate(network, test, config, progress=progress)
            except NonFiniteLoss as error:
                raise UserError(
                    f"{title}: {error}\ntry a lower --lr or --lr-casme, or --amp off; {record.way_on()}"
                ) from error
            row = {"epoch": epoch + 1, **row, **{f"val_{key}": value for key, value in held_out.items()}}
            history.append(row | {"seconds": time.perf_counter() - begin})
            record.save(state, data, history, str(precision))
            record.write_log(history)
            lines = [format_epoch(history[-1], options["epochs"]), *mask_notes(row, options["lambda_r"])]
            if skipped := train.skipped + test.skipped:
                lines.append(f"note: {skipped} unreadable files skipped; neighbours served in their place")
            print("\n".join(lines), flush=True)
    print(f"masks drawn in {record.draw_masks(network, data)}")
    for batches in (train, test):
        batches.close()
    return history[-1]
