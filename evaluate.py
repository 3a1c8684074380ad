"""Evaluate trained classifiers: python evaluate.py --model_path runs/cifar10/resnet20/my_run"""

import shlex
import sys
from pathlib import Path

import models
from engine import configure
from engine.cli import Parser, UserError, one_of, run, whole, yes_no
from engine.evaluation.options import BUILT_IN, NONE, TASKS, task_options, without_effect
from engine.options import DATASETS, data_options, device_options
from saliency import CAM_METHODS

DATA_KEYS = ("dataset", "data_dir", "val_data_dir", "image_size", "norm", "num_classes", "limit", "on_bad_image")
DATA_KEYS += ("eval_resize", "val_labels")
WITH_BOXES = ("shapes", "tiny-imagenet")  # sets that bring their own true boxes
CARD_IMAGES = 1000  # that attacks, corruptions and occlusion take for a card
SMALL = 128  # side in pixels up to which a folder is read as train.py reads it unless told otherwise
IGNORED = (
    "cutout",
    "trad_augment",
    "log_off",
    "parallel",
    "evaluate",
)  # other codes take them here; they change nothing


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
    parser.option("--info", type=yes_no, default=False, help="tell what the files hold and evaluate nothing")
    parser.option("--task", type=one_of(TASKS), default="accuracy", metavar="NAME", help=", ".join(TASKS))
    parser.option(
        "--model", "--arch", "--model_name", metavar="NAME", shown="from the file", help="ours or torchvision's"
    )
    parser.option("--ema", type=yes_no, default=False, help="use the averaged weights of a run with --ema")
    parser.option("--batch_size", "-b", type=whole(1), default=500)
    parser.option("--seed", type=whole(), default=0, help="of what is drawn: noise, starts of attacks, held-out images")
    parser.option("--class_list", metavar="FILE", help="all classes of the network in order, one a line or in a .csv")
    parser.option("--output", "-o", metavar="FILE.json", help="everything as JSON; card: and FILE.md and FILE.png")
    task_options(parser, CAM_METHODS)
    data_options(parser, DATASETS, named_by="from the file")
    device_options(parser, amp="off")
    parser.group("taken and ignored")
    for name in IGNORED:
        parser.option(f"--{name}", type=yes_no, help="no effect here")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every file; returns what --output holds."""
    parser = build_parser()
    typed, _ = configure.read(parser, argv)
    check(parser, typed)

    from engine import distributed
    from engine.classifier import SavedClassifier
    from engine.device import choose_device, choose_precision, prepare
    from engine.evaluation.reports import report
    from engine.evaluation.robustness import add_mean_errors

    if typed.get("info"):
        return [print_info(SavedClassifier(path)) for path in typed["model_path"]]
    options = {**parser.defaults, **typed}
    device = choose_device(options["device"])
    distributed.start(device, options["timeout"])
    prepare(device, seed=0, deterministic=False)
    precision = choose_precision(options["amp"], device)[0]
    measure, loaded, results = MEASURES[options["task"]], {}, []
    for classifier in load_classifiers(typed["model_path"], typed):
        subject, known = load_subject(parser, classifier, typed, loaded, device, precision)
        try:
            results.append({"name": classifier.name, "file": classifier.path, **measure(subject, known)})
        except ValueError as error:  # of what cannot be measured of this network, such as logits that are no numbers
            raise UserError(f"{classifier.name}: {error}") from error
    reference = reference_of(parser, typed, options, loaded, device, precision)
    distributed.finish()
    if not distributed.is_first():
        return []
    if reference:
        add_mean_errors([result.get("robustness", result) for result in results], *reference)
    command = shlex.join(["python", "evaluate.py", *map(str, sys.argv[1:] if argv is None else argv)])
    report(options["task"], results, options | {"command": command})
    return results


def check(parser: Parser, typed: dict) -> None:
    """End with a usage error where the options do not go together; say which have no effect."""
    if "model_path" not in typed:
        parser.error("--model_path FILE: which classifier shall be evaluated?")
    if "confusion" in typed and len(typed["model_path"]) > 1:
        parser.error("--confusion draws one classifier; give one --model_path")
    for key in ("figure", "confusion"):
        if not typed.get(key, ".png").endswith(".png"):
            parser.error(f"--{key} {typed[key]}: the picture is a .png")
    for key in ("output", "figure", "confusion"):
        if key in typed and not Path(typed[key]).absolute().parent.is_dir():
            parser.error(f"--{key} {typed[key]}: there is no folder {Path(typed[key]).absolute().parent}")
    if ignored := [f"--{name}" for name in IGNORED if name in typed]:
        print(f"note: without effect on an evaluation: {', '.join(ignored)}")
    task = typed.get("task", "accuracy")
    if ignored := without_effect(parser, task, typed):
        print(f"note: without effect on --task {task}: {', '.join(ignored)}")


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


def load_classifiers(paths: list[str], typed: dict) -> list:
    """The classifiers that paths mean, with names that tell them apart."""
    from engine.classifier import load_classifier, tell_apart

    known = {key: typed[key] for key in ("model", "image_size") if key in typed}
    found = [load_classifier(path, models, averaged=typed.get("ema", False), **known) for path in paths]
    tell_apart(found)
    return found


def load_subject(parser: Parser, classifier, typed: dict, loaded: dict, device, precision) -> tuple:
    """A classifier with its images, and all options, those it was trained with too. loaded: the parts read so far."""
    from engine.classes import label_map, read_class_list
    from engine.data import STATISTICS, WITHOUT_STATISTICS, load_evaluation, of_classes
    from engine.distributed import check_same
    from engine.evaluation.subject import Subject
    from engine.progress import over
    from engine.training import pick

    trained, path = classifier.options, classifier.path
    options = {**parser.defaults, **{key: trained[key] for key in DATA_KEYS if key in trained}, **typed}
    dataset = options["dataset"]
    if not dataset:
        parser.error(f"--dataset: {path} does not say what it was trained on; name it")
    if dataset == "folder" and not options["image_size"] and classifier.image_size > SMALL:
        options["image_size"] = classifier.image_size
    key = str({name: options[name] for name in DATA_KEYS})
    if key not in loaded:
        loaded[key] = load_evaluation(progress=over, **pick(options, load_evaluation))
        check_same("data", {"test images": len(loaded[key])}, "every machine needs the same copy of the data set")
        print(loaded[key].summary("test"))
        if options["limit"]:
            print(f"note: --limit {options['limit']}: results are partial")
    part = loaded[key]
    classes = classifier.classes or (read_class_list(options["class_list"]) if options["class_list"] else part.classes)
    if not (classifier.classes or options["class_list"]) and classifier.count != len(part.classes):
        raise UserError(
            f"{path}: made for {classifier.count} classes, which it does not name; the data has {len(part.classes)}\n"
            f"name them in order with --class_list FILE; to fine-tune it, train with --init_from {path}"
        )
    place = label_map(part.classes, classifier.classes, options["class_list"], classifier.count)
    if (known := int((place >= 0).sum())) < len(classes):
        print(f"note: {classifier.name} has {len(classes)} classes, of which the data has {known}")
    part = of_classes(part, place, classes)
    if left_out := len(loaded[key]) - len(part):
        print(f"note: {left_out:,} images are of a class that {path} does not know, and are left out")
    if not classifier.torchvision or "norm" in typed:
        norm = WITHOUT_STATISTICS.get(dataset, dataset) if options["norm"] == "own" else options["norm"]
        classifier.mean, classifier.std = STATISTICS[norm]
    layout = pick(options, ["batch_size", "workers", "channels_last", "seed"])
    subject = Subject(classifier.name, classifier, part, dataset, device, precision=precision, **layout)
    subject.held_share = options["held_out"]
    return subject, options


def accuracy(subject, options: dict) -> dict:
    """Loss, accuracies, calibration error and the table of confusions on the test images."""
    from engine.evaluation.calibration import calibration_error
    from engine.loop import scores
    from engine.metrics import confusion_matrix

    logits, labels, seconds = subject.clean()
    if not len(labels):
        return {}
    confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).cpu()
    per_class = 100 * confusion.diag().double() / confusion.sum(1).clamp_min(1)
    result = {
        "epoch": subject.classifier.epoch,
        "images": len(labels),
        **scores(logits, labels, tuple(options["topk"])),
    }
    if options["ece"]:
        result["ece"] = 100 * calibration_error(logits, labels, options["ece"])
    return result | {
        "seconds": seconds,
        "classes": subject.part.classes,
        "per_class_top1": per_class.tolist(),
        "confusion": confusion.tolist(),
    }


def calibration(subject, options: dict) -> dict:
    """Calibration errors, likelihood and Brier score, before and after temperature scaling."""
    from engine.evaluation.calibration import measure

    logits, labels, _ = subject.clean()
    return measure(logits, labels, subject.held(len(labels)), options["ece"]) if len(labels) else {}


def robustness(subject, options: dict) -> dict:
    """Accuracy under attack, under corruption and under occlusion."""
    from engine.evaluation import robustness
    from engine.evaluation.attacks import attacks_of
    from engine.evaluation.corrupted_sets import find_corrupted

    names = [name for name in options["attack"] if name != NONE]
    attacks = attacks_of(names, options["eps"], options["steps"], options["step_size"])
    place = options["corruptions"]
    published = place not in (BUILT_IN, NONE) and find_corrupted(
        Path(place), subject.part.classes, view=subject.view, on_bad_image=options["on_bad_image"]
    )
    chosen = {"attacks": attacks, "corruptions": published or None, "built_in": place == BUILT_IN}
    chosen |= {"severities": options["severities"], "occluded": options["occlusion"]}
    most = options["robust_images"]
    most = CARD_IMAGES if most is None and options["task"] == "card" else most or 0
    return robustness.measure(subject, most=most, **chosen)


def reference_of(parser: Parser, typed: dict, options: dict, loaded: dict, device, precision) -> tuple | None:
    """What --reference measures under the same corruptions, None for the published errors of AlexNet, and its name."""
    word = options["reference"]
    if not word or options["corruptions"] == NONE or options["task"] not in ("robustness", "card"):
        return None
    if word == "alexnet":
        return None, word
    (classifier,) = load_classifiers([word], {key: typed[key] for key in typed if key != "model"})
    subject, known = load_subject(parser, classifier, typed, loaded, device, precision)
    return robustness(subject, known | {"attack": [NONE], "occlusion": False}), classifier.name


def ood(subject, options: dict) -> dict:
    """AUROC and FPR95 of three scores against each set of images from outside."""
    from engine.evaluation.ood import measure
    from engine.evaluation.strangers import outside_part
    from engine.training import pick

    logits, labels, _ = subject.clean()
    found = {}
    for word in options["ood"] or ["noise"]:
        where = pick(options, ["data_dir", "limit", "on_bad_image"])
        name, outside = outside_part(word, image_size=subject.size, **where)
        others, _, _ = subject.predict(name, part=outside)
        if len(labels):
            found[name] = measure(logits, others)
    return {"images": len(labels), "outside": found}


def localization(subject, options: dict) -> dict:
    """How well maps of the true class find the objects, on the backgrounds asked for, and what fixed boxes get."""
    from engine.annotations import find_truths
    from engine.evaluation import locating
    from engine.evaluation.backgrounds import holds_pickles, read_background_dir, read_pickles
    from engine.evaluation.localization import baselines
    from engine.progress import over

    truths = find_truths(subject.part, subject.dataset, options["annotation_path"], progress=over)
    for line in truths.notes():
        print(f"note: {line}")
    part, boxes = locating.with_boxes(subject, truths.each)
    known = {"maps_of": maps_of(subject, options), "th": options["th"], "noise_std": options["noise_std"]}
    found = {name: locating.localize(subject, part, boxes, background=name, **known) for name in options["background"]}
    if place := options["background_dir"]:
        if holds_pickles(place):
            ready, own = read_pickles(place, subject.part.classes, subject.size)
        else:
            ready, own = read_background_dir(place, part, subject.view), boxes
        found["ready"] = locating.localize(subject, ready, own, background="ready", **known)
    return {"method": options["method"], "backgrounds": found, "baselines": baselines(boxes, subject.size)}


def maps_of(subject, options: dict):
    """A function of normalised images (B, 3, H, W) and labels (B,) that gives maps (B, H, W) in 0..1, and logits."""
    from engine.evaluation.localization import classic_map
    from saliency.cam import ActivationMaps, enlarged

    finder = ActivationMaps(subject.classifier.network, options["method"], layer=options["layer"])

    def maps(images, labels):
        raw, size = finder(images, labels), tuple(images.shape[-2:])
        return classic_map(raw, size) if options["classic"] else enlarged(raw, size), finder.logits

    return maps


def card(subject, options: dict) -> dict:
    """Everything above that the images allow, and maps of a few of them."""
    result = {"dataset": subject.dataset, "accuracy": accuracy(subject, options)}
    result |= {"calibration": calibration(subject, options)}
    result |= {"robustness": robustness(subject, options), "ood": ood(subject, options)}
    if options["annotation_path"] or subject.dataset in WITH_BOXES:
        result["localization"] = localization(subject, options)
    if options["examples"]:
        result["pictures"] = examples(subject, options)
    return result


def examples(subject, options: dict) -> dict:
    """A few images from all over the set, what the classifier takes them for, and the maps of that."""
    import torch

    from engine.classifier import normalised
    from engine.evaluation.subject import PLAIN

    few = subject.part.spread(options["examples"])
    pixels = torch.cat([batch.images for batch in subject.batches(few, **PLAIN, alone=True).epoch()])
    best = subject.classify(pixels).softmax(1).max(1)
    images = normalised(pixels, subject.classifier.mean, subject.classifier.std)
    maps, _ = maps_of(subject, options)(images, best.indices)
    titles = [
        f"{subject.classifier.title(int(k))} {float(share):.0%}"
        for share, k in zip(best.values, best.indices, strict=True)
    ]
    shown = (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return {"images": shown, "maps": maps.cpu().numpy(), "titles": titles}


MEASURES = {
    "accuracy": accuracy,
    "robustness": robustness,
    "calibration": calibration,
    "ood": ood,
    "localization": localization,
    "card": card,
}


if __name__ == "__main__":
    run(main)
