"""A run: what it advises after a NaN or infinite loss."""

import re

import pytest
import torch

from detection.run import DETECTOR
from engine.errors import UserError
from engine.training.console import CLASSIFIER
from engine.training.run import list_nonfinite_remedies
from saliency.casm.run_files import CASM_RUN

LOWER = {"lr": 0.001, "lr-casme": 0.001, "max_lr": 0.001, "lr_points": "0:0.001", "clip_grad": 1.0, "amp": "off"}
SAVED = {"lr": 0.1, "lr_casme": 0.1, "max_lr": None, "lr_points": None, "clip_grad": 0.0, "amp": "auto", "epochs": 3}
KINDS = {
    "multistep": (CLASSIFIER, SAVED | {"scheduler": "multistep"}),
    "onecycle": (CLASSIFIER, SAVED | {"scheduler": "onecycle"}),
    "onecycle with a peak": (CLASSIFIER, SAVED | {"scheduler": "onecycle", "max_lr": 0.3}),
    "three ImageNet phases": (CLASSIFIER, SAVED | {"scheduler": "points", "lr_points": "0:1,3:0"}),
    "detector": (DETECTOR, SAVED),
    "casm": (
        CASM_RUN,
        {key: value for key, value in SAVED.items() if key != "clip_grad"} | {"fixed_classifier": False},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_resume_accepts_what_is_advised_after_a_nonfinite_loss(name):
    kind, options = KINDS[name]
    remedies = list_nonfinite_remedies(kind.lower_rate(options), options, torch.bfloat16, "--checkpoint run/last.pt")
    text = "; or ".join(remedies)
    for remedy in remedies:
        flags = {flag.replace("-", "_"): LOWER[flag] for flag in re.findall(r"--([\w-]+)", remedy) if flag in LOWER}
        assert flags
        if "--checkpoint" in remedy:
            kind.check_resume(flags, options, force="--force_config" in remedy)
        if "--force_config" in remedy:
            with pytest.raises(UserError):
                kind.check_resume(flags, options)
    new_run = {
        "onecycle": "a lower --lr",
        "onecycle with a peak": "a lower --max_lr",
        "casm": "a lower --lr-casme or --lr",
    }
    assert ("start another run with " + new_run[name] in text) if name in new_run else "another" not in text
    assert text.count("--amp off") == 1 and "bf16" not in text


def test_advice_names_only_what_the_run_does_not_have_yet():
    def advise(precision, resume=None, **options):
        return list_nonfinite_remedies(("a lower --lr", True), options, precision, resume)

    assert advise(None, clip_grad=0.0) == ["start another run with a lower --lr or --clip_grad 1"]
    assert advise(None, clip_grad=1.0) == ["start another run with a lower --lr"]
    assert advise(torch.float16) == ["start another run with a lower --lr or --amp bf16 or off"]
    assert advise(None, "--checkpoint F", clip_grad=5.0) == [
        "resume with --checkpoint F --force_config and a lower --lr or --clip_grad 1"
    ]
