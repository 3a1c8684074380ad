"""What evaluate.py measures: accuracy, robustness, calibration, out-of-distribution detection, localisation."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "context": "EvalContext EvalSession check_same_images",
        "loading": "build_context load_classifiers load_images print_info",
        "reports": "report_card report_task",
        "robustness": "add_mean_corruption_errors",
        "tasks": "PLANNERS measure_card run_plan",
    },
)
