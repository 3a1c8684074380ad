"""Overlays: heatmaps drawn over their pictures, saved, printed, and put together into one figure."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from engine.data.views import Box
from engine.drawing.figures import draw_comparison, overlay_heatmap
from engine.errors import UserError
from engine.runtime.files import write_atomic
from explanation.explainer import Explanation
from explanation.images import print_line, slugify
from explanation.options import is_png

MAX_THUMBNAIL_SIDE = 480  # pixels
MAX_WINDOWS = 10  # that --show opens


@dataclass(frozen=True)
class OverlaySettings:
    """How heatmaps are drawn, and what is kept of them."""

    output: str  # a folder, or the .png
    alpha: float  # weight of the heatmap over the picture
    colormap: str  # of matplotlib's
    raw: bool  # whether the heatmap is saved too, as a .npy
    figure: str | None  # where all go together; None: no thumbnails are kept


class DrawnPicture(NamedTuple):
    rows: list[dict]  # for each heatmap what is known of it
    thumbnails: list[np.ndarray]  # of the picture and of each overlay; empty without a figure


def save_overlays(
    file: Path, picture: np.ndarray, explanations: list[Explanation], stem: str, settings: OverlaySettings
) -> DrawnPicture:
    """Draw, save and print the explanations of a picture. stem: what it is called in the names of the files."""
    rows, thumbnails = [], [make_thumbnail(picture)] if settings.figure else []
    for explanation in explanations:
        heatmap = resize_to_box(explanation.heatmap, explanation.box, stretch=explanation.method != "casm")
        overlay = overlay_heatmap(picture, heatmap, settings.alpha, settings.colormap, explanation.box)
        path = build_output_path(explanation, stem, settings.output)
        row = {"image": str(file), **describe_explanation(explanation), "output": str(path)}
        is_saved = any(row["output"] == earlier["output"] for earlier in rows)  # a class may have been named twice
        rows.append(row)
        if settings.figure:
            thumbnails.append(make_thumbnail(overlay))
        if is_saved:
            continue
        save_png(path, overlay)
        if settings.raw:
            row["raw"] = str(path.with_suffix(".npy"))
            save_npy(Path(row["raw"]), pad_to_picture(heatmap, explanation.box, *picture.shape[:2]))
        print_line(format_row(row))
    return DrawnPicture(rows, thumbnails)


def resize_to_box(heatmap: torch.Tensor, box: Box, stretch: bool) -> np.ndarray:
    """(h, w) in 0..1 -> float32, as large as the box; stretch: to the full range 0..1 again."""
    y1, y2, x1, x2 = box
    values = F.interpolate(heatmap[None, None].float(), (y2 - y1, x2 - x1), mode="bilinear")[0, 0].numpy()
    low, high = values.min(), values.max()
    if stretch and high > low:  # in place: it may have as many pixels as a photograph
        values -= low
        values /= high - low
    return values


def pad_to_picture(heatmap: np.ndarray, box: Box, height: int, width: int) -> np.ndarray:
    """As large as the box -> (height, width), 0 outside of the box."""
    y1, y2, x1, x2 = box
    return np.pad(heatmap, ((y1, height - y2), (x1, width - x2)))


def make_thumbnail(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with sides of at most MAX_THUMBNAIL_SIDE pixels."""
    scale = MAX_THUMBNAIL_SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def build_output_path(explanation: Explanation, stem: str, output: str) -> Path:
    if is_png(output):
        return Path(output)
    classifier, target = explanation.classifier, explanation.target
    name = slugify(classifier.title(target))
    namesakes = sum(slugify(title).lower() == name.lower() for title in classifier.titles)  # ImageNet has two cranes
    name += f"_{target}" if namesakes > 1 else ""
    return Path(output) / f"{stem}_{slugify(classifier.name)}_{explanation.method}_{name}.png"


def describe_explanation(explanation: Explanation) -> dict:
    """The classifier and its predicted and explained classes, each with its index, name and probability."""
    classifier, probabilities = explanation.classifier, explanation.probabilities
    row = {"model": classifier.name, "method": explanation.method}
    for key, index in (("predicted", int(probabilities.argmax())), ("target", explanation.target)):
        row |= {f"{key}_index": index, key: classifier.title(index), f"{key}_probability": float(probabilities[index])}
    return row


def format_row(row: dict) -> str:
    target = "" if row["method"] == "casm" else f" of {row['target']} {row['target_probability']:.1%}"
    prediction = f"{row['predicted']} {row['predicted_probability']:.1%}"
    return f"{row['image']}  {row['model']}  {prediction}  {row['method']}{target}  {row['output']}"


def save_png(path: Path, picture: np.ndarray) -> None:
    """uint8 (H, W, 3), into a folder that is made. Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--output {path.parent}: the folder cannot be made ({error.strerror}); name another"
        raise UserError(message) from error
    _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    write_atomic(path, lambda side: side.write_bytes(encoded))


def save_npy(path: Path, values: np.ndarray) -> None:
    def write(side: Path) -> None:
        with open(side, "wb") as file:  # np.save would append .npy to the name of the side file
            np.save(file, values)

    write_atomic(path, write)


def draw_figure(path: str, pictures: list[DrawnPicture]) -> None:
    """A row per picture, a column per classifier, method and target."""
    first = pictures[0].rows
    has_methods = len({row["method"] for row in first}) > 1
    draw_comparison(
        path,
        columns=[row["model"] + (f"\n{row['method']}" if has_methods else "") for row in first],
        names=[Path(rows[0]["image"]).name for rows, _ in pictures],
        pictures=[thumbnails[0] for _, thumbnails in pictures],
        overlays=[thumbnails[1:] for _, thumbnails in pictures],
        texts=[[f"{row['target']} {row['target_probability']:.0%}" for row in rows] for rows, _ in pictures],
    )
    print(f"written: {path}")


def show_images(paths: list[str]) -> None:
    """Open windows with these pictures, where there is a display; without one, say so."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print("note: --show: there is no display here; the pictures are in their files")
        return
    if len(paths) > MAX_WINDOWS:
        print(f"note: --show: the first {MAX_WINDOWS} of {len(paths)} pictures; --figure FILE.png puts all into one")
    try:
        from matplotlib import image, pyplot

        for path in paths[:MAX_WINDOWS]:
            axes = pyplot.figure(path, layout="constrained").subplots()
            axes.imshow(image.imread(path))
            axes.axis("off")
        pyplot.show()
    except Exception as error:
        print(f"note: --show: no window could be opened ({type(error).__name__}); the pictures are in their files")
