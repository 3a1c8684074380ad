"""Faster R-CNN on PASCAL VOC with a trained classifier as backbone: python detect.py --backbone-checkpoint FILE"""

from pathlib import Path

from detection.options import KIND, build_parser, check_start, notes_on, schedule_of, settle
from engine import configure
from engine.cli import check_place, read_config
from engine.cli import run as run_script


def main(argv: list[str] | None = None) -> dict | None:
    """Train, or evaluate; returns what results.json holds."""
    parser = build_parser()
    typed, notes = configure.read(parser, argv)
    options = settle(parser, typed, read_config(typed["config"], KIND) if "config" in typed else {})

    import torch  # after the options, so that --help answers at once

    from detection.data import load_parts
    from detection.feed import Feed
    from detection.judging import evaluate_detector, images_of
    from detection.run import DETECTOR, Known, Run, build_parts, check_same_data
    from detection.scenes import export_voc
    from detection.start import build, start_of
    from engine import distributed
    from engine.device import choose_device, choose_precision, prepare
    from engine.progress import over
    from engine.run import take_up
    from engine.training import check_batch, pick

    if options["predictions"]:
        check_place(parser, "--predictions", Path(options["predictions"]))
    if options["export_shapes"]:
        parts = load_parts(dataset="shapes", progress=over, **pick(options, ["limit"]))
        export_voc(Path(options["export_shapes"]), dict(zip(("trainval", "test"), parts, strict=True)))
        return print(f"drawn scenes written: --data_dir {options['export_shapes']} --train_sets 2007_trainval")
    device = choose_device(options["device"])
    distributed.start(device, options["timeout"])
    if options["evaluate"]:
        return evaluate_detector(typed, options, device)
    options, saved, folder = take_up(parser, typed, options, DETECTOR)
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    precision, precision_text = choose_precision(options["amp"], device)
    if not saved:
        check_start(parser, options)
    start = start_of(options, saved)
    options |= {"model": start.body, "neck": typed.get("neck", start.options.get("neck", options["neck"]))}
    notes += notes_on(options, typed, going_on=bool(saved))

    train, test = load_parts(progress=over, **pick(options, load_parts))
    train = train if options["use_difficult"] else train.without_difficult()
    check_same_data(saved, train)
    check_batch(**pick(options, ["batch_size", "accumulate"]), images=len(train), drop_last=False)
    alike = {"rank": distributed.rank(), "ranks": distributed.ranks(), "pieces": options["accumulate"]}
    feed_options = pick(options, ["batch_size", "augment", "seed", "workers"])
    feed = Feed(train, device=device, shuffle=True, **feed_options, **alike)
    options |= schedule_of(options, len(feed))

    detector, more = build(start, options, train.classes)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    detector = distributed.synchronised(detector, options["norm"] == "syncbn", "take --norm bn")
    detector = detector.to(device, memory_format=layout)
    parts = build_parts(detector, precision=precision, **pick(options, build_parts))

    known = Known(train.classes, start.mean, start.std, len(train))
    judged_on = images_of(test, options, device)
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
    distributed.finish()
    return result


if __name__ == "__main__":
    run_script(main)
