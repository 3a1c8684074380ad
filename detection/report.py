"""Print, write and draw the results of a detector: fractions come in, percentages go out.

"AP" stands for two averages: that of VOC2007 is over 11 recalls, that of VOC from 2010 on is the area under the curve
(see detection/metrics.py). So every figure is named in full.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.dataset import DetectionSet, list_first_names
from detection.metrics import COCO_FIGURES, Detections, GroundTruth, match_boxes, match_voc, stack_images
from detection.voc import CLASSES, SET_SIZES
from engine.drawing import figures, tables
from engine.drawing.boxes import DrawnBox, draw_box_pairs, draw_precision_recall

MAIN_FIGURE = "VOC07 mAP@0.5 (11-point)"  # the figure by which a detector is chosen
VOC = {  # figure -> key of voc_metrics()
    MAIN_FIGURE: "map07",
    "VOC mAP@0.5 (area)": "map",
    "VOC AP@[.5:.95] (11-point)": "ap07_50_95",
    "VOC AP50 (11-point)": "map07",
    "VOC AP75 (11-point)": "ap07_75",
    "VOC AP@[.5:.95] (area)": "ap_50_95",
    "VOC AP50 (area)": "map",
    "VOC AP75 (area)": "ap_75",
}
COCO = {f"COCO {key}".replace("AR_1", "AR@1").replace("_", " "): key for key in COCO_FIGURES}  # key of coco_metrics()
FIRST, *LINES = list(VOC)[:2], list(VOC)[2:5], list(VOC)[5:], list(COCO)[:6], list(COCO)[6:]  # figures on a line
CLASS_FIGURES = {  # figure of a class -> key of voc_metrics()
    "AP@0.5 (11-point)": "ap07",
    "AP@0.5 (area)": "ap",
    "AP@[.5:.95] (11-point)": "ap07_50_95",
    "AP@[.5:.95] (area)": "ap_50_95",
}
COLUMNS = {  # of the printed table
    "objects": ("objects", ",d"),
    "difficult": ("difficult", ",d"),
    "detections": ("detections", ",d"),
    "AP@0.5 (11-point)": ("AP (11-point)", ".2f"),
    "AP@0.5 (area)": ("AP (area)", ".2f"),
}
PROTOCOL = {
    "11-point": "mean over the recalls 0, 0.1 .. 1 of the highest precision at that recall or beyond; VOC until 2009",
    "area": "area under the curve of the highest precision at each recall or beyond; VOC from 2010 on",
    "VOC": "a detection belongs to the object of its class that it overlaps most; the first by score is true if they "
    "overlap by 0.5 or more, later ones are false; difficult objects count neither way; means over the classes that "
    "have other objects",
    "AP@[.5:.95]": "mean over the overlaps 0.5, 0.55 .. 0.95; AP50 and AP75 are at 0.5 and 0.75",
    "COCO": "101 recalls, overlaps 0.5, 0.55 .. 0.95, the first 100 detections of a class in an image (AR@1, AR@10: "
    "the first 1 and 10); small, medium and large: boxes of up to 32^2, up to 96^2 and more square pixels",
}
LOSSES = {
    "loss": "sum",
    "loss_classifier": "class of a box",
    "loss_box_reg": "place of a box",
    "loss_objectness": "proposals: object or not",
    "loss_rpn_box_reg": "proposals: place",
}
PERCENTS = {
    "map07": MAIN_FIGURE,
    "ema_map07": "VOC07 mAP, averaged weights",
    "map": "VOC mAP@0.5 (area)",
    "coco_ap": "COCO AP",
}
ROWS_PER_PAGE = 4  # images on a page


# figures


def summarize(
    voc: dict,
    coco: dict,
    images: int,
    *,
    dataset: str,
    test_set: str,
    score_thr: float,
    nms_thr: float,
    max_dets: int,
    coco_count_difficult: bool = False,
) -> dict:
    """What results.json holds of the results of voc_metrics() and coco_metrics(), in percent, None where there is
    nothing to measure.

    figures: name -> value. classes: name -> objects, difficult, detections and four APs. images: their number; the
    other parameters are options.
    """
    figures = {name: to_percent(voc[key]) for name, key in VOC.items()}
    figures |= {name: to_percent(coco[key]) for name, key in COCO.items()}
    classes = {
        name: {key: row[key] for key in ("objects", "difficult", "detections")}
        | {title: to_percent(row[key]) for title, key in CLASS_FIGURES.items()}
        for name, row in voc["classes"].items()
    }
    settings = {"score_thr": score_thr, "nms_thr": nms_thr, "max_dets": max_dets}
    settings["coco_count_difficult"] = coco_count_difficult
    return {
        "test_set": test_set if dataset == "voc" else "test scenes",
        "images": images,
        "unit": "percent",
        "figures": figures,
        "classes": classes,
        "settings": settings,
        "protocol": PROTOCOL | {"difficult objects in COCO's figures": describe_difficult(coco_count_difficult)},
    }


def to_percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def describe_difficult(counted: bool) -> str:
    return "counted as ordinary ones" if counted else "ignored, as crowds"


def format_result(results: dict) -> list[str]:
    """The lines printed after an evaluation. results: of summarize()."""
    figures, settings, test_set = results["figures"], results["settings"], results["test_set"]
    rule, full_size = choose_rule(test_set, list(results["classes"]))
    remark = "the number to compare with papers"
    if results["images"] != full_size:
        remark += f", whose {test_set} has {full_size:,} images"
    lines = mark_rows([[name, format_percent(figures[name])] for name in FIRST], rule, remark)
    table = [{"name": name} | row for name, row in results["classes"].items()]
    lines += tables.format_text(table, COLUMNS, title="class").splitlines()
    if absent := [name for name, row in results["classes"].items() if not row["objects"]]:
        lines.append(f"no objects (but difficult ones), so left out of the means: {list_first_names(absent)}")
    rows = [
        [name, format_percent(figures[name])]
        + [cell for other in others for cell in (shorten_name(other), format_percent(figures[other]))]
        for name, *others in LINES
    ]
    widest = max(map(len, rows))
    rows = [row + [""] * (widest - len(row)) for row in rows]
    lines += mark_rows(rows, rule, "as in papers on self-supervised learning")
    lines.append(
        f"difficult objects: VOC counts them neither way; COCO: {describe_difficult(settings['coco_count_difficult'])}"
    )
    lines.append(
        f"{test_set}: {results['images']:,} images; at most {settings['max_dets']} detections in each, score from "
        f"{settings['score_thr']:g} on, NMS at {settings['nms_thr']:g}; all figures in percent"
    )
    return lines


def choose_rule(test_set: str, classes: list[str]) -> tuple[str, int]:
    """The rule by which papers average precision on one of VOC's sets, and how many images the set has: the rule of the
    development kit changed in 2010, and codes of self-supervised learning go by the year of the test set as well.
    ("", 0): not a set of VOC's.
    """
    if test_set not in SET_SIZES or classes != CLASSES:
        return "", 0
    return "11-point" if int(test_set[:4]) < 2010 else "area", SET_SIZES[test_set]


def mark_rows(rows: list[list[str]], rule: str, remark: str) -> list[str]:
    """The rows as lines, with the remark at VOC's figure by that rule."""
    lines = tables.align_columns(rows).splitlines()
    return [f"{line}  <- {remark}" if rule and f"({rule})" in line else line for line in lines]


def shorten_name(name: str) -> str:
    """VOC AP50 (area) -> AP50, COCO AP small -> small."""
    return name.split(" (")[0].split()[-1]


def format_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_predictions(names: Sequence[str], detections: Sequence[Detections], classes: Sequence[str]) -> list[dict]:
    """All detections in COCO's results format, which pycocotools' loadRes reads where the images have the same names:
    bbox is x, y, width, height in pixels; the class is given by name as well. names: of the images.
    """
    return [
        {"image_id": name, "category_id": label, "category": classes[label - 1]}
        | {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for name, image in zip(names, detections, strict=True)
        for (x0, y0, x1, y1), label, score in to_rows(*image)
    ]


def to_rows(*columns) -> list[tuple]:
    """Arrays or tensors of length n -> n tuples of plain numbers and lists."""
    return list(zip(*(column.tolist() for column in columns), strict=True))


# pictures


def draw_training_curves(path: Path, history: list[dict], title: str) -> None:
    """Loss terms and average precisions (percent) against epoch; a panel without any value is left out."""
    measured = {key for row in history for key, value in row.items() if value is not None}
    panels = {unit: names for unit, names in (("loss", LOSSES), ("percent", PERCENTS)) if measured & set(names)}
    if panels:
        figures.draw_epoch_panels(path, history, panels, title)


def draw_precision_recall_curves(path: Path, voc: dict, max_panels: int = 25) -> None:
    """Precision against recall at an IoU of 0.5. Nothing is drawn where no class has objects. voc: of voc_metrics()."""
    panels, title = precision_recall_panels(voc, max_panels)
    if panels:
        draw_precision_recall(path, panels, title)


def precision_recall_panels(voc: dict, max_panels: int) -> tuple[list[tuple[str, list[float], list[float]]], str]:
    """Heading, recall and precision of the `max_panels` classes with the most objects, and the title of the page."""
    table = {name: row for name, row in voc["classes"].items() if row["objects"]}
    most = sorted(table, key=lambda name: -table[name]["objects"])[:max_panels]
    panels = []
    for name, row in table.items():
        if name in most:
            heading = f"{figures.shorten(name, 18)}  {100 * row['ap07']:.1f} / {100 * row['ap']:.1f}"
            panels.append((heading, voc["curves"][name]["recall"], voc["curves"][name]["precision"]))
    title = (
        f"AP at IoU 0.5 in percent: 11-point / area; means {format_percent(to_percent(voc['map07']))} / "
        f"{format_percent(to_percent(voc['map']))}\ndots: the precision that counts at each of the 11 recalls"
    )
    if len(table) > len(most):
        title += f"; the {len(most)} of {len(table)} classes with the most objects"
    return panels, title


def draw_detections(
    folder: Path,
    part: DetectionSet,
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    *,
    count: int,
    threshold: float = 0.5,
) -> list[Path]:
    """Draw `count` images spread over the set, with their objects and the detections whose score is at least
    `threshold`, ROWS_PER_PAGE a page. Returns the pages, page_01.png and so on, in `folder`.

    detections, truths: of all images of the set. Mistakes are those of VOC's rule at an IoU of 0.5.
    """
    if not len(detections) == len(truths) == len(part):
        raise ValueError(f"{len(part)} images, but detections of {len(detections)} and objects of {len(truths)}")
    chosen = np.linspace(0, len(part) - 1, min(count, len(part))).round().astype(int).tolist()
    legend = (
        "A colour a class. Red, with a cross: mistakes. On the left an object that was not found, on the right a "
        "detection of no object of its class, or of one found before.\n"
        "Dashed: an object marked difficult, or a detection of one; they count neither way. A detection is of the "
        "object that it overlaps most, if their IoU is at least 0.5."
    )
    heads = "objects", f"detections, score at least {threshold:g}"
    pages = []
    for start in range(0, len(chosen), ROWS_PER_PAGE):
        rows = []
        for index in chosen[start : start + ROWS_PER_PAGE]:
            picture = part.read(index).permute(1, 2, 0).contiguous().numpy()
            left, right, counts = mark_mistakes(detections[index], truths[index], part.classes, threshold)
            rows.append((f"{part.names[index]}: {counts}", picture, left, right))
        pages.append(Path(folder) / f"page_{len(pages) + 1:02d}.png")
        draw_box_pairs(pages[-1], rows, heads, legend)
    return pages


def draw_batches(path: Path, batches: list[dict], classes: Sequence[str]) -> None:
    """The images of a step with their objects, and without: of each batch `names`, `images` (3, H, W) in 0..1, which
    may hold NaN, and `targets`.
    """
    colours = class_colours(len(classes))
    rows = []
    for batch in batches:
        for name, image, target in zip(batch["names"], batch["images"], batch["targets"], strict=True):
            objects = [
                DrawnBox(box, classes[label - 1], colours[label - 1], difficult)
                for box, label, difficult in to_rows(target["boxes"], target["labels"], target["difficult"])
            ]
            picture = (255 * image.nan_to_num(0, 1, 0).clamp(0, 1)).byte().permute(1, 2, 0).contiguous().numpy()
            rows.append((name, picture, objects, []))
    draw_box_pairs(path, rows, ("as the step saw it, with its objects", "without them"), "Dashed: difficult")


def mark_mistakes(
    detections: Detections, truth: GroundTruth, classes: Sequence[str], threshold: float
) -> tuple[list[DrawnBox], list[DrawnBox], str]:
    """Of one image the boxes of its objects, those of its detections by rising score, and how many are right."""
    colours = class_colours(len(classes))
    confident = detections.scores >= threshold
    kept = Detections(*(column[confident] for column in detections))
    found, objects = stack_images([kept], [truth], len(classes))
    matches = match_boxes(found, objects)
    true, counted = (verdict[:, 0] for verdict in match_voc(matches, objects.extra, len(found.labels)))
    own = [matches.detection == index for index in np.flatnonzero(true)]
    hit = {matches.truth[mine][matches.iou[mine].argmax()] for mine in own}
    left = [
        DrawnBox(box, classes[label - 1], colours[label - 1], difficult, not difficult and index not in hit)
        for index, (box, label, difficult) in enumerate(to_rows(objects.boxes, objects.labels, objects.extra))
    ]
    right = [
        DrawnBox(box, f"{classes[label - 1]} {score:.2f}", colours[label - 1], not counts, counts and not good)
        for box, label, score, good, counts in to_rows(found.boxes, found.labels, found.extra, true, counted)
    ]
    positives, false = int((~objects.extra).sum()), int((counted & ~true).sum())
    return left, right[::-1], f"{int(true.sum())} of {positives} objects found, false detections: {false}"


def class_colours(count: int) -> list[tuple[float, float, float]]:
    """RGB in 0..1: all hues but red, which is for mistakes; neighbours are far apart and differ in brightness."""
    golden = (5**0.5 - 1) / 2
    shades = ((0.9, 1.0), (0.65, 1.0), (1.0, 0.7))  # saturation, value
    return [colorsys.hsv_to_rgb(0.08 + 0.8 * (golden * number % 1), *shades[number % 3]) for number in range(count)]
