"""Draw detections: boxes in images, and precision-recall curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from engine.drawing.figures import DPI, choose_columns, ignore_missing_glyphs, limit_dpi, save_figure, shorten
from engine.drawing.heatmaps import draw_canvas, paste_picture

SIDE = 500  # longer side of a picture on a page, in units of which DPI are an inch
PICTURE_SIDE, MIN_SIDE = 1000, 80  # the same for a picture of its own, and the shorter side that it has at least


class DrawnBox(NamedTuple):
    """A labelled box to draw."""

    box: Sequence[float]  # x0, y0, x1, y1 in pixels of the image
    text: str
    colour: tuple[float, float, float]  # RGB in 0..1
    dashed: bool = False
    error: bool = False  # marks the label with a cross on red


@ignore_missing_glyphs()  # texts are measured before the figure is saved
def draw_box_pairs(
    path: Path,
    rows: list[tuple[str, np.ndarray, list[DrawnBox], list[DrawnBox]]],
    titles: tuple[str, str],
    legend: str,
    *,
    dpi: float = DPI,
) -> None:
    """Draw every image twice, in two columns with the given titles: with its first boxes and with its second boxes.

    rows: text below the images, image uint8 (H, W, 3), first boxes, second boxes; later boxes are drawn over earlier
    ones. Images are scaled to a longer side of SIDE. legend: text at the bottom.
    """
    # ---- Layout in units of which DPI are an inch ----
    gap, above, below, foot = 10, 24, 24, 20 * (1 + legend.count("\n")) + 6
    scales = [SIDE / max(picture.shape[:2]) for _, picture, _, _ in rows]
    heights = [max(1, round(scale * row[1].shape[0])) for scale, row in zip(scales, rows, strict=True)]
    width, height = 2 * SIDE + 3 * gap, above + sum(heights) + below * len(rows) + foot
    figure, axes, canvas, dpi = start_page(width, height, dpi)
    # ---- Column titles ----
    style = {"fontsize": 7.3, "parse_math": False}
    for column, column_title in enumerate(titles):
        axes.text(gap + column * (SIDE + gap) + SIDE / 2, above / 2, column_title, ha="center", va="center", **style)
    # ---- Images with their boxes ----
    top = above
    for scale, tall, (text, picture, *both) in zip(scales, heights, rows, strict=True):
        wide = max(1, round(scale * picture.shape[1]))
        for column, boxes in enumerate(both):
            left = gap + column * (SIDE + gap) + (SIDE - wide) // 2
            place = (left + wide / 2, top + tall / 2, wide, tall)
            paste_picture(canvas, picture, *(dpi / DPI * value for value in place))
            draw_boxes(axes, boxes, (left, top, left + wide, top + tall), scale)
        axes.text(width / 2, top + tall + 4, shorten(text, 120), ha="center", va="top", **style)
        top += tall + below
    axes.text(gap, height - 6, legend, va="bottom", linespacing=1.4, **style)
    axes.images[0].set_data(canvas)
    save_figure(figure, path, dpi)


def start_page(width: int, height: int, dpi: float) -> tuple[Figure, Axes, np.ndarray, float]:
    """Return a white figure, its axes from 0 to width and height, its pixels (H, W, 3), and their resolution.

    width, height: in units of which DPI are an inch. dpi: the wanted resolution.
    """
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)  # needed to measure the size of texts
    dpi = limit_dpi(figure, dpi)
    canvas = np.full((round(height * dpi / DPI), round(width * dpi / DPI), 3), 255, np.uint8)
    return figure, draw_canvas(figure, canvas, (width, height)), canvas, dpi


@ignore_missing_glyphs()
def draw_box_picture(path: Path, picture: np.ndarray, boxes: list[DrawnBox], *, dpi: float = DPI) -> None:
    """Draw an image uint8 (H, W, 3) with boxes, later ones over earlier ones.

    It is scaled to a longer side of PICTURE_SIDE and fills the figure, but for the margins of a very elongated one.
    """
    scale = PICTURE_SIDE / max(picture.shape[:2])
    tall, wide = (max(1, round(scale * side)) for side in picture.shape[:2])
    width, height = max(wide, MIN_SIDE), max(tall, MIN_SIDE)
    figure, axes, canvas, dpi = start_page(width, height, dpi)
    paste_picture(canvas, picture, *(dpi / DPI * value for value in (width / 2, height / 2, wide, tall)))
    left, top = (width - wide) / 2, (height - tall) / 2
    draw_boxes(axes, boxes, (left, top, left + wide, top + tall), scale, page=(0, 0, width, height), size=1.5)
    axes.images[0].set_data(canvas)
    save_figure(figure, path, dpi)


def draw_boxes(
    axes: Axes,
    boxes: list[DrawnBox],
    frame: tuple[float, float, float, float],
    scale: float,
    *,
    page: tuple[float, float, float, float] | None = None,
    size: float = 1.0,
) -> None:
    """Draw boxes on an image that fills the frame x0, y0, x1, y1 of the axes, scaled by `scale`.

    Labels are placed where they overlap least, inside the page; None: inside the frame. size: factor of the widths of
    lines and of the size of texts.
    """
    left, top, right, bottom = page or frame
    pixel = size * 72 / axes.figure.dpi  # in points
    edges = [[scale * edge + start for edge, start in zip(one.box, frame[:2] * 2, strict=True)] for one in boxes]
    for one, (x0, y0, x1, y1) in zip(boxes, edges, strict=True):
        rim = {"edgecolor": "black" if is_bright(one.colour) else "white", "linewidth": 4 * pixel, "alpha": 0.45}
        line = {"edgecolor": one.colour, "linewidth": 2 * pixel, "linestyle": (0, (4, 2.5)) if one.dashed else "solid"}
        for style in (rim, line):
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
    taken = np.empty((0, 4))
    for number, (one, (x0, y0, x1, y1)) in enumerate(zip(boxes, edges, strict=True)):
        background, ink = (
            ("#d00000", "white") if one.error else (one.colour, "black" if is_bright(one.colour) else "white")
        )
        label = f"\u2717 {shorten(one.text)}" if one.error else shorten(one.text)
        text = axes.text(0, 0, label, fontsize=6.4 * size, va="top", color=ink, parse_math=False)
        text.set_bbox({"facecolor": background, "edgecolor": "none", "pad": 1.2 * size, "alpha": 0.9})
        extent = text.get_window_extent()
        w, h = extent.width + 4 * size, extent.height + 4 * size
        corners = np.array([(x, y) for y in (y0 - h, y0, y1 - h, y1, y0 + h, y0 + 2 * h) for x in (x0, x1 - w)])
        corners = np.clip(corners, (left, top), (max(left, right - w), max(top, bottom - h)))
        places = np.hstack([corners, corners + (w, h)])
        chosen = places[pairwise_intersection(places, taken).sum(1).argmin()]  # the first one on a tie
        taken = np.vstack([taken, chosen])
        text.set(x=chosen[0] + 2 * size, y=chosen[1] + 2 * size, zorder=4 + number / 1000)


def is_bright(colour: tuple[float, float, float]) -> bool:
    """Return whether black text is more readable than white text on this colour."""
    return float(np.dot(colour, (0.3, 0.59, 0.11))) > 0.5


def pairwise_intersection(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection areas (n, m) of boxes (n, 4) and others (m, 4), as x0, y0, x1, y1."""
    boxes = boxes[:, None]
    return (np.minimum(boxes[..., 2:], others[:, 2:]) - np.maximum(boxes[..., :2], others[:, :2])).clip(0).prod(-1)


def draw_precision_recall(
    path: Path, panels: list[tuple[str, list[float], list[float]]], title: str, *, dpi: float = DPI
) -> None:
    """Draw a precision-recall curve for each class, in percent.

    Dots mark the interpolated precision at the 11 recall levels of VOC2007: the highest precision at that recall or
    above. panels: title, recall and precision in 0..1, both empty if there are no detections.
    """
    columns = choose_columns(len(panels), 5)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(2.3 * columns, 6), 2.2 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    recall_levels = np.arange(11) / 10
    for axes, (panel_title, recall, precision) in zip(grid.flat, panels, strict=False):
        highest = [
            max((p for r, p in zip(recall, precision, strict=True) if r >= level), default=0) for level in recall_levels
        ]
        axes.vlines(100 * recall_levels, 0, 100, color="0.9", linewidth=0.8, zorder=0)
        axes.plot(100 * np.array(recall), 100 * np.array(precision), color="tab:blue", linewidth=1.3, zorder=2)
        dots = {"color": "tab:orange", "markersize": 5, "zorder": 3, "clip_on": False}
        axes.plot(100 * recall_levels, 100 * np.array(highest), ".", **dots)
        axes.set_title(panel_title, fontsize=9, parse_math=False)
        axes.set(xlim=(0, 100), ylim=(0, 102))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("recall (%)", fontsize=9)
    figure.supylabel("precision (%)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi)
