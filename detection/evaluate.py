"""Evaluate a detector on the test images by the VOC and COCO protocols; print and save the results."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.models.detection import FasterRCNN

from detection import report
from detection.dataset import DetectionSet
from detection.faster_rcnn import DetectorConfig
from detection.initialize import InitialWeights, build_initialized_detector, load_initial_weights
from detection.load import load_image_sets
from detection.loader import DetectionLoader
from detection.loop import predict
from detection.metrics import Detections, GroundTruth, coco_metrics, voc_metrics
from detection.resolve import KIND, check_coco_options, describe_unused_options, locate_detector_runs
from engine.config.select import select_kwargs
from engine.data.loader import get_process_shard
from engine.errors import UserError
from engine.runtime.device import setup_backends
from engine.runtime.distributed import broadcast_from_main, is_main_process, shut_down_processes, world_size
from engine.runtime.files import write_atomic, write_json
from engine.runtime.progress import Progress, progress_bar, use_progress_bar
from engine.runtime.text import format_count
from engine.training.run_folder import RunFolder, claim_new_folder
from engine.training.start import start_processes
from engine.training.state import place_network


class EvaluationFolder(RunFolder):
    """The files of an evaluation, which never replaces a training run."""

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise UserError, with the remedy, if the folder holds a training run."""
        if (path / "log.csv").exists():
            raise UserError(f"{path} already holds a training run\nchoose another --name for the evaluation")


@dataclass
class EvalResult:
    """The detections in a set of images and their metrics."""

    detections: list[Detections]  # one per image
    truths: list[GroundTruth]
    voc: dict  # the result of voc_metrics()
    coco: dict  # the result of coco_metrics()
    seconds: float

    @property
    def row(self) -> dict[str, float]:
        """The columns of log.csv, in percent."""
        columns = {"map07": self.voc["map07"], "map": self.voc["map"], "coco_ap": self.coco["AP"]}
        return {key: 100 * value for key, value in columns.items() if value is not None}


def evaluate(model: FasterRCNN, loader: DetectionLoader, *, count_difficult: bool, bar: bool) -> EvalResult | None:
    """Detect objects in the images of a loader and compute all metrics. Returns None outside the main process.

    count_difficult: whether COCO's metrics count objects marked difficult. bar: show a progress bar.
    """
    start = time.perf_counter()
    with Progress("evaluating", len(loader), bar=bar, lines=False) as progress:
        detections = predict(model, loader, progress=progress)
    if not is_main_process():
        return None
    targets, classes = loader.image_set.targets, loader.image_set.classes
    truths = [GroundTruth(*(target[key].numpy() for key in GroundTruth._fields)) for target in targets]
    areas = [target["area"].numpy() for target in targets] if targets and "area" in targets[0] else None
    coco = coco_metrics(detections, truths, len(classes), areas=areas, count_difficult=count_difficult)
    voc = voc_metrics(detections, truths, classes)
    return EvalResult(detections, truths, voc, coco, time.perf_counter() - start)


def make_test_loader(image_set: DetectionSet, *, device: torch.device, workers: int) -> DetectionLoader:
    """Return a loader of one image at a time per process: padding to the size of others would change its detections."""
    return DetectionLoader(image_set, world_size(), device=device, workers=workers, shard=get_process_shard())


def evaluate_detector(typed: dict, options: dict) -> dict | None:
    """Evaluate --frcnn_checkpoint on the test images (detect.py --evaluate), in a run folder of its own.

    Options that the file records about the detector and its data apply unless they are typed. Returns the content of
    results.json; None outside the main process.
    """
    # ---- Options ----
    device = start_processes(options["device"], options["timeout"])
    initial, options = load_finished_detector(typed, options)
    setup_backends(device, seed=options["seed"], deterministic=options["deterministic"])

    # ---- Data and network ----
    try:
        check_coco_options(options, typed)
    except ValueError as error:
        raise UserError(str(error)) from error
    no_training = {"train_sets": [], "train_annotations": None}
    _, test = load_image_sets(progress=progress_bar, **select_kwargs(options | no_training, load_image_sets))
    test = test.reorder_classes(initial.classes)
    detector, notes = build_finished_detector(initial, test.classes, options, device)

    # ---- Run folder ----
    kept = options | {"overwrite": False}
    folder = broadcast_from_main(lambda: claim_new_folder(kept, locate_evaluations, EvaluationFolder))
    log = EvaluationFolder(folder, off=options["log_off"] or not is_main_process())
    log.write_config(options, device, kind=KIND)
    log.say(test.summary("test"))
    log.say(f"{initial.path}: Faster R-CNN, neck {options['neck']}, body {initial.body}, on {device}, float32")
    log.say(f"shorter side {options['min_size'][-1]}, longer side up to {options['max_size']} pixels")
    if not initial.data and not {"min_size", "max_size"} & typed.keys():
        notes.append(f"{initial.path} does not record its image size; --min_size and --max_size set another")
    for note in [*notes, *describe_unused_options(options, typed), *test.warnings]:
        log.say(f"note: {note}")

    # ---- Evaluation ----
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


def load_finished_detector(typed: dict, options: dict) -> tuple[InitialWeights, dict]:
    """Load --frcnn_checkpoint to detect objects. Returns its weights and the options.

    Options that the file records about the detector and its data apply unless they are typed.
    """
    initial = load_initial_weights(**select_kwargs(options, load_initial_weights))
    recorded = initial.options | ({} if {"data_dir", "test_set"} & typed.keys() else initial.data)
    options = options | {key: value for key, value in recorded.items() if key not in typed}
    if options["min_size"][-1] > options["max_size"]:
        raise UserError(
            f"--min_size {options['min_size'][-1]} exceeds --max_size {options['max_size']}\n"
            f"give both; those that are not given are those of {initial.path}"
        )
    return initial, options | {"norm": "frozen", "model": initial.body, "evaluate": True}  # batch norm is always frozen


def build_finished_detector(
    initial: InitialWeights, classes: list[str], options: dict, device: torch.device
) -> tuple[FasterRCNN, list[str]]:
    """Build a detector with the weights and options of load_finished_detector(). Returns it, and notes for the user."""
    config = DetectorConfig(initial.mean, initial.std, **select_kwargs(options, DetectorConfig))
    detector, notes = build_initialized_detector(
        initial, classes, config, **select_kwargs(options, build_initialized_detector)
    )
    return place_network(detector, device, options["channels_last"], sync_bn=False), notes


def locate_evaluations(options: dict) -> tuple[Path, str]:
    """Return the folder of detector runs, and the prefix of the names of unnamed evaluations."""
    return locate_detector_runs(options)[0], "evaluate"


def report_result(
    log: RunFolder,
    result: EvalResult,
    image_set: DetectionSet,
    summary: dict,
    *,
    vis: int,
    predictions: str | None,
    dpi: int,
    figure_format: str,
) -> None:
    """Print and save the summary, draw curves and detections, and write the detections to a file if requested.

    summary: the content of results.json, which includes the result of summarize(). vis: number of test images to draw.
    predictions: file for all detections, or None. dpi, figure_format: of the figures.
    """
    for line in report.format_result(summary):
        log.say(line)
    count = len(image_set)
    speed = f"{result.seconds:.1f} s ({count / result.seconds:.1f} images/s)"
    log.say(f"evaluated {format_count(count, 'image')} in {speed}")
    if not log.off:
        write_json(log.path / "results.json", summary)
        report.draw_precision_recall_curves(log.path / f"precision_recall.{figure_format}", result.voc, dpi=dpi)
        if vis:
            style = {"dpi": dpi, "figure_format": figure_format}
            report.draw_detections(log.path / "vis", image_set, result.detections, result.truths, count=vis, **style)
        names = sorted(path.name for path in log.path.iterdir() if path.name[0] != ".")
        log.say(f"files in {log.path}: {', '.join(names)}")
    if predictions:
        images = image_set.image_ids or image_set.names
        rows = report.format_predictions(images, result.detections, image_set.classes, image_set.category_ids or ())
        text = json.dumps(rows)
        write_atomic(Path(predictions), lambda side: side.write_text(text, encoding="utf-8"))
        log.say(f"wrote all detections to {predictions}")
