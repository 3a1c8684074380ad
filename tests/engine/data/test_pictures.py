"""Find image files, and name their outputs."""

import re
from pathlib import Path

import numpy as np
import pytest
from support import write_image

from engine.data import chunk, find_images, unique_stems
from engine.errors import UserError

OPTION = "--image_path"


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "b/.hidden.png", "b/deep/3.png", "[x]*.png"):
        write_image(tmp_path / name, 0)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "folder.png").mkdir()
    found = find_images([str(tmp_path / word) for word in ("b/2.png", "b", "*/*/*.png", "[x]*.png")], OPTION)
    assert [str(file.relative_to(tmp_path)) for file in found] == ["b/2.png", "b/1.jpg", "b/deep/3.png", "[x]*.png"]


def test_what_a_folder_holds_besides_images_is_said(tmp_path, capsys):
    for name in ("1.png", "deep/2.png", ".hidden/3.png", "empty.png"):
        write_image(tmp_path / name, 0)
    for name in ("4.heic", "notes.txt", "._1.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    for pattern in (tmp_path, tmp_path / "*"):
        assert [file.name for file in find_images([str(pattern)], OPTION)] == ["1.png", "empty.png"]
        note = capsys.readouterr().out
        assert note.startswith(f"note: {pattern}: not read, since") and note.endswith(
            f": {tmp_path}/4.heic, {tmp_path}/deep/ (2)\n"
        )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("https://example.org/cat.jpg", "URLs are not opened; download the file, for example with curl -LO URL"),
        ("http://example.org/cat.jpg?size=1", "URLs are not opened"),
        ("-", "standard input is not read; save it to a file"),
        ("gone.jpg", "no such file"),
    ],
)
def test_names_that_are_no_files_are_explained(name, remedy):
    with pytest.raises(UserError, match=f"^--image_path {re.escape(name)}: {remedy}"):
        find_images([name], OPTION)


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
