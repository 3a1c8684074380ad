"""Notes on options that have no effect on a run, or an unexpected one."""

from collections.abc import Set
from types import ModuleType

from engine.config.augmentation_options import RAND_AUGMENT_OPTIONS
from engine.config.mixing_options import OPTION_GROUPS
from engine.config.option_types import format_option
from engine.config.parser import Parser
from engine.config.phases import build_phases
from engine.config.recipes import RECIPE_METHODS, get_recipe_options

BLUR_OPTIONS = {"blur_sigma", "kernel_size"}  # guidedmixup blurs the maps of any source, sage those of the gradient
GRADIENT_SOURCE_OPTIONS = {"clean_lam", "update_ratio", "eval_mode"} | BLUR_OPTIONS  # read by no other source
SCHEDULER_OPTIONS = {  # option -> the schedules that read it
    **dict.fromkeys(("schedule", "gammas"), {"multistep"}),
    **dict.fromkeys(("max_lr", "div_factor", "pct_start", "final_div_factor"), {"onecycle"}),
    **dict.fromkeys(("warmup_epochs", "warmup_lr"), {"multistep", "cosine", "cosine_step", "linear", "constant"}),
    "min_lr": {"multistep", "cosine", "cosine_step", "linear"},
}
OPTIMIZER_OPTIONS = {"momentum", "nesterov", "betas", "eps"}  # which not every optimizer has
MEMORY_DATASETS = {"shapes", "cifar10", "cifar100"}  # not read from image files
CIFAR_SIDE = 32  # in pixels
FEW_STEPS = 10  # of an epoch
LOG_OPTIONS = {"name", "root_dir", "overwrite", "save_every", "vis_epoch", "use_tensorboard", "use_wandb"}
ANY_METHOD_OPTIONS = {
    "method_weights",
    "cutout",
    "mix_fraction",
    "mix_schedule",
    "mix_scheduled_epoch",
    "mix_off_epoch",
}


def collect_mixing_notes(
    options: dict, typed: dict, parser: Parser, *, methods: ModuleType, saliency: ModuleType, sources: list
) -> list[str]:
    """Return notes on mixing options that have no effect with the chosen methods and saliency sources.

    methods, saliency: the packages `mixing` and `saliency`. sources: the sources that the run uses.
    """
    notes, names = [], options["method"]
    read = set().union(*map(methods.hyper_parameters, names), *map(saliency.source_parameters, sources))
    read |= {"clean_weight"} if names != ["none"] else set()
    read |= {"labels"} if any(not methods.mixer_class(name).same_weights for name in names) else set()
    read -= {"eval_mode"} if options["clean_weight"] else set()  # the pass that trains is in training mode
    if typed.get("top_k") and names == ["attentivemix"]:
        read -= {"mixup_alpha", "in_batch"}  # they draw the number of cells
    if sources and not any(source.has_gradient for source in sources):
        read = read - GRADIENT_SOURCE_OPTIONS | (BLUR_OPTIONS if "guidedmixup" in names else set())
        if options["clean_weight"] is None and (options["clean_lam"] or {"comixup", "sage"} & set(names)):
            notes.append(
                "only --saliency gradient also trains on the unmixed images; this run trains on the mixed ones alone, "
                "which changes the method, not just its speed; --clean_weight 1 trains on both"
            )
    if options["auto_augment"] != "none" and any(source.learns for source in sources):
        notes.append(
            "--saliency bank follows crops and flips, but not the shears, shifts and rotations of --auto_augment, so "
            "its maps are blurred; --saliency gradient follows all of them"
        )
    if options["graph_step"] or any(source.capturable for source in sources):
        read = read | {"kernels"}  # torch: no CUDA graphs
    own_clean_loss = options["clean_weight"] is None and any(source.clean_weight for source in sources)
    if options["label_smoothing"] and own_clean_loss:
        notes.append("--label_smoothing applies to the labels of the mixed images; those of the clean images stay hard")
    if unused := find_unused_options(typed, parser.get_option_names(*OPTION_GROUPS), read):
        notes.append(f"no effect with --method {' '.join(names)}: {', '.join(unused)}")
    return notes


def collect_run_notes(
    options: dict, typed: dict, saved: dict, steps: int, taken: Set[str] = frozenset(OPTIMIZER_OPTIONS)
) -> list[str]:
    """Return notes on options of the optimizer, the schedule, the images and the output that have no effect on this
    run, or an unexpected one.

    saved: the options of the run that is resumed; {}: a new run. steps: per epoch. taken: names of the hyper-parameters
    of the optimizer that was built.
    """
    scheduler = options["scheduler"]
    ignored = {key for key, readers in SCHEDULER_OPTIONS.items() if scheduler not in readers and typed.get(key)}
    if scheduler == "onecycle":
        ignored |= {"momentum"} if options["momentum"] and "momentum" in taken else set()
        ignored |= {"lr"} if options["max_lr"] else set()
    notes = [f"no effect with --scheduler {scheduler}: {names}"] if (names := format_typed(ignored, typed)) else []
    notes += describe_optimizer(options, typed, taken)
    unused = find_unused_image_options(options, typed)
    unused |= {"warmup_lr"} if not options["warmup_epochs"] else set()
    unused |= {"bce_target_thresh"} if options["loss"] != "sigmoid_bce" else set()
    unused |= LOG_OPTIONS if options["log_off"] else set()
    unused |= {"mix_scheduled_epoch"} if options["mix_schedule"] == "fixed" else set()
    notes += [f"no effect in this run: {names}"] if (names := format_typed(unused, typed)) else []
    if options["dataset"] == "folder" and typed.get("norm") == "own":
        notes.append("--norm own: a folder has no mean and std on record; pixels are normalised by those of ImageNet")
    notes += describe_other_recipe(options, typed) + describe_length(options, saved)
    return notes if saved else notes + describe_few_steps(options, typed, steps)


def describe_optimizer(options: dict, typed: dict, taken: Set[str]) -> list[str]:
    """Return notes on options of the optimizer that it does not have, and on frozen random weights.

    taken: names of the hyper-parameters of the optimizer that was built.
    """
    notes, name = [], options["optimizer"]
    ignored = OPTIMIZER_OPTIONS - taken | ({"nesterov"} if name != "sgd" else set())
    ignored |= {"no_decay_bn"} if options["no_decay_1d"] else set()
    if names := format_typed(ignored, typed):
        because = " and --no_decay_1d" * (options["no_decay_1d"] and "no_decay_bn" in typed)
        notes.append(f"no effect with --optimizer {name}{because}: {names}")
    if options["scheduler"] == "onecycle" and "betas" in typed and "betas" in taken:
        notes.append("--scheduler onecycle moves the first of the --betas between 0.95 and 0.85")
    if options["freeze"] and not (options["init_from"] or options.get("pretrained")):
        notes.append("--freeze: the frozen layers keep their random weights; --init_from loads trained ones")
    return notes


def describe_few_steps(options: dict, typed: dict, steps: int) -> list[str]:
    """Return a note if an epoch has so few steps that a recipe for a large data set cannot work: at its learning rate
    the running statistics of batch norm never catch up with the weights.
    """
    small = "fine_tune" if "crop_size" in options else "small"
    chosen = options["limit"] or {"lr", "max_lr", "lr_points"} & typed.keys()
    if steps >= FEW_STEPS or chosen or options["recipe"] in ("small", "fine_tune"):
        return []
    return [
        f"an epoch has only {steps} step{'s' * (steps > 1)}: recipe {options['recipe']}, with its batch size and its "
        f"learning rate, is for large data sets; take --recipe {small}{' --pretrained' * (small == 'fine_tune')}"
    ]


def find_unused_image_options(options: dict, typed: dict) -> set[str]:
    """Return the options for images that this run does not read, typed or not."""
    unused, dataset = set(), options["dataset"]
    if dataset in MEMORY_DATASETS:
        unused |= {"val_labels", "on_bad_image", "eval_resize"}
    if dataset == "shapes":
        unused |= {"data_dir", "val_data_dir", "download"}
    if dataset == "tiny-imagenet":
        unused |= {"val_labels"}
    unused |= find_unused_augmentation_options(options)
    if "crop_size" in options:  # large images
        read = {phase.images for phase in build_phases(options)}
        unused |= {f"data_{name}" for name in ("small", "large") if name not in read}
        unused |= {"zero_init"} if typed.get("zero_init") and (options["pretrained"] or options["init_from"]) else set()
    return unused


def find_unused_augmentation_options(options: dict) -> set[str]:
    """Return the options for augmentation that this run does not read, typed or not."""
    padding, cropped = {"crop_padding", "crop_padding_mode"}, options["trad_augment"]
    unused = set() if cropped else padding | {"min_scale", "color_jitter", "lighting"}
    if options["min_scale"] is not None:  # resized crops in place of padded ones
        unused |= padding
    if not options["crop_padding"]:
        unused |= {"crop_padding_mode"}
    if options["auto_augment"] != "rand":
        unused |= RAND_AUGMENT_OPTIONS
    resized = (cropped and options["min_scale"] is not None) or options["auto_augment"] != "none"
    own_size = options["dataset"] == "shapes" or options["image_size"] in (None, CIFAR_SIDE)
    if options["dataset"] in MEMORY_DATASETS and own_size and not resized:
        unused |= {"interpolation"}
    return unused


def describe_length(options: dict, saved: dict) -> list[str]:
    """Return notes on parts of the schedule that the length of the run makes ineffective or moves."""
    notes, epochs, scheduler = [], options["epochs"], options["scheduler"]
    if scheduler == "multistep" and min(options["schedule"]) >= epochs:
        milestones = " ".join(map(str, options["schedule"]))
        notes.append(f"--schedule {milestones}: the learning rate never drops, since the run ends at epoch {epochs}")
    if (warmup := options["warmup_epochs"]) > epochs and scheduler in SCHEDULER_OPTIONS["warmup_epochs"]:
        notes.append(f"--warmup_epochs {warmup:g}: the run ends within the warm-up, at epoch {epochs}")
    for key in ["mix_off_epoch"] + ["mix_scheduled_epoch"] * (options["mix_schedule"] == "delayed"):
        if options[key] >= epochs:
            notes.append(f"--{key} {options[key]}: nothing is mixed, since the run ends at epoch {epochs}")
    if (before := saved.get("epochs", epochs)) != epochs:
        changed = f"--epochs {epochs} instead of {before}"
        if scheduler in ("cosine", "cosine_step", "linear"):
            notes.append(
                f"{changed}: the {scheduler} schedule now ends at epoch {epochs}, so the learning rate jumps here; "
                f"results will differ from those of a run with --epochs {epochs} from the start"
            )
        if options["ema_ramp"]:
            notes.append(f"{changed}: the decay of --ema_ramp now reaches its end at epoch {epochs}, so it jumps here")
        if options["mix_off_epoch"]:
            notes.append(f"{changed}: --mix_off_epoch {options['mix_off_epoch']} now means the last of {epochs} epochs")
    return notes


def describe_other_recipe(options: dict, typed: dict) -> list[str]:
    """Return a note if `--recipe auto` chose one recipe, but most of the typed values are those of another one.

    Such a command is usually one of a comparison whose other methods get the other recipe.
    """
    name, common = options["recipe"], {key: options[key] for key in ("dataset", "model", "method")}
    recipes = ["saliencymix", *RECIPE_METHODS, "openmixup"]
    if typed.get("recipe", "auto") != "auto" or options["config"] or name not in recipes:
        return []
    own, best, other = get_recipe_options(name, **common), [], name
    for candidate in recipes:
        recipe = get_recipe_options(candidate, **common)
        differing = [key for key in typed if key in recipe and not is_same(recipe[key], own[key]) and key != "dataset"]
        its, ours = ([key for key in differing if is_same(typed[key], values[key])] for values in (recipe, own))
        if len(its) > max(1, len(best), len(ours)):
            best, other = its, candidate
    if not best:
        return []
    values = get_recipe_options(other, **common)
    rest = [key for key in values if key not in {*typed, "method_options", "dataset", "model"}]
    rest = [key for key in rest if key in options and not is_same(values[key], options[key])]
    rest = [f"{key} {format_option(values[key])} (not {format_option(options[key])})" for key in rest]
    return [
        f"--recipe auto means {name} for {' '.join(options['method'])}, but {' '.join(f'--{key}' for key in best)} are "
        f"as in --recipe {other}, which also sets {', '.join(rest) or 'options of the methods'}; runs to compare need "
        "the same --recipe"
    ]


def is_same(a, b) -> bool:
    """Return whether two values of an option mean the same: one factor of --gammas serves for all milestones."""
    return set(a) == set(b) if isinstance(a, list) and isinstance(b, list) else a == b


def format_typed(names: set[str], typed: dict) -> str:
    """Return those of the options that were typed, as flags."""
    return ", ".join(f"--{key}" for key in sorted(names & typed.keys()))


def find_unused_options(typed: dict, mixing_options: set[str], read: set[str]) -> list[str]:
    """Return the typed mixing options that are not used. read: parameters of the chosen methods and their sources."""
    if typed.get("cutout"):
        read = read | {"cutout_length", "n_holes"}
    return sorted(f"--{key}" for key in typed.keys() & mixing_options - read - ANY_METHOD_OPTIONS)
