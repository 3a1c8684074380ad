"""From typed options to the options of a detector's run."""

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

KIND = "detector"  # of checkpoints and runs
START_OPTIONS = {"backbone_checkpoint", "pretrained", "frcnn_checkpoint"}  # what a new detector starts from
TRAINING_OPTIONS = (  # what an evaluation does not read
    {"recipe", "trainable_layers", "norm", "stem", "train_sets", "use_difficult", "augment", "iters", "epochs", "lr"}
    | {"batch_size", "scale_lr", "momentum", "weight_decay", "schedule", "gammas", "warmup_iters", "accumulate"}
    | {"clip_grad", "ema", "rois", "eval_every", "save_iters", "save_every", "print_freq", "checkpoint"}
)
RULES = OptionRules(
    changeable={"iters", "eval_every", "save_iters", "test_set", "score_thr", "nms_thr", "max_dets", "scale_lr"}
    | {"coco_count_difficult", "vis", "predictions"}
    | START_OPTIONS
    | RESUME_CHANGEABLE,
    architecture={"model", "neck", "stem", "norm", "trainable_layers", "ema", "dataset", "train_sets", "limit"}
    | {"batch_size"},
    per_call=PER_CALL_OPTIONS | {"vis", "predictions", "export_shapes"},
    replaces=dict.fromkeys(START_OPTIONS, START_OPTIONS),  # one of them takes the place of all
)


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option, filled in and checked. A contradiction is a usage error.

    Of a new run iters, schedule and warmup_iters are None unless they are typed: scale_schedule() fills them in.
    """
    options = merge_options(typed, saved, parser.defaults, rules=RULES, recipe=get_recipe)
    with parser.usage_errors():
        check_combinations(options, typed)
    if not (saved or options["evaluate"] or options["checkpoint"] or options["export_shapes"]):
        check_start_options(parser, options)
    if not saved:
        options |= {key: None for key in ("iters", "schedule", "warmup_iters") if key not in typed}
    elif "epochs" in typed and "iters" not in typed:
        options["iters"] = None
    return options


def get_recipe(given: dict) -> dict[str, object]:
    """What the recipe of a run sets, which the given options may name."""
    name = given.get("recipe") or ("shapes" if given.get("dataset") == "shapes" else "paper")
    recipe = {**RECIPES[name], "recipe": name}
    if given.get("scale_lr"):
        recipe["lr"] = recipe["lr"] * given.get("batch_size", recipe["batch_size"]) / recipe["batch_size"]
    return recipe


def resolve_resumed(parser: Parser, typed: dict, saved: dict) -> dict:
    """The same for a run that is resumed, and so starts from nothing else."""
    return resolve_options(parser, {key: value for key, value in typed.items() if key not in START_OPTIONS}, saved)


def check_combinations(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that exclude each other."""
    if options["config"] and "recipe" in typed:
        raise ValueError("--recipe: the file of --config brings every option with it; leave one of them out")
    if options["trainable_layers"] > 5:
        raise ValueError(
            f"--trainable_layers {options['trainable_layers']}: a ResNet has a stem and 4 stages; 5 is all"
        )
    if len(options["gammas"]) not in (1, len(options["schedule"])):
        raise ValueError(
            f"--gammas has {len(options['gammas'])} factors for the {len(options['schedule'])} drops of --schedule; "
            "give one for all, or one each"
        )
    if max(options["min_size"]) > options["max_size"]:
        raise ValueError(f"--min_size {max(options['min_size'])} is more than --max_size {options['max_size']}")
    if options["stem"] == "random" and options["frcnn_checkpoint"]:
        raise ValueError("--stem random: it says how a classifier becomes a backbone; --frcnn_checkpoint has one")
    if options["averaged"] and not (options["frcnn_checkpoint"] or options["backbone_checkpoint"]):
        raise ValueError("--averaged: of which file? give --backbone_checkpoint or --frcnn_checkpoint")
    if options["evaluate"] and not options["frcnn_checkpoint"]:
        raise ValueError("--evaluate needs --frcnn_checkpoint FILE: a backbone alone detects nothing")


def check_start_options(parser: Parser, options: dict) -> None:
    """A usage error unless exactly one option says what a new detector starts from."""
    starts = [f"--{key}" for key in sorted(START_OPTIONS) if options[key]]
    if not starts:
        parser.error(
            "--backbone_checkpoint FILE: which classifier shall be the backbone? --pretrained takes torchvision's, "
            "--frcnn_checkpoint FILE starts from a detector"
        )
    if len(starts) > 1:
        parser.error(f"{' and '.join(starts)} both say what to start from; give one of them")


def scale_schedule(options: dict, steps_per_epoch: int) -> dict:
    """iters, schedule and warmup_iters of a run, in optimizer steps.

    The drops of a recipe keep their share of the run where its length is another one; its warm-up then takes a tenth of
    the run at most.
    """
    recipe = RECIPES[options["recipe"]]
    length = options["iters"] or (options["epochs"] and options["epochs"] * steps_per_epoch) or recipe["iters"]
    drops, warmup = options["schedule"], options["warmup_iters"]
    if drops is None:
        drops = [max(1, round(drop * length / recipe["iters"])) for drop in recipe["schedule"]]
    if warmup is None:
        warmup = recipe["warmup_iters"] if length >= recipe["iters"] else min(recipe["warmup_iters"], length // 10)
    return {"iters": length, "schedule": drops, "warmup_iters": warmup}


def option_notes(options: dict, typed: dict, resumed: bool = False) -> list[str]:
    """What was typed and nothing reads."""
    idle = set()
    if options["dataset"] == "shapes":
        idle |= {"data_dir", "train_sets", "test_set", "download", "workers"}
    if "lr" in typed or resumed:
        idle |= {"scale_lr"}
    if "iters" in typed:
        idle |= {"epochs"}
    if options["log_off"]:
        idle |= {"vis", "name", "save_every", "save_iters"}
    if resumed:
        idle |= START_OPTIONS
    if options["evaluate"]:
        idle |= TRAINING_OPTIONS | {"amp", "backbone_checkpoint", "pretrained"}
    found = sorted(f"--{key}" for key in typed.keys() & idle)
    return [f"without effect here: {', '.join(found)}"] if found else []


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """check_changed_options() for a detector."""
    check_changed_options(typed, saved, rules=RULES, force=force)


def detector_runs(options: dict) -> tuple[Path, str]:
    """The folder of the detectors for this data set, and how the names of unnamed ones begin."""
    return Path(options["root_dir"]) / options["dataset"] / "frcnn", options["recipe"]
