"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

from functools import partial

import mixing
import models
import saliency
from engine import data, runtime, training
from engine.config.mixing_options import add_mixing_options
from engine.config.options import SMALL_DATASETS, add_data_options, add_device_options
from engine.config.parser import Parser, read_config
from engine.config.recipes import RECIPES
from engine.config.resolve import read_options
from engine.config.select import select_kwargs
from engine.config.training_options import add_training_options
from engine.config.unused_options import collect_mixing_notes, collect_run_notes
from engine.launch import run_main
from engine.runtime.claim import releasing_claims


def build_parser() -> Parser:
    parser = Parser(
        "Train an image classifier with a mixing method on small images: CIFAR, Tiny-ImageNet, or your own folders. "
        "Without options it trains a small network on drawn shapes, as a demonstration. For photos at 224 pixels use "
        "imagenet_train.py."
    )
    add_training_options(parser, methods=mixing, models=models, recipes=["auto", *RECIPES])
    add_data_options(parser, SMALL_DATASETS)
    add_mixing_options(parser, sources=saliency)
    add_device_options(parser)
    return parser


@releasing_claims
def main(argv: list[str] | None = None) -> dict | None:
    """Train a classifier and return the content of result.json, or of seeds.json with --seeds.

    argv: the command line by default.
    """
    # ---- Options ----
    parser = build_parser()
    typed, notes = read_options(parser, argv)
    config = read_config(typed["config"]) if "config" in typed else {}
    options = training.resolve_pretrained(parser, typed, config, models)
    if options["list_models"]:
        return print(models.list_models(models.MODELS))
    if options["evaluate"]:
        return training.evaluate_checkpoint(parser, typed, models)
    train = partial(train_run, parser)
    result = (partial(training.train_seeds, train) if options["seeds"] else train)(typed, options, notes)
    runtime.shut_down_processes()
    return result


def train_run(parser: Parser, typed: dict, options: dict, notes: list[str]) -> dict | None:
    """Train one run and return the content of result.json, in the main process."""
    start = training.start_run(parser, typed, options, notes, training.CLASSIFIER)
    options, device, notes, precision = start.options, start.device, start.notes, start.precision

    # ---- Data ----
    sets = data.load_data(progress=runtime.progress_bar, **select_kwargs(options, data.load_data))
    data.check_same_images(sets)
    training.check_same_data(start, sets.classes, len(sets.train))
    data.check_batch_size(options["batch_size"], options["accumulate"], len(sets.train), options["drop_last"])
    common = {"device": device, "mean": sets.mean, "std": sets.std}
    common |= select_kwargs(options, ["workers", "channels_last"])
    train = data.DeviceLoader(
        sets.train,
        shuffle=True,
        augmentation=data.build_augmentation(sets.image_size, **select_kwargs(options, data.build_augmentation)),
        shard=data.get_process_shard(options["accumulate"]),
        **select_kwargs(options, ["batch_size", "drop_last", "seed"]),
        **common,
    )
    held_out = {
        name: data.DeviceLoader(part, 500, shard=data.get_process_shard(), **common)
        for name, part in sets.held_out.items()
    }

    # ---- Network ----
    with parser.usage_errors("--model"):
        model = models.build_model(
            options["model"], len(sets.classes), sets.image_size, options["dropout"], options["model_args"]
        )
    if options["pretrained"] and not start.saved:
        notes.append(training.load_pretrained_weights(model, options, len(sets.classes), models))
    if options["init_from"] and not start.saved:
        notes.append(training.load_initial_weights(model, options["init_from"], sets.classes, models, options["model"]))
    model = training.place_network(model, device, **select_kwargs(options, training.place_network))
    with parser.usage_errors():
        notes += training.freeze_layers(model, options["freeze"])
    notes += training.check_small_batches(model, [(train, sets.image_size)], sync_bn=options["sync_bn"])

    # ---- Loss, optimizer, schedule ----
    loss_fn, num_classes = training.build_loss(**select_kwargs(options, training.build_loss)), len(sets.classes)
    config = training.StepConfig(
        loss_fn, num_classes, precision, **select_kwargs(options, ["label_smoothing", "clip_grad", "clean_weight"])
    )
    steps = training.StepSchedule([(options["epochs"], len(train))])
    with parser.usage_errors():
        optimizer = training.build_optimizer(model, **select_kwargs(options, training.build_optimizer))
        scheduler = training.build_scheduler(optimizer, steps, **select_kwargs(options, training.build_scheduler))
    state = training.build_training_state(
        model,
        optimizer,
        scheduler,
        precision,
        total_steps=steps.first_step(options["epochs"]),
        **select_kwargs(options, ["ema", "ema_ramp", "graph_step", "kernels"]),
    )
    notes += [state.compile_model()] if options["compile"] else []

    # ---- Mixing ----
    with parser.usage_errors():
        hyper_parameters = select_kwargs(options, mixing.compose_options(options["method"]))
        values = mixing.collect_hyper_parameters(options["method"], **hyper_parameters)
        mixer = mixing.compose_mixer(options["method"], mean=sets.mean, std=sets.std, **hyper_parameters)
        mixer.check_size(sets.image_size, sets.image_size)
        sources = training.SourceBuilder(
            saliency.build_source,
            state,
            sets,
            config,
            **select_kwargs(options, ["loss", "saliency", *saliency.list_source_options()]),
        )
        state.set_mixer(mixer, sources)
        runtime.check_sync_bn(state.sources, values, **select_kwargs(options, runtime.check_sync_bn))
        notes += mixing.note_torch_solvers(options["method"], options["kernels"], device)
    notes += collect_mixing_notes(options, typed, parser, methods=mixing, saliency=saliency, sources=state.sources)
    notes += state.list_step_notes()
    earlier, taken = start.saved["config"] if start.saved else {}, set(optimizer.param_groups[0])
    notes += collect_run_notes(options, typed, earlier, steps.first_step(1), taken)

    if options["profile"]:
        return training.print_profile(state, train, config, options["profile"])
    extra, split = {"images": len(sets.train)}, "valid" if sets.valid else "test"
    run = training.Run(start, state, sets, steps, epochs=options["epochs"], split=split, extra=extra)
    lines, more_notes = training.describe_run(
        sets, (), [values], train.augmentation, **select_kwargs(options, training.describe_run)
    )
    run.log_header(lines, [*notes, *more_notes], hyper_parameters=values)

    # ---- Epochs ----
    for epoch in run.epochs:
        with run.save_on_interrupt():
            with run.monitor(epoch) as monitor:
                row = training.train_one_epoch(state, train, config, epoch=epoch, monitor=monitor)
            if run.should_evaluate(epoch):
                row |= training.evaluate_held_out(state, held_out, run.bar)
            run.end_epoch(row, remark=training.format_remark(state, train))
            training.draw_epoch(run, sets, train)
    return training.finish_run(run, held_out["test"])


if __name__ == "__main__":
    run_main(main)
