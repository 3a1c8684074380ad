"""Declare the options of training runs: run, resume, optimizer, schedule, regularization, output.

A parameter named after an option is its default. If it is None, a recipe or a file sets the value.
"""

from types import ModuleType

from engine.config.augmentation_options import add_augmentation_options
from engine.config.control_options import add_control_options
from engine.config.legacy_options import LEGACY_TRACKER_OPTIONS
from engine.config.option_types import (
    boolean,
    choice,
    choices,
    float_in_range,
    fraction_below_one,
    fraction_or_off,
    int_at_least,
    model_name,
    optimizer_name,
    positive,
    run_name,
    seed_list,
    yes_no_or_path,
)
from engine.config.options import add_common_options
from engine.config.parser import Parser
from engine.config.recipes import RECIPE_ALIASES

SCHEDULERS = ["multistep", "onecycle", "points", "cosine", "cosine_step", "linear", "constant"]
SCHEDULER_ALIASES = {"multisteplr": "multistep", "onecyclelr": "onecycle", "step": "multistep"}
LOSSES = ["ce", "softmax_bce", "sigmoid_bce"]
LOSS_ALIASES = {"bce": "softmax_bce"}


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
    add_optimizer_options(parser, others=True)
    add_step_options(parser)
    add_schedule_options(parser)
    add_regularization_options(parser)
    add_augmentation_options(parser, large_images=large_images)
    add_control_options(parser)
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
        "--recipe",
        type=choice(recipes, RECIPE_ALIASES),
        default=recipes[0],
        help=f"sets the options that are not given{auto}",
    )
    parser.option(
        "--model",
        type=model_name(models, names, aliases),
        metavar="NAME",
        shown="recipe",
        help="network architecture, torchvision:NAME and timm:NAME included; see --list_models",
    )
    add_common_options(parser, model_args={"default": {}, "shown": None})
    parser.option(
        "--list_models", type=boolean, default=False, help="print the networks and their number of parameters, and exit"
    )
    parser.option(
        "--pretrained",
        type=yes_no_or_path,
        nargs="?",
        const=True,
        default=False,
        metavar="WEIGHTS",
        help="start from the library's ImageNet weights, with their mean, std, image size and interpolation; WEIGHTS: "
        "IMAGENET1K_V2, a tag of timm, or a file of them",
    )
    parser.option(
        "--init_from", metavar="FILE", help="initial weights; the last layer is new if the number of classes differs"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --checkpoint and exit")
    parser.option(
        "--compile", type=boolean, default=False, help="compile the network with torch.compile; pays in long runs only"
    )
    parser.option(
        "--graph_step",
        type=boolean,
        default=False,
        help="capture the network's forward and backward passes as CUDA graphs (one GPU)",
    )
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
    parser.option(
        "--seeds",
        type=seed_list,
        nargs="+",
        default=[],
        help="train one run per seed, in NAME/seed_N, and print mean and standard deviation",
    )


def add_optimizer_options(
    parser: Parser,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    others: bool = False,
) -> None:
    """Add the options of SGD, and with others=True the choice of another optimizer."""
    parser.group("optimizer")
    if others:
        parser.option(
            "--optimizer",
            type=optimizer_name,
            default="sgd",
            help="sgd, adamw, or timm:NAME, such as timm:lamb (pip install timm)",
        )
    parser.option(
        "--batch_size",
        "-b",
        type=int_at_least(1),
        default=batch_size,
        shown="recipe",
        help="images per step, over all processes",
    )
    parser.option("--lr", type=positive, default=lr, shown="recipe", help="learning rate")
    parser.option("--momentum", type=fraction_below_one, default=momentum, shown="recipe", help="momentum of SGD")
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
        type=fraction_below_one,
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
        type=positive,
        nargs="+",
        shown="recipe",
        help="multistep: one factor for all epochs of --schedule, or one each",
    )
    parser.option("--max_lr", type=positive, shown="recipe, else --lr", help="onecycle: peak learning rate")
    parser.option(
        "--div_factor",
        type=float_in_range(1e-9),
        shown="recipe",
        help="onecycle: initial learning rate is max_lr / div_factor",
    )
    parser.option(
        "--pct_start", type=fraction_below_one, shown="recipe", help="onecycle: fraction of the run before the peak"
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
    parser.option(
        "--sync_bn",
        type=boolean,
        default=False,
        help="synchronize batch norm over all processes; every layer then waits for the GPU",
    )
    parser.option(
        "--loss",
        type=choice(LOSSES, LOSS_ALIASES),
        shown="recipe",
        help="cross-entropy, or binary cross-entropy of the softmax or of the sigmoid",
    )
    parser.option(
        "--label_smoothing",
        type=fraction_below_one,
        default=0.0,
        help="label smoothing of the mixed targets; not of the clean images that some methods also train on",
    )
    parser.option(
        "--dropout",
        type=fraction_or_off,
        default=0.0,
        help="dropout rate in wide residual networks; recipe saliencymix: 0.3",
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
    parser.group("figures", folded=True)
    add_common_options(parser, "dpi", "figure_format")
    parser.group("trackers", folded=True)
    parser.option(
        "--use_tensorboard", type=boolean, default=False, help="also log to TensorBoard (pip install tensorboard)"
    )
    parser.option("--use_wandb", type=boolean, default=False, help="also log to Weights & Biases (pip install wandb)")
    parser.option("--wandb_project", metavar="NAME", default="saliency-mixing", help="project at Weights & Biases")
    parser.option("--wandb_entity", metavar="NAME", shown="your default", help="user or team at Weights & Biases")
    parser.option("--wandb_name", metavar="NAME", shown="that of the run", help="name at Weights & Biases")
    parser.option("--wandb_offline", type=boolean, default=False, help="log to disk only, to upload with wandb sync")
    parser.hidden_options(LEGACY_TRACKER_OPTIONS)
    parser.group("output")
    parser.option("--root_dir", metavar="DIR", default="runs", help="folder of all runs, as DIR/DATASET/MODEL/NAME")
    parser.option("--name", type=run_name("--root_dir"), shown=f"{name_prefix}_date-time", help="name of the run")
    parser.option("--log_off", type=boolean, default=False, help="create no run folder")
    parser.option(
        "--save_every", type=int_at_least(), default=0, help="also save epoch_NNN.pt every N epochs; 0: never"
    )
    add_common_options(parser, "overwrite", "no_progress", print_freq={"default": print_freq})
