"""cam.py, as a user calls it on pictures of all kinds."""

import importlib
import struct
import sys
import types
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import get_model

import cam
from engine.data.class_names import find_class, read_titles
from engine.data.decode import BadImage
from engine.data.views import CenterCrop, SquashedView
from engine.drawing import figures
from engine.errors import UserError
from engine.inference.classifier import Classifier
from explanation import explainer, images

RED, BLUE = (200, 40, 20), (10, 30, 220)


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> str:
    """torchvision's squeezenet1_1 with random weights: its classes have ImageNet's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), path)
    return f"squeezenet1_1={path}"


class Bright(nn.Module):
    """Class 0 is seen where it is bright, class 1 where it is dark; class 2 nowhere, class 3 less than class 0."""

    def __init__(self, average: bool = True, scale: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 8, stride=8, bias=False)
        nn.init.constant_(self.conv.weight, scale)
        self.pool, self.linear = (
            nn.AdaptiveAvgPool2d(1 if average else 2),
            nn.Linear(1 if average else 4, 4, bias=False),
        )
        self.linear.weight.data = torch.tensor([[1.0], [-1.0], [0.0], [0.5]]).expand_as(self.linear.weight).clone()

    def forward(self, images):
        return self.linear(self.pool(self.conv(images)).flatten(1))


@pytest.fixture
def toy(monkeypatch):
    """A function that makes every --model_path mean a Bright for images of `size` pixels."""

    def use(size: int = 64, titles: tuple[str, ...] = (), **settings) -> None:
        network = Bright(**settings).eval()
        made = lambda word, zoo, **_: Classifier(  # noqa: E731
            word, network, (0.0,) * 3, (1.0,) * 3, count=4, image_size=size, titles=list(titles)
        )
        monkeypatch.setattr("engine.inference.classifier.load_classifier", made)

    return use


@pytest.fixture
def photo(tmp_path) -> str:
    """Dark noise of 160 x 240 with a bright square in rows 80..100, columns 60..80."""
    values = np.random.RandomState(0).randint(0, 60, (160, 240, 3)).astype(np.uint8)
    values[80:100, 60:80] = 250
    Image.fromarray(values).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def many(root: Path, names: list[str], size=(20, 16)) -> list[str]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, RED).save(root / name)
    return [str(root / name) for name in names]


# the map lies on the part of the picture that the classifier sees


@pytest.mark.parametrize(
    ("resize", "box"),
    [
        ("keep", (10, 150, 50, 190)),  # 160 x 240 stays so, and 140 x 140 of it are seen
        ("square", (10, 150, 15, 225)),  # 160 x 160, of which 140 x 140 are seen
        ("whole", (0, 160, 0, 240)),
    ],
)
def test_the_map_lies_on_the_crop_and_nothing_outside_is_touched(toy, photo, tmp_path, resize, box):
    toy(140)
    words = ["--image_path", photo, "--model_path", "a", "--resize", resize, "--raw", "--target_class", "0", "1"]
    bright, dark = cam.main([*words, "-o", str(tmp_path / "out"), "--alpha", "0.3", "--colormap", "viridis"])
    y1, y2, x1, x2 = box
    outside = np.ones((160, 240), bool)
    outside[y1:y2, x1:x2] = False
    before, drawn, heat = pixels(photo), pixels(bright["output"]), np.load(bright["raw"])
    assert heat.shape == (160, 240) and heat.dtype == np.float32 and not heat[outside].any()
    assert np.array_equal(drawn[outside], before[outside])
    assert heat[y1:y2, x1:x2].min() == 0 and heat.max() == 1
    colours = np.array(matplotlib.colormaps["viridis"](heat))[..., :3] * 255
    expected = np.where(outside[..., None], before, 0.7 * before + 0.3 * colours)
    assert np.abs(drawn - expected).max() < 2, "what --raw holds is what is drawn"
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert 76 <= peak[0] < 104 and 52 <= peak[1] < 88, "the bright square, give or take a cell of the map"
    assert np.load(dark["raw"])[90, 70] < 0.2 and np.load(dark["raw"]).max() == 1


@pytest.mark.parametrize("view", [CenterCrop(64, 80), SquashedView(64, 80), SquashedView(64, 64), CenterCrop(32, 32)])
@pytest.mark.parametrize("size", [(90, 200), (240, 130), (40, 30), (1, 7), (100, 1)])
def test_what_is_seen_is_what_lies_in_the_box(view, size):
    height, width = size
    slope = np.zeros((height, width, 3), np.uint8)
    slope[..., 0], slope[..., 1] = np.arange(height)[:, None], np.arange(width)  # each pixel says where it is
    seen, (y1, y2, x1, x2) = explainer.crop_for_model(slope, view)
    assert seen.shape == (view.size, view.size, 3) and 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
    for channel, (begin, end) in enumerate([(y1, y2), (x1, x2)]):
        places = begin + (np.arange(view.size) + 0.5) * (end - begin) / view.size - 0.5
        found = seen[..., channel].mean(1 - channel)
        assert np.abs(found - places)[3:-3].max() < 1.2  # of pixels; the box is rounded, and so are values


def test_a_constant_map_is_zero_and_the_picture_keeps_its_own_place(toy, photo, tmp_path):
    toy()
    words = ["--image_path", photo, "--model_path", "a", "--target_class", "2", "--raw", "--method", "cam", "gradcam"]
    for row in cam.main([*words, "-o", str(tmp_path / "out")]):
        assert not np.load(row["raw"]).any()
    assert cam.main([*words[:4], "-o", str(tmp_path / "out" / "one.png"), "--alpha", "0"])[0]["output"].endswith(
        "one.png"
    )
    assert np.array_equal(pixels(tmp_path / "out" / "one.png"), pixels(photo)), "alpha 0 shows the picture alone"


def test_trained_masks_are_drawn_as_they_are(casm_file, photo, tmp_path, capsys):
    from saliency.casm.network import load_casm

    words = [
        "--image_path",
        photo,
        "--casm",
        casm_file,
        "--raw",
        "-o",
        str(tmp_path),
        "--target_class",
        "1",
        "--batch_size",
        "4",
    ]
    (row,) = cam.main(words)
    saved = load_casm(casm_file)
    crop = torch.from_numpy(explainer.crop_for_model(pixels(photo), CenterCrop(32, 32))[0]).permute(2, 0, 1) / 255
    with torch.no_grad():
        mask = saved.network.masks(((crop - 0.5) / 0.25)[None])[0, 0]
    heat = np.load(row["raw"])[:, 40:200]
    assert row["method"] == "casm" and row["predicted"] in saved.classes
    expected = torch.nn.functional.interpolate(mask[None, None], (160, 160), mode="bilinear")[0, 0]
    torch.testing.assert_close(torch.from_numpy(heat), expected)  # not stretched
    said = capsys.readouterr().out
    assert (
        "note: without effect on casm: --batch_size, --target_class" in said
        and "  casm  " in said
        and " of " not in said
    )


# figures, names and places


def test_a_figure_has_a_row_an_image_and_a_column_a_model_and_method(
    net, casm_file, tmp_path, monkeypatch, capsys, recwarn
):
    drawn, inner = [], figures.draw_comparison
    monkeypatch.setattr(figures, "draw_comparison", lambda path, **given: (drawn.append(given), inner(path, **given)))
    files = many(tmp_path, ["a b.png", "$\\frac$ \u65e5\u672c.png"], (90, 40)) + many(tmp_path, ["c.png"], (20, 130))
    words = ["--image_path", *files, "--model_path", net, casm_file, "--image_size", "64", "--casm", casm_file]
    words += ["--method", "cam", "layercam", "--target_class", "top2", "--figure", str(tmp_path / "figs" / "all.png")]
    rows = cam.main([*words, "-o", str(tmp_path / "out")])
    (given,) = drawn
    columns = [f"{model}\n{method}" for model in ("squeezenet1_1", "random") for method in ("cam", "layercam")]
    assert given["columns"] == [name for name in columns for _ in range(2)] + ["random\ncasm"]
    assert given["names"] == [Path(file).name for file in files] and len(rows) == 3 * 9
    assert [row["image"] for row in rows] == [file for file in files for _ in range(9)]
    assert all(len(line) == len(texts) == 9 for line, texts in zip(given["overlays"], given["texts"], strict=True))
    width, height = Image.open(tmp_path / "figs" / "all.png").size
    assert width > 10 * 200 and height > 3 * 100
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    assert len({row["output"] for row in rows}) == 27
    said = capsys.readouterr().out
    for row in rows:
        assert Image.open(row["output"]).size == Image.open(row["image"]).size
        assert f"{row['predicted']} {row['predicted_probability']:.1%}" in said and row["output"] in said
    for first, second in zip(rows[0:4:2], rows[1:4:2], strict=True):  # top2 of the first model, by each method
        assert first["target_probability"] == first["predicted_probability"] >= second["target_probability"]


def test_each_picture_has_its_place_in_a_figure(tmp_path):
    colours = np.random.RandomState(0).randint(0, 200, (2, 3, 3))
    shapes = [(40, 40), (20, 80)]
    cells = [[np.full((*shape, 3), one, np.uint8) for one in row] for shape, row in zip(shapes, colours, strict=True)]
    known = {"pictures": [row[0] for row in cells], "overlays": [row[1:] for row in cells]}
    figures.draw_comparison(tmp_path / "a.png", names=["a", "b"], columns=["x", "y"], texts=[["1", "2"]] * 2, **known)
    drawn = pixels(tmp_path / "a.png")[..., :3]
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            ys, xs = np.nonzero((drawn == colour).all(2))
            (height, width), left = shapes[row], 110 * (0.08 + 2.18 * column)
            assert abs(xs.min() - left) < 3 and abs(xs.max() - left - 231) < 3, "the whole width of its column"
            assert abs(ys.max() - ys.min() - 231 * height / width) < 4 and len(ys) > 0.9 * 231**2 * height / width
            top = 110 * (0.3 + row * (2.1 + 0.3))
            assert abs(ys.min() - top) < 3, "below the row before and its text"


def test_a_long_figure_stays_below_what_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAX_PIXELS", 400)
    picture = np.zeros((50, 1, 3), np.uint8)
    known = {"pictures": [picture] * 5, "overlays": [[picture]] * 5, "texts": [["x" * 90]] * 5}
    figures.draw_comparison(
        tmp_path / "a.png", names=["\udcff.png"] * 5, columns=["model\nof a very long name" * 3], **known
    )
    assert 300 < max(Image.open(tmp_path / "a.png").size) <= 400


def test_no_two_outputs_share_a_name(toy, tmp_path, capsys):
    toy(titles=("Crane", "crane", "a" * 300, "\u65e5" * 300))
    files = many(tmp_path, ["a/x.png", "b/x.png", "a/x.jpg", "z.png", "\u65e5" * 70 + "1.png", "\u65e5" * 70 + "2.png"])
    words = ["--image_path", *files, "--model_path", "m" * 200, "--target_class", "0", "1", "2", "3"]
    rows = cam.main([*words, "-o", str(tmp_path / "out"), "--raw"])
    outputs = {Path(row["output"]).name.lower() for row in rows}
    assert len(outputs) == 6 * 4, "one a picture and class"
    assert len(list((tmp_path / "out").iterdir())) == 2 * 6 * 4, "and its map, and nothing half-written"
    assert images.unique_stems([Path(file) for file in files[:4]]) == ["a_x.png", "b_x.png", "x.jpg", "z"]
    capsys.readouterr()


def test_pictures_are_found_once_and_in_order(tmp_path):
    many(tmp_path, ["b/2.png", "b/1.jpg", "b/.hidden.png", "b/deep/3.png", "[x]*.png"])
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    (tmp_path / "b" / "folder.png").mkdir()
    found = images.find_images([str(tmp_path / word) for word in ("b/2.png", "b", "*/*/*.png", "[x]*.png")])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["b/2.png", "b/1.jpg", "b/deep/3.png", "[x]*.png"]


# pictures as people have them


def sixteen_bits(path, values: np.ndarray, colours: int) -> None:
    """A .png of 16 bits: big-endian values (H, W) or (H, W, 3)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def odd_pictures(root: Path) -> dict[str, tuple[int, int, int]]:
    """Writes pictures of 12 x 6 that are RED on the left and BLUE on the right, or grey; file -> colour on the left."""
    plain = np.full((6, 12, 3), BLUE, np.uint8)
    plain[:, :6] = RED
    image, grey = Image.fromarray(plain), plain.mean(2)
    clear = Image.fromarray(np.dstack([plain, np.where(np.arange(12) < 6, 0, 255) * np.ones((6, 1))]).astype(np.uint8))
    left = int(grey[0, 0])
    exif = Image.Exif()
    exif[0x112] = 6
    big = {"quality": 100, "subsampling": 0}
    image.convert("L").save(root / "grey.png")
    clear.save(root / "rgba.png")
    clear.convert("LA").save(root / "la.png")
    clear.save(root / "clear.gif")
    image.quantize(4).save(root / "palette.png")
    image.convert("CMYK").save(root / "cmyk.jpg", **big)
    image.rotate(90, expand=True).save(root / "exif.jpg", exif=exif, **big)
    turned = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # and before it a tag of an impossible type
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x40\0\x02\0\0\0\x06\0\0\0\x26" + turned + b"\0\0\0\0hello\0"
    image.rotate(90, expand=True).save(root / "damaged_exif.jpg", exif=damaged, **big)
    image.save(root / "no_exif.jpg", exif=b"Exif\0\0" + b"\xff" * 20, **big)
    for ending in ("gif", "png", "webp", "tif"):
        image.save(root / f"frames.{ending}", save_all=True, append_images=[Image.new("RGB", (12, 6))], lossless=True)
    sixteen_bits(root / "rgb16.png", plain.astype(np.uint16) * 257, 2)
    sixteen_bits(root / "grey16.png", (grey * 257).astype(np.uint16), 0)
    Image.fromarray((grey * 257).astype(np.int32)).save(root / "grey32.tif")
    Image.fromarray((grey / 255).astype(np.float32)).save(root / "float.tif")
    Image.fromarray(grey.astype(np.float32)).save(root / "float255.tif")
    luma = int(image.convert("L").getpixel((0, 0)))
    special = {"grey.png": (luma,) * 3, "rgba.png": (255,) * 3, "la.png": (255,) * 3, "clear.gif": (255,) * 3}
    special |= {name: (left,) * 3 for name in ("grey16.png", "grey32.tif", "float.tif", "float255.tif")}
    return {file.name: special.get(file.name, RED) for file in root.iterdir()}


def test_pictures_of_every_kind_are_opened_as_they_are_looked_at(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # above which Pillow warns, and refuses the double
    expected = odd_pictures(tmp_path)
    assert len(expected) == 18
    for name, colour in expected.items():
        picture = images.open_image(tmp_path / name)
        assert picture.dtype == np.uint8 and picture.shape == (6, 12, 3), name
        assert np.abs(picture[3, 1].astype(int) - colour).max() <= 4, f"{name}: {picture[3, 1]}"
    assert not recwarn.list


@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x112] = value
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(6, 4, 3))
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(images.open_image(tmp_path / "turned.png"), upright)


def test_odd_shapes_are_drawn(net, tmp_path):
    sizes = [(1, 1), (1, 400), (400, 1), (2000, 7)]
    files = [many(tmp_path, [f"{number}.png"], size)[0] for number, size in enumerate(sizes)]
    words = ["--image_path", *files, "--model_path", net, "--image_size", "64", "--figure", str(tmp_path / "f.png")]
    rows = cam.main([*words, "-o", str(tmp_path / "out"), "--raw"])
    assert [Image.open(row["output"]).size for row in rows] == sizes and all(
        np.load(row["raw"]).any() for row in rows[3:]
    )


@pytest.fixture
def bad(tmp_path) -> list[str]:
    """Five files that are no pictures to be shown: empty, cut short (two), text, and of more pixels than is safe."""
    folder = tmp_path / "bad"
    folder.mkdir()
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8))
    for ending in ("jpg", "png"):
        noise.save(folder / f"whole.{ending}")
        raw = (folder / f"whole.{ending}").read_bytes()
        (folder / f"whole.{ending}").unlink()
        (folder / f"cut.{ending}").write_bytes(raw[: len(raw) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    bomb = bytearray((Path(many(tmp_path, ["small.png"])[0])).read_bytes())
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (folder / "huge.png").write_bytes(bomb)
    return sorted(map(str, folder.iterdir()))


def test_a_file_that_cannot_be_read_stops_or_is_left_out(toy, bad, photo, tmp_path, capsys):
    toy()
    for file, reason in zip(bad, ["truncated", "truncated", "file is empty", "too large", "not an image"], strict=True):
        with pytest.raises(BadImage, match=f"{Path(file).name}: .*{reason}"):
            images.open_image(Path(file))
    words = ["--image_path", *bad, photo, "--model_path", "a", "-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"cut\.jpg: .*\n.*--on_bad_image skip"):
        cam.main(words)
    assert not (tmp_path / "out").exists()
    (row,) = cam.main([*words, "--on_bad_image", "skip", "--figure", str(tmp_path / "f.png")])
    assert row["image"] == photo and capsys.readouterr().out.count("note: left out: ") == len(bad)
    with pytest.raises(UserError, match="none of the 5 pictures"):
        cam.main(["--image_path", *bad, "--model_path", "a", "--on_bad_image", "skip"])


def test_few_pixels_are_held_at_a_time():
    drawn = []

    def source():
        for side in (10, 10, 10, 30, 30, 30, 1):
            drawn.append(side)
            yield Path("a"), np.zeros((side, side, 3), np.uint8)

    sizes = []
    for group in images.chunk(source(), most=2, pixels=1000):
        sizes.append([len(picture) for _, picture in group])
        assert len(drawn) <= sum(map(len, sizes)) + 1, "read ahead by one at most"
    assert sizes == [[10, 10], [10, 30], [30], [30, 1]]


# classes


TITLES = [
    "tench",
    "tiger shark",
    "white shark",
    "Cardigan",
    "cardigan",
    "crane, bird",
    "crane",
    "dog, puppy",
    "puppy dog",
]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("0", 0),
        ("tench", 0),
        ("TENCH", 0),
        ("tiger_shark", 1),
        ("tig", 1),
        ("Cardigan", 3),
        ("cardigan", 4),
        ("crane", 6),
        ("CRANE", 6),
        ("bird", 5),
        ("puppy", 7),
    ],
)
def test_a_class_is_told_by_its_index_or_name(word, found):
    assert find_class(word, TITLES, len(TITLES)) == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("9", "0 to 8"),
        ("-1", "0 to 8"),
        ("CARDIGAN", r"2 classes fit: Cardigan \(3\), cardigan \(4\)"),
        ("shark", "2 classes fit: tiger shark"),
        ("tensh", "did you mean tench"),
    ],
)
def test_a_class_that_cannot_be_told_is_explained(word, message):
    with pytest.raises(ValueError, match=message):
        find_class(word, TITLES, len(TITLES))
    assert find_class("7", ["3", "7"], 2) == 1, "digits may be names"
    with pytest.raises(ValueError, match="--labels"):
        find_class("tench", [], 9)


def test_several_classes_and_names_from_a_file(toy, photo, tmp_path):
    toy()
    (tmp_path / "names.csv").write_text("index,name\n0,bright\n1,dark\n2,none\n3\n")
    assert read_titles(str(tmp_path / "names.csv")) == ["bright", "dark", "none", ""]
    (tmp_path / "names.txt").write_text("n01440764 light, bright\ndark\n\nnone\nhalf\n")
    words = ["--image_path", photo, "--model_path", "a", "--labels", str(tmp_path / "names.txt")]
    rows = cam.main([*words, "--target_class", "none", "TOP2", "1", "none", "-o", str(tmp_path / "out")])
    assert [row["target_index"] for row in rows] == [2, 0, 3, 1], "what is asked for twice is drawn once"
    assert rows[0]["predicted"] == "light, bright" and rows[0]["target"] == "none"
    assert Path(rows[1]["output"]).name == "photo_a_cam_light_bright.png"
    assert sum(row["target_probability"] for row in rows) == pytest.approx(1)


# what is wrong is said in a line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--image_path FILE"),
        (["--image_path", "PHOTO", "--method", "casm"], "needs --casm FILE"),
        (["--image_path", "PHOTO", "--method", "grad-cam"], "did you mean gradcam"),
        (["--image_path", "PHOTO", "--colormap", "jett"], "did you mean jet"),
        (["--image_path", "PHOTO", "--figure", "f.pdf"], "a .png"),
        (["--image_path", "PHOTO", "--output", "f.jpg"], "a folder, or a .png"),
        (["--image_path", "PHOTO", "--layer", "features"], "--method gradcam"),
        (["--image_path", "PHOTO", "--alpha", "1.5"], "between 0 and 1"),
    ],
)
def test_usage_errors(photo, words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cam.main([photo if word == "PHOTO" else word for word in words])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_path", "nothing.jpg"], "nothing.jpg: no such file"),
        (["--image_path", "*.gif"], r"\*.gif: no picture fits"),
        (["--image_path", "hollow"], "hollow: no pictures in this folder"),
        (["--output", "names.txt"], "names.txt is a file, not a folder"),
        (["--output", "names.txt/deep/a.png"], "names.txt is a file, not a folder"),
        (["--output", "photo.png"], "one of the pictures"),
        (["--figure", "./photo.png"], "one of the pictures"),
        (["--output", "x.png", "--target_class", "top2"], "several pictures"),
        (["--output", "folder.png"], "that is a folder"),
        (["--target_class", "4"], "--target_class 4: .*0 to 3"),
        (["--target_class", "top0"], "top1 to top4"),
        (["--target_class", "top5"], "top1 to top4"),
        (["--target_class", "brigth"], "did you mean bright"),
        (["--target_class", "none", "r"], "3 classes fit"),
        (["--labels", "names.txt"], "2 names, a has 4 classes"),
        (["--labels", "photo.png"], "no text"),
        (["--method", "gradcam", "--layer", "cnov"], "nearest is 'conv'"),
        (["--method", "gradcam", "--layer", "linear"], "must give maps"),
        (["--image_size", "8", "--method", "cam", "layercam", "--layer", "linear"], "linear"),
    ],
)
def test_errors_end_before_anything_is_written(toy, photo, tmp_path, monkeypatch, words, message):
    toy(titles=("bright", "dark", "none", "other"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "folder.png").mkdir()
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match=message):
        cam.main(["--image_path", photo, "--model_path", "a", *words])
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_networks_that_cannot_be_asked_are_named(toy, net, photo, tmp_path):
    words = ["--image_path", photo, "-o", str(tmp_path / "out"), "--model_path"]
    with pytest.raises(UserError, match=r"squeezenet1_1 cannot take images of 8 pixels .*\n.*--image_size"):
        cam.main([*words, net, "--image_size", "8"])
    toy(average=False)
    with pytest.raises(UserError, match="a: .*gradcam"):
        cam.main([*words, "a"])
    toy(scale=float("nan"))
    with pytest.raises(UserError, match="a: its scores are not finite"):
        cam.main([*words, "a"])
    assert not (tmp_path / "out").exists()


def test_without_a_classifier_it_says_where_to_put_the_weights(photo, monkeypatch):
    def no_network(url, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"put the file resnet50-\w+\.pth into .*checkpoints, or .*resnet50=FILE"):
        cam.main(["--image_path", photo])


# windows, layers, networks of other sizes


def test_a_window_is_opened_only_when_asked_for_and_possible(toy, photo, tmp_path, monkeypatch, capsys):
    toy()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    words = ["--image_path", photo, "--model_path", "a", "-o", str(tmp_path), "--figure", str(tmp_path / "f.png")]
    cam.main(words)
    assert "note" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "platform", "linux")
    cam.main([*words, "--show"])
    assert "no display here" in capsys.readouterr().out and "matplotlib.pyplot" not in sys.modules

    shown = []
    fake = types.ModuleType("matplotlib.pyplot")
    fake.figure = lambda name, **_: (shown.append(name), matplotlib.figure.Figure())[1]
    fake.show = lambda: shown.append("shown")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", fake)
    monkeypatch.setattr(matplotlib, "pyplot", fake, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    cam.main([*words, "--show"])
    assert shown == [str(tmp_path / "f.png"), "shown"]
    fake.show = lambda: 1 / 0
    cam.main([*words[:6], "--show"])
    assert "no window could be opened (ZeroDivisionError)" in capsys.readouterr().out
    cam.show([str(tmp_path / "f.png")] * 12)
    assert shown.count(str(tmp_path / "f.png")) == 1 + 10


def test_layers_are_listed(net, casm_file, toy, capsys):
    listed = cam.main(["--list_layers", "--model_path", net, casm_file, "--casm", casm_file])
    assert [one["model"] for one in listed] == ["squeezenet1_1", "random"]
    assert listed[0]["layers"][0] == "features.0" and "layer3.2" in listed[1]["layers"]
    said = capsys.readouterr().out
    assert "features.0                               64 x 111 x 111" in said and said.count("the last before") == 2
    toy()
    assert cam.main(["--list_layers", "--method", "casm", "--casm", casm_file]) == [
        {"model": "resnet50", "layers": ["conv", "pool"]}
    ]


def test_a_network_for_small_images_sees_the_middle_square(shapes_run, photo, tmp_path, capsys):
    run = shapes_run(epochs=1)
    capsys.readouterr()
    words = ["--image_path", photo, "--model_path", str(run), str(run / "last.pt"), "-o", str(tmp_path / "out")]
    rows = cam.main([*words, "--raw", "--method", "gradcam++", "scorecam", "--layer", "layer2", "--batch_size", "7"])
    assert len(rows) == 4 and "note" not in capsys.readouterr().out
    assert rows[0]["predicted"].isalpha() and len({row["model"] for row in rows}) == 2
    heat = np.load(rows[0]["raw"])
    assert not heat[:, :38].any() and not heat[:, 202:].any() and heat[:, 41:60].any() and heat[0].any()


@pytest.mark.data
def test_a_real_bird_is_seen_where_it_sits(real_data, tmp_path):
    """The brambling fills rows 85 to 125 and columns 160 to 195 of the picture, 256 x 340."""
    model = f"mobilenet_v2={real_data / 'weights' / 'mobilenet_v2_imagenet_f16.pt'}"
    image = str(real_data / "imagenet_samples" / "n01530575" / "n01530575.jpg")
    words = ["--image_path", image, "--model_path", model, "--raw", "-o", str(tmp_path)]
    predicted, other = cam.main([*words, "--target_class", "predicted", "volcano"])
    assert predicted["target"] == "brambling" and predicted["target_probability"] > 0.9
    heat = np.load(predicted["raw"])
    peak = np.unravel_index(heat.argmax(), heat.shape)
    assert 16 <= peak[0] < 240 and 58 <= peak[1] < 282
    assert heat[85:165, 140:230].mean() > 0.7 and heat[16:60, 58:110].mean() < 0.2
    assert np.abs(np.load(other["raw"]) - heat).max() > 0.3


def test_long_names_of_classifiers_name_no_file_twice(toy, photo, tmp_path, monkeypatch):
    toy()
    made = importlib.import_module("engine.inference.classifier").load_classifier
    words = [str(tmp_path / f"{'a' * 70}{number}") for number in (0, 1)]

    def named(word, zoo, **known):
        found = made(word, zoo, **known)
        found.name = found.path = Path(word).name
        return found

    monkeypatch.setattr("engine.inference.classifier.load_classifier", named)
    rows = cam.main(["--image_path", photo, "--model_path", *words, "--output", str(tmp_path / "out")])
    assert len({row["output"] for row in rows}) == 2 == len(list((tmp_path / "out").iterdir()))


def test_a_class_that_is_also_the_predicted_one_is_written_once(toy, photo, tmp_path, capsys):
    toy()
    words = ["--image_path", photo, "--model_path", "x", "--output", str(tmp_path / "out")]
    (row,) = cam.main(words)
    capsys.readouterr()
    again = cam.main([*words, "--target_class", "predicted", str(row["predicted_index"])])
    assert [one["output"] for one in again] == [row["output"]] * 2 and capsys.readouterr().out.count(row["output"]) == 1


def test_the_normalisation_is_that_of_the_file_or_of_norm(photo, tmp_path, capsys):
    from models import build_model

    torch.save(build_model("resnet20", 10).state_dict(), tmp_path / "bare.pt")
    words = ["--image_path", photo, "--model_path", str(tmp_path / "bare.pt"), "--output", str(tmp_path / "out")]
    (plain,) = cam.main(words)
    assert "taken: as imagenet (--norm)" in capsys.readouterr().out
    (half,) = cam.main([*words, "--norm", "half"])
    assert "taken" not in capsys.readouterr().out and half["predicted_probability"] != plain["predicted_probability"]
