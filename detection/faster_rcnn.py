"""Faster R-CNN on the ResNets of this project: torchvision's detector with one of our classifiers as its backbone.

Ren et al., "Faster R-CNN", arXiv 1506.01497; Lin et al., "Feature Pyramid Networks", arXiv 1612.03144. The neck `fpn`
builds a feature pyramid from all four stages; `c5` uses only the last stage, one feature map of stride 32.
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
BACKBONES = [*(f"imagenet_{name}" for name in BODIES), *BODIES]  # classifiers whose weights fit a body
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # from the top; conv1 includes the batch norm of the stem
NORM_AFTER = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}  # convolution -> the batch norm that follows
ANCHOR_SIDES = (32, 64, 128, 256, 512)  # in pixels of the resized image
PREDICTOR = "roi_heads.box_predictor."


class FoldedConv2d(nn.Conv2d):
    """A convolution that folds the frozen batch norm after it into its weights.

    This saves two passes over every feature map and the activations that they would keep for the backward pass. The
    weights remain trainable, and the keys of the state dict do not change.
    """

    norm: list[FrozenBatchNorm2d]  # in a list, so that the batch norm is not registered as a submodule here too

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(images, self.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale)


class FoldedNorm(FrozenBatchNorm2d):
    """A frozen batch norm that is the identity, because a FoldedConv2d applies it."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def list_conv_norm_pairs(body: nn.Module) -> list[tuple[str, nn.Module, str, str]]:
    """List every convolution of a ResNet with its batch norm: stage, parent module, and the names of both."""
    return [
        (path.split(".")[0] or "conv1", parent, name, NORM_AFTER[name])
        for path, parent in body.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d)
    ]


def fold_norms(body: nn.Module) -> None:
    """Fold the frozen batch norms of a ResNet into the convolutions before them."""
    for _, parent, conv_name, norm_name in list_conv_norm_pairs(body):
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        if isinstance(norm, FrozenBatchNorm2d):
            norm.__class__ = FoldedNorm
            conv.__class__, conv.norm = FoldedConv2d, [norm]


class C5(nn.Module):
    """A backbone whose only feature map is the last stage: (B, 3, H, W) -> {"0": (B, C, H / 32, W / 32)}."""

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        self.body = IntermediateLayerGetter(body, {"layer4": "0"})
        self.out_channels = out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.body(images)


@dataclass(frozen=True)
class DetectorConfig:
    """The settings of a detector other than its body and its number of classes."""

    mean: Sequence[float]  # normalisation of pixels in 0..1, as the backbone was trained
    std: Sequence[float]
    neck: str = "fpn"  # fpn or c5
    min_size: Sequence[int] = (600,)  # shorter side in pixels: drawn per training image; the last is for evaluation
    max_size: int = 1000  # limit of the longer side in pixels
    score_thr: float = 0.05  # detections have a higher score
    nms_thr: float = 0.5  # IoU above which NMS removes the detection with the lower score
    max_dets: int = 100  # maximum number of detections per image
    rois: int = 512  # proposals sampled per image to train the box head
    proposals: Sequence[int] = (2000, 1000)  # kept per feature map before NMS and per image after it; training, test


def build_detector(body: str, num_classes: int, config: DetectorConfig) -> FasterRCNN:
    """Build torchvision's Faster R-CNN with random weights; all batch norm of its ResNet is frozen.

    body: one of BODIES. num_classes: number of classes without the background.
    """
    network = torchvision.models.get_model(body, weights=None, norm_layer=FrozenBatchNorm2d)
    channels = network.fc.in_features
    train_proposals, test_proposals = config.proposals
    if config.neck == "fpn":
        widths = [channels // 8, channels // 4, channels // 2, channels]
        backbone = BackboneWithFPN(network, {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}, widths, 256)
        anchors = pool = None  # torchvision's defaults for a feature pyramid
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


def set_trainable_layers(
    detector: FasterRCNN, *, trainable_layers: int, norm: str = "frozen", train_stem: bool = False
) -> None:
    """Select the stages of the backbone that are trained.

    trainable_layers: number of stages from the top; 5 is all four stages and the stem. norm: `frozen`, or else the
    batch norm of these stages is trained too. Frozen statistics do not change, because train() has no effect on them.
    train_stem: train the stem in any case. Call this once, on a detector whose batch norm is frozen.
    """
    body = detector.backbone.body
    trainable = {*STAGES[:trainable_layers], *(["conv1"] if train_stem else [])}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trainable)
    if norm != "frozen":
        for stage, parent, _, name in list_conv_norm_pairs(body):
            if stage in trainable:
                parent.set_submodule(name, unfreeze(parent.get_submodule(name)))
    fold_norms(body)


def unfreeze(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """Return a trainable batch norm with the same parameters and statistics."""
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    norm.load_state_dict(frozen.state_dict(), strict=False)  # a frozen one has no num_batches_tracked
    return norm


def identify_backbone(saved: SavedClassifier, model: str | None = None) -> str:
    """Return the name of the classifier in a file, one of BACKBONES.

    model: the name given by the user, such as `resnet50` or `imagenet_resnet50`. Raises UserError for a network that
    cannot be a backbone.
    """
    remedy = f"use one of these ResNets: {', '.join(BACKBONES)}"
    matches = find_matching_models(saved.weights)
    usable = [name for name in matches if name in BACKBONES]
    if model and (same := [name for name in usable if name in (model, f"imagenet_{model}")]):
        return same[0]
    if model and usable:
        raise UserError(
            f"--model {model}: {saved.path} holds {usable[0]}\nomit --model: the architecture is read from the file"
        )
    if usable:
        return usable[0]
    if matches:
        raise UserError(f"{saved.path}: {matches[0]} cannot be the backbone of a detector\n{remedy}")
    body = (model or saved.options.get("model") or "").removeprefix("imagenet_")
    if body not in BODIES:
        raise UserError(f"{saved.path}: the weights fit no network that can be a backbone\n{remedy}")
    expected = torchvision.models.get_model(body, weights=None).state_dict()
    needed = [key for key in expected if not (key.startswith("fc.") or key.endswith("num_batches_tracked"))]
    missing = [key for key in needed if key not in saved.weights]
    listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise UserError(f"{saved.path}: not a {body}; missing: {listed or 'nothing, but shapes differ'}\n{remedy}")


def load_backbone(detector: FasterRCNN, weights: dict[str, torch.Tensor], *, stem: str = "embed") -> bool:
    """Load the stem and the stages of a classifier into the body of a detector whose batch norm is frozen.

    Returns whether the classifier has a stem for small images. stem: `embed` pads the 3x3 kernel of such a stem with
    zeros to 7x7, which gives its response at every second pixel; `random` keeps the new stem and its batch norm.
    Raises ValueError for missing or unexpected keys outside the last layer.
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
        raise ValueError(f"the weights do not fit the backbone; missing: {missing[:5]}, unexpected: {unexpected[:5]}")
    return small


def detect_config(weights: dict[str, torch.Tensor]) -> dict[str, object] | None:
    """Infer body, neck and num_classes of a detector from the names and shapes in its state dict.

    Returns None if it is not a Faster R-CNN on a ResNet. num_classes does not include the background.
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
    """Rename the keys of torchvision before 0.13, which had one level less in the pyramid and in the RPN head."""
    names = {key: re.sub(r"(fpn\.\w+_blocks\.\d)\.(\w+)$", r"\1.0.\2", key) for key in weights}
    names |= {key: re.sub(r"rpn\.head\.conv\.(\w+)$", r"rpn.head.conv.0.0.\1", name) for key, name in names.items()}
    return {names[key]: value for key, value in weights.items()}


def select_predictor_rows(
    expected: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], rows: dict[int, int]
) -> dict[str, torch.Tensor]:
    """Return the predictor of the state dict `expected`, with the rows of some labels replaced by those in the weights.

    Each label has one row in cls_score and four in bbox_pred. rows: as in load_detector().
    """
    predictor = {key: value.clone() for key, value in expected.items() if key.startswith(PREDICTOR)}
    if not rows:
        return predictor
    labels, saved_labels = (len(state[f"{PREDICTOR}cls_score.weight"]) for state in (expected, weights))
    sizes = {key: weights[key].numel() * labels / saved_labels for key in predictor if key in weights}
    fitting = [key for key, size in sizes.items() if size == predictor[key].numel()]  # load_detector() reports others
    for key in fitting:
        saved = weights[key].to(predictor[key].dtype).reshape(saved_labels, -1)
        predictor[key].view(labels, -1)[list(rows)] = saved[list(rows.values())]
    return {key: predictor[key] for key in fitting}


def load_detector(
    detector: FasterRCNN, weights: dict[str, torch.Tensor], path: object, rows: dict[int, int] | None = None
) -> None:
    """Load the weights of a whole detector into one whose batch norm is frozen.

    rows: label -> label in the weights (0: background) for the labels whose predictor is loaded; that of the others
    keeps its random weights. None: both have the same labels. Raises UserError, which names the file `path`, if the
    weights do not fit.
    """
    expected, weights = detector.state_dict(), convert_legacy_keys(weights)
    if rows is not None:
        weights |= select_predictor_rows(expected, weights, rows)
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected and not key.endswith("num_batches_tracked")]
    reshaped = [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
    if missing or unexpected or reshaped:
        raise UserError(
            f"{path}: a different detector; missing: {', '.join(missing[:5]) or 'none'}; unexpected: "
            f"{', '.join(unexpected[:5]) or 'none'}; of another shape: {', '.join(reshaped[:5]) or 'none'}\n"
            "use a Faster R-CNN on a ResNet, made by detect.py, or torchvision's fasterrcnn_resnet50_fpn"
        )
    detector.load_state_dict({key: weights[key] for key in expected})
