"""Faster R-CNN on the ResNets of this project: torchvision's detector, with our classifier as its backbone.

Ren et al., "Faster R-CNN", arXiv 1506.01497; Lin et al., "Feature Pyramid Networks", arXiv 1612.03144. The neck `fpn`
hands all four stages to a feature pyramid; `c5` hands over the last stage alone, one map of stride 32.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from models import find_matching_models

BODIES = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
BACKBONES = [*(f"imagenet_{name}" for name in BODIES), *BODIES]  # classifiers whose weights fit
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # from the top; the stem's batch norm goes with conv1
NORM_AFTER = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}  # convolution -> the batch norm behind it
ANCHOR_SIDES = (32, 64, 128, 256, 512)  # in pixels of the resized image
PREDICTOR = "roi_heads.box_predictor."


class FoldedConv2d(nn.Conv2d):
    """A convolution that multiplies the frozen batch norm behind it into its own weights. This saves two passes over
    every feature map, and the maps that they would keep for the backward pass. The weights still learn, and the names
    in a state dict stay the same.
    """

    norm: list[FrozenBatchNorm2d]  # a list, so that the norm stays registered in one place only

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(images, self.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that a FoldedConv2d applies."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def conv_norm_pairs(body: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """Every convolution of a ResNet with its batch norm: their stage, the module that holds both, and their names."""
    return [
        (path.split(".")[0] or "conv1", parent, name, NORM_AFTER[name])
        for path, parent in body.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d)
    ]


def fold_norms(body: nn.Module) -> None:
    """Let the convolutions of a ResNet apply the frozen batch norms behind them."""
    for _, parent, conv_name, norm_name in conv_norm_pairs(body):
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        if isinstance(norm, FrozenBatchNorm2d):
            norm.__class__ = FoldedNorm
            conv.__class__, conv.norm = FoldedConv2d, [norm]


class C5(nn.Module):
    """The last stage of a ResNet as the one feature map: (B, 3, H, W) -> {"0": (B, C, H / 32, W / 32)}."""

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        self.body = IntermediateLayerGetter(body, {"layer4": "0"})
        self.out_channels = out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.body(images)


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is built with, besides its body and the number of its classes."""

    mean: Sequence[float]  # of the pixels in 0..1 that the backbone was trained with
    std: Sequence[float]
    neck: str = "fpn"  # fpn, c5
    min_size: Sequence[int] = (600,)  # shorter side; of several, one is drawn per training image and the last evaluates
    max_size: int = 1000  # of the longer side, in pixels
    score_thr: float = 0.05  # lowest score of a detection
    nms_thr: float = 0.5  # IoU at which the weaker of two detections is suppressed
    max_dets: int = 100  # per image
    rois: int = 512  # proposals per image that the head learns from
    proposals: Sequence[int] = (2000, 1000)  # kept per feature map before NMS, and per image after; training, test


def build_detector(body: str, num_classes: int, config: DetectorConfig) -> FasterRCNN:
    """torchvision's Faster R-CNN with fresh weights, and all batch norm of its ResNet frozen.

    body: one of BODIES. num_classes: without background.
    """
    network = torchvision.models.get_model(body, weights=None, norm_layer=FrozenBatchNorm2d)
    channels = network.fc.in_features
    train_proposals, test_proposals = config.proposals
    if config.neck == "fpn":
        widths = [channels // 8, channels // 4, channels // 2, channels]
        backbone = BackboneWithFPN(network, {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}, widths, 256)
        anchors = pool = None  # torchvision's own, for the maps of a pyramid
    else:
        backbone = C5(network, channels)
        anchors = AnchorGenerator((ANCHOR_SIDES,), ((0.5, 1.0, 2.0),))
        pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    return FasterRCNN(
        backbone,
        num_classes + 1,
        min_size=tuple(config.min_size),
        max_size=config.max_size,
        image_mean=list(config.mean),
        image_std=list(config.std),
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=train_proposals,
        rpn_pre_nms_top_n_test=test_proposals,
        rpn_post_nms_top_n_train=train_proposals,
        rpn_post_nms_top_n_test=test_proposals,
        box_roi_pool=pool,
        box_score_thresh=config.score_thr,
        box_nms_thresh=config.nms_thr,
        box_detections_per_img=config.max_dets,
        box_batch_size_per_image=config.rois,
    )


def set_learning(
    detector: FasterRCNN, *, trainable_layers: int, norm: str = "frozen", stem_learns: bool = False
) -> None:
    """Choose what of the backbone learns: `trainable_layers` of its stages from the top (5: all of them and the stem),
    with their batch norm unless norm is `frozen`. Frozen statistics cannot move: no call of train() reaches them.

    To be called once, on a detector with frozen batch norm. stem_learns: the stem learns in any case.
    """
    body = detector.backbone.body
    learning = {*STAGES[:trainable_layers], *(["conv1"] if stem_learns else [])}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in learning)
    if norm != "frozen":
        for stage, parent, _, name in conv_norm_pairs(body):
            if stage in learning:
                parent.set_submodule(name, unfreeze(parent.get_submodule(name)))
    fold_norms(body)


def unfreeze(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # it has no num_batches_tracked
    return norm


def identify_backbone(saved: SavedClassifier, model: str | None = None) -> str:
    """The name of the classifier in a file, one of BACKBONES. model: what the user says it is, `resnet50` or
    `imagenet_resnet50`. Raises UserError for a network that cannot be a backbone.
    """
    remedy = f"backbones are the ResNets: {', '.join(BACKBONES)}"
    matches = find_matching_models(saved.weights)
    usable = [name for name in matches if name in BACKBONES]
    if model and (same := [name for name in usable if name in (model, f"imagenet_{model}")]):
        return same[0]
    if model and usable:
        raise UserError(f"--model {model}: {saved.path} holds {usable[0]}\nleave --model out, the file says what it is")
    if usable:
        return usable[0]
    if matches:
        raise UserError(f"{saved.path}: {matches[0]} cannot be the backbone of a detector\n{remedy}")
    body = (model or saved.options.get("model") or "").removeprefix("imagenet_")
    if body not in BODIES:
        raise UserError(f"{saved.path}: it holds none of the networks that can be a backbone\n{remedy}")
    expected = torchvision.models.get_model(body, weights=None).state_dict()
    needed = [key for key in expected if not (key.startswith("fc.") or key.endswith("num_batches_tracked"))]
    missing = [key for key in needed if key not in saved.weights]
    listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise UserError(f"{saved.path}: no {body}; missing: {listed or 'nothing, but shapes differ'}\n{remedy}")


def load_backbone(detector: FasterRCNN, weights: dict[str, torch.Tensor], *, stem: str = "embed") -> bool:
    """Load the stem and the stages of a classifier into the body of a detector with frozen batch norm. Returns whether
    the stem was one for small images.

    The 3x3 kernel of such a stem is padded with zeros to 7x7, which gives its response at every second pixel. stem:
    `embed`, or `random`, which leaves any stem fresh, with its batch norm. Raises ValueError where anything but the
    last layer is missing or left over.
    """
    weights = {key: value.float() for key, value in weights.items() if not key.startswith("fc.")}
    small = weights["conv1.weight"].shape[-1] == 3
    body = detector.backbone.body
    if stem == "random":
        weights = {key: value for key, value in weights.items() if not key.startswith(("conv1.", "bn1."))}
        weights |= {key: value for key, value in body.state_dict().items() if key.startswith(("conv1.", "bn1."))}
    elif small:
        weights["conv1.weight"] = nn.functional.pad(weights["conv1.weight"], (2, 2, 2, 2))
    missing, unexpected = body.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"no weights of this backbone; missing: {missing[:5]}, unexpected: {unexpected[:5]}")
    return small


def detect_config(weights: dict[str, torch.Tensor]) -> dict[str, object] | None:
    """body, neck and num_classes of the detector with this state dict; None where it is not a Faster R-CNN on a ResNet.

    The architecture is inferred from the names and shapes of the tensors.
    """
    head = weights.get(f"{PREDICTOR}cls_score.weight")
    matches = [re.match(r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.weight", key) for key in weights]
    convs = [tuple(map(int, match.groups())) for match in matches if match]  # stage, block, number in the block
    if head is None or {stage for stage, _, _ in convs} != {1, 2, 3, 4}:
        return None
    depths = [1 + max(block for stage, block, _ in convs if stage == number) for number in (1, 2, 3, 4)]
    depth = 2 + sum(depths) * max(number for _, _, number in convs)
    neck = "fpn" if any(key.startswith("backbone.fpn.") for key in weights) else "c5"
    return {"body": f"resnet{depth}", "neck": neck, "num_classes": len(head) - 1}


def convert_legacy_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Today's names of the weights: torchvision before 0.13 had one level less in the pyramid and the RPN head."""
    names = {key: re.sub(r"(fpn\.\w+_blocks\.\d)\.(\w+)$", r"\1.0.\2", key) for key in weights}
    names |= {key: re.sub(r"rpn\.head\.conv\.(\w+)$", r"rpn.head.conv.0.0.\1", name) for key, name in names.items()}
    return {names[key]: value for key, value in weights.items()}


def load_detector(detector: FasterRCNN, weights: dict[str, torch.Tensor], path: object) -> None:
    """Load the weights of a whole detector into one with frozen batch norm; the predictor stays fresh where its number
    of classes differs. Raises UserError, which names the file, where the weights do not fit.
    """
    own, weights = detector.state_dict(), convert_legacy_keys(weights)
    if len(weights[f"{PREDICTOR}cls_score.weight"]) != len(own[f"{PREDICTOR}cls_score.weight"]):
        weights |= {key: value for key, value in own.items() if key.startswith(PREDICTOR)}
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own and not key.endswith("num_batches_tracked")]
    reshaped = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or reshaped:
        raise UserError(
            f"{path}: another detector; missing: {', '.join(missing[:5]) or 'none'}; unexpected: "
            f"{', '.join(unexpected[:5]) or 'none'}; of another shape: {', '.join(reshaped[:5]) or 'none'}\n"
            "detectors are Faster R-CNNs on ResNets, made by detect.py, or torchvision's fasterrcnn_resnet50_fpn"
        )
    detector.load_state_dict({key: weights[key] for key in own})
