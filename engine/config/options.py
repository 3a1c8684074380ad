"""The options that the scripts share, by group. engine/config/resolve.py says what follows from several of them."""

from engine.config.parser import (
    Parser,
    boolean,
    choice,
    choices,
    float_in_range,
    fraction_or_off,
    int_at_least,
    int_list,
)

SMALL_DATASETS = ["cifar10", "cifar100", "tiny-imagenet", "folder", "shapes"]
LARGE_DATASETS = ["imagenet", "tiny-imagenet", "folder"]
DATASETS = ["imagenet", *SMALL_DATASETS]
DATASET_ALIASES = {"tiny-imagenet-200": "tiny-imagenet", "tiny_imagenet": "tiny-imagenet", "fake": "shapes"}
SCHEDULERS = {"multisteplr": "multistep", "onecyclelr": "onecycle", "step": "multistep"}


def add_single_device_options(parser: Parser, amp: str = "auto", workers: bool = True) -> None:
    """What every program has. amp: the default precision. workers: whether it reads many files."""
    parser.group("device")
    parser.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.option(
        "--amp",
        type=choice(["auto", "off", "bf16", "fp16"]),
        default=amp,
        metavar="MODE",
        help="auto, off, bf16 or fp16; auto: bf16 where the device runs it faster",
    )
    if workers:
        parser.option(
            "--workers",
            "-j",
            "--num_workers",
            type=int_at_least(),
            default=4,
            help="processes that read image files; CIFAR, Tiny-ImageNet and shapes live on the device and need none",
        )
    parser.option("--debug", type=boolean, default=False, help="show the traceback of an error")


def add_device_options(parser: Parser, amp: str = "auto") -> None:
    """What the scripts have that also run under torchrun. amp: the default precision."""
    add_single_device_options(parser, amp)
    parser.option("--ngpu", type=int_at_least(), help="0 means --device cpu, 1 one GPU")
    parser.option("--use_fp16", type=boolean, default=False, help="same as --amp fp16")
    parser.option("--channels_last", type=boolean, default=True, help="keep images and weights channels last")
    parser.option(
        "--timeout",
        type=float_in_range(1),
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: how long a process waits for the others before the run ends with an error",
    )


def add_data_options(
    parser: Parser, datasets: list[str], image_size: int | None = None, norm: str = "own", named_by: str = "recipe"
) -> None:
    """image_size, norm: the defaults. named_by: what names the data set where nobody does."""
    parser.group("data")
    parser.option(
        "--dataset", type=choice(datasets, DATASET_ALIASES), shown=named_by, metavar="NAME", help=", ".join(datasets)
    )
    parser.option(
        "--data_dir", "--data", default="data", help="the folder that holds the data set, or the data set's own folder"
    )
    parser.option("--val_data_dir", help="another place for the evaluation images")
    parser.option("--download", type=boolean, default=True, help="fetch CIFAR when it is missing")
    parser.option(
        "--image_size",
        type=int_at_least(8),
        default=image_size,
        shown=str(image_size or "32; tiny-imagenet and folder 64; imagenet 224"),
        help="side in pixels",
    )
    parser.option(
        "--eval_resize",
        type=int_at_least(8),
        shown="image_size; 256 on ImageNet",
        help="scale evaluation images to this shorter side, then cut out the centre",
    )
    parser.option("--val_labels", metavar="FILE", help="classes of a flat val/ folder: lines `file wnid`")
    parser.option(
        "--norm",
        type=choice(["own", "imagenet", "half"]),
        metavar="NAME",
        default=norm,
        help="mean and std of the data set (own), of ImageNet, or 0.5",
    )
    parser.option(
        "--num_classes",
        type=int_at_least(2),
        help="shapes: how many of its ten classes; elsewhere it must agree with the data",
    )
    parser.option("--limit", type=int_at_least(), default=0, help="use the first N images of each part only; 0: all")
    parser.option(
        "--on_bad_image",
        type=choice(["stop", "skip"]),
        default="stop",
        metavar="stop|skip",
        help="what to do with a file that is no image",
    )


def add_imagenet_options(parser: Parser) -> None:
    """What only training on large images has."""
    parser.group("imagenet")
    parser.option(
        "--phases",
        metavar="END:FOLDER:CROP:MIN_SCALE:BATCH,...",
        shown="recipe",
        help="stretches of epochs, each up to END, with images from FOLDER (small, large or original) of their own",
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
        "--zero_init",
        type=boolean,
        default=False,
        help="residual blocks start as the identity, the last layer's weights as N(0, 0.01)",
    )
    parser.option("--pretrained", type=boolean, default=False, help="start from torchvision's weights for ImageNet")
    parser.option(
        "--resize_to",
        type=int_list,
        nargs="+",
        metavar="PIXELS",
        help="only make copies of --data_dir with these shorter sides, in --resize_dest, and exit",
    )
    parser.option("--resize_dest", metavar="DIR", help="where to: DIR/160, DIR/352 ...")
    parser.defaults["phase_options"] = []  # set by recipes only


def add_training_options(
    parser: Parser,
    *,
    models: dict,
    model_aliases: dict,
    methods: dict,
    method_aliases: dict,
    recipes: list[str],
    recipe: str,
) -> None:
    """recipes: names to choose from; recipe: the default."""
    parser.group("run")
    parser.option(
        "--method",
        type=choices(methods, method_aliases),
        nargs="+",
        default=["none"],
        metavar="NAME",
        help=", ".join(methods) + "; several: one drawn at random for each batch",
    )
    parser.option(
        "--recipe",
        type=choice(recipes),
        default=recipe,
        metavar="NAME",
        help=f"{', '.join(recipes)}: fills in what is not given"
        + ("; auto goes by data set and method" if "auto" in recipes else ""),
    )
    parser.option(
        "--model",
        "--arch",
        "--model_name",
        type=choice(models, model_aliases),
        metavar="NAME",
        shown="recipe",
        help="--list_models names them",
    )
    parser.option("--list_models", type=boolean, default=False, help="names and parameter counts, then exit")
    add_resume_options(parser)
    parser.option(
        "--init_from", metavar="FILE", help="start from these weights; another number of classes gets a new last layer"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --checkpoint once and exit")
    parser.option("--compile", type=boolean, default=False, help="torch.compile the network")
    parser.option(
        "--profile",
        type=int_at_least(),
        default=0,
        metavar="N",
        help="time N steps, split into data, saliency, mixing and network, and exit",
    )

    parser.group("training")
    parser.option("--epochs", "--cnn_epoch", type=int_at_least(1), shown="recipe")
    parser.option(
        "--batch_size",
        "--cnn_batch_size",
        "-b",
        type=int_at_least(1),
        shown="recipe",
        help="in total, over all processes",
    )
    parser.option(
        "--lr",
        "--learning_rate",
        type=float_in_range(),
        shown="recipe",
        help="with one-cycle: its peak unless --max_lr says so",
    )
    parser.option(
        "--accumulate",
        type=int_at_least(1),
        default=1,
        metavar="N",
        help="run each batch in N pieces, one after the other, and step on the mean of their gradients: saves memory",
    )
    parser.option("--momentum", type=float_in_range(0, 1), shown="recipe")
    parser.option("--nesterov", type=boolean, shown="recipe")
    parser.option("--weight_decay", "--decay", "--wd", type=float_in_range(), shown="recipe")
    parser.option(
        "--scheduler",
        type=choice(["multistep", "onecycle", "points", "cosine", "linear", "constant"], SCHEDULERS),
        shown="recipe",
        metavar="NAME",
        help="multistep, onecycle, points (--lr_points), cosine, linear or constant",
    )
    parser.option(
        "--schedule",
        "--milestones",
        type=int_at_least(1),
        nargs="+",
        metavar="EPOCH",
        shown="recipe",
        help="multistep: epochs after which the lr is multiplied",
    )
    parser.option(
        "--gammas",
        "--lr_step_gamma",
        type=float_in_range(),
        nargs="+",
        metavar="G",
        shown="recipe",
        help="one factor for all milestones, or one each",
    )
    parser.option("--max_lr", type=float_in_range(), shown="recipe, else --lr", help="peak of one-cycle")
    parser.option(
        "--div_factor", type=float_in_range(1e-9), shown="recipe", help="one-cycle starts at max_lr / div_factor"
    )
    parser.option(
        "--pct_start", type=float_in_range(0, 1), shown="recipe", help="one-cycle: share of the run that rises"
    )
    parser.option(
        "--final_div_factor",
        type=float_in_range(1e-9),
        shown="recipe",
        help="one-cycle ends at start / final_div_factor",
    )
    parser.option(
        "--lr_points",
        metavar="EPOCH:LR,...",
        help="scheduler points: rates at real-valued epochs, joined by straight lines; two at one epoch make a jump",
    )
    parser.option(
        "--warmup_epochs",
        type=float_in_range(),
        default=0.0,
        help="straight rise of the lr before any scheduler but one-cycle",
    )
    parser.option(
        "--loss",
        type=choice(["ce", "bce"]),
        shown="recipe",
        metavar="ce|bce",
        help="cross-entropy, or binary cross-entropy of the softmax",
    )
    parser.option("--sync_bn", type=boolean, default=False, help="batch norm over the images of all GPUs")
    parser.option("--no_decay_bn", type=boolean, default=False, help="no weight decay on the parameters of batch norm")
    parser.option("--label_smoothing", type=float_in_range(0, 1), default=0.0, help="of the mixed target")
    parser.option("--clip_grad", type=float_in_range(), default=0.0, help="largest gradient norm; 0: no limit")
    parser.option(
        "--ema",
        type=float_in_range(0, 1),
        default=0.0,
        help="decay of an average of the weights, evaluated and saved beside them",
    )
    parser.option(
        "--dropout",
        type=fraction_or_off,
        default=0.0,
        help="in the wide networks; the recipe saliencymix sets 0.3 there",
    )
    parser.option(
        "--trad_augment", "--data_augmentation", type=boolean, shown="recipe", help="random crop and horizontal flip"
    )
    parser.option(
        "--crop_padding", type=int_at_least(), shown="recipe", help="black pixels around the image before the crop"
    )
    parser.option("--drop_last", type=boolean, shown="recipe", help="leave out the last, short batch")
    parser.option(
        "--labels_per_class", type=int_at_least(), default=0, help="keep N training images of each class; 0: all"
    )
    parser.option(
        "--valid_labels_per_class",
        type=int_at_least(),
        default=0,
        help="N other training images of each class become a validation part, on which the best epoch is chosen",
    )
    parser.option(
        "--eval_every", type=int_at_least(1), default=1, help="epochs between evaluations; the last is always evaluated"
    )

    add_output_options(parser)
    parser.option(
        "--vis_epoch",
        type=int_at_least(),
        default=0,
        metavar="N",
        help="a picture of a mixed batch every N epochs; 0: never",
    )


def add_resume_options(parser: Parser) -> None:
    """What makes a run the same as another one, or its continuation."""
    parser.option("--config", metavar="FILE", help="options from the config.json of an earlier run; what is typed wins")
    parser.option(
        "--checkpoint",
        "--resume",
        metavar="PATH",
        help="continue: a file, a run folder, or auto: the run of --name, or else the newest of this kind",
    )
    parser.option("--force_config", type=boolean, default=False, help="continue even with other options")
    parser.option("--seed", type=int_at_least(), default=0, help="of everything random")
    parser.option("--deterministic", type=boolean, default=False, help="bit-exact kernels on CUDA; slower")


def add_output_options(parser: Parser, print_freq: int = 100, named_by: str = "METHOD") -> None:
    """Where a training run writes, and what it shows. named_by: what the names of unnamed runs begin with."""
    parser.group("output")
    parser.option("--root_dir", "--output_dir", default="runs", help="runs are kept in ROOT/DATASET/MODEL/NAME")
    parser.option("--name", "--tag", "--add_name", "--expname", shown=f"{named_by}_date-time", help="name of the run")
    parser.option("--overwrite", type=boolean, default=False, help="start anew in a folder that holds a run")
    parser.option("--log_off", type=boolean, default=False, help="keep no run folder")
    parser.option(
        "--save_every",
        "--save_epoch",
        type=int_at_least(),
        default=0,
        metavar="N",
        help="keep epoch_NNN.pt every N epochs; 0: never",
    )
    parser.option("--print_freq", type=int_at_least(1), default=print_freq, help="steps between looks at the loss")
    parser.option("--no_progress", type=boolean, default=False, help="plain lines instead of progress bars")
    parser.option(
        "--use_tensorboard", type=boolean, default=False, help="log to TensorBoard too (pip install tensorboard)"
    )
    parser.option("--use_wandb", type=boolean, default=False, help="log to Weights & Biases too (pip install wandb)")
    parser.option("--wandb_project", default="saliency-mixing")
    parser.option("--wandb_entity")
    parser.option("--wandb_name", shown="the run's")
    parser.option("--wandb_offline", type=boolean, default=False)
    parser.option("--wandb_key", help="better: the environment variable WANDB_API_KEY")
