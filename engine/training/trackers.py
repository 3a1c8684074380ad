"""TensorBoard and Weights & Biases."""

import os

from engine.errors import UserError
from engine.training.run_folder import RunFolder, public_options


def add_trackers(run: RunFolder, options: dict) -> None:
    """TensorBoard and Weights & Biases, where asked for."""
    if options.get("use_tensorboard") and not run.off:
        add_tensorboard(run)
    if options.get("use_wandb") and not run.off:
        add_wandb(run, options)


def add_tensorboard(run: RunFolder) -> None:
    """Log to TensorBoard too. Raises UserError when the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--use_tensorboard needs another package: pip install tensorboard") from error
    writer = SummaryWriter(run.path)

    def track(row: dict) -> None:
        for key, value in row.items():
            if key != "epoch" and isinstance(value, (int, float)):
                writer.add_scalar(key, value, row["epoch"])
        writer.flush()

    run.trackers.append(track)


def add_wandb(run: RunFolder, options: dict) -> None:
    """Log to Weights & Biases too. Raises UserError when the package is missing."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--use_wandb needs another package: pip install wandb") from error
    if options["wandb_key"]:
        run.say("others can read --wandb_key in the list of processes; the environment variable WANDB_API_KEY is safer")
        os.environ["WANDB_API_KEY"] = options["wandb_key"]
    session = wandb.init(
        project=options["wandb_project"],
        entity=options["wandb_entity"],
        name=options["wandb_name"] or run.path.name,
        mode="offline" if options["wandb_offline"] else "online",
        dir=str(run.path),
        config=public_options(options),
    )
    run.trackers.append(
        lambda row: session.log({key: value for key, value in row.items() if value is not None}, step=row["epoch"])
    )
