"""Classifiers of torchvision and timm by name: `torchvision:NAME` and `timm:NAME`. timm is an optional package.

A network of these libraries is used as it is, with two exceptions. GoogLeNet and Inception are built without their
auxiliary classifiers, so that forward(images) returns logits in training, too. Networks that are built for one image
size are built for that of the run.
"""

import difflib
import inspect
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import get_type_hints

import torch
from torch import nn

SIZE_ARGUMENTS = ("img_size", "image_size")  # of constructors that need the image size: timm's, torchvision's
FIXED_ARGUMENTS = {  # argument -> why --model_args cannot set it
    "num_classes": "is the number of classes of the data",
    "pretrained": "is the option --pretrained",
    "weights": "is the option --pretrained",
    "aux_logits": "is off, since a network returns its logits alone",
    "features_only": "makes a network without a classifier",
}
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")  # of every ResNet of both libraries, and their kin
NO_AUXILIARY = {"aux_logits": False, "init_weights": True}
BUILD_ARGUMENTS = {"googlenet": NO_AUXILIARY, "inception_v3": NO_AUXILIARY}  # of torchvision


def import_timm() -> ModuleType:
    """Return the package timm. Raises ValueError if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ValueError("networks timm:NAME need the package timm: pip install timm") from error
    return timm


def list_names(library: str, pretrained: bool = False) -> list[str]:
    """List the classifiers of a library. pretrained: of timm's, NAME.TAG for all weights that exist."""
    if library == "timm":
        return import_timm().list_models(pretrained=pretrained)
    from torchvision import models

    return models.list_models(module=models)


def check_name(library: str, name: str) -> str:
    """Return the name as the library spells it. Raises ValueError, with a near miss, if there is none of this name."""
    known = name.lower() in list_names(library) or library == "timm" and import_timm().is_model(name)
    if not known:
        close = [f"{library}:{one}" for one in find_closest(name.lower(), list_names(library))]
        hint = f"did you mean {' or '.join(close)}?" if close else "see --list_models"
        raise ValueError(f"{library} has no classifier {name!r}; {hint}")
    return name.lower()


def find_closest(name: str, names: Sequence[str]) -> list[str]:
    """Return up to three of the names that are similar to `name` or contain it."""
    return difflib.get_close_matches(name, names, 3, 0.6) or [one for one in names if name and name in one][:3]


def construct(library: str, name: str, num_classes: int, **arguments) -> nn.Module:
    """Call the library's constructor. The weights are initialised at random."""
    if library == "timm":
        return import_timm().create_model(name, pretrained=False, num_classes=num_classes, **arguments)
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=num_classes, **BUILD_ARGUMENTS.get(name, {}), **arguments)


@cache
def list_arguments(library: str, name: str) -> tuple[str, ...]:
    """List the arguments that the constructor of a network takes, as far as its signature names them."""
    if library == "timm":
        entry = import_timm().models.model_entrypoint(name)
    else:
        from torchvision.models import get_model_builder

        entry = get_model_builder(name)
    kind = get_type_hints(entry).get("return")
    if not isinstance(kind, type):  # the function does not say what it returns
        with torch.device("meta"):
            kind = type(construct(library, name, 10))
    found: dict[str, None] = {}
    for base in kind.__mro__:  # a constructor with **kwargs passes them on to that of its base class
        parameters = inspect.signature(base.__init__).parameters.values()
        found |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(key for key in found if key != "self" and key not in FIXED_ARGUMENTS)


def build_library_model(library: str, name: str, num_classes: int, image_size: int, model_args: dict) -> nn.Module:
    """Build the classifier `name` of a library for square images: (B, 3, H, W) -> (B, num_classes).

    model_args: arguments of its constructor. One that takes the image size gets `image_size` unless they set it. Raises
    ValueError for an unknown name, for arguments that the constructor does not take, and for an image size that the
    network does not take.
    """
    name, title = check_name(library, name), f"{library}:{name}"
    if fixed := model_args.keys() & FIXED_ARGUMENTS.keys():
        key = min(fixed)
        raise ValueError(f"{title}: {key} {FIXED_ARGUMENTS[key]}; leave it out of --model_args")
    arguments = complete_arguments(library, name, image_size, model_args)
    try:
        network = construct(library, name, num_classes, **arguments)
    except Exception as error:  # whatever the constructor raises for a name or a value
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        hint = suggest_arguments(model_args, list_arguments(library, name))
        if set(arguments) <= {*SIZE_ARGUMENTS}:  # nothing else can be at fault
            hint = "; set another --image_size, such as the size that the network was made for"
        raise ValueError(f"{title} cannot be built with {given} ({summarize(error)}){hint}") from error
    if library == "timm":
        check_patches(network, title, image_size)
    check_images(network, title, num_classes, image_size)
    if all(isinstance(getattr(network, stage, None), nn.Module) for stage in RESNET_STAGES):
        network.stages = RESNET_STAGES  # as our own networks state theirs
    return network


def suggest_arguments(model_args: dict, known: Sequence[str]) -> str:
    """Return a hint at the arguments nearest to the first of `model_args` that is not among the known ones, or "".

    Without a near one, it names the first dozen.
    """
    unknown = next((key for key in model_args if key not in known), None)
    if unknown is None:
        return ""
    if close := find_closest(unknown, known):
        return f"; did you mean {' or '.join(close)}?"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"; its arguments are {', '.join(known[:12])}{more}"


def complete_arguments(library: str, name: str, image_size: int, model_args: dict) -> dict[str, object]:
    """Return `model_args` with the image size, if the constructor takes it and they do not set it."""
    sizes = {key: image_size for key in SIZE_ARGUMENTS if key in list_arguments(library, name)}
    return sizes | {key: make_tuple(value) for key, value in model_args.items()}


def make_tuple(value):
    """Return a list, which is how JSON stores it, as a tuple; anything else unchanged."""
    return tuple(map(make_tuple, value)) if isinstance(value, list) else value


def check_patches(network: nn.Module, title: str, image_size: int) -> None:
    """Raise ValueError if the patches of a network of timm do not cover images of this size.

    timm leaves out the rows and columns at the end. Weights that were trained so keep their own size.
    """
    embed = getattr(network, "patch_embed", None)
    if not isinstance(embed, import_timm().layers.PatchEmbed) or embed.dynamic_img_pad:
        return
    patch = max(embed.patch_size)
    rest, own = image_size % patch, network.pretrained_cfg.get("input_size", (0,))[-1]
    if rest and image_size != own:
        raise ValueError(
            f"{title} takes no images of {image_size} pixels: its patches of {patch} pixels would leave out {rest} at "
            f"the end of each side; set --image_size to a multiple of {patch}, or --model_args patch_size"
        )


@torch.no_grad()
def check_images(network: nn.Module, title: str, num_classes: int, image_size: int) -> None:
    """Raise ValueError if a network on the CPU does not map one image of this size to logits (1, num_classes)."""
    if next(network.parameters()).is_meta:
        return
    network.eval()
    try:
        logits = network(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{title} takes no images of {image_size} pixels ({summarize(error)}); set another --image_size, such as "
            "the size that the network was made for, or other --model_args"
        ) from error
    finally:
        network.train()
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        raise ValueError(f"{title} with these --model_args returns no logits for {num_classes} classes")


def summarize(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
