"""What evaluate.py does: it measures accuracy, robustness, calibration, out-of-distribution detection and localisation,
classifies pictures, and exports a classifier.
"""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "context": "EvalContext EvalSession check_same_images",
        "export": "run_export",
        "loading": "build_context load_classifiers load_images print_info",
        "predict": "build_picture_context find_pictures predict_pictures report_predictions",
        "reports": "report_card report_task",
        "robustness": "add_mean_corruption_errors",
        "tasks": "PLANNERS measure_card run_plan",
    },
)
