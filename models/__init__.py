"""Build classifiers by name. Importing this package does not import torch, so that `--help` is fast."""

import textwrap
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

LIBRARIES = ("torchvision", "timm")  # their classifiers have the names LIBRARY:NAME; see models/library.py
MODELS = {  # name -> (module, constructor, its first arguments)
    **{f"resnet{depth}": ("models.resnet", "resnet", depth) for depth in (18, 34, 50, 101, 152)},
    **{f"resnet{depth}": ("models.resnet", "NarrowResNet", depth) for depth in (20, 32, 44, 56, 110)},
    **{f"preactresnet{depth}": ("models.preact_resnet", "preactresnet", depth) for depth in (18, 34, 50, 101, 152)},
    "wrn28_10": ("models.wide_resnet", "WideResNet", 28, 10),
    "wrn28_8": ("models.wide_resnet", "WideResNet", 28, 8),
    "wrn16_8": ("models.wide_resnet", "WideResNet", 16, 8),
    "resnext29_4_24": ("models.resnext", "ResNeXt29", 4, 24),
    "resnext50": ("models.resnet", "resnext50"),
    **{f"imagenet_resnet{n}": ("models.imagenet_resnet", "imagenet_resnet", n) for n in (18, 34, 50, 101, 152)},
}
ALIASES = {"wideresnet": "wrn28_10", "wrn28-10": "wrn28_10", "wrn28-8": "wrn28_8", "wrn16-8": "wrn16_8"}
ALIASES |= {"resnext29-4-24": "resnext29_4_24"}
IMAGENET_MODELS = [name for name in MODELS if name.startswith("imagenet_")]
IMAGENET_ALIASES = {name.removeprefix("imagenet_"): name for name in IMAGENET_MODELS}  # for large images
DROPOUT_MODELS = {name for name in MODELS if name.startswith("wrn")}
MAX_IMAGE_SIZE = 128  # largest side in pixels for all other networks, which are for small images


LAZY = {  # attribute -> the module that it is imported from on first use, since it needs torch
    "zero_init": "models.imagenet_resnet",
    **dict.fromkeys(("convert_weights", "find_heads", "infer_image_size"), "models.library_files"),
    **dict.fromkeys(("build_pretrained", "fetch_weights", "find_pretrained"), "models.pretrained"),
    **dict.fromkeys(("get_class_titles", "get_input_settings"), "models.pretrained"),
}


def __getattr__(name: str):
    """Import an attribute of LAZY."""
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")


def get_stem_stride(image_size: int) -> int:
    """Return the stride of the stem: 1 below 64 pixels, 2 from 64 on (Tiny-ImageNet), as in Puzzle Mix's code."""
    return 1 if image_size < 64 else 2


def split_model_name(name: str) -> tuple[str | None, str]:
    """Split `timm:NAME` or `torchvision:NAME` into library and name. The library of any other name is None."""
    library, colon, rest = name.partition(":")
    return (library.lower(), rest) if colon and library.lower() in LIBRARIES else (None, name)


def check_model_name(name: str) -> str:
    """Return the name of a network of ours or of a library in its own spelling.

    Raises ValueError, with the closest name, for an unknown one, and for a network of timm without timm.
    """
    library, rest = split_model_name(name)
    if library:
        return f"{library}:{import_module('models.library').check_name(library, rest)}"
    name = ALIASES.get(name, name)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}, torchvision:NAME or timm:NAME")
    return name


def find_library_name(name: str) -> str | None:
    """Return the full name of a network of a library, given as LIBRARY:NAME or as torchvision's plain NAME; None for
    any other name. Raises ValueError as check_model_name() does.
    """
    if split_model_name(name)[0]:
        return check_model_name(name)
    return f"torchvision:{name}" if name in list_torchvision_names() else None


def find_model_name(name: str) -> str:
    """Return check_model_name() for the network of given weights, which may also be a NAME that only torchvision has.

    Raises ValueError for an unknown name.
    """
    if name in MODELS or name in ALIASES:
        return check_model_name(name)
    if found := find_library_name(name):
        return found
    close = import_module("models.library").find_closest(name, [*MODELS, *list_torchvision_names()])
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"neither one of our networks nor one of torchvision's{hint}")


def list_torchvision_names() -> list[str]:
    """List the classifiers of torchvision."""
    return import_module("models.library").list_names("torchvision")


def build_model(
    name: str, num_classes: int, image_size: int = 32, dropout: float = 0.0, model_args: dict | None = None
):
    """Build the network `name` for square images of `image_size` pixels: (B, 3, H, W) -> (B, num_classes).

    The weights are initialised at random. dropout is used only by the wide ResNets. model_args: arguments of the
    constructor of a library's network. Raises ValueError for an unknown name, for arguments that the constructor does
    not take, and for an image size that the network does not take.
    """
    name, model_args = check_model_name(name), model_args or {}
    library, rest = split_model_name(name)
    if library:
        build = import_module("models.library").build_library_model
        return build(library, rest, num_classes, image_size, model_args)
    if model_args:
        raise ValueError(f"{name} takes no --model_args; they are for networks torchvision:NAME and timm:NAME")
    module, constructor, *arguments = MODELS[name]
    extra = {"dropout": dropout} if name in DROPOUT_MODELS else {}
    if name not in IMAGENET_MODELS:
        check_image_size(name, image_size)
        extra["stride"] = get_stem_stride(image_size)
    return getattr(import_module(module), constructor)(*arguments, num_classes, **extra)


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError, with a suitable network, if images are too large for `name`, a network for small images."""
    if image_size > MAX_IMAGE_SIZE:
        replacement = IMAGENET_ALIASES.get(name) or f"one of {', '.join(IMAGENET_MODELS)}"
        side = image_size // get_stem_stride(image_size)
        raise ValueError(
            f"{name} is for images of at most {MAX_IMAGE_SIZE} pixels; at {image_size} its first stage would work on "
            f"{side}x{side}, 4 times as many pixels as behind an ImageNet stem; use {replacement}"
        )


def find_matching_models(state: dict, like: str | None = None) -> list[str]:
    """Return the names of the networks whose state-dict keys and shapes equal those of `state`.

    The number of classes may be any. The num_batches_tracked of batch norm is ignored, because files from old versions
    of torch lack it. like: consider only the networks that this name can mean; `resnet50` can also mean
    imagenet_resnet50.
    """
    names = [ALIASES.get(like, like), IMAGENET_ALIASES.get(like)] if like else MODELS
    if not count_classes(state):
        return []
    expected = get_shapes(state)
    return [name for name in names if name in MODELS and get_model_shapes(name) == expected]


def get_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    """Return key -> shape, without num_batches_tracked and, in the last layer, without the number of classes."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}
    if (head := find_last_layer(state)) and shapes.get(f"{head}.weight", ())[:1] == shapes[f"{head}.bias"]:
        shapes |= {f"{head}.weight": shapes[f"{head}.weight"][1:], f"{head}.bias": ()}
    return shapes


@cache
def get_model_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return get_shapes() of the network `name`."""
    import torch

    with torch.device("meta"):
        return get_shapes(build_model(name, 10).state_dict())


def find_last_layer(state: dict) -> str | None:
    """Return the name of the last layer in the state dict of one of our networks, or None."""
    return next((head for head in ("fc", "linear", "classifier") if f"{head}.bias" in state), None)


def count_classes(state: dict, name: str | None = None) -> int:
    """Return the number of classes of weights of one of our networks, or of the network `name` of a library; 0 if they
    are of none.
    """
    import torch

    if name and split_model_name(name)[0]:
        return import_module("models.library_files").count_library_classes(name, state)

    bias = state.get(f"{find_last_layer(state)}.bias")
    return len(bias) if isinstance(bias, torch.Tensor) and bias.ndim == 1 else 0


def count_parameters(names: Iterable[str], num_classes: int = 10) -> dict[str, int]:
    """Return name -> number of parameters. No memory is allocated for the weights."""
    import torch

    with torch.device("meta"):
        return {name: sum(p.numel() for p in build_model(name, num_classes).parameters()) for name in names}


def list_models(names: Iterable[str], num_classes: int = 10) -> str:
    """Return one line per network with its name and number of parameters, then the classifiers of torchvision, and how
    to list those of timm.
    """
    counts = count_parameters(names, num_classes)
    lines = [f"{name:20} {count:>12,} parameters" for name, count in counts.items()]
    theirs = ", ".join(list_torchvision_names())
    lines += textwrap.wrap(f"torchvision:NAME, where NAME is one of {theirs}", 120, subsequent_indent="  ")
    lines.append("timm:NAME, where NAME is one of: python -c \"import timm; print(*timm.list_models('*vit*'))\"")
    return "\n".join(lines)


def download_weights(url: str) -> dict:
    """Return the state dict at `url`, from torch.hub's cache or by download. The hash in the file name is checked.

    Raises ValueError, with the file and its folder, if the download fails or the file is damaged.
    """
    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = cache / url.rsplit("/", 1)[-1]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # from the network, the disk, the hash check or the unpickler
        reason = (str(error).splitlines() or [""])[0][:200]
        if file.is_file():
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}: {reason})\ndelete it and try again"
            ) from error
        raise ValueError(
            f"cannot download {url} ({type(error).__name__}: {reason})\nput the file {file.name} into {cache}"
        ) from error
