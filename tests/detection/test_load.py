import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from detection import load, shape_scenes
from detection.dataset import DetectionSet
from detection.load import load_image_sets
from detection.shape_scenes import compose, draw_scenes, export_voc, make_target
from detection.voc import CLASSES, find_devkit, prepare_devkit, read_sets
from engine.data.decode import BadImage
from engine.errors import UserError

SIZE = (60, 40)  # width, height


def box_of(xmin, ymin, xmax, ymax) -> str:
    return f"<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin><ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox>"


def thing(name: str, *corners, difficult: int | None = None, more: str = "") -> str:
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{more}{flag}{box_of(*corners)}</object>"


def xml(*things: str, size: tuple[int, int] | None = SIZE) -> str:
    told = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><folder>VOC2007</folder>{told}{''.join(things)}</annotation>"


class Devkit:
    """A small VOCdevkit that a test fills."""

    def __init__(self, root: Path):
        self.root = root

    def add(self, identity: str, annotation: str | None, ending: str = ".jpg", year: int = 2007) -> None:
        """An image and, unless it is None, its annotation."""
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.root / f"VOC{year}" / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (200, 30, 10)).save(self.root / f"VOC{year}" / "JPEGImages" / f"{identity}{ending}")
        if annotation is not None:
            (self.root / f"VOC{year}" / "Annotations" / f"{identity}.xml").write_text(annotation)

    def name(self, part: str, *lines: str, year: int = 2007) -> None:
        """A list of images."""
        (self.root / f"VOC{year}" / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(lines) + "\n\n")

    def one(self, *things: str, size: tuple[int, int] | None = SIZE) -> DetectionSet:
        """What is read of an image with these objects."""
        self.add("000001", xml(*things, size=size))
        self.name("own", "000001")
        return read_sets(self.root, ["2007_own"])


@pytest.fixture
def devkit(tmp_path) -> Devkit:
    return Devkit(tmp_path / "VOCdevkit")


# where it is


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOCdevkit"])
def test_the_devkit_is_found_in_every_layout(tmp_path, inside):
    Devkit(tmp_path / inside).add("000001", xml())
    for place in {tmp_path, tmp_path / inside.partition("/")[0], tmp_path / inside}:
        assert find_devkit(place) == tmp_path / inside


def test_a_missing_devkit_is_told_with_places_and_archives(tmp_path):
    with pytest.raises(UserError) as error:
        find_devkit(tmp_path)
    what, remedy = str(error.value).split("\n")
    assert f"in {tmp_path}, {tmp_path}/VOCdevkit, {tmp_path}/VOCdevkit/VOCdevkit" in what and "VOC2007/" in what
    for word in ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar", "VOCtrainval_11-May-2012.tar", "--download"):
        assert word in remedy


def test_only_missing_archives_are_downloaded_and_beside_what_is_there(devkit, monkeypatch):
    asked = []

    def download(root, year, image_set, download):
        asked.append((root, year, image_set))
        fresh = Devkit(Path(root) / "VOCdevkit")
        fresh.add("000009", xml(), year=year)
        fresh.name("test" if image_set == "test" else "trainval", "000009", year=year)

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", download)
    devkit.add("000001", xml())
    devkit.name("trainval", "000001")
    top = devkit.root.parent
    assert (
        prepare_devkit(devkit.root, ["2007_trainval", "2007_test", "2012_trainval"], False) == devkit.root and not asked
    )
    for place in (devkit.root, top):
        assert prepare_devkit(place, ["2007_trainval", "2007_test", "2012_trainval"], True) == devkit.root
        assert asked == [(str(top), "2007", "test"), (str(top), "2012", "trainval")], "once, not again"
    with pytest.raises(UserError, match="no published archive has 2012_test"):
        prepare_devkit(top, ["2012_test"], True)


def test_an_empty_folder_vocdevkit_is_not_doubled_by_a_download(tmp_path, monkeypatch):
    def download(root, **kwargs):
        raise OSError(f"no route to host, for {root}\nmore lines")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", download)
    with pytest.raises(UserError) as error:
        prepare_devkit(tmp_path / "VOCdevkit", ["2007_test"], True)
    what, remedy = str(error.value).split("\n")
    assert f"VOCtest_06-Nov-2007.tar failed (OSError: no route to host, for {tmp_path})" in what
    assert f"unpack it in {tmp_path}, so that {tmp_path}/VOCdevkit/VOC2007 is there" in remedy


def test_a_download_does_not_make_a_second_devkit(tmp_path):
    Devkit(tmp_path / "voc").add("000001", xml())
    with pytest.raises(UserError, match=r"unpacks into a folder VOCdevkit, and .*voc is called otherwise\n"):
        prepare_devkit(tmp_path / "voc", ["2012_trainval"], True)


# lists


def test_lists_keep_their_order_and_every_image_once(devkit):
    for identity in ("000003", "000001", "000002"):
        devkit.add(identity, xml(thing("cat", 1, 1, 9, 9)))
    devkit.add("000001", xml(thing("cat", 1, 1, 9, 9)), year=2012)
    devkit.name("train", "000003", "000001", "000003")
    devkit.name("val", "000002", "000001")
    devkit.name("train", "000001", year=2012)
    part = read_sets(devkit.root, ["2007_train", "2007_val", "2012_train"])
    assert part.names == ["VOC2007/000003", "VOC2007/000001", "VOC2007/000002", "VOC2012/000001"]
    assert part.images[3] == devkit.root / "VOC2012" / "JPEGImages" / "000001.jpg"
    assert "images that are listed more than once and taken once: 1" in part.warnings
    assert "2007_train usually has 2,501 images, here are 2: " in part.warnings[0]


def test_a_list_of_one_class_leaves_out_the_images_without_it(devkit):
    for identity in ("000001", "000002", "000003"):
        devkit.add(identity, xml(thing("car", 1, 1, 9, 9)))
    devkit.name("car_trainval", "000001 -1", "000002  1", "000003  0")
    assert read_sets(devkit.root, ["2007_car_trainval"]).names == ["VOC2007/000002", "VOC2007/000003"]
    devkit.name("car_trainval", "000001 -1", "000002 7")
    with pytest.raises(UserError, match=r"car_trainval.txt, line 2: '000002 7'"):
        read_sets(devkit.root, ["2007_car_trainval"])


def test_a_missing_list_is_told_with_those_there_are(devkit):
    devkit.add("000001", xml())
    devkit.name("trainval", "000001")
    devkit.name("car_trainval", "000001 1")
    with pytest.raises(UserError, match=r"2007_trainvl: .*did you mean 2007_trainval\?\n.* are 2007_trainval; --down"):
        read_sets(devkit.root, ["2007_trainvl"])
    with pytest.raises(UserError, match=r"no .*VOC2012/ImageSets/Main/trainval.txt"):
        read_sets(devkit.root, ["2012_trainval"])


def test_an_empty_list_is_refused(devkit):
    devkit.add("000001", xml())
    devkit.name("own", "000001 -1", "")
    with pytest.raises(UserError, match=r"own.txt: no image in it\n"):
        read_sets(devkit.root, ["2007_own"])


@pytest.mark.parametrize("name", ["trainval", "07_test", "2007_", "2007_../x", ""])
def test_a_set_of_another_form_is_refused(devkit, name):
    devkit.add("000001", xml())
    with pytest.raises(UserError, match="names no image set\n.*YEAR_LIST, as 2007_train"):
        read_sets(devkit.root, [name])


# annotations


def test_boxes_are_converted_from_one_based_and_inclusive(devkit):
    part = devkit.one(thing("tvmonitor", 1, 1, 60, 40), thing("aeroplane", 11, 5, 11, 20, difficult=1))
    target = part.targets[0]
    assert target["boxes"].tolist() == [[0, 0, 60, 40], [10, 4, 11, 20]], "the whole image; one pixel wide"
    assert target["labels"].tolist() == [20, 1] and target["difficult"].tolist() == [False, True]
    assert [target[key].dtype for key in ("boxes", "labels", "difficult")] == [torch.float32, torch.int64, torch.bool]
    assert part.sizes == [(40, 60)] and not part.warnings and part.classes == CLASSES


def test_numbers_may_be_written_as_floats(devkit):
    part = devkit.one(thing("dog", "45.70000076293945", "5.5", "55.0", "30.25"), size=("60.0", "40.0"))
    assert part.targets[0]["boxes"][0].tolist() == pytest.approx([44.7, 4.5, 55, 30.25]) and part.sizes == [(40, 60)]


def test_the_parts_of_a_person_are_no_objects(devkit):
    heads = f"<part><name>head</name>{box_of(12, 6, 15, 9)}{thing('dog', 12, 6, 15, 9)}</part>"
    parts = devkit.one(thing("person", 11, 5, 40, 30, more=heads))
    assert parts.targets[0]["boxes"].tolist() == [[10, 4, 40, 30]] and parts.targets[0]["labels"].tolist() == [15]


def test_boxes_that_reach_outside_are_cut_and_told_in_one_line(devkit):
    for number in range(1, 6):
        devkit.add(
            f"{number:06d}", xml(thing("cat", 0, 3, 70, 40), thing("cow", 5, 5, 20, 45), thing("cat", 1, 1, 60, 40))
        )
    devkit.name("own", *(f"{number:06d}" for number in range(1, 6)))
    part = read_sets(devkit.root, ["2007_own"])
    assert part.targets[4]["boxes"].tolist() == [[0, 2, 60, 40], [4, 4, 20, 40], [0, 0, 60, 40]]
    names = "VOC2007/000001; VOC2007/000002; VOC2007/000003; ..."
    assert part.warnings == [f"boxes that reach outside their image and are cut: 10, {names}"]


def test_boxes_without_area_are_dropped_with_their_label_and_flag(devkit):
    part = devkit.one(
        thing("cat", 10, 10, 5, 20, difficult=1),  # swapped
        thing("cow", 10, 10, 20, 9, difficult=1),
        thing("dog", 62, 10, 70, 20, difficult=1),  # all of it outside
        thing("bus", 10, 10, 10, 10),  # one pixel is an area
    )
    target = part.targets[0]
    assert target["boxes"].tolist() == [[9, 9, 10, 10]] and target["labels"].tolist() == [6]
    assert target["difficult"].tolist() == [False]
    assert part.warnings == ["boxes that have no area and are dropped: 3, VOC2007/000001"]


def test_an_image_without_objects_stays(devkit):
    devkit.add("000001", xml())
    devkit.add("000002", xml(thing("cat", 10, 10, 5, 20)))
    devkit.name("own", "000001", "000002")
    part = read_sets(devkit.root, ["2007_own"])
    assert len(part) == 2
    for target in part.targets:
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
        assert target["difficult"].dtype == torch.bool
    assert part.warnings[-1].endswith("which stay as such: 2, VOC2007/000001; VOC2007/000002")
    assert "2 images with 0 objects" in part.summary("train")


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_a_file_without_a_size_takes_that_of_the_image(devkit, size):
    part = devkit.one(thing("cat", 5, 5, 90, 39), size=size)
    assert part.sizes == [(40, 60)] and part.targets[0]["boxes"].tolist() == [[4, 4, 60, 39]]


def test_an_unknown_class_is_told_with_the_closest_one(devkit):
    with pytest.raises(UserError, match=r"000001.xml: .*'tvmonitr'.* mean tvmonitor\?\n.*classes.txt"):
        devkit.one(thing("tvmonitr", 1, 1, 9, 9))


def test_classes_of_own_data_come_from_a_file(devkit):
    devkit.root.mkdir()
    (devkit.root / "classes.txt").write_text("zebra\n\ngnu \n")
    part = devkit.one(thing("gnu", 1, 1, 9, 9), thing("zebra", 1, 1, 9, 9))
    assert part.classes == ["zebra", "gnu"] and part.targets[0]["labels"].tolist() == [2, 1]
    with pytest.raises(UserError, match="'cat'"):
        devkit.one(thing("cat", 1, 1, 9, 9))
    (devkit.root / "classes.txt").write_text("zebra\nzebra\n")
    with pytest.raises(UserError, match=r"classes.txt: a class is named twice"):
        devkit.one()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("<annotation><object>", "no element found"),
        ("<html></html>", "<html>"),
        (xml(thing("cat", 1, "x", 9, 9)), "<bndbox/ymin> in <object> is 'x', no number"),
        (xml(thing("cat", 1, "nan", 9, 9)), "is 'nan', no number"),
        (xml("<object><name>cat</name></object>"), "no <bndbox/xmin> in <object>"),
        (xml(thing("cat", 1, 1, 9, 9, difficult="maybe")), "'maybe', no number"),
    ],
)
def test_a_broken_annotation_stops_with_its_name(devkit, content, reason):
    devkit.add("000007", content)
    devkit.name("own", "000007")
    with pytest.raises(UserError) as error:
        read_sets(devkit.root, ["2007_own"])
    what, remedy = str(error.value).split("\n")
    assert what.startswith(f"{devkit.root}/VOC2007/Annotations/000007.xml: ") and reason in what and "000007" in remedy


def test_a_missing_image_stops_with_its_name(devkit):
    devkit.add("000001", xml())
    devkit.name("own", "000001", "000002")
    with pytest.raises(UserError, match=r"no image .*VOC2007/JPEGImages/000002.jpg or .jpeg or .png\n.*000002"):
        read_sets(devkit.root, ["2007_own"])


# images


def test_images_are_read_as_rgb_whatever_the_ending(devkit):
    for identity, ending in (("1", ".jpg"), ("2", ".JPEG"), ("3", ".png")):
        devkit.add(identity, xml(thing("cat", 1, 1, 9, 9)), ending)
    devkit.name("own", "1", "2", "3")
    part = read_sets(devkit.root, ["2007_own"])
    for index in range(3):
        image = part.read(index)
        assert image.shape == (3, 40, 60) and image.dtype == torch.uint8 and image.is_contiguous()
        assert (image.flatten(1).float().mean(1) - torch.tensor([200.0, 30, 10])).abs().max() < 3
    assert torch.equal(image[:, 0, 0], torch.tensor([200, 30, 10], dtype=torch.uint8)), "of a PNG exactly"


def test_an_image_of_another_size_than_its_annotation_is_refused(devkit):
    part = devkit.one(thing("cat", 1, 1, 9, 9), size=(40, 60))
    with pytest.raises(BadImage, match=r"000001.jpg: it has 60 x 40 pixels, its annotation says 40 x 60"):
        part.read(0)


@pytest.mark.parametrize("content", [b"no image", None])
def test_an_unreadable_image_is_named(devkit, content):
    part = devkit.one(thing("cat", 1, 1, 9, 9))
    raw = part.images[0].read_bytes()
    part.images[0].write_bytes(content or raw[: len(raw) // 2])  # cut short
    with pytest.raises(BadImage, match="000001.jpg: "):
        part.read(0)


# parts


def test_take_keeps_what_belongs_together():
    part = draw_scenes(6, size=64)
    some = part.take([4, 1, torch.tensor(4)])
    assert some.names == [part.names[4], part.names[1], part.names[4]] and len(some) == 3 and len(part) == 6
    for new, old in enumerate((4, 1, 4)):
        assert some.read(new) is part.read(old) and some.sizes[new] == part.sizes[old]
        assert some.targets[new] is part.targets[old]
    some.warnings.append("of this one alone")
    assert not part.warnings


def test_without_difficult_leaves_the_images_and_the_part_itself(devkit):
    part = devkit.one(
        thing("cat", 1, 1, 9, 9, difficult=1), thing("cow", 2, 2, 9, 9, difficult=0), thing("dog", 3, 3, 9, 9)
    )
    target = part.without_difficult().targets[0]
    assert target["labels"].tolist() == [10, 12] and target["boxes"][:, 0].tolist() == [1, 2]
    assert not target["difficult"].any() and part.targets[0]["labels"].tolist() == [8, 10, 12]


def test_the_summary_counts_objects_and_classes(devkit):
    devkit.root.mkdir()
    (devkit.root / "classes.txt").write_text("gnu\nzebra\nrhino\n")
    part = devkit.one(*[thing("gnu", 1, 1, 9, 9, difficult=1)] * 2, *[thing("zebra", 1, 1, 9, 9)] * 3)
    assert part.summary("test") == (
        "test: 1 images with 5 objects (2 difficult) of 3 classes, 0 (rhino) to 3 (zebra) a class, from "
        f"{devkit.root} (2007_own)"
    )


def test_load_image_sets_limits_and_warns_of_images_in_both_sets(devkit):
    for number in range(1, 6):
        devkit.add(f"{number:06d}", xml(thing("cat", 1, 1, 9, 9)))
    devkit.name("one", "000001", "000002", "000003")
    devkit.name("two", "000004")
    devkit.name("both", "000002", "000005", "000004")
    where = {"dataset": "voc", "data_dir": str(devkit.root), "train_sets": ["2007_one", "2007_two"]}
    train, test = load_image_sets(**where, test_set="2007_both")
    assert (len(train), len(test)) == (4, 3) and not test.warnings
    assert len(train.warnings) == 1
    assert train.warnings[0].startswith("2 images are in the training and in the test part: VOC2007/000002; VOC2007/00")
    train, test = load_image_sets(**where, test_set="2007_both", limit=3)
    assert train.names == ["VOC2007/000001", "VOC2007/000002", "VOC2007/000003"] and len(train.targets) == 3
    assert train.warnings[1:] == ["--limit 3: 3 of 4 training images; results are partial"] and not test.warnings
    assert len(load_image_sets(**where | {"train_sets": []}, test_set="2007_both")[0]) == 0, "to evaluate alone"


def test_load_image_sets_draws_other_scenes_for_training_than_for_the_test(monkeypatch):
    train, test = load_image_sets(dataset="shapes", limit=3, image_size=64)
    assert not set(train.names) & set(test.names) and not torch.equal(
        train.targets[0]["boxes"], test.targets[0]["boxes"]
    )
    assert train.warnings == ["--limit 3: 3 of 1,000 training images; results are partial"]
    assert test.warnings == ["--limit 3: 3 of 200 test images; results are partial"]
    assert all(48 <= side <= 80 for part in (train, test) for size in part.sizes for side in size)
    monkeypatch.setattr(load, "SCENES", ((2, 2), (1, 3)))
    train, test = load_image_sets(dataset="shapes")
    assert [len(part) for part in load_image_sets(dataset="shapes", train_sets=[], limit=1)] == [0, 1], (
        "to evaluate alone"
    )
    assert (len(train), len(test)) == (2, 1) and max(train.sizes[0]) >= 120 and not train.warnings
    with pytest.raises(UserError, match="--image_size 16"):
        load_image_sets(dataset="shapes", image_size=16)
    with pytest.raises(ValueError, match="'coco'"):
        load_image_sets(dataset="coco")


# scenes


def square(side: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((3, side, side), value, dtype=torch.uint8), torch.ones(side, side, dtype=torch.bool)


def test_boxes_are_tight_around_what_remains_visible():
    objects = [square(10, 1), square(10, 2), square(4, 3)]
    image, visible = compose(torch.zeros(3, 20, 30, dtype=torch.uint8), objects, [(2, 3), (2, 9), (-1, 28)])
    assert image[0, 2:12, 3:9].eq(1).all() and image[0, 2:12, 9:19].eq(2).all() and image[0, :3, 28:].eq(3).all()
    assert image[0].gt(0).sum() == 60 + 100 + 6
    target = make_target(visible, torch.tensor([100, 100, 16]), torch.tensor([7, 8, 9]))
    assert target["boxes"].tolist() == [[3, 2, 9, 12], [9, 2, 19, 12], [28, 0, 30, 3]]
    assert target["labels"].tolist() == [7, 8, 9]
    assert target["difficult"].tolist() == [False, False, True], "of the last one 6 of 16 pixels are there"


def test_the_border_cuts_the_side_that_lies_outside():
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).expand(3, 4, 4) + 1
    canvas, mask = torch.zeros(3, 6, 6, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.bool)
    image, _ = compose(canvas, [(pixels, mask)], [(-1, 4)])
    assert image[0, :3, 4:].tolist() == [[5, 6], [9, 10], [13, 14]] and image[0].gt(0).sum() == 6
    for corner in ((-9, 2), (2, 9), (-4, 0), (0, 6)):
        image, visible = compose(canvas, [(pixels, mask)], [corner])
        assert not image.any() and not visible.any(), "all of it outside"


def test_an_object_has_the_outline_of_its_class():
    labels = torch.tensor([0, 0, 0, 8, 8, 0, 8, 0] * 4)  # discs and bars
    objects = shape_scenes.draw_objects(labels, 160, torch.Generator().manual_seed(0))
    for label, (pixels, mask) in zip(labels.tolist(), objects, strict=True):
        assert pixels.shape[1:] == mask.shape and mask[0].any() and mask[-1].any() and mask[:, 0].any()
        height, width = mask.shape
        assert (abs(float(mask.float().mean()) - math.pi / 4) < 0.04 and abs(height - width) <= 1) == (label == 0)
    assert len({mask.shape for _, mask in objects}) > 10


def test_holes_of_an_object_show_what_is_behind_it():
    pixels, mask = square(6, 5)
    mask[1:5, 1:5] = False
    image, visible = compose(
        torch.zeros(3, 10, 10, dtype=torch.uint8), [square(2, 1), (pixels, mask)], [(4, 4), (2, 2)]
    )
    assert image[0, 4:6, 4:6].eq(1).all() and image[0].eq(5).sum() == 20
    assert visible.flatten(1).sum(1).tolist() == [4, 20]


@pytest.mark.parametrize(("hidden", "difficult"), [(4, False), (5, False), (6, True), (8, True), (9, None), (10, None)])
def test_an_object_is_difficult_below_a_half_and_not_listed_below_a_fifth(hidden, difficult):
    canvas = torch.zeros(3, 30, 30, dtype=torch.uint8)
    _, visible = compose(canvas, [square(10, 1), square(20, 2)], [(2, 2), (0, 12 - hidden)])
    target = make_target(visible, torch.tensor([100, 400]), torch.tensor([1, 2]))
    assert target["difficult"].tolist() == [*([difficult] if difficult is not None else []), False]
    assert target["labels"].tolist() == ([1, 2] if difficult is not None else [2])


def test_the_first_scenes_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    few, many, other = (
        draw_scenes(3, size=64, seed=5),
        draw_scenes(25, size=64, seed=5),
        draw_scenes(3, size=64, seed=6),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert len(many) == 25 and few.names == many.names[:3]
    for index in range(3):
        assert torch.equal(few.read(index), many.read(index))
        assert all(torch.equal(few.targets[index][key], many.targets[index][key]) for key in few.targets[index])
    assert not torch.equal(few.targets[0]["boxes"], other.targets[0]["boxes"])
    assert few.sizes[0] != many.sizes[20] or not torch.equal(few.read(0), many.read(20)), "the next chunk is another"


def test_scenes_hold_what_a_detector_expects():
    part = draw_scenes(100, size=64, num_classes=4)
    seen = torch.zeros(5, dtype=torch.int64)
    for index, target in enumerate(part.targets):
        image, (height, width) = part.read(index), part.sizes[index]
        assert image.shape == (3, height, width) and image.dtype == torch.uint8 and image.is_contiguous()
        assert 48 <= min(height, width) and max(height, width) <= 80
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        assert 1 <= len(x0) <= 4 and target["boxes"].dtype == torch.float32
        assert (0 <= x0).all() and (x0 < x1).all() and (x1 <= width).all()
        assert (0 <= y0).all() and (y0 < y1).all() and (y1 <= height).all()
        seen += torch.bincount(target["labels"], minlength=5)
    assert seen[0] == 0 and seen[1:].min() > 20 and part.classes == ["disc", "square", "triangle", "star"]
    assert len(set(part.sizes)) > 80
    assert any(target["difficult"].any() for target in part.targets)
    assert any((target["boxes"][:, :2] == 0).any() for target in part.targets), "some are cut by the border"


def test_what_is_drawn_on_a_background_lies_in_the_boxes_and_reaches_their_edges(monkeypatch):
    calls, real = [], shape_scenes.compose

    def watched(canvas, objects, corners):
        calls.append((canvas, len(objects), *real(canvas, objects, corners)))
        return calls[-1][2:]

    monkeypatch.setattr(shape_scenes, "compose", watched)
    part = draw_scenes(shape_scenes.CHUNK, size=96, seed=1)
    for index, (canvas, count, image, _) in enumerate(calls[-shape_scenes.CHUNK :]):  # before them come the scraps
        changed, boxes = (canvas != image).any(0), part.targets[index]["boxes"].int().tolist()
        assert torch.equal(image, part.read(index))
        for x0, y0, x1, y1 in boxes:
            inside = changed[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        for x0, y0, x1, y1 in boxes:
            changed[y0:y1, x0:x1] = False
        assert not changed.any() or len(boxes) < count, "only of an object that is not listed"


@pytest.mark.parametrize("wrong", [{"num_classes": 0}, {"num_classes": 11}, {"size": 31}])
def test_wrong_calls_for_scenes_are_refused(wrong):
    with pytest.raises(ValueError, match="1 to 10 classes"):
        draw_scenes(1, **wrong)


# export


def test_an_exported_part_is_read_back_as_it_was(tmp_path):
    parts = {"trainval": draw_scenes(24, size=48, seed=2), "test": draw_scenes(3, size=48, seed=3)}
    parts["test"].targets[1] = {key: value[:0] for key, value in parts["test"].targets[1].items()}
    export_voc(tmp_path, parts)
    for name, part in parts.items():
        back = read_sets(find_devkit(tmp_path), [f"2007_{name}"])
        assert [Path(one).name for one in back.names] == [Path(one).name for one in part.names]
        assert back.classes == part.classes and back.sizes == part.sizes
        for index, (target, expected) in enumerate(zip(back.targets, part.targets, strict=True)):
            assert torch.equal(back.read(index), part.read(index))
            assert target.keys() == expected.keys()
            assert all(torch.equal(target[key], expected[key]) for key in target)
    assert any(target["difficult"].any() for target in parts["trainval"].targets)
    first = next((tmp_path / "VOCdevkit/VOC2007/Annotations").glob("2-00000.xml")).read_text()
    x0, _, x1, _ = parts["trainval"].targets[0]["boxes"][0].int().tolist()
    assert f"<xmin>{x0 + 1}</xmin>" in first and f"<xmax>{x1}</xmax>" in first


def test_export_refuses_a_folder_with_a_devkit_and_parts_that_share_images(tmp_path, devkit):
    part = draw_scenes(1, size=48)
    with pytest.raises(ValueError, match="same name"):
        export_voc(tmp_path / "new", {"train": part, "val": part})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/VOCdevkit/VOC2007: Not a directory\nexport to another"):
        export_voc(tmp_path / "file", {"train": part})
    devkit.add("000001", xml())
    with pytest.raises(UserError, match="VOCdevkit exists\n"):
        export_voc(tmp_path, {"train": part})


# the real images


@pytest.mark.data
def test_the_real_images_are_read_as_their_files_say(real_data):
    train, test = load_image_sets(
        dataset="voc", data_dir=str(real_data), train_sets=["2007_trainval"], test_set="2007_test"
    )
    assert train.classes == CLASSES and (len(train), len(test)) == (120, 50)
    targets = train.targets + test.targets
    text = "".join(path.read_text() for path in sorted((real_data / "VOCdevkit/VOC2007/Annotations").glob("*.xml")))
    assert sum(len(target["labels"]) for target in targets) == text.count("<object>") == 583
    flags = re.findall(r"<difficult>([01])</difficult>", text)
    assert sum(int(target["difficult"].sum()) for target in targets) == flags.count("1") > 0
    assert all("usually has" in line for part in (train, test) for line in part.warnings), "nothing cut or dropped"
    for part in (train, test):
        for index in range(0, len(part), 10):
            expected = torch.from_numpy(np.array(Image.open(part.images[index]).convert("RGB"))).permute(2, 0, 1)
            difference = (part.read(index).int() - expected.int()).abs()  # two decoders
            assert difference.max() <= 3 and difference.float().mean() < 0.5
