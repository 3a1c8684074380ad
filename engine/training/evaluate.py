"""Evaluate a classifier within a training script, and initialise one from given weights."""

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
from engine.runtime.text import format_count
from engine.training.run_folder import RunFolder, describe_search, find_resume, locate_classifier_runs
from engine.training.start import start_processes
from engine.training.state import TrainingState


def evaluate_held_out(state: TrainingState, loaders: dict[str, DeviceLoader], bar: bool) -> dict[str, float]:
    """Return columns of the log: loss and accuracies in percent on each held-out split, and the top-1 accuracy of the
    weight average on the test images.

    SPLIT_unreadable is the number of its files that cannot be read and do not count, if there are any. All processes
    share the work; only the main process gets the numbers, the others an empty dictionary.
    """
    columns = {}
    for split, loader in loaders.items():
        columns |= {f"{split}_{key}": value for key, value in evaluate(state.model, loader, bar).items()}
    if state.ema and (scores := evaluate(state.ema.module, loaders["test"], bar)):
        columns["ema_top1"] = scores["top1"]
    return columns


def evaluate(network: torch.nn.Module, loader: DeviceLoader, bar: bool) -> dict[str, float]:
    with Progress("evaluating", len(loader), bar=bar, lines=False) as progress:
        logits, labels = predict(network, loader, progress=progress)
    unreadable = loader.count_unreadable()
    if not is_main_process():
        return {}
    return compute_scores(logits, labels) | ({"unreadable": unreadable} if unreadable else {})


def load_initial_weights(
    network: torch.nn.Module, path: str, classes: list[str], models: ModuleType, model: str
) -> str:
    """--init_from: load the weights of a file into the network, and return a note about it.

    The last layer keeps its random weights if the number of classes differs. If only the names differ, its rows are
    matched by name. models: the package `models`. model: name of the network.
    """
    saved = SavedClassifier(path)
    note, count, rows = f"--init_from {path}: weights loaded", format_count(len(classes), "class"), None
    if len(saved.classes) == len(classes) and saved.classes != classes:
        positions = {name: row for row, name in enumerate(saved.classes)}
        rows = {row: positions[name] for row, name in enumerate(classes) if name in positions}
        note += f"; the last layer is taken over by name for {len(rows)} of {count}, and new for the others"
    shape = {"num_classes": len(classes), "heads": models.find_heads(network), "rows": rows}
    matches, weights = models.find_matching_models(saved.weights), models.convert_weights(model, saved.weights)
    if not matches and saved.model != model:
        matches = saved.list_network_options()
    if load_weights(network, weights, Path(path), new_head=True, name=model, matches=matches, **shape):
        note += f"; the last layer is newly initialised for {count}"
    return note


def evaluate_checkpoint(parser: Parser, typed: dict, models: ModuleType) -> dict:
    """--evaluate: print and return loss and accuracies of --checkpoint on the test images.

    models: the package `models`. Raises UserError if there is no checkpoint.
    """
    # ---- Checkpoint and options ----
    search = fill_in_options(typed, {}, parser.defaults)
    path = find_resume(search, locate_classifier_runs)
    if path is None:
        found = describe_search(search, locate_classifier_runs, RunFolder)
        raise UserError(f"--checkpoint auto: no run to evaluate at {found}\nname its folder or a checkpoint file")
    file = SavedClassifier(path)
    if not file.options and "dataset" not in typed:
        parser.error(f"--dataset is missing: {path} does not record what it was trained on")
    options = fill_in_options(typed, file.options, parser.defaults)

    # ---- Data ----
    device = start_processes(options["device"], options["timeout"])
    setup_backends(device, seed=0, deterministic=options["deterministic"])
    data = load_data(progress=progress_bar, **select_kwargs(options, load_data))
    check_same_images(data)
    print("\n".join([data.test.summary("test"), *(f"note: {line}" for line in data.warnings)]))

    # ---- Network ----
    network = file.build(
        models,
        model=typed.get("model"),
        model_args=typed.get("model_args"),
        num_classes=len(data.classes),
        image_size=data.image_size,
    )
    mean, std = file.statistics if file.options and "norm" not in typed else (data.mean, data.std)
    layout = torch.channels_last if options["channels_last"] else torch.contiguous_format

    # ---- Evaluation ----
    loader = DeviceLoader(
        data.test,
        500,
        device=device,
        mean=mean,
        std=std,
        shard=get_process_shard(),
        **select_kwargs(options, ["workers", "channels_last"]),
    )
    result = evaluate(network.to(device, memory_format=layout), loader, bar=False)
    if result:
        print(f"{path}: test loss {result['loss']:.4f}\n{format_accuracy(result)}")
    shut_down_processes()
    return result
