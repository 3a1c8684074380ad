"""Export a classifier for production: to a program that maps pixels to logits without this repository, or its weights.

Every format holds the same description: texts by key, where a list or a number is JSON.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.config.parser import Parser
from engine.config.select import select_kwargs
from engine.data.datasets import get_default_view, load_evaluation
from engine.data.image_set import ImageSet
from engine.data.views import CenterCrop, SquashedView
from engine.errors import UserError, get_first_error_line
from engine.inference.classifier import Classifier
from engine.runtime.checkpoint import MADE_BY
from engine.runtime.distributed import world_size
from engine.runtime.files import write_atomic
from engine.runtime.text import format_count
from evaluation.context import UNNORMALIZED, EvalContext, EvalSession
from evaluation.export_formats import FORMATS, ExportFormat, Network
from evaluation.loading import load_classifiers, note_assumed_size, prepare_inputs
from evaluation.options import merge_trained_options

CHECKED_IMAGES = 100
BATCHES = (1, 2, 7, CHECKED_IMAGES)  # numbers of images that an exported network is checked with
TOLERANCE = 1e-4  # largest difference of logits, as a fraction of the largest logit
MIN_LOGIT = 0.01  # if all logits are smaller, the fraction is of this


def run_export(parser: Parser, typed: dict, options: dict, notes: list[str]) -> dict:
    """Write the classifier of --model_path in the format of --export, and return what was written.

    typed, options, notes: what evaluation.options.read_options() returned. Raises UserError, and leaves no file
    behind, if the classifier cannot be exported or if the file computes something else.
    """
    if world_size() > 1:
        raise UserError("--export writes a single file\nstart it without torchrun")
    path = Path(options["export"])
    check_target(path)
    session = EvalSession(torch.device("cpu"), batch_size=CHECKED_IMAGES, channels_last=False)
    for line in notes:
        session.note(line)
    (classifier,) = load_classifiers(**select_kwargs(options, load_classifiers))

    # ---- Images of the check, as the classifier sees pictures ----
    as_picture = merge_trained_options(parser, typed | {"dataset": "folder"}, options, classifier)
    view = get_default_view("folder", **select_kwargs(as_picture, ["image_size", "eval_resize", "interpolation"]))
    own = merge_trained_options(parser, typed, options, classifier, dataset_needed=False)
    images, note = load_checked_images(own, view, typed)
    context = build_export_context(classifier, images, session, **select_kwargs(own, build_export_context))
    loader = context.make_loader(images, **UNNORMALIZED, whole=True)
    pixels = torch.cat([batch.images for batch in loader.epoch()])
    context.note_unreadable(loader)
    if note:
        session.note(note)

    # ---- Export ----
    classes = format_count(classifier.num_classes, "class")
    print(f"exporting {classifier.name}: {classifier.model}, {classes}, images of {view.size} pixels", flush=True)
    result = export_classifier(path, classifier, view, pixels, debug=options["debug"])
    print(
        f"checked with {result['reader']} on {format_count(len(pixels), 'image')} of {images.origin}: logits differ by "
        f"at most {result['difference']:.1e} (allowed: {result['tolerance']:.1e})\n"
        f"written: {path} ({result['bytes'] / 1e6:.1f} MB, {result['detail']})"
    )
    return result


def check_target(path: Path) -> None:
    """Raise UserError if packages of the format are missing, or if a file is in the way that --export did not write."""
    packages = FORMATS[path.suffix].packages
    if missing := [name for name in packages if not find_spec(name)]:
        raise UserError(f"--export {path}: needs {' and '.join(missing)}\npip install {' '.join(packages)}")
    if path.exists() and MADE_BY.encode() not in path.read_bytes():  # no format compresses its description
        raise UserError(f"--export {path}: this file was not written by --export; choose another name, or delete it")


def load_checked_images(options: dict, view: CenterCrop, typed: dict) -> tuple[ImageSet, str]:
    """Return up to CHECKED_IMAGES test images of the data set that `options` name, and a note. Images of `shapes` are
    drawn if it is not known or not there; if the user typed its name or place, it must be there.
    """
    wanted = {"view": view, "image_size": view.size, "limit": CHECKED_IMAGES, "any_classes": True, "download": False}
    note = "the data set of its training is not known: checked on drawn images (--dataset names it)"
    if dataset := options["dataset"]:
        try:
            return load_evaluation(**select_kwargs(options, load_evaluation) | wanted), ""
        except UserError as error:
            if {"dataset", "data_dir"} & typed.keys():
                raise
            reason = str(error).splitlines()[0]
            note = f"the images of {dataset} cannot be read: checked on drawn images ({reason})"
    drawn = load_evaluation("shapes", limit=CHECKED_IMAGES)  # of 32 pixels: drawing takes long at a large size
    return replace(drawn, resize=SquashedView(view.size, interpolation=view.interpolation)), note


def build_export_context(
    classifier: Classifier,
    images: ImageSet,
    session: EvalSession,
    *,
    dataset: str | None,
    norm: str | None,
    class_list: str | None,
) -> EvalContext:
    """Return the classifier with the images of its check. Raises UserError if its normalisation is not known.

    The parameters by name are options; class_list names the classes of a file that does not.
    """
    if not (classifier.knows_norm or norm or dataset):
        raise UserError(
            f"{classifier.path} does not store how images are normalised, and an exported file applies it\n"
            "give --norm, or the --dataset that it was trained on"
        )
    if class_list and not classifier.classes:
        classifier.set_titles(class_list, "class_list")
    elif not classifier.titles and dataset and len(images.classes) == classifier.num_classes:
        classifier.titles = images.classes
    context = EvalContext(classifier, images, dataset or "folder", torch.empty(0, dtype=torch.long), session)
    prepare_inputs(context, norm)
    note_assumed_size(context)
    if not classifier.titles:
        session.note(f"{classifier.path} stores no class names: exported without them (--class_list FILE names them)")
    return context


def describe(classifier: Classifier, view: CenterCrop) -> dict[str, str]:
    """Return the description of a classifier: how a picture becomes its input, and what its outputs are."""
    trained = {key: classifier.options.get(key) for key in ("dataset", "norm")}
    values = {"made_by": MADE_BY, "model": classifier.model, "model_args": classifier.model_args, **trained}
    values |= {"epoch": classifier.epoch, "num_classes": classifier.num_classes, "classes": classifier.titles}
    values |= {"image_size": view.size, "resize": view.resize, "interpolation": view.interpolation}
    values |= {"mean": classifier.mean, "std": classifier.std}
    known = {key: value for key, value in values.items() if value not in (None, [], {})}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in known.items()}


def export_classifier(
    path: Path, classifier: Classifier, view: CenterCrop, pixels: torch.Tensor, *, debug: bool = False
) -> dict:
    """Write a classifier to `path` after the file was checked on pixels (N, 3, H, W), and return what was measured.

    view: how a picture becomes its input. debug: show what the exporters print. Raises UserError, and leaves no file
    behind, if the classifier cannot be exported or if the file computes something else.
    """
    form, description, measured = FORMATS[path.suffix], describe(classifier, view), {}
    try:
        with silence_exporters(debug):
            save, detail = form.convert(classifier, view.size, description)
    except Exception as error:  # whatever an exporter raises for a network
        others = [f"--export {path.with_suffix(ending)}" for ending in FORMATS if ending != path.suffix]
        reason = f"{type(error).__name__}: {get_first_error_line(error)}"
        raise UserError(
            f"{path}: {classifier.name} cannot be exported ({reason})\ntry {' or '.join(others)}"
        ) from error

    def write(side: Path) -> None:
        with silence_exporters(debug):
            save(side)
            measured.update(check_logits(path, open_exported(path, form, side), classifier, pixels))

    write_atomic(path, write)
    reader = f"{form.reader} {version(form.reader)}"
    return {"file": str(path), "bytes": path.stat().st_size, "detail": detail, "reader": reader, **measured}


def open_exported(path: Path, form: ExportFormat, side: Path) -> Network:
    """Open the file `side`. Raises UserError if the reader does not take it, as an old one. path: for messages."""
    try:
        return form.open(side)
    except Exception as error:  # whatever the reader raises
        reader = f"{form.reader} {version(form.reader)}"
        reason = f"{type(error).__name__}: {get_first_error_line(error)}"
        raise UserError(
            f"{path}: not written, since {reader} cannot open it ({reason})\nupdate it: pip install -U {form.reader}"
        ) from error


@torch.no_grad()
def check_logits(path: Path, network: Network, classifier: Classifier, pixels: torch.Tensor) -> dict:
    """Return the largest difference between the logits of an exported network and its classifier, over BATCHES.

    Raises UserError if it is above the tolerance, or if the network fails on a batch. path: for messages.
    """
    expected, differences = classifier(pixels), []
    for size in dict.fromkeys(min(size, len(pixels)) for size in BATCHES):
        try:
            logits = network(pixels[:size])
        except Exception as error:  # whatever the reader raises
            raise UserError(
                f"{path}: not written, since the exported network fails on {format_count(size, 'image')} "
                f"({type(error).__name__}: {get_first_error_line(error)})"
            ) from error
        if logits.shape != expected[:size].shape:
            found = f"logits {tuple(logits.shape)} for {format_count(size, 'image')}"
            raise UserError(f"{path}: not written, since the exported network gives {found}")
        differences.append((logits - expected[:size]).abs().max())
    difference = float(torch.stack(differences).max())
    tolerance = TOLERANCE * max(MIN_LOGIT, float(expected.abs().max()))
    if not difference <= tolerance:  # also if it is NaN
        raise UserError(
            f"{path}: not written, since its logits differ from those of the network by up to {difference:.2g} "
            f"(allowed: {tolerance:.2g})"
        )
    return {"images": len(pixels), "difference": difference, "tolerance": tolerance}


@contextmanager
def silence_exporters(debug: bool) -> Iterator[None]:
    """Suppress the warnings and log messages of exporters unless debug is true."""
    if debug:
        yield
        return
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
