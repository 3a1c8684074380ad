"""Where the value of an option comes from, and which options may change when a run is resumed.

This is one mechanism for every kind of run (classifier, detector, saliency maps); a kind hands in its OptionRules.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from engine.errors import UserError

RESUME_CHANGEABLE = (  # of every kind of run
    {"epochs", "checkpoint", "evaluate", "force_config", "config"}
    | {"device", "workers", "amp", "timeout", "debug", "data_dir", "val_data_dir", "download"}
    | {"root_dir", "name", "overwrite", "log_off", "save_every", "print_freq", "no_progress", "use_tensorboard"}
    | {"use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_offline", "wandb_key"}
)
PER_CALL_OPTIONS = {"checkpoint", "config", "evaluate", "force_config", "overwrite", "debug", "name"}


@dataclass(frozen=True)
class OptionRules:
    """Sets of option names.

    changeable: they may change when a run is resumed. architecture: no saved state fits after they change, so that not
    even force allows it. per_call: they are given to one call of a command and never taken from a saved run. replaces:
    an option -> the saved ones that no longer count once it is typed. remedy: what a user can do about other changes.
    """

    changeable: Set[str] = frozenset(RESUME_CHANGEABLE)
    architecture: Set[str] = frozenset()
    per_call: Set[str] = frozenset(PER_CALL_OPTIONS)
    replaces: Mapping[str, Set[str]] = field(default_factory=dict)
    remedy: str = "leave them out to continue it, or say --force_config"


def merge_options(
    typed: dict, saved: dict, defaults: dict, *, rules: OptionRules, recipe: Callable[[dict], dict]
) -> dict[str, object]:
    """Every option: what was typed, else saved (in a checkpoint or the file of --config), else the recipe's, else the
    default. A typed `--recipe auto` is that of the saved run.

    recipe: a function of the options that were typed or saved; it returns what the recipe sets, its name included.
    """
    typed = {key: value for key, value in typed.items() if (key, value) != ("recipe", "auto")}
    replaced = set().union(*(keys for option, keys in rules.replaces.items() if option in typed))
    kept = defaults.keys() - rules.per_call - replaced
    given = {**{key: value for key, value in saved.items() if key in kept}, **typed}
    return {**defaults, **recipe(given), **given}


def find_changes(typed: dict, saved: dict) -> set[str]:
    """The options that were typed with another value than the saved one; `auto` is never another one."""
    return {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}


def check_changed_options(typed: dict, saved: dict, *, rules: OptionRules, force: bool = False) -> None:
    """Raise UserError, with both values of each, where typed options are not those that the run was started with.

    force: all may change but rules.architecture.
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
        raise UserError(f"the run to continue has other options (saved -> given):\n{rows}\n{rules.remedy}")


def format_flags(keys: Set[str]) -> str:
    return " ".join(f"--{key}" for key in sorted(keys))
