"""Train a mask decoder together with its classifier: loss, training step, epoch, evaluation and training state.

Zolna, Geras and Cho, arXiv 1805.08249, Alg. 1, as in the authors' code, with one change of order. There the classifier
is updated between the masked forward pass and the backward pass of the decoder. Current PyTorch refuses that, because
the backward pass needs the old weights, so here both gradients are computed before either update. No weight gradients
are computed for a past or frozen classifier, nor for the current one from the decoder's loss, which saves a third of a
plain training step.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from engine.data.loader import DeviceLoader
from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint
from engine.runtime.device import autocast, get_rng_state, set_rng_state
from engine.training.loop import LossCheck
from engine.training.monitor import EpochMonitor
from engine.training.running_sums import EpochStats, NonFiniteLoss
from engine.training.state import TrainingState
from models.stages import run_stages
from saliency.casm.metrics import MaskStatistics
from saliency.casm.network import CasmNetwork
from saliency.casm.pool import ClassifierPool
from saliency.gradient import in_mode

MAX_DECODER_GRAD_NORM = 10.0  # as published
LOSSES = ("clean_loss", "masked_loss", "total")
PROGRESS = {"acc": "accuracy", "masked-out acc": "masked_accuracy", "area": "avg_mask", "confused": "confused"}


@dataclass(frozen=True)
class StepConfig:
    """Options of a training step.

    hp: probability that a past classifier classifies the masked images. lambda_r, adversarial: see masker_loss().
    precision: autocast dtype; None for float32.
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
    """Return the loss of the decoder and its terms.

    clean_logits, masked_logits (B, K): of the images and of the masked-out images; labels (B,); masks (B, 1, H, W) in
    0..1. An image is confused if it is classified correctly before masking but not after it. The area term rewards each
    confused image with lambda_r * (1 - area of its mask). The main term maximizes the entropy of the masked prediction
    where the clean one is correct; adversarial: it maximizes the masked cross-entropy instead.

    Keys: total, area, main and masked_loss (the masked cross-entropy), scalars; correct, mistaken and confused, (B,)
    bool.
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
        log_probs = F.log_softmax(masked_logits, 1)
        main = (correct * (log_probs.exp() * log_probs).sum(1)).mean()
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
class CasmStats(EpochStats):
    """Sums over the images of an epoch, kept on the device until they are read."""

    masks: MaskStatistics = field(default_factory=MaskStatistics)

    def add_step(self, step: dict[str, torch.Tensor]) -> None:
        """Add the results of train_step()."""
        count = len(step["correct"])
        self.masks.add(step["masks"][:, 0])
        counted = {key: step[key].sum() for key in ("correct", "mistaken", "confused")}
        self.add(count, **counted, **{key: count * step[key] for key in LOSSES})

    def state_dict(self) -> dict:
        return super().state_dict() | {"masks": self.masks.state_dict()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        super().load_state_dict(state, device)
        self.masks.load_state_dict(state["masks"], device)

    def means(self) -> dict[str, float]:
        """Return accuracies in percent, mean losses, mask statistics and the number of images. Waits for the device.

        Raises UserError if there were no images.
        """
        if not self.seen:
            raise UserError(
                "every batch holds a single image, but batch norm on the last feature maps, of 1x1 pixel, needs more\n"
                "raise --batch-size"
            )
        means = super().means()
        return {
            "accuracy": 100 * means["correct"],
            "masked_accuracy": 100 - 100 * means["mistaken"],
            "confused": 100 * means["confused"],
            **{key: means[key] for key in LOSSES},
            **self.masks.means(),
            "images": means["images"],
        }


@dataclass(kw_only=True)
class CasmState(TrainingState):
    """Everything that a checkpoint restores.

    model: classifier and decoder. optimizer: that of the classifier. past_classifier: the network that snapshots of the
    pool are loaded into.
    """

    model: CasmNetwork
    decoder_optimizer: torch.optim.Optimizer
    pool: ClassifierPool
    past_classifier: nn.Module | None
    train_classifier: bool

    @property
    def stateful(self) -> dict:
        """Objects with a state dict, by their checkpoint keys. CasmFolder.save() puts the pool in its own file."""
        optimizers = {"optimizer": self.optimizer, "decoder_optimizer": self.decoder_optimizer, "scaler": self.scaler}
        return {"model": self.model.classifier, "decoder": self.model.decoder, **optimizers, "pool": self.pool}

    def state_dict(self, stats: CasmStats | None = None) -> dict:
        inside = [{"tally": stats.state_dict()}] if stats else None
        states = {name: part.state_dict() for name, part in self.stateful.items()}
        return {**states, "rng": [get_rng_state(self.device)], "inside": inside}

    def load_state_dict(self, saved: Checkpoint) -> CasmStats | None:
        for name, part in self.stateful.items():
            part.load_state_dict(saved[name])
        set_rng_state(saved["rng"][0], self.device)
        stats = CasmStats() if saved["inside"] else None
        if stats:
            stats.load_state_dict(saved["inside"][0]["tally"], self.device)
        return stats


def build_casm_state(
    network: CasmNetwork,
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
    """Return the training state: both optimizers, and a network for past classifiers if the pool is used."""
    device = next(network.parameters()).device
    network.classifier.requires_grad_(not fixed_classifier)
    past_classifier = None
    if hp and not fixed_classifier:
        past_classifier = copy.deepcopy(network.classifier).requires_grad_(False).eval()
    fused = device.type in ("cpu", "cuda")
    adam = torch.optim.Adam(network.decoder.parameters(), lr_casme, weight_decay=weight_decay, fused=fused)
    sgd = torch.optim.SGD(network.classifier.parameters(), lr, momentum, weight_decay=weight_decay, fused=fused)
    return CasmState(
        model=network,
        past_classifier=past_classifier,
        pool=pool,
        optimizer=sgd,
        decoder_optimizer=adam,
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        train_classifier=not fixed_classifier,
    )


def decay_lr(base: float, epoch: int, lrde: int) -> float:
    """Return the learning rate of an epoch (counted from 0): `base` divided by ten after every `lrde` epochs."""
    return base * 0.1 ** (epoch // lrde)


def set_learning_rates(state: CasmState, epoch: int, *, lr: float, lr_casme: float, lrde: int) -> None:
    """Set the learning rates of the classifier (lr) and the decoder (lr_casme) for an epoch (counted from 0)."""
    for optimizer, base in ((state.optimizer, lr), (state.decoder_optimizer, lr_casme)):
        for group in optimizer.param_groups:
            group["lr"] = decay_lr(base, epoch, lrde)


def count_iterations(batches: int, pot: float) -> int:
    """Return the iterations of an epoch over a fraction `pot` of the batches; one more than it, as published."""
    return min(batches, int(batches * pot) + 1)


def train_step(
    state: CasmState, images: torch.Tensor, labels: torch.Tensor, config: StepConfig, *, iteration: int
) -> dict[str, torch.Tensor]:
    """Run one iteration on images (B, 3, H, W) and labels (B,). iteration: counted from 0 in each epoch.

    The classifier is updated on the clean images, unless it is fixed. The decoder is updated to hide what the current
    or a past classifier needs. In the first case the current classifier is also updated on the masked-out images.
    Returns the results of masker_loss(), with masks, clean_loss, logits and masked_logits.
    """
    classifier, decoder = state.model.classifier, state.model.decoder
    # ---- Clean images ----
    with autocast(state.device, config.precision), torch.set_grad_enabled(state.train_classifier):
        logits, features = run_stages(classifier, images)
        clean_loss = F.cross_entropy(logits.float(), labels)
    if state.train_classifier:
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(clean_loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if config.hp > 0 and state.pool.is_due(iteration):
            state.pool.add(classifier)
    # ---- Masked-out images ----
    with autocast(state.device, config.precision):
        masks = decoder([maps.detach() for maps in features], images.shape[-2:])
        use_past = state.train_classifier and config.hp > 0 and float(torch.rand(())) <= config.hp
        if use_past:
            state.pool.load_random(state.past_classifier)
        masked_logits = (state.past_classifier if use_past else classifier)(images * (1 - masks)).float()
    form = {"lambda_r": config.lambda_r, "adversarial": config.adversarial}
    loss = masker_loss(logits.detach().float(), masked_logits, labels, masks, **form)
    update_weights(state, loss, update_classifier=state.train_classifier and not use_past)
    loss |= {"masks": masks, "clean_loss": clean_loss, "logits": logits, "masked_logits": masked_logits}
    return {key: value.detach() for key, value in loss.items()}


def update_weights(state: CasmState, loss: dict[str, torch.Tensor], *, update_classifier: bool) -> None:
    """Update the decoder by the total loss and, with update_classifier, the classifier by the masked cross-entropy."""
    decoder = state.model.decoder
    assign_gradients(state.scaler.scale(loss["total"]), decoder, retain_graph=update_classifier)
    if update_classifier:
        assign_gradients(state.scaler.scale(loss["masked_loss"]), state.model.classifier)
        state.scaler.step(state.optimizer)
    state.scaler.unscale_(state.decoder_optimizer)
    nn.utils.clip_grad_norm_(decoder.parameters(), MAX_DECODER_GRAD_NORM)
    state.scaler.step(state.decoder_optimizer)
    state.scaler.update()


def assign_gradients(loss: torch.Tensor, module: nn.Module, *, retain_graph: bool = False) -> None:
    """Compute the gradients of the loss for the parameters of this module only, and assign them to .grad."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def train_one_epoch(
    state: CasmState,
    loader: DeviceLoader,
    config: StepConfig,
    *,
    epoch: int,
    iterations: int,
    monitor: EpochMonitor | None = None,
) -> dict[str, float]:
    """Train on the first `iterations` batches of an epoch. Return the means of CasmStats.

    The losses stay on the device and are checked every `monitor.log_every` iterations. Raises NonFiniteLoss at the
    check that finds a NaN or infinite loss, and TrainingInterrupted before an iteration if a stop was requested.
    """
    monitor = monitor or EpochMonitor(state.device, CasmStats())
    stats, losses = monitor.stats, LossCheck(state.device, monitor.first_step or 0)

    def means() -> dict[str, float]:
        losses.check(stats.step - 1)
        mean = stats.means()
        return {name: mean[key] for name, key in PROGRESS.items()}

    state.model.train()
    state.model.classifier.train(state.train_classifier)
    monitor.start()
    batches = loader.epoch(epoch, start=stats.step)
    for iteration in range(stats.step, iterations):
        monitor.raise_if_stopped(check=lambda: losses.check(stats.step - 1))
        batch = next(batches)
        if len(batch.labels) > 1 or can_train_on_one_image(state.model.classifier, batch.images):
            step = train_step(state, batch.images, batch.labels, config, iteration=iteration)
            stats.add_step(step)
            losses.add(iteration, sum(step[key] for key in LOSSES), batch.index)
        monitor.end_step(iterations, state.optimizer, means)
    return stats.means()


@torch.no_grad()
def can_train_on_one_image(classifier: nn.Module, images: torch.Tensor) -> bool:
    """Return whether a batch of one image can be trained on: batch norm needs more than one value per channel."""
    with in_mode(classifier, "eval"):
        return run_stages(classifier, images)[1][-1][0, 0].numel() > 1


@torch.no_grad()
def evaluate(
    network: CasmNetwork,
    loader: DeviceLoader,
    config: StepConfig,
    *,
    step: int = 0,
    progress: Callable | None = None,
) -> dict[str, float]:
    """Return the means of CasmStats over all batches, with the current classifier and in evaluation mode.

    step: of the run so far. Raises NonFiniteLoss if a loss is NaN or infinite.
    """
    network.eval()
    stats = CasmStats()
    for number, batch in enumerate(loader.epoch(), 1):
        with autocast(loader.device, config.precision):
            masks, logits = network(batch.images)
            masked_logits = network.classifier(batch.images * (1 - masks)).float()
        loss = masker_loss(
            logits, masked_logits, batch.labels, masks, lambda_r=config.lambda_r, adversarial=config.adversarial
        )
        stats.add_step(loss | {"masks": masks, "clean_loss": F.cross_entropy(logits, batch.labels)})
        if progress:
            progress(number)
    loader.count_unreadable()  # raises an error if no image is left
    means = stats.means()
    if bad := [key for key in LOSSES if not math.isfinite(means[key])]:
        raise NonFiniteLoss(step, torch.tensor([]), step, what=f"{bad[0]} of the evaluation images", evidence={})
    return means
