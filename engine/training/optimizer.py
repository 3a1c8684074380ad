"""Build the optimizer and restore its state."""

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
    """Return SGD for the trainable parameters. no_decay_bn: no weight decay on the parameters of batch norm.

    The keyword-only parameters are the options of the same names.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(
        split_norm_parameters(network) if no_decay_bn else trainable,
        lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        weight_decay=weight_decay,
        fused=trainable[0].device.type in ("cpu", "cuda"),
    )


def split_norm_parameters(network: torch.nn.Module) -> list[dict]:
    """Return two parameter groups: all parameters but those of batch norm, and those, without weight decay."""
    norms = [layer for layer in network.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    norm_parameters = {id(parameter): parameter for layer in norms for parameter in layer.parameters()}
    others = [parameter for parameter in network.parameters() if id(parameter) not in norm_parameters]
    return [{"params": others}, {"params": list(norm_parameters.values()), "weight_decay": 0.0}]


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Restore a state_dict() of the optimizer. Its tensors take the memory format of their parameters.

    The fused step of SGD goes through parameter, gradient and momentum in the order of memory: after a change of
    --channels_last it would raise an error on CUDA and mix up the elements on a CPU. Gradients always have the format
    of their parameters.
    """
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
