"""From what was typed to every option of a classifier: shorthands, recipes, saved options, and what excludes what."""

from functools import partial

from engine.config.legacy_options import translate_legacy
from engine.config.parser import Parser
from engine.config.phases import default_eval_resize, parse_lr_points, parse_phases
from engine.config.recipes import choose_recipe, get_recipe_options
from engine.config.resume_rules import (
    PER_CALL_OPTIONS,
    RESUME_CHANGEABLE,
    OptionRules,
    check_changed_options,
    find_changes,
    format_flags,
    merge_options,
)
from engine.errors import UserError

RULES = OptionRules(
    changeable={"profile", "vis_epoch", "list_models", "data_small", "data_large", "resize_to", "resize_dest"}
    | RESUME_CHANGEABLE,
    architecture={"model", "dataset", "num_classes", "image_size", "scheduler", "ema"}
    | {"bank_size", "num_action", "num_patches"},
    per_call=PER_CALL_OPTIONS | {"profile", "list_models", "resize_to", "resize_dest"},
    replaces={"image_size": {"crop_size", "eval_resize"}, "phases": {"epochs", "batch_size"}},
)
ONE_CYCLE_OPTIONS = {"epochs", "batch_size", "drop_last", "lr", "max_lr", "momentum"}  # they determine the schedule
ONE_CYCLE_OPTIONS |= {"div_factor", "pct_start", "final_div_factor"}


def read_options(parser: Parser, argv: list[str] | None) -> tuple[dict, list[str]]:
    """The typed options in today's terms, and notes on what was translated. A contradiction is a usage error."""
    with parser.usage_errors():
        return translate_legacy(parser.read(argv))


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option, filled in and checked. A contradiction is a usage error."""
    with parser.usage_errors():
        options = fill_in_options(typed, saved, parser.defaults)
        check_combinations(options, typed)
    return options


def fill_in_options(typed: dict, saved: dict, defaults: dict) -> dict[str, object]:
    """Every option by merge_options(). Raises ValueError for malformed --phases."""
    options = merge_options(typed, saved, defaults, rules=RULES, recipe=partial(get_recipe, defaults=defaults))
    if "crop_size" in options:  # large images: evaluated on the centre of 7/8 of the shorter side, as on ImageNet
        options["crop_size"] = options["crop_size"] or options["image_size"]
        options["eval_resize"] = options["eval_resize"] or default_eval_resize(options["image_size"])
    return options


def get_recipe(given: dict, defaults: dict) -> dict[str, object]:
    """What the recipe of a run sets, which the given options may name."""
    name = given.get("recipe", defaults["recipe"])
    if name == "auto":
        named = bool({"method", "model", "dataset"} & given.keys())
        name = choose_recipe(given.get("method", defaults["method"]), given.get("dataset"), named)
    recipe = get_recipe_options(name, dataset=given.get("dataset"), model=given.get("model"))
    if "lr" in given and "max_lr" not in given:
        recipe.pop("max_lr", None)  # the given lr is then the peak of one-cycle
    if phases := given.get("phases", recipe.get("phases")):
        first, *_, last = [*parse_phases(phases)] * 2
        recipe |= {"epochs": last.end, "batch_size": first.batch_size}
    if unknown := recipe.keys() - defaults.keys():
        raise KeyError(f"recipe {name} sets options that do not exist: {sorted(unknown)}")
    return recipe | {"recipe": name}


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """check_changed_options() for a classifier, whose one-cycle schedule cannot even change where other ones can."""
    changes = find_changes(typed, saved)
    laid_out = changes & ONE_CYCLE_OPTIONS if saved["scheduler"] == "onecycle" else set()
    if laid_out and (force or changes <= RULES.changeable):
        raise UserError(
            f"{format_flags(laid_out)}: the one-cycle schedule of this run is laid out for {saved['epochs']} epochs "
            "and other values\nstart a new run; --init_from takes the weights of this one"
        )
    check_changed_options(typed, saved, rules=RULES, force=force)


def use_copies_as_data_dir(typed: dict) -> dict:
    """The typed options; where they name no data set folder, its large copies serve as it."""
    if "data_dir" in typed or not typed.get("data_large"):
        return typed
    return {**typed, "data_dir": typed["data_large"]}


def get_phase_options(options: dict, number: int) -> dict:
    """The options of a phase: a recipe may add hyper-parameters of single methods there."""
    added = options["phase_options"][min(number, len(options["phase_options"]) - 1)] if options["phase_options"] else {}
    by_method = dict(options["method_options"])
    for method, own in added.items():
        by_method[method] = {**by_method.get(method, {}), **own}
    return {**options, "method_options": by_method}


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
    check_mixing_combinations(options)


def check_mixing_combinations(options: dict) -> None:
    """The same for the options of mixing."""
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
