"""The options of evaluate.py: their declaration, what follows from several of them, and which have no effect."""

from pathlib import Path

from engine.config import resolve
from engine.config.legacy_options import LEGACY_EVALUATION_OPTIONS
from engine.config.option_types import boolean, choice, choices, float_in_range, int_at_least, pixel_fraction
from engine.config.options import DATASETS, add_common_options, add_data_options, add_device_options
from engine.config.parser import Parser, check_output_path
from engine.config.phases import LARGE_SIDE
from saliency import CAM_METHODS

TASKS = {  # name -> what it reads besides the options that all tasks read: groups, and single options of other groups
    "accuracy": ("accuracy", "ece"),
    "robustness": ("robustness", "figure"),
    "calibration": ("calibration", "figure"),
    "ood": ("ood", "figure"),
    "localization": ("localization", "held_out", "figure"),
    "card": ("robustness", "calibration", "ood", "localization", "pictures"),
}
TASK_GROUPS = {"accuracy", *TASKS["card"]}
CARD_DEFAULTS = {"robust_images": 1000, "output": "card.json"}
ATTACKS = ("fgsm", "pgd")
BACKGROUNDS = ("clean", "rep", "noise")
BUILT_IN, NONE, ALEXNET = "built-in", "none", "alexnet"
REFERENCE_OPTIONS = {"task": "robustness", "attack": [NONE], "occlusion": False}  # its errors under corruption alone
TRAINED_OPTIONS = ["dataset", "data_dir", "val_data_dir", "val_labels", "image_size", "eval_resize", "num_classes"]
TRAINED_OPTIONS += ["limit", "on_bad_image"]  # where they are not typed, those that the classifier was trained with
FILE_DATASETS = ("imagenet", "tiny-imagenet", "folder")  # their images can be shown at any size
BOX_DATASETS = ("shapes", "tiny-imagenet")  # they bring true boxes


def severity(text: str) -> int:
    return int(choice("12345")(text))


def build_parser() -> Parser:
    parser = Parser("Evaluate one or more trained classifiers on the test images, which are never augmented.")
    parser.group("what")
    weights = "files of weights, run folders (best.pt), or NAME=FILE for a network of torchvision's"
    parser.option("--model_path", nargs="+", metavar="PATH", help=weights)
    parser.option("--info", type=boolean, default=False, help="tell what the files hold and evaluate nothing")
    parser.option("--task", type=choice(TASKS), default="accuracy")
    add_common_options(parser, "model", "class_list", "seed")
    parser.option("--ema", type=boolean, default=False, help="use the averaged weights of a run with --ema")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=500)
    parser.option("--output", "-o", metavar="FILE.json", help="everything as JSON; card: and FILE.md and FILE.png")
    add_task_options(parser)
    add_data_options(parser, DATASETS, dataset_default="from the file")
    add_device_options(parser, amp="off")
    parser.hidden_options(LEGACY_EVALUATION_OPTIONS)
    return parser


def add_task_options(parser: Parser) -> None:
    """A group of options for each task."""
    parser.group("accuracy")
    parser.option("--topk", type=int_at_least(1), nargs="+", default=[1, 5], help="accuracies to print")
    parser.option("--per_class", type=boolean, default=False, help="a table of the classes")
    parser.option("--confusion", metavar="FILE.png", help="a picture of what is mistaken for what")

    parser.group("calibration")
    parser.option(
        "--ece",
        type=int_at_least(),
        metavar="BINS",
        default=15,
        help="bins of the calibration errors; 0: leave them out",
    )
    parser.option(
        "--held_out",
        type=float_in_range(0.01, 0.9),
        default=0.2,
        metavar="SHARE",
        help="of the images, on which temperature and localisation thresholds are chosen; the figures are of the rest",
    )

    parser.group("robustness")
    parser.option("--attack", type=choices([*ATTACKS, NONE]), nargs="+", default=list(ATTACKS))
    parser.option(
        "--eps",
        type=pixel_fraction,
        nargs="+",
        metavar="E",
        shown="fgsm 4/255 and 8/255, pgd 4/255",
        help="largest change of a pixel in 0..1, as 8/255",
    )
    parser.option("--steps", type=int_at_least(1), nargs="+", default=[20], help="of pgd; several: a row each")
    parser.option("--step_size", type=pixel_fraction, metavar="S", shown="2/255", help="of pgd")
    parser.option(
        "--corruptions",
        default=BUILT_IN,
        metavar="DIR",
        help="built-in: fifteen kinds made on the device; none; or the folder of a published set (CIFAR-10-C, "
        "CIFAR-100-C, Tiny-ImageNet-C, ImageNet-C)",
    )
    parser.option(
        "--severities", type=severity, nargs="+", default=[1, 2, 3, 4, 5], metavar="S", help="of the built-in ones"
    )
    parser.option(
        "--reference",
        metavar="FILE",
        help="a classifier by whose errors those under corruption are divided (mCE); alexnet: the published ones",
    )
    parser.option("--occlusion", type=boolean, default=True, help="accuracy while more and more of the image is hidden")
    parser.option(
        "--robust_images",
        type=int_at_least(),
        shown="all; card: 1000",
        help="attacks, corruptions and occlusion take so many images from all over the set; 0: all",
    )

    parser.group("ood")
    parser.option(
        "--ood",
        nargs="+",
        metavar="WORD",
        shown="noise",
        help="images of none of the classes: a data set's name, NAME=DIR, a folder of pictures, noise or uniform",
    )

    parser.group("localization")
    add_common_options(parser, "annotation_path", "layer")
    parser.option("--method", type=choice(CAM_METHODS), default="cam")
    parser.option(
        "--th", type=float_in_range(0, 1), default=0.25, help="share of a map's maximum that counts as object"
    )
    parser.option(
        "--classic", type=boolean, default=False, help="sum maps over 3x3 cells and enlarge them bicubically first"
    )
    parser.option(
        "--background",
        type=choices(BACKGROUNDS),
        nargs="+",
        default=["clean"],
        help="rep: outside the boxes another image; noise: Gaussian noise there",
    )
    parser.option("--noise_std", type=float_in_range(), default=0.2, help="of the noisy background, in pixels of 0..1")
    parser.option(
        "--background_dir", metavar="DIR", help="ready-made images with the names of the data set's, a row more"
    )

    parser.group("pictures")
    parser.option("--figure", metavar="FILE.png", shown="card: beside --output", help="what the task measured, drawn")
    parser.option("--examples", type=int_at_least(), default=8, help="card: images shown with their maps")


def read_options(parser: Parser, argv: list[str] | None) -> tuple[dict, dict, list[str]]:
    """The typed options, all options, and notes on those without effect. A contradiction ends with a usage error."""
    typed, _ = resolve.read_options(parser, argv)
    if typed.get("task") == "card":
        parser.defaults |= CARD_DEFAULTS
    options = {**parser.defaults, **typed}
    if "model_path" not in typed:
        parser.error("--model_path FILE: which classifier shall be evaluated?")
    if options["confusion"] and len(options["model_path"]) > 1:
        parser.error("--confusion draws one classifier; give one --model_path")
    try:
        check_task(options)
    except ValueError as error:
        parser.error(str(error))
    for key in ("figure", "confusion"):
        if not (options[key] or ".png").endswith(".png"):
            parser.error(f"--{key} {options[key]}: the picture is a .png")
    for key in ("output", "figure", "confusion"):
        if options[key]:
            check_output_path(parser, f"--{key}", Path(options[key]))
    unused = {
        "without effect on an evaluation": [name for name in LEGACY_EVALUATION_OPTIONS if name in typed],
        "without effect here": list_unread(parser, typed, options),
    }
    notes = [f"{what}: {', '.join(f'--{name}' for name in names)}" for what, names in unused.items() if names]
    fixed = {"topk": [1, 5]} if options["task"] == "card" else {}
    if options["task"] not in ("robustness", "card") or options["corruptions"] == NONE:
        fixed["reference"] = None
    return typed | fixed, options | fixed, notes


def check_task(options: dict) -> None:
    """Raise ValueError, with the remedy, for options of the task that contradict each other."""
    task = options["task"]
    if task in ("robustness", "card"):
        if NONE in options["attack"] and len(set(options["attack"])) > 1:
            raise ValueError(f"--attack {' '.join(options['attack'])}: none excludes the others")
        if task == "robustness" and not measures_robustness(options):
            raise ValueError("--attack none --corruptions none --occlusion false: nothing is left to measure")
        if options["reference"] == ALEXNET and options["corruptions"] == BUILT_IN:
            raise ValueError(
                "--reference alexnet: its errors are those of the published images; name their folder with "
                "--corruptions DIR, or give the file of a classifier as reference"
            )
    if task == "calibration" and not options["ece"]:
        raise ValueError("--ece 0: without bins there are no calibration errors; give 1 or more")
    if task in ("localization", "card") and options["layer"] and options["method"] == "cam":
        raise ValueError(f"--layer {options['layer']}: --method cam has no choice of layers; take another, as gradcam")
    if task == "card" and options["output"] and not options["output"].endswith(".json"):
        raise ValueError(f"--output {options['output']}: of a card it is a .json; .md and .png come beside it")


def measures_robustness(options: dict) -> bool:
    return set(options["attack"]) != {NONE} or options["corruptions"] != NONE or options["occlusion"]


def list_unread(parser: Parser, typed: dict, options: dict) -> list[str]:
    """The typed options that nothing reads: those of other tasks, and of what is not measured."""
    read = set(TASKS[options["task"]])
    unread = parser.get_option_names(*(TASK_GROUPS - read)) - read
    if "pgd" not in options["attack"]:
        unread |= {"steps", "step_size"}
    if set(options["attack"]) == {NONE}:
        unread |= {"eps"}
    if options["corruptions"] != BUILT_IN:
        unread |= {"severities"}
    if options["corruptions"] == NONE:
        unread |= {"reference"}
    if "noise" not in options["background"]:
        unread |= {"noise_std"}
    return [key for key in typed if key in unread]


def list_measurements(options: dict) -> list[str]:
    """What the task consists of, by the names of evaluation.tasks.PLANNERS: a card of all that the images allow."""
    if options["task"] != "card":
        return [options["task"]]
    wanted = {
        "accuracy": True,
        "calibration": options["ece"],
        "robustness": measures_robustness(options),
        "ood": True,
        "localization": options["annotation_path"] or options["dataset"] in BOX_DATASETS,
        "pictures": options["examples"],
    }
    return [name for name, value in wanted.items() if value]


def add_trained_options(parser: Parser, typed: dict, options: dict, classifier) -> dict:
    """All options for one classifier: where data options are not typed, those it was trained with, and its own image
    size; norm is None then. A usage error where nothing names its data set.
    """
    trained = {key: classifier.options[key] for key in TRAINED_OPTIONS if key in classifier.options}
    options = {**options, **trained, "norm": None, **typed}
    if not options["dataset"]:
        parser.error(f"--dataset: {classifier.path} does not say what it was trained on; name it")
    if options["dataset"] in FILE_DATASETS and not options["image_size"] and classifier.image_size > LARGE_SIDE:
        options["image_size"] = classifier.image_size
        if options["dataset"] == "imagenet" and not options["eval_resize"]:
            options["eval_resize"] = classifier.resize
    return options
