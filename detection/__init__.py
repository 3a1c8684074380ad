"""Transfer learning to object detection: Faster R-CNN on PASCAL VOC with a backbone trained by this project."""

from engine import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "evaluate": "EvalResult evaluate_detector make_test_loader",
        "faster_rcnn": "DetectorConfig build_detector",
        "initialize": "build_initialized_detector load_initial_weights",
        "load": "load_image_sets",
        "loader": "DetectionLoader",
        "loop": "train_one_epoch",
        "metrics": "Detections GroundTruth coco_metrics voc_metrics",
        "pictures": "detect_in_pictures",
        "run": "DETECTOR DataInfo build_scheduler choose_kind describe_run draw_epoch evaluate_epoch finish_run "
        "reopen_last_epoch",
        "shape_scenes": "export_voc",
    },
)
