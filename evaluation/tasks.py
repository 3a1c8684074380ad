"""What evaluate.py measures: one planner for each task.

A planner looks up all inputs, so that a missing one is reported before any work begins, and returns a function that
does the work. Its keyword parameters are the options of the same names.
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.data.annotations import find_boxes
from engine.errors import UserError
from engine.inference.classifier import normalize
from engine.inference.metrics import confusion_matrix, rank_classes
from engine.inference.predict import compute_scores
from engine.runtime.progress import progress_bar
from evaluation.attacks import build_attacks
from evaluation.calibration import calibration_error, measure_calibration
from evaluation.context import UNNORMALIZED, EvalContext
from evaluation.localization_task import (
    build_map_function,
    evaluate_localization,
    load_background_dir,
    select_images_with_boxes,
)
from evaluation.ood import measure_ood
from evaluation.ood_images import load_ood_set
from evaluation.robustness import find_published_set, measure_robustness
from evaluation.task_options import ALEXNET, BUILT_IN, NONE

Plan = Callable[[], dict]  # does the work; with several processes only the main one gets the results


def plan_accuracy(context: EvalContext, *, topk: list[int], ece: int) -> Plan:
    """Plan loss, top-k accuracies, calibration error and confusion matrix on the test images."""

    def measure() -> dict:
        logits, labels, seconds = context.predict_clean()
        if not len(labels):
            return {}
        confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).cpu()
        per_class = 100 * confusion.diag().double() / confusion.sum(1).clamp_min(1)
        result = {"epoch": context.classifier.epoch, "images": len(labels)}
        result["unreadable"] = len(context.image_set) - len(labels)
        result |= compute_scores(logits, labels, tuple(topk))
        if ece:
            result["ece"] = 100 * calibration_error(logits, labels, ece)
        result |= {"seconds": seconds, "classes": context.image_set.classes}
        return result | {"per_class_top1": per_class.tolist(), "confusion": confusion.tolist()}

    return measure


def plan_calibration(context: EvalContext, *, ece: int) -> Plan:
    """Plan calibration errors, likelihood and Brier score, before and after temperature scaling."""
    split_held_out(context, len(context.image_set))

    def measure() -> dict:
        logits, labels, _ = context.predict_clean()
        return measure_calibration(logits, labels, split_held_out(context, len(labels)), ece) if len(labels) else {}

    return measure


def split_held_out(context: EvalContext, count: int) -> torch.Tensor:
    """Return the mask of the held-out images among `count`. Raises UserError if it selects all images or none."""
    heldout = context.heldout_mask(count)
    if heldout.all() or not heldout.any():
        raise UserError(
            f"--held_out {context.session.held_out:g} holds out {int(heldout.sum())} of {len(heldout)} images to fit "
            "the temperature; at least one must be held out and one left\n"
            "evaluate more images, or change --held_out or --seed"
        )
    return heldout


def plan_robustness(
    context: EvalContext,
    *,
    attack: list[str],
    eps: list[float] | None,
    steps: list[int],
    step_size: float | None,
    corruptions: str,
    severities: list[int],
    reference: str | None,
    occlusion: bool,
    robust_images: int | None,
    on_bad_image: str,
) -> Plan:
    """Plan accuracy under attack, under corruption and under occlusion."""
    attacks = build_attacks([name for name in attack if name != NONE], eps, steps, step_size)
    published = None
    if corruptions not in (BUILT_IN, NONE):
        published = find_published_set(context, corruptions, on_bad_image)
        if reference == ALEXNET and (published.kind, context.classifier.num_classes) != ("folders", 1000):
            raise UserError(
                f"--reference alexnet: its errors were measured on ImageNet-C, and {published.root} is another set\n"
                "give a checkpoint as the reference"
            )
    return partial(
        measure_robustness,
        context,
        attacks=attacks,
        published=published,
        severities=sorted(set(severities)) if corruptions == BUILT_IN else [],
        occluded=occlusion,
        limit=robust_images or 0,
    )


def plan_ood(context: EvalContext, *, ood: list[str] | None, data_dir: str, limit: int, on_bad_image: str) -> Plan:
    """Plan AUROC and FPR95 of three scores on each set of out-of-distribution (OOD) images."""
    load = partial(
        load_ood_set, image_size=context.image_size, data_dir=data_dir, limit=limit, on_bad_image=on_bad_image
    )
    ood_sets = {}
    for spec in ood or ["noise"]:
        name, image_set = context.session.cached(f"{spec} {load.keywords}", partial(load, spec))
        for line in image_set.notes:
            context.session.note(line)
        if image_set.origin == context.image_set.origin:
            context.session.note(f"--ood {spec}: these are the in-distribution test images themselves")
        ood_sets[spec if name in ood_sets else name] = image_set

    def measure() -> dict:
        logits, labels, _ = context.predict_clean()
        ood_logits = {name: context.predict(name, image_set=image_set)[0] for name, image_set in ood_sets.items()}
        found = {name: measure_ood(logits, theirs) for name, theirs in ood_logits.items() if len(theirs)}
        return {"images": len(labels), "outside": found}

    return measure


def plan_localization(
    context: EvalContext,
    *,
    annotation_path: str | None,
    background: list[str],
    background_dir: str | None,
    noise_std: float,
    method: str | None,
    layer: str | None,
    classic: bool,
    th: float,
) -> Plan:
    """Plan how well activation maps of the true class find the objects on each background, beside fixed boxes."""
    truths = find_boxes(context.image_set, context.dataset, annotation_path, progress=progress_bar)
    for line in truths.notes():
        context.session.note(line)
    image_set, boxes = select_images_with_boxes(context, truths.per_image)
    backgrounds = {name: (image_set, boxes) for name in background}
    if "rep" in backgrounds and len(image_set) < 2:
        raise UserError(
            "--background rep: each background comes from another image, and there is only one image\n"
            "evaluate more images"
        )
    if background_dir:
        backgrounds["ready"] = load_background_dir(context, image_set, boxes, background_dir)
    method, compute_maps = build_map_function(context, method, layer, classic)
    title = method + (f" of {layer}" if layer else "") + (" (summed over 3 x 3)" if classic else "")

    def measure() -> dict:
        found = {
            name: evaluate_localization(context, *images, compute_maps, background=name, th=th, noise_std=noise_std)
            for name, images in backgrounds.items()
        }
        baselines = [scores.pop("baselines", None) for scores in found.values()]
        return {"maps": title, "noise_std": noise_std, "backgrounds": found, "baselines": baselines[0]}

    return measure


def plan_examples(context: EvalContext, *, examples: int, method: str | None, layer: str | None, classic: bool) -> Plan:
    """Plan a few images spread over the test set, with the prediction for each and its activation map."""
    _, compute_maps = build_map_function(context, method, layer, classic)

    def measure() -> dict:
        loader = context.make_loader(context.image_set.subsample(examples), **UNNORMALIZED, whole=True)
        batches = [batch.images for batch in loader.epoch()]
        loader.count_unreadable()  # raises an error if no image is left
        pixels = torch.cat(batches)
        logits = context.classifier(pixels)
        best = rank_classes(logits)[:, 0]
        probabilities = logits.softmax(1).gather(1, best.unsqueeze(1))[:, 0]
        maps, _ = compute_maps(normalize(pixels, context.classifier.mean, context.classifier.std), best)
        names = context.classifier.titles or context.image_set.classes
        titles = [f"{names[int(k)]} {float(p):.0%}" for p, k in zip(probabilities, best, strict=True)]
        images = (255 * pixels).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return {"images": images, "maps": maps.cpu().numpy(), "titles": titles}

    return measure


PLANNERS = {
    "accuracy": plan_accuracy,
    "calibration": plan_calibration,
    "robustness": plan_robustness,
    "ood": plan_ood,
    "localization": plan_localization,
    "pictures": plan_examples,
}


def measure_card(context: EvalContext, plans: dict[str, Plan]) -> dict:
    """Return the results of all plans by name. Of the confusion matrix, which has a million entries on ImageNet, only
    the number of images of each class is kept.
    """
    results = {name: measure() for name, measure in plans.items()}
    if confusion := results["accuracy"].pop("confusion", None):
        results["accuracy"]["class_images"] = [sum(row) for row in confusion]
    return {"dataset": context.dataset, **results}


def run_plan(context: EvalContext, measure: Plan) -> dict:
    """Return the result of one classifier."""
    with context.named_errors():
        result = {"name": context.name, "file": context.classifier.path, **measure()}
    context.clean = None  # frees the logits, which the other classifiers do not need
    return result
