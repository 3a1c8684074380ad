"""Pretrained weights of torchvision and timm: where they come from, how their images are prepared, their classes."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models import IMAGENET_MODELS, download_weights, split_model_name
from models.library import complete_arguments, construct, import_timm, list_names, make_tuple
from models.library_files import convert_weights, get_timm_config

HALF_SCALED = ("googlenet", "inception_v3")  # torchvision's, trained on pixels in -1..1 through transform_input
HALF = (0.5, 0.5, 0.5)
DEFAULT_WEIGHTS = "IMAGENET1K_V1"  # torchvision's name of weights; later ones were trained with Mixup and CutMix


class InputSettings(NamedTuple):
    """How images are prepared for pretrained weights."""

    mean: tuple[float, ...]  # of pixels in 0..1
    std: tuple[float, ...]
    size: int  # side of the crop in pixels
    resize: int  # shorter side before the crop
    interpolation: str  # bilinear or bicubic
    transform_input: bool = False  # whether torchvision's network makes this scale of images normalised for ImageNet


def find_pretrained(name: str, weights: str | None = None) -> tuple[str, str]:
    """Return LIBRARY:NAME, whose pretrained weights the network `name` can load, and the name of the weights.

    weights: those of torchvision, such as IMAGENET1K_V2, or the tag of timm's; None: IMAGENET1K_V1, or timm's default.
    Raises ValueError if there are none, with those that exist.
    """
    name = f"torchvision:{name.removeprefix('imagenet_')}" if name in IMAGENET_MODELS else name
    library, short = split_model_name(name)
    if library == "torchvision":
        weights = weights or DEFAULT_WEIGHTS
        require_torchvision_weights(short, weights)
    elif library == "timm":
        base, _, tag = short.partition(".")
        found = [one.partition(".")[2] for one in list_names("timm", pretrained=True) if one.partition(".")[0] == base]
        if not found or (weights or tag) not in ("", *found):
            available = f"its tags are {', '.join(found)}" if found else "choose another network"
            raise ValueError(f"timm has no weights {weights or tag} for {base}; {available}".replace("  ", " "))
        name = f"timm:{base}.{weights}" if weights else name
    else:
        raise ValueError(
            f"there are no pretrained weights for {name}; they exist for {', '.join(IMAGENET_MODELS)}, "
            "torchvision:NAME and timm:NAME"
        )
    return name, weights or ""


def get_input_settings(name: str, weights: str = DEFAULT_WEIGHTS) -> InputSettings:
    """Return the input settings of the pretrained weights of LIBRARY:NAME; for torchvision those of `weights`.

    A network without such weights gets those of ImageNet at 224 pixels.
    """
    library, short = split_model_name(name)
    if library == "timm":
        config = get_timm_config(short)
        size = config.input_size[-1]
        resize = int(size / (config.crop_pct or 1))  # as timm rounds it
        smooth = config.interpolation if config.interpolation in ("bilinear", "bicubic") else "bicubic"
        return InputSettings(tuple(config.mean), tuple(config.std), size, resize, smooth)
    preset = find_torchvision_weights(short, weights)
    if preset is None:
        return InputSettings((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 256, "bilinear")
    images = preset.transforms()
    scaled = short in HALF_SCALED
    mean, std = (HALF, HALF) if scaled else (tuple(images.mean), tuple(images.std))
    return InputSettings(mean, std, images.crop_size[0], images.resize_size[0], images.interpolation.value, scaled)


def get_class_titles(name: str, num_classes: int, weights: str = DEFAULT_WEIGHTS) -> list[str]:
    """Return the class names of the pretrained weights, if there are `num_classes` of them; else an empty list."""
    library, short = split_model_name(name)
    if library == "timm":
        from timm.data import ImageNetInfo

        subset = infer_timm_subset(num_classes)
        info = subset and ImageNetInfo(subset)
        return [info.index_to_description(index).split(",")[0] for index in range(num_classes)] if info else []
    preset = find_torchvision_weights(short, weights)
    titles = list(preset.meta["categories"]) if preset else []
    return titles if len(titles) == num_classes else []


def infer_timm_subset(num_classes: int) -> str | None:
    """Return timm's name of the part of ImageNet that has this number of classes, or None."""
    from timm.data import infer_imagenet_subset

    return infer_imagenet_subset({"num_classes": num_classes})


def find_torchvision_weights(name: str, weights: str):
    """Return torchvision's weights `weights` of the network `name`, or None if it has none of this name."""
    from torchvision.models import get_model_weights

    return get_model_weights(name).__members__.get(weights)


def require_torchvision_weights(name: str, weights: str):
    """Return find_torchvision_weights(). Raises ValueError, with those that exist, if there are none."""
    from torchvision.models import get_model_weights

    if (preset := find_torchvision_weights(name, weights)) is None:
        available = ", ".join(one.name for one in get_model_weights(name)) or "none"
        raise ValueError(f"torchvision has no {weights} weights for it (available: {available})")
    return preset


def build_pretrained(
    name: str, weights: str = DEFAULT_WEIGHTS, model_args: dict | None = None
) -> tuple[nn.Module, str]:
    """Return the network LIBRARY:NAME with the weights of its library and all their classes, and their URL.

    weights: which of torchvision's. Raises ValueError, with the remedy, if there are none or they cannot be downloaded.
    """
    library, short = split_model_name(name)
    arguments = {key: make_tuple(value) for key, value in (model_args or {}).items()}
    if library == "timm":
        return build_pretrained_timm(short, arguments)
    preset = require_torchvision_weights(short, weights)
    state = convert_weights(name, download_weights(preset.url))
    network = construct(library, short, len(preset.meta["categories"]), **arguments)
    own = network.state_dict()
    own.update(state)  # keeps the version, without which MNASNet loads nothing
    network.load_state_dict(own)
    return network, preset.url


def build_pretrained_timm(name: str, arguments: dict, state: dict | None = None) -> tuple[nn.Module, str]:
    """Return build_pretrained() for a network of timm. state: load these weights of it in place of timm's own."""
    config = get_timm_config(name)
    if not config.has_weights or not config.num_classes:
        raise ValueError("timm has no weights for it" if not config.has_weights else "its weights have no classifier")
    url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    try:
        overlay = {"state_dict": state} if state else None
        return import_timm().create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments), url
    except Exception as error:  # from the hub, the network, the disk, or the constructor
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"cannot load its weights from {url} ({type(error).__name__}: {reason})\n{explain_place(config)}"
        ) from error


def explain_place(config) -> str:
    """Return where timm looks for the weights that `config` describes."""
    if not config.hf_hub_id:
        return f"put the file {config.url.rsplit('/', 1)[-1]} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    from huggingface_hub.constants import HF_HUB_CACHE

    return f"copy the folder models--{config.hf_hub_id.replace('/', '--')} of another machine into {HF_HUB_CACHE}"


def fetch_weights(
    name: str, weights: str, *, image_size: int, model_args: dict, state: dict | None = None
) -> tuple[dict, str]:
    """Return the state dict of pretrained weights for the network LIBRARY:NAME at this image size, and their URL.

    name, weights: what find_pretrained() returned. Position embeddings are interpolated. state: take these weights of
    the network, with the keys of the library, in place of a download. Raises ValueError, with the remedy, if the
    weights cannot be downloaded or do not fit.
    """
    library, short = split_model_name(name)
    if library == "timm":
        network, url = build_pretrained_timm(short, complete_arguments(library, short, image_size, model_args), state)
        return network.state_dict(), url
    url = require_torchvision_weights(short, weights).url
    state = convert_weights(name, state or download_weights(url))
    if short.startswith("vit_"):
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = interpolate_embeddings(image_size, state["conv_proj.weight"].shape[-1], state)
    return state, url
