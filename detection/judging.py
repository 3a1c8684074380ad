"""What a detector finds on the test images, by every protocol: measured, said, drawn and kept."""

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN

from detection import report
from detection.data import Part, load_parts
from detection.feed import Feed
from detection.loop import predict
from detection.metrics import Found, Truth, coco, voc
from detection.options import KIND, notes_on, runs_of
from detection.start import build, start_of
from engine.device import prepare
from engine.distributed import finish, is_first, of_first, rank, ranks
from engine.files import write_atomic, write_json
from engine.log import RunFolder, run_folder
from engine.progress import Progress, bars_wanted, over
from engine.training import pick


@dataclass
class Judged:
    """What an evaluation found and measured."""

    found: list[Found]
    truths: list[Truth]
    voc: dict
    coco: dict
    seconds: float

    @property
    def row(self) -> dict[str, float]:
        """Columns of the log, in percent."""
        columns = {"map07": self.voc["map07"], "map": self.voc["map"], "coco_ap": self.coco["AP"]}
        return {key: 100 * value for key, value in columns.items() if value is not None}


def judge(model: FasterRCNN, feed: Feed, *, count_difficult: bool, bar: bool) -> Judged | None:
    """Every protocol on the images of a feed; None in all processes but the first."""
    begin = time.perf_counter()
    with Progress("evaluating", len(feed), bar=bar, lines=False) as shown:
        found = predict(model, feed, progress=shown)
    if not is_first():
        return None
    truths = [Truth(*(target[key].numpy() for key in Truth._fields)) for target in feed.part.targets]
    classes = feed.part.classes
    by_coco = coco(found, truths, len(classes), count_difficult=count_difficult)
    return Judged(found, truths, voc(found, truths, classes), by_coco, time.perf_counter() - begin)


def images_of(part: Part, options: dict, device: torch.device) -> Feed:
    """For judge(). One after the other: what neighbours make an image be padded to would change its detections."""
    return Feed(part, ranks(), device=device, workers=options["workers"], rank=rank(), ranks=ranks())


def evaluate_detector(typed: dict, options: dict, device: torch.device) -> dict | None:
    """--evaluate: what results.json holds, of --frcnn_checkpoint on the test images, in a run folder of its own. What
    the file says of the detector serves unless it is typed.
    """
    start = start_of(options)
    told = start.options | ({} if {"data_dir", "test_set"} & typed.keys() else start.data)
    options = {**options, **{key: value for key, value in told.items() if key not in typed}}
    options |= {"norm": "frozen", "model": start.body}  # in evaluation all batch norm is
    prepare(device, seed=options["seed"], deterministic=options["deterministic"])
    _, test = load_parts(progress=over, **pick({**options, "train_sets": []}, load_parts))
    detector, notes = build(start, options, test.classes)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    detector = detector.to(device, memory_format=layout)
    begins = {**options, "name": options["name"] or f"evaluate_{datetime.now():%Y%m%d-%H%M%S}"}
    folder = of_first(lambda: run_folder({**begins, "overwrite": False}, None, runs_of))
    log = RunFolder(folder, off=options["log_off"] or not is_first())
    log.write_config(options, device, kind=KIND)
    log.say(test.summary("test"))
    log.say(f"{start.path}: Faster R-CNN, {options['neck']}, {start.body}, on {device}, float32")
    for note in [*notes, *notes_on(options, typed), *test.warnings]:
        log.say(f"note: {note}")
    feed = images_of(test, options, device)
    judged = judge(
        detector, feed, count_difficult=options["coco_count_difficult"], bar=bars_wanted(options["no_progress"])
    )
    feed.close()
    result = None
    if judged:
        result = present(log, judged, test, options, {"detector": start.path, "backbone": start.backbone})
    finish()
    return result


def present(log: RunFolder, judged: Judged, part: Part, options: dict, further: dict) -> dict:
    """Say what was measured, keep and draw it, and write the detections where asked for; returns what results.json
    holds. further: what else that is.
    """
    result = further | report.results(
        judged.voc,
        judged.coco,
        test_set=options["test_set"] if options["dataset"] == "voc" else "test scenes",
        images=len(part),
        count_difficult=options["coco_count_difficult"],
        **{key: options[key] for key in ("score_thr", "nms_thr", "max_dets")},
    )
    for line in report.lines_of(result):
        log.say(line)
    log.say(f"{len(part):,} images in {judged.seconds:.1f} s, {len(part) / judged.seconds:.1f} images/s")
    if not log.off:
        write_json(log.path / "results.json", result)
        report.draw_curves(log.path / "precision_recall.png", judged.voc)
        if options["vis"]:
            report.draw_detections(log.path / "vis", part, judged.found, judged.truths, count=options["vis"])
        names = sorted(path.name for path in log.path.iterdir() if path.name[0] != ".")
        log.say(f"in {log.path}: {', '.join(names)}")
    if options["predictions"]:
        rows = json.dumps(report.predictions(part.names, judged.found, part.classes))
        write_atomic(Path(options["predictions"]), lambda side: side.write_text(rows, encoding="utf-8"))
        log.say(f"all detections: {options['predictions']}")
    return result
