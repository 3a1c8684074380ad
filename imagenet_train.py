"""Train a classifier on ImageNet or another set of large images, on one GPU or, under torchrun, on many."""

from pathlib import Path

from engine.config import resolve, unused_options
from engine.config.mixing_options import OPTION_GROUPS, add_mixing_options
from engine.config.options import (
    LARGE_DATASETS,
    add_data_options,
    add_device_options,
    add_imagenet_options,
    add_training_options,
)
from engine.config.parser import Parser, read_config
from engine.config.phases import build_phases, default_eval_resize, find_phase
from engine.config.recipes import IMAGENET_RECIPES
from engine.launch import run_main as run_script
from engine.training.step_calendar import StepSchedule
from mixing import ALIASES as METHOD_ALIASES
from mixing import MIXERS, compose_options, hyper_parameters
from models import ALIASES as MODEL_ALIASES
from models import IMAGENET_ALIASES, IMAGENET_MODELS, build_model, matching_models, parameter_counts
from saliency import ALIASES as SOURCE_ALIASES
from saliency import SOURCES, build_source, source_parameters

SIDE = 224  # of the images in pixels, unless --image_size says otherwise


def build_parser() -> Parser:
    parser = Parser("Train a classifier on ImageNet, Tiny-ImageNet at 224 pixels, or any folders of large images.")
    add_training_options(
        parser,
        models=IMAGENET_MODELS,
        model_aliases=MODEL_ALIASES | IMAGENET_ALIASES,
        methods=MIXERS,
        method_aliases=METHOD_ALIASES,
        recipes=list(IMAGENET_RECIPES),
        recipe="cutmix300",
    )
    add_imagenet_options(parser)
    add_data_options(parser, LARGE_DATASETS, image_size=SIDE, norm="imagenet")
    add_mixing_options(parser, sources=SOURCES, source_aliases=SOURCE_ALIASES)
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    typed, notes = resolve.read_options(parser, argv)
    typed = resolve.use_copies_as_data_dir(typed)
    if "resize_to" in typed:
        return resize(typed, parser)
    options = resolve.resolve_options(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        counts = parameter_counts(IMAGENET_MODELS, num_classes=1000)
        return print("\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items()))

    import torch  # after the options, so that --help answers at once

    from engine.config.select import select_kwargs
    from engine.data.augment import Augmentation
    from engine.data.datasets import load_data
    from engine.data.image_set import check_same_images
    from engine.data.loader import DeviceLoader, process_shard
    from engine.data.resize_copies import find_copies
    from engine.data.views import CenterCrop, RandomCrop
    from engine.runtime import distributed
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.progress import progress_bar
    from engine.training.console import announce_phases
    from engine.training.evaluate import evaluate_checkpoint, init_from
    from engine.training.run import Run, resume_or_start
    from engine.training.state import build_training_state, check_batch_size, loader_options, make_source_builder
    from engine.training.stopwatch import flatten_sources
    from mixing import compose_mixer
    from models.imagenet_resnet import load_pretrained, zero_init

    if options["evaluate"]:
        return evaluate_checkpoint(parser, typed, build_model, matching_models)
    device = choose_device(options["device"])
    distributed.init_processes(device, options["timeout"])
    options, saved, folder = resume_or_start(parser, typed, options)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)

    phases = build_phases(options)
    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    copies = find_copies(data, {name: options[f"data_{name}"] for name in ("small", "large")})
    for name in {phase.images for phase in phases} - {"original"}:
        if not options[f"data_{name}"]:
            notes.append(f"--data_{name}: not given, so the original images are read, which is slower")
    check_same_images(data)
    feed = loader_options(options, data, device)
    feed_training = {"shard": process_shard(options["accumulate"]), **select_kwargs(options, ["drop_last", "seed"])}
    colours = select_kwargs(options, ["color_jitter", "lighting"])
    stages = []
    for phase in phases:
        check_batch_size(phase.batch_size, options["accumulate"], len(data.train), options["drop_last"])
        part = copies[phase.images].with_view(CenterCrop(phase.crop, default_eval_resize(phase.crop)))
        view = RandomCrop(phase.crop, phase.min_scale)
        augmentation = Augmentation(view=view, **colours) if options["trad_augment"] else None
        stages.append(
            DeviceLoader(part, phase.batch_size, shuffle=True, augmentation=augmentation, **feed_training, **feed)
        )
    held_out = {
        name: DeviceLoader(part, 256, shard=process_shard(), **feed)
        for name, part in (("test", data.test), ("valid", data.valid))
        if part
    }

    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    model = build_model(options["model"], len(data.classes), data.image_size)
    try:
        if options["zero_init"]:
            zero_init(model)
        if options["pretrained"] and not saved:
            fresh = distributed.main_process_first(lambda: load_pretrained(model, options["model"]))
            notes.append("--pretrained: torchvision's weights" + (", but for a new last layer" if fresh else ""))
    except ValueError as error:
        parser.error(str(error))
    if options["init_from"] and not saved:
        notes.append(init_from(model, options["init_from"], len(data.classes), matching_models))
    model = distributed.convert_sync_batchnorm(model, options["sync_bn"]).to(device, memory_format=layout)

    calendar = StepSchedule([(phase.end, len(batches)) for phase, batches in zip(phases, stages, strict=True)])
    banks = {}

    def mixing_of(number: int):
        """The mixer of a phase; a method may have hyper-parameters of its own in each."""
        told = select_kwargs(resolve.phase_options(options, number), compose_options(options["method"]))
        mixer = compose_mixer(options["method"], mean=data.mean, std=data.std, **told)
        mixer.check_size(phases[number].crop, phases[number].crop)
        return mixer

    def guide(mixer):
        source = mixer.build_source(make_source_builder(build_source, parts, data, options, precision, banks))
        parts.mixer, parts.sources = mixer, flatten_sources(source)
        distributed.check_sync_bn(options, parts.sources)
        return source

    try:
        mixers = [mixing_of(number) for number in range(len(phases))]
        here = find_phase(phases, len(saved["history"]) - (not saved["inside"]) if saved else 0)
        parts = build_training_state(model, mixers[here], options, calendar=calendar, precision=precision)
        source = guide(mixers[here])
    except ValueError as error:
        parser.error(str(error))

    run = Run(folder, parts, options, data, calendar=calendar, precision=precision, saved=saved)
    if options["profile"]:
        return run.profile(stages[here], source)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, parts.sources))
    notes += unused_options.mixing_notes(options, typed, parser, OPTION_GROUPS, read, parts.sources)
    notes += unused_options.image_notes(options, typed)
    run.begin(notes, where=f"{device}, {precision_text}")
    announce_phases(run.log, phases)
    for epoch in run.epochs:
        if (now := find_phase(phases, epoch)) != here:
            stages[here].close()
            if phases[now].batch_size == phases[here].batch_size:
                mixers[now].load_state_dict(mixers[here].state_dict())
            source, here = guide(mixers[now]), now
        ends = [f"phase_{here + 1}.pt"] if epoch + 1 == phases[here].end and len(phases) > 1 else []
        with run.ending_well():
            row = run.train(epoch, stages[here], source)
            row |= run.evaluate(held_out)
            run.keep(row, source, stages[here], also=ends)
    result = run.finish(held_out["test"])
    distributed.shut_down_processes()
    return result


def resize(typed: dict, parser: Parser) -> None:
    """--resize_to: smaller copies of the images, which are quicker to read."""
    from engine.data.resize_copies import resize_copies
    from engine.runtime.progress import progress_bar

    if "resize_dest" not in typed:
        parser.error("--resize_to needs --resize_dest DIR: where shall the copies go?")
    source, destination = Path({**parser.defaults, **typed}["data_dir"]), Path(typed["resize_dest"])
    report = resize_copies(source, typed["resize_to"], destination, workers=typed.get("workers"), progress=progress_bar)
    print("\n".join(report.lines()))


if __name__ == "__main__":
    run_script(main)
