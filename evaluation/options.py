"""What evaluate.py is told beyond the files and the data, a group of options for each task."""

from engine.config.option_types import boolean, choice, choices, float_in_range, int_at_least, pixel_fraction
from engine.config.parser import Parser
from evaluation import ATTACKS

TASKS = {  # name -> the options that it reads, besides those that all read: groups, and single ones of other groups
    "accuracy": ("accuracy", "ece"),
    "robustness": ("robustness", "figure"),
    "calibration": ("calibration", "figure"),
    "ood": ("ood", "figure"),
    "localization": ("localization", "held_out", "figure"),
    "card": ("robustness", "calibration", "ood", "localization", "pictures"),
}
GROUPS = {"accuracy", *TASKS["card"]}
BACKGROUNDS = ("clean", "rep", "noise")
BUILT_IN, NONE, ALEXNET = "built-in", "none", "alexnet"


def severity(text: str) -> int:
    return int(choice("12345")(text))


def task_options(parser: Parser, methods: tuple[str, ...]) -> None:
    """methods: of class activation maps."""
    parser.group("accuracy")
    parser.option("--topk", type=int_at_least(1), nargs="+", default=[1, 5], metavar="K", help="accuracies to print")
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
    parser.option(
        "--attack",
        type=choices([*ATTACKS, NONE]),
        nargs="+",
        default=list(ATTACKS),
        metavar="NAME",
        help=f"{', '.join(ATTACKS)}, or none",
    )
    parser.option(
        "--eps",
        type=pixel_fraction,
        nargs="+",
        metavar="E",
        shown="fgsm 4/255 and 8/255, pgd 4/255",
        help="largest change of a pixel in 0..1, as 8/255",
    )
    parser.option(
        "--steps", type=int_at_least(1), nargs="+", default=[20], metavar="N", help="of pgd; several: a row each"
    )
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
        metavar="N",
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
    parser.option(
        "--annotation_path",
        metavar="PLACE",
        shown="that of the data set",
        help="true boxes: a folder of XML files, a .csv with file,xmin,ymin,xmax,ymax, or a .json; Tiny-ImageNet and "
        "shapes have their own",
    )
    parser.option("--method", type=choice(methods), default="cam", metavar="NAME", help=", ".join(methods))
    parser.option("--layer", metavar="NAME", shown="what is averaged", help="whose maps are taken, but by cam")
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
        metavar="NAME",
        help="clean; rep: outside the boxes another image; noise: Gaussian noise there",
    )
    parser.option(
        "--noise_std",
        type=float_in_range(),
        default=0.2,
        metavar="S",
        help="of the noisy background, in pixels of 0..1",
    )
    parser.option(
        "--background_dir", metavar="DIR", help="ready-made images with the names of the data set's, a row more"
    )

    parser.group("pictures")
    parser.option("--figure", metavar="FILE.png", shown="card: beside --output", help="what the task measured, drawn")
    parser.option("--examples", type=int_at_least(), default=8, metavar="N", help="card: images shown with their maps")


def check_task(task: str, options: dict) -> None:
    """Raise ValueError, with the remedy, for options of a task that contradict each other."""
    if task in ("robustness", "card"):
        if NONE in options["attack"] and len(set(options["attack"])) > 1:
            raise ValueError(f"--attack {' '.join(options['attack'])}: none excludes the others")
        if task == "robustness" and not asks_robustness(options):
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


def reads_reference(task: str, options: dict) -> bool:
    return bool(options["reference"]) and task in ("robustness", "card") and options["corruptions"] != NONE


def asks_robustness(options: dict) -> bool:
    return set(options["attack"]) != {NONE} or options["corruptions"] != NONE or options["occlusion"]


def without_effect(parser: Parser, task: str, typed: dict) -> list[str]:
    """The typed options that nothing reads: those of other tasks, and of what is not measured."""
    read = set(TASKS[task])
    unread = parser.group_of(*(GROUPS - read)) - read
    options = {**parser.defaults, **typed}
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
    return [f"--{key}" for key in typed if key in unread]
