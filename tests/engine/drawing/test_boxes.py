"""Tests of drawing boxes and precision-recall curves."""

import numpy as np
import pytest
from PIL import Image

from engine.drawing import boxes


def test_dots_are_the_interpolated_precision(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(boxes, "save_figure", lambda figure, path, dpi: figures.append(figure))
    boxes.draw_precision_recall(tmp_path / "a.png", [("a", [0.3, 0.3, 0.6], [1.0, 0.5, 0.75]), ("b", [], [])], "")
    assert len(figures[0].axes) == 2
    full, empty = (axes.lines[1].get_ydata().tolist() for axes in figures[0].axes[:2])
    assert full == [100.0] * 4 + [75.0] * 3 + [0.0] * 4 and empty == [0.0] * 11


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (3, 3), (1500, 1000)])
def test_images_of_any_size_and_boxes_at_their_edges_are_drawn(tmp_path, shape, recwarn):
    height, width = shape
    picture = np.full((height, width, 3), 255, np.uint8)
    text = "a very long name of a class, $and_ \u5b57"
    drawn = [boxes.DrawnBox((0, 0, width, height), text, (0.1, 0.2, 0.9), dashed=True)] * 3
    boxes.draw_box_pairs(tmp_path / "a.png", [("\u5b57 $_", picture, drawn, [])], ("left", "right"), "one\ntwo")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1030 and image.height == pytest.approx(500 * min(1, height / width) + 94, abs=2)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0]) > 120
    assert blue[:, :520].sum() > 100 and not blue[:, 520:].any()
    assert not recwarn.list  # no warnings about characters that are missing in the font


def test_box_is_drawn_at_its_position(tmp_path):
    picture = np.full((100, 250, 3), 255, np.uint8)
    box = boxes.DrawnBox((50, 30, 150, 80), "a", (0.0, 0.0, 1.0))
    boxes.draw_box_pairs(tmp_path / "a.png", [("", picture, [], [box])], ("", ""), "")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels[..., 2] > 240) & (pixels[..., 0] < 20))
    x0, y0 = 520, 24  # top left corner of the right image, which is drawn at twice its size
    found = [columns.min() - x0, rows[columns > x0 + 200].min() - y0, columns.max() - x0, rows.max() - y0]
    assert found == pytest.approx([100, 60, 300, 160], abs=2)


def test_labels_of_overlapping_boxes_do_not_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(boxes, "save_figure", lambda figure, path, dpi: figures.append(figure))
    picture = np.zeros((100, 100, 3), np.uint8)
    box = boxes.DrawnBox((20, 30, 80, 90), "person 0.99", (1.0, 0.5, 0.0))
    boxes.draw_box_pairs(tmp_path / "a.png", [("", picture, [box] * 5, [])], ("", ""), "")
    texts = [text.get_window_extent() for text in figures[0].axes[0].texts if text.get_text() == "person 0.99"]
    assert len(texts) == 5
    assert not any(one.overlaps(other) for place, one in enumerate(texts) for other in texts[:place])
