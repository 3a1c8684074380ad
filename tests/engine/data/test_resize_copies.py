"""Tests of resized copies of image sets."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import hold_lock, start_script

import engine.data.resize_copies as copies
from engine.data.folders import find_folder
from engine.data.resize_copies import resize_copies
from engine.errors import UserError


def write_image_set(root: Path, count: int = 2, size: tuple[int, int] = (90, 60)) -> None:
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for wnid in ("n01", "n02"):
            for k in range(count):
                path = root / part / wnid / f"{wnid}_{k}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                small = Image.fromarray(noise.integers(0, 256, (6, 9, 3), dtype=np.uint8))
                small.resize(size, Image.Resampling.BICUBIC).save(path, "JPEG", quality=95)


def list_files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_have_the_tree_the_size_and_the_pixels(tmp_path, workers):
    source, dest, bars = tmp_path / "set", tmp_path / "copies", []
    write_image_set(source)
    (source / "val" / "val_annotations.txt").write_text("a list")
    (source / "val" / "notes.txt").write_text("not a list")

    def progress(items, **kwargs):
        bars.append(kwargs["total"])
        yield from items

    report = resize_copies(source, [20, 40, 20], dest, workers=workers, progress=progress)
    assert (report.made, report.skipped, report.bad, bars) == (16, 0, [], [8]) and report.seconds > 0
    expected = [name for name in list_files(source) if name != "val/notes.txt"]
    assert list_files(dest / "20") == list_files(dest / "40") == expected
    for size, shape in ((20, (30, 20)), (40, (60, 40))):
        with Image.open(source / "val" / "n02" / "n02_1.JPEG") as image:
            wanted = np.asarray(image.convert("RGB").resize(shape, Image.Resampling.BICUBIC)).astype(int)
        with Image.open(dest / str(size) / "val" / "n02" / "n02_1.JPEG") as copy:
            assert (copy.format, copy.mode, copy.size) == ("JPEG", "RGB", shape)
            assert np.abs(np.asarray(copy) - wanted).mean() < 3
    train, test = find_folder(dest / "20", None)
    assert len(train.files) == len(test.files) == 4


def test_large_jpeg_is_decoded_at_reduced_size(tmp_path, monkeypatch):
    write_image_set(tmp_path / "set", 1, (800, 640))
    seen = []
    monkeypatch.setattr(copies, "convert_to_rgb", lambda image: seen.append(image.size) or image.convert("RGB"))
    resize_copies(tmp_path / "set", [80, 40], tmp_path / "copies", workers=1)
    assert seen == [(200, 160)] * 4, "decoded at a quarter of the size: at least twice the larger copy"
    assert Image.open(tmp_path / "copies" / "80" / "val" / "n01" / "n01_0.JPEG").size == (100, 80)


def test_existing_copies_are_kept_and_missing_ones_made(tmp_path):
    source, dest = tmp_path / "set", tmp_path / "copies"
    write_image_set(source)
    resize_copies(source, [20], dest, workers=1)
    kept, gone = dest / "20" / "train" / "n01" / "n01_0.JPEG", dest / "20" / "val" / "n02" / "n02_1.JPEG"
    kept.write_bytes(b"mine")
    gone.unlink()
    report = resize_copies(source, [20, 30], dest, workers=1)
    assert (report.made, report.skipped) == (1 + 8, 7) and kept.read_bytes() == b"mine" and gone.is_file()


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_files_are_listed_and_the_others_copied(tmp_path, workers):
    source, dest = tmp_path / "set", tmp_path / "copies"
    write_image_set(source)
    bad = source / "train" / "n01" / "n01_1.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    grey = source / "train" / "n02" / "n02_0.png"
    Image.new("LA", (50, 90)).save(grey)
    report = resize_copies(source, [20], dest, workers=workers)
    assert report.made == 8 and [path for path, _ in report.bad] == [bad] and "truncated" in report.bad[0][1].lower()
    assert list_files(dest / "20") == [name for name in list_files(source) if "n01/n01_1" not in name or "val" in name]
    with Image.open(dest / "20" / "train" / "n02" / "n02_0.png") as copy:
        assert (copy.mode, copy.size) == ("RGB", (20, 36))
    assert "unreadable files: 1" in report.lines()[0] and str(bad) in report.lines()[1]


def test_invalid_source_and_destination_raise(tmp_path):
    source = tmp_path / "set"
    with pytest.raises(UserError, match="no folder .*set\n"):
        resize_copies(source, [20], tmp_path / "copies")
    (source / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no images in .*set\n"):
        resize_copies(source, [20], tmp_path / "copies")
    for dest in (source, source / "copies", tmp_path / "other" / ".." / "set"):
        with pytest.raises(UserError, match="--resize_dest .* is inside the source folder .*set"):
            resize_copies(source, [20], dest)
    (tmp_path / "20").mkdir()
    with pytest.raises(UserError, match="source folder .*20 is inside .*20\n"):
        resize_copies(tmp_path / "20", [20], tmp_path)


def test_links_are_followed_without_cycles(tmp_path):
    write_image_set(tmp_path / "set", 1)
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set" / "train" / "n01", target_is_directory=True)
    (tmp_path / "set" / "train" / "up").symlink_to(tmp_path / "set", target_is_directory=True)
    assert resize_copies(tmp_path / "set", [20], tmp_path / "copies", workers=1).made == 5


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_no_partial_file_remains_after_a_failure(tmp_path, monkeypatch, failure):
    write_image_set(tmp_path / "set", 1)

    def stop(side, target):
        assert Path(side).stat().st_size > 0
        raise failure

    monkeypatch.setattr(copies.os, "replace", stop)
    full = isinstance(failure, OSError)
    with (
        pytest.raises(
            UserError if full else KeyboardInterrupt, match="disk is full\nfree disk space" if full else None
        ),
        copies.atomic_file(tmp_path / "copies" / "a.JPEG") as side,
    ):
        side.write_bytes(b"half")
    assert list_files(tmp_path / "copies") == []


@pytest.mark.skipif(sys.platform != "linux", reason="signals to a process group")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_complete_files_and_can_be_repeated(tmp_path, number):
    """Ctrl-C reaches the whole process group, the other two only the parent, whose workers must not stay behind."""
    source, dest = tmp_path / "set", tmp_path / "copies"
    write_image_set(source, 20, (500, 400))
    process = start_script(partial(resize_copies, source, [300, 400], dest, workers=2), tmp_path / "errors")
    deadline = time.monotonic() + 60
    while not list(dest.rglob("*.JPEG")) and time.monotonic() < deadline:
        time.sleep(0.01)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == (130 if number == signal.SIGINT else -number)
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline + 60:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    made = [path for path in dest.rglob("*.JPEG") if not path.name.startswith(".")]
    assert 0 < len(made) < 160
    for path in made:
        with Image.open(path) as image:
            image.load()
    if number == signal.SIGINT:
        assert errors.strip() == "stopped by Ctrl-C" and not list(dest.rglob(".*"))
    (made[0].parent / ".n01_0.JPEG.part-7-0123abcd").touch()  # as a worker that was killed leaves it
    report = resize_copies(source, [300, 400], dest, workers=2)
    assert (report.made, report.skipped) == (160 - len(made), len(made)) and not list(dest.rglob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_ended_does_not_go_on(tmp_path, monkeypatch, number):
    """The pool took the SystemExit of SIGTERM for the result of a task, and the worker waited for the next one."""
    write_image_set(tmp_path / "set", 4)

    def end(image):
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        return image.convert("RGB")

    monkeypatch.setattr(copies, "convert_to_rgb", end)
    with pytest.raises(UserError, match="a process that makes copies was killed.*\n.*fewer --workers"):
        resize_copies(tmp_path / "set", [20], tmp_path / "copies", workers=2)
    assert list_files(tmp_path / "copies") == []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_ctrl_c_before_a_worker_is_ready_waits_for_it(tmp_path, monkeypatch):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)  # held back until the worker ignores it
        start_worker()

    start_worker = copies.start_worker
    monkeypatch.setattr(copies, "start_worker", interrupt)
    write_image_set(tmp_path / "set", 1)
    assert resize_copies(tmp_path / "set", [20], tmp_path / "copies", workers=2).made == 4


def test_two_processes_do_not_make_the_same_copies(tmp_path):
    write_image_set(tmp_path / "set", 1)
    for held, size in (("20", 20), ("30", 20)):
        with hold_lock(tmp_path / "copies" / held / ".lock"):
            if held == str(size):
                with pytest.raises(UserError, match=r"copies/20 is in use: process 1 on there makes copies there\n"):
                    resize_copies(tmp_path / "set", [30, size], tmp_path / "copies", workers=1)
            else:
                assert resize_copies(tmp_path / "set", [size], tmp_path / "copies", workers=1).made == 4
