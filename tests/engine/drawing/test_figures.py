"""Tests of learning curves, rows of images, and what all figures share."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from engine.drawing import figures


@pytest.mark.parametrize("dpi", [60, 300])
def test_the_ending_of_the_name_says_which_file_is_written(tmp_path, dpi):
    figure = Figure(figsize=(2, 1))
    figure.subplots().set_title("a title \u5b57")  # a character that is missing in the font
    for ending in ("png", "PDF", "svg"):
        figures.save_figure(figure, tmp_path / "new" / f"a.{ending}", dpi)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (2 * dpi, dpi) and image.info["dpi"][0] == pytest.approx(dpi, abs=0.1)
    written = (tmp_path / "new" / "a.PDF").read_bytes()
    assert written.startswith(b"%PDF") and b"/Type3" not in written, "publishers refuse Type 3 fonts"
    assert b"[ 0 0 144 72 ]" in written, "2 x 1 inches at any resolution"
    assert "<svg" in (tmp_path / "new" / "a.svg").read_text()


def test_a_large_figure_stays_below_the_pixel_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_PIXELS", 400)
    figures.save_figure(Figure(figsize=(2, 1)), tmp_path / "a.png", dpi=1200)
    assert Image.open(tmp_path / "a.png").size == (400, 200)


@pytest.mark.parametrize("count, limit, columns", [(1, 4, 1), (4, 4, 4), (5, 4, 3), (7, 4, 4), (9, 4, 3), (11, 5, 4)])
def test_panels_leave_few_places_empty(count, limit, columns):
    assert figures.choose_columns(count, limit) == columns


def test_a_long_name_loses_its_middle():
    assert figures.shorten("resnet20/run/best.pt", 20) == "resnet20/run/best.pt"
    assert figures.shorten("runs/shapes/resnet20/run_a/best.pt", 15) == "runs/sh\u2026best.pt"
    assert len(figures.shorten("x" * 99, 16)) == 16


def test_losses_that_are_not_comparable_have_panels_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "draw_epoch_panels", lambda path, history, panels, title, dpi: drawn.append(panels))
    figures.draw_curves(tmp_path / "a.png", [], "", loss="ce")
    figures.draw_curves(tmp_path / "a.png", [], "", loss="softmax_bce", mixed=False)
    same, apart = drawn
    assert list(same["loss: cross-entropy"]) == ["train_loss", "test_loss"] and len(same) == 2
    assert list(apart["training loss: binary cross-entropy"]) == ["train_loss"] and len(apart) == 3
    assert list(apart["test loss: cross-entropy"]) == ["test_loss"]
    assert same["accuracy (%)"]["train_acc"].endswith("reads low)") and apart["accuracy (%)"]["train_acc"] == "training"


@pytest.mark.parametrize("count", [2, 5])
def test_a_legend_of_many_entries_is_below_the_axes(count):
    axes = Figure().subplots()
    for number in range(count):
        axes.plot([0, 1], [0, number], label=f"run {number}")
    figures.place_legend(axes)
    axes.figure.canvas.draw()
    assert (axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0) == (count > 4)


def test_a_constant_map_says_so():
    left, right = Figure().subplots(1, 2)
    figures.draw_map(left, np.zeros((4, 5)))
    figures.draw_map(right, np.zeros((4, 5)), limits=(0, 1))
    assert [text.get_text() for text in left.texts] == ["constant"] and not right.texts
    assert left.images[0].get_array().shape == (4, 5, 3) and np.ptp(left.images[0].get_array()) == 0
    assert (right.images[0].norm.vmin, right.images[0].norm.vmax) == (0, 1), "a mask of zeros has its own colour"


@pytest.mark.parametrize("classes", [2, 20, 100, 101])
def test_the_confusion_matrix_shows_its_whole_title_and_its_scale(tmp_path, monkeypatch, classes):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, dpi: drawn.append(figure))
    names = [f"a very long name of class {number} $_" for number in range(classes)]
    title = "runs/shapes/resnet20/saliencymix_with_a_very_long_name_of_its_own/best.pt, 12,000 images"
    figures.draw_confusion(tmp_path / "a.png", torch.eye(classes).long(), names, title)
    figure = drawn[0]
    figure.canvas.draw()
    extent = figure.get_suptitle() and figure._suptitle.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
    matrix, bar = figure.axes
    assert bar.get_ylabel() == "images of the true class (%)"
    assert len(matrix.get_yticklabels()) == classes or classes > 100


def test_the_foot_of_a_tall_figure_of_mixtures_is_as_small_as_that_of_a_low_one(tmp_path, monkeypatch):
    """No gap above the colour bar, and its label does not lie on the line below."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, *_: drawn.append(figure))
    images, colours = torch.rand(1, 3, 8, 8), torch.rand(1, 3)
    rows = [("method", images, torch.rand(1, 8, 8, 3), torch.ones(1, 1))] * 12
    made = {"images": images, "names": ["a"], "saliency": torch.rand(1, 8, 8), "guide": "gradient"}
    norm = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    figures.draw_mixtures(tmp_path / "tall.png", rows=rows, colours=colours, **made, **norm)
    figure = drawn[0]
    figure.draw_without_rendering()
    bar = figure.axes[-1]
    above, label, foot = (one.get_window_extent() for one in (figure.axes[-3], bar.xaxis.label, figure._supxlabel))
    assert above.y0 - bar.get_window_extent().y1 < 0.4 * figure.dpi and label.y0 >= foot.y1


@pytest.mark.parametrize("count", [1, 10, 11, 20, 21, 60])
def test_no_two_lines_have_the_same_colour(count):
    assert len({to_rgb(colour) for colour in figures.list_colours(count)}) == count
