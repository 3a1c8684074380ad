"""Whether the maps of a classifier lie on the objects, also where the background was changed."""

from collections.abc import Callable

import torch

from engine.data.annotations import BoxAnnotation
from engine.data.image_set import ImageSet
from engine.drawing import tables
from engine.errors import UserError
from engine.inference.classifier import normalize
from engine.runtime.device import exact_float32
from engine.runtime.distributed import gather_object
from engine.runtime.progress import Progress, use_progress_bar
from evaluation.backgrounds import (
    draw_partner,
    holds_pickles,
    noise_background,
    object_mask,
    read_background_dir,
    read_pickles,
    replace_background,
)
from evaluation.context import PLAIN, EvalContext
from evaluation.localization import Boxes, box_overlaps, list_thresholds, measure, place_boxes

MapsOf = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TITLES = {  # of the table: key -> title and format
    **{"top1": ("top-1", ".2f"), "top5": ("top-5", ".2f"), "top1_loc": ("top-1 loc.", ".2f")},
    **{"gt_known": ("GT-known", ".2f"), "best_gt_known": ("best", ".2f"), "best_gt_known_th": ("at", ".2f")},
    **{"best_top1_loc": ("best top-1 loc.", ".2f"), "max_box_acc_v2": ("MaxBoxAccV2", ".2f")},
}


def select_boxed(subject: EvalContext, truths: list[BoxAnnotation | None]) -> tuple[ImageSet, Boxes]:
    """The images whose true boxes are known, and these in the pixels that the classifier sees."""
    boxes = place_boxes(truths, subject.view)
    known = [position for position, one in enumerate(boxes) if one is not None]
    if not known:
        raise UserError(
            f"none of the {len(boxes):,} images of {subject.part.origin} has a usable box of its class\n"
            "give other boxes with --annotation_path"
        )
    return subject.part.take(torch.tensor(known)), [boxes[position] for position in known]


def read_ready_made(subject: EvalContext, part: ImageSet, boxes: Boxes, place: str) -> tuple[ImageSet, Boxes]:
    """The images of --background_dir, which stand for those of the part or are a pickled set of their own, and their
    true boxes.
    """
    if holds_pickles(place):
        return read_pickles(place, subject.part.classes, subject.size)
    return read_background_dir(place, part, subject.view), boxes


def localize(
    subject: EvalContext,
    part: ImageSet,
    boxes: Boxes,
    maps_of: MapsOf,
    *,
    background: str,
    th: float,
    noise_std: float,
) -> dict:
    """Accuracy and localisation on one background; empty in all processes but the first.

    maps_of(images (B, 3, H, W) normalised, labels (B,)) -> maps (B, H, W) in 0..1 of the true class, which is the
    predicted one wherever that is right, and logits. background: rep, noise, or anything else for images
    that are taken as they are. Raises ValueError for logits that are not finite.
    """
    thresholds, rows = list_thresholds(th), []
    seen, others = subject.batches(part, **PLAIN), None
    if background == "rep":
        others = subject.batches(part.take(draw_partner(torch.arange(len(part)), len(part), subject.seed)), **PLAIN)
    behind = others.epoch() if others else None
    with Progress(f"{subject.name} {background}", len(seen), bar=use_progress_bar(False), lines=False) as bar:
        for step, batch in enumerate(seen.epoch()):
            own, pixels = [boxes[position] for position in batch.loaded_index.tolist()], batch.images
            if background in ("rep", "noise"):
                mask = object_mask(own, *pixels.shape[-2:], pixels.device)
            if background == "rep":
                pixels = replace_background(pixels, mask, next(behind).images)
            elif background == "noise":
                pixels = noise_background(pixels, mask, batch.index, subject.seed, noise_std)
            with exact_float32():
                images = normalize(pixels, subject.classifier.mean, subject.classifier.std)
                maps, logits = maps_of(images, batch.labels)
            subject.check(logits, background)
            ranked = logits.topk(min(5, logits.shape[1]), 1).indices == batch.labels.unsqueeze(1)
            rows.append((batch.index, *box_overlaps(maps, own, thresholds), ranked[:, 0].cpu(), ranked.any(1).cpu()))
            bar(step + 1)
    for batches in filter(None, (seen, others)):
        batches.close()
        subject.tell_skipped(part, batches.skipped)
    parts = [torch.cat(column) for column in zip(*rows, strict=True)] if rows else None
    gathered = [one for one in gather_object(parts) or [] if one]
    if not gathered:
        return {}
    index, largest, best, right, among = map(torch.cat, zip(*gathered, strict=True))
    held = subject.held(len(part))[index]
    scores = {"background": background, "top1": 100 * float(right.double().mean())}
    scores["top5"] = 100 * float(among.double().mean()) if logits.shape[1] >= 5 else None
    return scores | measure(largest, best, right, held, thresholds, th)


def report(results: list[dict]) -> str:
    """A row for each classifier and background, and what boxes get that look at nothing."""
    rows = [
        {"name": result["name"] + ("" if key == "clean" else f", {key}"), **scores}
        for result in results
        for key, scores in result["backgrounds"].items()
    ]
    base, one = results[0]["baselines"], rows[0]
    lines = [
        f"localisation in percent, of {base['images']:,} images with true boxes: boxes of "
        f"{results[0]['maps']} maps at {one['th']:g} of the maximum, right from an overlap of 0.5 on",
        tables.format_text(rows, TITLES),
    ]
    lines += [
        f"{title} gets GT-known {base[key]:.2f}"
        for key, title in (("centre", "a centred box of 3/4 side"), ("whole", "the whole image"))
    ]
    lines += noise_note(results[0])
    if one["max_box_acc_v2"] is None:
        lines.append(f"no MaxBoxAccV2: its thresholds are chosen on held-out images, here {one['held_images']} of all")
    return "\n".join(lines)


def noise_note(result: dict) -> list[str]:
    """How strong the noise of the background is, where there is any."""
    known = "noise" in result["backgrounds"]
    return [f"noise: Gaussian, of deviation {result['noise_std']:g} in pixels of 0..1"] if known else []
