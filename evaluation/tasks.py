"""The tasks of evaluate.py. Each looks up all it needs, so that what is missing is said before the work, and returns
what measures.
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.config.select import select_kwargs
from engine.data.annotations import find_boxes
from engine.errors import UserError
from engine.inference.classifier import normalize
from engine.inference.metrics import confusion_matrix
from engine.inference.predict import compute_scores
from engine.runtime.progress import progress_bar
from evaluation import calibration as of_calibration
from evaluation import localization_task
from evaluation import ood as of_ood
from evaluation import robustness as of_robustness
from evaluation.attacks import build_attacks
from evaluation.context import PLAIN, EvalContext
from evaluation.localization import baselines
from evaluation.ood_images import load_outside_set
from evaluation.options import ALEXNET, BUILT_IN, NONE, asks_robustness

WITH_BOXES = ("shapes", "tiny-imagenet")  # sets that bring their own true boxes

Plan = Callable[[], dict]  # measures what has been prepared; of several processes the first gets the figures
# makes what gives the maps of a subject's network, by the method and layer of the options
MapsFor = Callable[[EvalContext, dict], localization_task.MapsOf]


def accuracy(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """Loss, accuracies, calibration error and the table of confusions on the test images."""

    def measure() -> dict:
        logits, labels, seconds = subject.clean()
        if not len(labels):
            return {}
        confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).cpu()
        per_class = 100 * confusion.diag().double() / confusion.sum(1).clamp_min(1)
        result = {"epoch": subject.classifier.epoch, "images": len(labels)}
        result |= compute_scores(logits, labels, tuple(options["topk"]))
        if options["ece"]:
            result["ece"] = 100 * of_calibration.calibration_error(logits, labels, options["ece"])
        result |= {"seconds": seconds, "classes": subject.part.classes}
        return result | {"per_class_top1": per_class.tolist(), "confusion": confusion.tolist()}

    return measure


def calibration(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """Calibration errors, likelihood and Brier score, before and after temperature scaling."""
    held = subject.held(len(subject.part))
    if held.all() or not held.any():
        raise UserError(
            f"--held_out {options['held_out']:g} leaves {int(held.sum())} of {len(held)} images to fit a temperature on"
            "\ntake more images, or another share or --seed"
        )

    def measure() -> dict:
        logits, labels, _ = subject.clean()
        return of_calibration.measure(logits, labels, held, options["ece"]) if len(labels) else {}

    return measure


def robustness(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """Accuracy under attack, under corruption and under occlusion."""
    names = [name for name in options["attack"] if name != NONE]
    chosen = {"attacks": build_attacks(names, options["eps"], options["steps"], options["step_size"])}
    chosen |= {"occluded": options["occlusion"], "most": options["robust_images"] or 0}
    if options["corruptions"] == BUILT_IN:
        chosen["severities"] = sorted(set(options["severities"]))
    elif options["corruptions"] != NONE:
        published = of_robustness.find_published(subject, options["corruptions"], options["on_bad_image"])
        chosen["published"] = published
        if options["reference"] == ALEXNET and (published.kind, subject.classifier.count) != ("folders", 1000):
            raise UserError(
                f"--reference alexnet: its errors are those of ImageNet-C, which {published.place} is not\n"
                "give the file of a classifier as reference"
            )
    return partial(of_robustness.measure, subject, **chosen)


def under_corruption(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """What of it concerns --reference."""
    return robustness(subject, options | {"attack": [NONE], "occlusion": False}, maps_for)


def divide_errors(results: list[dict], references: list[dict]) -> None:
    """Put the mean corruption error into the results: by what was measured of --reference, else by what is published of
    AlexNet.
    """
    reference = references[0] if references else None
    name = reference["name"] if reference else "AlexNet on ImageNet-C"
    try:
        of_robustness.add_mean_errors([result.get("robustness", result) for result in results], reference, name)
    except ValueError as error:  # a reference without errors; what has been measured is not lost
        print(f"note: no mCE: {error}")


def ood(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """AUROC and FPR95 of three scores against each set of images from outside."""
    where, outside = select_kwargs(options, ["data_dir", "limit", "on_bad_image"]) | {"image_size": subject.size}, {}
    for word in options["ood"] or ["noise"]:
        name, part = subject.once(f"{word} {where}", partial(load_outside_set, word, **where))
        if part.origin == subject.part.origin:
            subject.note(f"--ood {word}: the very images that the classifiers are judged on")
        outside[word if name in outside else name] = part

    def measure() -> dict:
        logits, labels, _ = subject.clean()
        others = {name: subject.predict(name, part=part)[0] for name, part in outside.items()}
        found = {name: of_ood.measure(logits, theirs) for name, theirs in others.items() if len(theirs)}
        return {"images": len(labels), "outside": found}

    return measure


def localization(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """How well maps of the true class find the objects, on the backgrounds asked for, and what fixed boxes get."""
    truths = find_boxes(subject.part, subject.dataset, options["annotation_path"], progress=progress_bar)
    for line in truths.notes():
        subject.note(line)
    part, boxes = localization_task.select_boxed(subject, truths.each)
    backgrounds = {name: (part, boxes) for name in options["background"]}
    if "rep" in backgrounds and len(part) < 2:
        raise UserError("--background rep: a background is another image, and there is one\ntake more images")
    if options["background_dir"]:
        backgrounds["ready"] = localization_task.read_ready_made(subject, part, boxes, options["background_dir"])
    how = {"maps_of": maps_for(subject, options), "th": options["th"], "noise_std": options["noise_std"]}
    called = options["method"] + (f" of {options['layer']}" if options["layer"] else "")
    called += " (summed over 3 x 3)" if options["classic"] else ""
    fixed = baselines(boxes, subject.size)

    def measure() -> dict:
        found = {
            name: localization_task.localize(subject, *pictures, background=name, **how)
            for name, pictures in backgrounds.items()
        }
        return {"maps": called, "noise_std": options["noise_std"], "backgrounds": found, "baselines": fixed}

    return measure


def card(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """Everything above that the images allow, and maps of a few of them."""
    plans = {"accuracy": accuracy(subject, options | {"topk": [1, 5]}, maps_for)}
    if options["ece"]:
        plans["calibration"] = calibration(subject, options, maps_for)
    if asks_robustness(options):
        plans["robustness"] = robustness(subject, options, maps_for)
    plans["ood"] = ood(subject, options, maps_for)
    if options["annotation_path"] or subject.dataset in WITH_BOXES:
        plans["localization"] = localization(subject, options, maps_for)
    if options["examples"]:
        plans["pictures"] = choose_examples(subject, options, maps_for)

    def measure() -> dict:
        found = {name: plan() for name, plan in plans.items()}
        found["accuracy"].pop("confusion", None)  # a million numbers on ImageNet
        return {"dataset": subject.dataset, **found}

    return measure


def choose_examples(subject: EvalContext, options: dict, maps_for: MapsFor) -> Plan:
    """A few images from all over the set, what the classifier takes them for, and the maps of that."""
    maps_at = maps_for(subject, options)

    def measure() -> dict:
        few = subject.part.subsample(options["examples"])
        pixels = torch.cat([batch.images for batch in subject.batches(few, **PLAIN, alone=True).epoch()])
        best = subject.classify(pixels).softmax(1).max(1)
        maps, _ = maps_at(normalize(pixels, subject.classifier.mean, subject.classifier.std), best.indices)
        names = subject.classifier.titles or subject.part.classes
        titles = [f"{names[int(k)]} {float(share):.0%}" for share, k in zip(best.values, best.indices, strict=True)]
        shown = (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return {"images": shown, "maps": maps.cpu().numpy(), "titles": titles}

    return measure


MEASURES = {
    "accuracy": accuracy,
    "robustness": robustness,
    "calibration": calibration,
    "ood": ood,
    "localization": localization,
    "card": card,
}
