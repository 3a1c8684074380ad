"""Find image files, open them, and name their outputs."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from support import write_image

from engine.data.decode import BadImage
from explanation import chunk, find_images, open_image, unique_stems

RED, BLUE = (200, 40, 20), (10, 30, 220)


def test_images_are_found_once_and_in_order(tmp_path):
    for name in ("b/2.png", "b/1.jpg", "b/.hidden.png", "b/deep/3.png", "[x]*.png"):
        write_image(tmp_path / name, 0)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "folder.png").mkdir()
    found = find_images([str(tmp_path / word) for word in ("b/2.png", "b", "*/*/*.png", "[x]*.png")])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["b/2.png", "b/1.jpg", "b/deep/3.png", "[x]*.png"]


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
    Image.fromarray((grey * 257).astype(np.int32)).save(root / "grey32.tif")
    Image.fromarray((grey / 255).astype(np.float32)).save(root / "float.tif")
    Image.fromarray(grey.astype(np.float32)).save(root / "float255.tif")
    luma = int(image.convert("L").getpixel((0, 0)))
    special = {"grey.png": (luma,) * 3, "rgba.png": (255,) * 3, "la.png": (255,) * 3, "clear.gif": (255,) * 3}
    special |= {name: (left,) * 3 for name in ("grey16.png", "grey32.tif", "float.tif", "float255.tif")}
    return {file.name: special.get(file.name, RED) for file in root.iterdir()}


def test_images_of_every_kind_open_as_in_a_viewer(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # above this Pillow warns, above the double it raises
    expected = write_unusual_images(tmp_path)
    assert len(expected) == 18
    for name, colour in expected.items():
        image = open_image(tmp_path / name)
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
    assert np.array_equal(open_image(tmp_path / "turned.png"), upright)


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
            open_image(file)


def test_chunk_limits_images_and_pixels_and_does_not_read_ahead():
    yielded = []

    def source():
        for side in (10, 10, 10, 30, 30, 30, 1):
            yielded.append(side)
            yield Path("a"), np.zeros((side, side, 3), np.uint8)

    sizes = []
    for group in chunk(source(), max_count=2, max_pixels=1000):
        sizes.append([len(image) for _, image in group])
        assert len(yielded) <= sum(map(len, sizes)) + 1, "at most one image is read ahead"
    assert sizes == [[10, 10], [10, 30], [30], [30, 1]]


def test_stems_are_unique_even_if_case_is_ignored():
    files = [Path(name) for name in ("a/x.png", "b/x.png", "a/x.jpg", "z.png")]
    assert unique_stems(files) == ["a_x.png", "b_x.png", "x.jpg", "z"]
    assert unique_stems([Path("a/X.png"), Path("b/a/x.png")]) == ["a_X.png_1", "a_x.png_2"]
