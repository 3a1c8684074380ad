"""What follows from the options of a training run, and what its user should know of it."""

from pathlib import Path

import torch

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
from models import IMAGENET_ALIASES, IMAGENET_MODELS, build_model, find_matching_models
from models.imagenet_resnet import load_pretrained
from saliency.casm.network import PUBLISHED_MODEL, SUFFIX
from saliency.casm.options import NEVER, SMALL, preset
from saliency.casm.pool import ClassifierPool, snapshot_megabytes
from saliency.casm.training import CasmState

FOLDER_DATASETS = ("folder", "imagenet")  # data sets that have no place or size of their own
DATA_OPTIONS = ("dataset", "data_dir", "val_data_dir", "image_size", "eval_resize", "norm", "num_classes", "val_labels")
RULES = OptionRules(
    changeable={"data", "log_path", "casms_path", "classifier", "resume", "pool_device"} | RESUME_CHANGEABLE,
    remedy="leave them out",
)


def check_call(parser: Parser, typed: dict) -> None:
    """A usage error where --resume names no run, or under torchrun."""
    resume = typed.get("resume")
    if rank_environment()[1] > 1:
        parser.error("it trains in one process: leave torchrun away")
    if resume == "auto" and "name" not in typed:
        parser.error("--resume auto needs --name, the run to go on with")
    if resume not in (None, "auto") and not Path(resume).is_file():
        parser.error(f"--resume {resume}: no such file; it ends in {SUFFIX}")


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option by merge_options(). A usage error where the place of the data is missing."""
    if saved:
        place = {"data_dir": typed["data"]} if "data" in typed else {}
        return merge_options(typed, saved, parser.defaults | saved, rules=RULES, recipe=lambda given: {}) | place
    options = merge_options(typed, {}, parser.defaults, rules=RULES, recipe=get_start_options)
    if "data" in typed and "dataset" not in typed and options["dataset"] == "shapes":  # which has no place
        options["dataset"] = None
    options["dataset"] = options["dataset"] or "folder"
    options["norm"] = options["norm"] or "own"
    if "data" in typed:
        options["data_dir"] = typed["data"]
    if "data_dir" not in options and options["dataset"] in FOLDER_DATASETS:
        parser.error("DATA is missing: the folder that holds train/ and val/; or name another --dataset")
    options.setdefault("data_dir", "data")
    if options["dataset"] in FOLDER_DATASETS:
        options["image_size"] = options["image_size"] or 224
        if "eval_resize" not in options:
            options["eval_resize"] = default_eval_resize(options["image_size"])
    if options["dataset"] not in ("shapes", "imagenet") and "num_classes" not in typed:
        options["num_classes"] = None
    return options


def get_start_options(given: dict) -> dict:
    """The data that the classifier was trained on, and what the preset of --reproduce sets."""
    found = {}
    if "classifier" in given:
        own = SavedClassifier(given["classifier"]).options
        found |= {key: own[key] for key in DATA_OPTIONS if key in own} | {"arch": own.get("model")}
    if "reproduce" in given:
        found |= preset(given["reproduce"].upper(), given.get("adversarial", False))
    return found


def fill_from_data(options: dict, data: Data) -> None:
    """Fill in the options whose defaults depend on the size and number of the images."""
    if options["crop_padding"] is None:
        options["crop_padding"] = data.image_size // 16
    if options["pot"] is None:
        options["pot"] = 1.0 if -(-len(data.train) // options["batch_size"]) < SMALL else 0.2


def choose_classifier(
    parser: Parser, data: Data, *, classifier: str | None, arch: str | None
) -> tuple[str, torch.nn.Module, list[str]]:
    """The network of the file `classifier`, or torchvision's for ImageNet: its name, itself, and notes for the user.
    Raises UserError where it does not fit the data.
    """
    if not classifier:
        name = IMAGENET_ALIASES.get(arch, arch) or PUBLISHED_MODEL
        if name not in IMAGENET_MODELS:
            parser.error(f"--arch {name}: there are no ready weights of it; name a trained file with --classifier")
        network = build_model(name, len(data.classes), data.image_size)
        try:
            fresh = load_pretrained(network, name)
        except ValueError as error:
            raise UserError(f"{error}\nor start from a classifier of your own, with --classifier") from error
        return name, network, ["torchvision's weights for ImageNet, with a new last layer"] if fresh else []
    file = SavedClassifier(classifier)
    if file.classes and file.classes != data.classes:
        raise UserError(
            f"{file.path}: its classes ({', '.join(file.classes[:5])} ...) are not those of the data "
            f"({', '.join(data.classes[:5])} ...)\nboth must be the same, in the same order"
        )
    shape = {"num_classes": len(data.classes), "image_size": data.image_size}
    network = file.build(build_model, find_matching_models, model=arch, **shape)
    return find_matching_models(file.weights, like=arch)[0], network, []


def build_pool(network: torch.nn.Module, *, f_size: int, smf: int, pool_device: str) -> ClassifierPool:
    """An empty pool for snapshots of a network. pool_device: device, that of the network; host; or auto: on a GPU
    unless the snapshots would take more than half of its free memory.
    """
    device = next(network.parameters()).device
    host = device.type != "cuda" or pool_device == "host"
    if not host and pool_device == "auto":
        host = 1e6 * f_size * snapshot_megabytes(network) > torch.cuda.mem_get_info(device)[0] / 2
    return ClassifierPool(f_size, smf, device="cpu" if host else device, pinned=host and device.type == "cuda")


def build_loaders(
    data: Data, device: torch.device, *, batch_size: int, crop_padding: int, seed: int, workers: int
) -> tuple[DeviceLoader, DeviceLoader, DeviceLoader]:
    """Training batches; those of all evaluation images, and of about a thousand of them."""
    common = {"device": device, "mean": data.mean, "std": data.std, "workers": workers}
    view = None if isinstance(data.train.pixels, torch.Tensor) else RandomCrop(data.image_size)
    augmentation = Augmentation(crop_padding, view)
    train = DeviceLoader(data.train, batch_size, shuffle=True, augmentation=augmentation, seed=seed, **common)
    return train, *(DeviceLoader(part, batch_size, **common) for part in (data.test, data.test.subsample(1000)))


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
    """What is about to run, on what. iterations: of an epoch. The parameters by name are options."""
    lines = [
        image_sets.train.summary("training"),
        image_sets.test.summary("validation"),
        f"{model}: {epochs} epochs of {iterations} iterations of {batch_size} images, "
        f"{'adversarial' if adversarial else 'entropy'} form, lambda_r {lambda_r:g}, classifier "
        f"{'trained along' if state.train_classifier else 'fixed'}",
    ]
    if state.past_classifier:
        size = snapshot_megabytes(state.past_classifier)
        lines += pool_notes(state.pool, size, epochs=epochs, iterations=iterations)
    return lines


def pool_notes(pool: ClassifierPool, megabytes: float, *, epochs: int, iterations: int) -> list[str]:
    """What the pool takes with snapshots of so many megabytes, and what to change where a run of so many iterations an
    epoch leaves it nearly empty.
    """
    count, every = pool.f_size, pool.smf
    taken = min(count, 1 + epochs * (iterations // every))
    lines = [
        f"pool: {taken} of {count} past classifiers of {megabytes:.1f} MB each, {taken * megabytes:,.0f} MB in all, in "
        f"the memory of the {'host' if pool.device.type == 'cpu' else 'GPU'}, and as much in a file beside the "
        "checkpoint"
    ]
    if every < NEVER and taken < count:
        better = min(iterations, max(1, epochs * iterations // (2 * count)))
        lines.append(f"note: --smf {every} leaves places of the pool empty; --smf {better} would fill them")
    return lines


def skill_notes(accuracy: float, classes: int) -> list[str]:
    chance = 100 / classes
    lines = [f"before training the classifier is right on {accuracy:.1f} % of the evaluation images looked at"]
    if accuracy < min(5 * chance, (100 + chance) / 2):
        lines.append(
            f"warning: chance is {chance:.1f} %. The decoder learns from images that the classifier gets right, so "
            "here it will learn little: train the classifier first, or check --classifier and the data"
        )
    return lines


def mask_notes(row: dict, lambda_r: float) -> list[str]:
    """What is wrong with the masks of an epoch, and what to change."""
    area = 100 * row["val_avg_mask"]
    nobody = "no image was right and then wrong behind its mask, so that nothing holds its area"
    if area < 1:
        return [f"warning: the masks are all but empty ({area:.2f} % of the image): lower --lambda-r ({lambda_r:g})"]
    if row["confused"] == 0:
        return [f"warning: {nobody} ({area:.0f} %) down: is the classifier any good? more epochs may help"]
    if area > 90:
        return [f"warning: the masks are all but full ({area:.0f} % of the image): raise --lambda-r ({lambda_r:g})"]
    return []
