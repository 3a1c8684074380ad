"""Faster R-CNN on the ResNets of this project: torchvision's detector, with our classifier as its backbone.

Ren et al., "Faster R-CNN", arXiv 1506.01497; Lin et al., "Feature Pyramid Networks", arXiv 1612.03144. The neck `fpn`
hands all four stages to a feature pyramid; `c5` hands over the last stage alone, one map of stride 32.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from engine.errors import UserError
from engine.inference.classifier import SavedClassifier
from models import matching_models

BODIES = [f"resnet{depth}" for depth in (18, 34, 50, 101, 152)]
USABLE_BACKBONES = [*(f"imagenet_{name}" for name in BODIES), *BODIES]  # classifiers that have a mapping
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # from the top; the stem's batch norm goes with it
NORM_OF = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}  # convolution -> the batch norm behind it
SIDES = (32, 64, 128, 256, 512)  # of the anchors, in pixels of the resized image
NECKS = ("fpn", "c5")
NORMS = ("frozen", "bn", "syncbn")


class FoldedConv2d(nn.Conv2d):
    """A convolution that multiplies the frozen batch norm behind it into its own weights: the network spares two passes
    over every feature map, and the maps these would keep for the backward pass. The weights still learn, and the names
    in a state dict stay what they were.
    """

    norm: list[FrozenBatchNorm2d]  # in a list, so that it is registered in one place only

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(images, self.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm whose work a FoldedConv2d does."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def conv_norm_pairs(body: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """Every convolution of a ResNet with its batch norm: their stage, the module that holds both, and their names in
    it.
    """
    return [
        (path.split(".")[0] or "conv1", parent, name, NORM_OF[name])
        for path, parent in body.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d)
    ]


def fold_norms(body: nn.Module) -> None:
    """Let the convolutions of a ResNet do the work of the frozen batch norms behind them."""
    for _, parent, conv, norm in conv_norm_pairs(body):
        if isinstance(frozen := getattr(parent, norm), FrozenBatchNorm2d):
            frozen.__class__, folded = FoldedNorm, getattr(parent, conv)
            folded.__class__, folded.norm = FoldedConv2d, [frozen]


class C5(nn.Module):
    """The last stage of a ResNet as the one feature map: (B, 3, H, W) -> {"0": (B, C, H / 32, W / 32)}."""

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        self.body = IntermediateLayerGetter(body, {"layer4": "0"})
        self.out_channels = out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.body(images)


def build_detector(
    body: str,
    num_classes: int,
    *,
    neck: str = "fpn",
    min_size: Sequence[int] = (600,),
    max_size: int = 1000,
    mean: Sequence[float],
    std: Sequence[float],
    score_thr: float = 0.05,
    nms_thr: float = 0.5,
    max_dets: int = 100,
    rois: int = 512,
    proposals: int = 2000,
    test_proposals: int = 1000,
) -> FasterRCNN:
    """torchvision's Faster R-CNN with fresh weights, and all batch norm of its ResNet frozen.

    body: one of BODIES. num_classes: without background. min_size: of the shorter side in pixels; of several one is
    drawn for each training image, and the last serves in evaluation. mean, std: of the pixels in 0..1, as the backbone
    was trained with. rois: proposals per image that the head learns from; proposals, test_proposals: how many of each
    feature map are scored before, and of all after, the suppression of doubles.
    """
    network = getattr(resnet, body)(weights=None, norm_layer=FrozenBatchNorm2d)
    channels = network.fc.in_features
    widths = [channels // 8, channels // 4, channels // 2, channels]
    common = {
        **{"min_size": tuple(min_size), "max_size": max_size, "image_mean": list(mean), "image_std": list(std)},
        **{"box_score_thresh": score_thr, "box_nms_thresh": nms_thr, "box_detections_per_img": max_dets},
        **{"rpn_pre_nms_top_n_train": proposals, "rpn_post_nms_top_n_train": proposals},
        **{"rpn_pre_nms_top_n_test": test_proposals, "rpn_post_nms_top_n_test": test_proposals},
        "box_batch_size_per_image": rois,
    }
    if neck == "fpn":
        backbone = BackboneWithFPN(network, {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}, widths, 256)
        return FasterRCNN(backbone, num_classes + 1, **common)
    anchors = AnchorGenerator((SIDES,), ((0.5, 1.0, 2.0),))
    pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    backbone = C5(network, channels)
    return FasterRCNN(backbone, num_classes + 1, rpn_anchor_generator=anchors, box_roi_pool=pool, **common)


def set_learning(
    detector: FasterRCNN, *, trainable_layers: int, norm: str = "frozen", stem_learns: bool = False
) -> None:
    """What of the backbone learns: `trainable_layers` of its stages from the top, 5 being all with the stem, and there
    the batch norm as well unless norm is `frozen`. Frozen statistics cannot move: no call of train() reaches them.

    Call it once, on a detector with frozen batch norm. stem_learns: the stem learns in any case.
    """
    body = detector.backbone.body
    learning = {*STAGES[:trainable_layers], *(["conv1"] if stem_learns else [])}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in learning)
    if norm != "frozen":
        for stage, parent, _, name in conv_norm_pairs(body):
            if stage in learning:
                setattr(parent, name, unfreeze(getattr(parent, name)))
    fold_norms(body)


def unfreeze(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # without a counter of steps
    return norm


def backbone_name(saved: SavedClassifier, model: str | None = None) -> str:
    """The name of the classifier in a file, one of USABLE. model: what the user says it is, `resnet50` or
    `imagenet_resnet50`. Raises UserError for a network without a mapping.
    """
    usable = f"backbones are the ResNets: {', '.join(USABLE_BACKBONES)}"
    found = [name for name in matching_models(saved.weights) if name in USABLE_BACKBONES]
    if model and (same := [name for name in found if name in (model, f"imagenet_{model}")]):
        return same[0]
    if model and found:
        raise UserError(f"--model {model}: {saved.path} holds {found[0]}\nleave --model out, the file says what it is")
    if found:
        return found[0]
    if others := matching_models(saved.weights):
        raise UserError(f"{saved.path}: {others[0]} cannot be the backbone of a detector\n{usable}")
    named = model or saved.options.get("model")
    body = named.removeprefix("imagenet_") if named else None
    if body not in BODIES:
        raise UserError(f"{saved.path}: it holds none of the networks that can be a backbone\n{usable}")
    wanted = [key for key in getattr(resnet, body)(weights=None).state_dict() if not key.startswith("fc.")]
    missing = [key for key in wanted if key not in saved.weights and not key.endswith("num_batches_tracked")]
    of_fifth = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise UserError(f"{saved.path}: no {body}; missing: {of_fifth or 'nothing, but shapes differ'}\n{usable}")


def load_backbone(detector: FasterRCNN, weights: dict[str, torch.Tensor], *, stem: str = "embed") -> bool:
    """Put the stem and the stages of a classifier into the body of a detector whose batch norm is frozen still. Returns
    whether the stem was one for small images.

    The 3x3 stem of such a network lies in the middle of a 7x7 kernel of zeros, which gives its response at every second
    pixel. stem `random`: any stem is left fresh, with its batch norm. Raises ValueError where anything else than the
    last layer is missing or too much.
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
    """What a detector's state dict tells of itself: body, neck and num_classes; None if it is none of ours."""
    head = weights.get("roi_heads.box_predictor.cls_score.weight")
    blocks = [re.match(r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.weight", key) for key in weights]
    found = [tuple(map(int, match.groups())) for match in blocks if match]
    if head is None or {stage for stage, _, _ in found} != {1, 2, 3, 4}:
        return None
    depths = [1 + max(block for stage, block, _ in found if stage == number) for number in (1, 2, 3, 4)]
    depth = 2 + sum(depths) * max(conv for _, _, conv in found)
    neck = "fpn" if any(key.startswith("backbone.fpn.") for key in weights) else "c5"
    return {"body": f"resnet{depth}", "neck": neck, "num_classes": len(head) - 1}


def convert_legacy_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Files of torchvision before 0.13 lack a level in the names of the pyramid and of the proposal head."""
    names = {key: re.sub(r"(fpn\.\w+_blocks\.\d)\.(\w+)$", r"\1.0.\2", key) for key in weights}
    names |= {key: re.sub(r"rpn\.head\.conv\.(\w+)$", r"rpn.head.conv.0.0.\1", name) for key, name in names.items()}
    return {names[key]: value for key, value in weights.items()}


def load_detector(detector: FasterRCNN, weights: dict[str, torch.Tensor], path: object) -> None:
    """Load the weights of a whole detector into one with frozen batch norm; the predictor stays fresh where it is for
    other classes. Raises UserError, which names the file, where they do not fit.
    """
    own, weights = detector.state_dict(), convert_legacy_keys(weights)
    predictor = "roi_heads.box_predictor."
    if len(weights[f"{predictor}cls_score.weight"]) != len(own[f"{predictor}cls_score.weight"]):
        weights |= {key: value for key, value in own.items() if key.startswith(predictor)}
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own and not key.endswith("num_batches_tracked")]
    misshapen = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or misshapen:
        raise UserError(
            f"{path}: another detector; missing: {', '.join(missing[:5]) or 'none'}; unexpected: "
            f"{', '.join(unexpected[:5]) or 'none'}; of another shape: {', '.join(misshapen[:5]) or 'none'}\n"
            "detectors are Faster R-CNNs on ResNets, made by detect.py, or torchvision's fasterrcnn_resnet50_fpn"
        )
    detector.load_state_dict({key: weights[key] for key in own})
