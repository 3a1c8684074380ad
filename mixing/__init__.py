"""Mixing methods: `mixer(images, targets, source) -> mixed images, soft targets`. Importing this package does not
import torch.
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


def __getattr__(name: str):
    """`from mixing import SaliencyMix` without importing every method."""
    for module, cls in MIXERS.values():
        if cls == name:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'mixing' has no attribute {name!r}")


def mixer_class(name: str):
    """The class of the method `name`. Raises ValueError for an unknown name."""
    name = ALIASES.get(name, name)
    if name not in MIXERS:
        raise ValueError(f"unknown mixing method {name!r}; there are {', '.join(MIXERS)}")
    module, cls = MIXERS[name]
    return getattr(import_module(module), cls)


def hyper_parameters(name: str) -> dict:
    """Name -> default of everything the method `name` can be told; what a constructor hands on to its base included."""
    found = {}
    for cls in mixer_class(name).__mro__:
        own = inspect.signature(cls.__init__).parameters
        found = {key: p.default for key, p in own.items() if p.default is not p.empty} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            return found
    return found


def build_mixer(name: str, /, **options):
    """The method `name` with those of `options` that it knows and that are not None; the others are left alone."""
    known = hyper_parameters(name)
    return mixer_class(name)(**{k: v for k, v in options.items() if k in known and v is not None})


def compose(names: list[str], options: dict):
    """The mixer for `--method names` with all its options around it.

    Several names: one of them is drawn for every batch. options: by flag name; `method_options` holds what a recipe
    sets for single methods. Raises ValueError for a hyper-parameter out of range.
    """
    from mixing.compose import Chain, Choice, PartialMix

    given = {key: value for key, value in options.items() if value is not None}
    mixers = [build_mixer(name, **{**options["method_options"].get(name, {}), **given}) for name in names]
    mixer = mixers[0] if len(mixers) == 1 else Choice(mixers)
    schedule = {key: options[key] for key in ("mix_fraction", "mix_schedule", "mix_scheduled_epoch", "mix_off_epoch")}
    if schedule["mix_fraction"] < 1 or schedule["mix_off_epoch"] or schedule["mix_schedule"] != "fixed":
        mixer = PartialMix(mixer, **schedule)
    if options["cutout"] and names != ["cutout"]:
        mixer = Chain([build_mixer("cutout", **options), mixer])
    return mixer
