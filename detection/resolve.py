"""From typed options to the options of a detector's run."""

from pathlib import Path

from detection.recipes import RECIPES
from engine.config.parser import Parser
from engine.config.resume_rules import PER_CALL_OPTIONS as ONE_CALL_EVERYWHERE
from engine.config.resume_rules import RESUME_CHANGEABLE as MAY_DIFFER_EVERYWHERE
from engine.config.resume_rules import check_changed_options

KIND = "detector"  # of checkpoints and runs
RESUME_CHANGEABLE = {  # options that may change when a run is continued
    *MAY_DIFFER_EVERYWHERE,
    *("iters", "eval_every", "save_iters", "test_set", "score_thr", "nms_thr", "max_dets", "coco_count_difficult"),
    *("vis", "predictions", "backbone_checkpoint", "frcnn_checkpoint", "pretrained", "scale_lr"),
}
ARCHITECTURE_OPTIONS = {
    "model",
    "neck",
    "stem",
    "dataset",
    "norm",
    "trainable_layers",
    "ema",
    "batch_size",
    "train_sets",
    "limit",
}
START_OPTIONS = {"backbone_checkpoint", "pretrained", "frcnn_checkpoint"}  # what a new detector starts from
TRAINING_OPTIONS = {  # what an evaluation does not read
    *("recipe", "trainable_layers", "norm", "stem", "train_sets", "use_difficult", "augment", "iters", "epochs", "lr"),
    *("batch_size", "scale_lr", "momentum", "weight_decay", "schedule", "gammas", "warmup_iters", "accumulate"),
    *("clip_grad", "ema", "rois", "eval_every", "save_iters", "save_every", "print_freq", "checkpoint"),
}
PER_CALL_OPTIONS = {*ONE_CALL_EVERYWHERE, "vis", "predictions", "export_shapes"}


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option: what was typed, else saved, else the recipe's, else the default; a contradiction ends with a usage
    error. Lengths are still open where --epochs gives them: see schedule_of().
    """
    told = {key: value for key, value in saved.items() if key in parser.defaults.keys() - PER_CALL_OPTIONS}
    if START_OPTIONS & typed.keys():  # one of them takes the place of all
        told = {key: value for key, value in told.items() if key not in START_OPTIONS}
    given = {**told, **typed}
    name = given.get("recipe", "auto")
    if name == "auto":
        name = saved.get("recipe") or ("shapes" if given.get("dataset") == "shapes" else "paper")
    recipe = RECIPES[name]
    options = {**parser.defaults, **recipe, **given, "recipe": name}
    if options["scale_lr"] and "lr" not in given:
        options["lr"] = recipe["lr"] * options["batch_size"] / recipe["batch_size"]
    try:
        check_combinations(options, typed)
    except ValueError as error:
        parser.error(str(error))
    if not (saved or options["evaluate"] or options["checkpoint"] or options["export_shapes"]):
        check_start_options(parser, options)
    if not saved:  # of a run that goes on all is settled
        options |= {key: None for key in ("iters", "schedule", "warmup_iters") if key not in typed}
    elif "epochs" in typed and "iters" not in typed:
        options["iters"] = None
    return options


def resolve_resumed(parser: Parser, typed: dict, saved: dict) -> dict:
    """The same of a run that goes on, and so starts from nothing else."""
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


def option_notes(options: dict, typed: dict, going_on: bool = False) -> list[str]:
    """What was typed and nothing reads."""
    idle = set()
    if options["dataset"] == "shapes":
        idle |= {"data_dir", "train_sets", "test_set", "download", "workers"}
    if "lr" in typed or going_on:
        idle |= {"scale_lr"}
    if "iters" in typed:
        idle |= {"epochs"}
    if options["log_off"]:
        idle |= {"vis", "name", "save_every", "save_iters"}
    if going_on:
        idle |= START_OPTIONS
    if options["evaluate"]:
        idle |= TRAINING_OPTIONS | {"amp", "backbone_checkpoint", "pretrained"}
    found = sorted(f"--{key}" for key in typed.keys() & idle)
    return [f"without effect here: {', '.join(found)}"] if found else []


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """Raise UserError, with both values of each, where typed options differ from those a run was started with."""
    differ = {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}
    check_changed_options(
        differ, typed, saved, may_differ=RESUME_CHANGEABLE, built_in=ARCHITECTURE_OPTIONS, force=force
    )


def detector_runs(options: dict) -> tuple[Path, str]:
    """Where the detectors of this data set are kept, and how unnamed ones begin."""
    return Path(options["root_dir"]) / options["dataset"] / "frcnn", options["recipe"]
