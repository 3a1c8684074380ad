"""Saliency sources: `source(images, targets)` returns maps (B, H, W) >= 0. saliency/base.py has the contract.

To add a source, write its file and add it to SOURCES. Public names are imported on first use, so importing this package
does not import torch.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Source

SOURCES = {  # name -> (module of this package, class)
    "gradient": (".gradient", "Gradient"),
    "bank": (".bank", "Bank"),
    "fine_grained": (".static", "FineGrained"),
    "spectral_residual": (".static", "SpectralResidual"),
    "spectral_residual_full": (".static", "SpectralResidualFull"),
    "float_bytes": (".static", "FloatBytes"),
    "uniform": (".static", "Uniform"),
    "cam": (".cam.sources", "CAM"),
    "gradcam": (".cam.sources", "GradCAM"),
    "gradcam++": (".cam.sources", "GradCAMpp"),
    "layercam": (".cam.sources", "LayerCAM"),
    "attention": (".cam.sources", "Attention"),
    "casm": (".casm.source", "CASM"),
}
CAM_METHODS = ("cam", "gradcam", "gradcam++", "layercam", "scorecam", "attention")  # that ActivationMaps implements
FIXED_LAYER = {"cam": "the maps that are averaged", "attention": "the last attention"}  # methods without a choice
ALIASES = {"static": "fine_grained", "spectral": "spectral_residual"}
SET_BY_RUN = {
    "model",
    "mean",
    "std",
    "image_size",
    "device",
    "precision",
    "scaler",
    "num_images",
    "training_loss",
    "cross_entropy_scale",
}
SET_BY_METHOD = {"reduction", "blur_sigma", "kernel_size", "mode", "clean_weight", "follows_training_loss"}
_MODULES = {cls: module for module, cls in SOURCES.values()}  # public name -> its module
_MODULES |= {"Source": ".base", "ActivationMaps": ".cam.maps"}


def __getattr__(name: str):
    """Import a public name on first use: `from saliency import Gradient` does not import the other sources."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def source_class(name: str):
    """Return the class of a source. Raises ValueError for an unknown name, and for casm if it is not installed."""
    name = ALIASES.get(name, name)
    if name not in SOURCES:
        raise ValueError(f"unknown saliency source {name!r}; choose from {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    try:
        return getattr(import_module(module, __name__), cls)
    except ModuleNotFoundError as error:
        if error.name not in (f"{__name__}.casm", "engine"):  # an editable install has casm/, but no engine/
            raise
        raise ValueError(
            "the source casm is not part of saliency_mixing, because learned masks need the whole repository: put its "
            "folder on PYTHONPATH and use build_source('casm', ...) of its package saliency"
        ) from None


def list_source_options() -> list[str]:
    """Return the constructor parameters of all sources that are options of the command line.

    The others are set by the run (SET_BY_RUN) or by the method (SET_BY_METHOD, from Mixer.gradient_options).
    """
    parameters = dict.fromkeys(key for name in SOURCES for key in inspect.signature(source_class(name)).parameters)
    return [key for key in parameters if key not in SET_BY_RUN | SET_BY_METHOD]


def build_source(name: str, /, **options) -> "Source":
    """Build a source by name.

    Options that are None or not a parameter of the source are ignored, so one set of options serves all sources.
    `gradient` and the activation maps need `model`; `gradient` also takes the gradient_options of a mixer. The static
    sources need `mean` and `std`, the normalisation of the images (one number per channel, for pixels in 0..1), because
    they look at the original pixels. `bank` needs `num_images`, the size of the training set; `casm` needs its file.

    Raises ValueError for an unknown name, and for an option that is missing or out of range.
    """
    source = source_class(name)
    parameters = {key: p for key, p in inspect.signature(source.__init__).parameters.items() if key != "self"}
    required = [
        key for key, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing := [key for key in required if key not in options]:
        raise ValueError(f"the source {ALIASES.get(name, name)} needs {' and '.join(missing)}")
    return source(**{key: value for key, value in options.items() if key in parameters and value is not None})


def source_parameters(source) -> set[str]:
    """Return the options that a source reads: `saliency` itself and the parameters of its constructor."""
    return {"saliency", *inspect.signature(type(source).__init__).parameters}
