"""Whether the maps of a classifier lie on the objects, also where the background was changed."""

from collections.abc import Callable, Iterator

import torch

from engine.data.annotations import BoxAnnotation
from engine.data.image_set import ImageSet
from engine.data.loader import Batch
from engine.drawing import tables
from engine.errors import UserError
from engine.inference.classifier import normalize
from engine.runtime.device import disable_tf32
from engine.runtime.distributed import gather_object
from engine.runtime.progress import Progress, use_progress_bar
from evaluation.backgrounds import (
    add_background_noise,
    build_object_mask,
    draw_partner,
    has_pickles,
    read_background_dir,
    read_pickles,
    replace_background,
)
from evaluation.context import UNNORMALIZED, EvalContext
from evaluation.localization import (
    Boxes,
    compute_overlaps,
    list_thresholds,
    project_boxes,
    scale_maps,
    score_localization,
    smooth_maps,
)
from saliency.cam import ActivationMaps, upsample_maps

MapFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
COLUMNS = {  # of the table: key -> title and format
    "top1": ("top-1", ".2f"),
    "top5": ("top-5", ".2f"),
    "top1_loc": ("top-1 loc.", ".2f"),
    "gt_known": ("GT-known", ".2f"),
    "best_gt_known": ("best", ".2f"),
    "best_gt_known_th": ("at", ".2f"),
    "best_top1_loc": ("best top-1 loc.", ".2f"),
    "max_box_acc_v2": ("MaxBoxAccV2", ".2f"),
}


def select_boxed(context: EvalContext, truths: list[BoxAnnotation | None]) -> tuple[ImageSet, Boxes]:
    """The images whose true boxes are known, and the boxes in the pixels that the classifier sees."""
    boxes = project_boxes(truths, context.view)
    known = [index for index, each in enumerate(boxes) if each is not None]
    if not known:
        raise UserError(
            f"none of the {len(boxes):,} images of {context.image_set.origin} has a usable box of its class\n"
            "give other boxes with --annotation_path"
        )
    return context.image_set.take(torch.tensor(known)), [boxes[index] for index in known]


def load_background_dir(context: EvalContext, image_set: ImageSet, boxes: Boxes, place: str) -> tuple[ImageSet, Boxes]:
    """The images of --background_dir and their true boxes: versions of the images of the set, or a pickled set."""
    if has_pickles(place):
        return read_pickles(place, context.image_set.classes, context.image_size)
    return read_background_dir(place, image_set, context.view), boxes


def build_map_function(context: EvalContext, method: str, layer: str | None, classic: bool) -> MapFunction:
    """A function of normalised images (B, 3, H, W) and labels (B,) that gives maps (B, H, W) in 0..1, and logits.

    Raises ValueError where the network has no such maps.
    """
    activation_maps = ActivationMaps(context.classifier.network, method, layer=layer)

    def compute_maps(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw, size = activation_maps(images, labels), tuple(images.shape[-2:])
        return scale_maps(smooth_maps(raw), size) if classic else upsample_maps(raw, size), activation_maps.logits

    if method != "scorecam":  # which takes as many passes as there are channels
        size, device = context.image_size, context.session.device
        compute_maps(torch.zeros(1, 3, size, size, device=device), torch.tensor([0], device=device))
    return compute_maps


def evaluate_localization(
    context: EvalContext,
    image_set: ImageSet,
    boxes: Boxes,
    compute_maps: MapFunction,
    *,
    background: str,
    th: float,
    noise_std: float,
) -> dict:
    """Accuracy and localisation on one background; empty in all processes but the first.

    compute_maps: gives maps of the true class, which is the predicted one wherever that is right. Raises ValueError for
    logits that are NaN or infinite.
    """
    thresholds, rows = list_thresholds(th), []
    for batch, own, pixels in iter_on_background(context, image_set, boxes, background, noise_std):
        with disable_tf32():
            images = normalize(pixels, context.classifier.mean, context.classifier.std)
            maps, logits = compute_maps(images, batch.labels)
        context.check_finite(logits, background)
        hits = (logits.topk(min(5, logits.shape[1]), 1).indices == batch.labels.unsqueeze(1)).cpu()
        rows.append((batch.index, *compute_overlaps(maps, own, thresholds), hits[:, 0], hits.any(1)))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    gathered = [one for one in gather_object(columns) or [] if one]
    if not gathered:
        return {}
    index, largest, best, top1, top5 = map(torch.cat, zip(*gathered, strict=True))
    scores = {"background": background, "top1": 100 * float(top1.double().mean())}
    scores["top5"] = 100 * float(top5.double().mean()) if len(image_set.classes) >= 5 else None
    heldout = context.heldout_mask(len(image_set))[index]
    return scores | score_localization(largest, best, top1, heldout, thresholds, th)


def iter_on_background(
    context: EvalContext, image_set: ImageSet, boxes: Boxes, background: str, noise_std: float
) -> Iterator[tuple[Batch, Boxes, torch.Tensor]]:
    """Batches, their true boxes, and their pixels in 0..1 on another background: rep is another image, noise Gaussian
    noise; anything else leaves them as they are.
    """
    loaders, seed = [context.make_loader(image_set, **UNNORMALIZED)], context.session.seed
    if background == "rep":
        partner = draw_partner(torch.arange(len(image_set)), len(image_set), seed)
        loaders.append(context.make_loader(image_set.take(partner), **UNNORMALIZED))
    title = f"{context.name} {background}"
    with Progress(title, len(loaders[0]), bar=use_progress_bar(False), lines=False) as bar:
        for step, (batch, *others) in enumerate(zip(*(loader.epoch() for loader in loaders), strict=True), 1):
            own, pixels = [boxes[index] for index in batch.loaded_index.tolist()], batch.images
            if background in ("rep", "noise"):
                mask = build_object_mask(own, *pixels.shape[-2:], pixels.device)
            if background == "rep":
                pixels = replace_background(pixels, mask, others[0].images)
            elif background == "noise":
                pixels = add_background_noise(pixels, mask, batch.index, seed, noise_std)
            yield batch, own, pixels
            bar(step)
    for loader in loaders:
        loader.close()
        context.note_unreadable(image_set, loader.skipped)


def format_report(results: list[dict]) -> str:
    """A row for each classifier and background, and what fixed boxes get."""
    rows = [
        {"name": result["name"] + ("" if key == "clean" else f", {key}"), **scores}
        for result in results
        for key, scores in result["backgrounds"].items()
    ]
    baselines, first = results[0]["baselines"], rows[0]
    lines = [
        f"localisation in percent, of {baselines['images']:,} images with true boxes: boxes of "
        f"{results[0]['maps']} maps at {first['th']:g} of the maximum, right from an overlap of 0.5 on",
        tables.format_text(rows, COLUMNS),
        f"a centred box of 3/4 side gets GT-known {baselines['centre']:.2f}",
        f"the whole image gets GT-known {baselines['whole']:.2f}",
        *describe_noise(results[0]),
    ]
    if first["max_box_acc_v2"] is None:
        heldout = first["held_images"]
        lines.append(f"no MaxBoxAccV2: its thresholds are chosen on held-out images, here {heldout} of all")
    return "\n".join(lines)


def describe_noise(result: dict) -> list[str]:
    """A line on the strength of the noise, where it is a background."""
    line = f"noise: Gaussian, of deviation {result['noise_std']:g} in pixels of 0..1"
    return [line] if "noise" in result["backgrounds"] else []
