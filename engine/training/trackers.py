"""Log to TensorBoard and Weights & Biases."""

import os

from engine.errors import UserError
from engine.training.run_folder import RunFolder, get_public_options


def add_trackers(run: RunFolder, options: dict) -> None:
    """Add the trackers that --use_tensorboard and --use_wandb ask for. Raises UserError if a package is missing."""
    if options.get("use_tensorboard") and not run.off:
        add_tensorboard(run)
    if options.get("use_wandb") and not run.off:
        add_wandb(run, options)


def add_tensorboard(run: RunFolder) -> None:
    """Also log to TensorBoard. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--use_tensorboard needs the package tensorboard: pip install tensorboard") from error
    writer = SummaryWriter(run.path)

    def track(row: dict) -> None:
        for key, value in row.items():
            if key != "epoch" and isinstance(value, (int, float)):
                writer.add_scalar(key, value, row["epoch"])
        writer.flush()

    run.trackers.append(track)


def add_wandb(run: RunFolder, options: dict) -> None:
    """Also log to Weights & Biases. Raises UserError if the package is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--use_wandb needs the package wandb: pip install wandb") from error
    if options["wandb_key"]:
        run.say(
            "note: other users can see --wandb_key in the process list; set WANDB_API_KEY in the environment instead"
        )
        os.environ["WANDB_API_KEY"] = options["wandb_key"]
    session = wandb.init(
        project=options["wandb_project"],
        entity=options["wandb_entity"],
        name=options["wandb_name"] or run.path.name,
        mode="offline" if options["wandb_offline"] else "online",
        dir=str(run.path),
        config=get_public_options(options),
        reinit=True,  # a process that trains several --seeds has one session for each
    )
    run.trackers.append(
        lambda row: session.log({key: value for key, value in row.items() if value is not None}, step=row["epoch"])
    )
