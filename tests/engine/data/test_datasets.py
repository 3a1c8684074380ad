"""Tests of loading data sets: CIFAR, Tiny-ImageNet, folders, splits, shapes and their batches."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_class_folders, write_image
from torchvision.transforms.v2 import functional as tv

from engine.data.augment import Augmentation, crop_and_flip
from engine.data.datasets import load_data, load_evaluation
from engine.data.image_set import STATISTICS, ImageSet, decode_all, split_by_class, spread_over_classes
from engine.data.loader import DeviceLoader
from engine.data.sample_rng import uniform
from engine.data.shapes import CLASSES, draw_shapes
from engine.errors import UserError

CPU = torch.device("cpu")
HALF_STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def write_cifar10(folder: Path, count: int = 4) -> np.ndarray:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (6, count, 3072), dtype=np.uint8)
    for number, file in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = [(number + k) % 10 for k in range(count)]
        (folder / file).write_bytes(pickle.dumps({"data": pixels[number], "labels": labels}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))
    return pixels


# ---- CIFAR ----


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "."])
def test_cifar10_is_read_from_either_folder(tmp_path, place):
    pixels = write_cifar10(tmp_path / "cifar-10-batches-py")
    data_dir = tmp_path if place != "." else tmp_path / "cifar-10-batches-py"
    data = load_data("cifar10", data_dir=str(data_dir))
    assert data.train.pixels.shape == (20, 32, 32, 3) and len(data.test) == 4
    assert np.array_equal(data.train.pixels[5].permute(2, 0, 1).flatten(), pixels[1, 1])
    assert data.train.labels[:4].tolist() == [0, 1, 2, 3] and data.classes[3] == "class3"
    assert (data.mean, data.std) == STATISTICS["cifar10"] and "usually has 50,000" in data.warnings[0]


def test_missing_cifar_error_lists_the_paths_tried(tmp_path):
    with pytest.raises(UserError, match=r"data_batch_1 \(31,035,704 bytes\).*cifar-10-batches-py.*\n.*--data_dir"):
        load_data("cifar10", data_dir=str(tmp_path), download=False)


def test_incomplete_and_damaged_cifar_files_are_reported(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"data_batch_3 is damaged.*expected 31,035,999 bytes, found [\d,]+\ndelete"):
        load_data("cifar10", data_dir=str(tmp_path))
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="incomplete: data_batch_3 missing"):
        load_data("cifar10", data_dir=str(tmp_path))


def test_the_test_images_of_cifar_need_no_training_images(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    pixels = write_cifar10(folder)
    for path in folder.glob("data_batch_*"):
        path.unlink()
    image_set = load_evaluation("cifar10", data_dir=str(tmp_path))
    assert np.array_equal(image_set.pixels[1].permute(2, 0, 1).flatten(), pixels[5, 1])
    with pytest.raises(UserError, match="incomplete: data_batch_1, .*, data_batch_5 missing"):
        load_data("cifar10", data_dir=str(tmp_path))


class Hostile:
    def __reduce__(self):
        return print, ("hostile code ran",)


def test_cifar_pickle_cannot_execute_code(tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Hostile(), "labels": []}))
    with pytest.raises(UserError, match="test_batch is damaged"):
        load_data("cifar10", data_dir=str(tmp_path))
    assert "hostile" not in capsys.readouterr().out


# ---- Folders and Tiny-ImageNet ----

WNIDS = ["n02", "n01", "n03"]  # the order of wnids.txt differs from that of the sorted folders


def write_tiny(root: Path, layout: str) -> None:
    for label, wnid in enumerate(sorted(WNIDS)):
        for k in range(2):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 40 * label + k, "L" if k else "RGB")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    lines = []
    for number, wnid in enumerate(["n03", "n01", "n02", "n01"]):
        place = {
            "original": f"val/images/val_{number}.JPEG",
            "images/wnid": f"val/images/{wnid}/val_{number}.JPEG",
            "wnid/images": f"val/{wnid}/images/val_{number}.JPEG",
            "wnid": f"val/{wnid}/val_{number}.JPEG",
        }[layout]
        write_image(root / place, 50 * number)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    if layout == "original":
        (root / "val" / "val_annotations.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("layout", ["original", "images/wnid", "wnid/images", "wnid"])
def test_tiny_imagenet_is_read_in_every_layout(tmp_path, layout):
    write_tiny(tmp_path / "tiny-imagenet-200", layout)
    data = load_data("tiny-imagenet", data_dir=str(tmp_path))
    assert data.classes == sorted(WNIDS) and data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    reds = data.test.pixels[:, 32, 32, 0].tolist()  # about 50 times the number in the file name
    by_number = [label for _, label in sorted(zip(reds, data.test.labels.tolist(), strict=True))]
    assert by_number == [2, 0, 1, 0]
    assert data.image_size == 64 and isinstance(data.train.pixels, torch.Tensor)


def test_images_folder_read_as_a_class_raises(tmp_path):
    write_tiny(tmp_path, "original")
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match="val_annotations.txt"):
        load_data("tiny-imagenet", data_dir=str(tmp_path))
    (tmp_path / "val" / "images").rename(tmp_path / "val" / "pictures")
    with pytest.raises(UserError, match="was read as a class"):
        load_data("tiny-imagenet", data_dir=str(tmp_path))


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("workers", [0, 2])
def test_folder_is_read_by_workers(tmp_path, split, workers):
    write_class_folders(tmp_path, split)
    data = load_data("folder", data_dir=str(tmp_path), image_size=32)
    batches = DeviceLoader(
        data.train, 4, device=CPU, shuffle=True, augmentation=Augmentation(2), workers=workers, **HALF_STATISTICS
    )
    sizes = [tuple(batch.images.shape) for batch in batches.epoch(0)]
    assert sizes == [(4, 3, 32, 32), (2, 3, 32, 32)] and data.classes == ["cat", "dog"]
    assert torch.cat(
        [batch.labels for batch in DeviceLoader(data.test, 4, device=CPU, mean=data.mean, std=data.std).epoch()]
    ).tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_errors_name_folders_and_classes(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*train.*\n.*--data_dir"):
        load_data("folder", data_dir=str(tmp_path))
    write_class_folders(tmp_path)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "doge")
    with pytest.raises(
        UserError, match=r"train \(2\).*val \(2\) differ: only the first has dog \(1\), only the second has doge \(1\)"
    ):
        load_data("folder", data_dir=str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_raises_or_is_skipped(tmp_path, workers):
    write_class_folders(tmp_path)
    bad = tmp_path / "train" / "cat" / "2.png"  # its next readable neighbour is a dog
    bad.write_bytes(bad.read_bytes()[:40])

    def read(on_bad_image):
        data = load_data("folder", data_dir=str(tmp_path), image_size=32, on_bad_image=on_bad_image)
        batches = DeviceLoader(data.train, 6, device=CPU, mean=data.mean, std=data.std, workers=workers)
        return next(iter(batches.epoch())), batches

    with pytest.raises(UserError, match=r"cat.2\.png.*\n.*--on_bad_image skip"):
        read("stop")
    batch, batches = read("skip")
    list(batches.epoch())
    assert batch.labels.tolist() == [0, 0, 1, 1, 1, 1] and batches.count_unreadable() == 1
    assert torch.equal(batch.images[2], batch.images[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_evaluation_images_are_left_out_and_counted(tmp_path, workers):
    write_class_folders(tmp_path)

    def read():
        test = load_data("folder", data_dir=str(tmp_path), image_size=32, on_bad_image="skip").test
        loader = DeviceLoader(test, 2, device=CPU, **HALF_STATISTICS, workers=workers)
        batches = list(loader.epoch())
        loader.close()
        return batches, loader

    expected = torch.cat([batch.images for batch in read()[0]])[[0, 4, 5]]
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/0.jpg"):  # half of the first batch and all of the second
        (tmp_path / "val" / name).write_bytes(b"no picture")
    batches, loader = read()
    assert [batch.index.tolist() for batch in batches] == [[0], [4, 5]] and loader.count_unreadable() == 3
    assert all(torch.equal(batch.index, batch.loaded_index) for batch in batches)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 1]
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)
    for name in ("cat/0.jpg", "dog/1.jpg", "dog/2.jpg"):
        (tmp_path / "val" / name).write_bytes(b"no picture")
    batches, loader = read()
    with pytest.raises(UserError, match=r"val: none of the image files can be read\n"):
        loader.count_unreadable()
    assert batches == []


def test_decoding_leaves_out_unreadable_evaluation_images_and_replaces_training_images(tmp_path):
    write_class_folders(tmp_path)
    for split, name in (("train", "cat/0.png"), ("val", "cat/0.jpg")):
        (tmp_path / split / name).write_bytes(b"no picture")
    data = load_data("folder", data_dir=str(tmp_path), image_size=32, on_bad_image="skip")
    notes: list[str] = []
    train, test = (decode_all(part, 0, lambda items, **_: items, notes) for part in (data.train, data.test))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(train.pixels[0], train.pixels[1])
    assert test.labels.tolist() == [0, 0, 1, 1, 1] and len(test.files) == len(test.pixels) == 5
    assert [note.partition("cannot")[2] for note in notes] == [
        " be read: another image is used for each",
        " be read: left out",
    ]
    loader = DeviceLoader(test, 5, device=CPU, **HALF_STATISTICS)
    assert len(list(loader.epoch())) == 1 and loader.count_unreadable() == 1, "counted here too"


# ---- Splits ----


def test_validation_images_are_split_from_the_training_images():
    image_set = ImageSet(
        torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.arange(40) % 4, list("abcd"), "here"
    )
    train, valid = split_by_class(image_set, labels_per_class=5, valid_labels_per_class=3, seed=1)
    assert torch.bincount(train.labels).tolist() == [5] * 4 and torch.bincount(valid.labels).tolist() == [3] * 4
    assert not set(train.pixels.flatten().tolist()) & set(valid.pixels.flatten().tolist())
    again, _ = split_by_class(image_set, labels_per_class=5, valid_labels_per_class=3, seed=1)
    other, _ = split_by_class(image_set, labels_per_class=5, valid_labels_per_class=3, seed=2)
    assert torch.equal(train.pixels, again.pixels) and not torch.equal(train.pixels, other.pixels)
    with pytest.raises(UserError, match="class 'a' has 10 images"):
        split_by_class(image_set, 8, 3, 1)


def test_limit_and_wrong_class_count(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    data = load_data("cifar10", data_dir=str(tmp_path), limit=3)
    assert (len(data.train), len(data.test)) == (3, 3) and "partial" in data.warnings[-1]
    with pytest.raises(UserError, match="--num_classes 7"):
        load_data("cifar10", data_dir=str(tmp_path), num_classes=7)


def test_cifar_images_are_resized_after_reading_and_keep_their_pixels_in_memory(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    data = load_data("cifar10", data_dir=str(tmp_path), image_size=48, interpolation="bicubic", limit=3)
    alone = load_evaluation("cifar10", data_dir=str(tmp_path), image_size=48, interpolation="bicubic", limit=3)
    assert data.image_size == data.test.size == 48 and data.train.pixels.shape[1:] == (32, 32, 3)
    batch = next(DeviceLoader(data.test, 3, device=torch.device("cpu"), mean=(0, 0, 0), std=(1 / 255,) * 3).epoch())
    expected = tv.resize(data.test.pixels.permute(0, 3, 1, 2), [48, 48], tv.InterpolationMode.BICUBIC)
    torch.testing.assert_close(batch.images, expected.float(), atol=1e-4, rtol=0)
    assert torch.equal(alone.resize_batch(alone.pixels), data.test.resize_batch(data.test.pixels))
    assert load_data("cifar10", data_dir=str(tmp_path), image_size=32).train.resize is None


def test_a_single_class_is_refused_in_training_and_noted_in_evaluation(tmp_path):
    write_class_folders(tmp_path)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split / "dog")
    with pytest.raises(UserError, match=r"train has a single class, 'cat', so every .*\ngive images of at least one"):
        load_data("folder", data_dir=str(tmp_path))
    (note,) = load_evaluation("folder", data_dir=str(tmp_path)).notes
    assert note.endswith("val: 3 images, all of the class 'cat'; accuracy says nothing about the other classes")


def test_a_limit_that_leaves_one_class_is_noted(tmp_path):
    write_class_folders(tmp_path)
    notes = load_data("folder", data_dir=str(tmp_path), limit=1).warnings
    assert [note.partition(", all of")[0] for note in notes[1:]] == [
        f"{tmp_path / 'train'}: 1 image",
        f"{tmp_path / 'val'}: 1 image",
    ]
    assert not load_evaluation("folder", data_dir=str(tmp_path), limit=2).notes


def test_norm_selects_mean_and_std(tmp_path):
    for norm, name in (("own", "half"), ("imagenet", "imagenet"), ("half", "half")):
        data = load_data("shapes", norm=norm, num_classes=2, limit=1, image_size=8)
        assert (data.mean, data.std) == STATISTICS[name]


# ---- Shapes ----


def test_shapes_are_seeded_and_balanced_and_have_tight_boxes():
    drawn = draw_shapes(30, 32, seed=4)
    assert torch.equal(drawn["images"][:10], draw_shapes(10, 32, seed=4)["images"])
    assert not torch.equal(drawn["images"][:10], draw_shapes(10, 32, seed=5)["images"])
    assert torch.bincount(drawn["labels"]).tolist() == [3] * len(CLASSES)
    for mask, (y1, y2, x1, x2) in zip(drawn["masks"], drawn["boxes"].tolist(), strict=True):
        assert mask[y1:y2, x1:x2].sum() == mask.sum() > 20, "the box contains the whole mask"
        assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any(), "the box is tight"


def test_drawing_shapes_does_not_use_the_global_generator():
    state = torch.get_rng_state()
    draw_shapes(5, 16)
    assert torch.equal(state, torch.get_rng_state())


# ---- Batches ----


def make_numbered_set(count: int = 10, size: int = 6) -> ImageSet:
    pixels = torch.arange(count * size * size * 3).remainder(251).to(torch.uint8).view(count, size, size, 3)
    return ImageSet(pixels, torch.arange(count), [str(i) for i in range(count)], "here")


def test_crop_and_flip_shifts_and_pads_with_black():
    pixels = make_numbered_set(2, 4).pixels + 1
    out = crop_and_flip(
        pixels, torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([-1, 0]), torch.tensor([False, True])
    )
    assert torch.equal(out[0, :2, 1:], pixels[1, 2:, :3]) and out[0, 2:].eq(0).all() and out[0, :, 0].eq(0).all()
    assert torch.equal(out[1], pixels[0].flip(1))


def test_batches_depend_only_on_seed_and_epoch():
    def collect_batches(seed, epoch, draws_before=0):
        torch.rand(draws_before)
        batches = DeviceLoader(
            make_numbered_set(), 4, device=CPU, shuffle=True, augmentation=Augmentation(1), seed=seed, **HALF_STATISTICS
        )
        return [(batch.images, batch.labels, batch.index) for batch in batches.epoch(epoch)]

    def equal(a, b):
        return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))

    state = torch.get_rng_state()
    assert equal(collect_batches(0, 3), collect_batches(0, 3)) and torch.equal(state, torch.get_rng_state())
    assert equal(collect_batches(0, 3), collect_batches(0, 3, draws_before=7))
    assert not equal(collect_batches(0, 3), collect_batches(0, 4)) and not equal(
        collect_batches(0, 3), collect_batches(1, 3)
    )
    assert sorted(torch.cat([labels for _, labels, _ in collect_batches(0, 3)]).tolist()) == list(range(10))


def test_workers_do_not_change_the_batches(tmp_path):
    write_class_folders(tmp_path)
    data = load_data("folder", data_dir=str(tmp_path), image_size=32)
    kwargs = {"device": CPU, "mean": data.mean, "std": data.std, "shuffle": True, "augmentation": Augmentation(4)}
    batches_by_workers = [
        [b.images for b in DeviceLoader(data.train, 4, workers=workers, **kwargs).epoch(2)] for workers in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*batches_by_workers, strict=True))


def test_normalisation_matches_torchvision():
    from torchvision.transforms.functional import normalize

    image_set, mean, std = make_numbered_set(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    batch = next(DeviceLoader(image_set, 3, device=CPU, mean=mean, std=std).epoch())
    expected = normalize(image_set.pixels[:3].permute(0, 3, 1, 2).float() / 255, mean, std)
    torch.testing.assert_close(batch.images, expected)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_last_short_batch_is_kept_or_dropped():
    for drop_last, sizes in ((False, [4, 4, 2]), (True, [4, 4])):
        batches = DeviceLoader(make_numbered_set(), 4, device=CPU, mean=(0.5,) * 3, std=(0.5,) * 3, drop_last=drop_last)
        assert [len(batch.labels) for batch in batches.epoch()] == sizes and len(batches) == len(sizes)


# ---- Real data ----


@pytest.mark.data
def test_real_tiny_imagenet(real_data):
    data = load_data("tiny-imagenet", data_dir=str(real_data), workers=2)
    assert (len(data.train), len(data.test), len(data.classes)) == (4000, 1000, 20)


@pytest.mark.data
def test_real_cifar10(real_data):
    data = load_data("cifar10", data_dir=str(real_data))
    mean = data.train.pixels.double().mean((0, 1, 2)) / 255
    torch.testing.assert_close(mean, torch.tensor(data.mean, dtype=torch.float64), atol=2e-4, rtol=0)
    assert not data.warnings


@pytest.mark.parametrize(("count", "max_count"), [(1000, 60), (10, 7), (9, 9), (5, 8), (4, 0)])
def test_subsample_covers_the_whole_set_and_alternating_classes(count, max_count):
    image_set = ImageSet(torch.arange(count), torch.arange(count) % 2, ["a", "b"], "somewhere")
    subset = image_set.subsample(max_count)
    places, wanted = subset.pixels.tolist(), min(count, max_count)
    assert len(places) == wanted and places == sorted(set(places))
    assert all(abs(place - n * count / max(wanted, 1)) <= 2 * count / wanted for n, place in enumerate(places))
    assert abs(int(subset.labels.sum()) - wanted / 2) <= 1


@pytest.mark.parametrize(
    "sizes, wanted",
    [([6, 6, 6], [2, 2, 2]), ([10, 0, 2], [4, 0, 2]), ([10, 5, 5], [2, 2, 2]), ([90, 45, 45], [8, 5, 5])],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_few_images_are_spread_over_the_classes(sizes, wanted, shuffled):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))] if shuffled else labels
    chosen = spread_over_classes(labels, sum(wanted))
    assert torch.bincount(labels[chosen], minlength=3).tolist() == wanted and chosen.tolist() == sorted(chosen.tolist())
    assert len(spread_over_classes(labels, 2)) == 2 and len(spread_over_classes(labels, 0)) == 0
    assert spread_over_classes(labels, 200).tolist() == list(range(len(labels)))


def test_a_few_of_a_sorted_set_are_those_of_earlier_versions():
    labels, index = torch.arange(10).repeat_interleave(30), torch.arange(50)
    drawn = uniform(index, (), seed=0, purpose="a few of a part")
    assert torch.equal(spread_over_classes(labels, 50), 6 * index + (6 * drawn).long())


def test_limit_takes_images_of_every_class_and_keeps_balance(tmp_path):
    for split in ("train", "val"):
        for number in range(24):
            write_image(tmp_path / split / "abc"[number // 8] / f"{number}.png", 10 * number, size=(8, 8))
    data = load_data("folder", data_dir=str(tmp_path), image_size=8, limit=6)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    few = load_data("folder", data_dir=str(tmp_path), image_size=8, limit=9, labels_per_class=5)
    assert torch.bincount(few.train.labels).tolist() == [3, 3, 3]
    alone = load_evaluation("folder", data_dir=str(tmp_path), image_size=8, limit=6)
    assert alone.files.names() == data.test.files.names(), "training and evaluate.py take the same images"
