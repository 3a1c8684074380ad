"""Load the classifiers to evaluate and their test images."""

from collections import Counter

import models
from engine.config.option_types import format_option
from engine.data.class_names import map_labels, read_class_list
from engine.data.datasets import load_evaluation
from engine.data.image_set import DEFAULT_STATISTICS, STATISTICS, ImageSet, select_classes
from engine.errors import UserError
from engine.inference.classifier import (
    Classifier,
    SavedClassifier,
    load_classifier,
    make_names_unique,
)
from engine.runtime.distributed import check_same_value
from engine.runtime.progress import progress_bar
from evaluation.context import EvalContext, EvalSession
from evaluation.task_options import ALEXNET


def print_info(path: str) -> dict:
    """Print and return what a checkpoint contains, as far as it is stored or can be inferred from the tensor shapes."""
    file = SavedClassifier(path)
    values = {key: file.options.get(key) for key in ("dataset", "method", "method_weights", "recipe")}
    info = {
        "file": str(file.path),
        "network": file.model or " or ".join(models.find_matching_models(file.weights)) or "unknown",
        "arguments": " ".join(f"{key}={value}" for key, value in file.model_args.items()),
        "classes": file.num_classes or models.count_classes(file.weights) or None,
        "epoch": file.epoch,
        "parameters": sum(value.numel() for value in file.weights.values()),
        "tensors": len(file.weights),
        "first keys": ", ".join(list(file.weights)[:3]),
        "trained with": " ".join(f"--{key} {format_option(value)}" for key, value in values.items() if value),
    }
    print("\n".join(f"{key:12} {value}" for key, value in info.items() if value not in (None, "")))
    return info


def load_classifiers(
    model_path: list[str],
    reference: str | None,
    model: str | None,
    model_args: dict | None,
    image_size: int | None,
    ema: bool,
) -> list[Classifier]:
    """Return the classifiers of --model_path, then that of --reference if it names one, under distinct names.

    model, model_args: architecture of files that do not store it. image_size: the same. ema: load the averaged weights.
    """
    common, given = {"image_size": image_size, "averaged": ema}, {"model": model, "model_args": model_args}
    loaded = [load_classifier(path, models, **given, **common) for path in model_path]
    loaded += [load_classifier(reference, models, **common)] if reference not in (None, ALEXNET) else []
    make_names_unique(loaded)
    count = Counter()
    for classifier in loaded:  # the same file may be given twice
        count[classifier.name] += 1
        classifier.name += f" ({count[classifier.name]})" if count[classifier.name] > 1 else ""
    return loaded


def load_images(session: EvalSession, limit_typed: bool, *, limit: int, **options) -> ImageSet:
    """Return the test images, read once for all classifiers that use the same data.

    limit_typed: whether --limit was typed; otherwise it comes from the training run. options: the other options of
    engine.data.datasets.load_evaluation().
    """

    def load() -> ImageSet:
        data = load_evaluation(progress=progress_bar, limit=limit, **options)
        check_same_value("data", {"test images": len(data)}, "use the same copy of the data set on every machine")
        print("\n".join([data.summary("test"), *(f"note: {line}" for line in data.notes)]))
        if limit:
            origin = "" if limit_typed else " (from the training run; --limit 0 takes all images)"
            print(f"note: --limit {limit}{origin}: results are partial")
        return data

    return session.cached(f"{limit} {options}", load)


def build_context(
    classifier: Classifier, data: ImageSet, session: EvalSession, dataset: str, class_list: str | None, norm: str | None
) -> EvalContext:
    """Return the classifier with those of the images whose class it has.

    class_list: file that names the classes, for a checkpoint that does not. norm: whose mean and std to use; None:
    those of its training. Raises UserError if the classes are unknown or no image is left.
    """
    path, has_names = classifier.path, bool(classifier.classes or class_list)
    if not has_names and classifier.num_classes != len(data.classes):
        raise UserError(
            f"{path} has {classifier.num_classes} classes and stores no class names; "
            f"the data set has {len(data.classes)}\n"
            "list all class names, in order, in --class_list FILE; to fine-tune on this data, train with "
            f"--init_from {path}"
        )
    classes = classifier.classes or (read_class_list(class_list) if class_list else data.classes)
    class_map = map_labels(data.classes, classifier.classes, class_list, classifier.num_classes)
    image_set = select_classes(data, class_map, classes)
    context = EvalContext(classifier, image_set, dataset, class_map, session)
    prepare_inputs(context, norm)
    if (known := int((class_map >= 0).sum())) < len(classes):
        session.note(f"{classifier.name} has {len(classes)} classes; the data set has {known} of them")
    if left_out := len(data) - len(image_set):
        images = "1 image is" if left_out == 1 else f"{left_out:,} images are"
        session.note(f"{images} left out: {path} does not have the class")
    if not len(image_set):
        raise UserError(
            f"{path}: none of the {len(data):,} images belongs to one of its classes\n"
            "evaluate more images (--limit 0), or choose another --dataset"
        )
    return context


def prepare_inputs(context: EvalContext, norm: str | None) -> None:
    """Check that the classifier takes images of this size, and set its mean and std. norm: see build_context()."""
    classifier, session = context.classifier, context.session
    if models.split_model_name(classifier.model)[0]:  # some take images of one size, or of a least size
        classifier.check_size(context.image_size)
    if context.dataset == "folder":
        note_assumed_size(context)
    if norm or not classifier.knows_norm:
        name = DEFAULT_STATISTICS.get(context.dataset, context.dataset) if norm in (None, "own") else norm
        classifier.mean, classifier.std = STATISTICS[name]
        if not norm:
            session.note(
                f"{classifier.path} does not store how images are normalised; using {name} (--norm changes it)"
            )
    elif classifier.norm_note:
        session.note(classifier.norm_note)


def note_assumed_size(context: EvalContext) -> None:
    """Print a note if the size of the images is that of similar networks, since the file does not store it."""
    if not context.classifier.knows_size:
        using = f"using {context.image_size} pixels (--image_size changes it)"
        context.session.note(f"{context.classifier.path} does not store the size of its training images; {using}")
