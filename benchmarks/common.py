"""What the benchmarks share. Importing it puts the repository on the path."""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def read_options(parser, argv: list[str] | None) -> dict:
    """Every option: what was typed, else the default."""
    return {**parser.defaults, **parser.read(argv)}


def setup_device(options: dict, *, backends: bool = True) -> tuple:
    """The device of --device, the precision of --amp, and a text on both. backends: set up as the scripts do it."""
    import torch

    from engine.runtime.device import choose_device, choose_precision, setup_backends

    device = choose_device(options["device"])
    if backends:
        setup_backends(device, seed=0, deterministic=False)
    precision, text = choose_precision(options["amp"], device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return device, precision, f"{device}, {text}{threads}, torch {torch.__version__}"


def median_ms(seconds: Iterable[float]) -> float:
    """The median in milliseconds."""
    return 1000 * statistics.median_high(seconds)


def wait_for(device) -> None:
    """Until the device has done what it was asked to."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
