"""What else runs on a device, on a fake CUDA device: training of masks and detectors, predictions, attacks, maps."""

from functools import partial

import numpy as np
import pytest
import torch
from fake_cuda import find_obstacle
from fake_operations import CUDA
from support import write_image

if obstacle := find_obstacle():
    pytest.skip(obstacle, allow_module_level=True)

from cuda_steps import (
    CLASSES,
    SIDE,
    STATISTICS,
    check,
    count_call,
    count_casm_step,
    count_detection_step,
    count_prediction_step,
    make_network,
)

from detection.faster_rcnn import DetectorConfig, build_detector
from detection.pictures import detect_in_picture
from engine.data.pictures import make_picture_set
from engine.data.views import CenterCrop
from engine.inference.classifier import Classifier
from engine.training.state import place_network
from evaluation.attacks import Attack
from evaluation.backgrounds import add_background_noise, build_object_mask
from evaluation.corruptions import CORRUPTIONS, corrupt
from evaluation.occlusion import KINDS, occlude
from saliency import CAM_METHODS
from saliency.cam import ActivationMaps
from saliency.casm.boxes import BINARIZE_RULES, binarize, find_centroids, find_rectangles
from saliency.casm.extractors import Extractor
from saliency.casm.localization_eval import score_crops
from saliency.casm.metrics import MaskStatistics, crop_rectangles

COUNT = 4


def make_pixels() -> torch.Tensor:
    return torch.empty(COUNT, 3, SIDE, SIDE, device=CUDA)


def make_labels() -> torch.Tensor:
    return torch.zeros(COUNT, dtype=torch.long, device=CUDA)


def make_classifier() -> Classifier:
    return Classifier("small", make_network().eval().requires_grad_(False), **STATISTICS, num_classes=CLASSES)


# ---- Training ----


@pytest.mark.parametrize(
    "options",
    [
        {"hp": 0.0, "precision": torch.float16},
        {"hp": 1.0},
        {"hp": 0.0, "fixed_classifier": True, "adversarial": True},
    ],
)
def test_mask_training_never_waits(options):
    check(count_casm_step(**options))


@pytest.mark.parametrize("precision", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_detector_training_waits_only_where_torchvision_does(precision):
    """torchvision waits in each step anyway, so the loss is read in each step, too."""
    check(count_detection_step(precision), places=("torchvision", "detection/loop.py"))


# ---- Evaluation ----


def test_prediction_never_waits():
    check(count_prediction_step())


def test_detection_in_pictures_waits_only_for_the_picture_its_results_and_where_torchvision_does():
    def build():
        config = DetectorConfig((0.5,) * 3, (0.5,) * 3, min_size=(64,), max_size=128, proposals=(20, 10))
        detector = place_network(build_detector("resnet18", CLASSES, config), CUDA, channels_last=False, sync_bn=False)
        return lambda: detect_in_picture(detector, np.zeros((48, 64, 3), np.uint8), CUDA)

    check(count_call(build), places=("torchvision", "detection/loop.py", "detection/pictures.py"))


def test_prediction_of_pictures_never_waits(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for file in files:
        write_image(file, 0)
    check(count_prediction_step(make_picture_set(files, CenterCrop(SIDE, SIDE), "skip", "--predict")))


@pytest.mark.parametrize(
    "attack", [Attack("fgsm", 4 / 255), Attack("pgd", 4 / 255, 3, 2 / 255)], ids=lambda one: one.name
)
def test_attacks_never_wait(attack):
    def build():
        transform = attack.make_transform(make_classifier(), seed=0)
        return lambda: transform(make_pixels(), make_labels(), torch.arange(COUNT))

    check(count_call(build))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_never_wait(name):
    check(count_call(lambda: partial(corrupt, make_pixels()[..., :16, :24], name, 5, torch.arange(COUNT))))


@pytest.mark.parametrize("kind", KINDS)
def test_occlusion_never_waits(kind):
    check(count_call(lambda: partial(occlude, make_pixels(), kind, 0.5, torch.arange(COUNT), (0.5, 0.5, 0.5), 0)))


def test_backgrounds_never_wait():
    boxes = [torch.tensor([[2, 20, 3, 9]]), None, torch.zeros(0, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 1]] * 2)]

    def alter():
        mask = build_object_mask(boxes, SIDE, SIDE, CUDA)
        add_background_noise(make_pixels(), mask, torch.arange(COUNT), seed=0, std=0.1)

    check(count_call(lambda: alter))


@pytest.mark.parametrize("method, layer", [*((method, None) for method in CAM_METHODS), ("gradcam", "layer2")])
def test_maps_never_wait(method, layer):
    """Score-CAM passes only the channels that vary, whose number it reads."""

    def build():
        maps = ActivationMaps(make_network("transformer" if method == "attention" else None), method, layer=layer)
        return lambda: maps(make_pixels(), make_labels())

    check(count_call(build), places=("saliency/cam/maps.py",) if method == "scorecam" else ())


# ---- Masks ----


@pytest.mark.parametrize("rule", BINARIZE_RULES)
def test_boxes_of_masks_never_wait(rule):
    def score():
        masks = torch.empty(COUNT, SIDE, SIDE, device=CUDA)
        rectangles = find_rectangles(binarize(masks, rule))
        assert rectangles.shape == (COUNT, 4) and find_centroids(masks).shape == (COUNT, 2)
        assert crop_rectangles(make_pixels(), rectangles).shape == (COUNT, 3, SIDE, SIDE)
        MaskStatistics().add(masks)

    check(count_call(lambda: score))


def test_the_saliency_metric_only_waits_for_its_results():
    def build():
        classifier, extractor = make_classifier(), Extractor("masks", None)
        rectangles = torch.zeros(COUNT, 4, dtype=torch.long, device=CUDA)
        return lambda: score_crops(make_pixels(), rectangles, make_labels(), extractor, classifier)

    check(count_call(build), whats=("a copy to the host",))
