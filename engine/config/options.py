"""Declare the options that several commands share, in groups.

A parameter named after an option is its default. If it is None, a recipe or a file sets the value.
engine/config/resolve.py checks combinations of options.
"""

from types import ModuleType

from engine.config.legacy_options import LEGACY_DEVICE_OPTIONS, LEGACY_TRACKER_OPTIONS
from engine.config.option_types import boolean, choice, choices, float_in_range, fraction_or_off, int_at_least, int_list
from engine.config.parser import Parser

SMALL_DATASETS = ["cifar10", "cifar100", "tiny-imagenet", "folder", "shapes"]
LARGE_DATASETS = ["imagenet", "tiny-imagenet", "folder"]
DATASETS = ["imagenet", *SMALL_DATASETS]
DATASET_ALIASES = {"tiny-imagenet-200": "tiny-imagenet", "tiny_imagenet": "tiny-imagenet", "fake": "shapes"}
SCHEDULERS = ["multistep", "onecycle", "points", "cosine", "linear", "constant"]
SCHEDULER_ALIASES = {"multisteplr": "multistep", "onecyclelr": "onecycle", "step": "multistep"}


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
    "limit": {"type": int_at_least(), "default": 0, "help": "use only the first N images of each split; 0: all"},
    "on_bad_image": {
        "type": choice(["stop", "skip"]),
        "default": "stop",
        "help": "what to do with a file that cannot be read",
    },
    "norm": {
        "type": choice(["own", "imagenet", "half"]),
        "help": "mean and std of the images: of the dataset, of ImageNet, or 0.5",
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
        "help": "network architecture, of this project or of torchvision",
    },
    "layer": {
        "metavar": "NAME",
        "shown": "input of the average pooling",
        "help": "layer whose activations are used; not with cam",
    },
    "casm": {"metavar": "FILE", "help": "trained mask network of casm, made by python -m saliency.casm train"},
    "seed": {"type": int_at_least(), "default": 0, "help": "seed of all random numbers"},
    "deterministic": {"type": boolean, "default": False, "help": "use deterministic CUDA kernels (slower)"},
    "overwrite": {"type": boolean, "default": False, "help": "replace an earlier run of the same name"},
    "print_freq": {"type": int_at_least(1), "default": 100, "help": "log the loss every N steps"},
    "no_progress": {"type": boolean, "default": False, "help": "print plain lines instead of progress bars"},
}


def add_common_options(parser: Parser, *names: str, **changes: dict) -> None:
    """Add options of COMMON_OPTIONS by name. changes: name -> entries that replace those of its declaration."""
    for name in [*names, *changes]:
        parser.option(f"--{name}", **COMMON_OPTIONS[name] | changes.get(name, {}))


def add_training_options(
    parser: Parser,
    *,
    methods: ModuleType,
    models: ModuleType,
    recipes: list[str],
    large_images: bool = False,
) -> None:
    """Add all options for training a classifier, except those for data, mixing and device.

    methods, models: the packages `mixing` and `models`. recipes: their names; the first is the default. large_images:
    accept only the networks for large images, with or without the prefix of their names.
    """
    add_run_options(parser, methods=methods, models=models, recipes=recipes, large_images=large_images)
    add_resume_options(parser)
    add_optimizer_options(parser)
    add_step_options(parser)
    add_schedule_options(parser)
    add_regularization_options(parser)
    add_output_options(parser)
    parser.option("--vis_epoch", type=int_at_least(), default=0, help="draw a mixed batch every N epochs; 0: never")


def add_run_options(
    parser: Parser, *, methods: ModuleType, models: ModuleType, recipes: list[str], large_images: bool
) -> None:
    """Add the options that choose method, network and task."""
    names = models.IMAGENET_MODELS if large_images else models.MODELS
    aliases = models.ALIASES | (models.IMAGENET_ALIASES if large_images else {})
    auto = "; auto: chosen by dataset and method" if "auto" in recipes else ""
    parser.group("run")
    parser.option(
        "--method",
        type=choices(methods.MIXERS, methods.ALIASES),
        nargs="+",
        default=["none"],
        help="one of several is drawn at random for each batch",
    )
    parser.option(
        "--recipe", type=choice(recipes), default=recipes[0], help=f"sets the options that are not given{auto}"
    )
    parser.option(
        "--model",
        type=choice(names, aliases),
        metavar="NAME",
        shown="recipe",
        help="network architecture; see --list_models",
    )
    parser.option(
        "--list_models", type=boolean, default=False, help="print the networks and their number of parameters, and exit"
    )
    parser.option(
        "--init_from", metavar="FILE", help="initial weights; the last layer is new if the number of classes differs"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --checkpoint and exit")
    parser.option("--compile", type=boolean, default=False, help="compile the network with torch.compile")
    parser.option("--profile", type=int_at_least(), default=0, help="time the parts of N training steps, and exit")


def add_resume_options(parser: Parser) -> None:
    """Add the options that resume or repeat a run."""
    parser.option(
        "--config", metavar="FILE", help="take the options from the config.json of a run; those given here win"
    )
    parser.option(
        "--checkpoint",
        metavar="PATH",
        help="run to resume: a file, a run folder, or auto (the run of --name, else the newest)",
    )
    parser.option(
        "--force_config", type=boolean, default=False, help="resume even if the options differ from those of the run"
    )
    add_common_options(parser, "seed", "deterministic")


def add_optimizer_options(
    parser: Parser,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
) -> None:
    """Add the options of SGD."""
    parser.group("optimizer")
    parser.option(
        "--batch_size",
        "-b",
        type=int_at_least(1),
        default=batch_size,
        shown="recipe",
        help="images per step, over all processes",
    )
    parser.option("--lr", type=float_in_range(), default=lr, shown="recipe", help="learning rate")
    parser.option("--momentum", type=float_in_range(0, 1), default=momentum, shown="recipe", help="momentum of SGD")
    parser.option("--weight_decay", type=float_in_range(), default=weight_decay, shown="recipe", help="weight decay")


def add_step_options(parser: Parser) -> None:
    """Add the options of the optimizer step that do not depend on the optimizer."""
    parser.option(
        "--accumulate",
        type=int_at_least(1),
        default=1,
        help="split each batch into N parts and accumulate their gradients",
    )
    parser.option("--clip_grad", type=float_in_range(), default=0.0, help="maximum gradient norm; 0: no clipping")
    parser.option(
        "--ema",
        type=float_in_range(0, 1),
        default=0.0,
        help="decay of a moving average of the weights, also evaluated; 0: none",
    )


def add_schedule_options(parser: Parser) -> None:
    """Add the options for the length of a run, its learning rate and its evaluations."""
    parser.group("schedule")
    parser.option("--epochs", type=int_at_least(1), shown="recipe", help="passes over the training images")
    parser.option(
        "--scheduler", type=choice(SCHEDULERS, SCHEDULER_ALIASES), shown="recipe", help="learning-rate schedule"
    )
    parser.option(
        "--schedule",
        type=int_at_least(1),
        nargs="+",
        metavar="EPOCH",
        shown="recipe",
        help="multistep: epochs after which the learning rate is multiplied by --gammas",
    )
    parser.option(
        "--gammas",
        type=float_in_range(),
        nargs="+",
        shown="recipe",
        help="multistep: one factor for all epochs of --schedule, or one each",
    )
    parser.option("--max_lr", type=float_in_range(), shown="recipe, else --lr", help="onecycle: peak learning rate")
    parser.option(
        "--div_factor",
        type=float_in_range(1e-9),
        shown="recipe",
        help="onecycle: initial learning rate is max_lr / div_factor",
    )
    parser.option(
        "--pct_start", type=float_in_range(0, 1), shown="recipe", help="onecycle: fraction of the run before the peak"
    )
    parser.option(
        "--final_div_factor",
        type=float_in_range(1e-9),
        shown="recipe",
        help="onecycle: final learning rate is the initial one / this",
    )
    parser.option(
        "--lr_points",
        metavar="EPOCH:LR,...",
        help="points: interpolated linearly; two points at the same epoch make a jump",
    )
    parser.option(
        "--warmup_epochs",
        type=float_in_range(),
        default=0.0,
        help="linear warm-up of the learning rate; not with onecycle or points",
    )
    parser.option(
        "--eval_every", type=int_at_least(1), default=1, help="evaluate every N epochs and after the last one"
    )


def add_regularization_options(parser: Parser) -> None:
    """Add the options for the loss and for regularization other than mixing."""
    parser.group("training")
    parser.option("--nesterov", type=boolean, shown="recipe", help="use Nesterov momentum")
    parser.option("--no_decay_bn", type=boolean, default=False, help="no weight decay on batch norm parameters")
    parser.option("--sync_bn", type=boolean, default=False, help="synchronize batch norm over all processes")
    parser.option(
        "--loss",
        type=choice(["ce", "bce"]),
        shown="recipe",
        help="cross-entropy, or binary cross-entropy of the softmax",
    )
    parser.option(
        "--label_smoothing", type=float_in_range(0, 1), default=0.0, help="label smoothing of the mixed targets"
    )
    parser.option(
        "--dropout",
        type=fraction_or_off,
        default=0.0,
        help="dropout rate in wide residual networks; recipe saliencymix: 0.3",
    )
    parser.option("--trad_augment", type=boolean, shown="recipe", help="random crop and horizontal flip")
    parser.option(
        "--crop_padding",
        type=int_at_least(),
        shown="recipe",
        help="black border around the image before the random crop, in pixels",
    )
    parser.option("--drop_last", type=boolean, shown="recipe", help="skip the last batch of an epoch if it is smaller")
    parser.option(
        "--labels_per_class", type=int_at_least(), default=0, help="use only N training images per class; 0: all"
    )
    parser.option(
        "--valid_labels_per_class",
        type=int_at_least(),
        default=0,
        help="choose the best epoch on N held-out training images per class; 0: on the test images",
    )


def add_output_options(parser: Parser, print_freq: int = 100, name_prefix: str = "METHOD") -> None:
    """Add the options that say where a training run writes and what it shows.

    name_prefix: first part of the name of a run without --name, for --help.
    """
    parser.group("output")
    parser.option("--root_dir", metavar="DIR", default="runs", help="folder of all runs, as DIR/DATASET/MODEL/NAME")
    parser.option("--name", metavar="NAME", shown=f"{name_prefix}_date-time", help="name of the run")
    parser.option("--log_off", type=boolean, default=False, help="create no run folder")
    parser.option(
        "--save_every", type=int_at_least(), default=0, help="also save epoch_NNN.pt every N epochs; 0: never"
    )
    add_common_options(parser, "overwrite", "no_progress", print_freq={"default": print_freq})
    parser.option(
        "--use_tensorboard", type=boolean, default=False, help="also log to TensorBoard (pip install tensorboard)"
    )
    parser.option("--use_wandb", type=boolean, default=False, help="also log to Weights & Biases (pip install wandb)")
    parser.option("--wandb_project", metavar="NAME", default="saliency-mixing", help="project at Weights & Biases")
    parser.option("--wandb_entity", metavar="NAME", shown="your default", help="user or team at Weights & Biases")
    parser.option("--wandb_name", metavar="NAME", shown="that of the run", help="name at Weights & Biases")
    parser.option("--wandb_offline", type=boolean, default=False, help="log to disk only, to upload with wandb sync")
    parser.hidden_options(LEGACY_TRACKER_OPTIONS)


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
    add_common_options(parser, norm={"default": norm})


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
        "--min_scale",
        type=float_in_range(1e-6, 1),
        default=0.08,
        help="minimum area of a random crop as a fraction of the image",
    )
    parser.option(
        "--color_jitter", type=float_in_range(0, 1), default=0.0, help="jitter of brightness, contrast and saturation"
    )
    parser.option("--lighting", type=float_in_range(), default=0.0, help="standard deviation of the PCA colour noise")
    parser.option(
        "--zero_init",
        type=boolean,
        default=False,
        help="start residual blocks as the identity and the last layer as N(0, 0.01)",
    )
    parser.option("--pretrained", type=boolean, default=False, help="start from torchvision's ImageNet weights")
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
        type=float_in_range(1),
        default=600.0,
        metavar="SECONDS",
        help="torchrun: how long a process waits for the others before it fails",
    )
    parser.hidden_options(LEGACY_DEVICE_OPTIONS)
