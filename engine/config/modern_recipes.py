"""Recipes that depend on network, method or batch size, a function for each that returns the options that it sets.

engine/config/recipes.py offers them by name.
"""

from collections.abc import Sequence
from typing import NamedTuple

from engine.config.shared_settings import (
    COMMON,
    IMAGENET_METHOD_OPTIONS,
    get_small_method_options,
    merge_method_options,
)

MODERN = COMMON | {"nesterov": False, "crop_padding": 4}
CUTTING_METHODS = {"cutmix", "saliencymix"}  # they paste a box of the partner
S2MIX_METHODS = ["s2mix", "mixup", "cutmix", "resizemix"]


class Typed(NamedTuple):
    """What was typed of the options that recipes depend on; None or (): nothing."""

    dataset: str | None = None
    model: str | None = None
    method: Sequence[str] = ()
    batch_size: int | None = None


def openmixup(typed: Typed) -> dict[str, object]:
    """Return the setting of OpenMixup's tables for CIFAR-100 and Tiny-ImageNet.

    Source: Li et al., arXiv 2209.04851; github.com/Westlake-AI/openmixup, configs/classification/cifar100/mixups/basic
    and tiny_imagenet/mixups/basic. Networks: resnet18, resnext50 and wrn28_8. One GPU, 200, 400 (default), 800 and 1200
    epochs; wrn28_8 and Tiny-ImageNet 400. The figure is the median of the last ten epochs.

        python train.py --recipe openmixup --method puzzlemix --epochs 800

    Published for CIFAR-100, resnet18, at 200 / 400 / 800 / 1200 epochs: none 76.42 / 77.73 / 78.04 / 78.55, mixup 78.52
    / 79.34 / 79.12 / 79.24, cutmix 79.45 / 79.58 / 78.17 / 78.29, manifold 79.18 / 80.18 / 80.35 / 80.21, saliencymix
    79.75 / 79.64 / 79.12 / 77.66 (with one box per batch from a faulty map: --saliency_legacy_float), puzzlemix 79.96 /
    80.82 / 81.13 / 81.10.
    """
    dataset, model = typed.dataset or "cifar100", typed.model or "resnet18"
    options = MODERN | {"model": model, "dataset": dataset, "epochs": 400, "batch_size": 100, "lr": 0.1}
    options |= {"weight_decay": 1e-4, "scheduler": "cosine", "crop_padding_mode": "reflect"}
    if dataset.startswith("cifar"):
        options["norm"] = "cifar"
    if dataset == "tiny-imagenet":
        options |= {"lr": 0.2, "min_scale": 0.08, "interpolation": "bicubic", "norm": "imagenet"}
    elif model.startswith("wrn"):
        options |= {"lr": 0.03, "weight_decay": 1e-3}
    if model == "resnext50" and CUTTING_METHODS & set(typed.method):
        options["weight_decay"] = 5e-4
    alphas = {"mixup": 1.0, "manifold": 2.0, "puzzlemix": 1.0, "comixup": 2.0}
    own = {name: {"mixup_alpha": alpha} for name, alpha in alphas.items()}
    own |= {name: {"mixup_alpha": 0.2, "mix_prob": 1.0} for name in CUTTING_METHODS}
    return options | {"method_options": merge_method_options(get_small_method_options(dataset, model), own)}


def s2mix(typed: Typed) -> dict[str, object]:
    """Return the mixture of S2-FracMix: each batch is mixed by s2mix, mixup, cutmix or resizemix.

    Source: the authors' project page, fracmix-data-augmentation.github.io, which has the four methods, CIFAR-100,
    resnet18 and 800 epochs; there is no code. Not known, and our choice: that the four have equal probabilities, and
    all the rest, which is that of openmixup(). Published: s2mix alone 81.73, the mixture 82.74, both with fractals,
    which s2mix here does not have.

        python train.py --recipe s2mix
        python train.py --recipe s2mix --method s2mix
    """
    options = openmixup(typed._replace(method=typed.method or S2MIX_METHODS))
    return options | {"method": [*S2MIX_METHODS]} | ({"epochs": 800} if options["dataset"] == "cifar100" else {})


def deit(typed: Typed) -> dict[str, object]:
    """Return the setting of DeiT for ImageNet, without repeated augmentation.

    Source: Touvron et al., ICML 2021, arXiv 2012.12877; github.com/facebookresearch/deit, main.py. Four GPUs
    with 256 images each; the learning rate is 5e-4 for 512 images and grows with --batch_size. Each batch is mixed by
    mixup or cutmix, with equal probabilities. Published: see the authors' README; their code repeats each image three
    times in an epoch, which is not possible here.

        torchrun --nproc_per_node 4 imagenet_train.py --recipe deit --data_dir imagenet
    """
    model, batch_size = typed.model or "timm:deit_small_patch16_224", typed.batch_size or 1024
    options = MODERN | {"model": model, "dataset": "imagenet", "method": ["mixup", "cutmix"], "epochs": 300}
    options |= {"batch_size": batch_size, "optimizer": "adamw", "lr": 5e-4 * batch_size / 512, "weight_decay": 0.05}
    options |= {"scheduler": "cosine", "warmup_epochs": 5.0, "warmup_lr": 1e-6, "min_lr": 1e-5, "ema": 0.99996}
    options |= {"model_args": drop_path(model, 0.1), "label_smoothing": 0.1, "drop_last": True}
    options |= {"interpolation": "bicubic", "random_erasing": 0.25, "auto_augment": "rand", "rand_augment_ops": 2}
    options |= {"rand_augment_magnitude": 9.0, "rand_augment_std": 0.5, "rand_augment_prob": 0.5}
    own = {"mixup": {"mixup_alpha": 0.8}, "cutmix": {"mixup_alpha": 1.0, "mix_prob": 1.0}}
    return options | {"method_options": merge_method_options(IMAGENET_METHOD_OPTIONS, own)}


def vit_cifar(typed: Typed) -> dict[str, object]:
    """Return the setting of OpenMixup for transformers and ConvNeXt on CIFAR-100.

    Source: github.com/Westlake-AI/openmixup, configs/classification/cifar100/mixups/vits. One GPU. DeiT-S (default) and
    Swin-T see images of 224 pixels, ConvNeXt-T those of 32: its stem has stride 1, here with a kernel of 1 pixel
    instead of 3.

    With both mixup and cutmix, one of them is drawn for each batch, and the alphas are those of DeiT, as in the row
    "DeiT" of OpenMixup's table.

        python train.py --recipe vit_cifar --method cutmix
        python train.py --recipe vit_cifar --method mixup cutmix
        python train.py --recipe vit_cifar --method cutmix --model timm:swin_tiny_patch4_window7_224
        python train.py --recipe vit_cifar --method cutmix --model timm:convnext_tiny
    """
    dataset, model = typed.dataset or "cifar100", typed.model or "timm:deit_small_patch16_224"
    options = MODERN | {"model": model, "dataset": dataset, "epochs": 200, "batch_size": 100, "optimizer": "adamw"}
    options |= {"weight_decay": 0.05, "scheduler": "cosine_step", "warmup_epochs": 20.0, "min_lr": 1e-6}
    options |= {"label_smoothing": 0.1, "interpolation": "bicubic", "auto_augment": "rand", "rand_augment_ops": 2}
    options |= {"rand_augment_magnitude": 7.0, "rand_augment_std": 0.5}
    if dataset.startswith("cifar"):
        options["norm"] = "cifar"
    base = IMAGENET_METHOD_OPTIONS
    if "convnext" in model:
        base = get_small_method_options(dataset, model)
        stem = {"patch_size": 1} if model.startswith("timm:") else {}
        options |= {"lr": 1e-3, "model_args": drop_path(model, 0.3) | stem, "crop_padding_mode": "reflect"}
    else:
        swin = "swin" in model
        options |= {"image_size": 224, "min_scale": 0.8, "clip_grad": 5.0}
        options |= {"lr": 5e-4 if swin else 1e-3, "model_args": drop_path(model, 0.2 if swin else 0.1)}
    cutmix_alpha = 1.0 if {"mixup", "cutmix"} <= set(typed.method) else 2.0
    own = {"mixup": {"mixup_alpha": 0.8}, "cutmix": {"mixup_alpha": cutmix_alpha, "mix_prob": 1.0}}
    own |= {"saliencymix": {"mixup_alpha": 0.2, "mix_prob": 1.0}, "puzzlemix": {"mixup_alpha": 2.0}}
    return options | {"method_options": merge_method_options(base, own)}


def fine_tune(typed: Typed) -> dict[str, object]:
    """Return this project's own setting for a pretrained network on a few hundred to some ten thousand images.

    `--recipe auto` means it with `--dataset folder --pretrained`. One GPU, or a CPU for small networks.

        python imagenet_train.py --dataset folder --data_dir mine --pretrained --method cutmix
    """
    options = MODERN | {"model": typed.model or "imagenet_resnet18", "dataset": "folder", "epochs": 30}
    options |= {"batch_size": 32, "drop_last": True, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05}
    options |= {"scheduler": "cosine_step", "warmup_epochs": 3.0}
    options |= {"min_scale": 0.25, "auto_augment": "rand", "rand_augment_magnitude": 5.0}
    return options | {"method_options": IMAGENET_METHOD_OPTIONS}


def drop_path(model: str, rate: float) -> dict[str, float]:
    """Return --model_args with the probability of leaving out a block, for networks whose constructor takes it."""
    if model.startswith("timm:"):
        return {"drop_path_rate": rate}
    return {"stochastic_depth_prob": rate} if model.startswith("torchvision:convnext") else {}
