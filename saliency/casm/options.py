"""The options that the casm commands share, and the published presets. Importing this imports no torch."""

from pathlib import Path

from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import (
    DATASETS,
    add_common_options,
    add_dataset_option,
    add_image_set_options,
    add_optimizer_options,
)
from engine.config.parser import Parser
from models import ALIASES, IMAGENET_ALIASES, MODELS

NEVER = 10_000_000  # iterations between snapshots: there is only the first one
SMALL = 1000  # batches; published settings are for the 10,010 of ImageNet
PRESETS = {  # name -> what it sets; lambda_r for the entropy and for the adversarial form
    "F": {"fixed_classifier": True, "hp": 0.0, "smf": NEVER, "lambda_r": (2.5, 9.0)},
    "L": {"fixed_classifier": False, "hp": 0.0, "smf": NEVER, "lambda_r": (14.0, 18.0)},
    "FL": {"fixed_classifier": False, "hp": 0.5, "smf": NEVER, "lambda_r": (7.5, 11.0)},
    "L100": {"fixed_classifier": False, "hp": 0.5, "smf": 100, "lambda_r": (10.0, 17.0)},
    "L1000": {"fixed_classifier": False, "hp": 0.5, "smf": 1000, "lambda_r": (10.0, 17.0)},
}


def preset(name: str, adversarial: bool = False) -> dict[str, object]:
    """The options that --reproduce NAME sets."""
    chosen = dict(PRESETS[name])
    return chosen | {"lambda_r": chosen["lambda_r"][adversarial]}


def casm_parser(command: str, description: str) -> Parser:
    parser = Parser(description, prog=f"python -m saliency.casm {command}", positional=True)
    parser.group("data")
    parser.option(
        "data", nargs="?", metavar="DATA", help="the folder that holds train/ and val/, each with class folders"
    )
    parser.option("--data_dir", dest="data", metavar="DATA", help="the same, as the other scripts call it")
    return parser


def where_options(parser: Parser, seed: int = 0) -> None:
    """Which images. seed: its default."""
    add_dataset_option(parser, DATASETS, shown="that of the classifier, else folder")
    add_image_set_options(parser, shown="the classifier's, else 224")
    add_common_options(parser, seed={"default": seed})


def classifier_options(parser: Parser, what: str) -> None:
    parser.option("--classifier", metavar="FILE", help=what)
    parser.option(
        "--arch",
        type=choice([*MODELS, *IMAGENET_ALIASES], ALIASES),
        metavar="NAME",
        shown="from the file, else resnet50",
        help="its network; for large images resnet18 to resnet152 have the ImageNet stem",
    )


def scoring_options(parser: Parser) -> None:
    """What score and eval share."""
    parser.group("models")
    parser.option("--casms_path", nargs="+", metavar="PATH", help="files of trained maps, or folders of them")
    parser.option(
        "--basics", metavar="FILE.py", help="an extractor: load_model() and get_masks_and_check_predictions()"
    )
    parser.option("--batch_size", "-b", type=int_at_least(1), default=128)
    parser.option("--pot", type=float_in_range(0, 1), default=1.0, help="share of the batches used")
    parser.option("--print_freq", type=int_at_least(1), default=10, help="batches between lines, where there is no bar")
    parser.option("--toy", type=boolean, default=False, help="naive masks beside them")
    parser.group("output")
    parser.option("--log_path", metavar="DIR", help="where --save-to-file puts a JSON for each model")
    parser.option("--save_to_file", type=boolean, default=False, help="write them; done models are skipped")
    parser.option("--output", metavar="FILE.json", help="everything in one file")


def check_scoring(parser: Parser, options: dict, others: list | None = None) -> None:
    """A usage error where there is nothing to score, or no place to keep it: before the work, not after it."""
    if not (options["casms_path"] or options["basics"] or options["toy"] or others):
        parser.error("--casms-path FILE: which maps? (or --basics FILE.py, or --toy for naive ones)")
    if options["save_to_file"] and not options["log_path"]:
        parser.error("--save-to-file needs --log-path, the folder to write to")
    if options["output"] and not Path(options["output"]).resolve().parent.is_dir():
        parser.error(f"--output {options['output']}: there is no such folder to write to")
    if options["save_to_file"]:
        try:
            Path(options["log_path"]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--log-path {options['log_path']}: cannot be made ({error.strerror})")


def train_options(parser: Parser) -> None:
    """Everything about the training of maps but its images and the device."""
    parser.group("models")
    classifier_options(parser, "the trained classifier to start from; else ImageNet's, from torchvision")
    add_common_options(parser, "norm")
    parser.option("--casms_path", default="casms", metavar="DIR", help="where NAME.chk and its pool are written")
    parser.option("--log_path", metavar="DIR", shown="casms_path", help="where NAME.log and its curves are written")
    parser.option("--name", "-n", metavar="NAME", shown="date and time")
    method_options(parser)
    add_optimizer_options(parser, batch_size=128, lr=0.001, momentum=0.9, weight_decay=1e-4)
    schedule_options(parser)
    parser.group("running")
    parser.option("--resume", metavar="FILE", help="resume from this .chk; auto: from that of --name, if it is there")
    add_common_options(parser, "overwrite", "print_freq", "no_progress", "deterministic")


def method_options(parser: Parser) -> None:
    parser.group("method")
    parser.option(
        "--reproduce",
        type=choice([name.lower() for name in PRESETS]),
        help="a published set-up: sets the next four where they are not given",
    )
    parser.option("--fixed_classifier", type=boolean, default=False, help="the classifier learns nothing")
    parser.option("--hp", type=float_in_range(0, 1), default=0.5, help="chance that a past classifier judges the masks")
    parser.option("--smf", type=int_at_least(1), default=1000, help="iterations between snapshots of the classifier")
    parser.option("--lambda_r", type=float_in_range(), default=10.0, help="weight of the masks' area")
    parser.option("--f_size", type=int_at_least(1), default=30, help="snapshots kept")
    parser.option("--adversarial", type=boolean, default=False, help="masks raise the loss, not the entropy")
    parser.option("--upsample", type=choice(["nearest", "bilinear"]), default="nearest", help="of the masks")
    parser.option("--width", type=int_at_least(1), default=64, help="channels of the decoder's laterals")
    parser.option(
        "--pool_device",
        type=choice(["auto", "device", "host"]),
        default="auto",
        help="where the snapshots lie; auto: on the GPU while they take less than half of its free memory",
    )


def schedule_options(parser: Parser) -> None:
    parser.group("schedule")
    parser.option("--epochs", type=int_at_least(1), default=60)
    parser.option(
        "--pot",
        type=float_in_range(0, 1),
        shown=f"0.2, as published; 1 for sets of fewer than {SMALL:,} batches",
        help="share of the training batches in an epoch",
    )
    parser.option("--lr_casme", type=float_in_range(), default=0.001, help="of the decoder; --lr is the classifier's")
    parser.option("--lrde", type=int_at_least(1), default=20, help="epochs after which both drop to a tenth")
    parser.option(
        "--crop_padding", type=int_at_least(), shown="a sixteenth of the side", help="of small images, in pixels"
    )
