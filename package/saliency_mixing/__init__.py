"""Saliency-guided mixing for your own training loop: `mixed, targets = mixer(images, targets, source)`.

    from saliency_mixing import PuzzleMix, gradient_source

A mixer (mixing/base.py has its contract) returns mixed images and soft targets. A saliency source (saliency/base.py)
returns one map per image; sources.py has a function for each kind. Public names are imported on first use, so importing
this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mixing import build_mixer
    from .mixing.attentivemix import AttentiveMix
    from .mixing.base import Mixer
    from .mixing.comixup import CoMixup
    from .mixing.compose import Chain, Choice, NoMix, PartialMix, compose_mixer
    from .mixing.cutmix import CutMix
    from .mixing.cutout import Cutout
    from .mixing.fmix import FMix
    from .mixing.gridmix import GridMix
    from .mixing.guidedmixup import GuidedMixup
    from .mixing.hmix import GMix, HMix
    from .mixing.manifold import ManifoldMixup
    from .mixing.maskmix import MaskMix
    from .mixing.mixup import Mixup
    from .mixing.puzzlemix import PuzzleMix
    from .mixing.recursivemix import RecursiveMix
    from .mixing.resizemix import ResizeMix
    from .mixing.rlmix import RLMix
    from .mixing.rmix import RMix
    from .mixing.s2mix import S2Mix
    from .mixing.sage import SAGE
    from .mixing.saliencymix import SaliencyMix
    from .mixing.smmix import SMMix
    from .mixing.smoothmix import SmoothMix
    from .mixing.snapmix import SnapMix
    from .saliency import build_source
    from .saliency.base import Source
    from .saliency.cam.maps import ActivationMaps
    from .sources import attention_source, bank_source, cam_source, gradient_source, static_source
else:  # hidden from type checkers, so that they report a name that does not exist

    def __getattr__(name: str):
        """Import a public name on first use."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES.get(name, ".mixing"), __name__), name)


__version__ = "0.1.0"
__all__ = [
    "SAGE",
    "ActivationMaps",
    "AttentiveMix",
    "Chain",
    "Choice",
    "CoMixup",
    "CutMix",
    "Cutout",
    "FMix",
    "GMix",
    "GridMix",
    "GuidedMixup",
    "HMix",
    "ManifoldMixup",
    "MaskMix",
    "Mixer",
    "Mixup",
    "NoMix",
    "PartialMix",
    "PuzzleMix",
    "RLMix",
    "RMix",
    "RecursiveMix",
    "ResizeMix",
    "S2Mix",
    "SMMix",
    "SaliencyMix",
    "SmoothMix",
    "SnapMix",
    "Source",
    "attention_source",
    "bank_source",
    "build_mixer",
    "build_source",
    "cam_source",
    "compose_mixer",
    "gradient_source",
    "static_source",
]
_HOMES = {"ActivationMaps": ".saliency", "Source": ".saliency", "build_source": ".saliency"}  # the others: .mixing
_HOMES |= {name: ".sources" for name in __all__ if name.endswith("_source") and name != "build_source"}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
