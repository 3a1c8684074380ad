"""Evaluate a classifier within a training script, and start one from given weights."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from engine.config.parser import Parser
from engine.config.resolve import fill_in_options
from engine.config.select import select_kwargs
from engine.data.datasets import load_data
from engine.data.image_set import check_same_images
from engine.data.loader import DeviceLoader, get_process_shard
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.inference.metrics import format_accuracy
from engine.inference.predict import compute_scores, predict
from engine.runtime.device import setup_backends
from engine.runtime.distributed import is_main_process, shut_down_processes
from engine.runtime.foreign_weights import load_weights
from engine.runtime.progress import Progress, progress_bar
from engine.training.run_folder import classifier_runs, find_resume
from engine.training.start import start_processes
from engine.training.state import TrainingState


def evaluate_held_out(state: TrainingState, loaders: dict[str, DeviceLoader], bar: bool) -> dict[str, float]:
    """Columns of the log: loss and accuracies in percent on each held-out part, and of the averaged weights on the test
    images. All processes share the work, and only the main one gets the numbers.
    """
    columns = {}
    for name, loader in loaders.items():
        columns |= {f"{name}_{key}": value for key, value in evaluate(state.model, loader, bar).items()}
    if state.ema and (averaged := evaluate(state.ema.module, loaders["test"], bar)):
        columns["ema_top1"] = averaged["top1"]
    return columns


def evaluate(network: torch.nn.Module, loader: DeviceLoader, bar: bool) -> dict[str, float]:
    with Progress("evaluating", len(loader), bar=bar, lines=False) as progress:
        logits, labels = predict(network, loader, progress=progress)
    return compute_scores(logits, labels) if is_main_process() else {}


def init_from(model: torch.nn.Module, path: str, num_classes: int, find_matching_models: Callable) -> str:
    """Load the weights of a file into the network; the last layer starts anew where the classes differ. A note."""
    weights = SavedClassifier(path).weights
    matches = find_matching_models(weights)
    fresh = load_weights(model, weights, Path(path), num_classes=num_classes, new_head=True, matches=matches)
    head = f"; the last layer starts anew, with {num_classes} classes" if fresh else ""
    return f"--init_from {path}: weights taken{head}"


def evaluate_checkpoint(parser: Parser, typed: dict, models: ModuleType) -> dict:
    """--evaluate of a training script: loss and accuracies of --checkpoint on the test images, printed and returned.

    models: the package of our networks.
    """
    path = find_resume(fill_in_options(typed, {}, parser.defaults), classifier_runs)
    if path is None:
        raise UserError("--checkpoint auto: there is no such run to evaluate")
    file = SavedClassifier(path)
    if not file.options and "dataset" not in typed:
        parser.error(f"--dataset: {path} does not say what it was trained on; name it")
    options = fill_in_options(typed, file.options, parser.defaults)
    device = start_processes(options["device"], options["timeout"])
    setup_backends(device, seed=0, deterministic=options["deterministic"])
    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    check_same_images(data)
    print("\n".join([data.test.summary("test"), *(f"note: {line}" for line in data.warnings)]))
    name, count = typed.get("model") or file.options.get("model"), len(data.classes)
    network = file.build(
        models.build_model, models.find_matching_models, model=name, num_classes=count, image_size=data.image_size
    )
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format
    loader = DeviceLoader(
        data.test,
        500,
        device=device,
        mean=data.mean,
        std=data.std,
        shard=get_process_shard(),
        **select_kwargs(options, ["workers", "channels_last"]),
    )
    result = evaluate(network.to(device, memory_format=layout), loader, bar=False)
    if result:
        print(f"{path}: loss {result['loss']:.4f}\n{format_accuracy(result)}")
    shut_down_processes()
    return result
