"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

import mixing
import models
import saliency
from engine import runtime, training
from engine.config.mixing_options import OPTION_GROUPS, add_mixing_options
from engine.config.options import SMALL_DATASETS, add_data_options, add_device_options, add_training_options
from engine.config.parser import Parser, read_config
from engine.config.recipes import RECIPES
from engine.config.resolve import read_options, resolve_options
from engine.config.select import select_kwargs
from engine.config.unused_options import mixing_notes
from engine.launch import run_main
from mixing import compose_options, hyper_parameters
from models import MODELS, build_model, matching_models, parameter_counts
from saliency import build_source, source_parameters


def build_parser() -> Parser:
    parser = Parser("Train a classifier on small images with a mixing method. With no option at all: a demonstration.")
    add_training_options(parser, methods=mixing, models=models, recipes=["auto", *RECIPES])
    add_data_options(parser, SMALL_DATASETS)
    add_mixing_options(parser, sources=saliency)
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    typed, notes = read_options(parser, argv)
    options = resolve_options(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        counts = parameter_counts(MODELS)
        return print("\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items()))

    import models  # and torch: after the options, so that --help answers at once
    from engine.data import Augmentation, DeviceLoader, check_batch_size, check_same_images, load_data, process_shard
    from mixing import compose_mixer

    if options["evaluate"]:
        return training.evaluate_checkpoint(parser, typed, models)
    start = training.start_run(parser, typed, options, notes, training.CLASSIFIER)
    options, device, notes, precision = start.options, start.device, start.notes, start.precision

    # ---- Data ----
    data = load_data(progress=runtime.progress_bar, **select_kwargs(options, load_data))
    check_same_images(data)
    check_batch_size(options["batch_size"], options["accumulate"], len(data.train), options["drop_last"])
    common = {"device": device, "mean": data.mean, "std": data.std}
    common |= select_kwargs(options, ["workers", "channels_last"])
    train = DeviceLoader(
        data.train,
        shuffle=True,
        augmentation=Augmentation(options["crop_padding"]) if options["trad_augment"] else None,
        shard=process_shard(options["accumulate"]),
        **select_kwargs(options, ["batch_size", "drop_last", "seed"]),
        **common,
    )
    held_out = {name: DeviceLoader(part, 500, shard=process_shard(), **common) for name, part in data.held_out.items()}

    # ---- Network ----
    with parser.usage_errors("--model"):
        model = build_model(options["model"], len(data.classes), data.image_size, options["dropout"])
    if options["init_from"] and not start.saved:
        notes.append(training.init_from(model, options["init_from"], len(data.classes), matching_models))
    model = training.place_network(model, device, **select_kwargs(options, training.place_network))

    # ---- Loss, optimizer, schedule ----
    loss_fn = training.LOSSES[options["loss"]]
    config = training.StepConfig(
        loss_fn, len(data.classes), precision, options["label_smoothing"], options["clip_grad"]
    )
    steps = training.StepSchedule([(options["epochs"], len(train))])
    with parser.usage_errors():
        optimizer = training.build_optimizer(model, **select_kwargs(options, training.build_optimizer))
        scheduler = training.build_scheduler(optimizer, steps, **select_kwargs(options, training.build_scheduler))
    state = training.build_training_state(
        model, optimizer, scheduler, precision, **select_kwargs(options, ["ema", "compile"])
    )

    # ---- Mixing ----
    with parser.usage_errors():
        given = select_kwargs(options, compose_options(options["method"]))
        mixer = compose_mixer(options["method"], mean=data.mean, std=data.std, **given)
        mixer.check_size(data.image_size, data.image_size)
        sources = training.SourceBuilder(
            build_source, state, data, precision, **select_kwargs(options, training.SourceBuilder)
        )
        state.mix_with(mixer, sources)
        runtime.check_sync_bn(options, state.sources)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, state.sources))
    notes += mixing_notes(options, typed, parser, OPTION_GROUPS, read, state.sources)

    if options["profile"]:
        return training.print_profile(state, train, config, options["profile"])
    run = training.Run(start, state, data, steps, epochs=options["epochs"], split="valid" if data.valid else "test")
    lines, more = training.describe_run(data, **select_kwargs(options, training.describe_run))
    run.log_header(lines, [*notes, *more])

    # ---- Epochs ----
    for epoch in run.epochs:
        with run.save_on_interrupt():
            with run.monitor(epoch) as monitor:
                row = training.train_one_epoch(state, train, config, epoch=epoch, monitor=monitor)
            if run.is_evaluated(epoch):
                row |= training.evaluate_held_out(state, held_out, run.bar)
            run.end_epoch(row, remark=training.count_skipped(train))
            training.draw_epoch(run, data, train.part)
    result = training.finish_run(run, held_out["test"])
    runtime.shut_down_processes()
    return result


if __name__ == "__main__":
    run_main(main)
