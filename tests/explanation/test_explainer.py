"""The part of an image that a classifier sees."""

import numpy as np
import pytest

from engine.data.views import CenterCrop, SquashedView
from explanation import crop_for_model


@pytest.mark.parametrize("view", [CenterCrop(64, 80), SquashedView(64, 80), SquashedView(64, 64), CenterCrop(32, 32)])
@pytest.mark.parametrize("size", [(90, 200), (240, 130), (40, 30), (1, 7), (100, 1)])
def test_crop_shows_exactly_the_part_in_the_box(view, size):
    height, width = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(height)[:, None], np.arange(width)  # each pixel encodes its position
    crop, (y1, y2, x1, x2) = crop_for_model(ramp, view)
    assert crop.shape == (view.size, view.size, 3) and 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
    for channel, (start, end) in enumerate([(y1, y2), (x1, x2)]):
        expected = start + (np.arange(view.size) + 0.5) * (end - start) / view.size - 0.5
        found = crop[..., channel].mean(1 - channel)
        assert np.abs(found - expected)[3:-3].max() < 1.2  # in pixels; the box and the values are rounded
