"""Train a classifier on small images with a mixing method: python train.py --method saliencymix --dataset cifar10"""

from engine import configure
from engine.cli import Parser, read_config
from engine.cli import run as run_script
from engine.mixing_options import GROUPS, mixing_options
from engine.options import SMALL_DATASETS, data_options, device_options, training_options
from engine.recipes import RECIPES
from mixing import ALIASES as METHOD_ALIASES
from mixing import MIXERS, compose, hyper_parameters
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, matching_models, parameter_counts
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source, source_parameters


def build_parser() -> Parser:
    parser = Parser("Train a classifier on small images with a mixing method. With no option at all: a demonstration.")
    training_options(
        parser,
        models=MODELS,
        model_aliases=MODEL_ALIASES,
        methods=MIXERS,
        method_aliases=METHOD_ALIASES,
        recipes=["auto", *RECIPES],
        recipe="auto",
    )
    data_options(parser, SMALL_DATASETS)
    mixing_options(parser, sources=SOURCES, source_aliases=SOURCE_ALIASES)
    device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    typed, notes = configure.read(parser, argv)
    options = configure.settle(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        counts = parameter_counts(MODELS)
        return print("\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items()))

    import torch  # after the options, so that --help answers at once

    from engine import distributed
    from engine.batches import Batches
    from engine.classifier import evaluate_checkpoint, start_from
    from engine.data import check_alike, load_data
    from engine.device import choose_device, choose_precision, prepare
    from engine.loop import each_source
    from engine.phases import Calendar
    from engine.progress import over
    from engine.run import Run, take_up
    from engine.training import build_parts, check_batch, feed_options, pick, source_maker

    if options["evaluate"]:
        return evaluate_checkpoint(parser, typed, build_model, matching_models)
    device = choose_device(options["device"])
    distributed.start(device, options["timeout"])
    options, saved, folder = take_up(parser, typed, options)
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)

    data = load_data(progress=over, **pick(options, load_data))
    check_alike(data)
    check_batch(**pick(options, ["batch_size", "accumulate", "drop_last"]), images=len(data.train))
    feed = feed_options(options, data, device)
    augment = {"augment": options["trad_augment"], "padding": options["crop_padding"], "pieces": options["accumulate"]}
    train = Batches(data.train, shuffle=True, **pick(options, ["batch_size", "drop_last", "seed"]), **augment, **feed)
    held_out = {name: Batches(part, 500, **feed) for name, part in (("test", data.test), ("valid", data.valid)) if part}

    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    try:
        model = build_model(options["model"], len(data.classes), data.image_size, options["dropout"])
    except ValueError as error:
        parser.error(f"--model: {error}")
    model = distributed.synchronised(model, options["sync_bn"]).to(device, memory_format=layout)
    if options["init_from"] and not saved:
        notes.append(start_from(model, options["init_from"], len(data.classes), matching_models))

    calendar = Calendar([(options["epochs"], len(train))])
    try:
        mixer = compose(options["method"], options | {"mean": data.mean, "std": data.std})
        mixer.check_size(data.image_size, data.image_size)
        parts = build_parts(model, mixer, options, calendar=calendar, precision=precision)
        source = mixer.build_source(source_maker(build_source, parts, data, options, precision, banks={}))
        parts.sources = each_source(source)
        distributed.check_sync_bn(options, parts.sources)
    except ValueError as error:
        parser.error(str(error))

    run = Run(folder, parts, options, data, calendar=calendar, precision=precision, saved=saved)
    if options["profile"]:
        return run.profile(train, source)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, parts.sources))
    notes += configure.notes_on_mixing(options, typed, parser, GROUPS, read, parts.sources)
    run.begin(notes, where=f"{device}, {precision_text}")
    for epoch in run.epochs:
        with run.ending_well():
            row = run.train(epoch, train, source)
            row |= run.evaluate(held_out)
            run.keep(row, source, train)
    result = run.finish(held_out["test"])
    distributed.finish()
    return result


if __name__ == "__main__":
    run_script(main)
