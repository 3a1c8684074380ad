"""Steps on a fake CUDA device: no wait, no device mix-up, nothing that --deterministic refuses, no launch too many.

No GPU is needed; fake_cuda.py says what is seen and what is not. A failure names the line of the product and what it
did there.
"""

from dataclasses import replace

import pytest
import torch
from fake_cuda import find_obstacle
from support import ROOT, write_class_folders

from engine.data.augment import Augmentation, AutoAugment
from engine.data.folders import FileList
from engine.data.image_files import ImageFiles
from engine.data.image_set import ImageSet
from engine.data.views import CenterCrop, RandomCrop, SquashedView
from mixing import MIXERS, hyper_parameters, mixer_class
from saliency import SOURCES
from saliency.casm.network import load_casm

if obstacle := find_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

from cuda_steps import PHASES, ROWS, SIDE, check, count_row, count_training_step

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
    "guidedmixup": (30, 3, 36, 245),
    "snapmix": (30, 92, 138, 245),
    "attentivemix": (30, 92, 27, 245),
    "resizemix": (30, 0, 49, 245),
    "fmix": (30, 0, 28, 245),
    "gridmix": (30, 0, 73, 245),
    "smoothmix": (30, 0, 38, 245),
    "hmix": (30, 0, 36, 245),
    "gmix": (30, 0, 32, 245),
    "sage": (30, 238, 45, 266),
    "smmix": (30, 169, 92, 245),
    "maskmix": (30, 0, 15, 245),
    "s2mix": (30, 3, 144, 245),
    "recursivemix": (30, 0, 63, 245),
    "comixup 4": (30, 243, 114, 266),
    "comixup 16": (30, 243, 143, 266),
    "puzzlemix 2": (30, 169, 35, 245),
    "puzzlemix 4": (30, 169, 35, 245),
    "puzzlemix 8": (30, 169, 35, 245),
    "puzzlemix 16": (30, 169, 35, 245),
}
MOST_OF_MIXING = 150
LEARNING = {"agent_trajectory_size": 2, "agent_batch_size": 2, "agent_epochs": 1, "warm_up": 4}  # learns in step 5
SLOW = {"puzzlemix 4", "puzzlemix 8"}  # as the other grids


def mark(name: str, *values):
    return pytest.param(*values, marks=[pytest.mark.slow] if name in SLOW else [])


def slow(**options):
    return pytest.param(options, marks=pytest.mark.slow)


def name_options(options: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items()).removeprefix("method=")


@pytest.mark.parametrize("name", [mark(name, name) for name in ROWS])
def test_a_step_waits_for_nothing_and_launches_no_more_than_the_table_says(name):
    if "kernels" in hyper_parameters(name.split()[0]):
        pytest.importorskip("triton")  # the torch solvers launch more
    counter = count_row(name)
    check(counter)
    above = {
        phase: f"{counter.launches[phase]} launches, {allowed} in the table"
        for phase, allowed in zip(PHASES, LAUNCHES[name], strict=True)
        if counter.launches[phase] > allowed
    }
    assert not above


def test_the_docs_have_the_launches_of_the_table():
    text = (ROOT / "docs" / "speed.md").read_text().split("| launches per step |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    found = {row[0].replace(",", "").split(" to ")[0].removesuffix(" blocks"): row for row in rows}
    assert {name: tuple(map(int, row[1:5])) for name, row in found.items()} == {
        name: launches for name, launches in LAUNCHES.items() if name.split()[0] != "puzzlemix" or name.endswith(" 2")
    }
    assert all(int(row[5]) == sum(map(int, row[1:5])) and row[6] == "0" for row in rows)
    assert max(launches[PHASES.index("mixing")] for launches in LAUNCHES.values()) <= MOST_OF_MIXING


@pytest.mark.parametrize("method", GUIDED)
def test_guided_methods_never_wait_for_a_bank(method):
    check(count_training_step(method, "bank", FP16))


@pytest.mark.parametrize("method", ["snapmix", "rlmix", "comixup"])  # with a pass of their own
def test_guided_methods_never_wait_for_a_pass_in_fp16(method):
    check(count_training_step(method, precision=FP16))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "saliencymix", "saliency_scope": "batch"},
        {"method": "saliencymix", "in_batch": True},
        {"method": "cutmix", "per_sample": True, "cutmix_box": "real"},
        {"method": "mixup", "in_batch": True, "precision": None},
        {"method": "resizemix", "in_batch": True, "resize_mode": "bilinear"},
        {"method": "fmix", "in_batch": True, "fmix_field": "released", "max_soft": 0.2},
        {"method": "gridmix smoothmix hmix gmix", "in_batch": True, "precision": FP16},
        {"method": "sage", "search": "exhaustive"},
        {"method": "maskmix", "in_batch": True},
        {"method": "s2mix", "in_batch": True},
        {"method": "recursivemix", "in_batch": True, "resize_mode": "bilinear", "mix_fraction": 0.5},
        {"method": "sage", "search": "grid", "update_ratio": 1.0, "source_options": {"saliency_size": 16}},
        {"method": "rmix", "patches_per_side": (2, 4), "pairing": "reversed"},
        {"method": "rlmix", **LEARNING},
        {"method": "rlmix", "source": "bank", **LEARNING},
        {"method": "mixup cutmix"},
        {"method": "guidedmixup", "kernels": "torch"},
        {"method": "snapmix", "in_batch": True, "source": "fine_grained"},
        {"method": "attentivemix", "in_batch": True, "source": "fine_grained"},
        {"method": "saliencymix", "mix_fraction": 0.5, "cutout": True, "source": "bank"},
        {"method": "puzzlemix", "adv_p": 1.0, "adv_eps": 10.0, "precision": FP16},
        {"method": "puzzlemix", "clean_lam": 1.0, "t_size": 4, "n_labels": 4},
        {"method": "puzzlemix", "block_num": (4,), "source_options": {"saliency_size": 16}},
        slow(method="puzzlemix", kernels="torch", block_num=(4,)),
        slow(method="comixup", kernels="torch", m_niter=1),
        {"method": "sage", "kernels": "torch"},
        {"method": "comixup", "m_block_num": -1},
        {"method": "comixup", "m_thres_type": "soft", "clean_lam": 0.0},
        {"method": "manifold", "clean_weight": 1.0},
        {"method": "rlmix", "clean_weight": 1.0, **LEARNING},
        {"method": "mixup sage", "clean_weight": 1.0, "precision": FP16},
        {"method": "saliencymix", "clean_weight": 0.5, "source": "bank"},
        {"method": "cutmix", "labels": "saliency"},
        {"method": "smmix", "labels": "mean", "source": "bank"},
    ],
    ids=name_options,
)
def test_options_of_methods_never_wait(options, casm_file):
    check(count_training_step(**{"source_options": {"casm": casm_file}, **options}))


@pytest.mark.parametrize("precision", [BF16, pytest.param(FP16, marks=pytest.mark.slow)])
def test_options_of_training_never_wait(precision):
    options = {"ema": 0.99, "clip_grad": 1.0, "label_smoothing": 0.1, "micro_batches": 2}
    colors = {"color_jitter": 0.4, "lighting": 0.1}
    augmentation = Augmentation(4, crop_padding_mode="reflect", erasing=0.25, **colors)
    check(count_training_step("mixup", None, precision, augmentation=augmentation, **options))


@pytest.mark.parametrize("name", ["adamw", "timm:lamb", "timm:lion", "timm:adan"])
def test_other_optimizers_and_losses_never_wait(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    optimizer = {"optimizer": name, "no_decay_1d": True}
    options = {"ema_ramp": True, "loss": "sigmoid_bce", "bce_target_thresh": 0.2, "freeze": ("conv1", "layer1")}
    check(count_training_step("puzzlemix", clean_lam=1.0, optimizer_options=optimizer, **options))


READ = [Augmentation(view=RandomCrop(SIDE, 0.3)), Augmentation(4), Augmentation(4, auto=AutoAugment("rand"))]


@pytest.mark.parametrize("augmentation", READ)
def test_batches_from_files_never_wait(augmentation, tmp_path):
    write_class_folders(tmp_path)
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    files = ImageFiles(FileList(tmp_path / "train", names), CenterCrop(SIDE, SIDE))
    images = ImageSet(files, torch.arange(6) // 3, ["cat", "dog"], "files")
    check(count_training_step("saliencymix", "bank", images=images, batch_size=2, augmentation=augmentation))


@pytest.mark.parametrize("augmentation", READ)
def test_batches_of_resized_tensors_never_wait(augmentation):
    images = ImageSet(torch.zeros(60, 16, 16, 3, dtype=torch.uint8), torch.arange(60) % 3, ["a", "b", "c"], "zeros")
    images = replace(images, resize=SquashedView(SIDE, interpolation="bicubic"))
    check(count_training_step("cutmix", images=images, augmentation=augmentation))


@pytest.mark.parametrize("method, precision", [("none", BF16), ("sage", FP16)])
def test_a_captured_network_step_can_be_captured_and_takes_few_launches(method, precision):
    counter = count_training_step(method, precision=precision, ema=0.9, clip_grad=1.0, micro_batches=2, graph_step=True)
    check(counter)
    eager = count_training_step(method, precision=precision, ema=0.9, clip_grad=1.0, micro_batches=2)
    assert counter.launches["network"] < eager.launches["network"] / 2
    assert counter.launches["saliency"] <= eager.launches["saliency"] / 2


@pytest.mark.parametrize(
    ("method", "labels", "clean"), [("mixup", None, 1.0), ("puzzlemix", None, 0.0), ("cutmix", "mean", 0.0)]
)
def test_the_unmixed_batch_takes_a_pass_of_its_own_only_where_the_source_has_none(method, labels, clean):
    counter = count_training_step(method, clean_weight=1.0, labels=labels, block_num=(2,))
    check(counter)
    passes = counter.watch.host.get("clean", 0) / (counter.launches["network"] - counter.launches["data"])
    assert (0.5 < passes < 1.5) if clean else passes == 0


@pytest.mark.parametrize("source", SOURCES)
def test_sources_never_wait(source, casm_file):
    load_casm(casm_file)  # builds every network once to find the one of the file, which is slow on the fake device
    model = "transformer" if source == "attention" else None
    check(count_training_step("saliencymix", source, model=model, source_options={"casm": casm_file}))


@pytest.mark.parametrize("source", ["gradcam", "attention"])
def test_maps_of_a_transformer_never_wait(source):
    counter = count_training_step("saliencymix", source, model="transformer")
    check(counter)
    assert counter.launches["saliency"] <= {"gradcam": 99, "attention": 39}[source]
