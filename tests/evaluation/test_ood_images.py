import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.datasets import load_evaluation
from engine.data.image_files import BatchReader
from engine.data.views import CenterCrop
from engine.errors import UserError
from evaluation.ood_images import load_ood_set


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def read(part) -> torch.Tensor:
    return part.pixels.read_all(0, lambda items, **kwargs: items)[0]


def write_cifar(root: Path, count: int = 4) -> np.ndarray:
    """All the files of CIFAR-10, of which only the test batch has images: (count, 32, 32, 3)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(b"")
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    content = {"data": pixels.reshape(count, -1), "labels": list(range(count))}
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    return pixels.transpose(0, 2, 3, 1)


# data sets


@pytest.mark.parametrize("named", [False, True])
def test_a_data_set_comes_from_its_place_with_labels_of_zero(tmp_path, named):
    pixels = write_cifar(tmp_path)
    word, place = (f"cifar10={tmp_path}", "elsewhere") if named else ("cifar10", str(tmp_path))
    name, part = load_ood_set(word, image_size=32, data_dir=place)
    assert name == "cifar10" and np.array_equal(part.pixels, pixels)
    assert part.labels.tolist() == [0] * 4 and part.labels.dtype == torch.long and part.classes == ["cifar10"]
    assert part.summary("test").startswith("4 test images, 1 class, 4 each, from ")


@pytest.mark.parametrize("side", [16, 48])
def test_pixels_of_another_size_are_resized_batch_by_batch(tmp_path, side):
    pixels = write_cifar(tmp_path, count=300)  # more than one batch
    part = load_ood_set("cifar10", image_size=side, data_dir=str(tmp_path))[1]
    assert part.pixels.shape == (300, side, side, 3) and part.pixels.dtype == torch.uint8
    for place in (0, 255, 256, 299):
        expected = np.asarray(Image.fromarray(pixels[place]).resize((side, side), Image.Resampling.BILINEAR)).astype(
            int
        )
        assert np.abs(part.pixels[place].numpy() - expected).max() <= 1


def test_a_limit_is_spread_over_the_set(tmp_path):
    pixels = write_cifar(tmp_path, count=9)
    part = load_ood_set("cifar10", image_size=32, data_dir=str(tmp_path), limit=3)[1]
    taken = [next(n for n in range(9) if np.array_equal(one, pixels[n])) for one in part.pixels]
    assert [n // 3 for n in taken] == [0, 1, 2] and len(part.labels) == 3


def test_shapes_are_drawn_at_the_size_of_the_network():
    name, part = load_ood_set("shapes", image_size=20, limit=5)
    assert name == "shapes" and part.labels.tolist() == [0] * 5 and part.pixels.shape == (5, 20, 20, 3)
    assert torch.equal(part.pixels, load_evaluation("shapes", image_size=20).subsample(5).pixels)


def test_any_part_of_imagenet_serves(tmp_path):
    write_image(tmp_path / "ILSVRC2012" / "val" / "n01" / "a.png", 40)
    write_image(tmp_path / "ILSVRC2012" / "val" / "n02" / "b.png", 80)
    name, part = load_ood_set("imagenet", image_size=8, data_dir=str(tmp_path))
    assert name == "imagenet" and part.labels.tolist() == [0, 0] and read(part)[:, 0, 0, 0].tolist() == [40, 80]
    assert part.pixels.view == CenterCrop(8, 8) and part.files.names() == ["n01/a.png", "n02/b.png"]


def test_tiny_imagenet_is_cut_to_the_size_of_the_network(tmp_path):
    write_image(tmp_path / "tiny-imagenet-200" / "val" / "n01" / "images" / "a.JPEG", 40, (64, 64))
    part = load_ood_set("tiny-imagenet", image_size=32, data_dir=str(tmp_path))[1]
    assert read(part).shape == (1, 32, 32, 3)


def test_a_data_set_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="cifar100 not found"):
        load_ood_set("cifar100", image_size=32, data_dir=str(tmp_path))


# pictures


def test_a_folder_is_searched_to_its_depths_and_hidden_files_are_passed_over(tmp_path):
    root = tmp_path / "textures"
    write_image(root / "b.png", 20)
    write_image(root / "a" / "deep" / "z.JPG", 10)
    write_image(root / "a" / "other.png", 30)
    for hidden in (".b.png", "a/._z.jpg", ".cache/c.png"):
        write_image(root / hidden, 99)
    (root / "a" / "readme.txt").write_text("no picture")
    name, part = load_ood_set(str(root), image_size=8)
    assert name == "textures" and part.files.names() == ["a/deep/z.JPG", "a/other.png", "b.png"]
    assert (
        part.labels.tolist() == [0] * 3
        and part.classes == ["textures"]
        and read(part)[1:, 4, 4, 0].tolist() == [30, 20]
    )
    first, last = load_ood_set(str(root), image_size=8, limit=2)[1].files.names()
    assert first == "a/deep/z.JPG" and last in ("a/other.png", "b.png")


def test_a_folder_is_called_by_its_own_name(tmp_path, monkeypatch):
    write_image(tmp_path / "cifar10" / "a=b" / "x.png", 1)
    monkeypatch.chdir(tmp_path / "cifar10")
    assert load_ood_set(".", image_size=8)[0] == "cifar10"
    assert load_ood_set("a=b", image_size=8)[0] == "a=b"
    monkeypatch.chdir(tmp_path)
    assert load_ood_set("./cifar10", image_size=8)[1].files.names() == ["a=b/x.png"]


def test_grey_transparent_and_deep_pictures_are_rgb_of_8_bits(tmp_path):
    for number, mode in enumerate(("L", "LA", "RGBA")):
        write_image(tmp_path / f"{number}.png", 60, mode=mode)
    Image.fromarray(np.full((10, 12), 60 * 256 + 7, np.uint16)).save(tmp_path / "3.png")
    pixels = read(load_ood_set(str(tmp_path), image_size=8)[1])
    assert pixels.shape == (4, 8, 8, 3) and (pixels == 60).all()


def test_pictures_of_every_shape_are_cut_to_the_centre_square(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (read(load_ood_set(str(tmp_path), image_size=4)[1]) == 200).all()


@pytest.mark.parametrize("bad", ["0.png", "1.png"])
def test_an_empty_file_stops_or_is_skipped(tmp_path, bad):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", 10 * number)
    (tmp_path / bad).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{bad}: not an image\n.*--on_bad_image skip"):
        part = load_ood_set(str(tmp_path), image_size=8)[1]
        list(BatchReader(part.pixels).read([torch.arange(3)]))
    part = load_ood_set(str(tmp_path), image_size=8, on_bad_image="skip")[1]
    assert read(part)[:, 0, 0, 0].tolist() == ([10, 10, 20] if bad == "0.png" else [0, 20, 20])


def test_pictures_none_of_which_can_be_decoded_are_refused_at_once(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{tmp_path}: none of the image files can be read\nname other pictures"):
        load_ood_set(str(tmp_path), image_size=8, on_bad_image="skip")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images there or in its folders\n.*contains nothing"):
        load_ood_set(str(tmp_path / "empty"), image_size=8)
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="contains notes.txt"):
        load_ood_set(str(tmp_path / "empty"), image_size=8)


@pytest.mark.parametrize(
    "word, near", [("cifar-10", "cifar10"), ("CIFAR100", "cifar100"), ("tinyimagenet=x", "tiny-im")]
)
def test_an_unknown_word_is_answered_with_the_nearest(tmp_path, monkeypatch, word, near):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{word}: neither a folder nor one of cifar10, .*did you mean {near}"):
        load_ood_set(word, image_size=8)


def test_a_folder_that_refuses_to_be_listed_is_named(tmp_path, monkeypatch):
    write_image(tmp_path / "open" / "a.png", 1)
    write_image(tmp_path / "shut" / "b.png", 1)
    real = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="shut cannot be read: Permission denied"):
        load_ood_set(str(tmp_path), image_size=8)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(tmp_path):
    write_image(tmp_path / "open" / "a.png", 1)
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(UserError, match="shut cannot be read: Permission denied"):
        load_ood_set(str(tmp_path), image_size=8)


# noise


def test_noise_has_its_mean_and_deviation_and_is_the_same_each_time():
    name, part = load_ood_set("noise", image_size=16, limit=200)
    values = part.pixels.float() / 255
    assert name == "noise" and part.pixels.shape == (200, 16, 16, 3) and part.pixels.dtype == torch.uint8
    assert abs(values.mean() - 0.5) < 0.003 and abs(values.std() - 0.2422) < 0.003  # 0.25 before clipping
    assert 0.02 < (part.pixels == 0).float().mean() < 0.026  # beyond two deviations
    assert torch.equal(part.pixels[:40], load_ood_set("noise", image_size=16, limit=40)[1].pixels)
    assert len(part.pixels.flatten(1).unique(dim=0)) == 200


def test_uniform_noise_has_every_level_as_often():
    part = load_ood_set("uniform", image_size=16, limit=200)[1]
    counts = torch.bincount(part.pixels.flatten().long(), minlength=256)
    assert 0.8 < counts.min() / counts.float().mean() and counts.max() / counts.float().mean() < 1.2


@pytest.mark.parametrize("word", ["noise", "uniform"])
def test_at_most_a_thousand_pictures_of_noise(word):
    assert [len(load_ood_set(word, image_size=4, limit=limit)[1]) for limit in (0, 3, 1200)] == [1000, 3, 1000]
