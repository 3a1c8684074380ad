"""What a detector starts from: a classifier as its backbone, another detector, or the run it goes on with."""

from dataclasses import dataclass, field

import torch
from torchvision.models.detection import FasterRCNN

from detection.faster_rcnn import (
    BODIES,
    backbone_name,
    build_detector,
    convert_legacy_keys,
    detect_config,
    load_backbone,
    load_detector,
    set_learning,
)
from engine.data.image_set import STATISTICS
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier, find_best
from engine.runtime.checkpoint import is_checkpoint, read_file
from engine.runtime.distributed import main_process_first, world_size
from engine.runtime.foreign_weights import extract_weights
from models import fetch
from models.imagenet_resnet import PRETRAINED

FILE_OPTIONS = ("neck", "min_size", "max_size", "proposals")  # what a detector's file says of it
DATA_OPTIONS = ("dataset", "data_dir", "test_set")  # and of what it was judged on


@dataclass
class Start:
    """Weights of a backbone or of a whole detector, and what is known of them."""

    body: str  # one of BODIES
    mean: tuple[float, ...]  # of the pixels in 0..1 that the backbone was trained with
    std: tuple[float, ...]
    weights: dict[str, torch.Tensor] | None = None  # None: of the run that goes on
    whole: bool = False  # whether they are of a detector
    path: str = ""
    classes: list[str] = field(default_factory=list)  # of a detector, where its file says
    count: int = 0  # of a detector's classes, without background
    backbone: dict = field(default_factory=dict)  # what the checkpoint keeps of where the backbone came from
    options: dict = field(default_factory=dict)  # OF_THE_FILE, where a detector's file says
    data: dict = field(default_factory=dict)  # OF_ITS_DATA, likewise


def find_start(options: dict, saved: dict | None = None) -> Start:
    """What the options of those names say to start from. saved: the checkpoint of the run that goes on. Raises
    UserError for a file that cannot be that.
    """
    if saved:
        return Start(saved["config"]["model"], saved["mean"], saved["std"], backbone=saved["backbone"])
    if options["frcnn_checkpoint"]:
        return start_from_detector(options["frcnn_checkpoint"], averaged=options["averaged"], model=options["model"])
    if options["pretrained"]:
        return start_from_torchvision(options["model"])
    file = SavedClassifier(options["backbone_checkpoint"], averaged=options["averaged"])
    return start_from_classifier(file, options["model"])


def start_from_classifier(saved: SavedClassifier, model: str | None) -> Start:
    name = backbone_name(saved, model)
    mean, std = saved.statistics
    known = {"path": str(saved.path), "model": name, "best": saved.best, "method": saved.options.get("method")}
    return Start(name.removeprefix("imagenet_"), mean, std, saved.weights, path=str(saved.path), backbone=known)


def start_from_torchvision(model: str | None) -> Start:
    """torchvision's plainly trained ResNet for ImageNet, of 50 layers unless a model is named."""
    body = (model or "resnet50").removeprefix("imagenet_")
    if body not in BODIES:
        raise UserError(f"--model {model}: there are no ready weights of it\nthere are of {', '.join(BODIES)}")
    url = PRETRAINED[f"imagenet_{body}"]
    try:
        weights = main_process_first(lambda: fetch(url))
    except ValueError as error:
        raise UserError(f"--pretrained: {error}, or give a classifier with --backbone_checkpoint") from error
    known = {"path": url, "model": f"imagenet_{body}", "best": None, "method": None}
    return Start(body, *STATISTICS["imagenet"], weights, path=url, backbone=known)


def start_from_detector(word: str, *, averaged: bool = False, model: str | None = None) -> Start:
    """A file of ours, the best.pt of a run folder, or a bare state dict of torchvision's detector. model: what the user
    says its backbone is.
    """
    path = find_best(word)
    content = read_file(path)
    weights = extract_weights(content, path, averaged=averaged, kind="detector")
    told = detect_config(convert_legacy_keys(weights))
    if told is None or told["body"] not in BODIES:
        raise UserError(
            f"{path}: a detector of another kind\ndetectors are Faster R-CNNs on ResNets, made by detect.py, or "
            "torchvision's fasterrcnn_resnet50_fpn"
        )
    if model and model.removeprefix("imagenet_") != told["body"]:
        raise UserError(f"--model {model}: {path} holds {told['body']}\nleave --model out, the file says what it is")
    ours = content if is_checkpoint(content) else {}
    known = {key: ours["config"][key] for key in FILE_OPTIONS} if ours else {"neck": told["neck"]}
    mean, std = (ours["mean"], ours["std"]) if ours else STATISTICS["imagenet"]
    return Start(
        **{"body": told["body"], "mean": mean, "std": std, "weights": weights, "whole": True, "path": str(path)},
        **{"classes": ours.get("classes", []), "count": told["num_classes"]},
        **{"backbone": ours.get("backbone") or {"path": str(path), "model": told["body"]}, "options": known},
        data={key: ours["config"][key] for key in DATA_OPTIONS} if ours else {},
    )


def build_from_start(start: Start, options: dict, classes: list[str]) -> tuple[FasterRCNN, list[str]]:
    """The detector for these classes, with what of it learns set, and what to tell. Raises UserError where a detector
    is for other classes and shall only be evaluated.
    """
    common = ("neck", "min_size", "max_size", "score_thr", "nms_thr", "max_dets", "rois")
    train, test = options["proposals"]
    detector = build_detector(
        start.body,
        len(classes),
        mean=start.mean,
        std=start.std,
        proposals=train,
        test_proposals=test,
        **{key: options[key] for key in common},
    )
    notes = []
    if start.whole:
        if options["neck"] != start.options["neck"]:
            raise UserError(
                f"--neck {options['neck']}: {start.path} has the neck {start.options['neck']}\nleave it out"
            )
        check_classes(start, classes, only_evaluated=options["evaluate"])
        load_detector(detector, start.weights, start.path)
        if start.count != len(classes):
            notes.append(f"{start.path} is for {start.count} classes: the predictor starts anew, for {len(classes)}")
    elif start.weights is not None:
        if load_backbone(detector, start.weights, stem=options["stem"]):
            notes.append(
                f"{start.path} has a stem for small images, 3x3 and without pooling: features learnt on such images "
                f"transfer poorly; better is a classifier trained with --model imagenet_{start.body}"
            )
    if options["norm"] == "syncbn" and world_size() == 1:
        notes.append("--norm syncbn: in one process this is bn")
    learning = {"trainable_layers": options["trainable_layers"], "stem_learns": options["stem"] == "random"}
    set_learning(detector, norm=options["norm"], **learning)
    return detector, notes


def check_classes(start: Start, classes: list[str], *, only_evaluated: bool) -> None:
    """Raise UserError where a detector that shall be evaluated is not for these classes."""
    if not only_evaluated:
        return
    if start.count != len(classes):
        raise UserError(
            f"{start.path}: a detector for {start.count} classes; the data has {len(classes)}\nevaluate it on data of "
            "its own classes, or train it on these: leave --evaluate out"
        )
    if start.classes and start.classes != list(classes):
        raise UserError(
            f"{start.path}: its classes ({', '.join(start.classes[:5])} ...) are not those of the data "
            f"({', '.join(classes[:5])} ...)\nboth must be the same, in the same order"
        )
