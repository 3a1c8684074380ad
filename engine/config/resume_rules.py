"""Which options may change when a run is resumed."""

from engine.errors import UserError

RESUME_CHANGEABLE = {  # options that may change when a run is continued
    *("epochs", "workers", "device", "data_dir", "val_data_dir", "download", "amp", "profile", "debug", "timeout"),
    *("data_small", "data_large"),
    *("root_dir", "name", "overwrite", "log_off", "save_every", "print_freq", "no_progress", "vis_epoch"),
    *("use_tensorboard", "use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_offline", "wandb_key"),
    *("checkpoint", "evaluate", "force_config", "config", "list_models", "resize_to", "resize_dest"),
}
ONE_CYCLE_OPTIONS = {  # what a one-cycle schedule is laid out by
    *("epochs", "batch_size", "drop_last", "lr", "max_lr", "momentum", "div_factor", "pct_start", "final_div_factor"),
}
ARCHITECTURE_OPTIONS = {
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
PER_CALL_OPTIONS = {  # what is said to one call of a script and not kept with the run
    *("checkpoint", "config", "evaluate", "force_config", "overwrite", "profile", "list_models", "debug", "name"),
    *("resize_to", "resize_dest"),
}


def check_resume_options(typed: dict, saved: dict, force: bool = False) -> None:
    """Raise UserError, with both values of each, where typed options differ from those a run was started with.

    force: all may differ but those that no saved state would fit.
    """
    differ = {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}
    if saved["scheduler"] == "onecycle" and differ & ONE_CYCLE_OPTIONS and (force or differ <= RESUME_CHANGEABLE):
        raise UserError(
            f"{flag_names(differ & ONE_CYCLE_OPTIONS)}: the one-cycle schedule of this run is laid out for "
            f"{saved['epochs']} epochs "
            "and other values\nstart a new run; --init_from takes the weights of this one"
        )
    check_changed_options(
        differ, typed, saved, may_differ=RESUME_CHANGEABLE, built_in=ARCHITECTURE_OPTIONS, force=force
    )


def check_changed_options(
    differ: set[str], typed: dict, saved: dict, *, may_differ: set[str], built_in: set[str], force: bool
):
    """Raise UserError for options that differ from the saved ones and must not. force: only those of `built_in`, which
    no saved state would fit, must not.
    """
    if force and differ & built_in:
        raise UserError(
            f"{flag_names(differ & built_in)}: the saved state would not fit\nstart a new run from the weights of "
            f"this one"
        )
    if not force and (refused := differ - may_differ):
        width = max(map(len, refused))
        rows = "\n".join(f"  --{key:<{width}}  {saved[key]}  ->  {typed[key]}" for key in sorted(refused))
        raise UserError(
            f"the run to continue has other options (saved -> given):\n{rows}\nleave them out to continue it, or say "
            "--force_config"
        )


def flag_names(keys: set[str]) -> str:
    return " ".join(f"--{key}" for key in sorted(keys))
