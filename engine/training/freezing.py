"""Freeze layers: exclude parameters from training, and keep the statistics of batch norm there."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from torch import nn

from engine.errors import suggest_closest
from engine.runtime.text import format_count


class FrozenStatistics:
    """Mixin of a batch norm layer that uses and keeps its running statistics, also in training mode.

    `training` is always False, whoever sets it: the training loop, or a saliency pass in training mode.
    """

    training = property(lambda self: False, lambda self, value: None)


def freeze_layers(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Set requires_grad to False for all parameters that a pattern matches. Returns a note about them.

    A pattern is compared with the names of parameters and of the layers that hold them, as a shell compares it with
    file names; `*` also matches dots. A batch norm layer without trainable parameters keeps its running statistics.
    Raises ValueError if a pattern matches nothing, and if no parameter is left to train.
    """
    if not patterns:
        return []
    parameters = dict(network.named_parameters())
    levels = {name: list_levels(name) for name in parameters}
    for pattern in patterns:
        found = [name for name in parameters if any(fnmatchcase(level, pattern) for level in levels[name])]
        if not found:
            closest = suggest_closest(pattern, dict.fromkeys(level for name in levels for level in levels[name]))
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise ValueError(f"--freeze {pattern} matches no layer or parameter{closest} (layers: {tops})")
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"--freeze {' '.join(patterns)}: no parameter is left to train; leave out the last layer")
    return [describe_frozen(list(parameters.values()), freeze_statistics(network))]


def list_levels(name: str) -> list[str]:
    """Return a dotted name and those of the layers around it: a.b.c -> a, a.b, a.b.c."""
    return list(accumulate(name.split("."), "{}.{}".format))


def freeze_statistics(network: nn.Module) -> int:
    """Fix the statistics of all batch norm layers whose parameters are frozen. Returns the number of these layers."""
    frozen = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.affine
        and not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    ]
    for layer in frozen:
        layer.training = False
        layer.__class__ = type(type(layer).__name__, (FrozenStatistics, type(layer)), {})
    return len(frozen)


def describe_frozen(parameters: Sequence[nn.Parameter], norms: int) -> str:
    """Return a note on what is frozen. norms: number of batch norm layers that keep their statistics."""
    weights = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    share = sum(count for count, trained in weights if not trained) / sum(count for count, _ in weights)
    note = f"--freeze: {100 * share:.1f} % of the weights are not trained"
    return note + (f"; {format_count(norms, 'batch norm layer')} with their running statistics" if norms else "")
