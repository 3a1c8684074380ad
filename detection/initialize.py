"""The initial weights of a detector: a classifier as its backbone, another detector, or those of the resumed run."""

from dataclasses import dataclass, field

import torch
from torchvision.models.detection import FasterRCNN

from detection.faster_rcnn import (
    BODIES,
    DetectorConfig,
    build_detector,
    convert_legacy_keys,
    detect_config,
    identify_backbone,
    load_backbone,
    load_detector,
    set_learning,
)
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier, find_best_checkpoint
from engine.runtime.checkpoint import Checkpoint, is_checkpoint, read_file
from engine.runtime.distributed import main_process_first, world_size
from engine.runtime.foreign_weights import extract_weights
from models import download_weights
from models.imagenet_resnet import PRETRAINED

DETECTOR_OPTIONS = ("neck", "min_size", "max_size", "proposals")  # what a checkpoint says of its detector
DATA_OPTIONS = ("dataset", "data_dir", "test_set")  # and of the data it was evaluated on


@dataclass
class InitialWeights:
    """Weights of a backbone or of a whole detector, and what is known of them."""

    body: str  # one of BODIES
    mean: tuple[float, ...]  # of the pixels in 0..1 that the backbone was trained with
    std: tuple[float, ...]
    weights: dict[str, torch.Tensor] | None = None  # None: those of the run that is resumed
    is_detector: bool = False
    path: str = ""
    classes: list[str] = field(default_factory=list)  # of a detector, where its file says
    num_classes: int = 0  # of a detector, without background
    backbone: dict = field(default_factory=dict)  # where the backbone came from, as checkpoints keep it
    options: dict = field(default_factory=dict)  # DETECTOR_OPTIONS, where the file says
    data: dict = field(default_factory=dict)  # DATA_OPTIONS, likewise


def find_initial_weights(
    saved: Checkpoint | None = None,
    *,
    frcnn_checkpoint: str | None,
    backbone_checkpoint: str | None,
    pretrained: bool,
    model: str | None,
    averaged: bool,
) -> InitialWeights:
    """The weights that these options name, or those of the run that is resumed. saved: its checkpoint. Raises UserError
    for a file that cannot be used.
    """
    if saved:
        return InitialWeights(saved["config"]["model"], saved["mean"], saved["std"], backbone=saved["backbone"])
    if frcnn_checkpoint:
        return read_detector(frcnn_checkpoint, averaged=averaged, model=model)
    if pretrained:
        return fetch_pretrained(model)
    return read_classifier(SavedClassifier(backbone_checkpoint, averaged=averaged), model)


def read_classifier(saved: SavedClassifier, model: str | None) -> InitialWeights:
    name, path = identify_backbone(saved, model), str(saved.path)
    mean, std = saved.statistics
    backbone = {"path": path, "model": name, "best": saved.best, "method": saved.options.get("method")}
    return InitialWeights(name.removeprefix("imagenet_"), mean, std, saved.weights, path=path, backbone=backbone)


def fetch_pretrained(model: str | None) -> InitialWeights:
    """torchvision's ResNet for ImageNet, trained without mixing, of 50 layers unless a model is named."""
    body = (model or "resnet50").removeprefix("imagenet_")
    if body not in BODIES:
        raise UserError(f"--model {model}: there are no ready weights of it\nthere are of {', '.join(BODIES)}")
    url = PRETRAINED[f"imagenet_{body}"]
    try:
        weights = main_process_first(lambda: download_weights(url))
    except ValueError as error:
        raise UserError(f"--pretrained: {error}, or give a classifier with --backbone_checkpoint") from error
    backbone = {"path": url, "model": f"imagenet_{body}", "best": None, "method": None}
    return InitialWeights(body, *STATISTICS["imagenet"], weights, path=url, backbone=backbone)


def read_detector(word: str, *, averaged: bool = False, model: str | None = None) -> InitialWeights:
    """A file of ours, the best.pt of a run folder, or a bare state dict of torchvision's detector. model: what the user
    says its backbone is.
    """
    path = find_best_checkpoint(word)
    content = read_file(path)
    weights = extract_weights(content, path, averaged=averaged, kind="detector")
    detected = detect_config(convert_legacy_keys(weights))
    if detected is None or detected["body"] not in BODIES:
        raise UserError(
            f"{path}: a detector of another kind\ndetectors are Faster R-CNNs on ResNets, made by detect.py, or "
            "torchvision's fasterrcnn_resnet50_fpn"
        )
    body = detected["body"]
    if model and model.removeprefix("imagenet_") != body:
        raise UserError(f"--model {model}: {path} holds {body}\nleave --model out, the file says what it is")
    ours = content if is_checkpoint(content) else {}
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
        options={key: ours["config"][key] for key in DETECTOR_OPTIONS} if ours else {"neck": detected["neck"]},
        data={key: ours["config"][key] for key in DATA_OPTIONS} if ours else {},
    )


def build_initialized(
    initial: InitialWeights,
    classes: list[str],
    detector_config: DetectorConfig,
    *,
    stem: str,
    norm: str,
    trainable_layers: int,
    evaluate: bool,
) -> tuple[FasterRCNN, list[str]]:
    """A detector for these classes with the initial weights, set to learn what the options say, and notes for the user.
    Raises UserError where a detector has another neck, or is for other classes and shall only be evaluated.
    """
    detector = build_detector(initial.body, len(classes), detector_config)
    notes = []
    if initial.is_detector:
        neck, own_neck = detector_config.neck, initial.options["neck"]
        if neck != own_neck:
            raise UserError(f"--neck {neck}: {initial.path} has the neck {own_neck}\nleave it out")
        if evaluate:
            check_classes(initial, classes)
        load_detector(detector, initial.weights, initial.path)
        if initial.num_classes != len(classes):
            notes.append(
                f"{initial.path} is for {initial.num_classes} classes: the predictor starts anew, for {len(classes)}"
            )
    elif initial.weights is not None:
        if load_backbone(detector, initial.weights, stem=stem):
            notes.append(
                f"{initial.path} has a stem for small images, 3x3 and without pooling: features learnt on such images "
                f"transfer poorly; better is a classifier trained with --model imagenet_{initial.body}"
            )
    if norm == "syncbn" and world_size() == 1:
        notes.append("--norm syncbn: in one process this is bn")
    set_learning(detector, trainable_layers=trainable_layers, norm=norm, stem_learns=stem == "random")
    return detector, notes


def check_classes(initial: InitialWeights, classes: list[str]) -> None:
    """Raise UserError where a detector that shall be evaluated is not for these classes."""
    if initial.num_classes != len(classes):
        raise UserError(
            f"{initial.path}: a detector for {initial.num_classes} classes; the data has {len(classes)}\nevaluate it "
            "on data of its own classes, or train it on these: leave --evaluate out"
        )
    if initial.classes and initial.classes != list(classes):
        raise UserError(
            f"{initial.path}: its classes ({', '.join(initial.classes[:5])} ...) are not those of the data "
            f"({', '.join(classes[:5])} ...)\nboth must be the same, in the same order"
        )
