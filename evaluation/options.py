"""The options of evaluate.py: how they are declared and read. Those of its tasks are in task_options.py."""

from pathlib import Path

from engine.config import resolve
from engine.config.legacy_options import LEGACY_EVALUATION_OPTIONS
from engine.config.option_types import boolean, choice, int_at_least
from engine.config.options import DATASETS, FIGURE_FORMATS, add_common_options, add_data_options, add_device_options
from engine.config.parser import Parser, check_figure_path, check_output_path
from engine.config.phases import LARGE_SIDE
from evaluation.task_options import NONE, TASKS, add_task_options, check_task, find_unused_options

CARD_DEFAULTS = {"robust_images": 1000, "output": "card.json"}
DESCRIPTION = "predictions of evaluate.py --predict"  # the start of its JSON file
CSV_COLUMNS = ["file", "classifier", "rank", "class", "probability"]
PREDICT_DEFAULTS = {"batch_size": 64}  # several workers decode even a few hundred pictures
EXPORT_ENDINGS = (".onnx", ".pt2", ".safetensors")  # of a file of --export; evaluation/export.py: FORMATS
REFERENCE_OPTIONS = {"task": "robustness", "attack": [NONE], "occlusion": False}  # mCE needs corruption errors only
TRAINED_OPTIONS = ["dataset", "data_dir", "val_data_dir", "val_labels", "image_size", "eval_resize", "num_classes"]
# these default to the values that the classifier was trained with
TRAINED_OPTIONS += ["interpolation", "limit", "on_bad_image"]


def build_parser() -> Parser:
    parser = Parser(
        "Evaluate one or more trained classifiers on the test images, without augmentation; or classify pictures "
        "(--predict); or write a classifier for production (--export)."
    )
    parser.group("what")
    weights = "checkpoints, run folders (their best.pt), torchvision:NAME or timm:NAME (pretrained), or NAME=FILE"
    parser.option("--model_path", nargs="+", metavar="PATH", help=weights)
    parser.option("--info", type=boolean, default=False, help="print what the checkpoints contain and exit")
    pictures = "classify these pictures instead: files, folders, or patterns such as '*.jpg'"
    parser.option("--predict", nargs="+", metavar="PATH", help=pictures)
    parser.option("--export", metavar="FILE", help=f"write the classifier for production: {', '.join(EXPORT_ENDINGS)}")
    parser.option("--task", type=choice(TASKS), default="accuracy", help="card: everything, in one report")
    add_common_options(parser, "model", "model_args", "class_list", "seed")
    parser.option("--ema", type=boolean, default=False, help="evaluate the averaged weights of a run with --ema")
    parser.option(
        "--batch_size", "-b", type=int_at_least(1), default=500, help="in total over all processes; --predict: 64"
    )
    parser.option(
        "--output",
        "-o",
        metavar="FILE.json",
        help="write all results as JSON; card: also FILE.md, .html, .png; --predict: also .csv",
    )
    add_task_options(parser)
    add_data_options(parser, DATASETS, dataset_default="from the file")
    add_device_options(parser, amp="off")
    parser.hidden_options(LEGACY_EVALUATION_OPTIONS)
    return parser


def read_options(parser: Parser, argv: list[str] | None) -> tuple[dict, dict, list[str]]:
    """Return the typed options, all options, and notes on typed options without effect. Exit with a usage error for
    options that contradict each other.
    """
    typed, _ = resolve.read_options(parser, argv)
    if typed.get("task") == "card":
        parser.defaults |= CARD_DEFAULTS
    if "predict" in typed:
        check_predict(parser, typed)
        parser.defaults |= PREDICT_DEFAULTS
    options = {**parser.defaults, **typed}
    if "model_path" not in typed:
        parser.error("--model_path is missing: give the checkpoints or run folders to evaluate")
    if "export" in typed:
        check_export(parser, typed)
    if options["confusion"] and len(options["model_path"]) > 1:
        parser.error("--confusion draws the matrix of a single classifier; give one --model_path")
    try:
        check_task(options)
    except ValueError as error:
        parser.error(str(error))
    for key in ("figure", "confusion"):
        if options[key]:
            check_figure_path(parser, f"--{key}", options[key], FIGURE_FORMATS)
    for key in ("output", "figure", "confusion"):
        if options[key]:
            check_output_path(parser, f"--{key}", Path(options[key]))
    unused = {
        "options without effect on an evaluation": [name for name in LEGACY_EVALUATION_OPTIONS if name in typed],
        "options without effect in this call": find_unused_options(parser, typed, options),
    }
    notes = [f"{what}: {', '.join(f'--{name}' for name in names)}" for what, names in unused.items() if names]
    fixed = {"topk": [1, 5]} if options["task"] == "card" else {}
    if options["task"] not in ("robustness", "card") or options["corruptions"] == NONE:
        fixed["reference"] = None
    return typed | fixed, options | fixed, notes


def check_predict(parser: Parser, typed: dict) -> None:
    """Exit with a usage error for options that contradict --predict."""
    if others := [f"--{name}" for name in ("info", "task") if typed.get(name)]:
        parser.error(f"--predict: cannot be combined with {' and '.join(others)}; give one of them")
    if "output" not in typed:
        return
    output = Path(typed["output"])
    if output.suffix.lower() != ".json":
        parser.error(
            f"--output {output}: --predict writes JSON, with .csv next to it; give a file name ending in .json"
        )
    starts = {output: f'{{\n  "description": "{DESCRIPTION}"', output.with_suffix(".csv"): ",".join(CSV_COLUMNS)}
    for path, start in starts.items():
        check_output_path(parser, "--output", path, (start.encode(),))


def check_export(parser: Parser, typed: dict) -> None:
    """Exit with a usage error for options that contradict --export, and for a file that cannot be written."""
    file = typed["export"]
    if others := [f"--{name}" for name in ("info", "task", "predict") if typed.get(name)]:
        parser.error(f"--export: cannot be combined with {' and '.join(others)}; give one of them")
    if Path(file).suffix not in EXPORT_ENDINGS:
        *others, last = EXPORT_ENDINGS
        parser.error(f"--export {file}: give a file name that ends in {', '.join(others)} or {last}")
    if len(typed["model_path"]) > 1:
        parser.error(f"--export {file}: a file holds a single classifier; give one --model_path")
    check_output_path(parser, "--export", Path(file))


def merge_trained_options(
    parser: Parser, typed: dict, options: dict, classifier, *, dataset_needed: bool = True
) -> dict:
    """Return all options for one classifier. Data options that were not typed take the values of its training, and its
    image size; the margin of the crop follows a typed image size. `norm` becomes None. Exit with a usage error if
    neither names the data set and it is needed.
    """
    trained = {key: classifier.options[key] for key in TRAINED_OPTIONS if key in classifier.options}
    options = {**options, **trained, "norm": None, **typed}
    if dataset_needed and not options["dataset"]:
        parser.error(f"--dataset is missing: {classifier.path} does not store which data set it was trained on")
    dataset, own_size = options["dataset"], classifier.image_size
    if not options["image_size"] and (dataset == "folder" or dataset != "shapes" and own_size > LARGE_SIDE):
        options["image_size"] = own_size
        if dataset in ("folder", "imagenet") and not options["eval_resize"]:
            options["eval_resize"] = classifier.resize
    elif "image_size" in typed and "eval_resize" not in typed and (dataset == "folder" or options["eval_resize"]):
        options["eval_resize"] = round(classifier.resize * options["image_size"] / own_size)
    if classifier.interpolation and "interpolation" not in typed:
        options["interpolation"] = classifier.interpolation
    return options
