"""Set up a CASM training run: resolve options, build classifier, pool and loaders, and describe the run to the user."""

from pathlib import Path

import torch

import models
from engine.config.parser import Parser
from engine.config.phases import default_eval_resize
from engine.config.resume_rules import RESUME_CHANGEABLE, OptionRules, merge_options
from engine.data.augment import Augmentation
from engine.data.image_set import Data
from engine.data.loader import DeviceLoader
from engine.data.views import RandomCrop
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from engine.runtime.distributed import rank_environment
from engine.runtime.text import format_count
from models import IMAGENET_ALIASES, IMAGENET_MODELS, build_model
from models.imagenet_resnet import load_pretrained
from models.stages import has_stages
from saliency.casm.network import PUBLISHED_MODEL, SUFFIX
from saliency.casm.options import FIRST_SNAPSHOT_ONLY, SMALL_SET_BATCHES, get_preset
from saliency.casm.pool import ClassifierPool, compute_snapshot_megabytes
from saliency.casm.training import CasmState

FOLDER_DATASETS = ("folder", "imagenet")  # they need DATA, and have no fixed image size
DATA_OPTIONS = ("dataset", "data_dir", "val_data_dir", "image_size", "eval_resize", "norm", "num_classes", "val_labels")
RESUME_RULES = OptionRules(
    changeable={"data", "log_path", "casms_path", "classifier", "resume", "pool_device"} | RESUME_CHANGEABLE,
    remedy="leave these options out, or start another run under another --name",
)


def check_typed_options(parser: Parser, typed: dict) -> None:
    """Exit with a usage error if --resume names no run, or under torchrun."""
    resume = typed.get("resume")
    if rank_environment()[1] > 1:
        parser.error("CASM trains in a single process; start it without torchrun")
    if resume == "auto" and "name" not in typed:
        parser.error("--resume auto needs --name, the run to resume")
    if resume not in (None, "auto") and not Path(resume).is_file():
        parser.error(f"--resume {resume}: no such file; name the {SUFFIX} file of the run")


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Return every option as merge_options() does. Exits with a usage error if the dataset folder is missing."""
    if saved:
        moved = {"data_dir": typed["data"]} if "data" in typed else {}
        return merge_options(typed, saved, parser.defaults | saved, rules=RESUME_RULES, recipe=lambda given: {}) | moved
    options = merge_options(typed, {}, parser.defaults, rules=RESUME_RULES, recipe=get_start_options)
    if "data" in typed and "dataset" not in typed and options["dataset"] == "shapes":  # shapes has no folder
        options["dataset"] = None
    options["dataset"] = options["dataset"] or "folder"
    options["norm"] = options["norm"] or "own"
    if "data" in typed:
        options["data_dir"] = typed["data"]
    if "data_dir" not in options and options["dataset"] in FOLDER_DATASETS:
        parser.error("DATA is missing: name the folder that holds train/ and val/, or give another --dataset")
    options.setdefault("data_dir", "data")
    if options["dataset"] in FOLDER_DATASETS:
        options["image_size"] = options["image_size"] or 224
        if "eval_resize" not in options:
            options["eval_resize"] = default_eval_resize(options["image_size"])
    if options["dataset"] not in ("shapes", "imagenet") and "num_classes" not in typed:
        options["num_classes"] = None
    return options


def get_start_options(given: dict) -> dict:
    """Return the data options that the classifier was trained with, and what the preset of --reproduce sets."""
    options = {}
    if "classifier" in given:
        saved = SavedClassifier(given["classifier"]).options
        options |= {key: saved[key] for key in (*DATA_OPTIONS, "model_args") if key in saved}
        options |= {"arch": saved.get("model")}
    if "reproduce" in given:
        options |= get_preset(given["reproduce"].upper(), given.get("adversarial", False))
    return options


def fill_from_data(options: dict, data: Data) -> None:
    """Set the options whose defaults depend on the size and number of the images."""
    if options["crop_padding"] is None:
        options["crop_padding"] = data.image_size // 16
    if options["pot"] is None:
        options["pot"] = 1.0 if -(-len(data.train) // options["batch_size"]) < SMALL_SET_BATCHES else 0.2


def choose_classifier(
    parser: Parser, data: Data, *, classifier: str | None, arch: str | None, model_args: dict | None
) -> tuple[str, torch.nn.Module, list[str]]:
    """Return the name of the architecture, the network and notes for the user.

    The network is that of the file `classifier`, or torchvision's with ImageNet weights. Raises UserError if it does
    not fit the data.
    """
    if not classifier:
        name = IMAGENET_ALIASES.get(arch, arch) or PUBLISHED_MODEL
        if name not in IMAGENET_MODELS:
            parser.error(
                f"--arch {name}: torchvision has no weights for it; name a trained checkpoint with --classifier"
            )
        network = build_model(name, len(data.classes), data.image_size)
        try:
            fresh = load_pretrained(network, name)
        except ValueError as error:
            raise UserError(f"{error}\nor start from your own classifier with --classifier") from error
        return name, network, ["torchvision's ImageNet weights with a new last layer"] if fresh else []
    file = SavedClassifier(classifier)
    if file.classes and file.classes != data.classes:
        raise UserError(
            f"{file.path}: its classes ({', '.join(file.classes[:5])} ...) are not those of the data "
            f"({', '.join(data.classes[:5])} ...)\nboth must have the same classes in the same order"
        )
    shape = {"num_classes": len(data.classes), "image_size": data.image_size}
    name, network = file.identify(models, arch), file.build(models, model=arch, model_args=model_args, **shape)
    if not has_stages(network):
        raise UserError(
            f"{file.path}: {name} has no stages whose features a mask decoder can read\ntrain a decoder for a network "
            "of this project (train.py --list_models) or a ResNet of torchvision or timm; its masks guide the training "
            "of any other network"
        )
    return name, network, []


def build_pool(network: torch.nn.Module, *, f_size: int, smf: int, pool_device: str) -> ClassifierPool:
    """Return an empty pool for snapshots of a network.

    pool_device: `device` (that of the network), `host`, or `auto` (the GPU unless a full pool would take more than half
    of its free memory).
    """
    device = next(network.parameters()).device
    on_host = device.type != "cuda" or pool_device == "host"
    if not on_host and pool_device == "auto":
        on_host = 1e6 * f_size * compute_snapshot_megabytes(network) > torch.cuda.mem_get_info(device)[0] / 2
    return ClassifierPool(f_size, smf, device="cpu" if on_host else device, pinned=on_host and device.type == "cuda")


def build_loaders(
    data: Data, device: torch.device, *, batch_size: int, crop_padding: int, seed: int, workers: int
) -> tuple[DeviceLoader, DeviceLoader, DeviceLoader]:
    """Return loaders of the training images, the evaluation images, and at most 1000 of the evaluation images."""
    common = {"device": device, "mean": data.mean, "std": data.std, "workers": workers}
    view = None if isinstance(data.train.pixels, torch.Tensor) else RandomCrop(data.image_size)
    augmentation = Augmentation(crop_padding, view)
    train = DeviceLoader(data.train, batch_size, shuffle=True, augmentation=augmentation, seed=seed, **common)
    return train, *(DeviceLoader(images, batch_size, **common) for images in (data.test, data.test.subsample(1000)))


def describe_run(
    image_sets: Data,
    state: CasmState,
    iterations: int,
    *,
    model: str,
    epochs: int,
    batch_size: int,
    adversarial: bool,
    lambda_r: float,
) -> list[str]:
    """Return lines that describe the run. iterations: per epoch. The keyword parameters are options."""
    lines = [
        image_sets.train.summary("training"),
        image_sets.test.summary("validation"),
        f"{model}: {format_count(epochs, 'epoch')} of {format_count(iterations, 'iteration')}, batch size "
        f"{batch_size}, {'adversarial' if adversarial else 'entropy'} form, lambda_r {lambda_r:g}, classifier "
        f"{'trained with the decoder' if state.train_classifier else 'fixed'}",
    ]
    if state.past_classifier:
        size = compute_snapshot_megabytes(state.past_classifier)
        lines += list_pool_notes(state.pool, size, epochs=epochs, iterations=iterations)
    return lines


def list_pool_notes(pool: ClassifierPool, megabytes: float, *, epochs: int, iterations: int) -> list[str]:
    """Return the size of the pool, and advice on --smf if the run is too short to fill it.

    megabytes: of one snapshot. iterations: per epoch.
    """
    used = min(pool.f_size, 1 + epochs * (iterations // pool.smf))
    lines = [
        f"pool: up to {used} of {pool.f_size} past classifiers, {megabytes:.1f} MB each, {used * megabytes:,.0f} MB in "
        f"{'host' if pool.device.type == 'cpu' else 'GPU'} memory and as much on disk next to the checkpoint"
    ]
    if pool.smf < FIRST_SNAPSHOT_ONLY and used < pool.f_size:
        better = min(iterations, max(1, epochs * iterations // (2 * pool.f_size)))
        fills = 1 + epochs * (iterations // better) >= pool.f_size
        remedy = f"--smf {better} would" if fills else "more --epochs would"
        lines.append(f"note: --smf {pool.smf} does not fill the pool in this run; {remedy}")
    return lines


def list_accuracy_notes(accuracy: float, num_classes: int) -> list[str]:
    """Return the accuracy (in percent) before training, with a warning if the classifier is too weak for CASM."""
    chance = 100 / num_classes
    lines = [f"val acc of the classifier before training: {accuracy:.1f} % (on at most 1,000 images)"]
    if accuracy < min(5 * chance, (100 + chance) / 2):
        lines.append(
            f"warning: chance level is {chance:.1f} %. The decoder learns only from images that the classifier gets "
            "right, so it will learn little here: train the classifier first, or check --classifier and the data"
        )
    return lines


def list_mask_notes(row: dict, lambda_r: float) -> list[str]:
    """Return a warning if the masks of an epoch are degenerate, with a remedy."""
    area = 100 * row["val_avg_mask"]
    if area < 1:
        return [f"warning: masks are almost empty ({area:.2f} % of the image): lower --lambda-r ({lambda_r:g})"]
    if row["confused"] == 0:  # the area term has no gradient then, so lambda_r has no effect
        return [
            f"warning: the masks (area {area:.0f} %) turned no correct prediction into a wrong one, so nothing limits "
            "their area: train for more epochs, or check the accuracy of the classifier"
        ]
    if area > 90:
        return [f"warning: masks cover almost the whole image ({area:.0f} %): raise --lambda-r ({lambda_r:g})"]
    return []
