"""Image sets of detectors: VOC on disk, drawn scenes, and their export."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detection import load, shape_scenes
from detection.dataset import DetectionSet
from detection.load import load_image_sets
from detection.shape_scenes import draw_scenes, export_voc, make_target, paste_objects
from detection.voc import list_files, read_sets
from detection.voc_folders import CLASSES, download_missing_sets, find_devkits
from engine.data.decode import BadImage, decode_image
from engine.errors import UserError

SIZE = (60, 40)  # width, height


def make_box_xml(xmin, ymin, xmax, ymax) -> str:
    return f"<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin><ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox>"


def make_object_xml(name: str, *corners, difficult: int | None = None, more: str = "") -> str:
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{more}{flag}{make_box_xml(*corners)}</object>"


def make_xml(*objects: str, size: tuple[int, int] | None = SIZE) -> str:
    size_xml = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><folder>VOC2007</folder>{size_xml}{''.join(objects)}</annotation>"


class Devkit:
    """A small VOCdevkit that a test fills with images, annotations and lists."""

    def __init__(self, root: Path):
        self.root = root

    def add(self, image_id: str, annotation: str | None, ending: str = ".jpg", year: int = 2007) -> None:
        """Add an image and, unless it is None, its annotation."""
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.root / f"VOC{year}" / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (200, 30, 10)).save(self.root / f"VOC{year}" / "JPEGImages" / f"{image_id}{ending}")
        if annotation is not None:
            (self.root / f"VOC{year}" / "Annotations" / f"{image_id}.xml").write_text(annotation)

    def add_list(self, split: str, *lines: str, year: int = 2007) -> None:
        """Add a list of images."""
        (self.root / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines) + "\n\n")

    def read_one(self, *objects: str, size: tuple[int, int] | None = SIZE) -> DetectionSet:
        """Return the image set that is read for one image with these objects."""
        self.add("000001", make_xml(*objects, size=size))
        self.add_list("own", "000001")
        return read_sets(self.root, ["2007_own"])


@pytest.fixture
def devkit(tmp_path) -> Devkit:
    return Devkit(tmp_path / "VOCdevkit")


# ---- Folders and downloads ----


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOCdevkit", "VOCdevkit2007", "VOCtrainval/VOCdevkit"])
def test_devkit_is_found_in_every_layout(tmp_path, inside):
    Devkit(tmp_path / inside).add("000001", make_xml())
    for place in {tmp_path, tmp_path / inside.partition("/")[0], tmp_path / inside, tmp_path / inside / "VOC2007"}:
        assert find_devkits(place) == [tmp_path / inside]


@pytest.mark.parametrize("roots", [("VOCdevkit2007", "VOCdevkit2012"), ("VOC2007/VOCdevkit", "VOC2012/VOCdevkit")])
def test_years_may_be_in_two_devkits(tmp_path, roots):
    for year, root in zip((2007, 2012), roots, strict=True):
        Devkit(tmp_path / root).add("000001", make_xml(make_object_xml("cat", 1, 1, 9, 9)), year=year)
        Devkit(tmp_path / root).add_list("trainval", "000001", year=year)
    image_set = read_sets(tmp_path, ["2007_trainval", "2012_trainval"])
    assert image_set.names == ["VOC2007/000001", "VOC2012/000001"]
    assert image_set.images == [
        tmp_path / root / f"VOC{year}/JPEGImages/000001.jpg" for year, root in zip((2007, 2012), roots, strict=True)
    ]
    (tmp_path / roots[1] / "classes.txt").write_text("gnu\n")
    with pytest.raises(UserError, match=f"{roots[0]} and .*{roots[1]} have different classes\nput the same "):
        read_sets(tmp_path, ["2007_trainval", "2012_trainval"])


def test_sets_of_one_year_may_be_in_two_devkits(tmp_path):
    for root, split, image_id in (("a/VOCdevkit", "trainval", "000001"), ("b/VOCdevkit", "test", "000002")):
        Devkit(tmp_path / root).add(image_id, make_xml(make_object_xml("cat", 1, 1, 9, 9)))
        Devkit(tmp_path / root).add_list(split, image_id)
    where = {"dataset": "voc", "data_dir": str(tmp_path), "train_sets": ["2007_trainval"], "test_set": "2007_test"}
    train, test = load_image_sets(**where)
    assert train.names == ["VOC2007/000001"] and test.names == ["VOC2007/000002"]
    assert test.images == [tmp_path / "b/VOCdevkit/VOC2007/JPEGImages/000002.jpg"]
    (tmp_path / "b/VOCdevkit/classes.txt").write_text("cat\n")
    with pytest.raises(UserError, match="the training and the test set have different classes"):
        load_image_sets(**where)


def test_folder_without_a_year_error_names_the_remedy(tmp_path):
    Devkit(tmp_path).add("000001", make_xml())
    (tmp_path / "VOC2007").rename(tmp_path / "mine")
    with pytest.raises(UserError, match=r"mine has the folders of a VOC<year>, .*\nrename it to .* VOC2007"):
        find_devkits(tmp_path / "mine")


def test_missing_devkit_error_names_folders_and_archives(tmp_path):
    with pytest.raises(UserError) as error:
        find_devkits(tmp_path)
    what, remedy = str(error.value).split("\n")
    assert f"in {tmp_path}, {tmp_path}/VOCdevkit, {tmp_path}/VOCdevkit/VOCdevkit" in what and "VOC2007/" in what
    for word in ("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar", "VOCtrainval_11-May-2012.tar", "--download"):
        assert word in remedy


def test_only_missing_archives_are_downloaded_into_the_existing_devkit(devkit, monkeypatch):
    requested = []

    def download(root, year, image_set, download):
        requested.append((root, year, image_set))
        new = Devkit(Path(root) / "VOCdevkit")
        new.add("000009", make_xml(), year=year)
        new.add_list("test" if image_set == "test" else "trainval", "000009", year=year)

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", download)
    devkit.add("000001", make_xml())
    devkit.add_list("trainval", "000001")
    top = devkit.root.parent
    for place in (devkit.root, top):
        download_missing_sets(place, ["2007_trainval", "2007_test", "2012_trainval"])
        assert find_devkits(place) == [devkit.root]
        assert requested == [(str(top), "2007", "test"), (str(top), "2012", "trainval")], "downloaded once only"
    with pytest.raises(UserError, match="no published archive holds 2012_test"):
        download_missing_sets(top, ["2012_test"])


def test_download_does_not_nest_an_empty_vocdevkit_folder(tmp_path, monkeypatch):
    def download(root, **kwargs):
        raise OSError(f"no route to host, for {root}\nmore lines")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", download)
    with pytest.raises(UserError) as error:
        download_missing_sets(tmp_path / "VOCdevkit", ["2007_test"])
    what, remedy = str(error.value).split("\n")
    assert f"VOCtest_06-Nov-2007.tar failed (OSError: no route to host, for {tmp_path})" in what
    assert f"unpack it in {tmp_path}, so that {tmp_path}/VOCdevkit/VOC2007 exists" in remedy


def test_download_into_a_devkit_of_another_name_is_refused(tmp_path):
    Devkit(tmp_path / "voc").add("000001", make_xml())
    with pytest.raises(UserError, match=r"unpacks into a folder named VOCdevkit, but the devkit is .*voc\nrename"):
        download_missing_sets(tmp_path / "voc", ["2012_trainval"])


# ---- Lists ----


def test_lists_keep_their_order_and_drop_repeated_images(devkit):
    for image_id in ("000003", "000001", "000002"):
        devkit.add(image_id, make_xml(make_object_xml("cat", 1, 1, 9, 9)))
    devkit.add("000001", make_xml(make_object_xml("cat", 1, 1, 9, 9)), year=2012)
    devkit.add_list("train", "000003", "000001", "000003")
    devkit.add_list("val", "000002", "000001")
    devkit.add_list("train", "000001", year=2012)
    image_set = read_sets(devkit.root, ["2007_train", "2007_val", "2012_train"])
    assert image_set.names == ["VOC2007/000003", "VOC2007/000001", "VOC2007/000002", "VOC2012/000001"]
    assert image_set.images[3] == devkit.root / "VOC2012" / "JPEGImages" / "000001.jpg"
    assert "images listed more than once (used only once): 1" in image_set.warnings
    assert "2007_train has 2 images here instead of 2,501: " in image_set.warnings[0]


def test_list_of_one_class_skips_images_without_it(devkit):
    for image_id in ("000001", "000002", "000003"):
        devkit.add(image_id, make_xml(make_object_xml("car", 1, 1, 9, 9)))
    devkit.add_list("car_trainval", "000001 -1", "000002  1", "000003  0")
    assert read_sets(devkit.root, ["2007_car_trainval"]).names == ["VOC2007/000002", "VOC2007/000003"]
    devkit.add_list("car_trainval", "000001 -1", "000002 7")
    with pytest.raises(UserError, match=r"car_trainval.txt, line 2: '000002 7'"):
        read_sets(devkit.root, ["2007_car_trainval"])


def test_missing_list_error_names_the_existing_lists(devkit):
    devkit.add("000001", make_xml())
    devkit.add_list("trainval", "000001")
    devkit.add_list("car_trainval", "000001 1")
    with pytest.raises(
        UserError, match=r"2007_trainvl: .*did you mean 2007_trainval\?\nsets in .*: 2007_trainval; --down"
    ):
        read_sets(devkit.root, ["2007_trainvl"])
    with pytest.raises(UserError, match=r"VOC2012/ImageSets/Main/trainval.txt does not exist"):
        read_sets(devkit.root, ["2012_trainval"])


def test_empty_list_raises(devkit):
    devkit.add("000001", make_xml())
    devkit.add_list("own", "000001 -1", "")
    with pytest.raises(UserError, match=r"own.txt: the list is empty\n"):
        read_sets(devkit.root, ["2007_own"])


@pytest.mark.parametrize("name", ["trainval", "07_test", "2007_", "2007_../x", ""])
def test_invalid_set_name_raises(devkit, name):
    devkit.add("000001", make_xml())
    with pytest.raises(UserError, match="is not the name of an image set\n.*YEAR_LIST, such as 2007_train"):
        read_sets(devkit.root, [name])


# ---- Annotations ----


def test_boxes_are_converted_from_one_based_inclusive_coordinates(devkit):
    image_set = devkit.read_one(
        make_object_xml("tvmonitor", 1, 1, 60, 40), make_object_xml("aeroplane", 11, 5, 11, 20, difficult=1)
    )
    target = image_set.targets[0]
    assert target["boxes"].tolist() == [[0, 0, 60, 40], [10, 4, 11, 20]], "the whole image; one pixel wide"
    assert target["labels"].tolist() == [20, 1] and target["difficult"].tolist() == [False, True]
    assert [target[key].dtype for key in ("boxes", "labels", "difficult")] == [torch.float32, torch.int64, torch.bool]
    assert image_set.sizes == [(40, 60)] and not image_set.warnings and image_set.classes == CLASSES


def test_coordinates_may_be_floats(devkit):
    image_set = devkit.read_one(
        make_object_xml("dog", "45.70000076293945", "5.5", "55.0", "30.25"), size=("60.0", "40.0")
    )
    assert image_set.targets[0]["boxes"][0].tolist() == pytest.approx([44.7, 4.5, 55, 30.25]) and image_set.sizes == [
        (40, 60)
    ]


def test_parts_of_a_person_are_not_objects(devkit):
    heads = f"<part><name>head</name>{make_box_xml(12, 6, 15, 9)}{make_object_xml('dog', 12, 6, 15, 9)}</part>"
    image_sets = devkit.read_one(make_object_xml("person", 11, 5, 40, 30, more=heads))
    assert image_sets.targets[0]["boxes"].tolist() == [[10, 4, 40, 30]] and image_sets.targets[0][
        "labels"
    ].tolist() == [15]


def test_boxes_beyond_the_image_are_clipped_with_one_warning(devkit):
    for number in range(1, 6):
        devkit.add(
            f"{number:06d}",
            make_xml(
                make_object_xml("cat", 0, 3, 70, 40),
                make_object_xml("cow", 5, 5, 20, 45),
                make_object_xml("cat", 1, 1, 60, 40),
            ),
        )
    devkit.add_list("own", *(f"{number:06d}" for number in range(1, 6)))
    image_set = read_sets(devkit.root, ["2007_own"])
    assert image_set.targets[4]["boxes"].tolist() == [[0, 2, 60, 40], [4, 4, 20, 40], [0, 0, 60, 40]]
    names = "VOC2007/000001; VOC2007/000002; VOC2007/000003; ..."
    assert image_set.warnings == [f"boxes clipped to their image: 10 ({names})"]


def test_boxes_without_area_are_dropped_with_label_and_flag(devkit):
    image_set = devkit.read_one(
        make_object_xml("cat", 10, 10, 5, 20, difficult=1),  # swapped
        make_object_xml("cow", 10, 10, 20, 9, difficult=1),
        make_object_xml("dog", 62, 10, 70, 20, difficult=1),  # entirely outside
        make_object_xml("bus", 10, 10, 10, 10),  # a single pixel has an area
    )
    target = image_set.targets[0]
    assert target["boxes"].tolist() == [[9, 9, 10, 10]] and target["labels"].tolist() == [6]
    assert target["difficult"].tolist() == [False]
    assert image_set.warnings == ["boxes dropped because they have no area: 3 (VOC2007/000001)"]


def test_images_without_objects_are_kept(devkit):
    devkit.add("000001", make_xml())
    devkit.add("000002", make_xml(make_object_xml("cat", 10, 10, 5, 20)))
    devkit.add_list("own", "000001", "000002")
    image_set = read_sets(devkit.root, ["2007_own"])
    assert len(image_set) == 2
    for target in image_set.targets:
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64
        assert target["difficult"].dtype == torch.bool
    assert image_set.warnings[-1].endswith("no objects: 2 (VOC2007/000001; VOC2007/000002)")
    assert "2 training images, 0 objects (0 difficult), 20 classes, 0 each" in image_set.summary("training")


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_missing_size_is_read_from_the_image(devkit, size):
    image_set = devkit.read_one(make_object_xml("cat", 5, 5, 90, 39), size=size)
    assert image_set.sizes == [(40, 60)] and image_set.targets[0]["boxes"].tolist() == [[4, 4, 60, 39]]


def test_unknown_class_error_suggests_the_closest_class(devkit):
    with pytest.raises(UserError, match=r"000001.xml: .*'tvmonitr'.* mean tvmonitor\?\n.*classes.txt"):
        devkit.read_one(make_object_xml("tvmonitr", 1, 1, 9, 9))


def test_custom_classes_are_read_from_classes_txt(devkit):
    devkit.root.mkdir()
    (devkit.root / "classes.txt").write_text("zebra\n\ngnu \n")
    image_set = devkit.read_one(make_object_xml("gnu", 1, 1, 9, 9), make_object_xml("zebra", 1, 1, 9, 9))
    assert image_set.classes == ["zebra", "gnu"] and image_set.targets[0]["labels"].tolist() == [2, 1]
    with pytest.raises(UserError, match="'cat'"):
        devkit.read_one(make_object_xml("cat", 1, 1, 9, 9))
    (devkit.root / "classes.txt").write_text("zebra\nzebra\n")
    with pytest.raises(UserError, match=r"classes.txt: a class name occurs twice"):
        devkit.read_one()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("<annotation><object>", "no element found"),
        ("<html></html>", "<html>"),
        (make_xml(make_object_xml("cat", 1, "x", 9, 9)), "<bndbox/ymin> in <object> is 'x', not a finite number"),
        (make_xml(make_object_xml("cat", 1, "nan", 9, 9)), "is 'nan', not a finite number"),
        (make_xml("<object><name>cat</name></object>"), "<object> has no <bndbox/xmin>"),
        (make_xml(make_object_xml("cat", 1, 1, 9, 9, difficult="maybe")), "'maybe', not a finite number"),
    ],
)
def test_broken_annotation_error_names_the_file(devkit, content, reason):
    devkit.add("000007", content)
    devkit.add_list("own", "000007")
    with pytest.raises(UserError) as error:
        read_sets(devkit.root, ["2007_own"])
    what, remedy = str(error.value).split("\n")
    assert what.startswith(f"{devkit.root}/VOC2007/Annotations/000007.xml: ") and reason in what and "000007" in remedy


def test_missing_image_error_names_the_file(devkit):
    devkit.add("000001", make_xml())
    devkit.add_list("own", "000001", "000002")
    with pytest.raises(UserError, match=r"no image .*VOC2007/JPEGImages/000002 with the ending .jpg, .*\n.*000002"):
        read_sets(devkit.root, ["2007_own"])


# ---- Images ----


def test_images_of_every_suffix_are_read_as_rgb(devkit):
    endings = (".jpg", ".JPEG", ".webp", ".tif", ".TIFF", ".bmp", ".png")
    for number, ending in enumerate(endings):
        devkit.add(str(number), make_xml(make_object_xml("cat", 1, 1, 9, 9)), ending)
    devkit.add_list("own", *map(str, range(len(endings))))
    image_set = read_sets(devkit.root, ["2007_own"])
    for index in range(len(endings)):
        image = image_set.read(index)
        assert image.shape == (3, 40, 60) and image.dtype == torch.uint8 and image.is_contiguous()
        assert (image.flatten(1).float().mean(1) - torch.tensor([200.0, 30, 10])).abs().max() < 3
    assert torch.equal(image[:, 0, 0], torch.tensor([200, 30, 10], dtype=torch.uint8)), "a PNG is read exactly"


def test_image_size_that_differs_from_the_annotation_raises(devkit):
    devkit.add("000002", make_xml(size=(50, 40)))
    devkit.add_list("two", "000001", "000002")
    image_set = devkit.read_one(make_object_xml("cat", 1, 1, 9, 9))
    with pytest.raises(
        UserError,
        match=r"1 image of another size than annotated: VOC2007/000002 \(60 x 40 pixels, annotation 50 x 40\)\ncheck",
    ):
        read_sets(devkit.root, ["2007_two"])
    Image.new("RGB", (40, 60)).save(image_set.images[0])  # changed during the run
    with pytest.raises(BadImage, match=r"000001.jpg: the image has 40 x 60 pixels, but its annotation says 60 x 40"):
        image_set.read(0)


def test_unreadable_header_error_names_the_file_at_the_start(devkit):
    devkit.add("000001", make_xml())
    (devkit.root / "VOC2007/JPEGImages/000001.jpg").write_bytes(b"no image")
    devkit.add_list("own", "000001")
    with pytest.raises(UserError, match="000001.jpg: not an image\nreplace it, or remove VOC2007/000001 from"):
        read_sets(devkit.root, ["2007_own"])


def test_images_and_annotations_may_be_in_subfolders(devkit):
    for folder in ("JPEGImages/sub", "Annotations/sub"):
        (devkit.root / "VOC2007" / folder).mkdir(parents=True)
    devkit.add("sub/a", make_xml(make_object_xml("cow", 1, 1, 9, 9)))
    devkit.add_list("own", "sub/a")
    image_set = read_sets(devkit.root, ["2007_own"])
    assert image_set.names == ["VOC2007/sub/a"] and image_set.targets[0]["labels"].tolist() == [10]
    assert image_set.images == [devkit.root / "VOC2007/JPEGImages/sub/a.jpg"]


def test_annotation_may_end_in_capitals(devkit):
    devkit.add("000001", make_xml(make_object_xml("cow", 1, 1, 9, 9)))
    folder = devkit.root / "VOC2007" / "Annotations"
    (folder / "000001.xml").rename(folder / "000001.XML")
    devkit.add_list("own", "000001")
    assert read_sets(devkit.root, ["2007_own"]).targets[0]["labels"].tolist() == [10]


def test_hidden_files_are_neither_images_nor_lists(devkit):
    devkit.add("000001", make_xml())
    (devkit.root / "VOC2007/JPEGImages/._000001.jpg").write_bytes(b"of macOS")
    (devkit.root / "VOC2007/Annotations/._000001.xml").write_bytes(b"of macOS")
    devkit.add_list("own", "000001")
    devkit.add_list("._own", "000001")
    assert list_files(devkit.root / "VOC2007/JPEGImages", (".jpg",)) == {"000001": "000001.jpg"}
    with pytest.raises(UserError, match=r"sets in .*VOCdevkit: 2007_own; "):
        read_sets(devkit.root, ["2007_other"])
    devkit.add_list("all", "000001", "._000001")
    image_set = read_sets(devkit.root, ["2007_all"])
    assert image_set.names == ["VOC2007/000001"]


# ---- EXIF orientation ----


def draw_corner(orientation: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Image.Exif]:
    """Return an image that is white in the upper left corner once it is upright, and its EXIF data.

    size: width and height of the upright image.
    """
    upright = Image.new("RGB", size)
    upright.paste("white", (0, 0, 20, 10))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> what turns an upright image into the stored one
    exif = Image.Exif()
    exif[0x112] = orientation
    return upright.transpose(undo[orientation]) if orientation > 1 else upright, exif


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_turned_upright_where_its_boxes_are(devkit, orientation, ending):
    devkit.add("000001", make_xml(make_object_xml("cat", 1, 1, 20, 10)))
    image, exif = draw_corner(orientation)
    (devkit.root / "VOC2007/JPEGImages/000001.jpg").unlink()
    image.save(devkit.root / f"VOC2007/JPEGImages/000001{ending}", exif=exif, quality=100)
    devkit.add_list("own", "000001")
    image_set = read_sets(devkit.root, ["2007_own"])
    pixels = image_set.read(0)
    assert image_set.sizes == [(40, 60)] == [tuple(pixels.shape[1:])]
    x0, y0, x1, y1 = image_set.targets[0]["boxes"][0].int().tolist()
    assert pixels[:, y0:y1, x0:x1].min() > 250 and (pixels > 128).sum() == 3 * 20 * 10
    assert image_set.take([0]).read(0).shape == pixels.shape
    told = [line for line in image_set.warnings if "EXIF" in line]
    assert len(told) == (orientation > 1) and all(("1 turned and 0" in line) == (orientation > 4) for line in told)


def test_image_whose_annotation_has_the_stored_size_is_not_turned(devkit):
    for name, orientation in (("000001", 6), ("000002", 3)):
        image, exif = draw_corner(orientation)
        devkit.add(name, make_xml(make_object_xml("cat", 1, 1, 9, 9), size=image.size))
        image.save(devkit.root / f"VOC2007/JPEGImages/{name}.jpg", exif=exif)
    devkit.add_list("own", "000001", "000002")
    image_set = read_sets(devkit.root, ["2007_own"])
    assert image_set.sizes == [(60, 40), (40, 60)] and not image_set.turned
    for index, path in enumerate(image_set.images):
        assert torch.equal(image_set.read(index).permute(1, 2, 0), torch.from_numpy(decode_image(path)))


def test_orientation_is_named_where_neither_size_fits(devkit):
    image, exif = draw_corner(6)
    devkit.add("000001", make_xml(size=(50, 50)))
    image.save(devkit.root / "VOC2007/JPEGImages/000001.jpg", exif=exif)
    devkit.add_list("own", "000001")
    with pytest.raises(UserError, match=r"000001 \(40 x 60 pixels, EXIF orientation 6, annotation 50 x 50\)\n"):
        read_sets(devkit.root, ["2007_own"])


@pytest.mark.parametrize("content", [b"no image", None])
def test_unreadable_image_error_names_the_file(devkit, content):
    image_set = devkit.read_one(make_object_xml("cat", 1, 1, 9, 9))
    raw = image_set.images[0].read_bytes()
    image_set.images[0].write_bytes(content or raw[: len(raw) // 2])  # truncated
    with pytest.raises(BadImage, match="000001.jpg: "):
        image_set.read(0)


# ---- Image sets ----


def test_take_keeps_images_and_targets_together():
    image_set = draw_scenes(6, size=64)
    subset = image_set.take([4, 1, torch.tensor(4)])
    assert (
        subset.names == [image_set.names[4], image_set.names[1], image_set.names[4]]
        and len(subset) == 3
        and len(image_set) == 6
    )
    for new, old in enumerate((4, 1, 4)):
        assert subset.read(new) is image_set.read(old) and subset.sizes[new] == image_set.sizes[old]
        assert subset.targets[new] is image_set.targets[old]
    subset.warnings.append("only for the subset")
    assert not image_set.warnings


def test_without_difficult_keeps_all_images_and_the_original_set(devkit):
    image_set = devkit.read_one(
        make_object_xml("cat", 1, 1, 9, 9, difficult=1),
        make_object_xml("cow", 2, 2, 9, 9, difficult=0),
        make_object_xml("dog", 3, 3, 9, 9),
    )
    target = image_set.without_difficult().targets[0]
    assert target["labels"].tolist() == [10, 12] and target["boxes"][:, 0].tolist() == [1, 2]
    assert not target["difficult"].any() and image_set.targets[0]["labels"].tolist() == [8, 10, 12]


def test_summary_counts_images_objects_and_classes(devkit):
    devkit.root.mkdir()
    (devkit.root / "classes.txt").write_text("gnu\nzebra\nrhino\n")
    image_set = devkit.read_one(
        *[make_object_xml("gnu", 1, 1, 9, 9, difficult=1)] * 2, *[make_object_xml("zebra", 1, 1, 9, 9)] * 3
    )
    assert image_set.summary("test") == (
        "1 test image, 5 objects (2 difficult), 3 classes, 0 (rhino) to 3 (zebra) objects per class, from "
        f"{devkit.root} (2007_own)"
    )


def test_load_image_sets_applies_the_limit_and_warns_about_shared_images(devkit):
    for number in range(1, 6):
        devkit.add(f"{number:06d}", make_xml(make_object_xml("cat", 1, 1, 9, 9)))
    devkit.add_list("one", "000001", "000002", "000003")
    devkit.add_list("two", "000004")
    devkit.add_list("both", "000002", "000005", "000004")
    where = {"dataset": "voc", "data_dir": str(devkit.root), "train_sets": ["2007_one", "2007_two"]}
    train, test = load_image_sets(**where, test_set="2007_both")
    assert (len(train), len(test)) == (4, 3) and not test.warnings
    assert len(train.warnings) == 1
    assert train.warnings[0].startswith("the training and the test set share 2 images")
    assert train.warnings[0].endswith(": VOC2007/000002; VOC2007/000004")
    train, test = load_image_sets(**where, test_set="2007_both", limit=3)
    assert len(set(train.names)) == len(train.targets) == 3
    assert train.warnings[1:] == ["--limit 3: only 3 of 4 training images are used"] and not test.warnings
    assert len(load_image_sets(**where | {"train_sets": []}, test_set="2007_both")[0]) == 0, (
        "no training set is needed for an evaluation"
    )


def test_limit_takes_images_of_every_class(devkit):
    for number in range(9):
        kind = ("cat", "dog", "sheep")[number // 3]
        devkit.add(f"{number:06d}", make_xml(make_object_xml(kind, 1, 1, 9, 9)))
    devkit.add_list("all", *(f"{number:06d}" for number in range(9)))
    where = {"dataset": "voc", "data_dir": str(devkit.root), "train_sets": ["2007_all"], "test_set": "2007_all"}
    for image_set in load_image_sets(**where, limit=6):
        found = [image_set.classes[int(target["labels"]) - 1] for target in image_set.targets]
        assert found == ["cat", "cat", "dog", "dog", "sheep", "sheep"]


def test_load_image_sets_draws_different_training_and_test_scenes(monkeypatch):
    train, test = load_image_sets(dataset="shapes", limit=3, image_size=64)
    assert not set(train.names) & set(test.names) and not torch.equal(
        train.targets[0]["boxes"], test.targets[0]["boxes"]
    )
    assert train.warnings == ["--limit 3: only 3 of 1,000 training images are used"]
    assert test.warnings == ["--limit 3: only 3 of 200 test images are used"]
    assert all(48 <= side <= 80 for image_set in (train, test) for size in image_set.sizes for side in size)
    monkeypatch.setattr(load, "SCENES", ((2, 2), (1, 3)))
    train, test = load_image_sets(dataset="shapes")
    assert [len(image_set) for image_set in load_image_sets(dataset="shapes", train_sets=[], limit=1)] == [0, 1], (
        "no training set is needed for an evaluation"
    )
    assert (len(train), len(test)) == (2, 1) and max(train.sizes[0]) >= 120 and not train.warnings
    with pytest.raises(UserError, match="image_size 16"):
        load_image_sets(dataset="shapes", image_size=16)
    with pytest.raises(ValueError, match="'lvis'"):
        load_image_sets(dataset="lvis")


@pytest.mark.parametrize("size, needed", [((1, 4001), 4001), ((3, 6001), 2001)])
def test_image_that_is_too_elongated_is_named_at_the_start(size, needed):
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "difficult": torch.zeros(0).bool()}
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image_set = DetectionSet(["a"], ["strip"], [image], [target], [size], "a test")
    with pytest.raises(UserError, match=rf"strip \({size[1]} x {size[0]} pixels\)\n.* at least --max_size {needed}$"):
        load.check_sides(image_set, needed - 1)
    load.check_sides(image_set, needed)
    resize = GeneralizedRCNNTransform(600, needed, [0.5] * 3, [0.5] * 3)
    assert resize([image.float()])[0].image_sizes[0][0] == 1


def test_test_set_without_countable_objects_is_reported(devkit):
    devkit.add("000001", make_xml(make_object_xml("cat", 1, 1, 9, 9)))
    devkit.add("000002", make_xml(make_object_xml("cat", 1, 1, 9, 9, difficult=1)))
    devkit.add("000003", make_xml())
    for split, image_id in (("train", "000001"), ("hard", "000002"), ("empty", "000003")):
        devkit.add_list(split, image_id)
    where = {"dataset": "voc", "data_dir": str(devkit.root), "train_sets": ["2007_hard"]}
    found = [load_image_sets(**where, test_set=f"2007_{split}")[1].warnings for split in ("train", "hard", "empty")]
    told = [[line for line in lines if "no best.pt" in line] for lines in found]
    assert [len(lines) for lines in told] == [0, 1, 1]
    assert "counts (1 object, marked difficult)" in told[1][0] and "counts (there are none)" in told[2][0]


# ---- Drawn scenes ----


def make_square(side: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((3, side, side), value, dtype=torch.uint8), torch.ones(side, side, dtype=torch.bool)


def test_boxes_are_tight_around_the_visible_pixels():
    objects = [make_square(10, 1), make_square(10, 2), make_square(4, 3)]
    image, visible = paste_objects(torch.zeros(3, 20, 30, dtype=torch.uint8), objects, [(2, 3), (2, 9), (-1, 28)])
    assert image[0, 2:12, 3:9].eq(1).all() and image[0, 2:12, 9:19].eq(2).all() and image[0, :3, 28:].eq(3).all()
    assert image[0].gt(0).sum() == 60 + 100 + 6
    target = make_target(visible, torch.tensor([100, 100, 16]), torch.tensor([7, 8, 9]))
    assert target["boxes"].tolist() == [[3, 2, 9, 12], [9, 2, 19, 12], [28, 0, 30, 3]]
    assert target["labels"].tolist() == [7, 8, 9]
    assert target["difficult"].tolist() == [False, False, True], "6 of the 16 pixels of the last object are visible"


def test_pixels_beyond_the_border_are_cut_off():
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).expand(3, 4, 4) + 1
    canvas, mask = torch.zeros(3, 6, 6, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.bool)
    image, _ = paste_objects(canvas, [(pixels, mask)], [(-1, 4)])
    assert image[0, :3, 4:].tolist() == [[5, 6], [9, 10], [13, 14]] and image[0].gt(0).sum() == 6
    for corner in ((-9, 2), (2, 9), (-4, 0), (0, 6)):
        image, visible = paste_objects(canvas, [(pixels, mask)], [corner])
        assert not image.any() and not visible.any(), "the object is entirely outside"


def test_object_has_the_outline_of_its_class():
    labels = torch.tensor([0, 0, 0, 8, 8, 0, 8, 0] * 4)  # discs and bars
    objects = shape_scenes.draw_objects(labels, 160, torch.Generator().manual_seed(0))
    for label, (pixels, mask) in zip(labels.tolist(), objects, strict=True):
        assert pixels.shape[1:] == mask.shape and mask[0].any() and mask[-1].any() and mask[:, 0].any()
        height, width = mask.shape
        assert (abs(float(mask.float().mean()) - math.pi / 4) < 0.04 and abs(height - width) <= 1) == (label == 0)
    assert len({mask.shape for _, mask in objects}) > 10


def test_holes_of_an_object_show_the_objects_behind_it():
    pixels, mask = make_square(6, 5)
    mask[1:5, 1:5] = False
    image, visible = paste_objects(
        torch.zeros(3, 10, 10, dtype=torch.uint8), [make_square(2, 1), (pixels, mask)], [(4, 4), (2, 2)]
    )
    assert image[0, 4:6, 4:6].eq(1).all() and image[0].eq(5).sum() == 20
    assert visible.flatten(1).sum(1).tolist() == [4, 20]


@pytest.mark.parametrize(("hidden", "difficult"), [(4, False), (5, False), (6, True), (8, True), (9, None), (10, None)])
def test_object_is_difficult_below_half_and_omitted_below_a_fifth(hidden, difficult):
    canvas = torch.zeros(3, 30, 30, dtype=torch.uint8)
    _, visible = paste_objects(canvas, [make_square(10, 1), make_square(20, 2)], [(2, 2), (0, 12 - hidden)])
    target = make_target(visible, torch.tensor([100, 400]), torch.tensor([1, 2]))
    assert target["difficult"].tolist() == [*([difficult] if difficult is not None else []), False]
    assert target["labels"].tolist() == ([1, 2] if difficult is not None else [2])


def test_scenes_depend_only_on_the_seed():
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
    assert few.sizes[0] != many.sizes[20] or not torch.equal(few.read(0), many.read(20)), (
        "the next chunk has another seed"
    )


def test_scenes_have_valid_images_and_targets():
    image_set = draw_scenes(100, size=64, num_classes=4)
    seen = torch.zeros(5, dtype=torch.int64)
    for index, target in enumerate(image_set.targets):
        image, (height, width) = image_set.read(index), image_set.sizes[index]
        assert image.shape == (3, height, width) and image.dtype == torch.uint8 and image.is_contiguous()
        assert 48 <= min(height, width) and max(height, width) <= 80
        x0, y0, x1, y1 = target["boxes"].unbind(1)
        assert 1 <= len(x0) <= 4 and target["boxes"].dtype == torch.float32
        assert (0 <= x0).all() and (x0 < x1).all() and (x1 <= width).all()
        assert (0 <= y0).all() and (y0 < y1).all() and (y1 <= height).all()
        seen += torch.bincount(target["labels"], minlength=5)
    assert seen[0] == 0 and seen[1:].min() > 20 and image_set.classes == ["disc", "square", "triangle", "star"]
    assert len(set(image_set.sizes)) > 80
    assert any(target["difficult"].any() for target in image_set.targets)
    assert any((target["boxes"][:, :2] == 0).any() for target in image_set.targets), "the border cuts off some objects"


def test_drawn_objects_fill_their_boxes_exactly(monkeypatch):
    calls, original = [], shape_scenes.paste_objects

    def recording_paste(canvas, objects, corners):
        calls.append((canvas, len(objects), *original(canvas, objects, corners)))
        return calls[-1][2:]

    monkeypatch.setattr(shape_scenes, "paste_objects", recording_paste)
    image_set = draw_scenes(shape_scenes.CHUNK_SIZE, size=96, seed=1)
    for index, (canvas, count, image, _) in enumerate(calls[-shape_scenes.CHUNK_SIZE :]):  # the distractors come before
        changed, boxes = (canvas != image).any(0), image_set.targets[index]["boxes"].int().tolist()
        assert torch.equal(image, image_set.read(index))
        for x0, y0, x1, y1 in boxes:
            inside = changed[y0:y1, x0:x1]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        for x0, y0, x1, y1 in boxes:
            changed[y0:y1, x0:x1] = False
        assert not changed.any() or len(boxes) < count, "only an omitted object may lie outside the boxes"


@pytest.mark.parametrize("arguments", [{"num_classes": 0}, {"num_classes": 11}, {"size": 31}])
def test_draw_scenes_rejects_invalid_arguments(arguments):
    with pytest.raises(ValueError, match="num_classes must be 1 to 10"):
        draw_scenes(1, **arguments)


# ---- Export ----


def test_exported_image_sets_are_read_back_unchanged(tmp_path):
    image_sets = {"trainval": draw_scenes(24, size=48, seed=2), "test": draw_scenes(3, size=48, seed=3)}
    image_sets["test"].targets[1] = {key: value[:0] for key, value in image_sets["test"].targets[1].items()}
    export_voc(tmp_path, image_sets)
    for name, image_set in image_sets.items():
        back = read_sets(tmp_path, [f"2007_{name}"])
        assert [Path(one).name for one in back.names] == [Path(one).name for one in image_set.names]
        assert back.classes == image_set.classes and back.sizes == image_set.sizes
        for index, (target, expected) in enumerate(zip(back.targets, image_set.targets, strict=True)):
            assert torch.equal(back.read(index), image_set.read(index))
            assert target.keys() == expected.keys()
            assert all(torch.equal(target[key], expected[key]) for key in target)
    assert any(target["difficult"].any() for target in image_sets["trainval"].targets)
    first = next((tmp_path / "VOCdevkit/VOC2007/Annotations").glob("2-00000.xml")).read_text()
    x0, _, x1, _ = image_sets["trainval"].targets[0]["boxes"][0].int().tolist()
    assert f"<xmin>{x0 + 1}</xmin>" in first and f"<xmax>{x1}</xmax>" in first


def test_export_rejects_an_existing_devkit_and_shared_images(tmp_path, devkit):
    image_set = draw_scenes(1, size=48)
    with pytest.raises(ValueError, match="same name"):
        export_voc(tmp_path / "new", {"train": image_set, "val": image_set})
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/VOCdevkit/VOC2007: Not a directory\nexport to another"):
        export_voc(tmp_path / "file", {"train": image_set})
    devkit.add("000001", make_xml())
    with pytest.raises(UserError, match="VOCdevkit already exists\n"):
        export_voc(tmp_path, {"train": image_set})


# ---- Real images ----


@pytest.mark.data
def test_real_images_match_their_files(real_data):
    train, test = load_image_sets(
        dataset="voc", data_dir=str(real_data), train_sets=["2007_trainval"], test_set="2007_test"
    )
    assert train.classes == CLASSES and (len(train), len(test)) == (120, 50)
    targets = train.targets + test.targets
    text = "".join(path.read_text() for path in sorted((real_data / "VOCdevkit/VOC2007/Annotations").glob("*.xml")))
    assert sum(len(target["labels"]) for target in targets) == text.count("<object>") == 583
    flags = re.findall(r"<difficult>([01])</difficult>", text)
    assert sum(int(target["difficult"].sum()) for target in targets) == flags.count("1") > 0
    assert all("do not compare" in line for image_set in (train, test) for line in image_set.warnings), (
        "no box is clipped or dropped"
    )
    for image_set in (train, test):
        for index in range(0, len(image_set), 10):
            expected = torch.from_numpy(np.array(Image.open(image_set.images[index]).convert("RGB"))).permute(2, 0, 1)
            difference = (image_set.read(index).int() - expected.int()).abs()  # the two decoders differ slightly
            assert difference.max() <= 3 and difference.float().mean() < 0.5
