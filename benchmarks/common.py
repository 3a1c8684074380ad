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


def add_method_options(parser, *, model: str, methods: list[str]) -> None:
    """Declare --model, --method, --kernels, --saliency, --saliency_size and --threads. model, methods: the defaults."""
    import mixing
    import models
    import saliency
    from engine.config.option_types import choice, int_at_least
    from mixing.kernels import MODES

    networks, names = choice(models.MODELS, models.ALIASES), choice(mixing.MIXERS, mixing.ALIASES)
    sources = choice(saliency.SOURCES, saliency.ALIASES)
    parser.option("--model", type=networks, default=model, metavar="NAME", help="network architecture")
    parser.option(
        "--method", "--methods", type=names, nargs="+", default=methods, metavar="NAME", help="mixing methods"
    )
    parser.option(
        "--saliency", type=sources, metavar="SOURCE", shown="by method", help="saliency source of all methods"
    )
    parser.option(
        "--saliency_size",
        type=int_at_least(8),
        metavar="PIXELS",
        help="gradient: side of the images in the saliency pass",
    )
    parser.option("--kernels", type=choice(MODES), default="auto", help="auto, triton or torch, as for train.py")
    parser.option("--threads", type=int_at_least(1), shown="all", help="CPU threads")


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
