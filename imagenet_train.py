"""Train a classifier on ImageNet or other large images, on one GPU or, with torchrun, on several."""

from functools import partial

import mixing
import models
import saliency
from engine import data, runtime, training
from engine.config.mixing_options import add_mixing_options
from engine.config.options import LARGE_DATASETS, add_data_options, add_device_options, add_imagenet_options
from engine.config.parser import Parser, read_config
from engine.config.phases import build_phases, default_eval_resize, find_phase
from engine.config.recipes import IMAGENET_RECIPES
from engine.config.resolve import get_phase_options, read_options, use_copies_as_data_dir
from engine.config.select import select_kwargs
from engine.config.training_options import add_training_options
from engine.config.unused_options import collect_mixing_notes, collect_run_notes
from engine.launch import run_main
from engine.runtime.claim import releasing_claims

IMAGE_SIZE = 224  # default side of the images in pixels


def build_parser() -> Parser:
    parser = Parser(
        "Train an image classifier with a mixing method on ImageNet, Tiny-ImageNet or your own photos, at 224 pixels "
        "and with ResNets whose weights are compatible with torchvision."
    )
    add_training_options(parser, methods=mixing, models=models, recipes=["auto", *IMAGENET_RECIPES], large_images=True)
    add_imagenet_options(parser)
    add_data_options(parser, LARGE_DATASETS, image_size=IMAGE_SIZE, norm="imagenet")
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
    typed = use_copies_as_data_dir(typed)
    if "resize_to" in typed:
        return data.resize_data_set(parser, typed)
    config = read_config(typed["config"]) if "config" in typed else {}
    options = training.resolve_pretrained(parser, typed, config, models)
    if options["list_models"]:
        return print(models.list_models(models.IMAGENET_MODELS, num_classes=1000))
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

    # ---- Data: each phase has its own copies of the images, crops and batch size ----
    phases = build_phases(options)
    sets = data.load_data(progress=runtime.progress_bar, **select_kwargs(options, data.load_data))
    copies = data.find_copies(sets, {name: options[f"data_{name}"] for name in ("small", "large")})
    for name in {phase.images for phase in phases} - {"original"}:
        if not options[f"data_{name}"]:
            notes.append(f"--data_{name} is not given: this run reads the original images, which is slower")
    data.check_same_images(sets)
    training.check_same_data(start, sets.classes, len(sets.train))
    common = {"device": device, "mean": sets.mean, "std": sets.std}
    common |= select_kwargs(options, ["workers", "channels_last"])
    loaders, changes = [], select_kwargs(options, data.build_augmentation)
    for phase in phases:
        data.check_batch_size(phase.batch_size, options["accumulate"], len(sets.train), options["drop_last"])
        view = data.CenterCrop(phase.crop, default_eval_resize(phase.crop), options["interpolation"])
        loader = data.DeviceLoader(
            copies[phase.images].with_view(view),
            phase.batch_size,
            shuffle=True,
            augmentation=data.build_augmentation(phase.crop, **changes | {"min_scale": phase.min_scale}),
            shard=data.get_process_shard(options["accumulate"]),
            **select_kwargs(options, ["drop_last", "seed"]),
            **common,
        )
        loaders.append(loader)
    held_out = {
        name: data.DeviceLoader(part, 256, shard=data.get_process_shard(), **common)
        for name, part in sets.held_out.items()
    }

    # ---- Network: random weights, those of torchvision (--pretrained), or those of a file (--init_from) ----
    with parser.usage_errors("--model"):
        model = models.build_model(
            options["model"], len(sets.classes), sets.image_size, model_args=options["model_args"]
        )
    with parser.usage_errors():
        if options["zero_init"]:
            models.zero_init(model)
    if options["pretrained"] and not start.saved:
        notes.append(training.load_pretrained_weights(model, options, len(sets.classes), models))
    if options["init_from"] and not start.saved:
        notes.append(training.load_initial_weights(model, options["init_from"], sets.classes, models, options["model"]))
    model = training.place_network(model, device, **select_kwargs(options, training.place_network))
    with parser.usage_errors():
        notes += training.freeze_layers(model, options["freeze"])
    crops = [phase.crop for phase in phases]
    notes += training.check_small_batches(model, list(zip(loaders, crops, strict=True)), sync_bn=options["sync_bn"])

    # ---- Loss, optimizer, schedule ----
    loss_fn, num_classes = training.build_loss(**select_kwargs(options, training.build_loss)), len(sets.classes)
    config = training.StepConfig(
        loss_fn, num_classes, precision, **select_kwargs(options, ["label_smoothing", "clip_grad", "clean_weight"])
    )
    steps = training.StepSchedule([(phase.end, len(loader)) for phase, loader in zip(phases, loaders, strict=True)])
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

    # ---- Mixing: a recipe may set other hyper-parameters in each phase ----
    sources = training.SourceBuilder(
        saliency.build_source,
        state,
        sets,
        config,
        **select_kwargs(options, ["loss", "saliency", *saliency.list_source_options()]),
    )
    with parser.usage_errors():
        mixers, values = [], []
        for number, phase in enumerate(phases):
            names = mixing.compose_options(options["method"])
            hyper_parameters = select_kwargs(get_phase_options(options, number), names)
            mixers.append(mixing.compose_mixer(options["method"], mean=sets.mean, std=sets.std, **hyper_parameters))
            values.append(mixing.collect_hyper_parameters(options["method"], **hyper_parameters))
            mixers[number].check_size(phase.crop, phase.crop)
        current = find_phase(phases, start.saved_epoch)
        state.set_mixer(mixers[current], sources)
        runtime.check_sync_bn(state.sources, values[current], **select_kwargs(options, runtime.check_sync_bn))
        notes += mixing.note_torch_solvers(options["method"], options["kernels"], device)
    notes += collect_mixing_notes(options, typed, parser, methods=mixing, saliency=saliency, sources=state.sources)
    notes += state.list_step_notes()
    earlier, taken = start.saved["config"] if start.saved else {}, set(optimizer.param_groups[0])
    notes += collect_run_notes(options, typed, earlier, steps.first_step(1), taken)

    if options["profile"]:
        return training.print_profile(state, loaders[current], config, options["profile"])
    extra, split = {"images": len(sets.train)}, "valid" if sets.valid else "test"
    run = training.Run(start, state, sets, steps, epochs=options["epochs"], split=split, extra=extra)
    lines, more_notes = training.describe_run(
        sets, phases, values, loaders[0].augmentation, **select_kwargs(options, training.describe_run)
    )
    run.log_header(lines, [*notes, *more_notes], hyper_parameters=values[0] if len(phases) == 1 else values)

    # ---- Epochs ----
    for epoch in run.epochs:
        if (phase := find_phase(phases, epoch)) != current:
            loaders[current].close()
            if phases[phase].batch_size == phases[current].batch_size:
                mixers[phase].load_state_dict(mixers[current].state_dict())
            state.set_mixer(mixers[phase], sources)
            current = phase
        phase_file = [f"phase_{current + 1}.pt"] if epoch + 1 == phases[current].end and len(phases) > 1 else []
        train = loaders[current]
        with run.save_on_interrupt():
            with run.monitor(epoch) as monitor:
                row = training.train_one_epoch(state, train, config, epoch=epoch, monitor=monitor)
            if run.should_evaluate(epoch):
                row |= training.evaluate_held_out(state, held_out, run.bar)
            run.end_epoch(row, also=phase_file, remark=training.format_remark(state, train))
            training.draw_epoch(run, sets, train)
    return training.finish_run(run, held_out["test"])


if __name__ == "__main__":
    run_main(main)
