"""Helpers that the benchmarks share. Importing this module puts the repository on the import path."""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def read_options(parser, argv: list[str] | None) -> dict:
    """Return every option: the typed value, else the default."""
    return {**parser.defaults, **parser.read(argv)}


def setup_device(options: dict, *, backends: bool = True) -> tuple:
    """Return the device of --device, the precision of --amp, and a description of both.

    backends: configure the backends as the training scripts do.
    """
    import torch

    from engine.runtime.device import choose_device, choose_precision, setup_backends

    device = choose_device(options["device"])
    if backends:
        setup_backends(device, seed=0, deterministic=False)
    precision, text = choose_precision(options["amp"], device)
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    return device, precision, f"{device}, {text}{threads}, torch {torch.__version__}"


def median_ms(seconds: Iterable[float]) -> float:
    """Return the median in milliseconds."""
    return 1000 * statistics.median_high(seconds)


def synchronize(device) -> None:
    """Wait until the device has finished its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
