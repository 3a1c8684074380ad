"""Draw learning curves, mixed batches and confusion matrices as PNG, PDF or SVG files, without a display."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from engine.runtime.files import write_atomic

DPI = 110
COLORMAP = "inferno"  # of maps: equal steps of the value look equally large, also in grey
MAX_PIXELS = 60_000  # largest side of a figure; matplotlib's limit is 65,536
MAX_NAMED, MAX_NUMBERED = 100, 20  # classes of a confusion matrix with names, and with a number in each cell


@contextmanager
def ignore_missing_glyphs() -> Iterator[None]:
    """Suppress matplotlib's warning about characters that are missing in its font."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def save_figure(figure: Figure, path: Path | str, dpi: float = DPI, **style) -> None:
    """Save a figure as PNG, PDF or SVG, by the ending of `path`. Creates missing folders and replaces the file
    atomically.

    dpi: of a PNG file, and of the images inside PDF and SVG files, whose lines and letters have no resolution. It is
    reduced for a figure that would exceed MAX_PIXELS. style: further arguments of savefig.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style |= {"dpi": limit_dpi(figure, dpi), "format": path.suffix[1:].lower()}
    with rc_context({"pdf.fonttype": 42}), ignore_missing_glyphs():  # publishers refuse matplotlib's default, Type 3
        write_atomic(path, lambda side: figure.savefig(side, **style))


def limit_dpi(figure: Figure, dpi: float) -> float:
    """Return the resolution at which a figure can be drawn: `dpi`, or less if a side would exceed MAX_PIXELS."""
    return min(dpi, MAX_PIXELS / max(figure.get_size_inches()))


def choose_columns(count: int, limit: int) -> int:
    """Return into how many columns, at most `limit`, to put `count` panels, with as few empty places as possible."""
    return -(-count // -(-count // limit))


def list_colours(count: int) -> list:
    """Return the colours of `count` lines or bars, no two alike."""
    if count <= 10:
        return [f"C{number}" for number in range(count)]
    if count <= 20:
        return list(colormaps["tab20"].colors[:count])
    return list(colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def place_legend(axes, below: bool = False) -> None:
    """Add a legend: inside the axes, or below them if it has more than four entries or must not cover anything."""
    names = axes.get_legend_handles_labels()[1]
    if not names:
        return
    if not below and len(names) <= 4:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=8)
        return
    shift = ScaledTranslation(0, -0.5, axes.figure.dpi_scale_trans)  # in inches: below labels and title of the x axis
    columns = min(len(names), max(1, 62 // (8 + max(map(len, names)))))
    place = {"bbox_to_anchor": (0.5, 0), "bbox_transform": axes.transAxes + shift, "ncols": columns}
    axes.legend(loc="upper center", frameon=False, fontsize=8, **place)


def add_colour_bar(
    figure, axes, label: str, colormap: str = COLORMAP, limits: tuple[float, float] | None = None, **style
) -> None:
    """Add a colour bar beside axes. limits: lowest and highest value; None: those of each map on its own.

    style: further arguments of colorbar, such as its location.
    """
    low, high = limits or (0, 1)
    if "cax" not in style:
        if style.get("location") == "bottom":
            inch = figure.dpi / figure.bbox.height  # by default, the gaps of a tall figure are tall, too
            style |= {"shrink": 0.4, "aspect": 40, "fraction": 0.4 * inch, "pad": 0.1 * inch}
        else:
            style |= {"shrink": 0.7}
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colormap), ax=axes, **style)
    bar.set_label(label, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    if limits is None:
        bar.set_ticks([low, high], labels=["lowest", "highest"])


def draw_curves(
    path: Path, history: list[dict], title: str, *, loss: str = "ce", mixed: bool = True, dpi: float = DPI
) -> None:
    """Draw loss and accuracy over epochs. loss: name of the training loss; that of the other images is always ce.

    mixed: whether the training labels are mixed.
    """
    train, test = {"train_loss": "training, mixed labels" if mixed else "training"}, {"test_loss": "test"}
    panels = {"loss: cross-entropy": train | test}
    if loss != "ce":  # another quantity: a mean over the classes too
        panels = {"training loss: binary cross-entropy": train, "test loss: cross-entropy": test}
    accuracy = {
        "train_acc": "training (mixed labels, reads low)" if mixed else "training",
        "test_top1": "test top-1",
        "valid_top1": "validation top-1",
        "ema_top1": "test top-1, averaged weights (EMA)",
    }
    draw_epoch_panels(path, history, panels | {"accuracy (%)": accuracy}, title, dpi=dpi)


def draw_epoch_panels(
    path: Path, history: list[dict], panels: dict[str, dict[str, str]], title: str, *, dpi: float = DPI
) -> None:
    """Draw columns of `history` over epochs, one panel per y-axis label. panels: y label -> {column: curve name}."""
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (unit, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for column, label in columns.items():
            points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.grid(alpha=0.3)
        place_legend(axes)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(shorten(title, 26 * len(panels) + 10))
    save_figure(figure, path, dpi)


def format_label(weights: torch.Tensor, classes: list[str]) -> str:
    """Format a soft label: up to three classes with their weights, largest first, one per line."""
    top = weights.sort(descending=True)
    pairs = [
        (float(w), shorten(classes[int(k)], 15))
        for w, k in zip(top.values[:3], top.indices[:3], strict=False)
        if w > 0.005
    ]
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
    dpi: float = DPI,
) -> None:
    """Draw the original images, their saliency maps if given, and the mixed images with their soft labels.

    images, mixed (B, 3, H, W) normalised; targets, soft (B, K); saliency (B, H, W).
    """
    texts = [[format_label(one.cpu(), classes) for one in labels] for labels in (targets, soft)]
    rows = [("images", to_pixels(images, mean, std), texts[0])]
    if saliency is not None:
        rows.append(("saliency", saliency.float().cpu().numpy(), None))
    rows.append(("mixed", to_pixels(mixed, mean, std), texts[1]))
    draw_image_rows(path, rows, title, dpi=dpi)


def draw_image_rows(
    path: Path,
    rows: list[tuple[str, np.ndarray, list[str] | None]],
    title: str = "",
    *,
    limits: tuple[float, float] | None = None,
    dpi: float = DPI,
) -> None:
    """Draw rows of images. A row: its name, images (n, H, W, 3) in 0..1 or maps (n, H, W), and their titles or None.

    limits: the range of all maps; None: each map is drawn from its own lowest to its highest value.
    """
    count = max(len(pictures) for _, pictures, _ in rows)
    heights = [1.4 if texts is None else 1.7 for _, _, texts in rows]
    map_names = [name for name, pictures, _ in rows if pictures[0].ndim == 2]
    figure = Figure(figsize=(1.35 * count + 0.4, sum(heights) + 0.4 + 0.5 * bool(map_names)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False, height_ratios=heights)
    for row_axes, (name, pictures, texts) in zip(grid, rows, strict=True):
        for column, (axes, picture) in enumerate(zip(row_axes, pictures, strict=True)):
            draw_map(axes, picture, limits) if picture.ndim == 2 else axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if texts is not None:
                axes.set_title(texts[column], fontsize=8, parse_math=False)
        row_axes[0].set_ylabel(name)
    for name in map_names[:1]:
        add_colour_bar(figure, grid, name, limits=limits, location="bottom")
    figure.suptitle(shorten(title, 16 * count), fontsize=10)
    save_figure(figure, path, dpi)


def is_constant(values: np.ndarray) -> bool:
    """Return whether a map has the same value everywhere, and so shows nothing."""
    return bool(values.min() == values.max())


def draw_map(axes, values: np.ndarray, limits: tuple[float, float] | None = None) -> None:
    """Draw a map (H, W) in colours, from its lowest to its highest value or within `limits`.

    A constant map without limits has no such range: it is left grey, and says so.
    """
    low, high = limits or (values.min(), values.max())
    if limits is None and is_constant(values):
        axes.imshow(np.full((*values.shape, 3), 0.85))
        axes.text(0.5, 0.5, "constant", transform=axes.transAxes, ha="center", va="center", fontsize=8)
    else:
        axes.imshow(values, cmap=COLORMAP, interpolation="nearest", vmin=low, vmax=high)


def draw_tight_grid(path: Path | str, rows: list[np.ndarray], inches: float = 1.5, dpi: float = 300) -> None:
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
    save_figure(figure, path, dpi, bbox_inches="tight", pad_inches=0)


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
    dpi: float = DPI,
) -> None:
    """Draw the inputs, each beside its saliency, and for each method the mixed images and the source of every pixel.

    Each input has a colour, and next to every mixed image its pixels are shown in the colours of the inputs they come
    from. images (B, 3, H, W) normalised; saliency (B, H, W); guide: name of the saliency source; rows: name, mixed
    images (n, 3, H, W), colours (n, H, W, 3), label weights (n, B); colours (B, 3): colours of the inputs.
    """
    columns, tall = 2 * max(len(images), *(len(mixed) for _, mixed, _, _ in rows)), len(rows) + 1
    figure = Figure(figsize=(1.6 * columns + 0.5, 1.9 * tall + 0.8), layout="constrained")
    grid = figure.subplots(tall, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    # ---- Inputs and their saliency ----
    for column, (picture, name) in enumerate(zip(to_pixels(images, mean, std), names, strict=True)):
        axes, beside = grid[0, 2 * column : 2 * column + 2]
        axes.imshow(picture)
        axes.set_title(shorten(name, 26), fontsize=8, parse_math=False)
        axes.spines[:].set(visible=True, color=colours[column].tolist(), linewidth=4)
        draw_map(beside, saliency[column].float().cpu().numpy())
    grid[0, 0].set_ylabel("images", fontsize=9)
    # ---- One row per method: mixed images and the sources of their pixels ----
    for line, (text, mixed, shown, soft) in zip(grid[1:], rows, strict=True):
        line[0].set_ylabel(text, fontsize=9)
        for number, picture in enumerate(to_pixels(mixed, mean, std)):
            line[2 * number].imshow(picture)
            line[2 * number].set_title(format_label(soft[number], names), fontsize=7, parse_math=False)
            line[2 * number + 1].imshow(shown[number].clamp(0, 1).numpy())
    figure.supxlabel(
        "left: mixed image; right: its pixels in the frame colours of the images they come from", fontsize=8
    )
    add_colour_bar(figure, grid, f"saliency of each image: {guide}", location="bottom")
    save_figure(figure, path, dpi)


def to_pixels(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo the normalisation: (B, 3, H, W) -> (B, H, W, 3) in 0..1."""
    back = images.float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return back.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def shorten(text: str, max_length: int = 32) -> str:
    """Cut a text to at most max_length characters: an ellipsis replaces its middle, since paths differ at their end."""
    text = text.encode(errors="replace").decode()  # a file name may contain undecodable bytes
    half = max_length // 2
    return text if len(text) <= max_length else f"{text[: max_length - half - 1]}\u2026{text[-half:]}"


def draw_confusion(path: Path, counts: torch.Tensor, classes: list[str], title: str, *, dpi: float = DPI) -> None:
    """Draw a confusion matrix: rows are true classes, columns predicted ones, values the percentage of the row."""
    share = 100 * counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    count = len(classes)
    side = max(0.5 * count + 2.5, 5) if count <= MAX_NUMBERED else 10  # room for names and title
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes, high = figure.subplots(), 100.0 if count <= MAX_NUMBERED else max(float(share.max()), 1.0)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=high)
    for row, column in share.ge(0.5).nonzero().tolist() if count <= MAX_NUMBERED else ():
        value = float(share[row, column])
        style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if value > 55 else "black"}
        axes.text(column, row, f"{value:.0f}", **style)
    if count <= MAX_NAMED:
        names = [shorten(name, 24) for name in classes]
        style = {"fontsize": min(10, 450 / count), "parse_math": False}
        turn = {"rotation": 60, "ha": "right"} if count <= MAX_NUMBERED else {"rotation": 90}
        axes.set_xticks(range(count), names, **turn, **style)
        axes.set_yticks(range(count), names, **style)
    axes.set(xlabel="predicted", ylabel="true")
    figure.suptitle(shorten(title, int(9 * side)), fontsize=10)
    add_colour_bar(figure, axes, "images of the true class (%)", "Blues", (0, high))
    save_figure(figure, path, dpi)
