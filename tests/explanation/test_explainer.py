"""What a classifier is shown of a picture."""

import numpy as np
import pytest

from engine.data.views import CenterCrop, SquashedView
from explanation import crop_for_model


@pytest.mark.parametrize("view", [CenterCrop(64, 80), SquashedView(64, 80), SquashedView(64, 64), CenterCrop(32, 32)])
@pytest.mark.parametrize("size", [(90, 200), (240, 130), (40, 30), (1, 7), (100, 1)])
def test_what_is_seen_is_what_lies_in_the_box(view, size):
    height, width = size
    slope = np.zeros((height, width, 3), np.uint8)
    slope[..., 0], slope[..., 1] = np.arange(height)[:, None], np.arange(width)  # each pixel says where it is
    seen, (y1, y2, x1, x2) = crop_for_model(slope, view)
    assert seen.shape == (view.size, view.size, 3) and 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
    for channel, (begin, end) in enumerate([(y1, y2), (x1, x2)]):
        places = begin + (np.arange(view.size) + 0.5) * (end - begin) / view.size - 0.5
        found = seen[..., channel].mean(1 - channel)
        assert np.abs(found - places)[3:-3].max() < 1.2  # of pixels; the box is rounded, and so are values
