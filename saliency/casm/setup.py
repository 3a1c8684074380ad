"""What follows from the options of a training run, and what its user should know of it."""

from datetime import datetime
from pathlib import Path

import torch

from engine.config.parser import Parser
from engine.config.phases import default_eval_resize
from engine.config.select import select_kwargs
from engine.data.augment import Augmentation
from engine.data.image_set import Data
from engine.data.loader import DeviceLoader
from engine.data.views import RandomCrop
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from models import IMAGENET_ALIASES, IMAGENET_MODELS, build_model, matching_models
from models.imagenet_resnet import load_pretrained
from saliency.casm.network import ENDING, PUBLISHED, Casm, build_decoder
from saliency.casm.options import NEVER, SMALL, preset
from saliency.casm.pool import ClassifierPool, megabytes
from saliency.casm.training import CasmState, build_casm_state

FOLDER_DATASETS = ("folder", "imagenet")  # data sets that have no place or size of their own
DATA_OPTIONS = ("dataset", "data_dir", "val_data_dir", "image_size", "eval_resize", "norm", "num_classes", "val_labels")
RESUME_CHANGEABLE = {  # options that may change when a run is continued
    *("data", "val_data_dir", "log_path", "classifier", "resume", "overwrite", "epochs"),
    *("workers", "device", "amp", "pool_device", "print_freq", "no_progress", "debug"),
}


def find_resume(parser: Parser, typed: dict) -> Path | None:
    """The file to go on from. A usage error for one that is not there."""
    if "resume" not in typed:
        return None
    if typed["resume"] == "auto":
        if "name" not in typed:
            parser.error("--resume auto needs --name, the run to go on with")
        place = Path(typed.get("casms_path", parser.defaults["casms_path"])) / (typed["name"] + ENDING)
        return place if place.exists() else None
    if not Path(typed["resume"]).is_file():
        parser.error(f"--resume {typed['resume']}: no such file; it ends in {ENDING}")
    return Path(typed["resume"])


def resume_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """The options of the run that goes on, with what was typed of those that may change. UserError for the others."""
    differ = {key for key in typed.keys() - RESUME_CHANGEABLE - {"name", "casms_path"} if typed[key] != saved.get(key)}
    if differ:
        rows = "\n".join(f"  --{key}  {saved.get(key)}  ->  {typed[key]}" for key in sorted(differ))
        raise UserError(f"the run to continue has other options (saved -> given):\n{rows}\nleave them out")
    moved = {"data_dir": typed["data"]} if "data" in typed else {}
    return {**parser.defaults, **saved, **{key: typed[key] for key in typed.keys() & RESUME_CHANGEABLE}, **moved}


def resolve_casm_options(parser: Parser, typed: dict) -> dict:
    """Every option: what was typed, else the preset's, what the classifier was trained with, the default."""
    options = dict(parser.defaults)
    if "classifier" in typed:
        own = SavedClassifier(typed["classifier"]).options
        options |= {key: own[key] for key in DATA_OPTIONS if key in own} | {"arch": own.get("model")}
    if "reproduce" in typed:
        options |= preset(typed["reproduce"].upper(), typed.get("adversarial", False))
    options |= typed
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
    options["name"] = options["name"] or f"{options['reproduce'] or 'casm'}_{datetime.now():%Y%m%d-%H%M%S}"
    return options


def choose_classifier(parser: Parser, options: dict, data: Data) -> tuple[str, torch.nn.Module, list[str]]:
    """The network of --classifier, or torchvision's for ImageNet: its name, itself, and what to tell. Raises UserError
    where it does not fit the data.
    """
    name, count = options["arch"], len(data.classes)
    if not options["classifier"]:
        name = IMAGENET_ALIASES.get(name, name) or PUBLISHED
        if name not in IMAGENET_MODELS:
            parser.error(f"--arch {name}: there are no ready weights of it; name a trained file with --classifier")
        network = build_model(name, count, data.image_size)
        try:
            fresh = load_pretrained(network, name)
        except ValueError as error:
            raise UserError(f"{error}\nor start from a classifier of your own, with --classifier") from error
        return name, network, ["torchvision's weights for ImageNet, with a new last layer"] if fresh else []
    file = SavedClassifier(options["classifier"])
    if file.classes and file.classes != data.classes:
        raise UserError(
            f"{file.path}: its classes ({', '.join(file.classes[:5])} ...) are not those of the data "
            f"({', '.join(data.classes[:5])} ...)\nboth must be the same, in the same order"
        )
    network = file.build(build_model, matching_models, model=name, num_classes=count, image_size=data.image_size)
    return matching_models(file.weights, like=name)[0], network, []


def build_casm(
    parser: Parser, options: dict, data: Data, device: torch.device, precision: torch.dtype | None, *, anew: bool
) -> tuple[CasmState, list[str]]:
    """Everything that learns, on the device, and what to tell. anew: from the weights of --classifier; else their place
    is left for those of the run that goes on. Fills in what the options leave to the network.
    """
    notes = []
    if anew:
        options["model"], classifier, notes = choose_classifier(parser, options, data)
    else:
        classifier = build_model(options["model"], len(data.classes), data.image_size)
    network = Casm(classifier, build_decoder(classifier, options["width"], options["upsample"]))
    network = network.to(device, memory_format=torch.channels_last)
    host = keep_pool_on_host(options["pool_device"], options["f_size"] * megabytes(classifier), device)
    room = {"device": "cpu" if host else device, "pinned": host and device.type == "cuda"}
    pool = ClassifierPool(options["f_size"], options["smf"], **room)
    return build_casm_state(network, pool, precision=precision, **select_kwargs(options, build_casm_state)), notes


def build_loaders(
    options: dict, data: Data, device: torch.device
) -> tuple[DeviceLoader, DeviceLoader, DeviceLoader, DeviceLoader]:
    """Training batches; those of all evaluation images, of about a thousand of them, and of eight. Fills in the options
    that depend on their number and size.
    """
    feed = {"device": device, "mean": data.mean, "std": data.std, "workers": options["workers"]}
    if options["crop_padding"] is None:
        options["crop_padding"] = data.image_size // 16
    resident = isinstance(data.train.pixels, torch.Tensor)
    view = None if resident else RandomCrop(data.image_size)
    augmentation = Augmentation(options["crop_padding"], view)
    size = options["batch_size"]
    train = DeviceLoader(data.train, size, shuffle=True, augmentation=augmentation, seed=options["seed"], **feed)
    if options["pot"] is None:
        options["pot"] = 1.0 if len(train) < SMALL else 0.2
    some = [(data.test, size), (data.test.subsample(1000), size), (data.test.subsample(8), 8)]
    return train, *(DeviceLoader(part, count, **feed) for part, count in some)


def keep_pool_on_host(where: str, size: float, device: torch.device) -> bool:
    """Whether snapshots that take `size` MB in all lie on the host. where: device, host or auto."""
    if device.type != "cuda" or where != "auto":
        return device.type != "cuda" or where == "host"
    return 1e6 * size > torch.cuda.mem_get_info(device)[0] / 2


def pool_notes(options: dict, iterations: int, pool: ClassifierPool, size: float) -> list[str]:
    """What the pool takes, in MB a snapshot, and what to change where a run of so many iterations an epoch leaves it
    nearly empty.
    """
    count, every = pool.f_size, pool.smf
    taken = min(count, 1 + options["epochs"] * (iterations // every))
    lines = [
        f"pool: {taken} of {count} past classifiers of {size:.1f} MB each, {taken * size:,.0f} MB in all, in the "
        f"memory of the {'host' if pool.device.type == 'cpu' else 'GPU'}, and as much in a file beside the checkpoint"
    ]
    if every < NEVER and taken < count:
        better = min(iterations, max(1, options["epochs"] * iterations // (2 * count)))
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
