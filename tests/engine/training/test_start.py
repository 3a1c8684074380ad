"""Start of a run: whether an earlier run can be resumed on the data at hand."""

from pathlib import Path

import pytest
import torch

from detection.run import DETECTOR
from engine.errors import UserError
from engine.training.console import CLASSIFIER
from engine.training.start import Start, check_same_data
from saliency.casm.run_files import CASM_RUN


def make_start(saved: dict | None, kind=CLASSIFIER, **options) -> Start:
    options = {"dataset": "folder", "limit": 0, "force_config": False} | options
    return Start(kind, options, saved, Path("run"), torch.device("cpu"), None, "cpu")


@pytest.mark.parametrize(
    "kind, remedy", [(CLASSIFIER, "--init_from"), (DETECTOR, "--frcnn_checkpoint"), (CASM_RUN, "DATA")]
)
def test_a_run_resumes_only_on_as_many_images_of_the_same_classes(kind, remedy):
    start = make_start({"classes": ["a", "b"], "images": 12, "config": {"dpi": 110}}, kind)
    check_same_data(start, ["a", "b"], 12)
    for classes, images, message in (
        (["a", "b"], 13, "trained on 12 images of 2 classes, but this data has 13 images of 2"),
        (["a", "b", "c"], 12, "trained on 12 images of 2 classes, but this data has 12 images of 3"),
        (["b", "a"], 12, r"the classes of the run to resume \(a, b ...\) are not those of the data \(b, a ...\)"),
    ):
        with pytest.raises(UserError, match=rf"{message}\n.*{remedy}"):
            check_same_data(start, classes, images)
    assert not start.notes
    check_same_data(make_start(None, kind), ["a"], 1)


def test_forced_options_allow_another_number_of_images_and_say_so():
    start = make_start({"classes": ["a", "b"], "images": 12, "config": {"dpi": 110}}, force_config=True)
    check_same_data(start, ["a", "b"], 13)
    assert "12 images of 2 classes, but this data has 13 images" in start.notes[0]
    with pytest.raises(UserError, match="2 classes, but"):
        check_same_data(start, ["a"], 12)


@pytest.mark.parametrize("dataset, limit, notes", [("folder", 6, 1), ("folder", 0, 0), ("shapes", 6, 0)])
def test_a_limited_run_of_an_earlier_version_resumes_with_a_note(dataset, limit, notes):
    for kind, more in ((CLASSIFIER, {}), (DETECTOR, {"images": 6})):  # detectors stored the number already
        start = make_start({"classes": ["a", "b"], "config": {}, **more}, kind, dataset=dataset, limit=limit)
        check_same_data(start, ["a", "b"], 6)
        assert len(start.notes) == notes and all("the first images of --limit" in note for note in start.notes)
