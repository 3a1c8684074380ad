"""Resolve the options of a classifier: shorthands, recipes, saved options, and checks of their combinations."""

from dataclasses import replace
from functools import partial

from engine.config.legacy_options import translate_legacy, translate_saved
from engine.config.parser import Parser
from engine.config.phases import default_eval_resize, parse_lr_points, parse_phases
from engine.config.recipes import RECIPE_ALIASES, choose_recipe, get_recipe_options
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
    changeable={"compile", "graph_step", "profile", "vis_epoch", "list_models"}
    | {"data_small", "data_large", "resize_to", "resize_dest"}
    | RESUME_CHANGEABLE,
    architecture={"model", "model_args", "dataset", "num_classes", "image_size", "scheduler", "ema", "ema_ramp"}
    | {"optimizer", "freeze", "layer_decay", "no_decay_bn", "no_decay_1d"}  # the parameter groups
    | {"bank_size", "num_action", "num_patches"},
    per_call=PER_CALL_OPTIONS | {"profile", "seeds", "list_models", "resize_to", "resize_dest"},
    replaces={
        "model": {"model_args"},
        "method": {"method_weights"},
        "image_size": {"crop_size", "eval_resize"},
        "phases": {"epochs", "batch_size"},
        "clean_weight": {"clean_lam", "update_ratio"},
        "clean_lam": {"clean_weight"},
        "update_ratio": {"clean_weight"},
    },
)
ONE_CYCLE_OPTIONS = {"epochs", "batch_size", "drop_last", "lr", "max_lr", "momentum"}  # they define the schedule
ONE_CYCLE_OPTIONS |= {"betas", "div_factor", "pct_start", "final_div_factor"}


def read_options(parser: Parser, argv: list[str] | None) -> tuple[dict, list[str]]:
    """Return the typed options by their current names, and notes on translations. Contradictions are usage errors."""
    with parser.usage_errors():
        return translate_legacy(parser.read(argv))


def resolve_options(parser: Parser, typed: dict, saved: dict) -> dict:
    """Return every option, filled in and checked. Contradictions are usage errors."""
    with parser.usage_errors():
        options = fill_in_options(typed, saved, parser.defaults)
        check_combinations(options, typed)
    return options


def fill_in_options(typed: dict, saved: dict, defaults: dict) -> dict[str, object]:
    """Return every option; see merge_options(). Raises ValueError for malformed --phases."""
    saved = translate_saved(saved)
    if saved.get("optimizer") != typed.get("optimizer", saved.get("optimizer")):  # --config: settings of another one
        saved = {key: value for key, value in saved.items() if key not in ("betas", "eps", "no_decay_1d")}
    options = merge_options(typed, saved, defaults, rules=RULES, recipe=partial(get_recipe, defaults=defaults))
    if options["no_decay_1d"] is None:
        options["no_decay_1d"] = options["optimizer"] != "sgd"
    if "crop_size" in options:  # large images: evaluated on a centre crop of 7/8 of the shorter side, as on ImageNet
        options["crop_size"] = options["crop_size"] or options["image_size"]
        options["eval_resize"] = options["eval_resize"] or default_eval_resize(options["image_size"])
    return options


def get_recipe(given: dict, defaults: dict) -> dict[str, object]:
    """Return the options that the recipe of a run sets, with its name. given: options that were typed or saved."""
    name = given.get("recipe", defaults["recipe"])
    if name == "auto":
        name = choose_recipe(given, given.get("method", defaults["method"]), large_images="crop_size" in defaults)
    name = RECIPE_ALIASES.get(name, name)
    found = {key: given.get(key) for key in ("dataset", "model", "batch_size")}
    recipe = get_recipe_options(name, method=given.get("method", ()), **found)
    if "lr" in given and "max_lr" not in given:
        recipe.pop("max_lr", None)  # so that the given lr is the peak of one-cycle
    if phases := given.get("phases", recipe.get("phases")):
        first, *_, last = [*parse_phases(phases)] * 2
        recipe |= {"epochs": last.end, "batch_size": first.batch_size}
    if unknown := recipe.keys() - defaults.keys():
        raise KeyError(f"recipe {name} sets options that do not exist: {sorted(unknown)}")
    return recipe | {"recipe": name}


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """Call check_changed_options() for a classifier. A one-cycle schedule is fixed: what defines it must not change."""
    saved = translate_saved(saved)
    changes = find_changes(typed, saved)
    fixed = changes & ONE_CYCLE_OPTIONS if saved["scheduler"] == "onecycle" else set()
    if fixed and (force or changes <= RULES.changeable):
        raise UserError(
            f"{format_flags(fixed)}: the one-cycle schedule of this run is fixed for {saved['epochs']} epochs and "
            "cannot change\nstart a new run; --init_from takes the weights of this one"
        )
    remedy = f"leave these options out to resume the run; {format_flags(fixed)} cannot change even with --force_config"
    rules = replace(RULES, remedy=remedy) if fixed else RULES
    check_changed_options(typed, saved, rules=rules, force=force)


def use_copies_as_data_dir(typed: dict) -> dict:
    """Return the typed options, with --data_large as --data_dir if only the former is given."""
    if "data_dir" in typed or not typed.get("data_large"):
        return typed
    return {**typed, "data_dir": typed["data_large"]}


def get_phase_options(options: dict, number: int) -> dict:
    """Return the options of a phase, with the hyper-parameters that the recipe adds in it. number: from 0."""
    added = options["phase_options"][min(number, len(options["phase_options"]) - 1)] if options["phase_options"] else {}
    by_method = dict(options["method_options"])
    for method, own in added.items():
        by_method[method] = {**by_method.get(method, {}), **own}
    return {**options, "method_options": by_method}


def check_combinations(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that cannot be combined."""
    if missing := [f"--{key}" for key in ("epochs", "batch_size", "lr") if options[key] is None]:
        raise ValueError(f"--recipe {options['recipe']} does not set {' '.join(missing)}; give a value")
    check_phases(options, typed)
    if options["compile"] and "manifold" in options["method"]:
        raise ValueError(
            "--compile: manifold mixup uses a forward hook, and compiled networks ignore hooks; leave it out"
        )
    if options["compile"] and options["graph_step"]:
        raise ValueError("--graph_step and --compile are two ways to run the network's step; give one of them")
    if options["loss"] == "softmax_bce" and options["label_smoothing"]:
        raise ValueError("--label_smoothing is not available with --loss softmax_bce; use --loss ce or sigmoid_bce")
    if options["config"] and "recipe" in typed:
        raise ValueError("--recipe: --config already sets every option; give one of them")
    if options["evaluate"] and not options["checkpoint"]:
        raise ValueError("--evaluate needs --checkpoint FILE, the checkpoint to evaluate")
    if typed.get("init_from") and typed.get("checkpoint", "auto") != "auto":
        raise ValueError("--init_from starts a new run and --checkpoint resumes one; give one of them")
    if options["scheduler"] == "multistep" and not options["schedule"]:
        raise ValueError("--scheduler multistep needs --schedule, the epochs at which the learning rate drops")
    if options.get("resize_dest") and not options["resize_to"]:
        raise ValueError(
            "--resize_dest is used only with --resize_to, which writes copies there; give --resize_to or leave it out"
        )
    if options.get("pretrained") and options["init_from"]:
        raise ValueError("--pretrained and --init_from both set the initial weights; give one of them")
    if options["scheduler"] == "multistep" and len(options["gammas"]) not in (1, len(options["schedule"])):
        raise ValueError(
            f"--gammas has {len(options['gammas'])} factors for the {len(options['schedule'])} milestones of "
            "--schedule; give one for all or one for each"
        )
    check_schedule(options)
    check_seeds(options, typed)
    check_mixing_combinations(options)


def check_schedule(options: dict) -> None:
    """Raise ValueError, with the remedy, for learning rates that contradict each other."""
    for key in ("min_lr", "warmup_lr"):
        if (options[key] or 0.0) > options["lr"]:
            raise ValueError(f"--{key} {options[key]:g} is above --lr {options['lr']:g}; give a lower one")


def check_seeds(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that contradict --seeds."""
    if not options["seeds"]:
        return
    if repeated := sorted({seed for seed in options["seeds"] if options["seeds"].count(seed) > 1}):
        raise ValueError(f"--seeds: {repeated[0]} is given more than once; give each seed once")
    if "seed" in typed:
        raise ValueError("--seed and --seeds both set the seed; give one of them")
    if options["profile"]:
        raise ValueError("--profile times a single run; give --seed instead of --seeds")
    if options["checkpoint"] not in (None, "auto"):
        raise ValueError(
            f"--checkpoint {options['checkpoint']}: --seeds resumes all of its runs with --checkpoint auto --name "
            "NAME; leave --seeds out to resume one of them"
        )


def check_mixing_combinations(options: dict) -> None:
    """Raise ValueError, with the remedy, for mixing options that cannot be combined."""
    if options["saliency_scope"] == "batch" and options["in_batch"] and "saliencymix" in options["method"]:
        raise ValueError(
            "--in_batch draws one lam per image and cannot be combined with --saliency_scope batch; leave one out"
        )
    own = [key for key in ("clean_lam", "update_ratio") if options[key] is not None]
    if options["clean_weight"] is not None and own:
        raise ValueError(
            f"--clean_weight {options['clean_weight']:g}: --{own[0]} {options[own[0]]:g} sets the weight of the "
            "unmixed images, too; give one of them"
        )
    if "comixup" in options["method"] and options["batch_size"] == 1:
        raise ValueError("--batch_size 1: comixup mixes several images; use a larger batch")
    if "rlmix" in options["method"] and (options["mix_off_epoch"] or options["mix_schedule"] == "scheduled"):
        raise ValueError(
            "--mix_off_epoch, --mix_schedule scheduled: the agent of rlmix needs batches of constant size; leave them "
            "out or use --method rmix"
        )
    if options["adv_p"] and "puzzlemix" not in options["method"]:
        raise ValueError("--adv_p: only puzzlemix has adversarial noise; leave it out or use --method puzzlemix")
    if options["adv_p"] and options["saliency"] not in (None, "gradient"):
        raise ValueError(
            "--adv_p needs the signed pixel gradient, which only --saliency gradient has; leave --saliency out"
        )
    if options["saliency"] == "casm" and not options["casm"]:
        raise ValueError("--saliency casm needs --casm FILE, made by python -m saliency.casm train")
    if options["mix_schedule"] != "fixed" and not options["mix_scheduled_epoch"]:
        raise ValueError(
            f"--mix_schedule {options['mix_schedule']} needs --mix_scheduled_epoch, the epoch at which --mix_fraction "
            "is reached"
        )


def check_phases(options: dict, typed: dict) -> None:
    """Raise ValueError for options that contradict --phases or --lr_points."""
    if options.get("phases"):
        end = parse_phases(options["phases"])[-1].end
        if options["epochs"] != end:
            raise ValueError(f"--epochs {options['epochs']}: --phases ends at epoch {end}; change the end in --phases")
        if given := [f"--{key}" for key in ("batch_size", "crop_size", "min_scale") if key in typed]:
            raise ValueError(f"{' '.join(given)}: set by --phases for each phase; change it there, or add --phases ''")
    if options["scheduler"] == "points":
        if not options["lr_points"]:
            raise ValueError("--scheduler points needs --lr_points EPOCH:LR,...")
        parse_lr_points(options["lr_points"])
        if "lr" in typed:
            raise ValueError(
                "--lr: --lr_points sets the learning rates; change them there, or choose another --scheduler"
            )
    elif "lr_points" in typed:
        raise ValueError(f"--lr_points has no effect with --scheduler {options['scheduler']}; add --scheduler points")
