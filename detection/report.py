"""Print, save and draw the results of a detector. Metrics come in as fractions and go out as percentages.

"AP" has two meanings: VOC2007 averages over 11 recalls, VOC from 2010 on takes the area under the curve (see
detection/metrics.py). So every metric is named in full.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.dataset import DetectionSet, format_first_names
from detection.metrics import COCO_METRICS, Detections, GroundTruth, match_boxes, match_voc, stack_images
from detection.voc import CLASSES, SET_SIZES
from engine.drawing import figures, tables
from engine.drawing.boxes import DrawnBox, draw_box_pairs, draw_precision_recall
from engine.runtime.text import format_count

MAIN_METRIC = "VOC07 mAP@0.5 (11-point)"  # selects the best epoch
VOC_KEYS = {  # metric -> key of voc_metrics()
    MAIN_METRIC: "map07",
    "VOC mAP@0.5 (area)": "map",
    "VOC AP@[.5:.95] (11-point)": "ap07_50_95",
    "VOC AP50 (11-point)": "map07",
    "VOC AP75 (11-point)": "ap07_75",
    "VOC AP@[.5:.95] (area)": "ap_50_95",
    "VOC AP50 (area)": "map",
    "VOC AP75 (area)": "ap_75",
}
COCO_KEYS = {  # metric -> key of coco_metrics()
    f"COCO {key}".replace("AR_1", "AR@1").replace("_", " "): key for key in COCO_METRICS
}
HEADLINE_METRICS, *METRIC_ROWS = (
    list(VOC_KEYS)[:2],
    list(VOC_KEYS)[2:5],
    list(VOC_KEYS)[5:],
    list(COCO_KEYS)[:6],
    list(COCO_KEYS)[6:],
)  # metrics per line
CLASS_METRICS = {  # metric of a class -> key of voc_metrics()
    "AP@0.5 (11-point)": "ap07",
    "AP@0.5 (area)": "ap",
    "AP@[.5:.95] (11-point)": "ap07_50_95",
    "AP@[.5:.95] (area)": "ap_50_95",
}
COLUMNS = {  # columns of the printed table: key -> title, format
    "objects": ("objects", ",d"),
    "difficult": ("difficult", ",d"),
    "detections": ("detections", ",d"),
    "AP@0.5 (11-point)": ("AP (11-point)", ".2f"),
    "AP@0.5 (area)": ("AP (area)", ".2f"),
}
PROTOCOL = {
    "11-point": "mean, over the recalls 0, 0.1 .. 1, of the highest precision at that recall or above; VOC until 2009",
    "area": "area under the curve of the highest precision at each recall or above; VOC from 2010 on",
    "VOC": "a detection is assigned to the object of its class that it overlaps most; if their IoU is at least 0.5, "
    "the detection of an object with the highest score is a true positive and the others are false positives; "
    "difficult objects and their detections are ignored; means are over the classes that have other objects",
    "AP@[.5:.95]": "mean over the IoU thresholds 0.5, 0.55 .. 0.95; AP50 and AP75 are at 0.5 and 0.75",
    "COCO": "101 recalls, IoU thresholds 0.5, 0.55 .. 0.95, the first 100 detections per class and image (AR@1, AR@10: "
    "the first 1 and 10); small, medium, large: area (of boxes; in COCO format `area`) up to 32^2, 96^2, and above",
}
CROWDS = "crowd regions take their place: they are ignored, and may match any number of detections"
LOSS_TITLES = {  # column of log.csv -> name in the plot
    "loss": "total",
    "loss_classifier": "classification",
    "loss_box_reg": "box regression",
    "loss_objectness": "RPN objectness",
    "loss_rpn_box_reg": "RPN box regression",
}
PERCENT_TITLES = {
    "map07": MAIN_METRIC,
    "ema_map07": "VOC07 mAP, averaged weights",
    "map": "VOC mAP@0.5 (area)",
    "coco_ap": "COCO AP",
}
ROWS_PER_PAGE = 4  # images on a page


# ---- Metrics ----


def summarize(
    voc: dict,
    coco: dict,
    count: int,
    *,
    dataset: str,
    test_set: str,
    test_annotations: str | None = None,
    score_thr: float,
    nms_thr: float,
    max_dets: int,
    min_size: Sequence[int],
    max_size: int,
    coco_count_difficult: bool = False,
) -> dict:
    """Collect the results of voc_metrics() and coco_metrics() for results.json, in percent; None if undefined.

    count: number of test images. The other parameters by name are options. In the result, `figures` is metric ->
    value, `classes` is class -> objects, difficult, detections and four APs, and `flag` is what `difficult` counts.
    """
    values = {name: to_percent(voc[key]) for name, key in VOC_KEYS.items()}
    values |= {name: to_percent(coco[key]) for name, key in COCO_KEYS.items()}
    classes = {
        name: {key: row[key] for key in ("objects", "difficult", "detections")}
        | {title: to_percent(row[key]) for title, key in CLASS_METRICS.items()}
        for name, row in voc["classes"].items()
    }
    settings = {"score_thr": score_thr, "nms_thr": nms_thr, "max_dets": max_dets}
    settings |= {"min_size": min_size[-1], "max_size": max_size, "coco_count_difficult": coco_count_difficult}
    crowds = dataset == "coco"
    ignored = CROWDS if crowds else describe_difficult(coco_count_difficult)
    return {
        "test_set": {"voc": test_set, "coco": Path(test_annotations or "").name}.get(dataset, "test scenes"),
        "images": count,
        "unit": "percent",
        "figures": values,
        "classes": classes,
        "settings": settings,
        "protocol": PROTOCOL | {"difficult objects in COCO's figures": ignored},
        "flag": "crowd" if crowds else "difficult",
    }


def to_percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def describe_difficult(counted: bool) -> str:
    """Return how COCO's metrics treat difficult objects."""
    return "counted like all others" if counted else "ignored (treated as crowds)"


def format_result(results: dict) -> list[str]:
    """Return the lines that are printed after an evaluation. results: the result of summarize()."""
    values, settings, test_set = results["figures"], results["settings"], results["test_set"]
    rule, full_size = choose_rule(test_set, list(results["classes"]))
    remark = "the number to compare with papers"
    if results["images"] != full_size:
        remark += f", which use all {full_size:,} images of {test_set}"
    headline = [[name, format_percent(values[name])] for name in HEADLINE_METRICS]
    rows, flag = format_metric_rows(METRIC_ROWS, values), results["flag"]
    if flag == "crowd":  # data in COCO format: COCO's figures come first
        headline, rows = format_metric_rows(METRIC_ROWS[2:], values), [*headline, *rows[:2]]
    lines = mark_rows(headline, rule, remark)
    table = [{"name": name} | row for name, row in results["classes"].items()]
    lines += tables.format_text(table, COLUMNS | {"difficult": (flag, ",d")}, title="class").splitlines()
    if absent := [name for name, row in results["classes"].items() if not row["objects"]]:
        lines.append(f"excluded from the means (no objects, or only {flag} ones): {format_first_names(absent)}")
    lines += mark_rows(rows, rule, "as in papers on self-supervised learning")
    how = "ignored" if flag == "crowd" else describe_difficult(settings["coco_count_difficult"])
    lines.append(f"{flag} objects: VOC: ignored; COCO: {how}")
    lines.append(
        f"at most {settings['max_dets']} detections per image, score above {settings['score_thr']:g}, NMS at IoU "
        f"{settings['nms_thr']:g}; shorter side {settings['min_size']}, longer side up to {settings['max_size']} pixels"
    )
    lines.append(f"{test_set}, {format_count(results['images'], 'image')}; metrics in percent")
    return lines


def format_metric_rows(names: Sequence[Sequence[str]], values: dict[str, float | None]) -> list[list[str]]:
    """Return a row of cells for each list of metrics: the name of the first in full, and those of the others short."""
    return [
        [name, format_percent(values[name])]
        + [cell for other in others for cell in (shorten_name(other), format_percent(values[other]))]
        for name, *others in names
    ]


def choose_rule(test_set: str, classes: list[str]) -> tuple[str, int]:
    """Return the rule by which papers average precision on a set of VOC, and the number of images of the set.

    The rule of the development kit changed in 2010; code for self-supervised learning also selects it by the year of
    the test set. Returns ("", 0) for any other set.
    """
    if test_set not in SET_SIZES or classes != CLASSES:
        return "", 0
    return "11-point" if int(test_set[:4]) < 2010 else "area", SET_SIZES[test_set]


def mark_rows(rows: list[list[str]], rule: str, remark: str) -> list[str]:
    """Return the rows, filled up to one length, as lines, with the remark after the VOC metric of that rule."""
    widest = max(map(len, rows))
    lines = tables.align_columns([row + [""] * (widest - len(row)) for row in rows]).splitlines()
    return [f"{line}  <- {remark}" if rule and f"({rule})" in line else line for line in lines]


def shorten_name(name: str) -> str:
    """Shorten the name of a metric: VOC AP50 (area) -> AP50, COCO AP small -> small."""
    return name.split(" (")[0].split()[-1]


def format_percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_predictions(
    images: Sequence, detections: Sequence[Detections], classes: Sequence[str], category_ids: Sequence[int] = ()
) -> list[dict]:
    """Return all detections in COCO's results format, which pycocotools' loadRes reads if the images are those it has.

    bbox is x, y, width, height in pixels; the class name is included. images: names, or ids of a COCO file.
    category_ids: id of each class; empty: 1, 2, 3 ...
    """
    category_ids = category_ids or range(1, len(classes) + 1)
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "category": classes[label - 1]}
        | {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for image_id, image in zip(images, detections, strict=True)
        for (x0, y0, x1, y1), label, score in to_rows(*image)
    ]


def to_rows(*columns) -> list[tuple]:
    """Convert arrays or tensors of length n to n tuples of plain numbers and lists."""
    return list(zip(*(column.tolist() for column in columns), strict=True))


# ---- Plots and images ----


def draw_training_curves(path: Path, history: list[dict], title: str, *, dpi: int = figures.DPI) -> None:
    """Draw loss terms and average precisions (percent) over the epochs. A panel without values is omitted."""
    logged = {key for row in history for key, value in row.items() if value is not None}
    panels = {
        unit: names for unit, names in (("loss", LOSS_TITLES), ("percent", PERCENT_TITLES)) if logged & set(names)
    }
    if panels:
        figures.draw_epoch_panels(path, history, panels, title, dpi=dpi)


def draw_precision_recall_curves(path: Path, voc: dict, max_panels: int = 25, *, dpi: int = figures.DPI) -> None:
    """Draw precision over recall at an IoU of 0.5; nothing if no class has objects. voc: result of voc_metrics()."""
    panels, title = build_precision_recall_panels(voc, max_panels)
    if panels:
        draw_precision_recall(path, panels, title, dpi=dpi)


def build_precision_recall_panels(voc: dict, max_panels: int) -> tuple[list[tuple[str, list[float], list[float]]], str]:
    """Return title, recall and precision of the `max_panels` classes with the most objects, and the page title."""
    table = {name: row for name, row in voc["classes"].items() if row["objects"]}
    most = sorted(table, key=lambda name: -table[name]["objects"])[:max_panels]
    panels = []
    for name, row in table.items():
        if name in most:
            heading = f"{figures.shorten(name, 18)}  {100 * row['ap07']:.1f} / {100 * row['ap']:.1f}"
            panels.append((heading, voc["curves"][name]["recall"], voc["curves"][name]["precision"]))
    title = (
        f"AP at IoU 0.5 in percent, 11-point / area; mean {format_percent(to_percent(voc['map07']))} / "
        f"{format_percent(to_percent(voc['map']))}\ndots: interpolated precision at the 11 recalls"
    )
    if len(table) > len(most):
        title += f"; the {len(most)} of {len(table)} classes with the most objects"
    return panels, title


def draw_detections(
    folder: Path,
    image_set: DetectionSet,
    detections: Sequence[Detections],
    truths: Sequence[GroundTruth],
    *,
    count: int,
    threshold: float = 0.5,
    dpi: int = figures.DPI,
    figure_format: str = "png",
) -> list[Path]:
    """Draw `count` evenly spaced images of a set with their objects and their detections.

    detections, truths: those of all images of the set. threshold: minimum score of a drawn detection. Errors are those
    of the VOC rule at an IoU of 0.5. Returns the pages page_01.png, page_02.png .. in `folder` (or .pdf, .svg), with
    ROWS_PER_PAGE images on each. Raises ValueError if the numbers of images differ.
    """
    if not len(detections) == len(truths) == len(image_set):
        raise ValueError(
            f"detections and ground truth must have one entry per image ({len(image_set)}), got {len(detections)} and "
            f"{len(truths)}"
        )
    chosen = np.linspace(0, len(image_set) - 1, min(count, len(image_set))).round().astype(int).tolist()
    legend = (
        "One colour per class. Red with a cross: errors. Left: an object that was missed. Right: a detection of no "
        "object of its class, or of one that was detected before.\n"
        f"Dashed: an object marked {image_set.flag}, or a detection of one; both are ignored. A detection belongs to "
        "the object that it overlaps most, if their IoU is at least 0.5."
    )
    heads = "ground truth", f"detections with a score of at least {threshold:g}"
    pages = []
    for start in range(0, len(chosen), ROWS_PER_PAGE):
        rows = []
        for index in chosen[start : start + ROWS_PER_PAGE]:
            image = image_set.read(index).permute(1, 2, 0).contiguous().numpy()
            left, right, counts = mark_errors(detections[index], truths[index], image_set.classes, threshold)
            rows.append((f"{image_set.names[index]}: {counts}", image, left, right))
        pages.append(Path(folder) / f"page_{len(pages) + 1:02d}.{figure_format}")
        draw_box_pairs(pages[-1], rows, heads, legend, dpi=dpi)
    return pages


def draw_batches(path: Path, batches: list[dict], classes: Sequence[str]) -> None:
    """Draw the images of a step with and without their ground-truth boxes.

    batches: dicts with `names`, `images` (3, H, W) in 0..1, which may contain NaN, and `targets`.
    """
    colours = choose_class_colours(len(classes))
    rows = []
    for batch in batches:
        for name, image, target in zip(batch["names"], batch["images"], batch["targets"], strict=True):
            objects = [
                DrawnBox(box, classes[label - 1], colours[label - 1], difficult)
                for box, label, difficult in to_rows(target["boxes"], target["labels"], target["difficult"])
            ]
            pixels = (255 * image.nan_to_num(0, 1, 0).clamp(0, 1)).byte().permute(1, 2, 0).contiguous().numpy()
            rows.append((name, pixels, objects, []))
    draw_box_pairs(path, rows, ("augmented image with ground truth", "augmented image"), "Dashed: difficult objects")


def mark_errors(
    detections: Detections, truth: GroundTruth, classes: Sequence[str], threshold: float
) -> tuple[list[DrawnBox], list[DrawnBox], str]:
    """Return the boxes to draw for the objects and the detections of one image, and a text with the error counts.

    Detections come by increasing score, so that the most confident one is drawn on top.
    """
    colours = choose_class_colours(len(classes))
    confident = detections.scores >= threshold
    kept = Detections(*(column[confident] for column in detections))
    boxes, objects = stack_images([kept], [truth], len(classes))
    matches = match_boxes(boxes, objects)
    is_tp, is_counted = (mask[:, 0] for mask in match_voc(matches, objects.extra, len(boxes.labels)))  # at IoU 0.5
    tp_pairs = [matches.detection == index for index in np.flatnonzero(is_tp)]
    detected = {matches.truth[pairs][matches.iou[pairs].argmax()] for pairs in tp_pairs}
    left = [
        DrawnBox(box, classes[label - 1], colours[label - 1], difficult, not difficult and index not in detected)
        for index, (box, label, difficult) in enumerate(to_rows(objects.boxes, objects.labels, objects.extra))
    ]
    right = [
        DrawnBox(box, f"{classes[label - 1]} {score:.2f}", colours[label - 1], not counted, counted and not tp)
        for box, label, score, tp, counted in to_rows(boxes.boxes, boxes.labels, boxes.extra, is_tp, is_counted)
    ]
    positives, false_positives = int((~objects.extra).sum()), int((is_counted & ~is_tp).sum())
    return left, right[::-1], f"detected {int(is_tp.sum())} of {positives}, false positives: {false_positives}"


def choose_class_colours(count: int) -> list[tuple[float, float, float]]:
    """Return an RGB colour in 0..1 per class. Red is reserved for errors; successive colours differ clearly."""
    golden = (5**0.5 - 1) / 2
    shades = ((0.9, 1.0), (0.65, 1.0), (1.0, 0.7))  # saturation, value
    return [colorsys.hsv_to_rgb(0.08 + 0.8 * (golden * number % 1), *shades[number % 3]) for number in range(count)]
