"""Command-line options, markers and fixtures for all tests."""

import copy
import functools
import inspect
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it; the processes of pytest-xdist share the cores

import numpy as np
import pytest
import torch

# triton reads it when it is imported, as by torchvision: kernels then run on CPU tensors, interpreted
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from browser import Browser
from support import (
    GOLDEN,
    NARROW_RESNET18,
    SMALL_NETWORK,
    copy_package_sources,
    find_browser,
    hold_lock,
    list_small_parts,
    shapes_command,
)

import models


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config):
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in a background job of a shell; child processes must receive Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    skip_reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "slow": None if config.getoption("--slow") else "slow; run with --slow",
        "browser": None if find_browser() else "no Chromium or Chrome on the path",
        "data": None if os.environ.get("REAL_DATA") else "no real data; set REAL_DATA to its folder",
    }
    for item in items:
        for marker, reason in skip_reasons.items():
            if reason and item.get_closest_marker(marker):  # item.keywords would also match names of folders
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed_torch():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def draw_shapes_once():
    """Draw each set of `shapes` and of scenes once per process: its images are the same in every run, and hundreds of
    tests train.
    """
    from detection import load
    from detection.shape_scenes import CHUNK_SIZE
    from engine.data import datasets
    from engine.data.shapes import CHUNK

    draw_cached, draw_scenes_cached = functools.cache(datasets.draw_shapes), functools.cache(load.draw_scenes)

    def draw_shapes(count: int, size: int, *, num_classes: int, seed: int, progress) -> dict[str, torch.Tensor]:
        list(progress(range(0, count, CHUNK), desc="drawing shapes"))
        return {
            key: value.clone() for key, value in draw_cached(count, size, num_classes=num_classes, seed=seed).items()
        }

    def draw_scenes(count: int, *, size: int, seed: int, progress):
        list(progress(range(0, count, CHUNK_SIZE), desc="drawing scenes"))
        return copy.deepcopy(draw_scenes_cached(count, size=size, seed=seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "draw_shapes", draw_shapes)
        patch.setattr(load, "draw_scenes", draw_scenes)
        yield


@pytest.fixture
def few_shapes(monkeypatch):
    """Make `shapes` a set of 40 training and 40 test images; all 6,000 take seconds to draw."""
    from engine.data import datasets

    monkeypatch.setattr(datasets, "SHAPES_COUNTS", (40, 40))


@pytest.fixture(scope="session", autouse=True)
def draw_curves_once(tmp_path_factory):
    """Draw the curves of a run once per process for each form of them, and copy the file where other runs draw the
    same form: hundreds of tests train, and a figure costs as much as their steps. Two histories have the same form if
    their rows have the same columns; two sets of precision-recall curves, if as many classes have objects, and any
    detections.
    """
    from detection import report
    from engine.drawing import figures
    from engine.training import console
    from saliency.casm import run_files

    folder, drawn = tmp_path_factory.mktemp("curves"), {}

    def draw_or_copy(path: Path, form: tuple, draw) -> None:
        if form not in drawn:
            draw()
            if path.exists():  # nothing is drawn without values
                shutil.copy(path, folder / str(len(drawn)))
            drawn[form] = folder / str(len(drawn))
        elif drawn[form].exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn[form], path)

    def list_columns(history: list[dict]) -> tuple:
        return tuple(tuple(key for key, value in row.items() if value is not None) for row in history)

    def draw_learning_curves(run, real=console.draw_learning_curves) -> None:
        path = run.log.path / f"curves.{run.options['figure_format']}"
        unmixed = set(run.options["method"]) <= console.UNMIXED_LABELS
        form = "learning", path.suffix, run.options["dpi"], run.options["loss"], unmixed, list_columns(run.history)
        draw_or_copy(path, form, lambda: real(run))

    def draw_training_curves(path, history, title, real=report.draw_training_curves, **style) -> None:
        form = "training", path.suffix, title, *style.items(), list_columns(history)
        draw_or_copy(path, form, lambda: real(path, history, title, **style))

    def draw_precision_recall_curves(path, voc, *args, real=report.draw_precision_recall_curves, **style) -> None:
        table = [name for name, row in voc["classes"].items() if row["objects"]]
        detected = any(len(voc["curves"][name]["recall"]) for name in table)
        form = "recall", path.suffix, len(table), detected, *args, *style.items()
        draw_or_copy(path, form, lambda: real(path, voc, *args, **style))

    def draw_epoch_panels(path, history, panels, title, real=figures.draw_epoch_panels, **style) -> None:
        form = "casm", path.suffix, title, *style.items(), list_columns(history)
        draw_or_copy(path, form, lambda: real(path, history, panels, title, **style))

    def draw_image_rows(path, rows, title, real=figures.draw_image_rows, **style) -> None:
        form = "masks", path.suffix, *style.items(), *(images.shape for _, images, _ in rows)
        draw_or_copy(path, form, lambda: real(path, rows, title, **style))

    drawn_by_casm = {"draw_epoch_panels": draw_epoch_panels, "draw_image_rows": draw_image_rows}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_files, "figures", SimpleNamespace(**drawn_by_casm, to_pixels=figures.to_pixels))
        patch.setattr(console, "draw_learning_curves", draw_learning_curves)
        patch.setattr(report, "draw_training_curves", draw_training_curves)
        patch.setattr(report, "draw_precision_recall_curves", draw_precision_recall_curves)
        yield


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The empty cache of torch.hub on a machine without network access."""

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="session")
def installed_package(tmp_path_factory) -> Path:
    """Return a folder with nothing but the installed package, built once for all processes; the wheel is beside it."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "package"
    folder, pip = shared / "installed", [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with hold_lock(shared / "lock"):
        if not folder.is_dir():
            copy_package_sources(shared / "source")  # setuptools writes into the folder that it builds
            build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "./source"]
            subprocess.run([*pip, *build], check=True, cwd=shared)
            (wheel,) = shared.glob("*.whl")
            install = ["install", "--no-deps", "--no-index", "--target", "new", f"./{wheel.name}"]
            subprocess.run([*pip, *install], check=True, cwd=shared)
            (shared / "new").rename(folder)
    return folder


@pytest.fixture
def real_data() -> Path:
    return Path(os.environ["REAL_DATA"])


@pytest.fixture(scope="session")
def static_golden():
    return np.load(GOLDEN / "static_saliency.npz")


@pytest.fixture(scope="session")
def network_golden():
    return np.load(GOLDEN / "networks.npz")


@pytest.fixture(scope="session")
def method_golden():
    return np.load(GOLDEN / "more_methods.npz")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium, for tests marked `browser`."""
    running = Browser(find_browser(), tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@contextmanager
def replace_model(name: str, constructor: tuple) -> Iterator[None]:
    """Replace a network of the registry. constructor: module, name in it, and first arguments."""
    cached, uncached = models.get_model_shapes, inspect.unwrap(models.get_model_shapes)

    @functools.wraps(cached)
    def get_model_shapes(key: str) -> dict:
        return uncached(key) if key == name else cached(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, name, constructor)
        patch.setattr(models, "get_model_shapes", get_model_shapes)
        yield


@pytest.fixture(scope="module")
def small_network():
    """Make `resnet20` a network of 8 layers, where a test trains it and any network would do."""
    with replace_model("resnet20", SMALL_NETWORK):
        yield


@pytest.fixture(scope="module")
def narrow_resnet18():
    """Make `imagenet_resnet18` a narrow network, whose file has 1 MB instead of 90."""
    with replace_model("imagenet_resnet18", NARROW_RESNET18):
        yield


@pytest.fixture(scope="module")
def small_detector(narrow_resnet18):
    """Make detectors with `imagenet_resnet18` small, where any detector would do."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in list_small_parts():
            patch.setattr(owner, name, value)
        yield


@pytest.fixture
def shapes_run(tmp_path):
    """Return a function that trains on a few images of `shapes` and returns the run folder."""
    import train

    def train_on_shapes(*words: str, name: str = "run", method: str = "none", epochs: int = 2) -> Path:
        train.main(shapes_command(tmp_path, *words, name=name, method=method, epochs=epochs))
        return tmp_path / "shapes" / "resnet20" / name

    return train_on_shapes


@pytest.fixture(scope="session")
def casm_file(tmp_path_factory) -> str:
    """Return the path of a file as casm train writes it: a random mask decoder on a random resnet20, for 32 pixels."""
    from engine.data.shapes import CLASSES
    from engine.runtime.checkpoint import FORMAT, save_checkpoint
    from models.resnet import NarrowResNet
    from saliency.casm.network import build_decoder

    torch.manual_seed(1)
    network = NarrowResNet(20, 10)  # the file serves modules with and without small_network
    content = {"format": FORMAT, "kind": "casm", "epoch": 1, "model": network.state_dict(), "image_size": 32}
    content |= {"decoder": build_decoder(network, width=8).state_dict(), "classes": CLASSES}
    content |= {"config": {"model": "resnet20", "width": 8, "upsample": "nearest", "dataset": "shapes"}}
    content |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    path = tmp_path_factory.mktemp("casm") / "random.chk"
    save_checkpoint(path, content)
    return str(path)
