"""Draw heat maps over their pictures, and compare them in one figure."""

from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from engine.drawing.figures import COLORMAP, DPI, add_colour_bar, is_constant, limit_dpi, save_figure, shorten

Box = tuple[int, int, int, int]  # y1, y2, x1, x2, half-open
CELL_INCHES = 2.1  # width of a picture in a comparison; it is at most twice as tall


def overlay_heatmap(
    picture: np.ndarray, heat: np.ndarray, alpha: float = 0.4, colormap: str = COLORMAP, box: Box | None = None
) -> np.ndarray:
    """Blend a colour-coded heat map in 0..1 over a picture uint8 (H, W, 3) with weight alpha -> uint8 (H, W, 3).

    A constant map shows nothing and adds no colour. box: the part y1, y2, x1, x2 of the picture that the map covers, of
    the same size as the map; None: the whole picture. The rest becomes pale and grey.
    """
    y1, y2, x1, x2 = box or (0, heat.shape[0], 0, heat.shape[1])
    inside, drawn = picture[y1:y2, x1:x2], picture
    if inside.shape != picture.shape:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        drawn = cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=0.4, beta=0.6 * 255), cv2.COLOR_GRAY2RGB)
    drawn = drawn.copy()
    drawn[y1:y2, x1:x2] = inside
    if not is_constant(heat):
        colours = (255 * colormaps[colormap](np.arange(256))[:, :3]).round().astype(np.uint8)
        coloured = colours[cv2.convertScaleAbs(heat, alpha=255)]
        drawn[y1:y2, x1:x2] = cv2.addWeighted(inside, 1 - alpha, coloured, alpha, 0, dst=coloured)
    return drawn


def draw_comparison(
    path: Path | str,
    *,
    names: list[str],
    pictures: list[np.ndarray],
    columns: list[str],
    overlays: list[list[np.ndarray]],
    texts: list[list[str]],
    legend: str,
    colormap: str = COLORMAP,
    dpi: float = DPI,
) -> None:
    """Draw one row per picture (H, W, 3) of any size: the picture, then one overlay per column, with texts below.

    legend: what the colours mean, written below a colour bar.
    """
    # ---- Layout in inches ----
    wide, gap, below, foot = CELL_INCHES, 0.08, 0.3, 0.5 + 0.13 * legend.count("\n")
    heights = [wide * min(max(picture.shape[0] / picture.shape[1], 0.1), 2.0) for picture in pictures]
    above = 0.3 + 0.15 * max(column.count("\n") for column in columns)
    width, height = gap + (wide + gap) * (1 + len(columns)), above + sum(heights) + below * len(heights) + foot
    figure = Figure(figsize=(width, height))
    dpi = limit_dpi(figure, dpi)
    # pasting into a canvas is much faster than one Axes per image
    canvas = np.full((round(height * dpi), round(width * dpi), 3), 255, np.uint8)
    style = {"ha": "center", "va": "top", "parse_math": False}  # file names may contain $
    # ---- Column titles ----
    middles = [gap + number * (wide + gap) + wide / 2 for number in range(1 + len(columns))]
    for middle, column in zip(middles[1:], columns, strict=True):
        lines = "\n".join(shorten(line, 28) for line in column.split("\n"))
        figure.text(middle / width, 1 - gap / height, lines, fontsize=9, **style)
    # ---- Pictures and overlays ----
    top = above
    for tall, name, picture, row, row_texts in zip(heights, names, pictures, overlays, texts, strict=True):
        for middle, image, text in zip(middles, [picture, *row], [name, *row_texts], strict=True):
            paste_picture(canvas, image, middle * dpi, (top + tall / 2) * dpi, wide * dpi, tall * dpi)
            figure.text(middle / width, 1 - (top + tall + 0.04) / height, shorten(text), fontsize=7, **style)
        top += tall + below
    draw_canvas(figure, canvas)
    # ---- Colour bar ----
    bar = figure.add_axes((0.5 - wide / width / 2, (foot - 0.1) / height, wide / width, 0.08 / height))
    add_colour_bar(figure, None, legend, colormap, cax=bar, orientation="horizontal")
    save_figure(figure, path, dpi)


def draw_canvas(figure: Figure, canvas: np.ndarray, size: tuple[int, int] = (1, 1)):
    """Fill a figure with an image (H, W, 3). Returns its axes, from 0 to `size`: width and height, downwards."""
    axes = figure.add_axes((0, 0, 1, 1), zorder=-1)
    axes.imshow(canvas, extent=(0, size[0], size[1], 0), aspect="auto", interpolation="nearest")
    axes.axis("off")
    return axes


def paste_picture(canvas: np.ndarray, picture: np.ndarray, x: float, y: float, width: float, height: float) -> None:
    """Paste a picture uint8 (H, W, 3) into a canvas, centred at x, y and scaled to fit into width x height."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = max(1, int(scale * picture.shape[1])), max(1, int(scale * picture.shape[0]))
    left, top = int(x - size[0] / 2), int(y - size[1] / 2)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=method)
