"""Mixing methods: `mixed, soft = mixer(images, targets, source)`. mixing/base.py has the contract.

To add a method, write its file and add it to MIXERS. Public names are imported on first use, so importing this package
does not import torch.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Mixer

MIXERS = {  # name -> (module of this package, class)
    "none": (".compose", "NoMix"),
    "cutout": (".cutout", "Cutout"),
    "mixup": (".mixup", "Mixup"),
    "manifold": (".manifold", "ManifoldMixup"),
    "cutmix": (".cutmix", "CutMix"),
    "saliencymix": (".saliencymix", "SaliencyMix"),
    "puzzlemix": (".puzzlemix", "PuzzleMix"),
    "comixup": (".comixup", "CoMixup"),
    "sage": (".sage", "SAGE"),
    "rmix": (".rmix", "RMix"),
    "rlmix": (".rlmix", "RLMix"),
    "guidedmixup": (".guidedmixup", "GuidedMixup"),
    "snapmix": (".snapmix", "SnapMix"),
    "attentivemix": (".attentivemix", "AttentiveMix"),
    "resizemix": (".resizemix", "ResizeMix"),
    "fmix": (".fmix", "FMix"),
    "gridmix": (".gridmix", "GridMix"),
    "smoothmix": (".smoothmix", "SmoothMix"),
    "hmix": (".hmix", "HMix"),
    "gmix": (".hmix", "GMix"),
    "smmix": (".smmix", "SMMix"),
    "maskmix": (".maskmix", "MaskMix"),
    "s2mix": (".s2mix", "S2Mix"),
    "recursivemix": (".recursivemix", "RecursiveMix"),
}
ALIASES = {  # other names of the methods, as users of other repositories know them
    "vanilla": "none",
    "baseline": "none",
    "input": "mixup",
    "mixup_hidden": "manifold",
    "puzzle": "puzzlemix",
    "comix": "comixup",
}
OWN_CLEAN_LOSS_OFF = {"clean_lam": 0.0, "update_ratio": 1.0}  # values without a loss of the unmixed images
SETTINGS = {"mean", "std", "kernels"}  # arguments of methods that are no hyper-parameters: they change no result
_MODULES = {cls: module for module, cls in MIXERS.values()}  # public name -> its module
_MODULES |= {"Mixer": ".base", "note_torch_solvers": ".kernels"}
_MODULES |= dict.fromkeys(("Chain", "Choice", "PartialMix", "compose_mixer"), ".compose")


def __getattr__(name: str):
    """Import a public name on first use: `from mixing import SaliencyMix` does not import the other methods."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def mixer_class(name: str):
    """Return the class of a method. Raises ValueError for an unknown name."""
    name = ALIASES.get(name, name)
    if name not in MIXERS:
        raise ValueError(f"unknown mixing method {name!r}; choose from {', '.join(MIXERS)}")
    module, cls = MIXERS[name]
    return getattr(import_module(module, __name__), cls)


def hyper_parameters(name: str) -> dict:
    """Return the hyper-parameters of a method with their defaults.

    They include those that its constructor passes on to its base class (RLMix to RMix).
    """
    defaults = {}
    for cls in mixer_class(name).__mro__:
        own = inspect.signature(cls.__init__).parameters
        defaults = {key: p.default for key, p in own.items() if p.default is not p.empty} | defaults
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            return defaults
    return defaults


def build_mixer(name: str, /, **options) -> "Mixer":
    """Build a method by name.

    Options that are None or no hyper-parameter of the method are ignored, so one set of options serves all methods.
    """
    known = hyper_parameters(name)
    return mixer_class(name)(**{k: v for k, v in options.items() if k in known and v is not None})


def collect_hyper_parameters(
    names: list[str],
    *,
    method_options: dict[str, dict] | None = None,
    cutout: bool = False,
    clean_weight: float | None = None,
    **options,
) -> dict[str, dict]:
    """Return method -> the values of its hyper-parameters with which compose_mixer() builds it from these arguments.

    SETTINGS, which some methods also take, are left out.
    """
    given, found = {key: value for key, value in options.items() if value is not None}, {}
    given |= OWN_CLEAN_LOSS_OFF if clean_weight is not None else {}
    for name in [*names, *(["cutout"] if cutout and "cutout" not in names else [])]:
        defaults = hyper_parameters(name)
        values = {**defaults, **(method_options or {}).get(name, {}), **given}
        found[name] = {key: values[key] for key in defaults if key not in SETTINGS}
    return found


def compose_options(names: list[str]) -> list[str]:
    """Return the names of the keyword arguments of compose_mixer() that these methods read."""
    compose_mixer = import_module(".compose", __name__).compose_mixer
    own = [key for key, p in inspect.signature(compose_mixer).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return list(dict.fromkeys(own + [key for name in [*names, "cutout"] for key in hyper_parameters(name)]))
