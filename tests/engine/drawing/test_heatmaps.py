"""Tests of heat maps over pictures, and of figures that compare them."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from engine.drawing import figures, heatmaps


def test_every_picture_is_drawn_in_its_cell(tmp_path):
    colours = np.random.RandomState(0).randint(0, 200, (2, 3, 3))
    shapes = [(40, 40), (20, 80)]
    cells = [[np.full((*shape, 3), one, np.uint8) for one in row] for shape, row in zip(shapes, colours, strict=True)]
    given = {"pictures": [row[0] for row in cells], "overlays": [row[1:] for row in cells], "legend": "map\npale"}
    given |= {"names": ["a", "b"], "columns": ["x", "y"], "texts": [["1", "2"]] * 2}
    for dpi in (110, 220):
        heatmaps.draw_comparison(tmp_path / "a.png", dpi=dpi, **given)
        drawn, unit = np.asarray(Image.open(tmp_path / "a.png"))[..., :3], dpi / 110
        for row, line in enumerate(colours):
            for column, colour in enumerate(line):
                ys, xs = np.nonzero((drawn == colour).all(2))
                (height, width), left = shapes[row], dpi * (0.08 + 2.18 * column)
                assert abs(xs.min() - left) < 3 and abs(xs.max() - left - 231 * unit) < 3, "it fills its column"
                assert abs(ys.max() - ys.min() - 231 * unit * height / width) < 4
                assert len(ys) > 0.9 * (231 * unit) ** 2 * height / width
                assert abs(ys.min() - dpi * (0.3 + row * (2.1 + 0.3))) < 3, "it is below the previous row and its text"


def test_long_figure_stays_below_the_pixel_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_PIXELS", 400)
    picture = np.zeros((50, 1, 3), np.uint8)
    given = {"pictures": [picture] * 5, "overlays": [[picture]] * 5, "texts": [["x" * 90]] * 5, "legend": ""}
    columns = ["model\nof a very long name" * 3]
    heatmaps.draw_comparison(tmp_path / "a.png", names=["\udcff.png"] * 5, columns=columns, **given)
    assert 300 < max(Image.open(tmp_path / "a.png").size) <= 400


def test_a_map_is_blended_inside_its_box_and_the_rest_is_pale_and_grey():
    picture = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    heat = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    drawn = heatmaps.overlay_heatmap(picture, heat, 0.25, "viridis", (1, 4, 2, 6)).astype(float)
    expected = 0.6 * 255 + 0.4 * (picture @ (0.299, 0.587, 0.114))[..., None].repeat(3, 2)
    expected[1:4, 2:6] = 0.75 * picture[1:4, 2:6] + 0.25 * 255 * colormaps["viridis"](heat)[..., :3]
    assert np.abs(drawn - expected).max() < 2


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_map_adds_no_colour(value):
    picture = np.random.RandomState(0).randint(0, 256, (6, 8, 3)).astype(np.uint8)
    assert np.array_equal(heatmaps.overlay_heatmap(picture, np.full((6, 8), value, np.float32)), picture)


def test_lightness_rises_evenly_along_the_default_colours():
    rgb = colormaps[figures.COLORMAP](np.linspace(0, 1, 64))[:, :3]
    assert (np.diff(rgb @ (0.299, 0.587, 0.114)) > 0).all(), "it also reads in grey; that of jet falls and rises"
