"""Evaluate a detector on the test images by every protocol; show and save the results."""

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN

from detection import report
from detection.dataset import DetectionSet
from detection.faster_rcnn import DetectorConfig
from detection.initialize import build_initialized, find_initial_weights
from detection.load import load_image_sets
from detection.loader import DetectionLoader
from detection.loop import predict
from detection.metrics import Detections, GroundTruth, coco_metrics, voc_metrics
from detection.resolve import KIND, detector_runs, option_notes
from engine.config.select import select_kwargs
from engine.data.loader import get_process_shard
from engine.runtime.device import setup_backends
from engine.runtime.distributed import broadcast_from_main, is_main_process, shut_down_processes, world_size
from engine.runtime.files import write_atomic, write_json
from engine.runtime.progress import Progress, progress_bar, use_progress_bar
from engine.training.run_folder import RunFolder, choose_run_folder
from engine.training.start import start_processes
from engine.training.state import place_network


@dataclass
class EvalResult:
    """The detections on a set of images, and how good they are."""

    detections: list[Detections]
    truths: list[GroundTruth]
    voc: dict  # of voc_metrics()
    coco: dict  # of coco_metrics()
    seconds: float

    @property
    def row(self) -> dict[str, float]:
        """Columns of the log, in percent."""
        columns = {"map07": self.voc["map07"], "map": self.voc["map"], "coco_ap": self.coco["AP"]}
        return {key: 100 * value for key, value in columns.items() if value is not None}


def evaluate(model: FasterRCNN, loader: DetectionLoader, *, count_difficult: bool, bar: bool) -> EvalResult | None:
    """Every protocol on the images of a loader; None in all processes but the main one."""
    begin = time.perf_counter()
    with Progress("evaluating", len(loader), bar=bar, lines=False) as progress:
        detections = predict(model, loader, progress=progress)
    if not is_main_process():
        return None
    truths = [GroundTruth(*(target[key].numpy() for key in GroundTruth._fields)) for target in loader.part.targets]
    classes = loader.part.classes
    coco = coco_metrics(detections, truths, len(classes), count_difficult=count_difficult)
    voc = voc_metrics(detections, truths, classes)
    return EvalResult(detections, truths, voc, coco, time.perf_counter() - begin)


def make_test_loader(part: DetectionSet, *, device: torch.device, workers: int) -> DetectionLoader:
    """One image at a time in each process: with others it would be padded, which changes its detections."""
    return DetectionLoader(part, world_size(), device=device, workers=workers, shard=get_process_shard())


def evaluate_detector(typed: dict, options: dict) -> dict | None:
    """detect.py --evaluate: what results.json holds, of --frcnn_checkpoint on the test images, in a run folder of its
    own. What the file says of the detector and its data holds unless it is typed.
    """
    device = start_processes(options["device"], options["timeout"])
    initial = find_initial_weights(**select_kwargs(options, find_initial_weights))
    recorded = initial.options | ({} if {"data_dir", "test_set"} & typed.keys() else initial.data)
    options = options | {key: value for key, value in recorded.items() if key not in typed}
    options |= {"norm": "frozen", "model": initial.body}  # in evaluation all batch norm is
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])
    _, test = load_image_sets(progress=progress_bar, **select_kwargs(options | {"train_sets": []}, load_image_sets))
    config = DetectorConfig(initial.mean, initial.std, **select_kwargs(options, DetectorConfig))
    detector, notes = build_initialized(initial, test.classes, config, **select_kwargs(options, build_initialized))
    detector = place_network(detector, device, options["channels_last"], sync_bn=False)
    named = options | {"name": options["name"] or f"evaluate_{datetime.now():%Y%m%d-%H%M%S}", "overwrite": False}
    folder = broadcast_from_main(lambda: choose_run_folder(named, None, detector_runs))
    log = RunFolder(folder, off=options["log_off"] or not is_main_process())
    log.write_config(options, device, kind=KIND)
    log.say(test.summary("test"))
    log.say(f"{initial.path}: Faster R-CNN, {options['neck']}, {initial.body}, on {device}, float32")
    for note in [*notes, *option_notes(options, typed), *test.warnings]:
        log.say(f"note: {note}")
    loader = make_test_loader(test, device=device, workers=options["workers"])
    bar = use_progress_bar(options["no_progress"])
    result = evaluate(detector, loader, count_difficult=options["coco_count_difficult"], bar=bar)
    loader.close()
    summary = None
    if result:
        summary = {"detector": initial.path, "backbone": initial.backbone}
        summary |= report.summarize(result.voc, result.coco, len(test), **select_kwargs(options, report.summarize))
        report_result(log, result, test, summary, **select_kwargs(options, report_result))
    shut_down_processes()
    return summary


def report_result(
    log: RunFolder, result: EvalResult, part: DetectionSet, summary: dict, *, vis: int, predictions: str | None
) -> None:
    """Print and save the summary, draw curves and detections, and write the detections where asked for.

    summary: of summarize(), and what else results.json shall hold. vis: number of images to draw. predictions: file.
    """
    for line in report.format_result(summary):
        log.say(line)
    log.say(f"{len(part):,} images in {result.seconds:.1f} s, {len(part) / result.seconds:.1f} images/s")
    if not log.off:
        write_json(log.path / "results.json", summary)
        report.draw_precision_recall_curves(log.path / "precision_recall.png", result.voc)
        if vis:
            report.draw_detections(log.path / "vis", part, result.detections, result.truths, count=vis)
        names = sorted(path.name for path in log.path.iterdir() if path.name[0] != ".")
        log.say(f"in {log.path}: {', '.join(names)}")
    if predictions:
        rows = json.dumps(report.format_predictions(part.names, result.detections, part.classes))
        write_atomic(Path(predictions), lambda side: side.write_text(rows, encoding="utf-8"))
        log.say(f"all detections: {predictions}")
