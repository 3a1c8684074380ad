"""What the scoring commands share: which extractors, on which images, and where results are kept."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import models
from engine.config.parser import Parser
from engine.config.phases import default_eval_resize
from engine.data.datasets import load_evaluation
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.data.views import CenterCrop, SquashedView
from engine.errors import UserError
from engine.inference.classifier import load_classifier
from engine.runtime.files import write_json
from engine.runtime.progress import progress_bar
from saliency.casm.extractors import (
    Extractor,
    basics_extractor,
    casm_extractor,
    classifier_extractor,
    naive_extractor,
    source_extractor,
)
from saliency.casm.network import casm_files, load_casm

RESULT_OPTIONS = (  # options that decide a result
    *("data", "dataset", "val_data_dir", "val_labels", "num_classes", "image_size", "limit", "on_bad_image", "seed"),
    *("annotation_path", "break_ratio", "not_normalize", "class_list", "rule", "judge", "basics", "pot"),
    *("batch_size", "classifiers", "resnets_path", "classifier", "amp"),
)
DATA_PLACE_OPTIONS = ("val_data_dir", "val_labels", "num_classes")  # options that a trained file may know
LARGE_SIDE = 128  # side in pixels above which evaluation images are cut out of larger ones


def iter_extractors(
    options: dict, device: torch.device, naive: tuple[str, ...] = ("max", "center")
) -> Iterator[Extractor]:
    """Those that the command line names, one after the other, so that one network at a time is in memory.

    naive: what --toy means. Raises UserError for files that are not what they should be.
    """
    files = casm_files(options["casms_path"] or []) if not options["basics"] else []
    names = [path.stem for path in files]
    for path in files:
        extractor = casm_extractor(load_casm(path), device)
        twice = names.count(path.stem) > 1
        yield replace(extractor, name=f"{path.parent.name}/{extractor.name}") if twice else extractor
    if options["basics"]:
        for path in options["casms_path"] or [""]:
            yield basics_extractor(options["basics"], path)
    classifier = None
    if options.get("classifier"):
        classifier = classifier_extractor(
            load_classifier(options["classifier"], models, model=options["arch"], image_size=options["image_size"]),
            device,
        )
    elif files and (options.get("sources") or (options["toy"] and naive)):
        classifier = casm_extractor(load_casm(files[0]), device)
    for name in options.get("sources") or []:
        yield source_extractor(name, classifier)
    for name in naive if options["toy"] else ():
        yield naive_extractor(name, classifier)


class ImageSetCache:
    """The evaluation images as the extractors want to see them, each kind read once."""

    def __init__(self, parser: Parser, options: dict):
        self.parser, self.options, self.loaded = parser, options, {}

    def of(self, extractor: Extractor, *, larger: bool = False, squeezed: bool = False) -> tuple[ImageSet, str]:
        """The part, and the name of its data set. larger: cut out of a larger image, as classifiers are evaluated,
        where images are large; else out of one whose shorter side is all of it. squeezed: the whole, out of shape.
        """
        options, own = self.options, extractor.options
        known = own.get("dataset") or "folder"
        drawn = known == "shapes" and options.get("data")  # a place was named, and shapes has none
        dataset = options["dataset"] or ("folder" if drawn else known)
        place = options.get("data") or own.get("data_dir")
        if place is None and dataset in ("folder", "imagenet"):
            self.parser.error("DATA is missing: the folder that holds val/ with class folders; or name a --dataset")
        size = options["image_size"] or extractor.image_size
        known = {key: own[key] for key in DATA_PLACE_OPTIONS if own.get(key)} if not options.get("data") else {}
        if dataset not in ("shapes", "imagenet"):
            known.pop("num_classes", None)
        known |= {key: options[key] for key in (*DATA_PLACE_OPTIONS, "limit", "on_bad_image") if options.get(key)}
        view = None
        if dataset in ("folder", "imagenet", "tiny-imagenet"):
            size = size or 224
            resize = default_eval_resize(size) if larger and size > LARGE_SIDE else size
            view = SquashedView(size) if squeezed else CenterCrop(size, resize)
        key = (dataset, place, size, view, tuple(known.items()))
        if key not in self.loaded:
            chosen = {"view": view} if view else {"image_size": size}
            self.loaded[key] = load_evaluation(
                dataset, data_dir=place or "data", **chosen, **known, progress=progress_bar
            )
            print(self.loaded[key].summary("val"), flush=True)
        return self.loaded[key], dataset


def make_loader(part: ImageSet, extractor: Extractor, options: dict, device: torch.device) -> DeviceLoader:
    """Normalised as the extractor wants it, or not at all with --not-normalize."""
    mean, std = extractor.mean, extractor.std
    if options.get("not_normalize"):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return DeviceLoader(part, options["batch_size"], device=device, mean=mean, std=std, workers=options["workers"])


def result_file(name: str, options: dict) -> Path:
    return Path(options["log_path"]) / f"{name.replace('/', '_')}.json"


def read_finished(extractor: Extractor, options: dict, holds: str) -> dict | None:
    """What --save-to-file has kept of this extractor under these options, if it has. Raises UserError for a file
    without `holds`, which is of another command.
    """
    if not options["save_to_file"]:
        return None
    path = result_file(extractor.name, options)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if holds not in result:
            raise ValueError(f"it holds no {holds}")
    except ValueError as error:
        raise UserError(
            f"{path}: not a result of this command ({error})\ndelete it, or name another --log-path"
        ) from error
    if result.get("made_of") != result_key(extractor, options):
        print(f"{extractor.name}: {path} is of another file or other options, and is made anew")
        return None
    print(f"{extractor.name}: done already, read from {path}")
    return result


def result_key(extractor: Extractor, options: dict) -> dict:
    """What a result depends on: the file it is of and the options that say how and on what, files with their state."""
    chosen = {key: options[key] for key in RESULT_OPTIONS if options.get(key) is not None}
    return {key: add_file_state(value) for key, value in {"file": extractor.path, **chosen}.items()}


def add_file_state(value):
    """The path of a file with its size and time, so that another of that name is told apart; anything else as it is."""
    if not isinstance(value, str) or not Path(value).is_file():
        return value
    stat = Path(value).stat()
    return {"path": str(Path(value).resolve()), "size": stat.st_size, "time": stat.st_mtime_ns}


def save_result(result: dict, extractor: Extractor, options: dict) -> None:
    if options["save_to_file"]:
        result["made_of"] = result_key(extractor, options)
        path = result_file(result["name"], options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
