import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.datasets import load_evaluation
from engine.data.image_files import BatchReader
from engine.data.image_set import spread_over_classes
from engine.data.views import CenterCrop
from engine.errors import UserError
from evaluation.ood_images import load_ood_set


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def read_pixels(image_set) -> torch.Tensor:
    return image_set.pixels.read_all(0, lambda items, **kwargs: items)[0]


def write_cifar(root: Path, count: int = 4) -> np.ndarray:
    """Write all the files of CIFAR-10, of which only the test batch has images: (count, 32, 32, 3)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}").write_bytes(b"")
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    content = {"data": pixels.reshape(count, -1), "labels": list(range(count))}
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    return pixels.transpose(0, 2, 3, 1)


# ---- Data sets ----


@pytest.mark.parametrize("named", [False, True])
def test_a_data_set_is_found_and_has_labels_of_zero(tmp_path, named):
    pixels = write_cifar(tmp_path)
    spec, data_dir = (f"cifar10={tmp_path}", "elsewhere") if named else ("cifar10", str(tmp_path))
    name, image_set = load_ood_set(spec, image_size=32, data_dir=data_dir)
    assert name == "cifar10" and np.array_equal(image_set.pixels, pixels)
    assert (
        image_set.labels.tolist() == [0] * 4
        and image_set.labels.dtype == torch.long
        and image_set.classes == ["cifar10"]
    )
    assert image_set.summary("outside").startswith("4 outside images, 1 class, 4 each, from ")


@pytest.mark.parametrize("side", [16, 48])
def test_pixels_of_another_size_are_resized_batch_by_batch(tmp_path, side):
    pixels = write_cifar(tmp_path, count=300)  # more than one batch
    image_set = load_ood_set("cifar10", image_size=side, data_dir=str(tmp_path))[1]
    assert image_set.pixels.shape == (300, side, side, 3) and image_set.pixels.dtype == torch.uint8
    for index in (0, 255, 256, 299):
        expected = np.asarray(Image.fromarray(pixels[index]).resize((side, side), Image.Resampling.BILINEAR)).astype(
            int
        )
        assert np.abs(image_set.pixels[index].numpy() - expected).max() <= 1


def test_limited_images_are_spread_over_the_set(tmp_path):
    pixels = write_cifar(tmp_path, count=9)
    image_set = load_ood_set("cifar10", image_size=32, data_dir=str(tmp_path), limit=3)[1]
    taken = [next(n for n in range(9) if np.array_equal(one, pixels[n])) for one in image_set.pixels]
    assert [n // 3 for n in taken] == [0, 1, 2] and len(image_set.labels) == 3


def test_shapes_are_drawn_at_the_image_size(few_shapes):
    name, image_set = load_ood_set("shapes", image_size=20, limit=5)
    assert name == "shapes" and image_set.labels.tolist() == [0] * 5 and image_set.pixels.shape == (5, 20, 20, 3)
    whole = load_evaluation("shapes", image_size=20)
    assert torch.equal(
        image_set.pixels, whole.pixels[spread_over_classes(torch.zeros(len(whole), dtype=torch.long), 5)]
    )


def test_imagenet_may_have_fewer_classes(tmp_path):
    write_image(tmp_path / "ILSVRC2012" / "val" / "n01" / "a.png", 40)
    write_image(tmp_path / "ILSVRC2012" / "val" / "n02" / "b.png", 80)
    name, image_set = load_ood_set("imagenet", image_size=8, data_dir=str(tmp_path))
    assert (
        name == "imagenet"
        and image_set.labels.tolist() == [0, 0]
        and read_pixels(image_set)[:, 0, 0, 0].tolist() == [40, 80]
    )
    assert image_set.pixels.view == CenterCrop(8, 8) and image_set.files.names() == ["n01/a.png", "n02/b.png"]


def test_tiny_imagenet_is_cropped_to_the_image_size(tmp_path):
    write_image(tmp_path / "tiny-imagenet-200" / "val" / "n01" / "images" / "a.JPEG", 40, (64, 64))
    image_set = load_ood_set("tiny-imagenet", image_size=32, data_dir=str(tmp_path))[1]
    assert read_pixels(image_set).shape == (1, 32, 32, 3)


def test_a_missing_data_set_is_reported(tmp_path):
    with pytest.raises(UserError, match="cifar100 not found"):
        load_ood_set("cifar100", image_size=32, data_dir=str(tmp_path))


# ---- Folders of images ----


def test_subfolders_are_searched_and_hidden_files_are_skipped(tmp_path):
    root = tmp_path / "textures"
    write_image(root / "b.png", 20)
    write_image(root / "a" / "deep" / "z.JPG", 10)
    write_image(root / "a" / "other.png", 30)
    for hidden in (".b.png", "a/._z.jpg", ".cache/c.png"):
        write_image(root / hidden, 99)
    (root / "a" / "readme.txt").write_text("no picture")
    (root / "a" / "b.heic").touch()
    name, image_set = load_ood_set(str(root), image_size=8)
    assert name == "textures" and image_set.files.names() == ["a/deep/z.JPG", "a/other.png", "b.png"]
    assert (
        image_set.labels.tolist() == [0] * 3
        and image_set.classes == ["textures"]
        and read_pixels(image_set)[1:, 4, 4, 0].tolist() == [30, 20]
    )
    assert [note.startswith(f"{root}: 1 file not read") for note in image_set.notes] == [True]
    first, last = load_ood_set(str(root), image_size=8, limit=2)[1].files.names()
    assert first == "a/deep/z.JPG" and last in ("a/other.png", "b.png")


def test_a_folder_is_named_after_itself(tmp_path, monkeypatch):
    write_image(tmp_path / "cifar10" / "a=b" / "x.png", 1)
    monkeypatch.chdir(tmp_path / "cifar10")
    assert load_ood_set(".", image_size=8)[0] == "cifar10"
    assert load_ood_set("a=b", image_size=8)[0] == "a=b"
    monkeypatch.chdir(tmp_path)
    assert load_ood_set("./cifar10", image_size=8)[1].files.names() == ["a=b/x.png"]


def test_grey_transparent_and_16_bit_images_become_8_bit_rgb(tmp_path):
    for number, mode in enumerate(("L", "LA", "RGBA")):
        write_image(tmp_path / f"{number}.png", 60, mode=mode)
    Image.fromarray(np.full((10, 12), 60 * 256 + 7, np.uint16)).save(tmp_path / "3.png")
    pixels = read_pixels(load_ood_set(str(tmp_path), image_size=8)[1])
    assert pixels.shape == (4, 8, 8, 3) and (pixels == 60).all()


def test_images_of_any_shape_are_cropped_to_the_centre_square(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (read_pixels(load_ood_set(str(tmp_path), image_size=4)[1]) == 200).all()


@pytest.mark.parametrize("bad", ["0.png", "1.png"])
def test_an_empty_file_stops_or_is_skipped(tmp_path, bad):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", 10 * number)
    (tmp_path / bad).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{bad}: the file is empty\n.*--on_bad_image skip"):
        image_set = load_ood_set(str(tmp_path), image_size=8)[1]
        list(BatchReader(image_set.pixels).read([torch.arange(3)]))
    image_set = load_ood_set(str(tmp_path), image_size=8, on_bad_image="skip")[1]
    assert read_pixels(image_set)[:, 0, 0, 0].tolist() == ([10, 20] if bad == "0.png" else [0, 20])


def test_a_folder_without_readable_images_is_refused_at_once(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"{tmp_path}: none of the image files can be read\nchoose other images"):
        load_ood_set(str(tmp_path), image_size=8, on_bad_image="skip")


@pytest.mark.parametrize(("spec", "remedy"), [("https://a.org/b.zip", "URLs are not opened"), ("-", "standard input")])
def test_a_url_or_a_dash_is_explained(spec, remedy):
    with pytest.raises(UserError, match=f"^--ood {spec}: {remedy}"):
        load_ood_set(spec, image_size=8)


def test_a_folder_without_images_lists_its_content(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images in this folder or its subfolders\n.*contains nothing"):
        load_ood_set(str(tmp_path / "empty"), image_size=8)
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="contains notes.txt"):
        load_ood_set(str(tmp_path / "empty"), image_size=8)


@pytest.mark.parametrize(
    "spec, closest", [("cifar-10", "cifar10"), ("CIFAR100", "cifar100"), ("tinyimagenet=x", "tiny-im")]
)
def test_an_unknown_name_is_answered_with_the_closest_one(tmp_path, monkeypatch, spec, closest):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"--ood {spec}: neither a folder nor one of cifar10, .*did you mean {closest}"
    ):
        load_ood_set(spec, image_size=8)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_image(tmp_path / "open" / "a.png", 1)
    write_image(tmp_path / "closed" / "b.png", 1)
    real = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        load_ood_set(str(tmp_path), image_size=8)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_read_permission_is_named(tmp_path):
    write_image(tmp_path / "open" / "a.png", 1)
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        load_ood_set(str(tmp_path), image_size=8)


# ---- Noise ----


def test_noise_has_its_mean_and_standard_deviation_and_is_reproducible():
    name, image_set = load_ood_set("noise", image_size=16, limit=200)
    values = image_set.pixels.float() / 255
    assert name == "noise" and image_set.pixels.shape == (200, 16, 16, 3) and image_set.pixels.dtype == torch.uint8
    assert abs(values.mean() - 0.5) < 0.003 and abs(values.std() - 0.2422) < 0.003  # 0.25 before clipping
    assert 0.02 < (image_set.pixels == 0).float().mean() < 0.026  # beyond two standard deviations
    assert torch.equal(image_set.pixels[:40], load_ood_set("noise", image_size=16, limit=40)[1].pixels)
    assert len(image_set.pixels.flatten(1).unique(dim=0)) == 200


def test_uniform_noise_has_every_level_equally_often():
    image_set = load_ood_set("uniform", image_size=16, limit=200)[1]
    counts = torch.bincount(image_set.pixels.flatten().long(), minlength=256)
    assert 0.8 < counts.min() / counts.float().mean() and counts.max() / counts.float().mean() < 1.2


@pytest.mark.parametrize("kind", ["noise", "uniform"])
def test_there_are_at_most_a_thousand_noise_images(kind):
    assert [len(load_ood_set(kind, image_size=4, limit=limit)[1]) for limit in (0, 3, 1200)] == [1000, 3, 1000]
