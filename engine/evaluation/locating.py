"""Whether the maps of a classifier lie on the objects, also where the background was changed."""

from collections.abc import Callable

import torch

from engine import tables
from engine.annotations import Truth
from engine.classifier import normalised
from engine.data import Part
from engine.device import exact_float32
from engine.distributed import gather
from engine.evaluation.backgrounds import noisy, object_mask, partner, replaced
from engine.evaluation.localization import Boxes, boxes_seen, measure, overlaps, thresholds_with
from engine.evaluation.subject import PLAIN, Subject
from engine.progress import Progress, bars_wanted

MapsOf = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TITLES = {  # of the table: key -> title and format
    **{"top1": ("top-1", ".2f"), "top5": ("top-5", ".2f"), "top1_loc": ("top-1 loc.", ".2f")},
    **{"gt_known": ("GT-known", ".2f"), "best_gt_known": ("best", ".2f"), "best_gt_known_th": ("at", ".2f")},
    **{"best_top1_loc": ("best top-1 loc.", ".2f"), "max_box_acc_v2": ("MaxBoxAccV2", ".2f")},
}


def with_boxes(subject: Subject, truths: list[Truth | None]) -> tuple[Part, Boxes]:
    """The images whose true boxes are known, and these in the pixels that the classifier sees."""
    boxes = boxes_seen(truths, subject.view)
    known = torch.tensor([position for position, one in enumerate(boxes) if one is not None])
    return subject.part.take(known), [one for one in boxes if one is not None]


def localize(
    subject: Subject,
    part: Part,
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
    that are taken as they are.
    """
    thresholds, rows = thresholds_with(th), []
    seen = subject.batches(part, **PLAIN)
    others = partner(torch.arange(len(part)), len(part), subject.seed) if background == "rep" else None
    behind = iter(subject.batches(part.take(others), **PLAIN).epoch()) if background == "rep" else None
    with Progress(f"{subject.name} {background}", len(seen), bar=bars_wanted(False), lines=False) as bar:
        for step, batch in enumerate(seen.epoch()):
            own, pixels = [boxes[position] for position in batch.index.tolist()], batch.images
            if background in ("rep", "noise"):
                mask = object_mask(own, *pixels.shape[-2:], pixels.device)
                if behind:
                    pixels = replaced(pixels, mask, next(behind).images)
                else:
                    pixels = noisy(pixels, mask, batch.index, subject.seed, noise_std)
            with exact_float32():
                images = normalised(pixels, subject.classifier.mean, subject.classifier.std)
                maps, logits = maps_of(images, batch.labels)
            ranked = logits.topk(min(5, logits.shape[1]), 1).indices == batch.labels.unsqueeze(1)
            rows.append((batch.index, *overlaps(maps, own, thresholds), ranked[:, 0].cpu(), ranked.any(1).cpu()))
            bar(step + 1)
    seen.close()
    parts = [torch.cat(column) for column in zip(*rows, strict=True)] if rows else None
    gathered = [one for one in gather(parts) or [] if one]
    if not gathered:
        return {}
    index, largest, best, right, among = map(torch.cat, zip(*gathered, strict=True))
    held = subject.held(len(part))[index]
    scores = {"background": background, "top1": 100 * float(right.double().mean())}
    scores["top5"] = 100 * float(among.double().mean()) if logits.shape[1] > 5 else None
    return scores | measure(largest, best, right, held, thresholds, th)


def report(results: list[dict]) -> str:
    """A row for each classifier and background, and what boxes get that look at nothing."""
    rows = [
        {"name": result["name"] + ("" if key == "clean" else f", {key}"), **scores}
        for result in results
        for key, scores in result["backgrounds"].items()
    ]
    base = results[0]["baselines"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"localisation in percent, of {base['images']:,} images with true boxes, by {results[0]['method']}"]
    lines.append(tables.text(rows, TITLES))
    for key, title in (("centre", "centred box of 3/4 side"), ("whole", "the whole image")):
        if base[key] is not None:
            lines.append(f"{title:{width}}  GT-known {base[key]:.2f}")
    return "\n".join(lines)
