"""Draw heatmaps over their images, save and print them, and combine them into one figure."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from engine.data.pictures import print_line, slugify
from engine.data.views import Box
from engine.drawing.figures import is_constant
from engine.drawing.heatmaps import CELL_INCHES, draw_comparison, overlay_heatmap
from engine.errors import UserError
from engine.runtime.files import write_atomic
from engine.runtime.text import get_distinct_names
from explanation.explainer import Explanation
from explanation.options import is_png

MAX_WINDOWS = 10  # maximum number of windows that --show opens


@dataclass(frozen=True)
class OverlaySettings:
    """How heatmaps are drawn and saved."""

    output: str  # a folder, or a .png file
    alpha: float  # opacity of the heatmap over the image
    colormap: str  # name of a colormap of matplotlib
    raw: bool  # also save each heatmap as .npy
    figure: str | None  # file of the figure of all heatmaps; None: no figure, so no thumbnails are kept
    dpi: int  # of that figure


class DrawnImage(NamedTuple):
    """The overlays of one image."""

    rows: list[dict]  # for each heatmap: classifier, method, classes and file
    thumbnails: list[np.ndarray]  # of the image and of each overlay; empty without a figure
    is_cropped: bool  # whether a classifier did not see the whole image


def save_overlays(
    file: Path, image: np.ndarray, explanations: list[Explanation], stem: str, settings: OverlaySettings
) -> DrawnImage:
    """Draw, save and print the explanations of an image uint8 (H, W, 3). stem: prefix of the output file names."""
    rows, thumbnails = [], [make_thumbnail(image, settings.dpi)] if settings.figure else []
    for explanation in explanations:
        heatmap = resize_to_box(explanation.heatmap, explanation.box, stretch=explanation.method != "casm")
        overlay = overlay_heatmap(image, heatmap, settings.alpha, settings.colormap, explanation.box)
        path = build_output_path(explanation, stem, settings.output)
        row = {"image": str(file), **describe_explanation(explanation), "output": str(path)}
        is_saved = any(row["output"] == earlier["output"] for earlier in rows)  # a class may have been given twice
        rows.append(row)
        if settings.figure:
            thumbnails.append(make_thumbnail(overlay, settings.dpi))
        if is_saved:
            continue
        save_png(path, overlay)
        if settings.raw:
            row["raw"] = str(path.with_suffix(".npy"))
            save_npy(Path(row["raw"]), pad_to_image(heatmap, explanation.box, *image.shape[:2]))
        print_line(format_row(row))
        if is_constant(heatmap):
            print_line(f"note: {path}: the map has the same value everywhere, so the image is drawn without colours")
    is_cropped = any(explanation.box != (0, image.shape[0], 0, image.shape[1]) for explanation in explanations)
    return DrawnImage(rows, thumbnails, is_cropped)


def resize_to_box(heatmap: torch.Tensor, box: Box, stretch: bool) -> np.ndarray:
    """Resize a heatmap (h, w) in 0..1 to the size of a box, float32. stretch: rescale to the full range 0..1."""
    y1, y2, x1, x2 = box
    values = F.interpolate(heatmap[None, None].float(), (y2 - y1, x2 - x1), mode="bilinear")[0, 0].numpy()
    low, high = values.min(), values.max()
    if stretch and high > low:  # in place, since the box may be as large as a photograph
        values -= low
        values /= high - low
    return values


def pad_to_image(heatmap: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """Pad a heatmap of the size of the box with zeros to (height, width)."""
    y1, y2, x1, x2 = box
    return np.pad(heatmap, ((y1, height - y2), (x1, width - x2)))


def make_thumbnail(image: np.ndarray, dpi: int) -> np.ndarray:
    """Shrink an image uint8 (H, W, 3) to the pixels that it has in a figure with this resolution."""
    scale = CELL_INCHES * dpi / image.shape[1]
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image


def build_output_path(explanation: Explanation, stem: str, output: str) -> Path:
    """Return the .png file of an overlay."""
    if is_png(output):
        return Path(output)
    classifier, target = explanation.classifier, explanation.target
    name = slugify(classifier.title(target))
    namesakes = sum(slugify(title).lower() == name.lower() for title in classifier.titles)  # ImageNet has two cranes
    name += f"_{target}" if namesakes > 1 else ""
    return Path(output) / f"{stem}_{slugify(classifier.name)}_{explanation.method}_{name}.png"


def describe_explanation(explanation: Explanation) -> dict:
    """Return the classifier, the method, and index, name and probability of the predicted and the target class."""
    classifier, probabilities = explanation.classifier, explanation.probabilities
    row = {"model": classifier.name, "method": explanation.method}
    for key, index in (("predicted", explanation.predicted), ("target", explanation.target)):
        row |= {f"{key}_index": index, key: classifier.title(index), f"{key}_probability": float(probabilities[index])}
    return row


def format_row(row: dict) -> str:
    """Return the console line of a heatmap. row: describe_explanation() with image and output."""
    prediction = f"predicted {row['predicted']} {row['predicted_probability']:.1%}"
    kind = f"{row['method']} map of {row['target']}"
    if row["method"] == "casm":  # its masks depend on no class
        kind = "casm mask"
    elif row["target_index"] != row["predicted_index"]:
        kind += f" ({row['target_probability']:.1%})"
    return f"{row['image']}  {row['model']}  {prediction}  {kind}  {row['output']}"


def save_png(path: Path, image: np.ndarray) -> None:
    """Save an image uint8 (H, W, 3) and create its folder. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--output {path.parent}: the folder cannot be created ({error.strerror}); choose another"
        raise UserError(message) from error
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    write_atomic(path, lambda side: side.write_bytes(encoded))


def save_npy(path: Path, values: np.ndarray) -> None:
    def write(side: Path) -> None:
        with open(side, "wb") as file:  # given a path, np.save would append .npy to the temporary file's name
            np.save(file, values)

    write_atomic(path, write)


def draw_figure(path: str, images: list[DrawnImage], *, colormap: str, dpi: int) -> None:
    """Draw a row per image and a column per classifier, method and target."""
    first = images[0].rows
    methods = {row["method"] for row in first}
    has_methods = len(methods) > 1
    legend = ["mask of casm, from 0 to 1"] if "casm" in methods else []
    legend += ["map, each from its own lowest to its highest value"] if methods - {"casm"} else []
    legend += ["pale and grey: not seen by the network"] if any(image.is_cropped for image in images) else []
    files = [Path(image.rows[0]["image"]) for image in images]
    draw_comparison(
        path,
        columns=[row["model"] + (f"\n{row['method']}" if has_methods else "") for row in first],
        names=get_distinct_names([file.name for file in files], files),
        pictures=[image.thumbnails[0] for image in images],
        overlays=[image.thumbnails[1:] for image in images],
        texts=[[f"{row['target']} {row['target_probability']:.0%}" for row in image.rows] for image in images],
        legend="\n".join(legend),
        colormap=colormap,
        dpi=dpi,
    )
    print(f"wrote {path}")


def show_images(paths: list[str]) -> None:
    """Open a window for each image, or print a note if there is no display."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print("note: --show: no display is available; open the saved files instead")
        return
    if len(paths) > MAX_WINDOWS:
        print(f"note: --show: only the first {MAX_WINDOWS} of {len(paths)} images; --figure FILE.png combines all")
    try:
        from matplotlib import image, pyplot

        for path in paths[:MAX_WINDOWS]:
            axes = pyplot.figure(path, layout="constrained").subplots()
            axes.imshow(image.imread(path))
            axes.axis("off")
        pyplot.show()
    except Exception as error:
        print(f"note: --show: no window could be opened ({type(error).__name__}); open the saved files instead")
