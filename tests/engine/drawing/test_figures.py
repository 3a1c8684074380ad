"""Tests of figures that compare overlays."""

import numpy as np
from PIL import Image

from engine.drawing import figures


def test_every_picture_is_drawn_in_its_cell(tmp_path):
    colours = np.random.RandomState(0).randint(0, 200, (2, 3, 3))
    shapes = [(40, 40), (20, 80)]
    cells = [[np.full((*shape, 3), one, np.uint8) for one in row] for shape, row in zip(shapes, colours, strict=True)]
    common = {"pictures": [row[0] for row in cells], "overlays": [row[1:] for row in cells]}
    figures.draw_comparison(tmp_path / "a.png", names=["a", "b"], columns=["x", "y"], texts=[["1", "2"]] * 2, **common)
    drawn = np.asarray(Image.open(tmp_path / "a.png"))[..., :3]
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            ys, xs = np.nonzero((drawn == colour).all(2))
            (height, width), left = shapes[row], 110 * (0.08 + 2.18 * column)
            assert abs(xs.min() - left) < 3 and abs(xs.max() - left - 231) < 3, "it fills the width of its column"
            assert abs(ys.max() - ys.min() - 231 * height / width) < 4 and len(ys) > 0.9 * 231**2 * height / width
            top = 110 * (0.3 + row * (2.1 + 0.3))
            assert abs(ys.min() - top) < 3, "it is below the previous row and its text"


def test_long_figure_stays_below_the_pixel_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_PIXELS", 400)
    picture = np.zeros((50, 1, 3), np.uint8)
    common = {"pictures": [picture] * 5, "overlays": [[picture]] * 5, "texts": [["x" * 90]] * 5}
    figures.draw_comparison(
        tmp_path / "a.png", names=["\udcff.png"] * 5, columns=["model\nof a very long name" * 3], **common
    )
    assert 300 < max(Image.open(tmp_path / "a.png").size) <= 400
