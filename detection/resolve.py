"""Resolve the options of a detector's run: typed options, recipe, and the options of the run that is resumed."""

from pathlib import Path

from detection.recipes import RECIPES
from engine.config.parser import Parser
from engine.config.resume_rules import (
    PER_CALL_OPTIONS,
    RESUME_CHANGEABLE,
    OptionRules,
    check_changed_options,
    merge_options,
)
from engine.runtime.text import format_count

KIND = "detector"  # kind of checkpoints and runs
START_OPTIONS = {"backbone_checkpoint", "pretrained", "frcnn_checkpoint"}  # initial weights of a new detector
COCO_OPTIONS = {"train_annotations", "test_annotations", "images"}  # where data in COCO format is
TRAINING_OPTIONS = (  # options that an evaluation does not use
    {"recipe", "trainable_layers", "norm", "stem", "train_sets", "use_difficult", "augment", "iters", "epochs", "lr"}
    | {"train_annotations"}
    | {"batch_size", "scale_lr", "momentum", "weight_decay", "schedule", "gammas", "warmup_iters", "accumulate"}
    | {"clip_grad", "ema", "rois", "eval_every", "save_iters", "save_every", "print_freq", "checkpoint"}
    | {"overwrite"}
)
PICTURE_OPTIONS = (  # options that detection in the pictures of --image_path uses
    {"image_path", "output", "labels", "on_bad_image", "predictions", "dpi", "figure_format", "no_progress"}
    | {"frcnn_checkpoint", "averaged", "model", "neck", "min_size", "max_size", "proposals", "score_thr", "nms_thr"}
    | {"max_dets", "device", "channels_last", "seed", "deterministic", "debug"}
)
PREDICTION_STARTS = (b"[]", b'[{"image_id"', b'{"info": {"description": "detections of detect.py')  # of --predictions
OTHER_TASKS = {"evaluate", "checkpoint", "config", "export_shapes", "backbone_checkpoint", "pretrained"}
MAX_LR_RISE = 4e-4  # per step of a shortened warm-up: as in the recipe `shapes`; five times that was seen to diverge
RULES = OptionRules(
    changeable=COCO_OPTIONS
    | {"iters", "eval_every", "save_iters", "test_set", "score_thr", "nms_thr", "max_dets", "scale_lr"}
    | {"coco_count_difficult", "vis", "predictions", "image_path", "output", "labels"}
    | START_OPTIONS
    | RESUME_CHANGEABLE,
    architecture={"model", "neck", "stem", "norm", "trainable_layers", "ema", "dataset", "train_sets", "limit"}
    | {"batch_size"},
    per_call=PER_CALL_OPTIONS | {"vis", "predictions", "export_shapes", "image_path", "output", "labels"},
    replaces=dict.fromkeys(START_OPTIONS, START_OPTIONS),  # a typed one replaces all of them
)


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Return every option, filled in and checked. Options that contradict each other are a usage error.

    typed: options on the command line. saved: those of --config or of the run that is resumed, or {}. For a new run,
    iters, schedule and warmup_iters are None unless they are typed; scale_schedule() sets them.
    """
    options = merge_options(typed, saved, parser.defaults, rules=RULES, recipe=get_recipe)
    with parser.usage_errors():
        check_combinations(options, typed)
    if not (saved or options["evaluate"] or options["checkpoint"] or options["export_shapes"]):
        check_start_options(parser, options)
    if saved or not (options["evaluate"] or options["checkpoint"] or options["image_path"]):  # else a file may name it
        with parser.usage_errors():
            check_coco_options(options, typed)
    if not saved:
        options |= {key: None for key in ("iters", "schedule", "warmup_iters") if key not in typed}
    elif "epochs" in typed and "iters" not in typed:
        options["iters"] = None
    return options


def get_recipe(given: dict) -> dict[str, object]:
    """Return the options that the recipe sets. given: the options that may name a recipe."""
    name = given.get("recipe") or {"shapes": "shapes", "coco": "coco1x"}.get(given.get("dataset"), "paper")
    recipe = {**RECIPES[name], "recipe": name}
    if given.get("dataset") == "coco":
        recipe["use_difficult"] = False  # crowd regions are no objects
    if given.get("scale_lr"):
        recipe["lr"] = recipe["lr"] * given.get("batch_size", recipe["batch_size"]) / recipe["batch_size"]
    return recipe


def resolve_resumed_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Resolve the options of a resumed run, which ignores the options for initial weights."""
    return resolve_options(parser, {key: value for key, value in typed.items() if key not in START_OPTIONS}, saved)


def check_combinations(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that exclude each other."""
    if options["config"] and "recipe" in typed:
        raise ValueError("--recipe: the file of --config already sets every option; omit --recipe or --config")
    if options["trainable_layers"] > 5:
        raise ValueError(
            f"--trainable_layers {options['trainable_layers']}: at most 5 (the 4 stages of a ResNet and its stem)"
        )
    if len(options["gammas"]) not in (1, len(options["schedule"])):
        counts = f"{len(options['gammas'])} factors for {format_count(len(options['schedule']), 'drop')}"
        raise ValueError(f"--gammas: {counts} of --schedule; give one factor for all, or one per drop")
    if not (options["evaluate"] or options["image_path"]) and max(options["min_size"]) > options["max_size"]:
        raise ValueError(f"--min_size {max(options['min_size'])} exceeds --max_size {options['max_size']}")
    if options["stem"] == "random" and options["frcnn_checkpoint"]:
        raise ValueError("--stem random: only for a classifier; the backbone of --frcnn_checkpoint has a stem already")
    if options["averaged"] and not (options["frcnn_checkpoint"] or options["backbone_checkpoint"]):
        raise ValueError("--averaged: needs a file; give --backbone_checkpoint or --frcnn_checkpoint")
    if options["evaluate"] and not options["frcnn_checkpoint"]:
        raise ValueError("--evaluate: needs a detector; give --frcnn_checkpoint FILE")
    if options["image_path"]:
        if others := sorted(f"--{key}" for key in OTHER_TASKS if options[key]):
            raise ValueError(
                f"{', '.join(others)}: not with --image_path, which only draws what a detector finds in pictures; omit "
                "one of them"
            )
        if not options["frcnn_checkpoint"]:
            raise ValueError("--image_path: needs a detector; give --frcnn_checkpoint RUN (cam.py takes classifiers)")


def check_coco_options(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that do not fit data in COCO format, or only fit such data."""
    if options["dataset"] != "coco":
        if given := sorted(f"--{key}" for key in typed.keys() & COCO_OPTIONS):
            raise ValueError(f"{', '.join(given)}: only for data in COCO format; add --dataset coco")
        return
    needed, unfit = ["test_annotations"], ["coco_count_difficult"]
    if not options["evaluate"]:
        needed, unfit = ["train_annotations", *needed], [*unfit, "use_difficult"]
    if absent := [f"--{key} FILE.json" for key in needed if not options[key]]:
        raise ValueError(f"--dataset coco: give {' and '.join(absent)}, an annotation file in COCO format")
    if len(options["images"]) > 2:
        raise ValueError(
            f"--images: {len(options['images'])} folders; give one, or that of the training and that of the test images"
        )
    if options["download"]:
        raise ValueError("--download: not for --dataset coco; unpack images and annotations yourself and omit it")
    if ignored := [f"--{key}" for key in unfit if options[key]]:
        raise ValueError(
            f"{ignored[0]}: COCO has no difficult objects; its crowd regions are always ignored; set it to false"
        )


def check_start_options(parser: Parser, options: dict) -> None:
    """End with a usage error unless exactly one option names the initial weights of a new detector."""
    starts = [f"--{key}" for key in sorted(START_OPTIONS) if options[key]]
    if not starts:
        parser.error(
            "no initial weights: give --backbone_checkpoint FILE for a classifier, --pretrained for torchvision's "
            "backbone, or --frcnn_checkpoint FILE for a detector"
        )
    if len(starts) > 1:
        parser.error(f"{' and '.join(starts)}: each sets the initial weights; give only one of them")


def scale_schedule(options: dict, steps_per_epoch: int) -> dict:
    """Return iters, schedule and warmup_iters of a run, in optimizer steps.

    If a run is longer or shorter than its recipe, the lr drops scale with its length. In a shorter run the recipe's
    warm-up takes a tenth of the steps, or as many more as MAX_LR_RISE asks for.
    """
    recipe = RECIPES[options["recipe"]]
    length = options["iters"] or (options["epochs"] and options["epochs"] * steps_per_epoch) or recipe["iters"]
    drops, warmup = options["schedule"], options["warmup_iters"]
    if drops is None:
        drops = [max(1, round(drop * length / recipe["iters"])) for drop in recipe["schedule"]]
    if warmup is None:
        warmup = recipe["warmup_iters"]
        if length < recipe["iters"]:
            warmup = min(warmup, max(length // 10, round(options["lr"] / MAX_LR_RISE)))
    return {"iters": length, "schedule": drops, "warmup_iters": warmup}


def describe_unused_options(options: dict, typed: dict, resumed: bool = False) -> list[str]:
    """Return a note on the typed options that have no effect, in a list that may be empty."""
    unused = {"output", "labels", "on_bad_image"}  # of --image_path
    if options["dataset"] == "shapes":
        unused |= {"data_dir", "train_sets", "test_set", "download", "workers"}
    if options["dataset"] == "coco":
        unused |= {"data_dir", "train_sets", "test_set"}
    if "lr" in typed or resumed:
        unused |= {"scale_lr"}
    if "iters" in typed:
        unused |= {"epochs"}
    if options["log_off"]:
        unused |= {"vis", "name", "save_every", "save_iters"}
    if resumed:
        unused |= START_OPTIONS
    if options["evaluate"]:
        unused |= TRAINING_OPTIONS | {"amp", "backbone_checkpoint", "pretrained"}
    if options["image_path"]:
        unused = typed.keys() - PICTURE_OPTIONS
    names = sorted(f"--{key}" for key in typed.keys() & unused)
    return [f"no effect in this run: {', '.join(names)}"] if names else []


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """Raise UserError if typed options differ from those of the saved run and may not change on a resume."""
    check_changed_options(typed, saved, rules=RULES, force=force)


def locate_detector_runs(options: dict) -> tuple[Path, str]:
    """Return the folder of detector runs on this data set, and the prefix of the names of unnamed runs."""
    return Path(options["root_dir"]) / options["dataset"] / "frcnn", options["recipe"]
