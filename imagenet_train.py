"""Train a classifier on ImageNet or another set of large images, on one GPU or, under torchrun, on many."""

from pathlib import Path

import mixing
import models
import saliency
from engine import runtime, training
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
from engine.config.resolve import phase_options, read_options, resolve_options, use_copies_as_data_dir
from engine.config.select import select_kwargs
from engine.config.unused_options import image_notes, mixing_notes
from engine.launch import run_main
from mixing import compose_options, hyper_parameters
from models import IMAGENET_MODELS, build_model, matching_models, parameter_counts
from saliency import build_source, source_parameters

SIDE = 224  # of the images in pixels, unless --image_size says otherwise


def build_parser() -> Parser:
    parser = Parser("Train a classifier on ImageNet, Tiny-ImageNet at 224 pixels, or any folders of large images.")
    add_training_options(parser, methods=mixing, models=models, recipes=list(IMAGENET_RECIPES), large_images=True)
    add_imagenet_options(parser)
    add_data_options(parser, LARGE_DATASETS, image_size=SIDE, norm="imagenet")
    add_mixing_options(parser, sources=saliency)
    add_device_options(parser)
    return parser


def main(argv: list[str] | None = None) -> dict | None:
    """Train; returns what result.json holds."""
    parser = build_parser()
    typed, notes = read_options(parser, argv)
    typed = use_copies_as_data_dir(typed)
    if "resize_to" in typed:
        return resize(typed, parser)
    options = resolve_options(parser, typed, read_config(typed["config"]) if "config" in typed else {})
    if options["list_models"]:
        counts = parameter_counts(IMAGENET_MODELS, num_classes=1000)
        return print("\n".join(f"{name:20} {count:>12,} parameters" for name, count in counts.items()))

    import models  # and torch: after the options, so that --help answers at once
    from engine.data import (
        Augmentation,
        CenterCrop,
        DeviceLoader,
        RandomCrop,
        check_batch_size,
        check_same_images,
        find_copies,
        load_data,
        process_shard,
    )
    from mixing import compose_mixer
    from models.imagenet_resnet import load_pretrained, zero_init

    if options["evaluate"]:
        return training.evaluate_checkpoint(parser, typed, models)
    start = training.start_run(parser, typed, options, notes, training.CLASSIFIER)
    options, device, notes, precision = start.options, start.device, start.notes, start.precision

    # ---- Data: in each phase other copies of the images, crops and batches ----
    phases = build_phases(options)
    data = load_data(progress=runtime.progress_bar, **select_kwargs(options, load_data))
    copies = find_copies(data, {name: options[f"data_{name}"] for name in ("small", "large")})
    for name in {phase.images for phase in phases} - {"original"}:
        if not options[f"data_{name}"]:
            notes.append(f"--data_{name}: not given, so the original images are read, which is slower")
    check_same_images(data)
    common = {"device": device, "mean": data.mean, "std": data.std}
    common |= select_kwargs(options, ["workers", "channels_last"])
    colors = select_kwargs(options, ["color_jitter", "lighting"])
    loaders = []
    for phase in phases:
        check_batch_size(phase.batch_size, options["accumulate"], len(data.train), options["drop_last"])
        augmentation = Augmentation(view=RandomCrop(phase.crop, phase.min_scale), **colors)
        loader = DeviceLoader(
            copies[phase.images].with_view(CenterCrop(phase.crop, default_eval_resize(phase.crop))),
            phase.batch_size,
            shuffle=True,
            augmentation=augmentation if options["trad_augment"] else None,
            shard=process_shard(options["accumulate"]),
            **select_kwargs(options, ["drop_last", "seed"]),
            **common,
        )
        loaders.append(loader)
    held_out = {name: DeviceLoader(part, 256, shard=process_shard(), **common) for name, part in data.held_out.items()}

    # ---- Network: random weights, or torchvision's (--pretrained), or those of a file (--training.init_from) ----
    model = build_model(options["model"], len(data.classes), data.image_size)
    with parser.usage_errors():
        if options["zero_init"]:
            zero_init(model)
        if options["pretrained"] and not start.saved:
            fresh = runtime.main_process_first(lambda: load_pretrained(model, options["model"]))
            notes.append("--pretrained: torchvision's weights" + (", but for a new last layer" if fresh else ""))
    if options["init_from"] and not start.saved:
        notes.append(training.init_from(model, options["init_from"], len(data.classes), matching_models))
    model = training.place_network(model, device, **select_kwargs(options, training.place_network))

    # ---- Loss, optimizer, schedule ----
    loss_fn = training.LOSSES[options["loss"]]
    config = training.StepConfig(
        loss_fn, len(data.classes), precision, options["label_smoothing"], options["clip_grad"]
    )
    steps = training.StepSchedule([(phase.end, len(loader)) for phase, loader in zip(phases, loaders, strict=True)])
    with parser.usage_errors():
        optimizer = training.build_optimizer(model, **select_kwargs(options, training.build_optimizer))
        scheduler = training.build_scheduler(optimizer, steps, **select_kwargs(options, training.build_scheduler))
    state = training.build_training_state(
        model, optimizer, scheduler, precision, **select_kwargs(options, ["ema", "compile"])
    )

    # ---- Mixing: a method may have hyper-parameters of its own in each phase ----
    sources = training.SourceBuilder(
        build_source, state, data, precision, **select_kwargs(options, training.SourceBuilder)
    )
    with parser.usage_errors():
        mixers = []
        for number, phase in enumerate(phases):
            given = select_kwargs(phase_options(options, number), compose_options(options["method"]))
            mixers.append(compose_mixer(options["method"], mean=data.mean, std=data.std, **given))
            mixers[number].check_size(phase.crop, phase.crop)
        here = find_phase(phases, start.saved_epoch)
        state.mix_with(mixers[here], sources)
        runtime.check_sync_bn(options, state.sources)
    read = set().union(*map(hyper_parameters, options["method"]), *map(source_parameters, state.sources))
    notes += mixing_notes(options, typed, parser, OPTION_GROUPS, read, state.sources)
    notes += image_notes(options, typed)

    if options["profile"]:
        return training.print_profile(state, loaders[here], config, options["profile"])
    run = training.Run(start, state, data, steps, epochs=options["epochs"], split="valid" if data.valid else "test")
    lines, more = training.describe_run(data, phases, **select_kwargs(options, training.describe_run))
    run.log_header(lines, [*notes, *more])

    # ---- Epochs ----
    for epoch in run.epochs:
        if (phase := find_phase(phases, epoch)) != here:
            loaders[here].close()
            if phases[phase].batch_size == phases[here].batch_size:
                mixers[phase].load_state_dict(mixers[here].state_dict())
            state.mix_with(mixers[phase], sources)
            here = phase
        ends = [f"phase_{here + 1}.pt"] if epoch + 1 == phases[here].end and len(phases) > 1 else []
        train = loaders[here]
        with run.save_on_interrupt():
            with run.monitor(epoch) as monitor:
                row = training.train_one_epoch(state, train, config, epoch=epoch, monitor=monitor)
            if run.is_evaluated(epoch):
                row |= training.evaluate_held_out(state, held_out, run.bar)
            run.end_epoch(row, also=ends, remark=training.count_skipped(train))
            training.draw_epoch(run, data, train.part)
    result = training.finish_run(run, held_out["test"])
    runtime.shut_down_processes()
    return result


def resize(typed: dict, parser: Parser) -> None:
    """--resize_to: smaller copies of the images, which are quicker to read."""
    from engine.data.resize_copies import resize_copies

    if "resize_dest" not in typed:
        parser.error("--resize_to needs --resize_dest DIR: where shall the copies go?")
    source, destination = Path({**parser.defaults, **typed}["data_dir"]), Path(typed["resize_dest"])
    report = resize_copies(
        source, typed["resize_to"], destination, workers=typed.get("workers"), progress=runtime.progress_bar
    )
    print("\n".join(report.lines()))


if __name__ == "__main__":
    run_main(main)
