"""Tests of resizing: bicubic and bilinear as in Pillow, on any device, for crops of files and for batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.decode import decode_into
from engine.data.resize import resize_in_passes, resize_pixels
from engine.data.views import CenterCrop, SquashedView

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("shape", [(224, 224), (12, 20)])
def test_pixels_are_resized_as_by_pillow_on_any_device(interpolation, shape):
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    out = resize_pixels(pixels, *shape, interpolation).int()
    for one, image in zip(out, pixels, strict=True):
        expected = np.asarray(Image.fromarray(image.numpy()).resize(shape[::-1], PILLOW[interpolation]))
        assert (one - torch.tensor(expected.astype(np.int32))).abs().max() <= 2
    floats = resize_in_passes(pixels.permute(0, 3, 1, 2), *shape, interpolation).permute(0, 2, 3, 1)
    assert (floats.int() - out).abs().max() <= 2, "the passes of other devices"
    assert resize_pixels(pixels, 32, 32, interpolation) is pixels


@pytest.mark.parametrize("view", [CenterCrop(24, 28, "bicubic"), SquashedView(24, interpolation="bicubic")])
def test_a_view_resizes_with_its_interpolation(tmp_path, view):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    out = np.empty((24, 24, 3), np.uint8)
    decode_into(out, tmp_path / "a.png", view, None)
    with Image.open(tmp_path / "a.png") as image:
        squashed = isinstance(view, SquashedView)
        expected = image.resize((24, 24), Image.Resampling.BICUBIC) if squashed else image.crop((2, 2, 26, 26))
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 1
