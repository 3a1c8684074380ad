"""The environment of a run: devices, processes, signals, files, checkpoints and progress display."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "checkpoint": "Checkpoint read_checkpoint read_file save_checkpoint",
        "device": "autocast choose_device choose_precision setup_backends",
        "distributed": "check_sync_bn convert_sync_batchnorm init_processes is_main_process main_process_first rank "
        "shut_down_processes world_size",
        "progress": "Progress progress_bar use_progress_bar",
    },
)
