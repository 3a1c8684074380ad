"""The options that the CASM commands share, and the published presets. Importing this module does not import torch."""

from pathlib import Path

import models
from engine.config.option_types import boolean, choice, float_in_range, int_at_least, model_name, positive, run_name
from engine.config.options import DATASETS, add_common_options, add_dataset_option, add_image_set_options
from engine.config.parser import Parser
from engine.config.training_options import add_optimizer_options

FIRST_SNAPSHOT_ONLY = 10_000_000  # an smf so large that the pool only ever holds the first snapshot
SMALL_SET_BATCHES = 1000  # the published --pot is meant for ImageNet's 10,010 batches, not for fewer than these
PRESETS = {  # name -> options that it sets; lambda_r for the entropy form and for the adversarial form
    "F": {"fixed_classifier": True, "hp": 0.0, "smf": FIRST_SNAPSHOT_ONLY, "lambda_r": (2.5, 9.0)},
    "L": {"fixed_classifier": False, "hp": 0.0, "smf": FIRST_SNAPSHOT_ONLY, "lambda_r": (14.0, 18.0)},
    "FL": {"fixed_classifier": False, "hp": 0.5, "smf": FIRST_SNAPSHOT_ONLY, "lambda_r": (7.5, 11.0)},
    "L100": {"fixed_classifier": False, "hp": 0.5, "smf": 100, "lambda_r": (10.0, 17.0)},
    "L1000": {"fixed_classifier": False, "hp": 0.5, "smf": 1000, "lambda_r": (10.0, 17.0)},
}


def get_preset(name: str, adversarial: bool = False) -> dict[str, object]:
    """Return the options that --reproduce NAME sets."""
    options = dict(PRESETS[name])
    return options | {"lambda_r": options["lambda_r"][adversarial]}


def build_casm_parser(command: str, description: str, seed: int = 0) -> Parser:
    """Return a parser that declares which images are read. seed: the default of --seed."""
    parser = Parser(description, prog=f"python -m saliency.casm {command}", positional="DATA")
    if command == "train":
        parts, saved = "train/ and val/", "as for --classifier"
    else:
        parts, saved = "val/", "as for the checkpoint"
    parser.group("data")
    parser.option(
        "data", nargs="?", metavar="DATA", shown=saved, help=f"dataset folder: {parts} with one folder per class"
    )
    parser.option("--data_dir", dest="data", metavar="DATA", help="same as DATA, as the other scripts spell it")
    add_dataset_option(parser, DATASETS, shown=f"{saved}, else folder")
    add_image_set_options(parser, shown=f"{saved}, else 224")
    add_common_options(parser, seed={"default": seed})
    return parser


def add_classifier_options(parser: Parser, text: str) -> None:
    """Declare --classifier, --arch and --model_args. text: the help text of --classifier."""
    parser.option("--classifier", metavar="FILE", help=text)
    parser.option(
        "--arch",
        type=model_name(models, [*models.MODELS, *models.IMAGENET_ALIASES], models.ALIASES),
        metavar="NAME",
        shown="as saved in the file, else resnet50",
        help="its architecture, torchvision:NAME and timm:NAME included; for large images resnet18 to resnet152 have "
        "the ImageNet stem",
    )
    add_common_options(parser, "model_args")


def add_mask_options(parser: Parser) -> None:
    """Declare where score and eval get masks from."""
    parser.group("masks")
    parser.option("--casms_path", nargs="+", metavar="PATH", help="CASM checkpoints (.chk), or folders of them")
    parser.option(
        "--basics",
        metavar="FILE.py",
        help="your own extractor: defines load_model() and get_masks_and_check_predictions()",
    )
    parser.option("--toy", type=boolean, default=False, help="also use naive masks, for comparison")


def add_scoring_options(parser: Parser) -> None:
    """Declare the other options that score and eval share: batches and output."""
    parser.option("--batch_size", "-b", type=int_at_least(1), default=128, help="images per batch")
    parser.option("--pot", type=float_in_range(0, 1), default=1.0, help="fraction of the batches to use")
    parser.option(
        "--print_freq", type=int_at_least(1), default=10, help="without a progress bar: print a line every N batches"
    )
    parser.group("output")
    parser.option("--log_path", metavar="DIR", help="folder for the files of --save_to_file")
    parser.option(
        "--save_to_file",
        type=boolean,
        default=False,
        help="write one JSON file per checkpoint; skip checkpoints that have one already",
    )
    parser.option("--output", metavar="FILE.json", help="write all results to one file")


def check_scoring_options(parser: Parser, options: dict, others: list | None = None) -> None:
    """Exit with a usage error if there are no masks, or if a result could not be written later.

    others: further sources of masks, if any.
    """
    if not (options["casms_path"] or options["basics"] or options["toy"] or others):
        parser.error("no masks given: name a checkpoint with --casms-path FILE (or use --basics FILE.py or --toy)")
    if options["save_to_file"] and not options["log_path"]:
        parser.error("--save-to-file needs --log-path, the folder to write to")
    if options["output"] and not Path(options["output"]).resolve().parent.is_dir():
        parser.error(f"--output {options['output']}: its folder does not exist; create it, or name another file")
    if options["save_to_file"]:
        try:
            Path(options["log_path"]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--log-path {options['log_path']}: cannot create this folder ({error.strerror})")


def add_train_options(parser: Parser) -> None:
    """Declare all training options but those of the images and the device."""
    parser.group("models")
    add_classifier_options(
        parser, "trained classifier to start from; without it: torchvision's network with ImageNet weights"
    )
    add_common_options(parser, "norm")
    parser.option(
        "--casms_path", default="casms", metavar="DIR", help="folder for the checkpoint NAME.chk and its pool"
    )
    parser.option("--log_path", metavar="DIR", shown="casms_path", help="folder for NAME.log and plots of the training")
    parser.option("--name", "-n", type=run_name("--casms_path"), shown="PRESET_date-time", help="name of the run")
    add_method_options(parser)
    add_optimizer_options(parser, batch_size=128, lr=0.001, momentum=0.9, weight_decay=1e-4)
    add_casm_schedule_options(parser)
    parser.group("running")
    parser.option("--resume", metavar="FILE", help="resume from this .chk; auto: from that of --name, if it exists")
    add_common_options(parser, "overwrite", "print_freq", "no_progress", "deterministic", "dpi", "figure_format")


def add_method_options(parser: Parser) -> None:
    parser.group("method")
    parser.option(
        "--reproduce",
        type=choice([name.lower() for name in PRESETS]),
        help="published preset: sets the next four options where they are not given. f: fixed classifier; l: the "
        "current one; fl: the first and the current one; l100, l1000: a pool of past ones",
    )
    parser.option("--fixed_classifier", type=boolean, default=False, help="freeze the classifier")
    parser.option(
        "--hp",
        type=float_in_range(0, 1),
        default=0.5,
        help="probability of classifying the masked images with a past classifier",
    )
    parser.option(
        "--smf", type=int_at_least(1), default=1000, help="save the classifier to the pool every N iterations"
    )
    parser.option(
        "--lambda_r", type=float_in_range(), default=10.0, help="weight of the mask area in the decoder's loss"
    )
    parser.option("--f_size", type=int_at_least(1), default=30, help="size of the pool of past classifiers")
    parser.option(
        "--adversarial", type=boolean, default=False, help="masks maximize the classifier's loss instead of its entropy"
    )
    parser.option(
        "--upsample",
        type=choice(["nearest", "bilinear"]),
        default="nearest",
        help="interpolation from the decoder's grid to the image size",
    )
    parser.option("--width", type=int_at_least(1), default=64, help="channels of the decoder for each feature map")
    parser.option(
        "--pool_device",
        type=choice(["auto", "device", "host"]),
        default="auto",
        help="where to keep the pool; auto: on the GPU if it takes less than half of its free memory",
    )


def add_casm_schedule_options(parser: Parser) -> None:
    parser.group("schedule")
    parser.option("--epochs", type=int_at_least(1), default=60, help="number of epochs")
    parser.option(
        "--pot",
        type=float_in_range(0, 1),
        shown=f"0.2, as published; 1 below {SMALL_SET_BATCHES:,} batches",
        help="fraction of the training batches in each epoch",
    )
    parser.option(
        "--lr_casme", type=positive, default=0.001, help="learning rate of the decoder; --lr: of the classifier"
    )
    parser.option("--lrde", type=int_at_least(1), default=20, help="divide both learning rates by 10 every N epochs")
    parser.option(
        "--crop_padding",
        type=int_at_least(),
        shown="image_size / 16",
        help="padding in pixels before the random crop; for datasets of small images",
    )
