"""Class activation maps of any network: ActivationMaps computes them, list_layers() lists where."""

from .maps import ActivationMaps, choose_methods, normalize_maps, upsample_maps
from .tracing import list_layers

__all__ = ["ActivationMaps", "choose_methods", "list_layers", "normalize_maps", "upsample_maps"]
