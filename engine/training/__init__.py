"""Training: the step, the epoch, the run with its folder and log, and the learning-rate schedule."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "console": "CLASSIFIER describe_run draw_epoch finish_run format_remark print_profile",
        "evaluate": "evaluate_checkpoint evaluate_held_out load_initial_weights",
        "loop": "profile_steps train_one_epoch",
        "loss": "LOSSES build_loss",
        "freezing": "freeze_layers",
        "monitor": "EpochMonitor",
        "network_step": "StepConfig",
        "pretrained": "load_pretrained_weights resolve_pretrained",
        "run": "Run",
        "running_sums": "EpochStats NonFiniteLoss TrainingInterrupted",
        "small_batches": "check_small_batches",
        "seeds": "train_seeds",
        "schedule": "StepSchedule build_scheduler",
        "start": "RunKind Start check_same_data start_processes start_run",
        "optimizer": "build_optimizer",
        "sources": "SourceBuilder",
        "state": "TrainingState build_training_state place_network",
    },
)
