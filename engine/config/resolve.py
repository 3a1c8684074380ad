"""From what was typed to what is run: shorthands, recipes, saved options, and what does not go together."""

from engine.config.legacy_options import translate_legacy
from engine.config.parser import Parser
from engine.config.phases import default_eval_resize, parse_lr_points, parse_phases
from engine.config.recipes import choose_recipe, recipe_options
from engine.config.resume_rules import PER_CALL_OPTIONS

DERIVED_OPTIONS = {
    "image_size": ("crop_size", "eval_resize"),
    "phases": ("epochs", "batch_size"),
}  # unless they are typed


def read_options(parser: Parser, argv: list[str] | None) -> tuple[dict, list[str]]:
    """The typed options in today's terms, and notes on what was translated; a contradiction ends with a usage error."""
    try:
        return translate_legacy(parser.read(argv))
    except ValueError as error:
        parser.error(str(error))


def use_copies_as_data_dir(typed: dict) -> dict:
    """What follows on large images: where the data set is not named, its copies serve as it."""
    typed = dict(typed)
    if "data_dir" not in typed and typed.get("data_large"):
        typed["data_dir"] = typed["data_large"]
    return typed


def phase_options(options: dict, number: int) -> dict:
    """The options of a phase: those that a recipe sets for single methods, and what it adds to them there."""
    added = options["phase_options"][min(number, len(options["phase_options"]) - 1)] if options["phase_options"] else {}
    by_method = dict(options["method_options"])
    for method, own in added.items():
        by_method[method] = {**by_method.get(method, {}), **own}
    return {**options, "method_options": by_method}


def fill_in_options(typed: dict, saved: dict, defaults: dict) -> dict[str, object]:
    """Every option: what was typed, else saved (--config, a checkpoint), else the recipe's, else the default."""
    stale = {key for told, derived in DERIVED_OPTIONS.items() if told in typed for key in derived}
    given = {
        **{key: value for key, value in saved.items() if key in defaults.keys() - PER_CALL_OPTIONS - stale},
        **typed,
    }
    name = given.get("recipe", defaults["recipe"])
    if saved.get("recipe") and name == "auto":
        name = saved["recipe"]
    if name == "auto":
        named = bool({"method", "model", "dataset"} & given.keys())
        name = choose_recipe(given.get("method", defaults["method"]), given.get("dataset"), named)
    recipe = recipe_options(name, dataset=given.get("dataset"), model=given.get("model"))
    if "lr" in given and "max_lr" not in given:
        recipe.pop("max_lr", None)  # the peak of one-cycle is then the given lr
    if unknown := recipe.keys() - defaults.keys():
        raise KeyError(f"recipe {name} sets options that do not exist: {sorted(unknown)}")
    if phases := given.get("phases", recipe.get("phases")):
        first, *_, last = [*parse_phases(phases)] * 2
        recipe |= {"epochs": last.end, "batch_size": first.batch_size}
    filled = {**defaults, **recipe, **given, "recipe": name}
    if "crop_size" in filled:  # large images: evaluated on the centre of 7/8 of the shorter side, as on ImageNet
        filled["crop_size"] = filled["crop_size"] or filled["image_size"]
        filled["eval_resize"] = filled["eval_resize"] or default_eval_resize(filled["image_size"])
    return filled


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option, filled in and checked; a contradiction ends with a usage error."""
    try:
        options = fill_in_options(typed, saved, parser.defaults)
        check_combinations(options, typed)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_combinations(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that exclude each other."""
    if missing := [f"--{key}" for key in ("epochs", "batch_size", "lr") if options[key] is None]:
        raise ValueError(f"--recipe {options['recipe']} leaves it to you: give {' '.join(missing)}")
    check_phases(options, typed)
    if options["compile"] and "manifold" in options["method"]:
        raise ValueError("--compile: manifold mixup hooks a layer, and compiled networks ignore hooks; leave it out")
    if options["loss"] == "bce" and options["label_smoothing"]:
        raise ValueError("--label_smoothing: --loss bce has no such form; use --loss ce")
    if options["config"] and "recipe" in typed:
        raise ValueError("--recipe: the file of --config brings every option with it; leave one of them out")
    if options["evaluate"] and not options["checkpoint"]:
        raise ValueError("--evaluate needs --checkpoint, the file to evaluate")
    if typed.get("init_from") and typed.get("checkpoint", "auto") != "auto":
        raise ValueError("--init_from starts a new run and --checkpoint continues one; give one of them")
    if options["scheduler"] == "multistep" and not options["schedule"]:
        raise ValueError("--scheduler multistep needs --schedule, the epochs at which the lr drops")
    if options.get("resize_dest") and not options["resize_to"]:
        raise ValueError("--resize_dest: only with --resize_to, which makes copies there")
    if options.get("pretrained") and options["init_from"]:
        raise ValueError("--pretrained and --init_from both say where the weights come from; give one of them")
    if options["scheduler"] == "multistep" and len(options["gammas"]) not in (1, len(options["schedule"])):
        raise ValueError(
            f"--gammas has {len(options['gammas'])} factors for the {len(options['schedule'])} milestones of "
            "--schedule; give one for all, or one each"
        )
    if options["saliency_scope"] == "batch" and options["in_batch"] and "saliencymix" in options["method"]:
        raise ValueError("--in_batch draws a lam for each image and so excludes --saliency_scope batch")
    if "comixup" in options["method"] and options["batch_size"] == 1:
        raise ValueError("--batch_size 1: comixup mixes several images; take more")
    if "rlmix" in options["method"] and (options["mix_off_epoch"] or options["mix_schedule"] == "scheduled"):
        raise ValueError(
            "--mix_off_epoch, --mix_schedule: the agent of rlmix learns from batches of one size; use rmix, or leave "
            "it out"
        )
    if options["adv_p"] and "puzzlemix" not in options["method"]:
        raise ValueError("--adv_p: only puzzlemix has adversarial noise")
    if options["adv_p"] and options["saliency"] not in (None, "gradient"):
        raise ValueError("--adv_p needs the signed gradient: leave --saliency out")
    if options["saliency"] == "casm" and not options["casm"]:
        raise ValueError("--saliency casm needs --casm FILE, made by python -m saliency.casm train")
    if options["mix_schedule"] != "fixed" and not options["mix_scheduled_epoch"]:
        raise ValueError(f"--mix_schedule {options['mix_schedule']} needs --mix_scheduled_epoch, where it ends")


def check_phases(options: dict, typed: dict) -> None:
    """Raise ValueError where --phases and --lr_points are contradicted."""
    if options.get("phases"):
        end = parse_phases(options["phases"])[-1].end
        if options["epochs"] != end:
            raise ValueError(f"--epochs {options['epochs']}: --phases end at {end}; give --phases that end there")
        if told := [f"--{key}" for key in ("batch_size", "crop_size", "min_scale") if key in typed]:
            raise ValueError(f"{' '.join(told)}: --phases say it for each phase; change it there, or --phases ''")
    if options["scheduler"] == "points":
        if not options["lr_points"]:
            raise ValueError("--scheduler points needs --lr_points")
        parse_lr_points(options["lr_points"])
        if "lr" in typed:
            raise ValueError("--lr: --lr_points say the rates; change them there, or choose another --scheduler")
    elif "lr_points" in typed:
        raise ValueError(f"--lr_points: --scheduler {options['scheduler']} does not read them; add --scheduler points")
