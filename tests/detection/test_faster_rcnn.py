"""A classifier as the backbone of a detector: equal features, and the parameters that are trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn

from detection.faster_rcnn import (
    BODIES,
    DetectorConfig,
    build_detector,
    convert_legacy_keys,
    detect_config,
    identify_backbone,
    list_conv_norm_pairs,
    load_backbone,
    load_detector,
    set_trainable_layers,
)
from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from models import build_model

HALF = (0.5, 0.5, 0.5)
CONFIG = DetectorConfig(HALF, HALF, min_size=(64,), max_size=128, rois=16, proposals=(20, 10))


def make_classifier(name: str) -> nn.Module:
    """Build a classifier whose batch norm has statistics as after training."""
    model = build_model(name, 7, 64).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.normal_(layer.bias, 0, 0.1)
    return model


def make_detector(name: str = "imagenet_resnet18", *, stem: str = "embed", model: nn.Module | None = None, **learning):
    detector = build_detector(name.removeprefix("imagenet_"), 3, CONFIG)
    load_backbone(detector, (model or make_classifier(name)).state_dict(), stem=stem)
    set_trainable_layers(detector, **{"trainable_layers": 3, **learning})
    return detector


def run_stages(model: nn.Module, features: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of each stage, given the output of the stem."""
    maps = [features]
    for name in model.stages:
        maps.append(getattr(model, name)(maps[-1]))
    return maps[1:]


def make_batch(images: int = 2) -> tuple[list[torch.Tensor], list[dict]]:
    target = {"boxes": torch.tensor([[4.0, 8, 40, 50], [10, 2, 30, 30]]), "labels": torch.tensor([1, 3])}
    return [torch.rand(3, 64, 80) for _ in range(images)], [dict(target) for _ in range(images)]


def train_step(detector: FasterRCNN, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD([one for one in detector.parameters() if one.requires_grad], lr, weight_decay=0.1)
    sum(detector.train()(*make_batch()).values()).backward()
    optimizer.step()


@torch.no_grad()
@pytest.mark.parametrize("name", ["imagenet_resnet18", "imagenet_resnet34", "imagenet_resnet50"])
def test_body_features_equal_those_of_the_classifier(name):
    model = make_classifier(name)
    detector = make_detector(name, model=model).train()
    images = torch.randn(2, 3, 65, 90)
    for expected, features in zip(
        run_stages(model, model.stem(images)), detector.backbone.body(images).values(), strict=True
    ):
        scale = float(expected.abs().max())
        torch.testing.assert_close(features, expected, atol=5e-6 * scale, rtol=0)
    model, detector, images = model.double(), detector.double(), images.double()
    for expected, features in zip(
        run_stages(model, model.stem(images)), detector.backbone.body(images).values(), strict=True
    ):
        torch.testing.assert_close(features, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_embedded_stem_equals_the_small_stem_at_every_second_pixel():
    model = make_classifier("resnet18").double()
    detector = make_detector("resnet18", model=model).double()
    images = torch.randn(2, 3, 64, 80).double()
    kernels = F.conv2d(images, model.conv1.weight, stride=1, padding=1)[:, :, ::2, ::2]
    stem = F.max_pool2d(F.relu(model.bn1(kernels)), 3, stride=2, padding=1)
    for expected, features in zip(run_stages(model, stem), detector.backbone.body(images).values(), strict=True):
        torch.testing.assert_close(features, expected, atol=1e-12, rtol=0)


def test_random_stem_is_new_and_trainable():
    model = make_classifier("resnet18")
    detector = make_detector("resnet18", model=model, stem="random", trainable_layers=1, train_stem=True)
    body, embedded = detector.backbone.body, F.pad(model.conv1.weight, (2, 2, 2, 2))
    assert body.conv1.weight.requires_grad and not torch.equal(body.conv1.weight, embedded)
    assert body.bn1.weight.eq(1).all() and body.bn1.running_mean.eq(0).all()
    assert torch.equal(body.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


@pytest.mark.parametrize("norm", ["frozen", "bn"])
def test_frozen_statistics_and_stages_do_not_change(norm):
    detector = make_detector(trainable_layers=2, norm=norm)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    train_step(detector)
    changed = {key for key, value in detector.state_dict().items() if not torch.equal(value, before[key])}
    body = {key.removeprefix("backbone.body.") for key in changed if key.startswith("backbone.body.")}
    assert {key.split(".")[0] for key in body} == {"layer3", "layer4"}
    norm_keys = {key for key in body if "running_" in key or ".bn" in key}
    assert not norm_keys if norm == "frozen" else {"layer3.0.bn1.running_mean", "layer4.1.bn2.weight"} <= norm_keys
    assert "roi_heads.box_predictor.cls_score.weight" in changed and "backbone.fpn.inner_blocks.0.0.weight" in changed


@pytest.mark.parametrize(
    "layers, trainable",
    [(0, set()), (1, {"layer4"}), (5, {"layer4", "layer3", "layer2", "layer1", "conv1"})],
)
def test_trainable_layers_are_counted_from_the_top(layers, trainable):
    body = make_detector(trainable_layers=layers).backbone.body
    assert {name.split(".")[0] for name, value in body.named_parameters() if value.requires_grad} == trainable


def test_folded_convolution_has_the_gradient_of_the_unfolded_one():
    model = make_classifier("imagenet_resnet18")
    plain = build_detector("resnet18", 3, CONFIG)
    load_backbone(plain, model.state_dict())
    folded = make_detector(model=model, trainable_layers=5).double()
    plain, images = plain.double(), torch.randn(2, 3, 64, 64).double()
    for detector in (plain, folded):
        sum(maps.square().mean() for maps in detector.backbone.body(images).values()).backward()
    for (name, one), other in zip(
        folded.backbone.body.named_parameters(), plain.backbone.body.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=1e-8, msg=name)


def test_folding_does_not_change_the_state_dict_keys():
    assert list(make_detector().state_dict()) == list(build_detector("resnet18", 3, CONFIG).state_dict())
    assert len(list_conv_norm_pairs(make_detector("imagenet_resnet50").backbone.body)) == 53


def test_state_dict_matches_torchvision():
    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21).state_dict()
        ours = build_detector("resnet50", 20, CONFIG).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items() if not key.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("neck", ["fpn", "c5"])
def test_detect_config_infers_the_architecture(neck):
    for body in BODIES:
        with torch.device("meta"):
            state = build_detector(body, 20, replace(CONFIG, neck=neck)).state_dict()
        assert detect_config(state) == {"body": body, "neck": neck, "num_classes": 20}
    assert detect_config(make_classifier("imagenet_resnet18").state_dict()) is None


def test_c5_neck_is_the_last_stage_with_all_anchors():
    detector = build_detector("resnet18", 3, replace(CONFIG, neck="c5")).eval()
    maps = detector.backbone(torch.rand(1, 3, 64, 96))
    assert {name: tuple(one.shape) for name, one in maps.items()} == {"0": (1, 512, 2, 3)}
    assert detector.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    assert set(detector.train()(*make_batch())) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_objectness",
        "loss_rpn_box_reg",
    }


def test_legacy_torchvision_keys_are_converted():
    detector = make_detector()
    legacy = {}
    for key, value in detector.state_dict().items():
        key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        legacy[key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "fpn" in key else key] = value
    assert legacy.keys() != detector.state_dict().keys()
    assert convert_legacy_keys(legacy).keys() == detector.state_dict().keys()


def test_other_number_of_classes_keeps_all_weights_but_the_predictor():
    trained, fresh = make_detector(), build_detector("resnet18", 5, CONFIG)
    head = fresh.roi_heads.box_predictor.cls_score.weight.clone()
    load_detector(fresh, trained.state_dict(), "trained.pt", rows={})
    assert torch.equal(fresh.roi_heads.box_predictor.cls_score.weight, head)
    assert torch.equal(fresh.roi_heads.box_head.fc6.weight, trained.roi_heads.box_head.fc6.weight)
    with pytest.raises(UserError, match="trained.pt: a different detector; missing: backbone.body.layer1.0.conv3"):
        load_detector(build_detector("resnet50", 3, CONFIG), trained.state_dict(), "trained.pt")


def test_predictor_is_loaded_for_the_given_labels():
    trained, fresh = make_detector(), build_detector("resnet18", 5, CONFIG)
    new, old = (model.roi_heads.box_predictor for model in (fresh, trained))
    first = {name: getattr(new, name).weight.clone() for name in ("cls_score", "bbox_pred")}
    load_detector(fresh, trained.state_dict(), "trained.pt", rows={0: 0, 2: 3, 5: 1})
    for label, saved in enumerate((0, None, 3, None, None, 1)):
        for name, per_label in (("cls_score", 1), ("bbox_pred", 4)):
            kept = first[name] if saved is None else getattr(old, name).weight
            source, rows = label if saved is None else saved, getattr(new, name).weight.unflatten(0, (-1, per_label))
            assert torch.equal(rows[label], kept.unflatten(0, (-1, per_label))[source]), (name, label)
    agnostic = trained.state_dict() | {"roi_heads.box_predictor.bbox_pred.weight": torch.zeros(8, 1024)}
    with pytest.raises(UserError, match="of another shape: roi_heads.box_predictor.bbox_pred.weight"):
        load_detector(fresh, agnostic, "trained.pt", rows={0: 0, 2: 3})


@pytest.mark.parametrize(
    "name, model, expected",
    [
        ("imagenet_resnet18", None, "imagenet_resnet18"),
        ("imagenet_resnet18", "resnet18", "imagenet_resnet18"),
        ("resnet34", None, "resnet34"),
        ("resnet34", "resnet18", "--model resnet18: .*file.pt holds resnet34"),
        ("wrn16_8", None, "wrn16_8 cannot be the backbone of a detector\nuse one of these ResNets: imagenet_resnet18"),
        ("preactresnet18", "resnet18", "preactresnet18 cannot be"),
        ("resnet20", None, "resnet20 cannot be the backbone"),
    ],
)
def test_backbone_is_identified_by_its_weights(name, model, expected, tmp_path):
    torch.save(build_model(name, 10, 32).state_dict(), tmp_path / "file.pt")
    saved = SavedClassifier(tmp_path / "file.pt")
    if expected == name:
        assert identify_backbone(saved, model) == expected
    else:
        with pytest.raises(UserError, match=expected):
            identify_backbone(saved, model)


def test_missing_keys_of_a_backbone_are_named(tmp_path):
    state = make_classifier("imagenet_resnet18").state_dict()
    torch.save({key: value for key, value in state.items() if "layer3" not in key}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="not a resnet18; missing: layer3.0.conv1.weight, .* and 20 more"):
        identify_backbone(SavedClassifier(tmp_path / "file.pt"), "resnet18")
    with pytest.raises(UserError, match="the weights fit no network that can be a backbone"):
        identify_backbone(SavedClassifier(tmp_path / "file.pt"))
