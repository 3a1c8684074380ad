"""Decode image files of every format, mode and depth."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detection.dataset import DetectionSet
from engine.data.datasets import load_data, load_evaluation
from engine.data.decode import BadImage, decode_center, decode_image, decode_into
from engine.data.resize_copies import find_copies, resize_copies
from engine.data.sample_rng import draw_crop_numbers
from engine.data.views import CenterCrop, RandomCrop, SquashedView
from evaluation.ood_images import load_ood_set

RED, BLUE = (200, 40, 20), (10, 30, 220)
RAMP = np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def write_16bit_png(path, values: np.ndarray, colours: int) -> None:
    """Write a .png of 16 bits per channel from values (H, W) or (H, W, 3)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_unusual_images(root: Path) -> dict[str, tuple[int, int, int]]:
    """Write images of 12 x 6, RED on the left and BLUE on the right, or grey. Returns file -> colour on the left."""
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
    turned = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"  # after a tag of an invalid type
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x40\0\x02\0\0\0\x06\0\0\0\x26" + turned + b"\0\0\0\0hello\0"
    image.rotate(90, expand=True).save(root / "damaged_exif.jpg", exif=damaged, **big)
    image.save(root / "no_exif.jpg", exif=b"Exif\0\0" + b"\xff" * 20, **big)
    for ending in ("gif", "png", "webp", "tif"):
        image.save(root / f"frames.{ending}", save_all=True, append_images=[Image.new("RGB", (12, 6))], lossless=True)
    write_16bit_png(root / "rgb16.png", plain.astype(np.uint16) * 257, 2)
    write_16bit_png(root / "grey16.png", (grey * 257).astype(np.uint16), 0)
    luma = int(image.convert("L").getpixel((0, 0)))
    special = {"grey.png": (luma,) * 3, "rgba.png": (255,) * 3, "la.png": (255,) * 3, "clear.gif": (255,) * 3}
    special["grey16.png"] = (left,) * 3
    return {file.name: special.get(file.name, RED) for file in root.iterdir()}


def test_images_of_every_kind_open_as_in_a_viewer(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # above this Pillow warns, above the double it raises
    expected = write_unusual_images(tmp_path)
    assert len(expected) == 15
    for name, colour in expected.items():
        image = decode_image(tmp_path / name, upright=True)
        assert image.dtype == np.uint8 and image.shape == (6, 12, 3), name
        assert np.abs(image[3, 1].astype(int) - colour).max() <= 4, f"{name}: {image[3, 1]}"
    assert not recwarn.list


@pytest.mark.parametrize("value", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path, value):
    exif = Image.Exif()
    exif[0x112] = value
    image = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(6, 4, 3))
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(decode_image(tmp_path / "turned.png", upright=True), upright)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("view", [CenterCrop(16, 20), SquashedView(16), RandomCrop(16)])
def test_crops_are_those_of_the_upright_image(tmp_path, value, view):
    exif = Image.Exif()
    exif[0x112] = value
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8))
    image.save(tmp_path / "turned.png", exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).save(tmp_path / "upright.png", exif=b"")
    draws = draw_crop_numbers(0, 0, [0])[0]
    outs = [np.empty((16, 16, 3), np.uint8) for _ in range(3)]
    names, uprights = ("turned.png", "upright.png", "turned.png"), (True, False, False)
    boxes = [
        decode_into(out, tmp_path / name, view, draws, upright)
        for out, name, upright in zip(outs, names, uprights, strict=True)
    ]
    assert np.array_equal(outs[0], outs[1]) and boxes[0] == boxes[1]
    assert np.array_equal(outs[0], outs[2]) == (value == 1)


def test_own_images_are_upright_everywhere_and_published_ones_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    values = np.zeros((48, 64, 3), np.uint8)
    values[:, :32] = 200  # upright, the upper half is bright
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / "set" / name / "0.jpg", quality=95, exif=exif)
    resize_copies(tmp_path / "set", [48], tmp_path / "copies", workers=1)
    data = load_data("folder", data_dir=str(tmp_path / "set"), image_size=32)
    copies = find_copies(data, {"small": str(tmp_path / "copies" / "48")})["small"]
    evaluated = load_evaluation("folder", data_dir=str(tmp_path / "set"), image_size=32)
    ood = load_ood_set(str(tmp_path / "set" / "val"), image_size=32)[1]
    published = load_evaluation("imagenet", data_dir=str(tmp_path / "set"), image_size=32, num_classes=2)

    def half(pixels, axis: int) -> bool:
        first, second = np.array_split(np.asarray(pixels).astype(int), 2, axis)
        return first.mean() > second.mean() + 90

    for image_set in (data.train, data.test, copies, evaluated, ood, data.train.take(torch.tensor([1]))):
        assert half(image_set.pixels.read([0])[0][0], 0), image_set.origin
    assert half(published.pixels.read([0])[0][0], 1)
    file = tmp_path / "set" / "val" / "cat" / "0.jpg"
    assert half(decode_image(file, upright=True), 0) and half(decode_center(file, 32), 0)


def test_unreadable_images_raise_with_the_reason(tmp_path):
    """The files are truncated (two), empty, too large, and text."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3)).astype(np.uint8))
    for ending in ("jpg", "png"):
        noise.save(tmp_path / f"cut.{ending}")
        raw = (tmp_path / f"cut.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    noise.save(tmp_path / "huge.png")
    bomb = bytearray((tmp_path / "huge.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "huge.png").write_bytes(bomb)
    reasons = ["truncated", "truncated", "file is empty", "too large", "not an image"]
    for file, reason in zip(sorted(tmp_path.iterdir()), reasons, strict=True):
        with pytest.raises(BadImage, match=f"{file.name}: .*{reason}"):
            decode_image(file)


# ---- More than 8 bits ----


def write_tiff(path: Path, values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> None:
    """Write a grey .tif of one strip from values (256, 256). sample_format: 1 unsigned, 2 signed, 3 float."""
    body, (height, width) = values.tobytes(), values.shape
    if bits == 12:
        even, odd = values.ravel()[::2], values.ravel()[1::2]
        body = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], 1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(body)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {339: sample_format}).items())
    directory = struct.pack("<H", len(tags) + 1) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory)


def write_deep_ramp(path: Path) -> None:
    """Write a grey ramp from black to white with more than 8 bits per pixel; the name says how."""
    deep = 257 * RAMP.astype(np.uint16)
    if path.suffix == ".pgm":
        top = int(path.stem)
        values = (RAMP / 255 * top).round().astype(">u2")
        path.write_bytes(f"P5 256 256 {top}\n".encode() + values.tobytes())
    elif path.name in ("12bit.tif", "white_is_zero.tif", "white_is_zero_float.tif"):
        values, *layout = {
            "12bit.tif": ((RAMP / 255 * 4095).round().astype(int), 12),
            "white_is_zero.tif": (65535 - deep, 16, 0),
            "white_is_zero_float.tif": (1 - RAMP / np.float32(255), 32, 0, 3),
        }[path.name]
        write_tiff(path, values, *layout)
    else:
        values = {
            "16.png": deep,
            "16.tif": deep,
            "big_endian.tif": deep.astype(">u2"),
            "float.tif": RAMP / np.float32(255),
        }
        Image.fromarray(values[path.name]).save(path)


def read_in_every_way(path: Path) -> dict[str, np.ndarray]:
    """Return the grey values (256, 256) that each reader of image files gets."""
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "difficult": torch.zeros(0)}]
    detected = DetectionSet(["a"], ["a"], [path], targets, [(256, 256)], "a test").read(0)
    report = resize_copies(path.parent, [256], path.parent.parent / "copies", workers=1)
    assert not report.bad
    copy = decode_image(path.parent.parent / "copies" / "256" / path.name)
    pixels = {"training": decode_center(path, 256), "cam.py": decode_image(path, upright=True), "copies": copy}
    return {name: image[:, :, 0] for name, image in pixels.items()} | {"detect.py": detected[0].numpy()}


@pytest.mark.parametrize(
    "name",
    ["65535.pgm", "1023.pgm", "16.png", "16.tif", "big_endian.tif", "12bit.tif", "float.tif"]
    + ["white_is_zero.tif", "white_is_zero_float.tif"],
)
def test_deep_pixels_are_scaled_in_the_same_way_by_every_reader(tmp_path, name):
    (tmp_path / "set").mkdir()
    write_deep_ramp(tmp_path / "set" / name)
    for reader, grey in read_in_every_way(tmp_path / "set" / name).items():
        assert np.abs(grey.astype(int) - RAMP).max() <= (2 if reader == "copies" else 0), reader


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (RAMP.astype(np.int32), "I"),
        (RAMP.astype(np.float32), "F"),
        (RAMP / np.float32(255) - 0.1, "F"),
        (np.where(RAMP > 0, RAMP / np.float32(255), np.float32("nan")), "F"),
    ],
)
def test_deep_pixels_of_unknown_range_are_refused_by_every_reader(tmp_path, values, mode):
    path = tmp_path / "set" / "a.tif"
    path.parent.mkdir()
    Image.fromarray(values).save(path)
    detection_set = DetectionSet(["a"], ["a"], [path], [{}], [(256, 256)], "a test")
    readers = (decode_image, lambda path: decode_center(path, 256), lambda path: detection_set.read(0))
    for read in readers:
        with pytest.raises(BadImage, match=rf"^{path}: 32-bit values \(mode {mode}\) .*8 or 16 bits, or as floats"):
            read(path)
    assert f"mode {mode}" in resize_copies(path.parent, [20], tmp_path / "copies", workers=1).bad[0][1]


def test_transparent_parts_are_white_for_every_reader(tmp_path):
    clear = Image.fromarray(RAMP).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(RAMP < 128, 0, 255).astype(np.uint8)))
    (tmp_path / "set").mkdir()
    clear.save(tmp_path / "set" / "a.png")
    for reader, grey in read_in_every_way(tmp_path / "set" / "a.png").items():
        expected = np.where(RAMP < 128, 255, RAMP).astype(int)
        assert np.abs(grey - expected)[:, [3, 120, 140, 250]].max() <= (4 if reader == "copies" else 0), reader
