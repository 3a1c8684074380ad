"""Evaluate trained classifiers: python evaluate.py --model_path runs/cifar10/resnet20/my_run"""

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import models
from engine.config import resolve
from engine.config.option_types import boolean, choice, int_at_least
from engine.config.options import DATASETS, add_data_options, add_device_options
from engine.config.parser import Parser, check_output_path
from engine.errors import UserError
from engine.launch import run_main
from evaluation import options as of_tasks
from evaluation.options import ALEXNET, TASKS
from saliency import CAM_METHODS

DATA_KEYS = ("dataset", "data_dir", "val_data_dir", "image_size", "norm", "num_classes", "limit", "on_bad_image")
DATA_KEYS += ("eval_resize", "val_labels")
OF_A_CARD = {"robust_images": 1000, "output": "card.json"}  # its defaults
OF_FILES = ("imagenet", "tiny-imagenet", "folder")  # sets whose images can be seen at any size
SMALL = 128  # side in pixels of a network's images up to which they are read as train.py reads them
IGNORED = ("cutout", "trad_augment", "log_off", "parallel", "evaluate")  # other codes take them; they change nothing


def build_parser() -> Parser:
    parser = Parser("Evaluate one or more trained classifiers on the test images, which are never augmented.")
    parser.group("what")
    parser.option(
        "--model_path",
        "--checkpoint",
        "--resume",
        nargs="+",
        metavar="PATH",
        help="files of weights, run folders (best.pt), or NAME=FILE for a network of torchvision's",
    )
    parser.option("--info", type=boolean, default=False, help="tell what the files hold and evaluate nothing")
    parser.option("--task", type=choice(TASKS), default="accuracy", metavar="NAME", help=", ".join(TASKS))
    parser.option(
        "--model", "--arch", "--model_name", metavar="NAME", shown="from the file", help="ours or torchvision's"
    )
    parser.option("--ema", type=boolean, default=False, help="use the averaged weights of a run with --ema")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=500)
    parser.option(
        "--seed", type=int_at_least(), default=0, help="of what is drawn: noise, starts of attacks, held-out images"
    )
    parser.option("--class_list", metavar="FILE", help="all classes of the network in order, one a line or in a .csv")
    parser.option("--output", "-o", metavar="FILE.json", help="everything as JSON; card: and FILE.md and FILE.png")
    of_tasks.task_options(parser, CAM_METHODS)
    add_data_options(parser, DATASETS, named_by="from the file")
    add_device_options(parser, amp="off")
    parser.group("taken and ignored")
    for name in IGNORED:
        parser.option(f"--{name}", type=boolean, help="no effect here")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every file; returns what --output holds."""
    parser = build_parser()
    typed, _ = resolve.read_options(parser, argv)
    task = typed.get("task", "accuracy")
    parser.defaults |= OF_A_CARD if task == "card" else {}
    options = {**parser.defaults, **typed}
    notes = check(parser, task, typed, options)

    from engine.inference.classifier import SavedClassifier
    from engine.runtime import distributed
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from evaluation.context import check_same_evaluation
    from evaluation.reports import report
    from evaluation.tasks import MEASURES, divide_errors, under_corruption

    if typed.get("info"):
        return [print_info(SavedClassifier(path)) for path in typed["model_path"]]
    device = choose_device(options["device"])
    distributed.init_processes(device, options["timeout"])
    setup_backends(device, seed=0, deterministic=False)
    where = {"device": device, "precision": choose_precision(options["amp"], device)[0]}
    for note in notes:
        print(f"note: {note}")
    shared, subjects, plans = {}, [], []
    for classifier in load_classifiers(typed, options):
        subject, known = load_subject(parser, classifier, typed, shared, **where)
        measure = MEASURES[task] if len(subjects) < len(typed["model_path"]) else under_corruption
        subjects.append(subject)
        with in_the_name_of(subject):  # what is missing is said now, not when the others have worked for an hour
            plans.append(measure(subject, known, maps_of))
    if task != "accuracy":
        check_same_evaluation(subjects, f"--task {task}")
    results = [measured(subject, plan) for subject, plan in zip(subjects, plans, strict=True)]
    distributed.shut_down_processes()
    if not distributed.is_main_process():
        return []
    results, references = results[: len(typed["model_path"])], results[len(typed["model_path"]) :]
    if of_tasks.reads_reference(task, options):
        divide_errors(results, references)
    command = shlex.join(["python", "evaluate.py", *map(str, sys.argv[1:] if argv is None else argv)])
    report(task, results, options | {"command": command})
    return results


def check(parser: Parser, task: str, typed: dict, options: dict) -> list[str]:
    """End with a usage error where the options do not go together or a place cannot be written to. Returns notes: which
    have no effect.
    """
    if "model_path" not in typed:
        parser.error("--model_path FILE: which classifier shall be evaluated?")
    if "confusion" in typed and len(typed["model_path"]) > 1:
        parser.error("--confusion draws one classifier; give one --model_path")
    try:
        of_tasks.check_task(task, options)
    except ValueError as error:
        parser.error(str(error))
    for key in ("figure", "confusion"):
        if not (options[key] or ".png").endswith(".png"):
            parser.error(f"--{key} {options[key]}: the picture is a .png")
    for key in ("output", "figure", "confusion"):
        if options[key]:
            check_output_path(parser, f"--{key}", Path(options[key]))
    notes = []
    if ignored := [f"--{name}" for name in IGNORED if name in typed]:
        notes.append(f"without effect on an evaluation: {', '.join(ignored)}")
    if ignored := of_tasks.without_effect(parser, task, typed):
        notes.append(f"without effect here: {', '.join(ignored)}")
    return notes


def print_info(file) -> dict:
    """What a file holds, as far as it says or its shapes tell."""
    info = {
        "file": str(file.path),
        "network": file.options.get("model") or " or ".join(models.matching_models(file.weights)) or "none of ours",
        "classes": models.class_count(file.weights) or None,
        "epoch": file.epoch,
        "parameters": sum(value.numel() for value in file.weights.values()),
        "entries": len(file.weights),
        "first": ", ".join(list(file.weights)[:3]),
        "trained with": " ".join(
            f"--{key} {file.options[key]}" for key in ("dataset", "method", "recipe") if file.options
        ),
    }
    print("\n".join(f"{key:12} {value}" for key, value in info.items() if value not in (None, "")))
    return info


def load_classifiers(typed: dict, options: dict) -> list:
    """The classifiers of --model_path and, if it is one, that of --reference, with names that tell them apart."""
    from engine.inference.classifier import load_classifier, make_names_unique

    known = {"image_size": typed.get("image_size"), "averaged": options["ema"]}
    found = [load_classifier(path, models, model=options["model"], **known) for path in typed["model_path"]]
    if of_tasks.reads_reference(options["task"], options) and options["reference"] != ALEXNET:
        found.append(load_classifier(options["reference"], models, **known))
    make_names_unique(found)
    often = Counter()
    for classifier in found:  # of one file that is given twice
        often[classifier.name] += 1
        classifier.name += f" ({often[classifier.name]})" if often[classifier.name] > 1 else ""
    return found


def load_subject(parser: Parser, classifier, typed: dict, shared: dict, device, precision) -> tuple:
    """A classifier with its images, and all options, those it was trained with too. shared: what was read so far."""
    from engine.config.select import select_kwargs
    from engine.data.class_names import map_labels, read_class_list
    from engine.data.image_set import STATISTICS, STATISTICS_OF, select_classes
    from evaluation.context import EvalContext

    trained, path = classifier.options, classifier.path
    options = {**parser.defaults, **{key: trained[key] for key in DATA_KEYS if key in trained}, **typed}
    dataset = options["dataset"]
    if not dataset:
        parser.error(f"--dataset: {path} does not say what it was trained on; name it")
    if dataset in OF_FILES and not options["image_size"] and classifier.image_size > SMALL:
        options["image_size"] = classifier.image_size
        if dataset == "imagenet" and not options["eval_resize"]:
            options["eval_resize"] = classifier.resize
    data = load_images(options, typed, shared)
    classes = classifier.classes or (read_class_list(options["class_list"]) if options["class_list"] else data.classes)
    if not (classifier.classes or options["class_list"]) and classifier.count != len(data.classes):
        raise UserError(
            f"{path}: made for {classifier.count} classes, which it does not name; the data has {len(data.classes)}\n"
            f"name them in order with --class_list FILE; to fine-tune it, train with --init_from {path}"
        )
    place = map_labels(data.classes, classifier.classes, options["class_list"], classifier.count)
    part = select_classes(data, place, classes)
    unsaid = None
    if "norm" in typed or not (classifier.torchvision or trained):  # which say how their images were normalised
        norm = STATISTICS_OF.get(dataset, dataset) if options["norm"] == "own" else options["norm"]
        classifier.mean, classifier.std = STATISTICS[norm]
        unsaid = None if trained or "norm" in typed else norm
    layout = select_kwargs(options, ["batch_size", "workers", "channels_last", "seed"])
    layout |= {"precision": precision, "held_share": options["held_out"], "shared": shared}
    subject = EvalContext(classifier.name, classifier, part, dataset, place, device, **layout)
    if unsaid:
        subject.note(f"{path} does not say how its images were normalised; taken: as {unsaid} (--norm names another)")
    if (known := int((place >= 0).sum())) < len(classes):
        subject.note(f"{classifier.name} has {len(classes)} classes, of which the data has {known}")
    if left_out := len(data) - len(part):
        subject.note(f"{left_out:,} images are of a class that {path} does not know, and are left out")
    if not len(part):
        raise UserError(f"{path}: none of the {len(data):,} images is of a class that it knows\ntake more images")
    return subject, options


def load_images(options: dict, typed: dict, shared: dict):
    """The test part that the options mean, read once."""
    from engine.config.select import select_kwargs
    from engine.data.datasets import load_evaluation
    from engine.runtime.distributed import check_same_value
    from engine.runtime.progress import progress_bar

    key = str({name: options[name] for name in DATA_KEYS})
    if key not in shared:
        part = shared[key] = load_evaluation(progress=progress_bar, **select_kwargs(options, load_evaluation))
        check_same_value("data", {"test images": len(part)}, "every machine needs the same copy of the data set")
        print(part.summary("test"))
        if options["limit"]:
            why = "" if "limit" in typed else ", as in its training; --limit 0 takes all"
            print(f"note: --limit {options['limit']}{why}: results are partial")
    return shared[key]


@contextmanager
def in_the_name_of(subject):
    """What cannot be measured of a classifier, such as logits that are no numbers, ends the call with its name."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{subject.name}: {error}") from error


def measured(subject, plan: Callable[[], dict]) -> dict:
    """The result of a classifier."""
    with in_the_name_of(subject):
        result = {"name": subject.name, "file": subject.classifier.path, **plan()}
    subject.kept.clear()  # pictures and predictions, which another one has no use for
    return result


def maps_of(subject, options: dict) -> Callable:
    """A function of normalised images (B, 3, H, W) and labels (B,) that gives maps (B, H, W) in 0..1, and logits.

    Raises ValueError where the network has no such maps.
    """
    import torch

    from evaluation.localization import classic_map
    from saliency.cam.maps import ActivationMaps, enlarged

    finder = ActivationMaps(subject.classifier.network, options["method"], layer=options["layer"])

    def maps(images, labels):
        raw, size = finder(images, labels), tuple(images.shape[-2:])
        return classic_map(raw, size) if options["classic"] else enlarged(raw, size), finder.logits

    if options["method"] != "scorecam":  # which takes as many passes as there are channels
        maps(
            torch.zeros(1, 3, subject.size, subject.size, device=subject.device),
            torch.tensor([0], device=subject.device),
        )
    return maps


if __name__ == "__main__":
    run_main(main)
