"""Build the optimizer and its parameter groups, and restore its state."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import ModuleType

import torch

from engine.errors import get_first_error_line, suggest_closest

# parameters of torchvision's transformers and ConvNeXt that timm's networks name in no_weight_decay(), or have as 1-d
NO_DECAY_NAMES = {"class_token", "pos_embedding", "relative_position_bias_table", "logit_scale", "layer_scale"}
HYPER_PARAMETERS = ("weight_decay", "momentum", "nesterov", "betas", "eps")  # of a parameter group, as options set them


def build_optimizer(
    network: torch.nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    optimizer: str = "sgd",
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    no_decay_bn: bool = False,
    no_decay_1d: bool = False,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters. The keyword-only parameters are the options of the same names.

    Raises ValueError for an optimizer that timm does not have or that this training step cannot run, and for
    hyper-parameters that it does not take.
    """
    undecayed = find_undecayed(network, no_decay_bn, no_decay_1d)
    groups = group_parameters(network, undecayed, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    given = {"betas": betas and tuple(betas), "eps": eps}
    given = {key: value for key, value in given.items() if value is not None}
    common = {"lr": lr, "weight_decay": weight_decay}
    if optimizer.startswith("timm:"):
        return build_timm_optimizer(groups, optimizer.removeprefix("timm:"), momentum=momentum, **common, **given)
    common["fused"] = groups[0]["params"][0].device.type in ("cpu", "cuda")
    if optimizer == "adamw":
        check_betas(optimizer, betas, 2)
        return torch.optim.AdamW(groups, **common, **given)
    return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov and momentum > 0, **common)


def build_timm_optimizer(
    groups: list[dict], name: str, *, betas: tuple[float, ...] | None = None, **hyper_parameters
) -> torch.optim.Optimizer:
    """Return an optimizer of timm, also with its prefix lookahead_. Raises ValueError as build_optimizer()."""
    timm = import_timm(f"--optimizer timm:{name}")
    known, base = timm.optim.list_optimizers(), name.removeprefix("lookahead_")
    if base not in known:
        raise ValueError(f"--optimizer timm:{name}: timm has no such optimizer{suggest_closest(base, known)}")
    info = timm.optim.get_optimizer_info(base)
    if info.second_order:
        raise ValueError(
            f"--optimizer timm:{name} needs second derivatives, which no training step here computes; take another one"
        )
    if info.has_betas:
        check_betas(f"timm:{name}", betas, info.num_betas)
    hyper_parameters |= {"betas": betas} if betas else {}
    try:
        return timm.optim.create_optimizer_v2(groups, opt=name, **hyper_parameters)
    except (AssertionError, ImportError, TypeError, ValueError) as error:  # such as a package that it needs
        raise ValueError(f"--optimizer timm:{name}: {get_first_error_line(error)}; take another optimizer") from error


def import_timm(purpose: str) -> ModuleType:
    """Return the package timm, with its subpackage optim. Raises ValueError without it. purpose: what needs it."""
    try:
        import timm.optim
    except ImportError as error:
        raise ValueError(f"{purpose} needs the package timm: pip install timm ({error})") from error
    return timm


def check_betas(name: str, betas: Sequence[float] | None, count: int) -> None:
    """Raise ValueError if another number of betas is given than the optimizer has."""
    if betas and len(betas) != count:
        raise ValueError(f"--betas {' '.join(f'{beta:g}' for beta in betas)}: --optimizer {name} takes {count} of them")


def find_undecayed(network: torch.nn.Module, no_decay_bn: bool, no_decay_1d: bool) -> list[str]:
    """Return the names of the parameters without weight decay: those of batch norm with no_decay_bn, and with
    no_decay_1d all of one dimension, biases and those that the network's no_weight_decay() or NO_DECAY_NAMES names.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    excluded = {id(parameter) for layer in norms for parameter in layer.parameters() if no_decay_bn}
    patterns = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    return [
        name
        for name, parameter in network.named_parameters()
        if id(parameter) in excluded
        or no_decay_1d
        and (
            parameter.ndim <= 1
            or name.split(".")[-1] in {"bias", *NO_DECAY_NAMES}
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        )
    ]


def group_parameters(
    network: torch.nn.Module, undecayed: list[str], *, lr: float, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Return the parameter groups of the trainable parameters: those with and those without weight decay; with
    layer_decay, two for each layer, with lr times layer_decay once for each layer behind it.

    undecayed: names of the parameters without weight decay. Raises ValueError if a network does not name its layers.
    """
    if layer_decay is None:
        trainable = {name: one for name, one in network.named_parameters() if one.requires_grad}
        decayed = [parameter for name, parameter in trainable.items() if name not in undecayed]
        others = [trainable[name] for name in undecayed if name in trainable]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]
    if not hasattr(network, "group_matcher"):
        raise ValueError(
            "--layer_decay needs a network that says which layer follows which, as those of timm do; leave it out or "
            "take --model timm:NAME"
        )
    groups = import_timm("--layer_decay").optim.param_groups_layer_decay(
        network,
        weight_decay,
        no_weight_decay_list=undecayed,
        weight_decay_exclude_1d=False,
        layer_decay=layer_decay,
    )
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
    return groups


def get_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate: the highest of all parameter groups, which is that of the last layers."""
    return max(group["lr"] for group in optimizer.param_groups)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore a state_dict() of the optimizer. Its tensors keep their type and take the memory format of their
    parameters.

    The fused step of SGD goes through parameter, gradient and momentum in the order of memory: after a change of
    --channels_last it would raise an error on CUDA and mix up the elements on a CPU. Gradients always have the format
    of their parameters. torch would convert tensors of half precision to the type of the parameter.
    """
    optimizer.load_state_dict(saved)
    optimizer = getattr(optimizer, "_base_optimizer", optimizer)  # within timm's Lookahead
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, values in saved["state"].items():
        parameter = parameters[position]
        state = optimizer.state[parameter]
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
