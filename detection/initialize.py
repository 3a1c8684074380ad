"""Load the initial weights of a detector: a classifier as its backbone, another detector, or those of a resumed run."""

from dataclasses import dataclass, field

import torch
from torchvision.models.detection import FasterRCNN

from detection.dataset import format_first_names
from detection.faster_rcnn import (
    BODIES,
    DetectorConfig,
    build_detector,
    convert_legacy_keys,
    detect_config,
    identify_backbone,
    load_backbone,
    load_detector,
    set_trainable_layers,
)
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier, find_best_checkpoint
from engine.runtime.checkpoint import Checkpoint, is_checkpoint, read_file
from engine.runtime.distributed import main_process_first, world_size
from engine.runtime.foreign_weights import extract_weights
from engine.runtime.text import format_count
from models import download_weights
from models.imagenet_resnet import PRETRAINED

DETECTOR_OPTIONS = (  # options of the detector and of its evaluation that its checkpoint records
    *("neck", "min_size", "max_size", "proposals", "score_thr", "nms_thr", "max_dets", "coco_count_difficult"),
)
TORCHVISION_OPTIONS = {"min_size": [800], "max_size": 1333, "proposals": [2000, 1000]}  # defaults of its FasterRCNN
DATA_OPTIONS = ("dataset", "data_dir", "test_set", "test_annotations", "images")  # the data that it was evaluated on


@dataclass
class InitialWeights:
    """The weights of a backbone or of a whole detector, and their origin."""

    body: str  # one of BODIES
    mean: tuple[float, ...]  # normalisation of pixels in 0..1, as the backbone was trained
    std: tuple[float, ...]
    weights: dict[str, torch.Tensor] | None = None  # None: the weights come from the run that is resumed
    is_detector: bool = False
    path: str = ""
    classes: list[str] = field(default_factory=list)  # of a detector; empty if the file does not store them
    num_classes: int = 0  # of a detector, without the background
    backbone: dict = field(default_factory=dict)  # the origin of the backbone, as in checkpoints
    options: dict = field(default_factory=dict)  # DETECTOR_OPTIONS that the file records, or those of its origin
    data: dict = field(default_factory=dict)  # DATA_OPTIONS that the file records; empty for files of other codes


def load_initial_weights(
    saved: Checkpoint | None = None,
    *,
    frcnn_checkpoint: str | None,
    backbone_checkpoint: str | None,
    pretrained: bool,
    model: str | None,
    averaged: bool,
) -> InitialWeights:
    """Load the weights that the options name. The parameters after `saved` are options of detect.py.

    saved: the checkpoint of a run to resume; then no weights are loaded here. Raises UserError for an unusable file.
    """
    if saved:
        return InitialWeights(saved["config"]["model"], saved["mean"], saved["std"], backbone=saved["backbone"])
    if frcnn_checkpoint:
        return read_detector(frcnn_checkpoint, averaged=averaged, model=model)
    if pretrained:
        return fetch_pretrained(model)
    return read_classifier(SavedClassifier(backbone_checkpoint, averaged=averaged), model)


def read_classifier(saved: SavedClassifier, model: str | None) -> InitialWeights:
    """Return the weights of a classifier as a backbone. model: its architecture, if the user names it."""
    name, path = identify_backbone(saved, model), str(saved.path)
    mean, std = saved.statistics
    backbone = {"path": path, "model": name, "best": saved.best, "method": saved.options.get("method")}
    return InitialWeights(name.removeprefix("imagenet_"), mean, std, saved.weights, path=path, backbone=backbone)


def fetch_pretrained(model: str | None) -> InitialWeights:
    """Download the ImageNet weights of one of torchvision's ResNets, trained without mixing. model None: ResNet-50."""
    body = (model or "resnet50").removeprefix("imagenet_")
    if body not in BODIES:
        raise UserError(f"--model {model}: no pretrained weights\n--pretrained has weights for {', '.join(BODIES)}")
    url = PRETRAINED[f"imagenet_{body}"]
    try:
        weights = main_process_first(lambda: download_weights(url))
    except ValueError as error:
        raise UserError(f"--pretrained: {error}, or name a classifier with --backbone_checkpoint") from error
    backbone = {"path": url, "model": f"imagenet_{body}", "best": None, "method": None}
    return InitialWeights(body, *STATISTICS["imagenet"], weights, path=url, backbone=backbone)


def read_detector(path: str, *, averaged: bool = False, model: str | None = None) -> InitialWeights:
    """Read a detector from a checkpoint of this project, the best.pt of a run folder, or a state dict of torchvision.

    averaged: take the weight average of the file. model: the architecture of the backbone, if the user names it.
    """
    path = find_best_checkpoint(path)
    content = read_file(path)
    weights = extract_weights(content, path, averaged=averaged, kind="detector")
    detected = detect_config(convert_legacy_keys(weights))
    if detected is None or detected["body"] not in BODIES:
        raise UserError(
            f"{path}: not a Faster R-CNN on a ResNet\nuse a detector made by detect.py, or torchvision's "
            "fasterrcnn_resnet50_fpn"
        )
    body = detected["body"]
    if model and model.removeprefix("imagenet_") != body:
        raise UserError(f"--model {model}: {path} holds {body}\nomit --model: the architecture is read from the file")
    ours = content if is_checkpoint(content) else {}
    options = {"neck": detected["neck"]} | (TORCHVISION_OPTIONS if detected["neck"] == "fpn" else {})
    if ours:
        options = {key: ours["config"][key] for key in DETECTOR_OPTIONS}
    mean, std = (ours["mean"], ours["std"]) if ours else STATISTICS["imagenet"]
    return InitialWeights(
        body,
        mean,
        std,
        weights,
        is_detector=True,
        path=str(path),
        classes=ours.get("classes", []),
        num_classes=detected["num_classes"],
        backbone=ours.get("backbone") or {"path": str(path), "model": body},
        options=options,
        data={key: ours["config"][key] for key in DATA_OPTIONS if key in ours["config"]} if ours else {},
    )


def build_initialized_detector(
    initial: InitialWeights,
    classes: list[str],
    detector_config: DetectorConfig,
    *,
    stem: str,
    norm: str,
    trainable_layers: int,
    evaluate: bool,
) -> tuple[FasterRCNN, list[str]]:
    """Build a detector with the initial weights and select the stages to train. Returns it, and notes for the user.

    The parameters by name are options of detect.py. Raises UserError if the initial weights are a detector with another
    neck, or if they are to be evaluated and are for other classes.
    """
    detector = build_detector(initial.body, len(classes), detector_config)
    notes = []
    if initial.is_detector:
        neck, own_neck = detector_config.neck, initial.options["neck"]
        if neck != own_neck:
            raise UserError(f"--neck {neck}: {initial.path} has the neck {own_neck}\nomit --neck")
        if evaluate:
            check_classes(initial, classes)
        rows, note = match_classes(initial, classes)
        load_detector(detector, initial.weights, initial.path, rows)
        notes += note
    elif initial.weights is not None:
        if load_backbone(detector, initial.weights, stem=stem):
            notes.append(
                f"{initial.path} has a stem for small images (3x3, no pooling), whose features transfer poorly; prefer "
                f"a classifier trained with --model imagenet_{initial.body}"
            )
    if norm == "syncbn" and world_size() == 1:
        notes.append("--norm syncbn is the same as bn in a single process")
    set_trainable_layers(detector, trainable_layers=trainable_layers, norm=norm, train_stem=stem == "random")
    return detector, notes


def match_classes(initial: InitialWeights, classes: list[str]) -> tuple[dict[int, int], list[str]]:
    """Match the classes of the data with those of a detector by name.

    Returns label -> label of the detector for the classes of both and the background (empty without such classes), and
    a note for the user unless both have the same classes in the same order. Classes of a file that does not name them
    are those of the data, in the same order, if it has as many.
    """
    path, count = initial.path, format_count(len(classes), "class")
    if not initial.classes and initial.num_classes == len(classes):
        order = format_first_names(classes)
        return {label: label for label in range(len(classes) + 1)}, [
            f"{path} does not name its classes; they are assumed to be the {count} of this data, in the same order "
            f"({order})"
        ]
    saved = {name: label for label, name in enumerate(initial.classes, 1)}
    rows = {label: saved[name] for label, name in enumerate(classes, 1) if name in saved}
    if not rows:
        what = f"{initial.num_classes} other classes" if saved else f"{initial.num_classes} classes without names"
        return {}, [f"{path} has {what}: the predictor of the {count} of this data starts from random weights"]
    new = [name for name in classes if name not in saved]
    notes = []
    if initial.classes != classes:
        random = f"; that of {format_first_names(new)} starts from random weights" if new else ""
        notes = [f"{path}: the predictor is taken over for {len(rows)} of the {count} of this data, by name{random}"]
    return {0: 0, **rows}, notes


def check_classes(initial: InitialWeights, classes: list[str]) -> None:
    """Raise UserError if a detector that is to be evaluated has other classes than the data."""
    if initial.num_classes != len(classes):
        raise UserError(
            f"{initial.path}: a detector for {initial.num_classes} classes, but the data has {len(classes)}\nevaluate "
            "it on data with its own classes, or omit --evaluate to train it on these"
        )
    if initial.classes and initial.classes != list(classes):
        raise UserError(
            f"{initial.path}: its classes ({', '.join(initial.classes[:5])} ...) differ from those of the data "
            f"({', '.join(classes[:5])} ...)\nboth must be the same, in the same order"
        )
