"""Train a mask decoder: python -m saliency.casm train DATA --classifier FILE --reproduce l100"""

from pathlib import Path

from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.runtime.claim import releasing_claims
from saliency.casm.options import add_train_options, build_casm_parser


def build_parser() -> Parser:
    parser = build_casm_parser(
        "train",
        "Train a decoder that predicts a mask over the object in an image from the features of a classifier, without a "
        "label. It learns to hide what the classifier needs. A pool of past classifiers (--reproduce l100 or l1000) "
        "makes the masks classifier-agnostic. Writes NAME.chk, the checkpoint that score, eval, plot and train.py "
        "--saliency casm read.",
    )
    add_train_options(parser)
    add_single_device_options(parser)
    return parser


@releasing_claims
def main(argv: list[str] | None = None) -> dict:
    """Train a decoder. Return the last row of the history."""
    parser = build_parser()
    typed = parser.read(argv)

    import torch

    from engine import runtime, training
    from engine.config.select import select_kwargs
    from engine.data import load_data
    from engine.data.image_set import describe_unreadable
    from models import build_model
    from saliency.casm import setup
    from saliency.casm.network import CasmNetwork, build_decoder
    from saliency.casm.run_files import CASM_RUN, check_writable, load_saved_pool
    from saliency.casm.training import (
        StepConfig,
        build_casm_state,
        count_iterations,
        evaluate,
        set_learning_rates,
        train_one_epoch,
    )

    setup.check_typed_options(parser, typed)
    start = training.start_run(parser, typed, {**parser.defaults, **typed}, [], CASM_RUN)
    if start.saved:
        load_saved_pool(start)
    else:
        start.options = setup.resolve_options(parser, typed, {})
    start.options["name"] = start.folder.stem
    options, device, precision = start.options, start.device, start.precision
    check_writable([start.folder.parent, Path(options["log_path"] or start.folder.parent)])

    # ---- Data ----
    data = load_data(progress=runtime.progress_bar, **select_kwargs(options, load_data))
    training.check_same_data(start, data.classes, len(data.train))
    setup.fill_from_data(options, data)
    loading = select_kwargs(options, ["batch_size", "crop_padding", "seed", "workers"])
    train_loader, test_loader, subset_loader = setup.build_loaders(data, device, **loading)
    iterations = count_iterations(len(train_loader), options["pot"])

    # ---- Classifier and decoder ----
    notes = [*start.notes, *data.warnings]
    if start.saved:
        classifier = build_model(
            options["model"], len(data.classes), data.image_size, model_args=options.get("model_args")
        )
    else:
        options["model"], classifier, classifier_notes = setup.choose_classifier(
            parser, data, **select_kwargs(options, ["classifier", "arch", "model_args"])
        )
        notes = [*classifier_notes, *notes]
    network = CasmNetwork(classifier, build_decoder(classifier, **select_kwargs(options, ["width", "upsample"])))
    network.to(device, memory_format=torch.channels_last)

    if iterations == len(train_loader):
        notes += training.check_small_batches(
            network, [(train_loader, data.image_size)], skips_single=True, remedy="choose another --batch_size"
        )

    # ---- Optimizers and pool of past classifiers ----
    pool = setup.build_pool(classifier, **select_kwargs(options, setup.build_pool))
    state = build_casm_state(network, pool, precision=precision, **select_kwargs(options, build_casm_state))
    config = StepConfig(precision=precision, **select_kwargs(options, ["hp", "lambda_r", "adversarial"]))
    steps = training.StepSchedule([(options["epochs"], iterations)])
    extra = {"images": len(data.train)}
    run = training.Run(start, state, data, steps, epochs=options["epochs"], extra=extra)
    lines = setup.describe_run(data, state, iterations, **select_kwargs(options, setup.describe_run))
    run.log_header(lines, notes)
    if not start.saved:
        with run.save_on_interrupt():
            accuracy = evaluate(network, subset_loader, config)["accuracy"]
        subset_loader.close()
        run.log.say("\n".join(setup.list_accuracy_notes(accuracy, len(data.classes))))

    # ---- Epochs ----
    for epoch in run.epochs:
        with run.save_on_interrupt():
            set_learning_rates(state, epoch, **select_kwargs(options, ["lr", "lr_casme", "lrde"]))
            with run.monitor(epoch) as monitor:
                row = train_one_epoch(state, train_loader, config, epoch=epoch, iterations=iterations, monitor=monitor)
            with runtime.Progress("evaluating", len(test_loader), bar=run.bar, lines=False) as progress:
                held_out = evaluate(network, test_loader, config, step=run.step, progress=progress)
            run.end_epoch(row | {f"val_{key}": value for key, value in held_out.items() if key != "images"})
            for loader in (train_loader, test_loader):
                if count := loader.count_unreadable():
                    run.log.say(f"note: {describe_unreadable(count, loader.image_set)}")
            for note in setup.list_mask_notes(run.history[-1], options["lambda_r"]):
                run.log.say(note)
    run.guard.restore()
    run.log.say(f"example masks: {run.log.draw_masks(network, data)}")
    train_loader.close()
    test_loader.close()
    return run.history[-1]
