"""The classifiers of an evaluation and their images."""

from collections import Counter

import models
from engine.data.class_names import map_labels, read_class_list
from engine.data.datasets import load_evaluation
from engine.data.image_set import DEFAULT_STATISTICS, STATISTICS, ImageSet, select_classes
from engine.errors import UserError
from engine.inference.classifier import Classifier, SavedClassifier, load_classifier, make_names_unique
from engine.runtime.distributed import check_same_value
from engine.runtime.progress import progress_bar
from evaluation.context import EvalContext, EvalSession
from evaluation.options import ALEXNET


def print_info(path: str) -> dict:
    """What a file holds, as far as it says so or the shapes of its tensors tell."""
    file = SavedClassifier(path)
    trained_with = [f"--{key} {file.options[key]}" for key in ("dataset", "method", "recipe") if file.options]
    info = {
        "file": str(file.path),
        "network": file.options.get("model")
        or " or ".join(models.find_matching_models(file.weights))
        or "none of ours",
        "classes": models.count_classes(file.weights) or None,
        "epoch": file.epoch,
        "parameters": sum(value.numel() for value in file.weights.values()),
        "entries": len(file.weights),
        "first": ", ".join(list(file.weights)[:3]),
        "trained with": " ".join(trained_with),
    }
    print("\n".join(f"{key:12} {value}" for key, value in info.items() if value not in (None, "")))
    return info


def load_classifiers(
    model_path: list[str], reference: str | None, model: str | None, image_size: int | None, ema: bool
) -> list[Classifier]:
    """The classifiers of --model_path, then that of --reference if it names one, under names that tell them apart.

    model: the network of files that do not say which. image_size: of files that do not say it. ema: take the averaged
    weights.
    """
    words = [(path, model) for path in model_path]
    words += [(reference, None)] if reference not in (None, ALEXNET) else []
    found = [load_classifier(path, models, model=model, image_size=image_size, averaged=ema) for path, model in words]
    make_names_unique(found)
    count = Counter()
    for classifier in found:  # the same file may be given twice
        count[classifier.name] += 1
        classifier.name += f" ({count[classifier.name]})" if count[classifier.name] > 1 else ""
    return found


def load_images(session: EvalSession, limit_typed: bool, *, limit: int, **where) -> ImageSet:
    """The test images, read once for all classifiers of the same data.

    limit_typed: whether --limit was given; else it is that of a training. where: the other options of
    engine.data.datasets.load_evaluation().
    """

    def load() -> ImageSet:
        data = load_evaluation(progress=progress_bar, limit=limit, **where)
        check_same_value("data", {"test images": len(data)}, "use the same copy of the data set on every machine")
        print(data.summary("test"))
        if limit:
            origin = "" if limit_typed else ", as in its training; --limit 0 takes all"
            print(f"note: --limit {limit}{origin}: results are partial")
        return data

    return session.cached(f"{limit} {where}", load)


def build_context(
    classifier: Classifier, data: ImageSet, session: EvalSession, dataset: str, class_list: str | None, norm: str | None
) -> EvalContext:
    """The classifier with those of the images whose class it knows.

    class_list: a file of its classes, where its own does not name them. norm: whose mean and std it takes; None: those
    of its training. Raises UserError where its classes cannot be told, and where it knows none of the images.
    """
    path, named = classifier.path, bool(classifier.classes or class_list)
    if not named and classifier.num_classes != len(data.classes):
        raise UserError(
            f"{path}: made for {classifier.num_classes} classes, which it does not name; "
            f"the data has {len(data.classes)}\n"
            f"name them in order with --class_list FILE; to fine-tune it, train with --init_from {path}"
        )
    classes = classifier.classes or (read_class_list(class_list) if class_list else data.classes)
    class_map = map_labels(data.classes, classifier.classes, class_list, classifier.num_classes)
    image_set = select_classes(data, class_map, classes)
    context = EvalContext(classifier, image_set, dataset, class_map, session)
    stated = classifier.is_torchvision or bool(classifier.options)
    if norm or not stated:
        name = DEFAULT_STATISTICS.get(dataset, dataset) if norm in (None, "own") else norm
        classifier.mean, classifier.std = STATISTICS[name]
        if not (norm or stated):
            session.note(f"{path} does not say how its images were normalised; taken: as {name} (--norm names another)")
    if (known := int((class_map >= 0).sum())) < len(classes):
        session.note(f"{classifier.name} has {len(classes)} classes, of which the data has {known}")
    if left_out := len(data) - len(image_set):
        session.note(f"{left_out:,} images are of a class that {path} does not know, and are left out")
    if not len(image_set):
        raise UserError(f"{path}: none of the {len(data):,} images is of a class that it knows\ntake more images")
    return context
