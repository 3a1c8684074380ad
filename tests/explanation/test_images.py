"""Find image files, and name their outputs."""

from pathlib import Path

import numpy as np
from support import write_image

from explanation import chunk, find_images, unique_stems


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "b/.hidden.png", "b/deep/3.png", "[x]*.png"):
        write_image(tmp_path / name, 0)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "folder.png").mkdir()
    found = find_images([str(tmp_path / word) for word in ("b/2.png", "b", "*/*/*.png", "[x]*.png")])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["b/2.png", "b/1.jpg", "b/deep/3.png", "[x]*.png"]


def test_chunk_limits_images_and_pixels_and_does_not_read_ahead():
    yielded = []

    def source():
        for side in (10, 10, 10, 30, 30, 30, 1):
            yielded.append(side)
            yield Path("a"), np.zeros((side, side, 3), np.uint8)

    sizes = []
    for group in chunk(source(), max_count=2, max_pixels=1000):
        sizes.append([len(image) for _, image in group])
        assert len(yielded) <= sum(map(len, sizes)) + 1, "at most one image is read ahead"
    assert sizes == [[10, 10], [10, 30], [30], [30, 1]]


def test_stems_are_unique_even_if_case_is_ignored():
    files = [Path(name) for name in ("a/x.png", "b/x.png", "a/x.jpg", "z.png")]
    assert unique_stems(files) == ["a_x.png", "b_x.png", "x.jpg", "z"]
    assert unique_stems([Path("a/X.png"), Path("b/a/x.png")]) == ["a_X.png_1", "a_x.png_2"]
