"""Tests of loading evaluation images and of reading ground-truth boxes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from engine.data.annotation_files import BoxAnnotation
from engine.data.annotations import find_boxes
from engine.data.datasets import load_data, load_evaluation
from engine.data.decode import decode_into
from engine.data.image_set import ImageSet
from engine.data.resize_copies import find_copies
from engine.data.views import CenterCrop, SquashedView
from engine.errors import UserError

SIZE = (80, 48)  # width, height


def write_images(root: Path, names: list[str], size: tuple[int, int] = SIZE) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (20 * number, 0, 255 - 20 * number)).save(path, "PNG")


@pytest.fixture
def pets(tmp_path) -> ImageSet:
    """Four images: two have the same stem, and the stem of one contains a dot."""
    write_images(tmp_path / "val", ["cat/0.png", "cat/tom.2.png", "dog/0.png", "dog/rex.png"])
    return load_evaluation("folder", data_dir=str(tmp_path), image_size=32)


def format_xml(width, height, *objects: tuple) -> str:
    """Return an annotation in ImageNet's format. objects: name, xmin, ymin, xmax, ymax."""
    tags = "".join(
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n"
        f"\t\t\t<ymin>{y0}</ymin>\n\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for name, x0, y0, x1, y1 in objects
    )
    return (
        "<annotation>\n\t<folder>val</folder>\n\t<filename>sample</filename>\n\t<source>\n"
        "\t\t<database>ILSVRC_2012</database>\n\t</source>\n\t<size>\n"
        f"\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{tags}</annotation>\n"
    )


def write_text(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# ---- Evaluation images ----


def assert_same_image_set(one: ImageSet, other: ImageSet) -> None:
    assert (one.classes, one.labels.tolist(), one.origin) == (other.classes, other.labels.tolist(), other.origin)
    assert one.files.names() == other.files.names()


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("limit", [0, 3])
def test_load_evaluation_of_a_folder_needs_no_training_images(tmp_path, split, limit):
    names = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    write_images(tmp_path / split, names)
    alone = load_evaluation("folder", data_dir=str(tmp_path), image_size=32, limit=limit)
    write_images(tmp_path / "train", names)
    assert_same_image_set(alone, load_data("folder", data_dir=str(tmp_path), image_size=32, limit=limit).test)
    assert alone.pixels.view == CenterCrop(32, 32) and len(alone) == (limit or 4)


def test_data_dir_may_be_the_folder_of_the_class_folders(tmp_path):
    write_images(tmp_path / "val", ["cat/0.png", "dog/images/0.png"])
    below = load_evaluation("folder", data_dir=str(tmp_path))
    assert_same_image_set(below, load_evaluation("folder", data_dir=str(tmp_path / "val")))
    assert_same_image_set(below, load_evaluation("folder", data_dir="nowhere", val_data_dir=str(tmp_path / "val")))


def test_images_outside_class_folders_need_labels_and_are_never_a_class(tmp_path):
    write_images(tmp_path / "val", ["a.png", "b.png"])
    with pytest.raises(UserError, match=r"val has images outside class folders \(2\).*\n.*--val_labels"):
        load_evaluation("folder", data_dir=str(tmp_path))
    labels = write_text(tmp_path / "labels.txt", "a.png dog\nb.png cat\n")
    image_set = load_evaluation("folder", data_dir=str(tmp_path), val_labels=labels)
    assert image_set.files.names() == ["b.png", "a.png"] and image_set.classes == ["cat", "dog"]
    assert_same_image_set(image_set, load_evaluation("folder", data_dir=str(tmp_path / "val"), val_labels=labels))
    write_images(tmp_path / "test", ["cow/images/0.png"])
    assert_same_image_set(image_set, load_evaluation("folder", data_dir=str(tmp_path), val_labels=labels))
    assert load_evaluation("folder", data_dir=str(tmp_path)).classes == ["cow"], "class folders in test/ are found"


def test_missing_evaluation_images_error_lists_the_paths_tried(tmp_path):
    write_images(tmp_path / "train", ["cat/0.png"])
    with pytest.raises(UserError, match=rf"{tmp_path}/val, {tmp_path}/test, {tmp_path}\n.*--data_dir.*contains train"):
        load_evaluation("folder", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/tiny-imagenet-200/val.*\n.*--data_dir"):
        load_evaluation("tiny-imagenet", data_dir=str(tmp_path))


def test_imagenet_is_found_where_it_is_usually_unpacked(tmp_path):
    write_images(tmp_path / "ILSVRC/Data/CLS-LOC", ["val/n01/0.png", "val/n02/0.png", "train/n01/0.png"])
    image_set = load_evaluation("imagenet", data_dir=str(tmp_path), num_classes=2, view=SquashedView(20))
    assert image_set.classes == ["n01", "n02"] and image_set.pixels.view == SquashedView(20)
    with pytest.raises(UserError, match=r"imagenet has 1000 classes.*has 2\n.*--num_classes 2"):
        load_evaluation("imagenet", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="--num_classes 3"):
        load_evaluation("imagenet", data_dir=str(tmp_path), num_classes=3)


TINY = {"val_0.JPEG": ("n02", (0, 3, 63, 40)), "val_1.JPEG": ("n01", (5, 5, 5, 9)), "val_2.JPEG": ("n02", (1, 2, 3, 4))}


def write_tiny(root: Path, layout: str) -> None:
    """Write a small Tiny-ImageNet. layout: path of a validation image relative to val/, from wnid and file."""
    for file, (wnid, _) in TINY.items():
        write_images(root / "val", [layout.format(wnid=wnid, file=file)], (64, 64))
        write_images(root / "train", [f"{wnid}/images/{wnid}_{file}"], (64, 64))
    lines = ["\t".join([file, wnid, *map(str, box)]) for file, (wnid, box) in TINY.items()]
    write_text(root / "val" / "val_annotations.txt", "\n".join(lines) + "\n")


TINY_LAYOUTS = ["images/{file}", "images/{wnid}/{file}", "{wnid}/images/{file}", "{wnid}/{file}"]


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
@pytest.mark.parametrize("place", ["tiny-imagenet-200", "."])
def test_load_evaluation_of_tiny_imagenet_keeps_files(tmp_path, layout, place):
    write_tiny(tmp_path / place, layout)
    whole = load_data("tiny-imagenet", data_dir=str(tmp_path)).test
    (tmp_path / place / "train").rename(tmp_path / "elsewhere")
    alone = load_evaluation("tiny-imagenet", data_dir=str(tmp_path))
    assert_same_image_set(alone, whole)
    assert torch.equal(alone.pixels.read([0, 1, 2])[0], whole.pixels)


def test_tiny_imagenet_images_folder_read_as_a_class_raises(tmp_path):
    write_tiny(tmp_path, "images/{file}")
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"read as a class\n.*val_annotations.txt"):
        load_evaluation("tiny-imagenet", data_dir=str(tmp_path))


def test_load_evaluation_draws_only_the_test_shapes():
    drawn = []

    def progress(items, **kwargs):
        drawn.append(len(items))
        return items

    alone = load_evaluation("shapes", image_size=8, num_classes=3, limit=120, progress=progress)
    whole = load_data("shapes", image_size=8, num_classes=3, limit=120).test
    assert torch.equal(alone.pixels, whole.pixels) and torch.equal(alone.labels, whole.labels)
    assert all(torch.equal(alone.annotations[key], whole.annotations[key]) for key in ("boxes", "masks"))
    assert (alone.classes, alone.origin, drawn) == (whole.classes, whole.origin, [2]) and alone.files is None


def test_load_evaluation_of_cifar_reads_no_training_batch(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for number in range(1, 6):
        write_text(folder / f"data_batch_{number}", "never read")
    pixels = np.arange(2 * 3072, dtype=np.uint16).astype(np.uint8).reshape(2, 3072)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, protocol=2))
    image_set = load_evaluation("cifar10", data_dir=str(tmp_path))
    assert np.array_equal(image_set.pixels.permute(0, 3, 1, 2).flatten(1), pixels) and image_set.labels.tolist() == [
        3,
        1,
    ]
    assert load_evaluation("cifar10", data_dir=str(tmp_path), image_size=64).size == 64


# ---- Files of an image set, and the squashed view ----


def test_image_set_keeps_the_file_of_each_image(tmp_path):
    write_tiny(tmp_path, "images/{file}")
    bad = tmp_path / "val" / "images" / "val_1.JPEG"  # of class n01, so it is the first image
    bad.write_bytes(bad.read_bytes()[:40])
    image_set = load_evaluation("tiny-imagenet", data_dir=str(tmp_path))
    assert image_set.files.names() == ["images/val_1.JPEG", "images/val_0.JPEG", "images/val_2.JPEG"]
    assert image_set.take(torch.tensor([2, 0])).files.names() == ["images/val_2.JPEG", "images/val_1.JPEG"]
    assert image_set.with_view(SquashedView(8)).files.names() == image_set.files.names()
    decoded = load_data("tiny-imagenet", data_dir=str(tmp_path), on_bad_image="skip").test
    assert isinstance(decoded.pixels, torch.Tensor)
    assert decoded.files.names() == ["images/val_0.JPEG", "images/val_2.JPEG"], "the files that were read"


def test_copies_have_their_own_files(tmp_path):
    names = [
        "train/cat/0.png",
        "train/cat/1.png",
        "train/cat/2.png",
        "train/dog/0.png",
        "val/cat/0.png",
        "val/dog/0.png",
    ]
    write_images(tmp_path / "large", names)
    write_images(tmp_path / "small", names[1:])
    data = load_data("folder", data_dir=str(tmp_path / "large"), on_bad_image="skip")
    parts = find_copies(data, {"small": str(tmp_path / "small")})
    assert list(parts["small"].files) == [tmp_path / "small" / name for name in names[1:4]]
    assert list(parts["original"].files) == [tmp_path / "large" / name for name in names[1:4]]


@pytest.mark.parametrize("size", [(80, 48), (48, 80), (16, 300)])
def test_squashed_view_shows_every_corner(tmp_path, size):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    rows, columns = size[1] // 2, size[0] // 2
    pixels[:rows, :columns, 0] = pixels[:rows, columns:, 1] = pixels[rows:, :columns, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = np.empty((8, 8, 3), np.uint8)
    box = decode_into(out, tmp_path / "a.png", SquashedView(8), None)
    corners = [out[0, 0].tolist(), out[0, 7].tolist(), out[7, 0].tolist(), out[7, 7].tolist()]
    assert corners == [[200, 0, 0], [0, 200, 0], [0, 0, 200], [0, 0, 0]] and box == [0, 1, 0, 1]


# ---- XML ----


@pytest.mark.parametrize(  # recorded cases of the published code, which fails on the third one
    "category, size, objects, boxes",
    [
        ("n01440764", (500, 333), [("n01440764", 10, 20, 110, 220)], [(10, 20, 110, 220)]),
        (
            "n02102040",
            (240, 320),
            [("n02102040", 22, 186, 95, 273), ("n02102040", 132, 2, 209, 75)],
            [(22, 186, 95, 273), (132, 2, 209, 75)],
        ),
        ("n01440764", (300, 200), [("n01440764", 5, 6, 70, 80), ("n02102040", 90, 10, 200, 100)], [(5, 6, 70, 80)]),
    ],
)
def test_xml_is_read_as_by_the_published_code(tmp_path, category, size, objects, boxes):
    write_images(tmp_path, [f"val/{category}/sample.png"])
    image_set = load_evaluation("folder", data_dir=str(tmp_path))
    write_text(tmp_path / "ann" / "sample.xml", format_xml(*size, *objects))
    annotations = find_boxes(image_set, "folder", str(tmp_path / "ann"))
    assert (
        annotations.per_image == [BoxAnnotation(boxes, *size)] and not annotations.notes() and annotations.masks is None
    )


@pytest.mark.parametrize("named", ["./ann", "../data/ann", "ann.d/v1.0"])
def test_annotation_path_may_contain_dots(tmp_path, pets, monkeypatch, named):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    write_text(Path(named) / "tom.2.xml", format_xml(80, 48, ("cat", 1, 2, 3, 4)))
    assert find_boxes(pets, "folder", named).per_image == [None, BoxAnnotation([(1, 2, 3, 4)], 80, 48), None, None]


def test_xml_in_a_class_folder_takes_precedence(tmp_path, pets):
    write_text(tmp_path / "ann" / "0.xml", format_xml(80, 48, ("dog", 1, 1, 2, 2), ("cat", 5, 5, 6, 6)))
    write_text(tmp_path / "ann" / "cat" / "0.xml", format_xml(80, 48, ("cat", 3, 3, 4, 4)))
    each = find_boxes(pets, "folder", str(tmp_path / "ann")).per_image
    assert [annotation and annotation.boxes for annotation in each] == [[(3, 3, 4, 4)], None, [(1, 1, 2, 2)], None]


def test_missing_empty_and_broken_annotations_are_counted_separately(tmp_path):
    write_images(tmp_path / "val", [f"cat/{number}.png" for number in range(10)])
    image_set = load_evaluation("folder", data_dir=str(tmp_path))
    texts = {
        0: format_xml(80, 48, ("cat", 1, 2, 3, 4)),
        2: format_xml(80, 48, ("dog", 1, 2, 3, 4), ("bird", 1, 2, 3, 4), ("dog", 5, 6, 7, 8)),
        3: format_xml(80, 48),
        4: format_xml(80, 48, ("cat", 5, 5, 5, 9), ("cat", 5, 5, 9, 5)),
        5: format_xml(80, 48, ("cat", 1, 2, 3, 4))[:-20],
        6: format_xml(0, 48, ("cat", 1, 2, 3, 4)),
        7: format_xml(80, 48, ("cat", 1, 2, "far", 4)),
        8: "<annotation/>",
        9: '<?xml version="1.0" encoding="klingon"?><annotation/>',
    }
    for number, text in texts.items():
        write_text(tmp_path / "ann" / f"{number}.xml", text)
    annotations = find_boxes(image_set, "folder", str(tmp_path / "ann"))
    assert annotations.per_image == [BoxAnnotation([(1, 2, 3, 4)], 80, 48)] + [None] * 9
    assert annotations.missing == ["cat/1.png"] and annotations.empty == ["cat/3.png", "cat/4.png"]
    reasons = ["not valid XML", "size is 0 x 48", "'far'", "no <size/width> in <annotation>", "klingon"]
    for number, (line, reason) in enumerate(zip(annotations.broken, reasons, strict=True), 5):
        assert line.startswith(f"cat/{number}.png (") and reason in line
    missing, empty, renamed, broken = annotations.notes()
    assert missing.startswith("1 of 10 images left out of the scores (no annotation)") and missing.endswith(
        ": cat/1.png"
    )
    assert empty.startswith("2 of 10") and empty.endswith(": cat/3.png; cat/4.png")
    assert renamed.startswith("1 of 10") and "use the names of the class folders" in renamed
    assert renamed.endswith(": cat/2.png (found dog, bird, expected cat)")
    assert broken.startswith("5 of 10") and "cat/7.png" in broken and "cat/8.png" not in broken


def test_xml_numbers_may_have_spaces_and_fractions(tmp_path, pets):
    write_text(tmp_path / "ann" / "rex.xml", format_xml(" 80 ", "48.0", (" dog\n", " 10 ", "10.0", "30.6", "\n31 ")))
    assert find_boxes(pets, "folder", str(tmp_path / "ann")).per_image[3] == BoxAnnotation([(10, 10, 31, 31)], 80, 48)


@pytest.mark.parametrize(
    ("orientation", "size", "kept"),
    [(1, SIZE, True), (6, SIZE[::-1], True), (6, SIZE, False), (6, None, False), (3, SIZE, False)],
)
def test_boxes_of_a_turned_image_are_used_only_if_their_size_is_the_upright_one(tmp_path, orientation, size, kept):
    exif = Image.Exif()
    exif[0x112] = orientation
    file = tmp_path / "val" / "cat" / "0.jpg"
    file.parent.mkdir(parents=True)
    Image.new("RGB", SIZE).save(file, exif=exif)
    image_set = load_evaluation("folder", data_dir=str(tmp_path))
    path = write_text(tmp_path / "boxes.csv", "file,xmin,ymin,xmax,ymax\n0.jpg,1,2,3,4\n")
    if size:
        write_text(tmp_path / "ann" / "0.xml", format_xml(*size, ("cat", 1, 2, 3, 4)))
        path = str(tmp_path / "ann")
    annotations = find_boxes(image_set, "folder", path)
    assert [annotation is not None for annotation in annotations.per_image] == [kept]
    assert kept or f"EXIF orientation {orientation}, and the boxes may" in annotations.notes()[0]
    with Image.open(file) as image:  # the remedy
        ImageOps.exif_transpose(image).save(tmp_path / "val" / "cat" / "0.jpg")
    assert not find_boxes(image_set, "folder", path).notes()


def test_folder_of_unrelated_annotations_raises_and_names_the_first_candidate(tmp_path, pets):
    write_text(tmp_path / "ann" / "val" / "0.xml", format_xml(80, 48, ("cat", 1, 2, 3, 4)))
    with pytest.raises(UserError, match=r"any of the 4 images.*ann/cat/0\.xml and .*ann/0\.xml\n--annotation-path"):
        find_boxes(pets, "folder", str(tmp_path / "ann"))


# ---- CSV and JSON ----


def test_csv_may_list_several_boxes_per_image_and_other_classes_are_skipped(tmp_path, pets):
    path = write_text(
        tmp_path / "boxes.csv",
        "file, WNID ,xmin,ymin,xmax,ymax,width,height\n"
        "cat/0.png,cat,1,2,3,4,500,375\n\n"
        "./cat/0.png,cat,24.74,49.0,151.82,219.2,500,375\n"
        "cat/0.png,dog,7,7,9,9,500,375\n"
        "dog\\0.png,,5,6,7,8,,\n"
        "dog/rex.png,cat,5,6,7,8,9,9\n"
        "other/0.png,cat,1,1,2,2,9,9\n",
    )
    annotations = find_boxes(pets, "folder", path)
    first, second = BoxAnnotation([(1, 2, 3, 4), (25, 49, 152, 219)], 500, 375), BoxAnnotation([(5, 6, 7, 8)], *SIZE)
    assert annotations.per_image == [first, None, second, None]
    assert (annotations.missing, annotations.empty) == (["cat/tom.2.png"], [])
    assert annotations.renamed == ["dog/rex.png (found cat, expected dog)"]


def test_csv_of_base_names_works_where_they_are_unique(tmp_path, pets):
    text = "file,x0,y0,x1,y1\nval/rex.png,1,2,3,4\n0.png,5,6,7,8\na/tom.2.png,1,1,2,2\nb/tom.2.png,3,3,4,4\n"
    annotations = find_boxes(pets, "folder", write_text(tmp_path / "boxes.csv", text))
    assert annotations.per_image == [None, None, None, BoxAnnotation([(1, 2, 3, 4)], *SIZE)], (
        "0.png and tom.2.png are ambiguous"
    )
    assert annotations.missing == ["cat/0.png", "cat/tom.2.png", "dog/0.png"]
    few = pets.take(torch.tensor([0]))  # 0.png is unique in the set, but not in the list below
    path = write_text(tmp_path / "all.csv", "file,x0,y0,x1,y1\ndog/0.png,5,6,7,8\nval/0.png,1,1,2,2\n")
    with pytest.raises(UserError, match="any of the 1 images"):
        find_boxes(few, "folder", path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"header is missing"),
        ("name,xmin,ymin,xmax,ymax\n", r"header is name,xmin"),
        (
            "file,xmin,ymin,xmax,ymax\ncat/0.png,1,2,3,4\ncat/0.png,1,2,x,4\n",
            r"line 3: 'cat/0.png,1,2,x,4'.*\nfix that line",
        ),
        ("file,xmin,ymin,xmax,ymax\ncat/0.png,1,2,3\n", r"line 2"),
        ("file,xmin,ymin,xmax,ymax\n,1,2,3,4\n", r"line 2: .* \(it names no file\)"),
        ("file,xmin,ymin,xmax,ymax\ncat/9.png,1,2,3,4\n", r"any of the 4.*cat/0.png \(.*cat/9.png\)"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, pets, text, message):
    with pytest.raises(UserError, match=message):
        find_boxes(pets, "folder", write_text(tmp_path / "boxes.csv", text))


def test_csv_row_without_numbers_means_no_box(tmp_path, pets):
    path = write_text(tmp_path / "boxes.csv", "file,xmin,ymin,xmax,ymax\ncat/0.png,,,,\ndog/0.png,1,2,3,4\n")
    assert find_boxes(pets, "folder", path).empty == ["cat/0.png"]


def test_image_that_cannot_be_read_is_not_told_as_a_broken_annotation(tmp_path, pets):
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"no image")
    path = write_text(tmp_path / "boxes.csv", "file,xmin,ymin,xmax,ymax\ncat/0.png,1,2,3,4\ndog/0.png,1,2,3,4\n")
    annotations = find_boxes(pets, "folder", path)
    assert annotations.per_image[0].boxes == [(1, 2, 3, 4)] and annotations.per_image[2].width == 80
    assert not annotations.broken  # whoever reads the image stops, or leaves it out and counts it


def test_json_of_boxes_is_read(tmp_path, pets):
    content = {"cat/0.png": [[1, 2, 3, 4], [5.0, 6, 7, 8]], "dog/0.png": [], "rex.png": [[0, 0, 80, 48], [4, 4, 3, 9]]}
    annotations = find_boxes(pets, "folder", write_text(tmp_path / "boxes.json", json.dumps(content)))
    expected = [BoxAnnotation([(1, 2, 3, 4), (5, 6, 7, 8)], *SIZE), None, None, BoxAnnotation([(0, 0, 80, 48)], *SIZE)]
    assert annotations.per_image == expected
    assert (annotations.missing, annotations.empty) == (["cat/tom.2.png"], ["dog/0.png"])


@pytest.mark.parametrize("text", ["[1, 2]", '{"cat/0.png": [1, 2, 3, 4]}', '{"cat/0.png": [[1, 2, 3]]}', "{", "\0"])
def test_json_errors_name_the_file(tmp_path, pets, text):
    with pytest.raises(UserError, match=r"boxes\.json.*\n--annotation-path takes"):
        find_boxes(pets, "folder", write_text(tmp_path / "boxes.json", text))


def test_invalid_annotation_paths_raise(tmp_path, pets):
    with pytest.raises(UserError, match=r"gone: no such file or folder\n.*takes a folder of XML"):
        find_boxes(pets, "folder", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"boxes\.txt: not a folder, a \.csv or a \.json"):
        find_boxes(pets, "folder", write_text(tmp_path / "boxes.txt", ""))
    for dataset in ("folder", "imagenet"):
        with pytest.raises(UserError, match=rf"{dataset} comes without ground-truth boxes.*-path\n.*XML.*csv.*json"):
            find_boxes(pets, dataset)


# ---- Boxes that belong to a data set ----


def test_shapes_have_boxes_and_masks(tmp_path):
    image_set = load_evaluation("shapes", image_size=24, limit=5)
    annotations = find_boxes(image_set, "shapes")
    assert torch.equal(annotations.masks, image_set.annotations["masks"]) and not annotations.notes()
    for mask, (boxes, width, height, _) in zip(annotations.masks, annotations.per_image, strict=True):
        ((x0, y0, x1, y1),) = boxes
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0 and (width, height) == (24, 24)
        assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
    with pytest.raises(UserError, match=r"shapes has no image files.*\nleave out --annotation-path"):
        find_boxes(image_set, "shapes", str(tmp_path))
    with pytest.raises(UserError, match="cifar10 has no image files"):
        find_boxes(image_set, "cifar10")


@pytest.mark.parametrize("layout", TINY_LAYOUTS)
def test_tiny_imagenet_has_inclusive_boxes(tmp_path, layout):
    write_tiny(tmp_path, layout)
    image_set = load_evaluation("tiny-imagenet", data_dir=str(tmp_path))
    annotations = find_boxes(image_set, "tiny-imagenet")
    by_name = {
        Path(name).name: annotation
        for name, annotation in zip(image_set.files.names(), annotations.per_image, strict=True)
    }
    boxes = {"val_0.JPEG": (0, 3, 64, 41), "val_1.JPEG": (5, 5, 6, 10), "val_2.JPEG": (1, 2, 4, 5)}
    assert by_name == {name: BoxAnnotation([box], 64, 64) for name, box in boxes.items()}


@pytest.mark.parametrize("separator", ["\t", " "])
def test_tiny_imagenet_boxes_may_have_a_byte_order_mark_and_spaces(tmp_path, separator):
    write_tiny(tmp_path, "images/{file}")
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_bytes(("\ufeff" + path.read_text().replace("\t", separator).replace("\n", "\r\n")).encode())
    annotations = find_boxes(load_evaluation("tiny-imagenet", data_dir=str(tmp_path)), "tiny-imagenet")
    assert len(annotations.per_image) == 3 and not annotations.notes()


def test_tiny_imagenet_boxes_of_other_classes_are_not_used(tmp_path):
    write_tiny(tmp_path, "{wnid}/{file}")
    write_text(tmp_path / "val" / "val_annotations.txt", "val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    annotations = find_boxes(load_evaluation("tiny-imagenet", data_dir=str(tmp_path)), "tiny-imagenet")
    assert annotations.per_image == [BoxAnnotation([(0, 0, 10, 10)], 64, 64), None, None]
    assert (annotations.missing, annotations.empty) == (["n02/val_2.JPEG"], [])
    assert annotations.renamed == ["n02/val_0.JPEG (found n01, expected n02)"]


def test_tiny_imagenet_training_boxes_are_read_from_the_class_folders(tmp_path):
    write_tiny(tmp_path, "images/{file}")
    write_text(tmp_path / "train" / "n01" / "n01_boxes.txt", "n01_val_1.JPEG\t0\t1\t62\t63\n")
    train = load_data("tiny-imagenet", data_dir=str(tmp_path)).train
    annotations = find_boxes(train, "tiny-imagenet")
    assert (
        annotations.per_image == [BoxAnnotation([(0, 1, 63, 64)], 64, 64), None, None] and len(annotations.missing) == 2
    )


def test_missing_and_broken_tiny_imagenet_lists_raise(tmp_path):
    write_tiny(tmp_path, "{wnid}/{file}")
    image_set = load_evaluation("tiny-imagenet", data_dir=str(tmp_path))
    path = tmp_path / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\n")
    with pytest.raises(UserError, match=r"val_annotations.txt, line 2: .*file wnid x0 y0 x1 y1.*\nfix that line"):
        find_boxes(image_set, "tiny-imagenet")
    path.unlink()
    with pytest.raises(UserError, match=r"any of the 3 images.*val_annotations.txt.*n01_boxes.txt\n--annotation-path"):
        find_boxes(image_set, "tiny-imagenet")


# ---- Real data ----


@pytest.mark.data
@pytest.mark.parametrize("name, size", [("boxes_227.csv", (227, 227)), ("boxes_original.csv", (500, 375))])
def test_real_imagenet_boxes(real_data, name, size):
    root = real_data / "ilsvrc_val_227"
    image_set = load_evaluation("folder", data_dir=str(root), view=SquashedView(224))
    annotations = find_boxes(image_set, "folder", str(root / name))
    assert (
        len(annotations.per_image) == 300
        and sum(len(annotation.boxes) for annotation in annotations.per_image) == 492
        and not annotations.notes()
    )
    assert annotations.per_image[0][1:] == size


@pytest.mark.data
def test_real_tiny_imagenet_boxes(real_data):
    annotations = find_boxes(load_evaluation("tiny-imagenet", data_dir=str(real_data)), "tiny-imagenet")
    assert sum(len(annotation.boxes) for annotation in annotations.per_image) == 1000 and not annotations.notes()
