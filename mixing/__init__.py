"""Mixing methods: `mixer(images, targets, source) -> mixed images, soft targets`.

The public names are loaded when they are first used: importing this package does not import torch.
"""

import inspect
from importlib import import_module

MIXERS = {  # name -> (module, class)
    "none": ("mixing.compose", "NoMix"),
    "cutout": ("mixing.cutout", "Cutout"),
    "mixup": ("mixing.mixup", "Mixup"),
    "manifold": ("mixing.manifold", "ManifoldMixup"),
    "cutmix": ("mixing.cutmix", "CutMix"),
    "saliencymix": ("mixing.saliencymix", "SaliencyMix"),
    "puzzlemix": ("mixing.puzzlemix", "PuzzleMix"),
    "comixup": ("mixing.comixup", "CoMixup"),
    "sage": ("mixing.sage", "SAGE"),
    "rmix": ("mixing.rmix", "RMix"),
    "rlmix": ("mixing.rlmix", "RLMix"),
}
ALIASES = {
    "vanilla": "none",
    "baseline": "none",
    "input": "mixup",
    "mixup_hidden": "manifold",
    "puzzle": "puzzlemix",
    "comix": "comixup",
}
_HOMES = {cls: module for module, cls in MIXERS.values()}  # public name -> its module
_HOMES |= {"Mixer": "mixing.base"}
_HOMES |= dict.fromkeys(("Chain", "Choice", "PartialMix", "compose_mixer"), "mixing.compose")


def __getattr__(name: str):
    """`from mixing import SaliencyMix` without importing every method."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mixing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def mixer_class(name: str):
    """The class of the method `name`. Raises ValueError for an unknown name."""
    name = ALIASES.get(name, name)
    if name not in MIXERS:
        raise ValueError(f"unknown mixing method {name!r}; there are {', '.join(MIXERS)}")
    module, cls = MIXERS[name]
    return getattr(import_module(module), cls)


def hyper_parameters(name: str) -> dict:
    """Every hyper-parameter of the method `name` with its default, including those that its constructor passes on to
    its base class.
    """
    found = {}
    for cls in mixer_class(name).__mro__:
        own = inspect.signature(cls.__init__).parameters
        found = {key: p.default for key, p in own.items() if p.default is not p.empty} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            return found
    return found


def build_mixer(name: str, /, **options):
    """The method `name` with those of `options` that are hyper-parameters of it and not None; others are ignored."""
    known = hyper_parameters(name)
    return mixer_class(name)(**{k: v for k, v in options.items() if k in known and v is not None})


def compose_options(names: list[str]) -> list[str]:
    """The keyword arguments of compose_mixer() that have an effect with these methods."""
    compose_mixer = import_module("mixing.compose").compose_mixer
    own = [key for key, p in inspect.signature(compose_mixer).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return list(dict.fromkeys(own + [key for name in [*names, "cutout"] for key in hyper_parameters(name)]))
