"""The options that several commands share, in groups. A parameter named after an option is its default; where that is
None, a recipe or a file says the value. engine/config/resolve.py says what follows from several options together.
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


COMMON_OPTIONS = {  # single ones that commands of all kinds have: name -> how Parser.option declares them
    "data_dir": {"default": "data", "help": "the folder that holds the data set, or the data set's own folder"},
    "val_data_dir": {"metavar": "DIR", "help": "another place for the evaluation images"},
    "val_labels": {"metavar": "FILE", "help": "classes of a flat val/ folder: lines `file wnid`"},
    "download": {"type": boolean, "default": True, "help": "fetch the data set (CIFAR, VOC) where it is missing"},
    "num_classes": {
        "type": int_at_least(2),
        "help": "shapes: how many of its ten; elsewhere it must agree with the data",
    },
    "image_size": {"type": int_at_least(8), "metavar": "PIXELS", "help": "side in pixels"},
    "limit": {"type": int_at_least(), "default": 0, "help": "use the first N images of each part only; 0: all"},
    "on_bad_image": {"type": choice(["stop", "skip"]), "default": "stop", "help": "at a file that is no image"},
    "norm": {"type": choice(["own", "imagenet", "half"]), "help": "mean and std of the data set, of ImageNet, or 0.5"},
    "class_list": {"metavar": "FILE", "help": "all classes of the network in order, one a line or in a .csv"},
    "annotation_path": {
        "metavar": "PLACE",
        "shown": "that of the data set",
        "help": "true boxes: a folder of XML files, a .csv with file,xmin,ymin,xmax,ymax, or a .json; Tiny-ImageNet "
        "and shapes have their own",
    },
    "model": {"metavar": "NAME", "shown": "from the file", "help": "its network, ours or torchvision's"},
    "layer": {"metavar": "NAME", "shown": "what is averaged", "help": "whose maps are taken, but by cam"},
    "casm": {"metavar": "FILE", "help": "trained maps for the method or source casm, made by python -m saliency.casm"},
    "seed": {"type": int_at_least(), "default": 0, "help": "of everything random"},
    "deterministic": {"type": boolean, "default": False, "help": "bit-exact kernels on CUDA; slower"},
    "overwrite": {"type": boolean, "default": False, "help": "start afresh over an earlier run of this name"},
    "print_freq": {"type": int_at_least(1), "default": 100, "help": "log the loss every N steps"},
    "no_progress": {"type": boolean, "default": False, "help": "plain lines instead of progress bars"},
}


def add_common_options(parser: Parser, *names: str, **changes: dict) -> None:
    """Those of COMMON_OPTIONS that are named. changes: name -> what its declaration has otherwise."""
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
    """Everything about the training of a classifier but its data, its mixing and the device. methods, models: the
    packages `mixing` and `models`. recipes: their names; the first is the default. large_images: take only the networks
    for these, without the prefix of their names too.
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
    """What is run, and how."""
    names = models.IMAGENET_MODELS if large_images else models.MODELS
    aliases = models.ALIASES | (models.IMAGENET_ALIASES if large_images else {})
    auto = "; auto goes by data set and method" if "auto" in recipes else ""
    parser.group("run")
    parser.option(
        "--method",
        type=choices(methods.MIXERS, methods.ALIASES),
        nargs="+",
        default=["none"],
        help="several: one is drawn at random for each batch",
    )
    parser.option("--recipe", type=choice(recipes), default=recipes[0], help=f"fills in what is not given{auto}")
    parser.option(
        "--model", type=choice(names, aliases), metavar="NAME", shown="recipe", help="--list_models names them"
    )
    parser.option("--list_models", type=boolean, default=False, help="names and parameter counts, then exit")
    parser.option(
        "--init_from", metavar="FILE", help="start from these weights; another number of classes gets a new last layer"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --checkpoint once and exit")
    parser.option("--compile", type=boolean, default=False, help="torch.compile the network")
    parser.option("--profile", type=int_at_least(), default=0, help="time the parts of N steps, and exit")


def add_resume_options(parser: Parser) -> None:
    """What makes a run the continuation of another one, or the same again."""
    parser.option("--config", metavar="FILE", help="options from the config.json of an earlier run; what is typed wins")
    parser.option(
        "--checkpoint", metavar="PATH", help="run to resume: a file, a folder, or auto: that of --name, else the newest"
    )
    parser.option("--force_config", type=boolean, default=False, help="resume even with other options")
    add_common_options(parser, "seed", "deterministic")


def add_optimizer_options(
    parser: Parser,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
) -> None:
    """SGD."""
    parser.group("optimizer")
    parser.option(
        "--batch_size",
        "-b",
        type=int_at_least(1),
        default=batch_size,
        shown="recipe",
        help="in total over all processes",
    )
    parser.option("--lr", type=float_in_range(), default=lr, shown="recipe", help="learning rate")
    parser.option("--momentum", type=float_in_range(0, 1), default=momentum, shown="recipe")
    parser.option("--weight_decay", type=float_in_range(), default=weight_decay, shown="recipe")


def add_step_options(parser: Parser) -> None:
    """What an optimizer step does besides."""
    parser.option(
        "--accumulate", type=int_at_least(1), default=1, help="run a batch in N parts, step on their mean gradient"
    )
    parser.option("--clip_grad", type=float_in_range(), default=0.0, help="largest gradient norm; 0: no limit")
    parser.option(
        "--ema", type=float_in_range(0, 1), default=0.0, help="decay of a moving average of the weights, evaluated too"
    )


def add_schedule_options(parser: Parser) -> None:
    """The length of a run, its learning rate, and when it is evaluated."""
    parser.group("schedule")
    parser.option("--epochs", type=int_at_least(1), shown="recipe")
    parser.option("--scheduler", type=choice(SCHEDULERS, SCHEDULER_ALIASES), shown="recipe")
    parser.option(
        "--schedule",
        type=int_at_least(1),
        nargs="+",
        metavar="EPOCH",
        shown="recipe",
        help="epochs after which multistep multiplies the lr",
    )
    parser.option(
        "--gammas", type=float_in_range(), nargs="+", shown="recipe", help="one factor for all milestones, or one each"
    )
    parser.option("--max_lr", type=float_in_range(), shown="recipe, else --lr", help="peak of one-cycle")
    parser.option(
        "--div_factor", type=float_in_range(1e-9), shown="recipe", help="one-cycle starts at max_lr / div_factor"
    )
    parser.option(
        "--pct_start", type=float_in_range(0, 1), shown="recipe", help="one-cycle: share of the run that rises"
    )
    parser.option(
        "--final_div_factor", type=float_in_range(1e-9), shown="recipe", help="one-cycle ends at start / this factor"
    )
    parser.option(
        "--lr_points",
        metavar="EPOCH:LR,...",
        help="for points: joined by straight lines; two at one epoch: a jump",
    )
    parser.option("--warmup_epochs", type=float_in_range(), default=0.0, help="linear rise of the lr; not for onecycle")
    parser.option(
        "--eval_every", type=int_at_least(1), default=1, help="epochs between evaluations; the last is always evaluated"
    )


def add_regularization_options(parser: Parser) -> None:
    """The loss, and what keeps a classifier from overfitting besides mixing."""
    parser.group("training")
    parser.option("--nesterov", type=boolean, shown="recipe", help="Nesterov momentum")
    parser.option("--no_decay_bn", type=boolean, default=False, help="no weight decay on the parameters of batch norm")
    parser.option("--sync_bn", type=boolean, default=False, help="batch norm over the images of all GPUs")
    parser.option("--loss", type=choice(["ce", "bce"]), shown="recipe", help="cross-entropy, or binary of the softmax")
    parser.option("--label_smoothing", type=float_in_range(0, 1), default=0.0, help="of the mixed target")
    parser.option("--dropout", type=fraction_or_off, default=0.0, help="in wide networks; recipe saliencymix: 0.3")
    parser.option("--trad_augment", type=boolean, shown="recipe", help="random crop and horizontal flip")
    parser.option(
        "--crop_padding", type=int_at_least(), shown="recipe", help="black pixels around the image before the crop"
    )
    parser.option("--drop_last", type=boolean, shown="recipe", help="leave out the last, short batch")
    parser.option(
        "--labels_per_class", type=int_at_least(), default=0, help="keep N training images of each class; 0: all"
    )
    parser.option(
        "--valid_labels_per_class", type=int_at_least(), default=0, help="hold out N others to choose the best epoch"
    )


def add_output_options(parser: Parser, print_freq: int = 100, name_prefix: str = "METHOD") -> None:
    """Add the options that say where a training run writes and what it shows.

    name_prefix: first part of the name of a run without --name, for --help.
    """
    parser.group("output")
    parser.option("--root_dir", default="runs", help="runs are kept in ROOT/DATASET/MODEL/NAME")
    parser.option("--name", shown=f"{name_prefix}_date-time", help="name of the run")
    parser.option("--log_off", type=boolean, default=False, help="keep no run folder")
    parser.option("--save_every", type=int_at_least(), default=0, help="keep epoch_NNN.pt every N epochs; 0: never")
    add_common_options(parser, "overwrite", "no_progress", print_freq={"default": print_freq})
    parser.option(
        "--use_tensorboard", type=boolean, default=False, help="log to TensorBoard too (pip install tensorboard)"
    )
    parser.option("--use_wandb", type=boolean, default=False, help="log to Weights & Biases too (pip install wandb)")
    parser.option("--wandb_project", default="saliency-mixing")
    parser.option("--wandb_entity")
    parser.option("--wandb_name", shown="the run's")
    parser.option("--wandb_offline", type=boolean, default=False)
    parser.hidden_options(LEGACY_TRACKER_OPTIONS)


def add_data_options(
    parser: Parser,
    datasets: list[str],
    image_size: int | None = None,
    norm: str = "own",
    dataset_default: str = "recipe",
) -> None:
    """dataset_default: what --help shows as the default of --dataset."""
    parser.group("data")
    add_dataset_option(parser, datasets, shown=dataset_default)
    add_common_options(parser, "data_dir", "download")
    add_image_set_options(parser, image_size, shown="32; tiny-imagenet and folder 64; imagenet 224")
    parser.option(
        "--eval_resize",
        type=int_at_least(8),
        shown="image_size; 256 on ImageNet",
        help="shorter side of evaluation images, before the centre is cut out",
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
    """shown: what --help says of the default where that is None."""
    parser.option("--dataset", type=choice(datasets, aliases), default=dataset, shown=shown)


def add_image_set_options(parser: Parser, image_size: int | None = None, *, shown: str) -> None:
    """Which images of a data set are read, and at which size. shown: the size where the default is None."""
    add_common_options(parser, "val_data_dir", "val_labels", "num_classes", "limit", "on_bad_image")
    add_common_options(parser, image_size={"default": image_size, "shown": shown})


def add_imagenet_options(parser: Parser) -> None:
    """What only training on large images has."""
    parser.group("imagenet")
    parser.option(
        "--phases",
        metavar="END:FOLDER:CROP:MIN_SCALE:BATCH,...",
        shown="recipe",
        help="stretches of epochs: up to END, images from FOLDER: small, large or original",
    )
    parser.option("--data_small", metavar="DIR", help="copies with the shorter side 160, made by --resize_to")
    parser.option("--data_large", metavar="DIR", help="copies with the shorter side 352")
    parser.option("--crop_size", type=int_at_least(8), shown="image_size", help="side of the random crops in pixels")
    parser.option(
        "--min_scale", type=float_in_range(1e-6, 1), default=0.08, help="smallest share of the area that a crop takes"
    )
    parser.option(
        "--color_jitter", type=float_in_range(0, 1), default=0.0, help="of brightness, contrast and saturation"
    )
    parser.option(
        "--lighting", type=float_in_range(), default=0.0, help="standard deviation of the noise on the colours' PCA"
    )
    parser.option(
        "--zero_init", type=boolean, default=False, help="residual blocks start as the identity, last layer N(0, 0.01)"
    )
    parser.option("--pretrained", type=boolean, default=False, help="start from torchvision's weights for ImageNet")
    parser.option(
        "--resize_to",
        type=int_list,
        nargs="+",
        metavar="PIXELS",
        help="make copies with these shorter sides in --resize_dest, and exit",
    )
    parser.option("--resize_dest", metavar="DIR", help="where to: DIR/160, DIR/352 ...")
    parser.defaults["phase_options"] = []  # set by recipes only


def add_single_device_options(parser: Parser, amp: str = "auto", workers: bool = True) -> None:
    """What every command has. amp: the default precision. workers: whether it reads many files."""
    parser.group("device")
    parser.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option(
        "--amp", type=choice(["auto", "off", "bf16", "fp16"]), default=amp, help="auto: bf16 where it is faster"
    )
    if workers:
        parser.option("--workers", "-j", type=int_at_least(), default=4, help="processes that decode image files")
    parser.option("--debug", type=boolean, default=False, help="show the traceback of an error")


def add_device_options(parser: Parser, amp: str = "auto") -> None:
    """What the commands have that also run under torchrun. amp: the default precision."""
    add_single_device_options(parser, amp)
    parser.option("--channels_last", type=boolean, default=True, help="keep images and weights channels last")
    parser.option(
        "--timeout",
        type=float_in_range(1),
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: how long processes wait for each other before an error",
    )
    parser.hidden_options(LEGACY_DEVICE_OPTIONS)
