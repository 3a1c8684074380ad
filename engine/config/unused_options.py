"""Notes on options that have no effect on a run, or another one than expected."""

from types import ModuleType

from engine.config.mixing_options import OPTION_GROUPS
from engine.config.parser import Parser
from engine.config.phases import build_phases

GRADIENT_SOURCE_OPTIONS = {"clean_lam", "update_ratio", "blur_sigma", "kernel_size", "eval_mode"}  # no other reads them
ANY_METHOD_OPTIONS = {"cutout", "mix_fraction", "mix_schedule", "mix_scheduled_epoch", "mix_off_epoch"}


def collect_mixing_notes(
    options: dict, typed: dict, parser: Parser, *, methods: ModuleType, saliency: ModuleType, sources: list
) -> list[str]:
    """What the user should know of how the options of mixing meet the method and its sources.

    methods, saliency: the packages of these names. sources: those that the run uses.
    """
    notes, names = [], options["method"]
    read = set().union(*map(methods.hyper_parameters, names), *map(saliency.source_parameters, sources))
    if sources and not any(one.has_gradient for one in sources):
        read = read - GRADIENT_SOURCE_OPTIONS
        if options["clean_lam"] or {"comixup", "sage"} & set(names):
            notes.append("only --saliency gradient trains on the clean images too; here the mixed ones are all")
    if unread := find_unused_options(typed, parser.get_option_names(*OPTION_GROUPS), read):
        notes.append(f"without effect with --method {' '.join(names)}: {', '.join(unread)}")
    return notes


def collect_image_notes(options: dict, typed: dict) -> list[str]:
    """What the user typed about large images and nothing reads."""
    read = {phase.images for phase in build_phases(options)}
    idle = [f"--data_{name}" for name in ("small", "large") if f"data_{name}" in typed and name not in read]
    idle += ["--crop_padding"] if "crop_padding" in typed else []
    idle += ["--val_labels"] if "val_labels" in typed and options["dataset"] == "tiny-imagenet" else []
    idle += ["--zero_init"] if typed.get("zero_init") and (options["pretrained"] or options["init_from"]) else []
    if not options["trad_augment"]:
        idle += [f"--{key}" for key in ("min_scale", "color_jitter", "lighting") if key in typed]
    return [f"without effect here: {', '.join(idle)}"] if idle else []


def find_unused_options(typed: dict, mixing_options: set[str], read: set[str]) -> list[str]:
    """The typed options of mixing that nothing reads. read: parameters of the chosen methods and their sources."""
    if typed.get("cutout"):
        read = read | {"cutout_length", "n_holes"}
    return sorted(f"--{key}" for key in typed.keys() & mixing_options - read - ANY_METHOD_OPTIONS)
