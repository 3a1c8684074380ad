"""Saliency sources: `source(images, targets) -> (B, H, W) >= 0`. Importing this package does not import torch."""

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


def build_source(name: str, **given):
    """The source `name` with those of `given` that it knows and that are not None; the others are left alone.

    Static sources take mean and std, the normalisation of the images (one number a channel, of pixels in 0..1);
    `gradient` takes the model and what saliency.gradient.Gradient says; `cam` the model; `bank` the number of training
    images; `casm` its file. Raises ValueError for an unknown name, and for an option out of range.
    """
    name = ALIASES.get(name, name)
    if name not in SOURCES:
        raise ValueError(f"unknown saliency source {name!r}; there are {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    source = getattr(import_module(module), cls)
    known = inspect.signature(source.__init__).parameters
    missing = [key for key, p in known.items() if p.default is p.empty and key not in ("self", *given)]
    missing = [key for key in missing if known[key].kind not in (known[key].VAR_POSITIONAL, known[key].VAR_KEYWORD)]
    if missing:
        raise ValueError(f"the source {name} needs {' and '.join(missing)}")
    return source(**{key: value for key, value in given.items() if key in known and value is not None})


def source_parameters(source) -> set[str]:
    """The flags that a source reads: `saliency` itself and the parameters of its constructor."""
    return {"saliency", *inspect.signature(type(source).__init__).parameters}
