"""Which files of a folder are images, which folders are classes, and what is said about the rest."""

import os
from pathlib import Path

import pytest
from support import write_class_folders, write_image

from engine.data.datasets import load_data, load_evaluation
from engine.data.folders import find_class_folders, find_folder, find_tiny_validation
from engine.data.listing import list_folders, list_images, walk_files
from engine.data.resize_copies import resize_copies
from engine.errors import UserError
from evaluation.ood_images import load_ood_set


def write_jpeg(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path.with_suffix(".jpg"), 60, size=(8, 8))
    path.with_suffix(".jpg").rename(path)


def test_images_in_subfolders_of_a_class_are_read(tmp_path):
    names = ["a/images/0.jpg", "a/1.jpg", "a/2.JPG", "b/day/one/3.jpg", "b/4.jpg", "c/images/5.jpg"]
    for name in names:
        write_jpeg(tmp_path / name)
    found = find_class_folders(tmp_path)
    assert sorted(found.files.names()) == sorted(names) and found.notes == ()
    assert found.classes == ["a", "b", "c"] and found.labels.tolist() == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPEG", ".Jpg", ".avif", ".jp2", ".pbm", ".pnm", ".webp"])
def test_usual_endings_are_read(tmp_path, ending):
    write_jpeg(tmp_path / f"a/0{ending}")
    assert find_class_folders(tmp_path).files.names() == [f"a/0{ending}"]


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path):
    write_class_folders(tmp_path)
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints/0.jpg", "cat/._0.jpg", "cat/.thumbnails/0.jpg", "._0.jpg"):
            write_jpeg(tmp_path / split / name)
    data = load_data("folder", data_dir=str(tmp_path), image_size=8)
    assert data.classes == ["cat", "dog"] and len(data.train) == len(data.test) == 6 and not data.warnings
    assert len(load_evaluation("folder", data_dir=str(tmp_path))) == 6
    assert len(load_ood_set(str(tmp_path / "val"), image_size=8)[1]) == 6
    assert resize_copies(tmp_path, [8], tmp_path.parent / "copies", workers=1).made == 12
    assert list_folders(tmp_path / "val") == ["cat", "dog"] and list_images(tmp_path / "val") == []


def test_a_class_folder_with_only_hidden_files_counts_as_empty(tmp_path):
    write_class_folders(tmp_path)
    write_jpeg(tmp_path / "train" / "cow" / ".DS_Store")
    data = load_data("folder", data_dir=str(tmp_path), image_size=8)
    assert data.warnings == [f"{tmp_path / 'train'}: 1 empty class folder ignored (cow)"]


def test_what_is_not_read_is_said_with_number_and_examples(tmp_path):
    write_class_folders(tmp_path)
    for name in ("train/cat/1.heic", "train/dog/deep/2.heic", "train/dog/notes.txt", "train/3.jpg", "val/dog/4"):
        write_jpeg(tmp_path / name)
    train, val = tmp_path / "train", tmp_path / "val"
    why = "not read: no ending of an image that can be read; convert such images to .png"
    expected = [
        f"{train}: 1 image not read: not in a class folder (3.jpg)",
        f"{train}: 2 files {why} (cat/1.heic, dog/deep/2.heic)",
        f"{val}: 1 file {why} (dog/4)",
    ]
    assert load_data("folder", data_dir=str(tmp_path), image_size=8).warnings == expected
    assert list(load_evaluation("folder", data_dir=str(tmp_path)).notes) == expected[2:]


def test_links_to_parent_folders_are_not_followed(tmp_path):
    write_jpeg(tmp_path / "a" / "0.jpg")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "ab").symlink_to(tmp_path / "a", target_is_directory=True)
    assert list(walk_files(tmp_path)) == ["a/0.jpg", "ab/0.jpg"]


def test_val_with_nested_class_folders_is_found_without_train(tmp_path):
    write_jpeg(tmp_path / "val" / "cat" / "day" / "0.jpg")
    assert load_evaluation("folder", data_dir=str(tmp_path)).files.names() == ["cat/day/0.jpg"]


# ---- Images that a list labels ----


def write_flat_val(root: Path, names: str) -> Path:
    for label in ("cat", "dog"):
        write_jpeg(root / "train" / label / "0.jpg")
    for name in names.split():
        write_jpeg(root / "val" / name)
    return root / "labels.txt"


def test_images_without_a_label_are_reported(tmp_path):
    labels = write_flat_val(tmp_path, "a.jpg b.jpg c.jpg d.jpg ._a.jpg")
    labels.write_text("a.jpg cat\nb.jpg dog\n")
    _, test = find_folder(tmp_path, None, labels)
    assert test.files.names() == ["a.jpg", "b.jpg"]
    assert test.notes == (f"{tmp_path / 'val'}: 2 images not listed in {labels} and left out (c.jpg, d.jpg)",)
    write_jpeg(tmp_path / "val" / "more" / "e.jpg")
    (tmp_path / "val" / "f.heic").touch()
    _, test = find_folder(tmp_path, None, labels)
    _, subfolder, ending = test.notes
    assert "1 image in subfolders left out" in subfolder and subfolder.endswith(f"({os.path.join('more', 'e.jpg')})")
    assert "1 file not read" in ending and ending.endswith("(f.heic)")


def test_wrong_lines_of_a_label_list_stop_with_the_first_ones(tmp_path):
    labels = write_flat_val(tmp_path, "a.jpg b.jpg")
    labels.write_text("a.jpg cat\nx.jpg dog\nb.jpg dog\ny.jpg cat\nz.jpg cat\nw.jpg cat\n")
    with pytest.raises(UserError, match=r"labels.txt, line 2: 'x.jpg dog' names.*; line 4: .*; line 5: .*; \.\.\.\n"):
        find_folder(tmp_path, None, labels)


@pytest.mark.parametrize("separator", ["\t", " ", "  "])
def test_annotations_of_tiny_imagenet_are_read_with_tabs_or_spaces(tmp_path, separator):
    for name in ("0.JPEG", "1.JPEG", "2.JPEG"):
        write_jpeg(tmp_path / "images" / name)
    lines = ["0.JPEG n02 0 0 62 62", "1.JPEG n01 5 5 62 62", "9.JPEG n01 0 0 1 1"]
    text = "\ufeff" + "\r\n".join(line.replace(" ", separator) for line in lines)
    (tmp_path / "val_annotations.txt").write_bytes(text.encode())
    found = find_tiny_validation(tmp_path)
    assert found.files.names() == ["images/1.JPEG", "images/0.JPEG"] and found.classes == ["n01", "n02"]
    assert len(found.notes) == 2 and "line 3: '9.JPEG" in found.notes[0] and "(2.JPEG)" in found.notes[1]
