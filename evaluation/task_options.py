"""The options of the tasks of evaluate.py: how they are declared, which contradict each other, and which have no
effect.
"""

from engine.config.legacy_options import LEGACY_EVALUATION_OPTIONS
from engine.config.option_types import boolean, choice, choices, float_in_range, int_at_least, path, pixel_fraction
from engine.config.options import add_common_options
from engine.config.parser import Parser
from saliency import CAM_METHODS, FIXED_LAYER

TASKS = {  # name -> the option groups, and single options of other groups, that the task reads besides the common ones
    "accuracy": ("accuracy", "ece", "dpi"),
    "robustness": ("robustness", "figure", "dpi"),
    "calibration": ("calibration", "figure", "dpi"),
    "ood": ("ood", "figure", "dpi"),
    "localization": ("localization", "held_out", "figure", "dpi"),
    "card": ("robustness", "calibration", "ood", "localization", "pictures"),
}
PREDICT_OPTIONS = {"predict", "model_path", "model", "model_args", "class_list", "ema", "batch_size", "output", "topk"}
PREDICT_OPTIONS |= {"image_size", "eval_resize", "interpolation", "norm", "on_bad_image"}  # what --predict reads
EXPORT_OPTIONS = {"export", "model_path", "model", "model_args", "class_list", "ema", "dataset", "data_dir", "debug"}
EXPORT_OPTIONS |= {"val_data_dir", "val_labels", "num_classes", "image_size", "eval_resize", "interpolation", "norm"}
EXPORT_OPTIONS |= {"on_bad_image"}  # what --export reads
TASK_GROUPS = {"accuracy", *TASKS["card"]}
ATTACKS = ("fgsm", "pgd")
BACKGROUNDS = ("clean", "rep", "noise")
BUILT_IN, NONE, ALEXNET = "built-in", "none", "alexnet"
BOX_DATASETS = ("shapes", "tiny-imagenet")  # data sets with ground-truth boxes


def severity(text: str) -> int:
    """Option type: a severity from 1 to 5."""
    return int(choice("12345")(text))


def add_task_options(parser: Parser) -> None:
    """Add a group of options for each task."""
    parser.group("accuracy")
    parser.option(
        "--topk",
        type=int_at_least(1),
        nargs="+",
        default=[1, 5],
        help="top-k accuracies to print; --predict: the largest",
    )
    parser.option("--per_class", type=boolean, default=False, help="print the accuracy of each class")
    parser.option("--confusion", metavar="FILE", help="draw the confusion matrix in a .png, .pdf or .svg file")

    parser.group("calibration")
    parser.option(
        "--ece",
        type=int_at_least(),
        metavar="BINS",
        default=15,
        help="bins of the calibration errors; 0: do not compute them",
    )
    parser.option(
        "--held_out",
        type=float_in_range(0.01, 0.9),
        default=0.2,
        metavar="FRACTION",
        help="of the images, to choose the temperature and the thresholds of MaxBoxAccV2; the rest is scored",
    )

    parser.group("robustness")
    parser.option(
        "--attack", type=choices([*ATTACKS, NONE]), nargs="+", default=list(ATTACKS), help="white-box attacks"
    )
    parser.option(
        "--eps",
        type=pixel_fraction,
        nargs="+",
        metavar="E",
        shown="fgsm 4/255 and 8/255, pgd 4/255",
        help="L-infinity bound of the perturbation, for pixels in 0..1, such as 8/255",
    )
    parser.option(
        "--steps", type=int_at_least(1), nargs="+", default=[20], help="PGD steps; several values: one attack each"
    )
    parser.option("--step_size", type=pixel_fraction, metavar="S", shown="2/255, at most eps", help="PGD step size")
    parser.option(
        "--corruptions",
        default=BUILT_IN,
        metavar="DIR",
        help="built-in: 15 corruptions computed on the device; none; or the folder of a published set (CIFAR-10-C, "
        "CIFAR-100-C, Tiny-ImageNet-C, ImageNet-C)",
    )
    parser.option(
        "--severities",
        type=severity,
        nargs="+",
        default=[1, 2, 3, 4, 5],
        metavar="S",
        help="severities of the built-in corruptions",
    )
    parser.option(
        "--reference",
        metavar="FILE",
        help="checkpoint that the mean corruption error (mCE) is relative to; alexnet: its published errors",
    )
    parser.option(
        "--occlusion", type=boolean, default=True, help="measure accuracy as more and more of the image is hidden"
    )
    parser.option(
        "--robust_images",
        type=int_at_least(),
        shown="all; card: 1000",
        help="images for attacks, corruptions and occlusion, spread over the test set; 0: all",
    )

    parser.group("ood")
    parser.option(
        "--ood",
        type=path,
        nargs="+",
        metavar="SET",
        shown="noise",
        help="out-of-distribution images: the name of a data set, NAME=DIR, a folder of images, noise or uniform",
    )

    parser.group("localization")
    add_common_options(parser, "annotation_path", "layer")
    parser.option(
        "--method",
        type=choice(CAM_METHODS),
        shown="cam; gradcam for networks without cam",
        help="class activation map",
    )
    parser.option(
        "--th", type=float_in_range(0, 1), default=0.25, help="threshold of the map, as a fraction of its maximum"
    )
    parser.option(
        "--classic",
        type=boolean,
        default=False,
        help="sum maps over 3x3 cells and upsample them bicubically, as Co-Mixup did",
    )
    parser.option(
        "--background",
        type=choices(BACKGROUNDS),
        nargs="+",
        default=["clean"],
        help="outside the ground-truth boxes; rep: another image; noise: Gaussian noise is added",
    )
    parser.option(
        "--noise_std", type=float_in_range(), default=0.2, help="std of the background noise, for pixels in 0..1"
    )
    parser.option(
        "--background_dir", metavar="DIR", help="also evaluate on these images, named like those of the data set"
    )

    parser.group("pictures")
    parser.option(
        "--figure", metavar="FILE", shown="card: next to --output", help="draw the results in a .png, .pdf or .svg file"
    )
    add_common_options(parser, "dpi")
    parser.option("--examples", type=int_at_least(), default=8, help="card: number of images shown with their maps")


def check_task(options: dict) -> None:
    """Raise ValueError, with the remedy, if options of the task contradict each other."""
    task = options["task"]
    if task in ("robustness", "card"):
        if NONE in options["attack"] and len(set(options["attack"])) > 1:
            raise ValueError(f"--attack {' '.join(options['attack'])}: none cannot be combined with an attack")
        if task == "robustness" and not measures_robustness(options):
            raise ValueError(
                "--attack none --corruptions none --occlusion false: nothing is left to measure; switch one of them on"
            )
        if options["reference"] == ALEXNET and options["corruptions"] == BUILT_IN:
            raise ValueError(
                "--reference alexnet: its errors were measured on the images of ImageNet-C; give their folder with "
                "--corruptions DIR, or a checkpoint as the reference"
            )
    if task == "calibration" and not options["ece"]:
        raise ValueError("--ece 0: --task calibration needs bins; give 1 or more")
    method = options["method"] or "cam"
    if task in ("localization", "card") and options["layer"] and method in FIXED_LAYER:
        raise ValueError(
            f"--layer {options['layer']}: --method {method} always uses {FIXED_LAYER[method]}; choose another method, "
            "such as gradcam"
        )
    if task == "card" and options["output"] and not options["output"].endswith(".json"):
        raise ValueError(
            f"--output {options['output']}: --task card writes JSON, with .md, .html and .png next to it; give a file "
            "name ending in .json"
        )


def measures_robustness(options: dict) -> bool:
    """Return whether the options leave anything for the robustness task to measure."""
    return set(options["attack"]) != {NONE} or options["corruptions"] != NONE or options["occlusion"]


def find_unused_options(parser: Parser, typed: dict, options: dict) -> list[str]:
    """Return the typed options that have no effect: those of other tasks, and of measurements that are switched off.
    With --predict, only PREDICT_OPTIONS and those of the device have an effect; with --export, only EXPORT_OPTIONS.
    """
    if options["export"]:
        return [key for key in typed if key not in {*EXPORT_OPTIONS, *LEGACY_EVALUATION_OPTIONS}]
    if options["predict"]:
        read = {*PREDICT_OPTIONS, *LEGACY_EVALUATION_OPTIONS} | parser.get_option_names("device")
        return [key for key in typed if key not in read]
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
    if options["task"] != "card" and not (options["figure"] or options["confusion"]):
        unread |= {"dpi"}
    return [key for key in typed if key in unread]


def list_measurements(options: dict) -> list[str]:
    """Return the keys of evaluation.tasks.PLANNERS to run: the task itself, or for a card all that the images allow."""
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
