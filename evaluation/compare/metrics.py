"""What runs can be compared by."""

from typing import NamedTuple


class Metric(NamedTuple):
    """What is compared. column: of log.csv. title: for tables and figures."""

    column: str
    title: str


METRICS = {  # name in --metric
    "top1": Metric("test_top1", "top-1 accuracy (%)"),
    "top5": Metric("test_top5", "top-5 accuracy (%)"),
    "ema_top1": Metric("ema_top1", "top-1 accuracy of the averaged weights (%)"),
    "valid_top1": Metric("valid_top1", "top-1 accuracy on validation images (%)"),
}
