"""Helpers that tests of several packages share."""

import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection import faster_rcnn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
RUN_OPTIONS = {"recipe": "puzzle", "model": "resnet20", "dataset": "cifar10", "epochs": 4, "batch_size": 100, "lr": 0.1}
RUN_OPTIONS |= {"scheduler": "cosine", "name": "x", "device": "cpu", "amp": "auto", "limit": 0, "data_dir": "data"}
SMALL_NETWORK = "models.resnet", "NarrowResNet", 8  # in the place of resnet20, by the fixture small_network


class SmallHead(TwoMLPHead):
    """A box head with fewer weights: those between 7x7 features and 1024 units are half of a detector's file."""

    def __init__(self, in_channels: int, representation_size: int):
        super().__init__(in_channels, 32)
        self.fc7 = nn.Linear(32, representation_size)


def make_narrow(network: nn.Module) -> nn.Module:
    """Divide the channels of a ResNet by 8."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                inputs, form = layer.in_channels, (layer.kernel_size, layer.stride, layer.padding)
                inputs = inputs if inputs == 3 else inputs // 8
                setattr(parent, name, nn.Conv2d(inputs, layer.out_channels // 8, *form, bias=False))
            elif isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                setattr(parent, name, type(layer)(len(layer.weight) // 8))
            elif isinstance(layer, nn.Linear):
                setattr(parent, name, nn.Linear(layer.in_features // 8, layer.out_features))
    return network


def build_narrow_resnet18(num_classes: int) -> nn.Module:
    from models.imagenet_resnet import imagenet_resnet

    return make_narrow(imagenet_resnet(18, num_classes))


NARROW_RESNET18 = "support", "build_narrow_resnet18"  # in the place of imagenet_resnet18, by a fixture


def list_small_parts() -> list[tuple]:
    """Return what makes a detector small: owner, attribute and value."""
    import detection.faster_rcnn as ours

    def get_model(name: str, real=torchvision.models.get_model, **options) -> nn.Module:
        return make_narrow(real(name, **options))

    def build_pyramid(body, layers, widths, channels: int, real=ours.BackboneWithFPN) -> nn.Module:
        return real(body, layers, widths, channels // 8)

    replaced = [(torchvision.models, "get_model", get_model), (ours, "BackboneWithFPN", build_pyramid)]
    return [*replaced, (faster_rcnn, "TwoMLPHead", SmallHead)]


def use_small_detector() -> None:
    """Build small detectors in a process that does not have the fixture small_detector."""
    import models

    models.MODELS["imagenet_resnet18"] = NARROW_RESNET18
    for owner, name, value in list_small_parts():
        setattr(owner, name, value)


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def shapes_command(root: Path, *words: str, name: str = "run", method: str = "none", epochs: int = 2) -> list[str]:
    """Return the arguments of a short training run of train.py on `shapes` of 16 pixels, on the CPU."""
    command = [
        "--dataset",
        "shapes",
        "--method",
        *method.split(),
        "--epochs",
        str(epochs),
        "--limit",
        "48",
        "--image_size",
        "16",
        "--batch_size",
        "20",
    ]
    return [
        *command,
        "--vis_epoch",
        "0",
        "--no_progress",
        "--device",
        "cpu",
        "--root_dir",
        str(root),
        "--name",
        name,
        *words,
    ]


def use_small_network() -> None:
    """Do what the fixture small_network does, in a process that does not have it."""
    import models

    models.MODELS["resnet20"] = SMALL_NETWORK


def train_small_network(command: list[str]) -> dict:
    """Run train.py in a process that does not have the fixture small_network."""
    import train

    use_small_network()
    return train.main(command)


def same_state(a, b) -> bool:
    """Return whether two nested states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def copy_package_sources(folder: Path) -> None:
    """Copy what the package is built from, and some of the repository that must not be installed."""
    for name in ("package", "mixing", "saliency", "engine", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder)


def run_installed(package: Path, code: str, folder: Path) -> str:
    """Run Python code in `folder` with the installed package, but not the repository, on the path. Returns its output.

    package: the fixture installed_package.
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


def write_image(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    """Write an image of one colour. size: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 255 - value) if mode == "RGB" else (value, 0, 0, 0)
    Image.new(mode, size, colour).save(path, "JPEG" if path.suffix == ".JPEG" else None)


def write_class_folders(root: Path, split: str = "val") -> None:
    """Write train/ and `split`/ with two classes of three images each; one file is a CMYK JPEG."""
    for label, name in enumerate(["cat", "dog"]):
        for k in range(3):
            write_image(root / "train" / name / f"{k}.png", 60 * label + 10 * k, size=(80, 48))
            write_image(root / split / name / f"{k}.jpg", 60 * label + 10 * k, "CMYK" if k == 2 else "RGB")


def write_run(
    folder: Path, top1: list[float], *, method: str = "none", seed: int = 0, columns: dict | None = None, **options
) -> Path:
    """Write a run folder with one epoch per value of top1. columns: further columns of log.csv, a value or a list."""
    from engine.training.console import LOG_COLUMNS  # not before conftest.py has set up triton

    config = {"kind": "classifier", "commit": "a" * 40, "device": "cpu", "precision": "float32", "parameters": 10}
    config["hyper_parameters"] = {}
    config["options"] = RUN_OPTIONS | {"method": method.split("+"), "seed": seed, "epochs": len(top1)} | options
    for key in config.keys() & options.keys():  # such as another commit
        config[key] = options[key]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    lines = [",".join(LOG_COLUMNS)]
    for epoch, value in enumerate(top1, 1):
        row = {"epoch": epoch, "lr": 0.1, "test_top1": value, "seconds": 30.0, "images_per_second": 100.0}
        row |= {key: own[epoch - 1] if isinstance(own, list) else own for key, own in (columns or {}).items()}
        lines.append(",".join(str(row.get(column, "")) for column in LOG_COLUMNS))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def load_recorded_problem(golden, number: int, case: dict):
    """Return recorded costs as a problem of mixing.solvers.puzzlemix_mask."""
    cost0, cost1 = (tensor(golden[f"c{number}_cost{k}"]) for k in (0, 1))
    labels = case["n_labels"]
    prior = tensor(golden[f"c{number}_prior"]).float()
    unary = torch.stack([torch.lerp(cost0, cost1, k / (labels - 1)) + prior[k] for k in range(labels)])
    edges = (tensor(golden[f"c{number}_{name}"]).permute(1, 2, 0).contiguous() for name in ("wx", "wy"))
    return unary.permute(0, 2, 3, 1).contiguous(), *edges


# How tests start processes: as forks of a process that has imported torch, which takes seconds, and done nothing else.
# In a fork of the tests' own process, OpenCV would wait for threads that fork does not copy.
START = "forkserver"
PRELOADED = ["torch", "torchvision", "cv2", "matplotlib.figure", "engine.training.run"]
torch.multiprocessing.get_context(START).set_forkserver_preload(PRELOADED)


def set_environment(variables: dict[str, str]) -> None:
    """Replace the environment variables, which are those from when the server of forks was started."""
    os.environ.clear()
    os.environ.update(variables)


def run_script(main: Callable[[], None], errors: Path, output: Path, environment: dict[str, str]) -> None:
    """Call run_main(main) as the leader of a process group. What it prints goes to files."""
    from engine.launch import run_main

    set_environment(environment)
    os.setsid()
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    run_main(main)


def start_script(main: Callable[[], None], errors: Path | str = os.devnull, output: Path | str = os.devnull):
    """Run main() as a script of its own does, in another process, and return the process."""
    arguments = main, errors, output, dict(os.environ)
    process = torch.multiprocessing.get_context(START).Process(target=run_script, args=arguments)
    process.start()
    return process


def find_free_port() -> int:
    """Return a free port below those for outgoing connections, one of which could take it before the test does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def leave_out_figures() -> None:
    """Draw no curves of a run, which take longer than its steps."""
    from detection import report
    from engine.training import console

    for owner, name in (
        (console, "draw_learning_curves"),
        (report, "draw_training_curves"),
        (report, "draw_precision_recall_curves"),
    ):
        setattr(owner, name, lambda *args, **kwargs: None)


def run_rank(rank: int, job, ports: list[int], result: Path, environment: dict[str, str]) -> None:
    """Run job(ports) as one of two ranks; rank 0 writes what it returns to `result`."""
    set_environment(environment)
    leave_out_figures()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(ports[0])
    torch.set_num_threads(1)
    returned = job(ports)
    if rank == 0:
        torch.save(returned, result)


def run_in_two_processes(job, folder: Path, num_ports: int = 1):
    """Run job(ports) in two processes and return what rank 0 returns. num_ports: one for each process group."""
    ports = [find_free_port() for _ in range(num_ports)]
    arguments = (job, ports, folder / "result.pt", dict(os.environ))
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=2, start_method=START)
    return torch.load(folder / "result.pt")


@contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Lock a file as another process does that writes to its folder; the file stays, as after a kill."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        file.write("process 1 on there")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load_method_recording(golden, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images and the labels of a case of more_methods.npz."""
    rows = golden[f"{case}_rows"]
    top, bottom, left, right = golden[f"{case}_crop"] if f"{case}_crop" in golden else (0, None, 0, None)
    pixels = torch.from_numpy(golden["images"][rows][..., top:bottom, left:right]).float() / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(golden["labels"][rows]).long()
