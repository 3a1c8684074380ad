"""What score and eval share: which masks, on which images, and the files that hold results."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import models
from engine.config.parser import Parser
from engine.config.phases import LARGE_SIDE, default_eval_resize
from engine.data.datasets import load_evaluation
from engine.data.image_set import ImageSet
from engine.data.views import CenterCrop, SquashedView
from engine.inference.classifier import load_classifier
from engine.runtime.files import write_json
from engine.runtime.progress import progress_bar
from saliency.casm.extractors import (
    NAIVE_MASKS,
    Extractor,
    build_casm_extractor,
    build_naive_extractor,
    build_source_extractor,
    load_basics_extractor,
    wrap_classifier,
)
from saliency.casm.network import find_casm_files, load_casm

EXTRACTOR_OPTIONS = ("casms_path", "basics", "sources", "classifier", "arch", "model_args", "image_size", "seed")
DATA_OPTIONS = ("data", "dataset", "val_data_dir", "val_labels", "num_classes", "image_size", "limit", "on_bad_image")
SCORE_OPTIONS = ("annotation_path", "break_ratio", "not_normalize", "class_list", "rule", "judge", "basics", "pot")
EVAL_OPTIONS = ("batch_size", "classifiers", "resnets_path", "classifier", "amp")
RESULT_OPTIONS = (*DATA_OPTIONS, "seed", *SCORE_OPTIONS, *EVAL_OPTIONS)  # all options that a result depends on
RESULT_KEYS = {"score": "LE", "eval": "masked_in"}  # by them the results of a command are recognised
SAVED_IMAGE_OPTIONS = ("val_data_dir", "val_labels", "num_classes")  # taken from the checkpoint where not given


@dataclass(frozen=True)
class ScoringConfig:
    """Options of score and eval, under the names of their flags. The last three belong to score only."""

    batch_size: int = 128
    workers: int = 0
    pot: float = 1.0
    print_freq: int = 10
    class_list: str | None = None
    rule: str = "percentile"
    break_ratio: bool = False
    not_normalize: bool = False


def iter_extractors(
    device: torch.device,
    *,
    naive: Sequence[str] = (),
    casms_path: list[str] | None = None,
    basics: str | None = None,
    sources: list[str] | None = None,
    classifier: str | None = None,
    arch: str | None = None,
    model_args: dict | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Iterator[Extractor]:
    """Yield the extractors of the command line one by one, so that only one network at a time is in memory.

    First come the CASM checkpoints, or the extractors of the file `basics`; then `sources`, then the `naive` masks.
    Sources and the naive masks of score read `classifier`, or else the first checkpoint. The other naive masks are
    drawn for images as the first extractor takes them. Raises UserError for files that cannot be used.
    """
    files, first = find_casm_files(casms_path or []) if not basics else [], None
    names = [path.stem for path in files]
    for path in files:
        extractor = build_casm_extractor(load_casm(path), device)
        if names.count(path.stem) > 1:
            extractor = replace(extractor, name=f"{path.parent.name}/{extractor.name}")
        first = first or extractor
        yield extractor
    for path in (casms_path or [""]) if basics else []:
        extractor = load_basics_extractor(basics, path)
        first = first or extractor
        yield extractor
    base = None
    if classifier:
        given = {"model": arch, "model_args": model_args, "image_size": image_size}
        base = wrap_classifier(load_classifier(classifier, models, **given), device)
    elif files and (sources or set(naive) & set(NAIVE_MASKS)):
        base = build_casm_extractor(load_casm(files[0]), device)
    for name in sources or []:
        yield build_source_extractor(name, base)
    for name in naive:
        yield build_naive_extractor(name, base if name in NAIVE_MASKS else first, seed=seed)


@dataclass
class ImageSetCache:
    """Evaluation images as the extractors take them; images that several extractors share are read once.

    The fields are options under the names of their flags. They override what a checkpoint says of its data.
    """

    parser: Parser
    data: str | None = None
    dataset: str | None = None
    val_data_dir: str | None = None
    val_labels: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    limit: int = 0
    on_bad_image: str = "stop"
    loaded: dict[tuple, ImageSet] = field(default_factory=dict)

    def load(self, extractor: Extractor, *, margin: bool = False, squash: bool = False) -> tuple[ImageSet, str]:
        """Return the images and the name of their dataset.

        By default the shorter side is resized to the size of the crop. margin: resize large images to more than that
        before the center crop, as classifiers are evaluated. squash: resize both sides and ignore the aspect ratio.
        """
        saved = extractor.options
        dataset = saved.get("dataset") or "folder"
        if dataset == "shapes" and self.data:  # shapes is generated, so a given folder means another dataset
            dataset = "folder"
        dataset = self.dataset or dataset
        data_dir = self.data or saved.get("data_dir")
        if data_dir is None and dataset in ("folder", "imagenet"):
            self.parser.error("DATA is missing: name the folder that holds val/ with class folders, or give --dataset")
        image_options = {key: saved[key] for key in SAVED_IMAGE_OPTIONS if saved.get(key)} if not self.data else {}
        if dataset != "shapes":  # the classes of image files are their folders
            image_options.pop("num_classes", None)
        given = vars(self)
        image_options |= {key: given[key] for key in (*SAVED_IMAGE_OPTIONS, "limit", "on_bad_image") if given[key]}
        size, view = self.image_size or extractor.image_size, None
        if dataset in ("folder", "imagenet", "tiny-imagenet"):
            size = size or 224
            resize = default_eval_resize(size) if margin and size > LARGE_SIDE else size
            view = SquashedView(size) if squash else CenterCrop(size, resize)
        key = (dataset, data_dir, size, view, tuple(image_options.items()))
        if key not in self.loaded:
            image_options |= {"view": view} if view else {"image_size": size}
            self.loaded[key] = load_evaluation(
                dataset, data_dir=data_dir or "data", **image_options, any_classes=True, progress=progress_bar
            )
            image_set = self.loaded[key]
            notes = (f"note: {line}" for line in image_set.notes)
            print("\n".join([image_set.summary("validation"), *notes]), flush=True)
        return self.loaded[key], dataset


class ResultFolder:
    """The folder of --save_to_file: NAME.COMMAND.json per extractor, with the options that the result depends on.

    score and eval may share a folder. Results of versions that called them NAME.json are still read.
    """

    def __init__(self, command: str, options: dict):
        self.command = command
        self.folder = Path(options["log_path"]) if options["save_to_file"] else None
        self.settings = {key: options[key] for key in RESULT_OPTIONS if options.get(key) is not None}

    def get_path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.{self.command}.json"

    def describe(self, extractor: Extractor) -> dict:
        """Return what the result of an extractor depends on: its file and the options, with the state of each file."""
        return {key: add_file_state(value) for key, value in {"file": extractor.path, **self.settings}.items()}

    def find(self, extractor: Extractor) -> tuple[Path, dict] | None:
        """Return the path and content of the saved result of this extractor. None: there is none, or it is broken."""
        path = self.get_path(extractor.name)
        earlier = path.with_name(path.name.removesuffix(f".{self.command}.json") + ".json")
        for candidate in filter(Path.is_file, (path, earlier)):
            try:
                result = json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError:
                continue
            if isinstance(result, dict) and RESULT_KEYS[self.command] in result:
                return candidate, result
        return None

    def read(self, extractor: Extractor) -> dict | None:
        """Return the saved result of this extractor with these options, or None."""
        if not self.folder or not (found := self.find(extractor)):
            return None
        path, result = found
        if result.get("made_of") != self.describe(extractor):
            print(f"{extractor.name}: {path} was made from another file or with other options; computing it again")
            return None
        print(f"{extractor.name}: done already; read from {path}")
        return result

    def write(self, result: dict, extractor: Extractor) -> None:
        """Save a result if --save_to_file was given."""
        if self.folder:
            result["made_of"] = self.describe(extractor)
            path = self.get_path(result["name"])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, result)


def add_file_state(value):
    """Return the path, size and modification time of an existing file, to notice when it changes; else the value."""
    if not isinstance(value, str) or not Path(value).is_file():
        return value
    stat = Path(value).stat()
    return {"path": str(Path(value).resolve()), "size": stat.st_size, "time": stat.st_mtime_ns}
