"""Train Faster R-CNN on PASCAL VOC with a trained classifier as its backbone: detect.py --backbone-checkpoint FILE"""

import math
from pathlib import Path

import detection
from detection.options import build_parser
from detection.resolve import (
    KIND,
    PREDICTION_STARTS,
    check_start_options,
    describe_unused_options,
    resolve_options,
    scale_schedule,
)
from engine import data, runtime, training  # torch is imported when they are first used
from engine.config.parser import check_output_path, read_config
from engine.config.resolve import read_options
from engine.config.select import select_kwargs
from engine.launch import run_main
from engine.runtime.claim import releasing_claims


@releasing_claims
def main(argv: list[str] | None = None) -> dict | None:
    """Train or evaluate a detector, or apply it to pictures.

    Returns the content of results.json (of --predictions for pictures); None in the other processes.
    """
    # ---- Options ----
    parser = build_parser()
    typed, notes = read_options(parser, argv)
    options = resolve_options(parser, typed, read_config(typed["config"], KIND) if "config" in typed else {})

    if options["predictions"]:
        check_output_path(parser, "--predictions", Path(options["predictions"]), PREDICTION_STARTS)
    if options["export_shapes"]:
        folder, limit = options["export_shapes"], options["limit"]
        image_sets = detection.load_image_sets(dataset="shapes", limit=limit, progress=runtime.progress_bar)
        detection.export_voc(Path(folder), dict(zip(("trainval", "test"), image_sets, strict=True)))
        return print(f"wrote {folder}; train on it with --data_dir {folder} --train_sets 2007_trainval")
    if options["image_path"]:
        return detection.detect_in_pictures(typed, options)
    if options["evaluate"]:
        return detection.evaluate_detector(typed, options)

    # ---- Start: a new run or a resumed one ----
    start = training.start_run(parser, typed, options, notes, detection.DETECTOR)
    options, device, precision = start.options, start.device, start.precision
    start.kind = detection.choose_kind(options["dataset"])
    if not start.saved:
        check_start_options(parser, options)
    initial = detection.load_initial_weights(start.saved, **select_kwargs(options, detection.load_initial_weights))
    options |= {"model": initial.body, "neck": typed.get("neck", initial.options.get("neck", options["neck"]))}
    notes += describe_unused_options(options, typed, resumed=bool(start.saved))

    # ---- Data ----
    train_set, test_set = detection.load_image_sets(
        progress=runtime.progress_bar, **select_kwargs(options, detection.load_image_sets)
    )
    train_set = train_set if options["use_difficult"] else train_set.without_difficult()
    training.check_same_data(start, train_set.classes, len(train_set))
    data.check_batch_size(options["batch_size"], options["accumulate"], len(train_set), drop_last=False)
    train = detection.DetectionLoader(
        train_set,
        device=device,
        shuffle=True,
        shard=data.get_process_shard(options["accumulate"]),
        **select_kwargs(options, ["batch_size", "augment", "seed", "workers"]),
    )
    test = detection.make_test_loader(test_set, device=device, workers=options["workers"])

    # ---- Network ----
    config = detection.DetectorConfig(initial.mean, initial.std, **select_kwargs(options, detection.DetectorConfig))
    detector, build_notes = detection.build_initialized_detector(
        initial, train_set.classes, config, **select_kwargs(options, detection.build_initialized_detector)
    )
    sync_bn = options["norm"] == "syncbn"
    detector = training.place_network(detector, device, options["channels_last"], sync_bn, remedy="take --norm bn")
    remedy = "choose another --batch_size or --norm frozen"
    notes += training.check_small_batches(detector, [(train, None)], sync_bn=sync_bn, remedy=remedy)

    # ---- Optimizer and schedule ----
    options |= scale_schedule(options, len(train))
    steps, epochs = training.StepSchedule([(1, len(train))]), math.ceil(options["iters"] / len(train))
    optimizer = training.build_optimizer(
        detector, nesterov=False, **select_kwargs(options, ["lr", "momentum", "weight_decay"])
    )
    scheduler = detection.build_scheduler(optimizer, **select_kwargs(options, detection.build_scheduler))
    state = training.build_training_state(detector, optimizer, scheduler, precision, ema=options["ema"])

    # ---- Run: resume, log ----
    detection.reopen_last_epoch(start, len(train))
    info = detection.DataInfo(train_set.classes, initial.mean, initial.std)
    extra = {"backbone": initial.backbone, "images": len(train_set)}
    run = training.Run(start, state, info, steps, epochs=epochs, total_steps=options["iters"], extra=extra)
    lines = detection.describe_run(
        train_set, test_set, initial.backbone, len(train), **select_kwargs(options, detection.describe_run)
    )
    run.log_header(lines, [*notes, *build_notes, *train_set.warnings, *test_set.warnings])

    # ---- Epochs ----
    result = None  # of the last evaluation
    for epoch in run.epochs:
        with run.save_on_interrupt():
            with run.monitor(epoch) as monitor:
                row = detection.train_one_epoch(
                    state,
                    train,
                    epoch=epoch,
                    steps=run.count_steps(epoch),
                    precision=precision,
                    clip_grad=options["clip_grad"],
                    monitor=monitor,
                )
            if run.should_evaluate(epoch):
                result, columns = detection.evaluate_epoch(run, test)
                row |= columns
            run.end_epoch(row)
            detection.draw_epoch(run)

    # ---- Results ----
    content = detection.finish_run(run, result, test)
    train.close()
    test.close()
    runtime.shut_down_processes()
    return content


if __name__ == "__main__":
    run_main(main)
