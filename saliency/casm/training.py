"""Training the decoder and its classifier side by side: the loss, the step, the epoch, and what a checkpoint keeps.

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

MAX_DECODER_GRAD_NORM = 10.0
PROGRESS = {"accuracy": "accuracy", "masked": "masked_accuracy", "mask": "avg_mask", "confused": "confused"}


class NonFiniteLoss(Exception):
    """A loss became NaN or infinite."""


@dataclass(frozen=True)
class StepConfig:
    """hp: chance that a past classifier classifies the masked images. lambda_r, adversarial: as in masker_loss.
    precision: autocast type, None for float32.
    """

    hp: float
    lambda_r: float
    adversarial: bool = False
    precision: torch.dtype | None = None


def masker_loss(
    clean_logits: torch.Tensor,
    masked_logits: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor,
    *,
    lambda_r: float,
    adversarial: bool = False,
) -> dict[str, torch.Tensor]:
    """The decoder's loss and its terms.

    clean_logits and masked_logits (B, K) of the images and of what the masks leave of them, labels (B,), masks (B, 1,
    H, W) in 0..1. An image classified correctly before but not after masking is confused, and earns lambda_r * (1 -
    area of its mask). The main term raises the entropy of the masked prediction where the clean one was correct;
    adversarial: it raises the masked cross-entropy instead.

    Returns total, area, main, masked_loss (the masked cross-entropy), each (), and correct, mistaken and confused, each
    (B,) bool.
    """
    correct = clean_logits.argmax(1) == labels
    mistaken = masked_logits.argmax(1) != labels
    confused = correct & mistaken
    areas = masks.flatten(1).mean(1)
    area = -lambda_r * (confused.to(areas.dtype) - areas).clamp_min(0).mean()
    masked_loss = F.cross_entropy(masked_logits, labels)
    if adversarial:
        main = -masked_loss
    else:
        logs = F.log_softmax(masked_logits, 1)
        main = (correct * (logs.exp() * logs).sum(1)).mean()
    return {
        "total": area + main,
        "area": area,
        "main": main,
        "masked_loss": masked_loss,
        "correct": correct,
        "mistaken": mistaken,
        "confused": confused,
    }


@dataclass
class CasmState:
    """Everything that a checkpoint must restore. past_classifier: where a snapshot of the pool is loaded to."""

    network: Casm
    past_classifier: nn.Module | None
    pool: ClassifierPool
    optimizer: torch.optim.Optimizer
    decoder_optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_classifier: bool

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def state(self) -> dict:
        """All but the pool, which is large and has a file of its own."""
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
    """Build the optimizers, and room for a past classifier where the pool is used."""
    device = next(network.parameters()).device
    network.classifier.requires_grad_(not fixed_classifier)
    past_classifier = None
    if hp and not fixed_classifier:
        past_classifier = copy.deepcopy(network.classifier).requires_grad_(False).eval()
    fused = device.type in ("cpu", "cuda")
    adam = torch.optim.Adam(network.decoder.parameters(), lr_casme, weight_decay=weight_decay, fused=fused)
    sgd = torch.optim.SGD(network.classifier.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused)
    return CasmState(
        network=network,
        past_classifier=past_classifier,
        pool=pool,
        optimizer=sgd,
        decoder_optimizer=adam,
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        train_classifier=not fixed_classifier,
    )


def decay_lr(base: float, epoch: int, lrde: int) -> float:
    """The learning rate of an epoch (from 0): divided by ten after every `lrde` epochs."""
    return base * 0.1 ** (epoch // lrde)


def set_learning_rates(state: CasmState, epoch: int, *, lr: float, lr_casme: float, lrde: int) -> None:
    """Set the rates of the classifier (lr) and of the decoder (lr_casme) for this epoch (from 0)."""
    for optimizer, base in ((state.optimizer, lr), (state.decoder_optimizer, lr_casme)):
        for group in optimizer.param_groups:
            group["lr"] = decay_lr(base, epoch, lrde)


def count_iterations(batches: int, pot: float) -> int:
    """Iterations of an epoch over a share `pot` of so many batches; one more than the share, as published."""
    return min(batches, int(batches * pot) + 1)


def train_step(
    state: CasmState, images: torch.Tensor, labels: torch.Tensor, config: StepConfig, *, iteration: int
) -> dict[str, torch.Tensor]:
    """One iteration (from 0, of its epoch) on images (B, 3, H, W) and labels (B,).

    The classifier learns from the images; the decoder learns to hide what a classifier needs, the current or a past
    one; the current one then learns from the masked images too. Returns what masker_loss does, with masks, clean_loss
    and the logits.
    """
    classifier, decoder = state.network.classifier, state.network.decoder
    with autocast(state.device, config.precision), torch.set_grad_enabled(state.train_classifier):
        logits, features = classifier.forward_features(images)
        clean_loss = F.cross_entropy(logits.float(), labels)
    if state.train_classifier:
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(clean_loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if config.hp > 0 and state.pool.is_due(iteration):
            state.pool.add(classifier)
    with autocast(state.device, config.precision):
        masks = decoder([maps.detach() for maps in features], images.shape[-2:])
        use_past = state.train_classifier and config.hp > 0 and float(torch.rand(())) <= config.hp
        if use_past:
            state.pool.load_random(state.past_classifier)
        masked_logits = (state.past_classifier if use_past else classifier)(images * (1 - masks)).float()
    weights = {"lambda_r": config.lambda_r, "adversarial": config.adversarial}
    loss = masker_loss(logits.detach().float(), masked_logits, labels, masks, **weights)
    update_weights(state, loss, masked_too=state.train_classifier and not use_past)
    loss |= {"masks": masks, "clean_loss": clean_loss, "logits": logits, "masked_logits": masked_logits}
    return {key: value.detach() for key, value in loss.items()}


def update_weights(state: CasmState, loss: dict[str, torch.Tensor], *, masked_too: bool) -> None:
    """Step the decoder by the total loss; masked_too: and the classifier by the masked cross-entropy."""
    decoder = state.network.decoder
    backward_into(state.scaler.scale(loss["total"]), decoder, retain_graph=masked_too)
    if masked_too:
        backward_into(state.scaler.scale(loss["masked_loss"]), state.network.classifier)
        state.scaler.step(state.optimizer)
    state.scaler.unscale_(state.decoder_optimizer)
    nn.utils.clip_grad_norm_(decoder.parameters(), MAX_DECODER_GRAD_NORM)
    state.scaler.step(state.decoder_optimizer)
    state.scaler.update()


def backward_into(loss: torch.Tensor, module: nn.Module, *, retain_graph: bool = False) -> None:
    """Set the gradients of this module's parameters, and of nothing else."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


class CasmStats:
    """Sums over the images of an epoch, on the device until they are read."""

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
        """Percentages of images and mean losses; waits for the device. Raises NonFiniteLoss; UserError if empty."""
        if not self.images:
            raise UserError(
                "no batch of more than one image, which the last maps, of one place, need: raise --batch-size"
            )
        means = {key: float(value) / self.images for key, value in self.sums.items()}
        if not torch.tensor(list(means.values())).isfinite().all():
            raise NonFiniteLoss("a loss is not finite")
        return {
            "accuracy": 100 * means["correct"],
            "masked_accuracy": 100 - 100 * means["mistaken"],
            "confused": 100 * means["confused"],
            **{key: means[key] for key in self.AVERAGED},
            **self.statistics.means(),
        }


def train_one_epoch(
    state: CasmState,
    batches: DeviceLoader,
    config: StepConfig,
    *,
    epoch: int,
    iterations: int,
    log_every: int = 100,
    progress: Callable | None = None,
) -> dict[str, float]:
    """The first so many iterations of the epoch, each by train_step. Returns the means of CasmStats."""
    state.network.train()
    state.network.classifier.train(state.train_classifier)
    stats = CasmStats(state.device)
    for iteration, batch in enumerate(itertools.islice(batches.epoch(epoch), iterations)):
        if len(batch.labels) == 1 and not can_train_alone(state.network.classifier, batch.images):
            continue
        stats.add(train_step(state, batch.images, batch.labels, config, iteration=iteration))
        if (iteration + 1) % log_every == 0 or iteration + 1 == iterations:
            means = stats.means()
            if progress:
                progress(iteration + 1, **{name: means[key] for name, key in PROGRESS.items()})
        elif progress:
            progress(iteration + 1)
    return stats.means()


@torch.no_grad()
def can_train_alone(classifier: nn.Module, images: torch.Tensor) -> bool:
    """Whether one image can be trained on: batch norm needs more than one value per channel."""
    with in_mode(classifier, "eval"):
        return classifier.forward_features(images)[1][-1][0, 0].numel() > 1


@torch.no_grad()
def evaluate(
    network: Casm, batches: DeviceLoader, config: StepConfig, *, progress: Callable | None = None
) -> dict[str, float]:
    """The same means over all batches, with the current classifier and the network in evaluation mode."""
    network.eval()
    stats = CasmStats(batches.device)
    for step, batch in enumerate(batches.epoch()):
        with autocast(batches.device, config.precision):
            masks, logits = network(batch.images)
            masked_logits = network.classifier(batch.images * (1 - masks)).float()
        loss = masker_loss(
            logits, masked_logits, batch.labels, masks, lambda_r=config.lambda_r, adversarial=config.adversarial
        )
        stats.add(loss | {"masks": masks, "clean_loss": F.cross_entropy(logits, batch.labels)})
        if progress:
            progress(step + 1)
    return stats.means()
