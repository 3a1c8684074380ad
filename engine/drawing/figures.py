"""Draw learning curves, mixed batches and confusion matrices as PNG files, without a display."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from engine.runtime.files import write_atomic

Box = tuple[int, int, int, int]  # y1, y2, x1, x2, half-open
MAX_PIXELS = 60_000  # largest side of a figure; matplotlib's limit is 65,536


@contextmanager
def ignore_missing_glyphs() -> Iterator[None]:
    """Suppress matplotlib's warning about characters that are missing in its font."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def save_figure(figure: Figure, path: Path, dpi: float = 110) -> None:
    """Save a figure as PNG. Creates missing folders and replaces the file atomically."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda side: figure.savefig(side, dpi=dpi, format="png"))


def draw_curves(path: Path, history: list[dict], title: str) -> None:
    """Draw loss and accuracy over epochs."""
    loss = {"train_loss": "training (mixed)", "test_loss": "test"}
    accuracy = {
        "train_acc": "training (mixed labels, reads low)",
        "test_top1": "test top-1",
        "valid_top1": "validation top-1",
    }
    accuracy["ema_top1"] = "test top-1, averaged weights (EMA)"
    draw_epoch_panels(path, history, {"loss": loss, "accuracy (%)": accuracy}, title)


def draw_epoch_panels(path: Path, history: list[dict], panels: dict[str, dict[str, str]], title: str) -> None:
    """Draw columns of `history` over epochs, one panel per y-axis label. panels: y label -> {column: curve name}."""
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (unit, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for column, label in columns.items():
            points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(title)
    save_figure(figure, path)


def format_label(weights: torch.Tensor, classes: list[str]) -> str:
    """Format a soft label: up to three classes with their weights, largest first, one per line."""
    top = weights.sort(descending=True)
    pairs = [(float(w), classes[int(k)]) for w, k in zip(top.values[:3], top.indices[:3], strict=False) if w > 0.005]
    return "\n".join(f"{weight:.2f} {name}" if weight < 0.995 else name for weight, name in pairs)


def draw_mixed_batch(
    path: Path,
    *,
    images: torch.Tensor,
    targets: torch.Tensor,
    saliency: torch.Tensor | None,
    mixed: torch.Tensor,
    soft: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: list[str],
    title: str,
) -> None:
    """Draw the original images, their saliency maps if given, and the mixed images with their soft labels.

    images, mixed (B, 3, H, W) normalised; targets, soft (B, K); saliency (B, H, W).
    """
    texts = [[format_label(one.cpu(), classes) for one in labels] for labels in (targets, soft)]
    rows = [("images", to_pixels(images, mean, std), texts[0])]
    if saliency is not None:
        rows.append(("saliency", saliency.float().cpu().numpy(), None))
    rows.append(("mixed", to_pixels(mixed, mean, std), texts[1]))
    draw_image_rows(path, rows, title)


def draw_image_rows(path: Path, rows: list[tuple[str, np.ndarray, list[str] | None]], title: str = "") -> None:
    """Draw rows of images. A row: its name, images (n, H, W, 3) in 0..1 or maps (n, H, W), and their titles or None."""
    count = max(len(pictures) for _, pictures, _ in rows)
    heights = [1.4 if texts is None else 1.7 for _, _, texts in rows]
    figure = Figure(figsize=(1.35 * count + 0.4, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False, height_ratios=heights)
    for row_axes, (name, pictures, texts) in zip(grid, rows, strict=True):
        for column, (axes, picture) in enumerate(zip(row_axes, pictures, strict=True)):
            axes.imshow(picture, cmap="magma" if picture.ndim == 2 else None, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if texts is not None:
                axes.set_title(texts[column], fontsize=8)
        row_axes[0].set_ylabel(name)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_tight_grid(path: Path | str, rows: list[np.ndarray], inches: float = 1.5, dpi: int = 300) -> None:
    """Draw rows of images (n, H, W, 3) in 0..1 without margins; the gaps are 5 % of the image size.

    inches: width of an image.
    """
    count, height, width, _ = rows[0].shape
    gap = 0.05
    wide, tall = (number + gap * (number - 1) for number in (count, len(rows)))
    figure = Figure(figsize=(inches * wide, inches * tall * height / width))
    grid = figure.subplots(
        len(rows), count, squeeze=False, gridspec_kw=dict(left=0, right=1, bottom=0, top=1, wspace=gap, hspace=gap)
    )
    for axes, picture in zip(grid.flat, (picture for row in rows for picture in row), strict=True):
        axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
        axes.axis("off")
    style = {"dpi": dpi, "format": "png", "bbox_inches": "tight", "pad_inches": 0}
    write_atomic(path, lambda side: figure.savefig(side, **style))


def draw_mixtures(
    path: Path | str,
    *,
    images: torch.Tensor,
    names: list[str],
    saliency: torch.Tensor,
    guide: str,
    rows: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]],
    colours: torch.Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Draw the inputs, their saliency, and for each method the mixed images and the source of every pixel.

    Each input has a colour, and next to every mixed image its pixels are shown in the colours of the inputs they come
    from. images (B, 3, H, W) normalised; saliency (B, H, W); guide: name of the saliency source; rows: name, mixed
    images (n, 3, H, W), colours (n, H, W, 3), label weights (n, B); colours (B, 3): colours of the inputs.
    """
    columns = max(len(images), *(2 * len(mixed) for _, mixed, _, _ in rows))
    tall = len(rows) + 2
    figure = Figure(figsize=(1.6 * columns + 0.5, 1.9 * tall + 0.3), layout="constrained")
    grid = figure.subplots(tall, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    # ---- Inputs and their saliency ----
    for column, (picture, name) in enumerate(zip(to_pixels(images, mean, std), names, strict=True)):
        axes = grid[0, column]
        axes.imshow(picture)
        axes.set_title(name, fontsize=8)
        axes.spines[:].set(visible=True, color=colours[column].tolist(), linewidth=4)
        grid[1, column].imshow(saliency[column].float().cpu().numpy(), cmap="magma")
    grid[0, 0].set_ylabel("images", fontsize=9)
    grid[1, 0].set_ylabel(f"saliency:\n{guide}", fontsize=9)
    # ---- One row per method: mixed images and the sources of their pixels ----
    for line, (text, mixed, shown, soft) in zip(grid[2:], rows, strict=True):
        line[0].set_ylabel(text, fontsize=9)
        for number, picture in enumerate(to_pixels(mixed, mean, std)):
            line[2 * number].imshow(picture)
            line[2 * number].set_title(format_label(soft[number], names), fontsize=7)
            line[2 * number + 1].imshow(shown[number].clamp(0, 1).numpy())
    save_figure(figure, path)


def to_pixels(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo the normalisation: (B, 3, H, W) -> (B, H, W, 3) in 0..1."""
    back = images.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return back.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def overlay_heatmap(
    picture: np.ndarray, heat: np.ndarray, alpha: float = 0.4, colormap: str = "jet", box: Box | None = None
) -> np.ndarray:
    """Blend a colour-coded heat map in 0..1 over a picture uint8 (H, W, 3) with weight alpha -> uint8 (H, W, 3).

    box: the part y1, y2, x1, x2 of the picture that the map covers, of the same size as the map; None: the whole
    picture. Pixels outside the box are unchanged.
    """
    y1, y2, x1, x2 = box or (0, heat.shape[0], 0, heat.shape[1])
    colours = (255 * colormaps[colormap](np.arange(256))[:, :3]).round().astype(np.uint8)
    coloured = colours[cv2.convertScaleAbs(heat, alpha=255)]
    drawn = picture.copy()
    drawn[y1:y2, x1:x2] = cv2.addWeighted(picture[y1:y2, x1:x2], 1 - alpha, coloured, alpha, 0, dst=coloured)
    return drawn


def draw_comparison(
    path: Path | str,
    *,
    names: list[str],
    pictures: list[np.ndarray],
    columns: list[str],
    overlays: list[list[np.ndarray]],
    texts: list[list[str]],
) -> None:
    """Draw one row per picture (H, W, 3) of any size: the picture, then one overlay per column, with texts below."""
    # ---- Layout in inches ----
    wide, gap, below = 2.1, 0.08, 0.3
    heights = [wide * min(max(picture.shape[0] / picture.shape[1], 0.1), 2.0) for picture in pictures]
    above = 0.3 + 0.15 * max(column.count("\n") for column in columns)
    width, height = gap + (wide + gap) * (1 + len(columns)), above + sum(heights) + below * len(heights)
    dpi = min(110, MAX_PIXELS / max(width, height))
    # pasting into a canvas is much faster than one Axes per image
    canvas = np.full((round(height * dpi), round(width * dpi), 3), 255, np.uint8)
    figure = Figure(figsize=(canvas.shape[1] / dpi, canvas.shape[0] / dpi))
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
    figure.figimage(canvas)
    with ignore_missing_glyphs():
        save_figure(figure, path, dpi=dpi)


def paste_picture(canvas: np.ndarray, picture: np.ndarray, x: float, y: float, width: float, height: float) -> None:
    """Paste a picture uint8 (H, W, 3) into a canvas, centred at x, y and scaled to fit into width x height."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = max(1, int(scale * picture.shape[1])), max(1, int(scale * picture.shape[0]))
    left, top = int(x - size[0] / 2), int(y - size[1] / 2)
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def shorten(text: str, max_length: int = 32) -> str:
    """Cut a text to at most max_length characters, with an ellipsis at the end."""
    text = text.encode(errors="replace").decode()  # a file name may contain undecodable bytes
    return text if len(text) <= max_length else text[: max_length - 1] + "\u2026"


def draw_confusion(path: Path, counts: torch.Tensor, classes: list[str], title: str) -> None:
    """Draw a confusion matrix: rows are true classes, columns predicted ones, values the percentage of the row."""
    share = 100 * counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    few = len(classes) <= 20
    side = 0.5 * len(classes) + 2 if few else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100 if few else float(share.max()))
    if few:
        for row in range(len(classes)):
            for column in range(len(classes)):
                value = float(share[row, column])
                if value >= 0.5:
                    axes.text(
                        column,
                        row,
                        f"{value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if value > 55 else "black",
                    )
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    save_figure(figure, path)
