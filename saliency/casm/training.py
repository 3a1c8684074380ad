"""Training the decoder and its classifier side by side: the step, the epoch, and what a checkpoint keeps of them.

Zolna, Geras and Cho, arXiv 1805.08249, Alg. 1, in the form of their public program. One order differs from it: there
the classifier steps between the masked forward pass and the decoder's backward pass, which current torch refuses, since
the weights of that pass are gone; here both gradients are taken first. A past classifier and a frozen one get no weight
gradients, nor does the current one from the decoder's loss, which saves a third of a plain training step.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import DeviceLoader
from engine.errors import UserError
from engine.runtime.device import autocast, get_rng_state, set_rng_state
from saliency.casm.metrics import MaskStatistics
from saliency.casm.network import Casm
from saliency.casm.pool import ClassifierPool
from saliency.gradient import in_mode


def masker_loss(
    clean_logits: torch.Tensor,
    masked_logits: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor,
    *,
    lambda_r: float,
    adversarial: bool = False,
) -> dict[str, torch.Tensor]:
    """The decoder's loss and what it is made of.

    clean_logits and masked_logits (B, K) of the images and of what the masks leave of them, labels (B,), masks (B, 1,
    H, W) in 0..1. An image that was right and is now wrong is confused, and earns lambda_r * (1 - area of its mask).
    The main term is the entropy of the masked prediction where the clean one was right, to be raised; adversarial: the
    masked cross-entropy instead.

    Returns total, area, main, masked_loss (the masked cross-entropy), each (), and correct, mistaken and confused, each
    (B,) bool.
    """
    correct = clean_logits.argmax(1) == labels
    mistaken = masked_logits.argmax(1) != labels
    confused = correct & mistaken
    shares = masks.flatten(1).mean(1)
    area = -lambda_r * (confused.to(shares.dtype) - shares).clamp_min(0).mean()
    masked_loss = F.cross_entropy(masked_logits, labels)
    if adversarial:
        main = -masked_loss
    else:
        logs = F.log_softmax(masked_logits, 1)
        main = (correct * (logs.exp() * logs).sum(1)).mean()
    return {
        **{"total": area + main, "area": area, "main": main, "masked_loss": masked_loss},
        **{"correct": correct, "mistaken": mistaken, "confused": confused},
    }


CLIP = 10.0  # of the norm of the decoder's gradient


class NonFiniteLoss(Exception):
    """A loss left the numbers."""


@dataclass
class CasmState:
    """Everything whose state decides how training goes on. judge: room for a past classifier, where one judges."""

    network: Casm
    judge: nn.Module | None
    pool: ClassifierPool
    optimizer: torch.optim.Optimizer
    decoder_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    learns: bool  # whether the classifier does

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def state(self) -> dict:
        """All but the pool, which is large and lies in a file of its own."""
        return {
            "model": self.network.classifier.state_dict(),
            "decoder": self.network.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "decoder_optimizer": self.decoder_optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": get_rng_state(self.device),
        }

    def load(self, saved: dict, pool: list) -> None:
        self.network.classifier.load_state_dict(saved["model"])
        self.network.decoder.load_state_dict(saved["decoder"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.decoder_optimizer.load_state_dict(saved["decoder_optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.pool.load_state_dict(pool)
        set_rng_state(saved["rng"], self.device)


def build_casm_state(
    network: Casm,
    pool: ClassifierPool,
    *,
    fixed_classifier: bool,
    hp: float,
    lr: float,
    lr_casme: float,
    momentum: float,
    weight_decay: float,
    precision: torch.dtype | None,
) -> CasmState:
    """The optimizers, and the judge where a past classifier judges now and then."""
    device = next(network.parameters()).device
    network.classifier.requires_grad_(not fixed_classifier)
    judge = None
    if hp and not fixed_classifier:
        judge = copy.deepcopy(network.classifier).requires_grad_(False).eval()
    fused = device.type in ("cpu", "cuda")
    return CasmState(
        network,
        judge,
        pool,
        torch.optim.SGD(network.classifier.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused),
        torch.optim.Adam(network.decoder.parameters(), lr_casme, weight_decay=weight_decay, fused=fused),
        torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        learns=not fixed_classifier,
    )


def decay_lr(base: float, epoch: int, lrde: int) -> float:
    """The learning rate of an epoch (from 0): a tenth after every `lrde` of them."""
    return base * 0.1 ** (epoch // lrde)


def count_iterations(batches: int, pot: float) -> int:
    """Iterations of an epoch over a share `pot` of so many batches; one more than the share, as published."""
    return min(batches, int(batches * pot) + 1)


def train_step(
    parts: CasmState,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    iteration: int,
    hp: float,
    lambda_r: float,
    adversarial: bool = False,
    precision: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """One iteration (from 0, of its epoch) on images (B, 3, H, W) and labels (B,): the classifier learns from the
    images, the decoder learns to hide what the judge needs, and where the current classifier was the judge, it learns
    to do without. Returns what masker_loss does, with masks, clean_loss, and the logits.
    """
    classifier, decoder = parts.network.classifier, parts.network.decoder
    with autocast(parts.device, precision), torch.set_grad_enabled(parts.learns):
        logits, features = classifier.forward_features(images)
        clean_loss = F.cross_entropy(logits.float(), labels)
    if parts.learns:
        parts.optimizer.zero_grad(set_to_none=True)
        parts.scaler.scale(clean_loss).backward()
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        if hp > 0 and parts.pool.due(iteration):
            parts.pool.add(classifier)
    with autocast(parts.device, precision):
        masks = decoder([maps.detach() for maps in features], images.shape[-2:])
        follows = parts.learns and (hp == 0 or float(torch.rand(())) > hp)
        if parts.learns and not follows:
            parts.pool.load_random(parts.judge)
        judge = classifier if follows or not parts.learns else parts.judge
        masked_logits = judge(images * (1 - masks)).float()
    loss = masker_loss(
        logits.detach().float(), masked_logits, labels, masks, lambda_r=lambda_r, adversarial=adversarial
    )
    backward_into(parts.scaler.scale(loss["total"]), decoder, keep=follows)
    if follows:
        backward_into(parts.scaler.scale(loss["masked_loss"]), classifier)
        parts.scaler.step(parts.optimizer)
    parts.scaler.unscale_(parts.decoder_optimizer)
    nn.utils.clip_grad_norm_(decoder.parameters(), CLIP)
    parts.scaler.step(parts.decoder_optimizer)
    parts.scaler.update()
    loss |= {"masks": masks, "clean_loss": clean_loss, "logits": logits, "masked_logits": masked_logits}
    return {key: value.detach() for key, value in loss.items()}


def backward_into(loss: torch.Tensor, module: nn.Module, keep: bool = False) -> None:
    """Set the gradients of this module's parameters, and of nothing else. keep: the graph is needed again."""
    parameters = list(module.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=keep), strict=True):
        parameter.grad = gradient


class CasmStats:
    """What an epoch adds up, on the device until it is asked for."""

    COUNTED = ("correct", "mistaken", "confused")
    AVERAGED = ("clean_loss", "masked_loss", "total")

    def __init__(self, device: torch.device):
        self.statistics, self.images = MaskStatistics(), 0
        self.sums = dict.fromkeys((*self.COUNTED, *self.AVERAGED), torch.zeros((), device=device))

    def add(self, step: dict[str, torch.Tensor]) -> None:
        count = len(step["correct"])
        self.images += count
        self.statistics.add(step["masks"][:, 0])
        for key in self.COUNTED:
            self.sums[key] = self.sums[key] + step[key].sum()
        for key in self.AVERAGED:
            self.sums[key] = self.sums[key] + count * step[key]

    def means(self) -> dict[str, float]:
        """Percentages of images and mean losses; waits for the device. Raises NotFinite; UserError for no images."""
        if not self.images:
            raise UserError(
                "no batch of more than one image, which the last maps, of one place, need: raise --batch-size"
            )
        means = {key: float(value) / self.images for key, value in self.sums.items()}
        if not torch.tensor(list(means.values())).isfinite().all():
            raise NonFiniteLoss("a loss is not finite")
        return {
            **{"accuracy": 100 * means["correct"], "masked_accuracy": 100 - 100 * means["mistaken"]},
            **{"confused": 100 * means["confused"], **{key: means[key] for key in self.AVERAGED}},
            **self.statistics.means(),
        }


def train_one_epoch(
    parts: CasmState,
    batches: DeviceLoader,
    *,
    epoch: int,
    pot: float,
    lr: float,
    lr_casme: float,
    lrde: int,
    look_every: int = 100,
    progress: Callable | None = None,
    **step,
) -> dict[str, float]:
    """The first iterations_of(len(batches), pot) batches of the epoch, by train_step, which takes `step`. The means."""
    for optimizer, base in ((parts.optimizer, lr), (parts.decoder_optimizer, lr_casme)):
        for group in optimizer.param_groups:
            group["lr"] = decay_lr(base, epoch, lrde)
    parts.network.train()
    parts.network.classifier.train(parts.learns)
    sums, count = CasmStats(parts.device), count_iterations(len(batches), pot)
    for iteration, batch in enumerate(itertools.islice(batches.epoch(epoch), count)):
        if len(batch.labels) == 1 and not can_train_alone(parts.network.classifier, batch.images):
            continue
        sums.add(train_step(parts, batch.images, batch.labels, iteration=iteration, **step))
        if (iteration + 1) % look_every == 0 or iteration + 1 == count:
            means = sums.means()
            if progress:
                shown = {"accuracy": means["accuracy"], "masked": means["masked_accuracy"], "mask": means["avg_mask"]}
                progress(iteration + 1, **shown, confused=means["confused"])
        elif progress:
            progress(iteration + 1)
    return sums.means()


@torch.no_grad()
def can_train_alone(classifier: nn.Module, images: torch.Tensor) -> bool:
    """Whether one image can be trained on: batch norm needs more than one number a channel."""
    with in_mode(classifier, "eval"):
        return classifier.forward_features(images)[1][-1][0, 0].numel() > 1


@torch.no_grad()
def evaluate(
    network: Casm,
    batches: DeviceLoader,
    *,
    lambda_r: float,
    adversarial: bool = False,
    precision: torch.dtype | None = None,
    progress: Callable | None = None,
) -> dict[str, float]:
    """The same means over all batches, the classifier itself being the judge; the network in evaluation mode."""
    network.eval()
    sums = CasmStats(batches.device)
    for step, batch in enumerate(batches.epoch()):
        with autocast(batches.device, precision):
            masks, logits = network(batch.images)
            masked_logits = network.classifier(batch.images * (1 - masks)).float()
        loss = masker_loss(logits, masked_logits, batch.labels, masks, lambda_r=lambda_r, adversarial=adversarial)
        sums.add(loss | {"masks": masks, "clean_loss": F.cross_entropy(logits, batch.labels)})
        if progress:
            progress(step + 1)
    return sums.means()
