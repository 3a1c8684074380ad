"""Rules for options: where the value of an option comes from, and which options may change when a run is resumed.

All kinds of runs (classifier, detector, mask network) share this code; each passes its own OptionRules.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from engine.errors import UserError

RESUME_CHANGEABLE = (  # for every kind of run
    {"epochs", "checkpoint", "evaluate", "force_config", "config"}
    | {
        "device",
        "workers",
        "amp",
        "kernels",
        "timeout",
        "debug",
        "data_dir",
        "val_data_dir",
        "download",
        "on_bad_image",
    }
    | {"root_dir", "name", "overwrite", "log_off", "save_every", "print_freq", "no_progress", "use_tensorboard"}
    | {"dpi", "figure_format", "kernels"}
    | {"use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_offline", "wandb_key"}
)
PER_CALL_OPTIONS = {"checkpoint", "config", "evaluate", "force_config", "overwrite", "debug", "name"}


@dataclass(frozen=True)
class OptionRules:
    """Sets of option names.

    changeable: may change when a run is resumed. architecture: must not change even with force, because the saved state
    would no longer fit. per_call: belong to a single call of a command and are never taken from a saved run. replaces:
    an option -> saved options that no longer count if it is typed with another value. remedy: advice in the error about
    all other changes.
    """

    changeable: Set[str] = frozenset(RESUME_CHANGEABLE)
    architecture: Set[str] = frozenset()
    per_call: Set[str] = frozenset(PER_CALL_OPTIONS)
    replaces: Mapping[str, Set[str]] = field(default_factory=dict)
    remedy: str = "leave these options out to resume the run, or add --force_config"


def merge_options(
    typed: dict, saved: dict, defaults: dict, *, rules: OptionRules, recipe: Callable[[dict], dict]
) -> dict[str, object]:
    """Return every option: the typed value, else the saved one, else that of the recipe, else the default.

    saved: options from a checkpoint or from the file of --config. recipe: a function of the options that were typed or
    saved; it returns the options that the recipe sets, including its name. A typed `--recipe auto` means the recipe of
    the saved run.
    """
    typed = {key: value for key, value in typed.items() if (key, value) != ("recipe", "auto")}
    new = {key for key, value in typed.items() if key not in saved or saved[key] != value}
    replaced = set().union(*(keys for option, keys in rules.replaces.items() if option in new))
    kept = defaults.keys() - rules.per_call - replaced
    given = {**{key: value for key, value in saved.items() if key in kept}, **typed}
    return {**defaults, **recipe(given), **given}


def find_changes(typed: dict, saved: dict) -> set[str]:
    """Return the options whose typed value differs from the saved one. The value `auto` never counts as different."""
    return {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}


def check_changed_options(typed: dict, saved: dict, *, rules: OptionRules, force: bool = False) -> None:
    """Raise UserError, with the saved and the typed values, if options were typed that must not change.

    force: all options may change except rules.architecture.
    """
    changes = find_changes(typed, saved)
    if force and changes & rules.architecture:
        raise UserError(
            f"{format_flags(changes & rules.architecture)}: the saved state would not fit\nstart a new run from the "
            "weights of this one"
        )
    if not force and (refused := changes - rules.changeable):
        width = max(map(len, refused))
        rows = "\n".join(f"  --{key:<{width}}  {saved[key]}  ->  {typed[key]}" for key in sorted(refused))
        raise UserError(f"the saved run has other options (saved -> given):\n{rows}\n{rules.remedy}")


def format_flags(keys: Set[str]) -> str:
    """Return the options as sorted flags."""
    return " ".join(f"--{key}" for key in sorted(keys))
