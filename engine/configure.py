"""From what was typed to what is run: shorthands, recipes, saved options, and what does not go together."""

from engine.cli import Parser, UserError
from engine.phases import large_side, phases_of, read_phases, read_points
from engine.recipes import recipe_for, recipe_options

MAY_DIFFER = {  # options that may change when a run is continued
    *("epochs", "workers", "device", "data_dir", "val_data_dir", "download", "amp", "profile", "debug", "timeout"),
    *("data_small", "data_large"),
    *("root_dir", "name", "overwrite", "log_off", "save_every", "print_freq", "no_progress", "vis_epoch"),
    *("use_tensorboard", "use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_offline", "wandb_key"),
    *("checkpoint", "evaluate", "force_config", "config", "list_models", "resize_to", "resize_dest"),
}
ONE_CYCLE = {  # what a one-cycle schedule is laid out by
    *("epochs", "batch_size", "drop_last", "lr", "max_lr", "momentum", "div_factor", "pct_start", "final_div_factor"),
}
BUILT_IN = {
    "bank_size",
    "num_action",
    "num_patches",
    "model",
    "dataset",
    "num_classes",
    "image_size",
    "scheduler",
    "ema",
}  # no state would fit after a change
ONE_CALL = {  # what is said to one call of a script and not kept with the run
    *("checkpoint", "config", "evaluate", "force_config", "overwrite", "profile", "list_models", "debug", "name"),
    *("resize_to", "resize_dest"),
}
WITHOUT_MEANING = {  # options of the earlier codes that say nothing here: graph-cut processes, unused flags, file names
    *("mp", "parallel", "mixing_workers", "initial_channels", "job_id", "env", "shuffle_data", "use_scheduler"),
    *("cnn_save_path", "scheduler_save_path", "rl_save_path"),
}
OF_THE_GRADIENT = {"clean_lam", "update_ratio", "blur_sigma", "kernel_size", "eval_mode"}  # read by that source alone
DERIVED = {"image_size": ("crop_size", "eval_resize"), "phases": ("epochs", "batch_size")}  # unless they are typed
AROUND_ANY_METHOD = {"cutout", "mix_fraction", "mix_schedule", "mix_scheduled_epoch", "mix_off_epoch"}


def read(parser: Parser, argv: list[str] | None) -> tuple[dict, list[str]]:
    """The typed options in today's terms, and notes on what was translated; a contradiction ends with a usage error."""
    try:
        return translate(parser.read(argv))
    except ValueError as error:
        parser.error(str(error))


def translate(typed: dict) -> tuple[dict, list[str]]:
    """Shorthands and older names in today's terms: the options, and a line for each translation worth showing.

    Raises ValueError where two methods are asked for at once, or several GPUs.
    """
    typed, lines = dict(typed), []
    named = {"--method " + " ".join(typed["method"]): typed["method"]} if "method" in typed else {}
    for option, method in (("saliency_probab", "saliencymix"), ("cutmix_probab", "cutmix")):
        if chance := typed.pop(option, 0):
            named[f"--{option} {chance:g}"] = [method]
            typed["mix_prob"] = chance
    box, graph = typed.pop("box", False), typed.pop("graph", False)
    if train := typed.pop("train", None):
        mixed = "puzzlemix" if graph else "cutmix" if box else "mixup"
        today = {"vanilla": "none", "mixup": mixed, "mixup_hidden": "manifold"}[train]
        old = f"--train {train}" + (" --box" if box else "") + (" --graph" if graph else "")
        named[old] = [today]
        lines.append(f"{old} is --method {today}")
    if (comix := typed.pop("comix", None)) is not None:
        old, today = f"--comix {str(comix).lower()}", "comixup" if comix else "none"
        named[old] = [today]
        typed = typed if comix else {"recipe": "puzzle", **typed}
        lines.append(f"{old} is --method {today}" + ("" if comix else " --recipe puzzle"))
    if ignored := [f"--{key}" for key in sorted(WITHOUT_MEANING) if typed.pop(key, None) is not None]:
        lines.append(f"{' '.join(ignored)}: of an earlier code, without meaning here")
    if len({tuple(methods) for methods in named.values()}) > 1:
        raise ValueError(f"{' and '.join(named)} name different methods; several drawn per batch are --method A B")
    if named:
        typed["method"] = next(iter(named.values()))
    if typed.pop("use_fp16", False):
        typed["amp"] = "fp16"
    if (gpus := typed.pop("ngpu", None)) is not None:
        if gpus > 1:
            raise ValueError(f"--ngpu {gpus}: several GPUs are used by torchrun --nproc_per_node {gpus} in front")
        typed["device"] = "cuda" if gpus else "cpu"
    if typed.pop("saliency_legacy_float", False):
        typed = {"saliency": "float_bytes", "saliency_scope": "batch", **typed}
        lines.append("--saliency_legacy_float is --saliency float_bytes --saliency_scope batch")
    if "per_sample" in typed and "saliencymix" in typed.get("method", []):
        typed.setdefault("saliency_scope", "sample" if typed["per_sample"] else "batch")
        if "cutmix" not in typed["method"]:
            del typed["per_sample"]
    return typed, lines


def large_images(typed: dict) -> dict:
    """What follows on large images: where the data set is not named, its copies serve as it."""
    typed = dict(typed)
    if "data_dir" not in typed and typed.get("data_large"):
        typed["data_dir"] = typed["data_large"]
    return typed


def in_phase(options: dict, number: int) -> dict:
    """The options of a phase: those that a recipe sets for single methods, and what it adds to them there."""
    added = options["phase_options"][min(number, len(options["phase_options"]) - 1)] if options["phase_options"] else {}
    by_method = dict(options["method_options"])
    for method, own in added.items():
        by_method[method] = {**by_method.get(method, {}), **own}
    return {**options, "method_options": by_method}


def fill_in(typed: dict, saved: dict, defaults: dict) -> dict[str, object]:
    """Every option: what was typed, else saved (--config, a checkpoint), else the recipe's, else the default."""
    stale = {key for told, derived in DERIVED.items() if told in typed for key in derived}
    given = {**{key: value for key, value in saved.items() if key in defaults.keys() - ONE_CALL - stale}, **typed}
    name = given.get("recipe", defaults["recipe"])
    if saved.get("recipe") and name == "auto":
        name = saved["recipe"]
    if name == "auto":
        named = bool({"method", "model", "dataset"} & given.keys())
        name = recipe_for(given.get("method", defaults["method"]), given.get("dataset"), named)
    recipe = recipe_options(name, dataset=given.get("dataset"), model=given.get("model"))
    if "lr" in given and "max_lr" not in given:
        recipe.pop("max_lr", None)  # the peak of one-cycle is then the given lr
    if unknown := recipe.keys() - defaults.keys():
        raise KeyError(f"recipe {name} sets options that do not exist: {sorted(unknown)}")
    if phases := given.get("phases", recipe.get("phases")):
        first, *_, last = [*read_phases(phases)] * 2
        recipe |= {"epochs": last.end, "batch_size": first.batch_size}
    filled = {**defaults, **recipe, **given, "recipe": name}
    if "crop_size" in filled:  # large images: evaluated on the centre of 7/8 of the shorter side, as on ImageNet
        filled["crop_size"] = filled["crop_size"] or filled["image_size"]
        filled["eval_resize"] = filled["eval_resize"] or large_side(filled["image_size"])
    return filled


def settle(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option, filled in and checked; a contradiction ends with a usage error."""
    try:
        options = fill_in(typed, saved, parser.defaults)
        check_together(options, typed)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_together(options: dict, typed: dict) -> None:
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
        end = read_phases(options["phases"])[-1].end
        if options["epochs"] != end:
            raise ValueError(f"--epochs {options['epochs']}: --phases end at {end}; give --phases that end there")
        if told := [f"--{key}" for key in ("batch_size", "crop_size", "min_scale") if key in typed]:
            raise ValueError(f"{' '.join(told)}: --phases say it for each phase; change it there, or --phases ''")
    if options["scheduler"] == "points":
        if not options["lr_points"]:
            raise ValueError("--scheduler points needs --lr_points")
        read_points(options["lr_points"])
        if "lr" in typed:
            raise ValueError("--lr: --lr_points say the rates; change them there, or choose another --scheduler")
    elif "lr_points" in typed:
        raise ValueError(f"--lr_points: --scheduler {options['scheduler']} does not read them; add --scheduler points")


def check_resume(typed: dict, saved: dict, force: bool = False) -> None:
    """Raise UserError, with both values of each, where typed options differ from those a run was started with.

    force: all may differ but those that no saved state would fit.
    """
    differ = {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}
    if saved["scheduler"] == "onecycle" and differ & ONE_CYCLE and (force or differ <= MAY_DIFFER):
        raise UserError(
            f"{flags(differ & ONE_CYCLE)}: the one-cycle schedule of this run is laid out for {saved['epochs']} epochs "
            "and other values\nstart a new run; --init_from takes the weights of this one"
        )
    refuse(differ, typed, saved, may_differ=MAY_DIFFER, built_in=BUILT_IN, force=force)


def refuse(differ: set[str], typed: dict, saved: dict, *, may_differ: set[str], built_in: set[str], force: bool):
    """Raise UserError for options that differ from the saved ones and must not. force: only those of `built_in`, which
    no saved state would fit, must not.
    """
    if force and differ & built_in:
        raise UserError(
            f"{flags(differ & built_in)}: the saved state would not fit\nstart a new run from the weights of this one"
        )
    if not force and (refused := differ - may_differ):
        width = max(map(len, refused))
        rows = "\n".join(f"  --{key:<{width}}  {saved[key]}  ->  {typed[key]}" for key in sorted(refused))
        raise UserError(
            f"the run to continue has other options (saved -> given):\n{rows}\nleave them out to continue it, or say "
            "--force_config"
        )


def flags(keys: set[str]) -> str:
    return " ".join(f"--{key}" for key in sorted(keys))


def notes_on_mixing(options: dict, typed: dict, parser: Parser, groups: list[str], read: set[str], sources: list):
    """What the user should know of how the options of mixing meet the method. read: the parameters of its methods and
    their sources.
    """
    notes = []
    if sources and not any(hasattr(one, "gradient") for one in sources):
        read = read - OF_THE_GRADIENT
        if options["clean_lam"] or {"comixup", "sage"} & set(options["method"]):
            notes.append("only --saliency gradient trains on the clean images too; here the mixed ones are all")
    if unread := without_effect(typed, parser.group_of(*groups), read):
        notes.append(f"without effect with --method {' '.join(options['method'])}: {', '.join(unread)}")
    return notes


def notes_on_images(options: dict, typed: dict) -> list[str]:
    """What the user typed about large images and nothing reads."""
    read = {phase.images for phase in phases_of(options)}
    idle = [f"--data_{name}" for name in ("small", "large") if f"data_{name}" in typed and name not in read]
    idle += ["--crop_padding"] if "crop_padding" in typed else []
    idle += ["--val_labels"] if "val_labels" in typed and options["dataset"] == "tiny-imagenet" else []
    idle += ["--zero_init"] if typed.get("zero_init") and (options["pretrained"] or options["init_from"]) else []
    if not options["trad_augment"]:
        idle += [f"--{key}" for key in ("min_scale", "color_jitter", "lighting") if key in typed]
    return [f"without effect here: {', '.join(idle)}"] if idle else []


def without_effect(typed: dict, mixing_options: set[str], read: set[str]) -> list[str]:
    """The typed options of mixing that nothing reads. read: parameters of the chosen methods and their sources."""
    if typed.get("cutout"):
        read = read | {"cutout_length", "n_holes"}
    return sorted(f"--{key}" for key in typed.keys() & mixing_options - read - AROUND_ANY_METHOD)
