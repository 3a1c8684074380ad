"""Evaluate a checkpoint within a training script, and start from the weights of one."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.config.parser import Parser
from engine.config.resolve import fill_in_options
from engine.config.select import select_kwargs
from engine.data.datasets import load_data
from engine.data.image_set import Data, check_same_images
from engine.data.loader import DeviceLoader, process_shard
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.inference.metrics import format_accuracy
from engine.inference.predict import compute_scores, predict
from engine.runtime.device import choose_device, setup_backends
from engine.runtime.distributed import init_processes, is_main_process, shut_down_processes
from engine.runtime.foreign_weights import load_weights
from engine.runtime.progress import progress_bar
from engine.training.run_folder import find_resume


def init_from(model: torch.nn.Module, path: str, num_classes: int, matching_models: Callable) -> str:
    """Put the weights of `path` into the network; the last layer starts anew where the classes differ. A note."""
    weights = SavedClassifier(path).weights
    fresh = load_weights(
        model, weights, Path(path), num_classes=num_classes, new_head=True, matches=matching_models(weights)
    )
    head = f"; the last layer starts anew, with {num_classes} classes" if fresh else ""
    return f"--init_from {path}: weights taken{head}"


def predict_test(
    model: torch.nn.Module,
    data: Data,
    *,
    device: torch.device,
    batch_size: int = 500,
    workers: int = 0,
    channels_last: bool = True,
    precision: torch.dtype | None = None,
    progress: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits (N, K) and labels (N,) of the test images, and the seconds it took."""
    feed = {"device": device, "mean": data.mean, "std": data.std, "workers": workers, "channels_last": channels_last}
    feed |= {"shard": process_shard()}
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    begin = time.perf_counter()
    logits, labels = predict(model, DeviceLoader(data.test, batch_size, **feed), precision=precision, progress=progress)
    return logits, labels, time.perf_counter() - begin


def evaluate_checkpoint(parser: Parser, typed: dict, build_model: Callable, matching_models: Callable) -> dict:
    """--evaluate of a training script: loss and accuracies of --checkpoint on the test images, printed and returned."""
    place = find_resume(fill_in_options(typed, {}, parser.defaults))
    if place is None:
        raise UserError("--checkpoint auto: there is no such run to evaluate")
    file = SavedClassifier(place)
    if not file.options and "dataset" not in typed:
        parser.error(f"--dataset: {place} does not say what it was trained on; name it")
    options = fill_in_options(typed, file.options, parser.defaults)
    device = choose_device(options["device"])
    init_processes(device, options["timeout"])
    setup_backends(device, seed=0, deterministic=options["deterministic"])
    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    check_same_images(data)
    print("\n".join([data.test.summary("test"), *(f"note: {line}" for line in data.warnings)]))
    name = typed.get("model") or file.options.get("model")
    model = file.build(
        build_model, matching_models, model=name, num_classes=len(data.classes), image_size=data.image_size
    )
    logits, labels, _ = predict_test(model, data, device=device, **select_kwargs(options, ["workers", "channels_last"]))
    result = compute_scores(logits, labels) if is_main_process() else {}
    if result:
        print(f"{place}: loss {result['loss']:.4f}\n{format_accuracy(result)}")
    shut_down_processes()
    return result
