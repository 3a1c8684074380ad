"""Tests of DeviceLoader: batches, workers, shards, views, decoding, folders and colour augmentation."""

import multiprocessing
import os
import pickle
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from engine.data import decode
from engine.data.augment import (
    EIGENVALUES,
    EIGENVECTORS,
    Augmentation,
    add_lighting,
    apply_colors,
    compose_jitter,
    identity_color_matrix,
)
from engine.data.decode import BadImage, decode_into
from engine.data.folders import FileList, find_folder, find_imagenet
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader, Shard
from engine.data.sample_rng import GOLDEN, draw_crop_numbers, mix_bits
from engine.data.views import CenterCrop, RandomCrop
from engine.errors import UserError

CPU = torch.device("cpu")
HALF_STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def make_picture(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    """Make smooth colours that JPEG hardly changes: uint8 (H, W, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def photos(tmp_path) -> ImageSet:
    """Ten JPEGs of different sizes in two classes."""
    names = []
    for k in range(10):
        name = f"{'cat' if k < 5 else 'dog'}/{k}.jpg"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(make_picture(60 + 7 * k, 100 - 5 * k, k)).save(tmp_path / name, quality=95)
        names.append(name)
    files = ImageFiles(FileList(tmp_path, names), CenterCrop(24, 28))
    return ImageSet(files, torch.arange(10) // 5, ["cat", "dog"], str(tmp_path))


CROP_AUGMENTATION = Augmentation(view=RandomCrop(24, 0.3))
COLOURS = {"color_jitter": 0.4, "lighting": 0.1}
CROPS_AND_COLOURS = replace(CROP_AUGMENTATION, **COLOURS)


def make_loader(image_set: ImageSet, batch_size: int = 4, augmentation=CROP_AUGMENTATION, **changes) -> DeviceLoader:
    kwargs = {"device": CPU, "shuffle": True, "augmentation": augmentation, "seed": 3, **HALF_STATISTICS, **changes}
    return DeviceLoader(image_set, batch_size, **kwargs)


def same_batches(some, others) -> bool:
    some, others = list(some), list(others)
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) and torch.equal(a.box, b.box)
        for a, b in zip(some, others, strict=True)
    )


# ---- Workers, epochs and starting in the middle ----


def test_workers_and_earlier_epochs_do_not_change_the_batches(photos):
    alone = make_loader(photos, augmentation=CROPS_AND_COLOURS)
    many = make_loader(photos, augmentation=CROPS_AND_COLOURS, workers=2)
    state = torch.get_rng_state()
    assert same_batches(alone.epoch(0), many.epoch(0)) and same_batches(alone.epoch(5), many.epoch(5)), (
        "the same workers serve several epochs"
    )
    assert same_batches(many.epoch(5, start=1), list(alone.epoch(5))[1:])
    assert same_batches(make_loader(photos, augmentation=CROPS_AND_COLOURS).epoch(5, start=2), list(many.epoch(5))[2:])
    assert not same_batches(alone.epoch(0), alone.epoch(1)) and not same_batches(
        alone.epoch(0), make_loader(photos, seed=4).epoch(0)
    )
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not used"
    many.close()


def test_crop_depends_on_the_sample_and_not_on_its_batch(photos):
    one, other = (torch.cat([b.box for b in make_loader(photos, size).epoch(2)]) for size in (4, 7))
    order, _ = make_loader(photos).draw(2)
    assert torch.equal(one, other) and len(torch.unique(one, dim=0)) == 10
    unshuffled = torch.cat([b.box for b in make_loader(photos, shuffle=False).epoch(2)])
    assert torch.equal(unshuffled[order], one)


def test_workers_live_until_close(photos):
    before = set(multiprocessing.active_children())
    batches = make_loader(photos, workers=2)
    assert set(multiprocessing.active_children()) == before, "no workers before the first batch"
    list(batches.epoch(0))
    workers = set(multiprocessing.active_children()) - before
    list(batches.epoch(1))
    assert len(workers) == min(2, os.cpu_count()) and set(multiprocessing.active_children()) - before == workers
    batches.close()
    assert set(multiprocessing.active_children()) == before
    assert len(list(batches.epoch(2))) == 3, "new workers start when needed"
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_cancelled_epoch_does_not_affect_the_next(photos, workers):
    batches, expected = make_loader(photos, 2, workers=workers), list(make_loader(photos, 2).epoch(1))
    left = batches.epoch(0)
    next(left)
    left.close()
    assert same_batches(batches.epoch(1), expected)
    kept = batches.epoch(0)
    next(kept)
    assert same_batches(batches.epoch(1), expected)
    with pytest.raises(RuntimeError, match="epoch 0 was cancelled"):
        next(kept)
    batches.close()


# ---- Processes and micro-batches ----


def make_numbered_set(count: int) -> ImageSet:
    return ImageSet(torch.arange(count * 3, dtype=torch.uint8).view(count, 1, 1, 3), torch.arange(count), ["a"], "here")


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("count", [24, 31, 26])
def test_training_shards_are_equal_parts_of_the_same_batches(count, world_size, micro_batches):
    one = [batch.index for batch in make_loader(make_numbered_set(count), 12, Augmentation()).epoch(1)]
    shards = [Shard(rank, world_size, micro_batches) for rank in range(world_size)]
    loaders = [make_loader(make_numbered_set(count), 12, Augmentation(), shard=shard) for shard in shards]
    streams = [list(loader.epoch(1)) for loader in loaders]
    assert {len(stream) for stream in streams} == {len(loaders[0]) * micro_batches}
    for step in range(len(loaders[0])):
        own = [b.index for stream in streams for b in stream[step * micro_batches : (step + 1) * micro_batches]]
        whole = one[step][: len(one[step]) // (world_size * micro_batches) * world_size * micro_batches]
        assert torch.equal(torch.cat(own), whole) and len({len(index) for index in own}) == 1
    assert len(loaders[0]) == count // 12 + (count % 12 >= world_size * micro_batches)
    late = list(loaders[-1].epoch(1, start=1))
    assert [b.index.tolist() for b in late] == [b.index.tolist() for b in streams[-1][micro_batches:]]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (4, 1), (3, 2)])
@pytest.mark.parametrize("count", [1, 7, 25])
def test_evaluation_reads_each_image_once(count, world_size, micro_batches):
    shards = [Shard(rank, world_size, micro_batches) for rank in range(world_size)]
    loaders = [make_loader(make_numbered_set(count), 6, None, shuffle=False, shard=shard) for shard in shards]
    streams = [[batch.index for batch in loader.epoch()] for loader in loaders]
    assert sorted(i for stream in streams for index in stream for i in index.tolist()) == list(range(count))
    assert all(len(index) for stream in streams for index in stream), "empty micro-batches are not yielded"
    held = [sum(len(index) for index in stream) for stream in streams]
    assert max(held) - min(held) <= micro_batches * len(loaders[0]) and len(loaders[0]) == -(-count // 6)


def test_batch_size_must_be_divisible_by_the_shards():
    with pytest.raises(ValueError, match="batch_size 10 .* 4 processes x 1"):
        make_loader(make_numbered_set(20), 10, None, shard=Shard(0, 4))


# ---- Views ----


def make_draws(y1, x1, h, w, height, width) -> torch.Tensor:
    """Return the random numbers with which RandomCrop(size, 0, 1) takes this box."""
    share, ratio = h * w / (height * width), w / h
    shape = (np.log(ratio) / np.log(4 / 3) + 1) / 2
    return torch.tensor([[share, shape, (y1 + 0.5) / (height - h + 1), (x1 + 0.5) / (width - w + 1)]])


def test_random_crop_is_resized_as_by_pillow(tmp_path):
    pixels, path = make_picture(), tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    out = np.empty((32, 32, 3), np.uint8)
    box = decode_into(out, path, RandomCrop(32, 0.0), make_draws(20, 30, 50, 60, 90, 120))
    expected = Image.fromarray(pixels[20:70, 30:90]).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 1
    assert box == pytest.approx([20 / 90, 70 / 90, 30 / 120, 90 / 120])


def test_box_of_a_batch_is_the_visible_part(photos):
    batch = next(make_loader(photos).epoch(0))
    for k, (y1, y2, x1, x2) in enumerate(batch.box.tolist()):
        with Image.open(photos.pixels.files[int(batch.index[k])]) as image:
            box = (x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height)
            seen = torch.from_numpy(np.array(image.crop(tuple(map(round, box))).resize((24, 24), 2)))
        seen = seen.flip(1) if batch.flip[k] else seen
        shown = (batch.images[k].permute(1, 2, 0) * 0.5 + 0.5) * 255
        assert (shown - seen).abs().mean() < 2
    assert batch.shift is None and batch.flip.any() and not batch.flip.all()


@pytest.mark.parametrize(("height", "width"), [(100, 130), (200, 60)])
def test_random_crops_are_distributed_as_in_torchvision(height, width):
    view, count = RandomCrop(16, 0.08), 3000
    ours = [view.plan(height, width, draws)[0] for draws in draw_crop_numbers(0, 0, list(range(count)))]
    ours = [(y1, x1, y2 - y1, x2 - x1) for y1, y2, x1, x2 in ours]
    blank = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    for number in (lambda b: b[2] * b[3], lambda b: np.log(b[3] / b[2]), lambda b: b[0], lambda b: b[1]):
        one, other = (np.sort([number(box) for box in boxes]) for boxes in (ours, theirs))
        grid = np.union1d(one, other)
        apart = np.abs(np.searchsorted(one, grid, "right") - np.searchsorted(other, grid, "right")).max() / count
        assert apart < 0.05, "Kolmogorov-Smirnov bound at level 1e-3 for 3000 samples each"
    assert all(0 <= y and y + h <= height and 0 <= x and x + w <= width for y, x, h, w in ours)


def test_crop_numbers_are_a_hash_of_seed_epoch_and_index():
    assert int(mix_bits(torch.tensor(GOLDEN))) % 2**64 == 0xE220A8397B1DCDAF, "first splitmix64 output for seed 0"
    many = draw_crop_numbers(1, 2, list(range(5000)))
    assert abs(many.mean() - 0.5) < 0.003 and 0 <= many.min() and many.max() < 1
    assert torch.equal(draw_crop_numbers(1, 2, [7, 3])[1], many[3])
    for other in (
        draw_crop_numbers(2, 1, list(range(5000))),
        draw_crop_numbers(1, 3, list(range(5000))),
        many.roll(1, 0),
    ):
        assert abs(np.corrcoef(many.ravel(), other.ravel())[0, 1]) < 0.01


def record_decode_flags(monkeypatch) -> list[int]:
    used, imdecode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda raw, flags: used.append(flags) or imdecode(raw, flags))
    return used


@pytest.mark.parametrize(
    ("side", "divisor"), [(32, 1), (63, 1), (64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (900, 8)]
)
def test_large_jpeg_is_decoded_at_reduced_size_but_never_enlarged(tmp_path, monkeypatch, side, divisor):
    path = tmp_path / "a.jpg"
    Image.fromarray(make_picture(side + 40, side + 90)).save(path, quality=95)
    used, out, full = record_decode_flags(monkeypatch), np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
    draws = make_draws(16, 64, side, side, side + 40, side + 90)
    box = decode_into(out, path, RandomCrop(32, 0.0), draws)
    assert used == [decode.OPENCV_FLAGS[divisor] | cv2.IMREAD_IGNORE_ORIENTATION]
    assert np.allclose(box, np.array([16, 16 + side, 64, 64 + side]) / np.repeat([side + 40, side + 90], 2), atol=0.03)
    monkeypatch.setattr(decode, "OPENCV_FLAGS", dict.fromkeys((1, 2, 4, 8), None) | {1: cv2.IMREAD_COLOR})
    monkeypatch.setattr(
        decode, "load_pixels", lambda image, raw, max_reduction, load=decode.load_pixels: load(image, raw, 1)
    )
    decode_into(full, path, RandomCrop(32, 0.0), draws)
    assert np.abs(out.astype(int) - full).mean() < 4, (
        "tolerance for rounding by half an output pixel and for JPEG's low-pass"
    )


@pytest.mark.parametrize(("side", "divisor"), [(127, 1), (128, 2), (255, 2), (256, 4), (1100, 8)])
def test_evaluation_images_are_decoded_at_twice_the_size_or_more(tmp_path, monkeypatch, side, divisor):
    Image.fromarray(make_picture(side, side + 90)).save(tmp_path / "a.jpg", quality=95)
    used, out = record_decode_flags(monkeypatch), np.empty((24, 24, 3), np.uint8)
    decode_into(out, tmp_path / "a.jpg", CenterCrop(24, 32), None)
    assert used == [decode.OPENCV_FLAGS[divisor] | cv2.IMREAD_IGNORE_ORIENTATION]


def test_center_crop_is_resize_and_crop(tmp_path):
    pixels = make_picture(70, 100)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = np.empty((24, 24, 3), np.uint8)
    decode_into(out, tmp_path / "a.png", CenterCrop(24, 28), None)
    expected = Image.fromarray(pixels).resize((40, 28), Image.Resampling.BILINEAR).crop((8, 2, 32, 26))
    assert np.abs(out.astype(int) - np.asarray(expected)).max() <= 1
    with pytest.raises(ValueError, match="centre crop of 24 pixels does not fit"):
        CenterCrop(24, 20)


# ---- Image formats ----


def save_image(path: Path, kind: str) -> np.ndarray:
    """Save a file of this kind and return the expected pixels: uint8 (64, 64, 3)."""
    pixels = make_picture(64, 64)
    image = Image.fromarray(pixels)
    if kind == "16 bit":
        deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
        Image.fromarray(deep).save(path)
        return np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, 2)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90 degrees; Pillow's convert() ignores it, and so do we
        image.save(path, quality=95, exif=exif)
    else:
        image = image.convert(kind)
        image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "kind", "by_opencv"),
    [
        ("a.jpg", "RGB", True),
        ("a.jpg", "L", True),
        ("a.jpg", "turned", True),
        ("a.jpg", "CMYK", False),
        ("a.png", "RGB", False),
        ("a.png", "RGBA", False),
        ("a.png", "LA", False),
        ("a.png", "1", False),
        ("a.gif", "P", False),
        ("a.png", "16 bit", False),
        ("a.tif", "16 bit", False),
        ("a.bmp", "RGB", False),
    ],
)
def test_every_image_format_and_mode_is_read(tmp_path, monkeypatch, name, kind, by_opencv):
    expected, used, out = (
        save_image(tmp_path / name, kind),
        record_decode_flags(monkeypatch),
        np.empty((64, 64, 3), np.uint8),
    )
    decode_into(out, tmp_path / name, CenterCrop(64, 64), None)
    assert np.abs(out.astype(int) - expected).max() <= 2 and bool(used) == by_opencv


def test_jpeg_with_trailing_bytes_is_read_and_truncated_one_is_not(tmp_path):
    expected = save_image(tmp_path / "a.jpg", "RGB")
    raw, out = (tmp_path / "a.jpg").read_bytes(), np.empty((64, 64, 3), np.uint8)
    (tmp_path / "long.jpg").write_bytes(raw + b"\0rubbish")
    decode_into(out, tmp_path / "long.jpg", CenterCrop(64, 64), None)
    assert np.array_equal(out, expected)
    (tmp_path / "short.jpg").write_bytes(raw[: len(raw) * 2 // 3])
    with pytest.raises(BadImage, match=r"short\.jpg: .*truncated"):
        decode_into(out, tmp_path / "short.jpg", CenterCrop(64, 64), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_raise_or_are_replaced_in_training(photos, workers):
    bad = photos.pixels.files[4]
    bad.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cat.4\.jpg.*\n.*--on_bad_image skip"):
        list(make_loader(photos, workers=workers).epoch(0))
    photos = photos.with_replacement()
    assert photos.pixels.on_bad_image == "stop"
    photos.pixels.on_bad_image = "skip"
    photos = photos.with_replacement()
    batches = make_loader(photos, 10, workers=workers)
    batch = next(batches.epoch(0))
    where = batch.index.tolist().index(4)
    assert batch.labels[where] == 1 and batches.count_unreadable() == 1 and batch.labels.sum() == 6
    batches.close()
    for path in photos.pixels.files:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the image files can be read"):
        list(make_loader(photos, workers=workers).epoch(0))


# ---- File lists ----


def test_file_list_stores_paths_in_two_tensors(tmp_path):
    names = ["a/1.jpg", "b/ümläut 2.jpg", os.fsdecode(b"b/\xff.jpg"), "c"]
    files = FileList(tmp_path, iter(names))
    assert len(files) == 4 and list(files) == [tmp_path / name for name in names]
    some = files[torch.tensor([2, 0])]
    assert list(some) == [tmp_path / names[2], tmp_path / names[0]] and some.text is files.text
    assert (
        list(some[torch.tensor([1])]) == [tmp_path / names[0]] and list(files[torch.tensor([], dtype=torch.long)]) == []
    )
    assert list(pickle.loads(pickle.dumps(some))) == list(some) and len(FileList("", [])) == 0
    with pytest.raises(IndexError):
        files[4]


def test_image_files_can_be_indexed_and_get_another_view(photos):
    some = photos.pixels[torch.tensor([7, 1])].with_view(CenterCrop(8, 8))
    pixels, places, boxes = some.read([0, 1])
    assert (len(some), some.size, photos.pixels.size) == (2, 8, 24) and boxes is None and places.tolist() == [0, 1]
    assert torch.equal(pixels[1], photos.pixels.with_view(CenterCrop(8, 8)).read([1])[0][0])


# ---- ImageNet ----


def write_imagenet(root: Path, val: str = "sorted") -> None:
    for label, wnid in enumerate(["n01", "n02"]):
        for k in range(2):
            for split in ("train", "val"):
                folder = root / split if (split, val) == ("val", "flat") else root / split / wnid
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (0, 0, 100 * label)).save(folder / f"{split}_{label}{k}.JPEG", "JPEG")


@pytest.mark.parametrize("place", [".", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "cwd"])
def test_imagenet_is_found_in_its_usual_folders(tmp_path, monkeypatch, place):
    root = tmp_path / ("imagenet" if place == "cwd" else place)
    write_imagenet(root)
    monkeypatch.chdir(tmp_path)
    train, test = find_imagenet(Path("data") if place == "cwd" else tmp_path, None)
    assert train.classes == test.classes == ["n01", "n02"] and test.labels.tolist() == [0, 0, 1, 1]
    assert [path.name for path in train.files][2:] == ["train_10.JPEG", "train_11.JPEG"]
    assert all(path.is_file() for path in test.files)


def test_missing_imagenet_error_lists_the_paths_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"data/ILSVRC2012, .*CLS-LOC, imagenet\n.*--data_dir; .* contains nothing"):
        find_imagenet(Path("data"), None)
    (tmp_path / "imagenet" / "train" / "n01").mkdir(parents=True)
    with pytest.raises(UserError, match="not found"):  # a mistyped folder must not fall back to another one
        find_imagenet(Path("dataset"), None)


@pytest.mark.parametrize("find", [find_imagenet, find_folder])
def test_a_flat_val_needs_labels(tmp_path, find):
    write_imagenet(tmp_path, "flat")
    with pytest.raises(
        UserError, match=r"val has images outside class folders \(4\).*\n.*<class>/.*--val_labels FILE .*`file class`"
    ):
        find(tmp_path, None)
    labels = tmp_path / "labels.txt"
    labels.write_text("val_00.JPEG n02\nval_10.JPEG\tn01\n\nval_11.JPEG n01\nval_01.JPEG  n01\n")
    _, test = find(tmp_path, None, labels)
    assert {path.name: label for path, label in zip(test.files, test.labels.tolist(), strict=True)} == {
        "val_00.JPEG": 1,
        "val_01.JPEG": 0,
        "val_10.JPEG": 0,
        "val_11.JPEG": 0,
    }
    labels.write_text("ImageId,PredictionString\nval_00,n02 1 2 3 4 n02 5 6 7 8\nval_01,n01 1 2 3 4\n")
    assert find(tmp_path, None, labels)[1].labels.tolist() == [0, 1], "Kaggle's list is read too"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val_00.JPEG n01\nval_01.JPEG\n", r"line 2: 'val_01.JPEG' does not have the form `file class`"),
        ("val_99.JPEG n01\n", r"line 1: 'val_99.JPEG n01' names a file that is not in .*val"),
        ("val_00.JPEG n01\n", r"only the first has n02 \(1\), only the second has none"),
    ],
)
def test_val_labels_errors_name_the_line(tmp_path, text, message):
    write_imagenet(tmp_path, "flat")
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        find_imagenet(tmp_path, None, tmp_path / "labels.txt")


def test_missing_and_unnecessary_val_labels_raise(tmp_path):
    write_imagenet(tmp_path)
    with pytest.raises(UserError, match=r"has no images outside class folders\nleave out --val_labels"):
        find_imagenet(tmp_path, None, tmp_path / "labels.txt")
    write_imagenet(tmp_path / "other", "flat")
    with pytest.raises(UserError, match="--val_labels .*labels.txt: no such file"):
        find_imagenet(tmp_path, tmp_path / "other" / "val", tmp_path / "labels.txt")


def test_stray_image_beside_the_class_folders_is_ignored(tmp_path):
    write_imagenet(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "thumbnail.png")
    assert len(find_imagenet(tmp_path, None)[1].files) == 4


def test_class_mismatch_error_lists_the_missing_classes(tmp_path):
    for number in range(8):
        for split in ("train", "val"):
            folder = tmp_path / split / (f"c{number}" if number < 1 or split == "train" else f"d{number}")
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(
        UserError, match=r"has c1, c2, c3, c4, c5 ... \(7\), only the second has d1, d2, d3, d4, d5 ..."
    ):
        find_folder(tmp_path, None)


# ---- Colour ----


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_color_jitter_matches_torchvision_in_any_order(order):
    images = 0.35 + 0.25 * torch.rand(6, 3, 5, 7)  # keeps all values in 0..1, where torchvision does not clamp
    factors = torch.tensor([0.9, 1.2, 0.8]).unsqueeze(1) * torch.linspace(0.95, 1.1, 6)
    out = apply_colors(images, compose_jitter(images.mean((2, 3)), factors))
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for k, image in enumerate(images):
        for kind in order:
            image = adjust[kind](image, factors[kind, k].item())
        torch.testing.assert_close(out[k], image, atol=1e-3, rtol=0)


def test_lighting_shifts_every_pixel_by_the_same_colour():
    images, strength = torch.rand(2, 3, 4, 4), torch.tensor([[0.1, 0.0], [0.0, -0.2], [0.0, 0.3]])
    shift = torch.tensor(EIGENVECTORS) @ (torch.tensor(EIGENVALUES).unsqueeze(1) * strength)  # (3 colours, 2 images)
    lit = apply_colors(images, add_lighting(identity_color_matrix(2), strength))
    torch.testing.assert_close(lit - images, shift.T[:, :, None, None].expand_as(images), atol=1e-6, rtol=0)
    assert lit[0, 0, 0, 0] - images[0, 0, 0, 0] == pytest.approx(-0.5675 * 0.2175 * 0.1, abs=1e-6)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_apply_colors_keeps_memory_layout_and_input(layout):
    images = torch.rand(2, 3, 4, 5).contiguous(memory_format=layout)
    before, affine = images.clone(), torch.randn(2, 3, 4)
    out = apply_colors(images, affine)
    torch.testing.assert_close(
        out, torch.einsum("bij,bjhw->bihw", affine[:, :, :3], images) + affine[:, :, 3, None, None]
    )
    assert out.is_contiguous(memory_format=layout) and torch.equal(images, before)


def test_colours_change_before_normalisation(photos):
    plain = make_loader(photos, 10, mean=(0.0,) * 3, std=(1.0,) * 3)
    coloured = make_loader(photos, 10, CROPS_AND_COLOURS)
    one, other = next(plain.epoch(1)), next(coloured.epoch(1))
    drawn = {name: values[..., other.index] for name, values in coloured.draw(1)[1].items()}
    affine = compose_jitter(one.images.mean((2, 3)), drawn["factors"])
    expected = (apply_colors(one.images, add_lighting(affine, drawn["strength"])) - 0.5) / 0.5
    torch.testing.assert_close(other.images, expected, atol=1e-4, rtol=0)
    assert torch.equal(one.box, other.box) and torch.equal(one.flip, other.flip), "colour draws change no other draws"


def test_colour_changes_have_the_right_distribution():
    batches = make_loader(make_numbered_set(85), 5, Augmentation(**COLOURS))
    drawn = [batches.draw(epoch)[1] for epoch in range(40)]
    factors, strength = (torch.cat([d[name] for d in drawn], 1) for name in ("factors", "strength"))
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4 and (factors.mean(1) - 1).abs().max() < 0.02
    assert (strength.std(1) - 0.1).abs().max() < 0.005


# ---- CUDA ----


@pytest.mark.gpu
def test_batches_on_cuda_equal_those_on_the_cpu(photos):
    device, kwargs = torch.device("cuda", 0), {"augmentation": CROPS_AND_COLOURS, "workers": 2}
    there, here = make_loader(photos, 2, device=device, **kwargs), make_loader(photos, 2, **kwargs)
    busy = torch.rand(2048, 2048, device=device)
    for epoch in (0, 1):
        kept = []
        for batch in there.epoch(epoch):
            kept.append(batch)
            busy = (busy @ busy).clamp(0, 1)  # keeps the device busy, so copies overlap with it
        for batch, expected in zip(kept, here.epoch(epoch), strict=True):
            torch.testing.assert_close(batch.images.cpu(), expected.images, atol=1e-4, rtol=0)
            assert torch.equal(batch.labels.cpu(), expected.labels) and torch.equal(batch.box.cpu(), expected.box)
    there.close()
    here.close()


@pytest.mark.gpu
def test_loading_a_batch_does_not_synchronise_cuda(photos):
    batches = make_loader(photos, 2, device=torch.device("cuda", 0), augmentation=CROPS_AND_COLOURS, workers=2)
    stream = batches.epoch(0)
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in stream:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batches.close()
