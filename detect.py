"""Faster R-CNN on PASCAL VOC with a trained classifier as backbone: python detect.py --backbone-checkpoint FILE"""

from pathlib import Path

from detection.options import build_parser
from detection.resolve import KIND, check_start_options, option_notes, resolve_options, scale_schedule
from engine.config import resolve
from engine.config.parser import check_output_path, read_config
from engine.launch import run_main as run_script


def main(argv: list[str] | None = None) -> dict | None:
    """Train, or evaluate; returns what results.json holds."""
    parser = build_parser()
    typed, notes = resolve.read_options(parser, argv)
    options = resolve_options(parser, typed, read_config(typed["config"], KIND) if "config" in typed else {})

    import torch  # after the options, so that --help answers at once

    from detection.evaluate import evaluate_detector, make_test_loader
    from detection.initialize import build_from_start, find_start
    from detection.load import load_image_sets
    from detection.loader import DetectionLoader
    from detection.run import DETECTOR, DataInfo, Run, build_training_state, check_same_data
    from detection.shape_scenes import export_voc
    from engine.config.select import select_kwargs
    from engine.data.loader import process_shard
    from engine.runtime import distributed
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.progress import progress_bar
    from engine.training.run import resume_or_start
    from engine.training.state import check_batch_size

    if options["predictions"]:
        check_output_path(parser, "--predictions", Path(options["predictions"]))
    if options["export_shapes"]:
        parts = load_image_sets(dataset="shapes", progress=progress_bar, **select_kwargs(options, ["limit"]))
        export_voc(Path(options["export_shapes"]), dict(zip(("trainval", "test"), parts, strict=True)))
        return print(f"drawn scenes written: --data_dir {options['export_shapes']} --train_sets 2007_trainval")
    device = choose_device(options["device"])
    distributed.init_processes(device, options["timeout"])
    if options["evaluate"]:
        return evaluate_detector(typed, options, device)
    options, saved, folder = resume_or_start(parser, typed, options, DETECTOR)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    if not saved:
        check_start_options(parser, options)
    start = find_start(options, saved)
    options |= {"model": start.body, "neck": typed.get("neck", start.options.get("neck", options["neck"]))}
    notes += option_notes(options, typed, going_on=bool(saved))

    train, test = load_image_sets(progress=progress_bar, **select_kwargs(options, load_image_sets))
    train = train if options["use_difficult"] else train.without_difficult()
    check_same_data(saved, train)
    check_batch_size(**select_kwargs(options, ["batch_size", "accumulate"]), images=len(train), drop_last=False)
    feed_options = select_kwargs(options, ["batch_size", "augment", "seed", "workers"])
    shard = process_shard(options["accumulate"])
    feed = DetectionLoader(train, device=device, shuffle=True, shard=shard, **feed_options)
    options |= scale_schedule(options, len(feed))

    detector, more = build_from_start(start, options, train.classes)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    detector = distributed.convert_sync_batchnorm(detector, options["norm"] == "syncbn", "take --norm bn")
    detector = detector.to(device, memory_format=layout)
    parts = build_training_state(detector, precision=precision, **select_kwargs(options, build_training_state))

    known = DataInfo(train.classes, start.mean, start.std, len(train))
    judged_on = make_test_loader(test, options, device)
    common = {"steps": len(feed), "precision": precision, "backbone": start.backbone, "saved": saved}
    run = Run(folder, parts, options, known, **common)
    run.begin(train, test, notes + more, where=f"{device}, {precision_text}")
    for epoch in run.epochs:
        with run.ending_well():
            row = run.train(epoch, feed)
            row |= run.evaluate(judged_on)
            run.keep(row)
    result = run.finish(judged_on)
    feed.close()
    judged_on.close()
    distributed.shut_down_processes()
    return result


if __name__ == "__main__":
    run_script(main)
