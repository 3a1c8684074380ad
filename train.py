"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

from engine.config import resolve, unused_options
from engine.config.mixing_options import OPTION_GROUPS, add_mixing_options
from engine.config.options import SMALL_DATASETS, add_data_options, add_device_options, add_training_options
from engine.config.parser import Parser, read_config
from engine.config.recipes import RECIPES
from engine.launch import run_main as run_script
from mixing import ALIASES as METHOD_ALIASES
from mixing import MIXERS, compose_options, hyper_parameters
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, matching_models, parameter_counts
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source, source_parameters


def build_parser() -> Parser:
    parser = Parser("Train a classifier on small images with a mixing method. With no option at all: a demonstration.")
    add_training_options(
        parser,
        models=MODELS,
        model_aliases=MODEL_ALIASES,
        methods=MIXERS,
        method_aliases=METHOD_ALIASES,
        recipes=["auto", *RECIPES],
        recipe="auto",
    )
    add_data_options(parser, SMALL_DATASETS)
    add_mixing_options(parser, sources=SOURCES, source_aliases=SOURCE_ALIASES)
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    typed, notes = resolve.read_options(parser, argv)
    options = resolve.resolve_options(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        counts = parameter_counts(MODELS)
        return print("\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items()))

    import torch  # after the options, so that --help answers at once

    from engine.config.select import select_kwargs
    from engine.data.augment import Augmentation
    from engine.data.datasets import load_data
    from engine.data.image_set import check_same_images
    from engine.data.loader import DeviceLoader, process_shard
    from engine.runtime import distributed
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.progress import progress_bar
    from engine.training.evaluate import evaluate_checkpoint, init_from
    from engine.training.run import Run, resume_or_start
    from engine.training.state import build_training_state, check_batch_size, loader_options, make_source_builder
    from engine.training.step_calendar import StepSchedule
    from engine.training.stopwatch import flatten_sources
    from mixing import compose_mixer

    if options["evaluate"]:
        return evaluate_checkpoint(parser, typed, build_model, matching_models)
    device = choose_device(options["device"])
    distributed.init_processes(device, options["timeout"])
    options, saved, folder = resume_or_start(parser, typed, options)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)

    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    check_same_images(data)
    check_batch_size(**select_kwargs(options, ["batch_size", "accumulate", "drop_last"]), images=len(data.train))
    feed = loader_options(options, data, device)
    train = DeviceLoader(
        data.train,
        shuffle=True,
        augmentation=Augmentation(options["crop_padding"]) if options["trad_augment"] else None,
        shard=process_shard(options["accumulate"]),
        **select_kwargs(options, ["batch_size", "drop_last", "seed"]),
        **feed,
    )
    held_out = {
        name: DeviceLoader(part, 500, shard=process_shard(), **feed)
        for name, part in (("test", data.test), ("valid", data.valid))
        if part
    }

    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    try:
        model = build_model(options["model"], len(data.classes), data.image_size, options["dropout"])
    except ValueError as error:
        parser.error(f"--model: {error}")
    model = distributed.convert_sync_batchnorm(model, options["sync_bn"]).to(device, memory_format=layout)
    if options["init_from"] and not saved:
        notes.append(init_from(model, options["init_from"], len(data.classes), matching_models))

    calendar = StepSchedule([(options["epochs"], len(train))])
    try:
        told = select_kwargs(options, compose_options(options["method"]))
        mixer = compose_mixer(options["method"], mean=data.mean, std=data.std, **told)
        mixer.check_size(data.image_size, data.image_size)
        parts = build_training_state(model, mixer, options, calendar=calendar, precision=precision)
        source = mixer.build_source(make_source_builder(build_source, parts, data, options, precision, banks={}))
        parts.sources = flatten_sources(source)
        distributed.check_sync_bn(options, parts.sources)
    except ValueError as error:
        parser.error(str(error))

    run = Run(folder, parts, options, data, calendar=calendar, precision=precision, saved=saved)
    if options["profile"]:
        return run.profile(train, source)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, parts.sources))
    notes += unused_options.mixing_notes(options, typed, parser, OPTION_GROUPS, read, parts.sources)
    run.begin(notes, where=f"{device}, {precision_text}")
    for epoch in run.epochs:
        with run.ending_well():
            row = run.train(epoch, train, source)
            row |= run.evaluate(held_out)
            run.keep(row, source, train)
    result = run.finish(held_out["test"])
    distributed.shut_down_processes()
    return result


if __name__ == "__main__":
    run_script(main)
