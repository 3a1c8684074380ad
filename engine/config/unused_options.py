"""Notes on options that have no effect on a run, or an unexpected one."""

from types import ModuleType

from engine.config.mixing_options import OPTION_GROUPS
from engine.config.parser import Parser
from engine.config.phases import build_phases

GRADIENT_SOURCE_OPTIONS = {
    "clean_lam",
    "update_ratio",
    "blur_sigma",
    "kernel_size",
    "eval_mode",
}  # read by no other source
ANY_METHOD_OPTIONS = {"cutout", "mix_fraction", "mix_schedule", "mix_scheduled_epoch", "mix_off_epoch"}


def collect_mixing_notes(
    options: dict, typed: dict, parser: Parser, *, methods: ModuleType, saliency: ModuleType, sources: list
) -> list[str]:
    """Return notes on mixing options that have no effect with the chosen methods and saliency sources.

    methods, saliency: the packages `mixing` and `saliency`. sources: the sources that the run uses.
    """
    notes, names = [], options["method"]
    read = set().union(*map(methods.hyper_parameters, names), *map(saliency.source_parameters, sources))
    if sources and not any(source.has_gradient for source in sources):
        read = read - GRADIENT_SOURCE_OPTIONS
        if options["clean_lam"] or {"comixup", "sage"} & set(names):
            notes.append(
                "only --saliency gradient also trains on the unmixed images; this run trains on the mixed ones alone, "
                "which changes the method, not just its speed"
            )
    if options["label_smoothing"] and any(source.clean_weight for source in sources):
        notes.append("--label_smoothing applies to the labels of the mixed images; those of the clean images stay hard")
    if unused := find_unused_options(typed, parser.get_option_names(*OPTION_GROUPS), read):
        notes.append(f"no effect with --method {' '.join(names)}: {', '.join(unused)}")
    return notes


def collect_image_notes(options: dict, typed: dict) -> list[str]:
    """Return a note on the typed options of imagenet_train.py that have no effect on this run, if there are any."""
    read = {phase.images for phase in build_phases(options)}
    unused = [f"--data_{name}" for name in ("small", "large") if f"data_{name}" in typed and name not in read]
    unused += ["--crop_padding"] if "crop_padding" in typed else []
    unused += ["--val_labels"] if "val_labels" in typed and options["dataset"] == "tiny-imagenet" else []
    unused += ["--zero_init"] if typed.get("zero_init") and (options["pretrained"] or options["init_from"]) else []
    if not options["trad_augment"]:
        unused += [f"--{key}" for key in ("min_scale", "color_jitter", "lighting") if key in typed]
    return [f"no effect in this run: {', '.join(unused)}"] if unused else []


def find_unused_options(typed: dict, mixing_options: set[str], read: set[str]) -> list[str]:
    """Return the typed mixing options that are not used. read: parameters of the chosen methods and their sources."""
    if typed.get("cutout"):
        read = read | {"cutout_length", "n_holes"}
    return sorted(f"--{key}" for key in typed.keys() & mixing_options - read - ANY_METHOD_OPTIONS)
