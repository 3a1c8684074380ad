"""Steps on a fake CUDA device: no wait, no device mix-up, nothing that --deterministic refuses, no launch too many.

No GPU is needed; fake_cuda.py says what is seen and what is not. A failure names the line of the product and what it
did there.
"""

import pytest
import torch
from fake_cuda import find_obstacle

from mixing import MIXERS, mixer_class
from saliency import SOURCES

if obstacle := find_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

from cuda_steps import PHASES, ROWS, check, count_row, count_training_step

BF16, FP16 = torch.bfloat16, torch.float16
GUIDED = [name for name in MIXERS if mixer_class(name).default_source]
LAUNCHES = {  # preactresnet18, batch 100, 32 pixels, bf16: data, saliency, mixing, network
    "none": (30, 0, 0, 245),
    "cutout": (30, 0, 19, 245),
    "mixup": (30, 0, 9, 245),
    "manifold": (30, 0, 9, 245),
    "cutmix": (30, 0, 33, 245),
    "saliencymix": (30, 3, 37, 245),
    "rmix": (30, 185, 37, 245),
    "rlmix": (30, 185, 91, 247),
    "sage": (30, 238, 45, 266),
    "comixup": (30, 243, 2620, 266),
    "puzzlemix 2": (30, 169, 170, 245),
    "puzzlemix 4": (30, 169, 246, 245),
    "puzzlemix 8": (30, 169, 1287, 245),
    "puzzlemix 16": (30, 169, 2987, 245),
}
SLOW = {"comixup", "puzzlemix"}  # their torch solvers launch thousands of operations


def mark(name: str, *values):
    return pytest.param(*values, marks=[pytest.mark.slow] if name.split()[0] in SLOW else [])


@pytest.mark.parametrize("name", [mark(name, name) for name in ROWS])
def test_a_step_waits_for_nothing_and_launches_no_more_than_the_table_says(name):
    counter = count_row(name)
    check(counter)
    above = {
        phase: f"{counter.launches[phase]} launches, {allowed} in the table"
        for phase, allowed in zip(PHASES, LAUNCHES[name], strict=True)
        if counter.launches[phase] > allowed
    }
    assert not above


@pytest.mark.parametrize("method", [mark(name, name) for name in GUIDED])
@pytest.mark.parametrize("source, precision", [("bank", BF16), (None, FP16)])
def test_guided_methods_never_wait(method, source, precision):
    check(count_training_step(method, source, precision))


@pytest.mark.parametrize("source", SOURCES)
def test_sources_never_wait(source, casm_file):
    check(count_training_step("saliencymix", source, source_options={"casm": casm_file}))
