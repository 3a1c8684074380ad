"""Saliency sources: `source(images, targets) -> (B, H, W) >= 0`. Importing this package does not import torch."""

from importlib import import_module

SOURCES = {  # name -> (module, class)
    "fine_grained": ("saliency.static", "FineGrained"),
    "spectral_residual": ("saliency.static", "SpectralResidual"),
    "float_bytes": ("saliency.static", "FloatBytes"),
}
ALIASES = {"static": "fine_grained", "spectral": "spectral_residual"}


def build_source(name: str | None, *, mean: tuple[float, ...], std: tuple[float, ...]):
    """The source `name` for images normalised with mean and std (one number a channel, of pixels in 0..1); None for
    None.

    Raises ValueError for an unknown name.
    """
    if name is None:
        return None
    name = ALIASES.get(name, name)
    if name not in SOURCES:
        raise ValueError(f"unknown saliency source {name!r}; there are {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    return getattr(import_module(module), cls)(mean=mean, std=std)
