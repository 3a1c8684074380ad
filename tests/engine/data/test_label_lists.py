"""Lists that give the class of each image: every form of line, and the errors that name the first wrong ones."""

from pathlib import Path

import pytest

from engine.data.label_lists import read_labels, split_line
from engine.errors import UserError

NAMES = ["a.jpg", "b.jpg", "my cat.png", "c.JPEG"]


def read(tmp_path: Path, text: str | bytes, names: list[str] = NAMES) -> tuple[dict[str, str], list[str]]:
    path = tmp_path / "labels.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, names, Path("data/val"))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a.jpg cat", ("a.jpg", "cat")),
        ("  a.jpg \t cat ", ("a.jpg", "cat")),
        ("my cat.png cat", ("my cat.png", "cat")),
        ("my cat.png\tgolden retriever", ("my cat.png", "golden retriever")),
        ("a.jpg,golden retriever", ("a.jpg", "golden retriever")),
        ('"a.jpg", "cat, wild"', ("a.jpg", "cat, wild")),
        ("val_0,n02 1 2 3 4 n03 5 6 7 8", ("val_0", "n02")),
        ("val_0,n02 1 2 3 4 ", ("val_0", "n02")),
        ("val_0.JPEG\tn02\t0\t32\t44\t62", ("val_0.JPEG", "n02")),
        ("val_0.JPEG n02 0 32 44 62", ("val_0.JPEG", "n02")),
        ("a.jpg", ("a.jpg", "")),
        ("a.jpg,", ("a.jpg", "")),
        ("a.jpg,640,480", ("a.jpg", "")),
    ],
)
def test_a_line_is_split_into_file_and_class(line, parts):
    assert split_line(line) == parts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
@pytest.mark.parametrize(
    "start", ["", "\ufeff", "file,class\n", "\ufeffImageId,PredictionString\r\n", "\n\nimage\tlabel\n"]
)
def test_byte_order_mark_header_blank_lines_and_line_ends_do_not_matter(tmp_path, start, end):
    labels, absent = read(tmp_path, start + end.join(["a.jpg,dog", "b.jpg,cat", "c,cow"]) + end)
    assert labels == {"a.jpg": "dog", "b.jpg": "cat", "c.JPEG": "cow"} and not absent


@pytest.mark.parametrize("folder", ["", "./", "val/", "data/val/", "/home/me/data/val/", "data\\val\\"])
def test_a_file_may_be_given_with_its_folder(tmp_path, folder):
    assert read(tmp_path, f"{folder}a.jpg dog")[0] == {"a.jpg": "dog"}


def test_files_of_other_folders_and_missing_ones_are_returned_with_their_lines(tmp_path):
    labels, absent = read(tmp_path, "a.jpg dog\ntrain/b.jpg dog\nz.jpg cat\n")
    assert labels == {"a.jpg": "dog"}
    assert absent == [
        "line 2: 'train/b.jpg dog' names a file that is not in data/val",
        "line 3: 'z.jpg cat' names a file that is not in data/val",
    ]


def test_a_name_without_extension_must_be_unique(tmp_path):
    assert read(tmp_path, "a dog", ["a.jpg", "a.png"])[1] == ["line 1: 'a dog' names a file that is not in data/val"]


@pytest.mark.parametrize("again", ["a.jpg cat", "a.jpg dog", "val/a.jpg cat", "a cat"])
def test_a_file_that_is_listed_twice_is_refused(tmp_path, again):
    with pytest.raises(UserError, match=r"labels.txt, line 4: a.jpg is already listed, in line 1 as dog\ncorrect"):
        read(tmp_path, f"a.jpg dog\nb.jpg dog\n\n{again}\n")


def test_the_first_three_wrong_lines_are_named(tmp_path):
    with pytest.raises(UserError, match=r"line 2: 'b.jpg' .*; line 3: a.jpg is .*; line 4: 'x' .*; \.\.\.\n"):
        read(tmp_path, "a.jpg dog\nb.jpg\na.jpg dog\nx\ny\n")


@pytest.mark.parametrize("text", [b"\xff\xfea\x00", b"\x89PNG\r\n\x1a\n\xff"])
def test_a_file_that_is_no_text_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"labels.txt: cannot be read \(not a text file in UTF-8\)\ngive a text file"):
        read(tmp_path, text)
