"""Saliency sources: `source(images, targets) -> (B, H, W) >= 0`.

The public names are loaded when they are first used: importing this package does not import torch.
"""

import inspect
from importlib import import_module

SOURCES = {  # name -> (module, class)
    "gradient": ("saliency.gradient", "Gradient"),
    "bank": ("saliency.bank", "Bank"),
    "fine_grained": ("saliency.static", "FineGrained"),
    "spectral_residual": ("saliency.static", "SpectralResidual"),
    "float_bytes": ("saliency.static", "FloatBytes"),
    "uniform": ("saliency.static", "Uniform"),
    "cam": ("saliency.cam.sources", "CAM"),
    "gradcam": ("saliency.cam.sources", "GradCAM"),
    "gradcam++": ("saliency.cam.sources", "GradCAMpp"),
    "layercam": ("saliency.cam.sources", "LayerCAM"),
    "casm": ("saliency.casm.source", "CASM"),
}
CAM_METHODS = ("cam", "gradcam", "gradcam++", "layercam", "scorecam")  # of saliency.cam.maps.ActivationMaps
ALIASES = {"static": "fine_grained", "spectral": "spectral_residual"}


_HOMES = {cls: module for module, cls in SOURCES.values()}  # public name -> its module
_HOMES |= {"Source": "saliency.base", "ActivationMaps": "saliency.cam.maps"}


def __getattr__(name: str):
    """`from saliency import Gradient` without importing every source."""
    if name not in _HOMES:
        raise AttributeError(f"module 'saliency' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def source_class(name: str):
    """The class of the source `name`. Raises ValueError for an unknown name."""
    name = ALIASES.get(name, name)
    if name not in SOURCES:
        raise ValueError(f"unknown saliency source {name!r}; there are {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    return getattr(import_module(module), cls)


def build_source(name: str, /, **options):
    """The source `name` with those of `options` that its constructor takes and that are not None; others are ignored.

    Static sources take mean and std, the normalisation of the images (one number per channel, of pixels in 0..1);
    `gradient` takes the model and the options of saliency.gradient.Gradient; `cam` the model; `bank` the number of
    training images; `casm` its file. Raises ValueError for an unknown name, and for an option missing or out of range.
    """
    source = source_class(name)
    known = {key: p for key, p in inspect.signature(source.__init__).parameters.items() if key != "self"}
    needed = [
        key for key, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing := [key for key in needed if key not in options]:
        raise ValueError(f"the source {ALIASES.get(name, name)} needs {' and '.join(missing)}")
    return source(**{key: value for key, value in options.items() if key in known and value is not None})


def source_parameters(source) -> set[str]:
    """The flags that a source reads: `saliency` itself and the parameters of its constructor."""
    return {"saliency", *inspect.signature(type(source).__init__).parameters}
