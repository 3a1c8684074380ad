"""Batches that are too small for batch norm, found before the first step."""

from collections.abc import Sequence

import torch
from torch import nn

from engine.errors import UserError
from engine.runtime.distributed import world_size
from engine.runtime.text import format_count
from engine.training.freezing import FrozenStatistics

SMALL_BATCH = 2  # images of a last batch whose statistics say little about the others


def check_small_batches(
    network: nn.Module,
    loaders: Sequence[tuple],
    *,
    sync_bn: bool = False,
    skips_single: bool = False,
    remedy: str = "--drop_last leaves it out",
) -> list[str]:
    """Return a note if the last batch of an epoch is so small that it spoils the running statistics of batch norm.

    loaders: each loader with the side of its images in pixels, or None if even one image gives large feature maps.
    sync_bn: the statistics are those of all processes. skips_single: the training loop leaves out a batch that batch
    norm cannot be trained on: one value per channel. Otherwise torch refuses it, and so UserError is raised. remedy:
    how to avoid a small last batch.
    """
    notes, shared = [], world_size() if sync_bn else 1
    for loader, side in loaders:
        full, last = (count * shared for count in loader.count_part_images())
        if min(full, last) > SMALL_BATCH or not list_batch_norms(network):
            continue
        every, part = full == last, " in each process" if loader.shard.world_size > shared else ""
        part += " in each part of --accumulate" if loader.shard.micro_batches > 1 else ""
        text = f"{'every' if every else 'the last'} batch of an epoch has {format_count(last, 'image')}{part} "
        text += f"({format_count(len(loader.image_set), 'training image')}, --batch_size {loader.batch_size})"
        if min(full, last) == 1 and side and has_single_values(network, side):
            reason = f"{text}, but batch norm on feature maps of 1x1 pixel needs 2"
            if every or not skips_single:
                raise UserError(f"{reason}\n{'use a larger --batch_size' if every else remedy}")
            notes.append(f"{reason}: it is left out")
        elif not every:
            notes.append(
                f"{text}, too few for batch norm: the running statistics, with which images are evaluated, become "
                f"unreliable; {remedy}"
            )
    return list(dict.fromkeys(notes))


def list_batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return the batch norm layers that use the statistics of the batch in training."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return [layer for layer in layers if not isinstance(layer, FrozenStatistics)]


@torch.no_grad()
def has_single_values(network: nn.Module, side: int) -> bool:
    """Return whether a batch norm layer gets one value per channel of one image of side x side pixels."""
    counts: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0][0, 0].numel()))
        for layer in list_batch_norms(network)
    ]
    training = network.training
    try:
        network.eval()(torch.zeros(1, 3, side, side, device=next(network.parameters()).device))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return min(counts) == 1
