"""Declare the options that several commands share: single options, data and device.

A parameter named after an option is its default. If it is None, a recipe or a file sets the value.
engine/config/resolve.py checks combinations of options.
"""

from engine.config.legacy_options import LEGACY_DEVICE_OPTIONS
from engine.config.option_types import MAX_SEED, boolean, choice, float_in_range, int_at_least, int_list, key_value
from engine.config.parser import Parser

SMALL_DATASETS = ["cifar10", "cifar100", "tiny-imagenet", "folder", "shapes"]
LARGE_DATASETS = ["imagenet", "tiny-imagenet", "folder"]
DATASETS = ["imagenet", *SMALL_DATASETS]
FIGURE_FORMATS = ("png", "pdf", "svg")
DATASET_ALIASES = {"tiny-imagenet-200": "tiny-imagenet", "tiny_imagenet": "tiny-imagenet", "fake": "shapes"}

COMMON_OPTIONS = {  # single options of several commands: name -> arguments of Parser.option()
    "data_dir": {
        "metavar": "DIR",
        "default": "data",
        "help": "folder that contains the dataset, or the folder of the dataset itself",
    },
    "val_data_dir": {"metavar": "DIR", "help": "separate folder of the evaluation images"},
    "val_labels": {"metavar": "FILE", "help": "labels of a flat val/ folder: a file with one `file class` per line"},
    "download": {"type": boolean, "default": True, "help": "download the dataset (CIFAR, VOC) if it is missing"},
    "num_classes": {
        "type": int_at_least(2),
        "help": "number of classes: for shapes 2 to 10, otherwise only checked against the data",
    },
    "image_size": {"type": int_at_least(8), "metavar": "PIXELS", "help": "side of the images in pixels"},
    "interpolation": {
        "type": choice(["bilinear", "bicubic"]),
        "default": "bilinear",
        "help": "how images are resized, always with anti-aliasing",
    },
    "limit": {
        "type": int_at_least(),
        "default": 0,
        "help": "number of training and of test images, spread over the classes; 0: all",
    },
    "on_bad_image": {
        "type": choice(["stop", "skip"]),
        "default": "stop",
        "help": "what to do with a file that cannot be read; skip: leave it out (training: use another one instead)",
    },
    "norm": {
        "type": choice(["own", "imagenet", "half", "cifar", "clip", "dpn", "unit"]),
        "help": "mean and std of the images: of the dataset (folder: ImageNet's; shapes: 0.5), of ImageNet, 0.5, those "
        "of many codes for CIFAR, of CLIP or DPN networks, or 0 and 1",
    },
    "class_list": {"metavar": "FILE", "help": "all class names of the network in order, one per line or in a .csv"},
    "annotation_path": {
        "metavar": "PATH",
        "shown": "that of the dataset",
        "help": "ground-truth boxes: a folder of XML files, a .csv with file,xmin,ymin,xmax,ymax, or a .json; "
        "Tiny-ImageNet and shapes have their own",
    },
    "model": {
        "metavar": "NAME",
        "shown": "from the file",
        "help": "network architecture, of this project, torchvision:NAME or timm:NAME",
    },
    "model_args": {
        "type": key_value,
        "nargs": "+",
        "metavar": "KEY=VALUE",
        "shown": "from the file",
        "help": "arguments of the constructor of a torchvision: or timm: network",
    },
    "layer": {
        "metavar": "NAME",
        "shown": "input of the average pooling",
        "help": "layer whose activations are used; not with cam and attention",
    },
    "casm": {"metavar": "FILE", "help": "trained mask network of casm, made by python -m saliency.casm train"},
    "seed": {"type": int_at_least(0, MAX_SEED), "default": 0, "help": "seed of all random numbers"},
    "deterministic": {"type": boolean, "default": False, "help": "use deterministic CUDA kernels (slower)"},
    "overwrite": {"type": boolean, "default": False, "help": "replace an earlier run of the same name"},
    "print_freq": {"type": int_at_least(1), "default": 100, "help": "log the loss every N steps"},
    "no_progress": {"type": boolean, "default": False, "help": "print plain lines instead of progress bars"},
    "dpi": {"type": int_at_least(10, 2400), "default": 110, "help": "dots per inch of the figures; 300 for print"},
    "figure_format": {
        "type": choice(FIGURE_FORMATS),
        "default": FIGURE_FORMATS[0],
        "help": "file type of the figures",
    },
}


def add_common_options(parser: Parser, *names: str, **changes: dict) -> None:
    """Add options of COMMON_OPTIONS by name. changes: name -> entries that replace those of its declaration."""
    for name in [*names, *changes]:
        parser.option(f"--{name}", **COMMON_OPTIONS[name] | changes.get(name, {}))


def add_data_options(
    parser: Parser,
    datasets: list[str],
    image_size: int | None = None,
    norm: str = "own",
    dataset_default: str = "recipe",
) -> None:
    """Add the options of the training and evaluation images. dataset_default: what --help shows for --dataset."""
    parser.group("data")
    add_dataset_option(parser, datasets, shown=dataset_default)
    add_common_options(parser, "data_dir", "download")
    add_image_set_options(parser, image_size, shown="32; tiny-imagenet and folder 64; imagenet 224")
    parser.option(
        "--eval_resize",
        type=int_at_least(8),
        shown="image_size; 256 on ImageNet",
        help="shorter side of evaluation images before the centre crop",
    )
    add_common_options(parser, "interpolation", norm={"default": norm})


def add_dataset_option(
    parser: Parser,
    datasets: list[str],
    *,
    aliases: dict[str, str] = DATASET_ALIASES,
    dataset: str | None = None,
    shown: str | None = None,
) -> None:
    """Add --dataset. shown: what --help shows as its default if the default is None."""
    parser.option("--dataset", type=choice(datasets, aliases), default=dataset, shown=shown)


def add_image_set_options(parser: Parser, image_size: int | None = None, *, shown: str) -> None:
    """Add the options for the images of a dataset that are read. shown: the default size in --help if it is None."""
    add_common_options(parser, "val_data_dir", "val_labels", "num_classes", "limit", "on_bad_image")
    add_common_options(parser, image_size={"default": image_size, "shown": shown})


def add_imagenet_options(parser: Parser) -> None:
    """Add the options that only training on large images has."""
    parser.group("imagenet")
    parser.option(
        "--phases",
        metavar="END:FOLDER:CROP:MIN_SCALE:BATCH,...",
        shown="recipe",
        help="training phases: up to epoch END, on FOLDER (small, large or original)",
    )
    parser.option(
        "--data_small", metavar="DIR", help="small copies of the images (shorter side 160), made by --resize_to"
    )
    parser.option("--data_large", metavar="DIR", help="large copies of the images (shorter side 352)")
    parser.option("--crop_size", type=int_at_least(8), shown="image_size", help="side of the random crops in pixels")
    parser.option(
        "--zero_init",
        type=boolean,
        default=False,
        help="start residual blocks as the identity and the last layer as N(0, 0.01)",
    )
    parser.option(
        "--resize_to",
        type=int_list,
        nargs="+",
        metavar="PIXELS",
        help="write copies with these shorter sides to --resize_dest, and exit",
    )
    parser.option("--resize_dest", metavar="DIR", help="where --resize_to writes: DIR/160, DIR/352, ...")
    parser.defaults["phase_options"] = []  # only recipes set it


def add_single_device_options(parser: Parser, amp: str = "auto", workers: bool = True) -> None:
    """Add the options of a command with one process. amp: the default precision. workers: whether it has --workers."""
    parser.group("device")
    parser.option("--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option(
        "--amp",
        type=choice(["auto", "off", "bf16", "fp16"]),
        default=amp,
        help="mixed precision; auto: bf16 if the device runs it faster",
    )
    if workers:
        parser.option(
            "--workers", "-j", type=int_at_least(), default=4, help="processes that read and decode image files"
        )
    parser.option("--debug", type=boolean, default=False, help="show the traceback of an error")


def add_device_options(parser: Parser, amp: str = "auto") -> None:
    """Add the options of a command that also runs under torchrun. amp: the default precision."""
    add_single_device_options(parser, amp)
    parser.option("--channels_last", type=boolean, default=True, help="use the channels_last memory format")
    parser.option(
        "--timeout",
        type=float_in_range(1, 1e6),
        default=600.0,
        metavar="SECONDS",
        help="torchrun: how long a process waits for the others before it fails",
    )
    parser.hidden_options(LEGACY_DEVICE_OPTIONS)
