"""What a detector finds on the test images, by every protocol: measured, said, drawn and kept."""

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN

from detection import report
from detection.dataset import DetectionSet
from detection.initialize import build_from_start, find_start
from detection.load import load_image_sets
from detection.loader import DetectionLoader
from detection.loop import predict
from detection.metrics import Detections, GroundTruth, coco_metrics, voc_metrics
from detection.resolve import KIND, detector_runs, option_notes
from engine.config.select import select_kwargs
from engine.data.loader import process_shard
from engine.runtime.device import setup_backends
from engine.runtime.distributed import broadcast_from_main, is_main_process, shut_down_processes, world_size
from engine.runtime.files import write_atomic, write_json
from engine.runtime.progress import Progress, progress_bar, use_progress_bar
from engine.training.run_folder import RunFolder, choose_run_folder


@dataclass
class EvalResult:
    """What an evaluation found and measured."""

    found: list[Detections]
    truths: list[GroundTruth]
    voc: dict
    coco: dict
    seconds: float

    @property
    def row(self) -> dict[str, float]:
        """Columns of the log, in percent."""
        columns = {"map07": self.voc["map07"], "map": self.voc["map"], "coco_ap": self.coco["AP"]}
        return {key: 100 * value for key, value in columns.items() if value is not None}


def evaluate(model: FasterRCNN, feed: DetectionLoader, *, count_difficult: bool, bar: bool) -> EvalResult | None:
    """Every protocol on the images of a feed; None in all processes but the first."""
    begin = time.perf_counter()
    with Progress("evaluating", len(feed), bar=bar, lines=False) as shown:
        found = predict(model, feed, progress=shown)
    if not is_main_process():
        return None
    truths = [GroundTruth(*(target[key].numpy() for key in GroundTruth._fields)) for target in feed.part.targets]
    classes = feed.part.classes
    by_coco = coco_metrics(found, truths, len(classes), count_difficult=count_difficult)
    return EvalResult(found, truths, voc_metrics(found, truths, classes), by_coco, time.perf_counter() - begin)


def make_test_loader(part: DetectionSet, options: dict, device: torch.device) -> DetectionLoader:
    """For judge(). One after the other: what neighbours make an image be padded to would change its detections."""
    return DetectionLoader(part, world_size(), device=device, workers=options["workers"], shard=process_shard())


def evaluate_detector(typed: dict, options: dict, device: torch.device) -> dict | None:
    """--evaluate: what results.json holds, of --frcnn_checkpoint on the test images, in a run folder of its own. What
    the file says of the detector serves unless it is typed.
    """
    start = find_start(options)
    told = start.options | ({} if {"data_dir", "test_set"} & typed.keys() else start.data)
    options = {**options, **{key: value for key, value in told.items() if key not in typed}}
    options |= {"norm": "frozen", "model": start.body}  # in evaluation all batch norm is
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    _, test = load_image_sets(progress=progress_bar, **select_kwargs({**options, "train_sets": []}, load_image_sets))
    detector, notes = build_from_start(start, options, test.classes)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    detector = detector.to(device, memory_format=layout)
    begins = {**options, "name": options["name"] or f"evaluate_{datetime.now():%Y%m%d-%H%M%S}"}
    folder = broadcast_from_main(lambda: choose_run_folder({**begins, "overwrite": False}, None, detector_runs))
    log = RunFolder(folder, off=options["log_off"] or not is_main_process())
    log.write_config(options, device, kind=KIND)
    log.say(test.summary("test"))
    log.say(f"{start.path}: Faster R-CNN, {options['neck']}, {start.body}, on {device}, float32")
    for note in [*notes, *option_notes(options, typed), *test.warnings]:
        log.say(f"note: {note}")
    feed = make_test_loader(test, options, device)
    judged = evaluate(
        detector, feed, count_difficult=options["coco_count_difficult"], bar=use_progress_bar(options["no_progress"])
    )
    feed.close()
    result = None
    if judged:
        result = report_result(log, judged, test, options, {"detector": start.path, "backbone": start.backbone})
    shut_down_processes()
    return result


def report_result(log: RunFolder, judged: EvalResult, part: DetectionSet, options: dict, further: dict) -> dict:
    """Say what was measured, keep and draw it, and write the detections where asked for; returns what results.json
    holds. further: what else that is.
    """
    result = further | report.summarize(
        judged.voc,
        judged.coco,
        test_set=options["test_set"] if options["dataset"] == "voc" else "test scenes",
        images=len(part),
        count_difficult=options["coco_count_difficult"],
        **{key: options[key] for key in ("score_thr", "nms_thr", "max_dets")},
    )
    for line in report.format_result(result):
        log.say(line)
    log.say(f"{len(part):,} images in {judged.seconds:.1f} s, {len(part) / judged.seconds:.1f} images/s")
    if not log.off:
        write_json(log.path / "results.json", result)
        report.draw_precision_recall_curves(log.path / "precision_recall.png", judged.voc)
        if options["vis"]:
            report.draw_detections(log.path / "vis", part, judged.found, judged.truths, count=options["vis"])
        names = sorted(path.name for path in log.path.iterdir() if path.name[0] != ".")
        log.say(f"in {log.path}: {', '.join(names)}")
    if options["predictions"]:
        rows = json.dumps(report.format_predictions(part.names, judged.found, part.classes))
        write_atomic(Path(options["predictions"]), lambda side: side.write_text(rows, encoding="utf-8"))
        log.say(f"all detections: {options['predictions']}")
    return result
