"""A trained classifier out of a file: ours, which says what it is, or another code's, which is told by its shapes."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.batches import Batches
from engine.checkpoint import extract_weights, is_ours, load_weights, read_file
from engine.cli import Parser, UserError
from engine.configure import fill_in
from engine.data import STATISTICS, WITHOUT_STATISTICS, Data, check_alike, load_data
from engine.device import choose_device, prepare
from engine.distributed import finish, is_first, rank, ranks, start
from engine.log import find_resume
from engine.loop import predict, scores
from engine.progress import over
from engine.training import pick


def best_of(path: Path | str) -> Path:
    """A file, or the best.pt of a run folder."""
    place = Path(path)
    if place.is_dir() and not (place / "best.pt").is_file():
        raise UserError(f"{place}: this folder holds no best.pt; give a file, or the folder of a run")
    return place / "best.pt" if place.is_dir() else place


class SavedClassifier:
    """The content of a model file, or of the best.pt of a run folder. `options`: those it was trained with; classes and
    image_size: of its images. Empty or None where the file does not say. content: of the file, if it is read already.
    """

    def __init__(self, path: Path | str, averaged: bool = False, content: dict | None = None):
        self.path = best_of(path)
        content = read_file(self.path) if content is None else content
        self.weights = extract_weights(content, self.path, averaged=averaged)
        self.options = content["config"] if is_ours(content) else {}
        ours = content if is_ours(content) else {}
        self.classes: list[str] = ours.get("classes", [])
        self.image_size: int | None = ours.get("image_size")
        epoch = content.get("epoch") if isinstance(content, dict) else None
        self.epoch = epoch if isinstance(epoch, int) else None

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of its images; those of ImageNet where the file does not say."""
        norm, trained = self.options.get("norm", "own"), self.options.get("dataset") or "imagenet"
        return STATISTICS[WITHOUT_STATISTICS.get(trained, trained) if norm == "own" else norm]

    def build(
        self, build_model: Callable, matching_models: Callable, *, model: str | None, num_classes: int, image_size: int
    ) -> torch.nn.Module:
        """The network with these weights. model None: the one whose shapes fit; `resnet50` also means the one of that
        name with the other stem. Raises UserError if none fits.
        """
        matches = matching_models(self.weights)
        if model:
            model = next(iter(matching_models(self.weights, like=model)), model)
        if not model and not matches:
            raise UserError(
                f"{self.path}: the file does not say which network it is and none of ours fits; name it with --model"
            )
        try:
            network = build_model(model or matches[0], num_classes, image_size)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        load_weights(network, self.weights, self.path, num_classes=num_classes, matches=matches)
        return network


def torchvision_network(name: str, weights: dict[str, torch.Tensor], path: Path | str) -> torch.nn.Module:
    """torchvision's classifier `name` in evaluation mode, with weights of whatever precision and number of classes, in
    float32. path: theirs. Raises UserError if they are another network's.
    """
    from torchvision.models import get_model

    if name.startswith("densenet"):  # torchvision's own files have older names
        weights = {re.sub(r"(denselayer\d+\.(norm|relu|conv))\.", r"\1", key): value for key, value in weights.items()}
    last = next(reversed(weights.values()))
    extra = {"transform_input": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = get_model(name, weights=None, num_classes=len(last) if last.dim() else 1000, **extra)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds no {name}: {str(error).splitlines()[1].strip()[:100]} ...") from error
    return network.eval()


def start_from(model: torch.nn.Module, path: str, num_classes: int, matching_models: Callable) -> str:
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
    feed |= {"rank": rank(), "ranks": ranks()}
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    begin = time.perf_counter()
    logits, labels = predict(model, Batches(data.test, batch_size, **feed), precision=precision, progress=progress)
    return logits, labels, time.perf_counter() - begin


def evaluate_checkpoint(parser: Parser, typed: dict, build_model: Callable, matching_models: Callable) -> dict:
    """--evaluate of a training script: loss and accuracies of --checkpoint on the test images, printed and returned."""
    place = find_resume(fill_in(typed, {}, parser.defaults))
    if place is None:
        raise UserError("--checkpoint auto: there is no such run to evaluate")
    file = SavedClassifier(place)
    if not file.options and "dataset" not in typed:
        parser.error(f"--dataset: {place} does not say what it was trained on; name it")
    options = fill_in(typed, file.options, parser.defaults)
    device = choose_device(options["device"])
    start(device, options["timeout"])
    prepare(device, seed=0, deterministic=options["deterministic"])
    data = load_data(progress=over, **pick(options, load_data))
    check_alike(data)
    print("\n".join([data.test.summary("test"), *(f"note: {line}" for line in data.warnings)]))
    name = typed.get("model") or file.options.get("model")
    model = file.build(
        build_model, matching_models, model=name, num_classes=len(data.classes), image_size=data.image_size
    )
    logits, labels, _ = predict_test(model, data, device=device, **pick(options, ["workers", "channels_last"]))
    result = scores(logits, labels) if is_first() else {}
    if result:
        print(f"{place}: loss {result['loss']:.4f}\n{accuracy_line(result)}")
    finish()
    return result


def accuracy_line(result: dict) -> str:
    return "  ".join(f"Top-{key[3:]} Accuracy: {value:.2f}%" for key, value in result.items() if key.startswith("top"))
