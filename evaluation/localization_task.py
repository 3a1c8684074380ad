"""The localisation task: whether a classifier's activation maps lie on the objects, also on other backgrounds."""

from collections.abc import Callable, Iterator

import torch

from engine.data.annotation_files import BoxAnnotation
from engine.data.image_set import ImageSet
from engine.data.loader import Batch
from engine.drawing import tables
from engine.errors import UserError
from engine.inference.classifier import normalize
from engine.inference.metrics import rank_labels
from engine.runtime.device import disable_tf32
from engine.runtime.distributed import gather_object
from engine.runtime.progress import Progress, use_progress_bar
from engine.runtime.text import format_count
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
    compute_map_ious,
    list_thresholds,
    project_boxes,
    scale_maps,
    score_fixed_boxes,
    score_localization,
    smooth_maps,
)
from saliency.cam import ActivationMaps, choose_methods, upsample_maps

MapFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # see build_map_function()
BACKGROUND_TITLES = {  # names of the backgrounds in tables and figures
    "clean": "",
    "rep": "background replaced",
    "noise": "background noise",
    "ready": "images of --background_dir",
}
COLUMNS = {  # of the table: key -> title and format
    "top1": ("top-1", ".2f"),
    "top5": ("top-5", ".2f"),
    "top1_loc": ("top-1 loc.", ".2f"),
    "gt_known": ("GT-known", ".2f"),
    "best_gt_known": ("best GT-known", ".2f"),
    "best_gt_known_th": ("at threshold", ".2f"),
    "best_top1_loc": ("best top-1 loc.", ".2f"),
    "max_box_acc_v2": ("MaxBoxAccV2", ".2f"),
}


def select_images_with_boxes(context: EvalContext, truths: list[BoxAnnotation | None]) -> tuple[ImageSet, Boxes]:
    """Return the images with known ground-truth boxes, and these boxes in pixels of the network's input."""
    boxes = project_boxes(truths, context.view)
    known = [index for index, each in enumerate(boxes) if each is not None]
    if not known:
        raise UserError(
            f"none of the {len(boxes):,} images of {context.image_set.origin} has a ground-truth box of its class\n"
            "give other annotations with --annotation_path"
        )
    return context.image_set.take(torch.tensor(known)), [boxes[index] for index in known]


def load_background_dir(context: EvalContext, image_set: ImageSet, boxes: Boxes, path: str) -> tuple[ImageSet, Boxes]:
    """Return the images of --background_dir, versions of those in the set or a pickled set, and their true boxes."""
    if has_pickles(path):
        return read_pickles(path, context.image_set.classes, context.image_size)
    return read_background_dir(path, image_set, context.view), boxes


def build_map_function(
    context: EvalContext, method: str | None, layer: str | None, classic: bool
) -> tuple[str, MapFunction]:
    """Return the method and a function: normalised images (B, 3, H, W), labels (B,) -> maps (B, H, W) in 0..1, logits.

    method None: cam, or gradcam for a network without cam. Raises ValueError if the network has no such maps.
    """
    (method,), note = choose_methods(context.classifier.network, method and [method], context.image_size)
    if note:
        context.session.note(f"{context.name}: {note}")
    activation_maps = ActivationMaps(context.classifier.network, method, layer=layer)

    def compute_maps(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw, size = activation_maps(images, labels), tuple(images.shape[-2:])
        return scale_maps(smooth_maps(raw), size) if classic else upsample_maps(raw, size), activation_maps.logits

    if method != "scorecam":  # try it on one image, to fail early; Score-CAM needs one pass per channel
        size, device = context.image_size, context.session.device
        compute_maps(torch.zeros(1, 3, size, size, device=device), torch.tensor([0], device=device))
    return method, compute_maps


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
    """Return accuracy and localisation scores on one background, and under `baselines` those of fixed boxes on the same
    images; empty in all processes but the main one.

    compute_maps: computes maps of the true class, which is the predicted one wherever that is correct. Raises
    ValueError for logits that are NaN or infinite.
    """
    thresholds, rows = list_thresholds(th), []
    for batch, true_boxes, pixels in iter_on_background(context, image_set, boxes, background, noise_std):
        with disable_tf32():
            images = normalize(pixels, context.classifier.mean, context.classifier.std)
            maps, logits = compute_maps(images, batch.labels)
        context.check_finite(logits, background)
        rank = rank_labels(logits, batch.labels).cpu()
        constant = (maps.amin((1, 2)) == maps.amax((1, 2))).cpu()
        rows.append((batch.index, *compute_map_ious(maps, true_boxes, thresholds), rank < 1, rank < 5, constant))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    gathered = [columns for columns in gather_object(columns) or [] if columns]
    if not gathered:
        return {}
    index, largest_iou, best_iou, top1, top5, constant = map(torch.cat, zip(*gathered, strict=True))
    baselines = score_fixed_boxes([boxes[position] for position in index.tolist()], context.image_size)
    scores = {"background": background, "baselines": baselines, "top1": 100 * float(top1.double().mean())}
    scores["constant_maps"] = int(constant.sum())
    scores["top5"] = 100 * float(top5.double().mean()) if len(image_set.classes) >= 5 else None
    heldout = context.heldout_mask(len(image_set))[index]
    return scores | score_localization(largest_iou, best_iou, top1, heldout, thresholds, th)


def iter_on_background(
    context: EvalContext, image_set: ImageSet, boxes: Boxes, background: str, noise_std: float
) -> Iterator[tuple[Batch, Boxes, torch.Tensor]]:
    """Yield batches, their ground-truth boxes, and their pixels in 0..1 on another background.

    background: rep (another image), noise (Gaussian noise), or anything else to leave the images as they are.
    """
    loader, seed, others = context.make_loader(image_set, **UNNORMALIZED), context.session.seed, None
    if background == "rep":
        partner = draw_partner(torch.arange(len(image_set)), len(image_set), seed)
        others = context.make_loader(image_set.with_replacement().take(partner), **UNNORMALIZED)
    title, backgrounds = f"{context.name} {background}", others and others.epoch()
    with Progress(title, len(loader), bar=use_progress_bar(False), lines=False) as bar:
        for step, batch in enumerate(loader.epoch(), 1):
            true_boxes, pixels = [boxes[index] for index in batch.index.tolist()], batch.images
            if background in ("rep", "noise"):
                mask = build_object_mask(true_boxes, *pixels.shape[-2:], pixels.device)
            if background == "rep":
                pixels = replace_background(pixels, mask, find_images(backgrounds, batch.index))
            elif background == "noise":
                pixels = add_background_noise(pixels, mask, batch.index, seed, noise_std)
            yield batch, true_boxes, pixels
            bar(step)
    loader.close()
    context.note_unreadable(loader)
    if others:
        others.close()


def find_images(batches: Iterator[Batch], index: torch.Tensor) -> torch.Tensor:
    """Return the images at these positions from the next of the batches that holds them."""
    batch = next(batch for batch in batches if torch.isin(index, batch.index).all())
    return batch.images[torch.isin(batch.index, index).to(batch.images.device)]


def format_report(results: list[dict]) -> str:
    """Return a table with a row for each classifier and background, and the scores of fixed boxes."""
    rows = [
        {"name": ", ".join(filter(None, (result["name"], BACKGROUND_TITLES[key]))), **scores}
        for result in results
        for key, scores in result["backgrounds"].items()
    ]
    baselines, first = results[0]["baselines"], rows[0]
    maps = " and ".join(dict.fromkeys(result["maps"] for result in results))
    lines = [
        f"localisation in percent, {baselines['images']:,} images with ground-truth boxes; boxes around "
        f"{maps} maps thresholded at {first['th']:g} of their maximum, correct from an IoU of 0.5",
        tables.format_text(rows, COLUMNS),
        f"GT-known of a centred box of 3/4 of the side: {baselines['centre']:.2f}",
        f"GT-known of the whole image as the box: {baselines['whole']:.2f}",
        *describe_noise(results[0]),
        *describe_constant_maps(results),
    ]
    if first["max_box_acc_v2"] is None:
        count = f"{first['held_images']:,} of {first['images']:,} images are"
        lines.append(f"no MaxBoxAccV2: {count} held out; some must choose its thresholds and some be scored")
    return "\n".join(lines)


def describe_constant_maps(results: list[dict]) -> list[str]:
    """Return a line for each classifier and background on which some maps show nothing."""
    lines = []
    for result in results:
        for background, scores in result["backgrounds"].items():
            title = ", ".join(filter(None, (result["name"], BACKGROUND_TITLES[background])))
            if count := scores.get("constant_maps"):
                lines.append(
                    f"{title}: {count:,} of {format_count(scores['images'], 'map')} have the same value everywhere; "
                    "their box is the first pixel"
                )
    return lines


def describe_noise(result: dict) -> list[str]:
    """Return a line on the strength of the background noise, or none if noise is not among the backgrounds."""
    line = f"background noise: Gaussian with standard deviation {result['noise_std']:g}, for pixels in 0..1"
    return [line] if "noise" in result["backgrounds"] else []
