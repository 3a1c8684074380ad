import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.image_files import BatchReader
from engine.data.views import CenterCrop
from engine.errors import UserError
from evaluation.corruption_benchmarks import (
    ALEXNET_ERRORS,
    EXTRA_CORRUPTIONS,
    find_corrupted_set,
    mean_corruption_error,
)

CLASSES = ["ape", "bee", "cat"]
VIEW = CenterCrop(8, 8)
COUNT = 6  # images per severity


def write_arrays(root: Path, names: list[str], labels: list[int], count: int = COUNT) -> np.ndarray:
    """Write the same array for each name: image i of severity s is full of 10 * s + i."""
    root.mkdir(parents=True, exist_ok=True)
    values = (10 * np.arange(1, 6)[:, None] + np.arange(count)).reshape(-1, 1, 1, 1)
    images = np.broadcast_to(values, (5 * count, 4, 4, 3)).astype(np.uint8)
    for name in names:
        np.save(root / f"{name}.npy", images)
    np.save(root / "labels.npy", np.array(labels, np.uint8))
    return images


def write_folders(root: Path, names: list[str], severities=(1, 2, 3, 4, 5), classes=CLASSES, count: int = 2) -> None:
    """Write images full of 10 * severity + their number."""
    for name in names:
        for severity in severities:
            for kind in classes:
                folder = root / name / str(severity) / kind
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    Image.new("L", (8, 8), 10 * severity + number).save(folder / f"{number}.png")


def read_values(image_set) -> list[int]:
    """Return the value that fills each image."""
    pixels = image_set.pixels
    if not isinstance(pixels, torch.Tensor):
        pixels = pixels.read_all(0, lambda items, **kwargs: items)[0]
    assert pixels.dtype == torch.uint8 and (pixels == pixels[:, :1, :1, :1]).all()
    return pixels[:, 0, 0, 0].tolist()


# ---- Arrays ----


@pytest.mark.parametrize("repeats", [1, 5])
def test_a_severity_is_its_fifth_of_the_array(tmp_path, repeats):
    labels = [0, 1, 2, 2, 1, 0]
    write_arrays(tmp_path, ["fog"], labels * repeats)
    found = find_corrupted_set(tmp_path, CLASSES)
    assert (found.kind, list(found.sources), list(found.sources["fog"])) == ("arrays", ["fog"], [1, 2, 3, 4, 5])
    for severity in found.sources["fog"]:
        image_set = found.load("fog", severity)
        assert image_set.pixels.shape == (COUNT, 4, 4, 3) and read_values(image_set) == [
            10 * severity + i for i in range(COUNT)
        ]
        assert image_set.labels.tolist() == labels and image_set.labels.dtype == torch.long
        assert image_set.classes == CLASSES and f"severity {severity}" in image_set.origin


def test_each_severity_may_have_labels_of_its_own(tmp_path):
    write_arrays(tmp_path, ["fog"], [0] * COUNT + [1] * COUNT + [2] * COUNT + [1] * COUNT + [0] * COUNT)
    found = find_corrupted_set(tmp_path, CLASSES)
    assert [found.load("fog", severity).labels.unique().item() for severity in range(1, 6)] == [0, 1, 2, 1, 0]


def test_loaded_images_are_writable_and_the_file_stays(tmp_path):
    before = write_arrays(tmp_path, ["fog"], [0, 1, 2, 0, 1, 2])
    find_corrupted_set(tmp_path, CLASSES).load("fog", 1).pixels.zero_()
    assert np.array_equal(np.load(tmp_path / "fog.npy"), before)


def test_corruptions_are_in_the_order_of_the_paper(tmp_path):
    names = ["zebra", "saturate", *reversed(ALEXNET_ERRORS), "speckle_noise", "another"]
    write_arrays(tmp_path, names, [0, 1, 2, 0, 1, 2])
    found = find_corrupted_set(tmp_path, CLASSES)
    assert list(found.sources) == [*ALEXNET_ERRORS, "speckle_noise", "saturate", "another", "zebra"] and not found.notes
    assert len(ALEXNET_ERRORS) == 15 and len({*ALEXNET_ERRORS, *EXTRA_CORRUPTIONS}) == 19


@pytest.mark.parametrize("count, folder", [(10, "CIFAR-10-C"), (100, "CIFAR-100-C")])
def test_of_two_sets_the_one_with_as_many_classes_is_used(tmp_path, count, folder):
    for name in ("CIFAR-10-C", "CIFAR-100-C"):
        write_arrays(tmp_path / name, ["fog"], [0, 1, 2, 3, 4, 9])
    found = find_corrupted_set(tmp_path, [str(number) for number in range(count)])
    assert found.root == tmp_path / folder


def test_missing_arrays_and_classes_are_noted(tmp_path):
    write_arrays(tmp_path, [name for name in ALEXNET_ERRORS if name not in ("snow", "fog")], [0, 1, 1, 0, 1, 1])
    lacks, fewer = find_corrupted_set(tmp_path, CLASSES).notes
    assert lacks.endswith("lacks 2 of the 15 corruptions: snow, fog")
    assert fewer.endswith("labels.npy has only 2 of the 3 classes")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_pickle_in_place_of_an_array_runs_no_code(tmp_path):
    write_arrays(tmp_path, ["fog"], [0, 1, 2, 0, 1, 2])
    np.save(tmp_path / "fog.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"fog\.npy is damaged"):
        find_corrupted_set(tmp_path, CLASSES)


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, r"fog\.npy is damaged .*\nunpack or download"),
        (lambda path: path.write_bytes(b""), r"fog\.npy is damaged"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), r"fog\.npy is damaged"),
        (lambda path: np.savez(path.open("wb"), np.zeros(3)), r"fog\.npy is damaged"),
        (
            lambda path: np.save(path, np.zeros((30, 4, 4, 3), np.float32)),
            r"float32 of shape \(30, 4, 4, 3\), expected uint8",
        ),
        (lambda path: np.save(path, np.zeros((30, 3, 4, 4), np.uint8)), r"uint8 of shape \(30, 3, 4, 4\), expected"),
        (lambda path: np.save(path, np.zeros((30, 4, 4), np.uint8)), r"shape \(30, 4, 4\), expected"),
        (lambda path: np.save(path, np.zeros((0, 4, 4, 3), np.uint8)), r"has 0 images"),
        (lambda path: np.save(path, np.zeros((31, 4, 4, 3), np.uint8)), r"31 images, expected five severities"),
        (lambda path: np.save(path, np.zeros((25, 4, 4, 3), np.uint8)), r"25 images, but labels.npy has 6 labels"),
        (lambda path: (path.unlink(), path.mkdir()), r"fog\.npy cannot be read: Is a directory"),
    ],
)
def test_a_damaged_array_is_named_at_once(tmp_path, damage, message):
    write_arrays(tmp_path, ["brightness", "fog"], [0, 1, 2, 0, 1, 2])
    damage(tmp_path / "fog.npy")
    with pytest.raises(UserError, match=message):
        find_corrupted_set(tmp_path, CLASSES)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, 2, 0, 1, 3], r"labels from 0 to 3, but the network has 3 classes\n"),
        ([0, 1, 2, 0, 1, -1], r"labels from -1 to 2"),
        ([0, 1, 2, 0, 1], r"30 images, but labels.npy has 5 labels"),
        ([0.0, 1, 2, 0, 1, 2], r"labels.npy holds float64"),
        ([[0, 1, 2, 0, 1, 2]], r"labels.npy holds int64 of shape \(1, 6\)"),
        ([], r"labels.npy holds"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    write_arrays(tmp_path, ["fog"], [])
    np.save(tmp_path / "labels.npy", np.array(labels))
    with pytest.raises(UserError, match=message):
        find_corrupted_set(tmp_path, CLASSES)


def test_truncated_and_missing_labels_are_named(tmp_path):
    write_arrays(tmp_path, ["fog"], [0, 1, 2, 0, 1, 2] * 40)
    truncate(tmp_path / "labels.npy")
    with pytest.raises(UserError, match=r"labels\.npy is damaged"):
        find_corrupted_set(tmp_path, CLASSES)
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"no .*labels\.npy, which must hold the classes.*\n.*contains fog\.npy"):
        find_corrupted_set(tmp_path, CLASSES)


# ---- Folders ----


@pytest.mark.parametrize("subfolder", ["", "ImageNet-C", "noise", "tiny-imagenet-c/blur"])
def test_folders_are_found_with_and_without_groups(tmp_path, subfolder):
    write_folders(tmp_path / subfolder, ["shot_noise", "gaussian_noise"])
    found = find_corrupted_set(tmp_path, CLASSES, view=VIEW)
    assert (found.kind, list(found.sources)) == ("folders", ["gaussian_noise", "shot_noise"])
    image_set = found.load("shot_noise", 3)
    assert (
        image_set.labels.tolist() == [0, 0, 1, 1, 2, 2]
        and read_values(image_set) == [30, 31] * 3
        and image_set.pixels.view == VIEW
    )
    assert image_set.files.names()[0] == "ape/0.png" and image_set.origin.endswith("shot_noise/3")


def test_labels_follow_the_classes_of_the_network(tmp_path):
    write_folders(tmp_path, list(ALEXNET_ERRORS), severities=[1], classes=["bee", "cat"])
    found = find_corrupted_set(tmp_path, ["cat", "dog", "bee"], view=VIEW)
    image_set = found.load("fog", 1)
    assert image_set.labels.tolist() == [2, 2, 0, 0] and image_set.classes == ["cat", "dog", "bee"]
    assert found.notes[-1].endswith("has only 2 of the 3 classes")


def test_missing_and_empty_severities_are_noted(tmp_path):
    write_folders(tmp_path, list(ALEXNET_ERRORS), classes=["ape"], count=1)
    write_folders(tmp_path, ["spatter"], severities=[1, 4], classes=["ape"], count=1)
    (tmp_path / "spatter" / "2").mkdir()
    found = find_corrupted_set(tmp_path, ["ape"], view=VIEW)
    assert list(found.sources["spatter"]) == [1, 4] and found.notes == ["spatter lacks severities 2, 3, 5"]
    with pytest.raises(ValueError, match="no 'spatter' of severity 2"):
        found.load("spatter", 2)
    with pytest.raises(ValueError, match="did you mean spatter"):
        found.load("splatter", 1)


def test_classes_of_another_data_set_are_refused_with_those_that_differ(tmp_path):
    theirs, ours = [f"n{number}" for number in range(7)], [f"n{number}" for number in range(6, 12)]
    write_folders(tmp_path, ["fog"], severities=[2], classes=theirs, count=1)
    with pytest.raises(UserError, match=r"n0, n1, n2, n3, n4 \.\.\. \(6\); only.*n10, n11, n7, n8, n9 \(5\)\n"):
        find_corrupted_set(tmp_path, ours, view=VIEW)


def test_folders_need_a_view(tmp_path):
    write_folders(tmp_path, ["fog"], severities=[1], classes=["ape"], count=1)
    with pytest.raises(ValueError, match="the argument view is needed"):
        find_corrupted_set(tmp_path, CLASSES)


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_a_bad_file_stops_or_is_skipped(tmp_path, on_bad_image):
    write_folders(tmp_path, ["fog"], severities=[1], classes=["ape"])
    (tmp_path / "fog" / "1" / "ape" / "0.png").write_bytes(b"")
    image_set = find_corrupted_set(tmp_path, CLASSES, view=VIEW, on_bad_image=on_bad_image).load("fog", 1)
    if on_bad_image == "skip":
        assert read_values(image_set) == [11]
    else:
        with pytest.raises(UserError, match=r"0\.png: the file is empty"):
            list(BatchReader(image_set.pixels).read([torch.arange(2)]))


def test_a_class_folder_without_images_is_named(tmp_path):
    write_folders(tmp_path, ["fog"], severities=[1])
    (tmp_path / "fog" / "1" / "bee" / "0.png").unlink()
    (tmp_path / "fog" / "1" / "bee" / "1.png").rename(tmp_path / "fog" / "1" / "bee" / "notes.txt")
    with pytest.raises(UserError, match="no images in bee"):
        find_corrupted_set(tmp_path, CLASSES, view=VIEW).load("fog", 1)


# ---- No corrupted set ----


def test_without_a_set_the_expected_files_and_the_content_are_listed(tmp_path):
    (tmp_path / "train" / "ape").mkdir(parents=True)
    (tmp_path / "labels.npy").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"<corruption>\.npy with labels.*<severity>/<class>.*\n.*contains labels\.npy, train"
    ):
        find_corrupted_set(tmp_path, CLASSES, view=VIEW)
    with pytest.raises(UserError, match=r"no folder .*gone\n.*contains labels\.npy, train"):
        find_corrupted_set(tmp_path / "gone", CLASSES, view=VIEW)
    with pytest.raises(UserError, match=r"no folder .*labels\.npy\n"):
        find_corrupted_set(tmp_path / "labels.npy", CLASSES, view=VIEW)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=rf"{tmp_path} cannot be read: Permission denied\n"):
        find_corrupted_set(tmp_path, CLASSES, view=VIEW)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", [".", "fog", "fog/1", "fog/1/ape"])
def test_a_folder_without_read_permission_is_named(tmp_path, closed):
    write_folders(tmp_path / "set", ["fog"], severities=[1])
    (tmp_path / "set" / closed).chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            find_corrupted_set(tmp_path / "set", CLASSES, view=VIEW).load("fog", 1)
    finally:
        (tmp_path / "set" / closed).chmod(0o700)


# ---- Mean corruption error ----


def test_mean_corruption_error_by_hand():
    errors = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": [0.5] * 5}
    mce, by_corruption = mean_corruption_error(
        errors, {"fog": [0.6] * 5, "snow": [0.2, 0.3, 0.2, 0.3, 0.25], "frost": 0.7}
    )
    assert by_corruption == pytest.approx({"fog": 50, "snow": 200}) and mce == pytest.approx(125)
    assert mean_corruption_error(errors, {"fog": 0.6, "snow": 0.25})[0] == pytest.approx(125)
    assert mean_corruption_error({name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}, ALEXNET_ERRORS)[
        0
    ] == pytest.approx(100)


def test_the_errors_of_alexnet_are_complete():
    assert sum(ALEXNET_ERRORS.values()) == pytest.approx(11.834896, abs=1e-9)
    assert list(ALEXNET_ERRORS)[0] == "gaussian_noise" and list(ALEXNET_ERRORS)[-1] == "jpeg_compression"
    assert (
        min(ALEXNET_ERRORS, key=ALEXNET_ERRORS.get) == "brightness"
        and max(ALEXNET_ERRORS, key=ALEXNET_ERRORS.get) == "impulse_noise"
    )


@pytest.mark.parametrize(
    "errors, reference, message",
    [
        (
            {"fog": [0.1], "spatter": [0.1], "zebra": [0.1]},
            ALEXNET_ERRORS,
            "the reference lacks spatter, zebra; it has",
        ),
        ({"fog": [0.1] * 5}, {"fog": 0.0}, "fog: .* divided by the reference error 0"),
        ({"fog": [0.1]}, {"fog": [0.0]}, "fog: .* divided by the reference error 0"),
        ({"fog": [0.1] * 5}, {"fog": float("nan")}, "fog: .* divided by the reference error nan"),
        ({"fog": [0.1]}, {"fog": [0.1, 0.2]}, "fog: severities measured: 1, of the reference: 2"),
        ({"fog": []}, {"fog": 0.5}, "fog"),
        ({}, ALEXNET_ERRORS, "no corruptions"),
    ],
)
def test_errors_that_have_no_reference_are_refused(errors, reference, message):
    with pytest.raises(ValueError, match=message):
        mean_corruption_error(errors, reference)


def test_a_reference_mean_over_five_severities_needs_all_five():
    with pytest.raises(ValueError, match="fog: severities measured: 1, but the reference"):
        mean_corruption_error({"fog": [0.5]}, ALEXNET_ERRORS)
