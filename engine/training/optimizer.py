"""The optimizer."""

import torch


def build_optimizer(
    network: torch.nn.Module,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    no_decay_bn: bool = False,
) -> torch.optim.SGD:
    """SGD on the parameters that learn. no_decay_bn: without weight decay on those of batch norm."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        split_norm_parameters(network) if no_decay_bn else learning,
        lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        weight_decay=weight_decay,
        fused=learning[0].device.type in ("cpu", "cuda"),
    )


def split_norm_parameters(network: torch.nn.Module) -> list[dict]:
    """Two groups of parameters: those of batch norm, without weight decay, and all others."""
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    spared = {id(parameter): parameter for layer in norms for parameter in layer.parameters()}
    others = [parameter for parameter in network.parameters() if id(parameter) not in spared]
    return [{"params": others}, {"params": list(spared.values()), "weight_decay": 0.0}]
