"""The training step that every method shares, and evaluation."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from engine.batches import Batches
from engine.device import exact_float32
from engine.loss import cross_entropy, smooth
from engine.metrics import topk_correct


class NotFinite(Exception):
    """The loss left the numbers at `step`, which was seen at step `now`. index: the images of that batch."""

    def __init__(self, step: int, index: torch.Tensor, now: int):
        super().__init__(f"the loss is not finite at step {step} (seen at step {now})")
        self.step, self.index, self.now = step, index, now


class Stopwatch:
    """Seconds by part of the step. On CUDA the parts are marked by events, which are read only when asked."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host: dict[str, float] = {}
        self.marks: list[tuple] = []
        self.last = None

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.last = self.now()

    def lap(self, name: str) -> None:
        """What came since the last start or lap belongs to `name`."""
        now = self.now()
        if self.device.type == "cuda":
            self.marks.append((name, self.last, now))
        else:
            self.host[name] = self.host.get(name, 0.0) + now - self.last
        self.last = now

    def seconds(self) -> dict[str, float]:
        """Totals by name; waits for the device."""
        if self.marks:
            torch.cuda.synchronize(self.device)
            for name, begin, end in self.marks:
                self.host[name] = self.host.get(name, 0.0) + begin.elapsed_time(end) / 1000
            self.marks.clear()
        return self.host


class Timed:
    """The same source; its time is taken out of the mixing and counted as `saliency`."""

    def __init__(self, source: Callable, watch: Stopwatch):
        self.source, self.watch = source, watch

    def __getattr__(self, name: str):
        found = getattr(self.source, name)
        return self.around(found) if name == "gradient" else found

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.around(self.source)(images, targets)

    def around(self, function: Callable) -> Callable:
        def call(*args):
            self.watch.lap("mixing")
            result = function(*args)
            self.watch.lap("saliency")
            return result

        return call


def each_source(source) -> list:
    """The sources behind what a mixer takes: none, one, or for a choice of methods a list, each but once."""
    sources = source if isinstance(source, list) else [source]
    return list({id(one): one for one in sources if one is not None}.values())


def timed(source, watch: Stopwatch):
    if isinstance(source, list):  # of a choice of methods
        return [timed(one, watch) for one in source]
    return source and Timed(source, watch)


def train_one_epoch(
    model: nn.Module,
    mixer,
    source: Callable | None,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable,
    *,
    epoch: int,
    num_classes: int,
    scheduler=None,
    scaler=None,
    precision: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float = 0.0,
    ema=None,
    watch: Stopwatch | None = None,
    max_steps: int | None = None,
    progress: Callable | None = None,
    look_every: int = 100,
) -> dict[str, float]:
    """One pass over the training part. Returns mean loss and accuracy, the latter as the mean label weight of the
    predicted class.

    Losses stay on the device and are looked at every `look_every` steps. progress(step) is called after every step, and
    with loss, accuracy, lr and images_per_second after a look. Raises NotFinite at the look after a loss that is none.
    """
    device = batches.device
    watch = watch or Stopwatch(device)
    sources = each_source(source)
    learning = [one for one in sources if getattr(one, "learns", False)]
    source = timed(source, watch)
    model.train()
    loss_sum, hit_sum, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    first_bad = torch.full((), -1, device=device, dtype=torch.long)
    indices = []
    steps = min(len(batches), max_steps or len(batches))
    watch.start()
    begin = time.perf_counter()
    for step, batch in enumerate(batches.epoch(epoch)):
        targets = F.one_hot(batch.labels, num_classes).float()
        watch.lap("data")
        optimizer.zero_grad(set_to_none=True)
        for one in learning:
            one.start_batch(batch)
            batch.images.requires_grad_()
        mixed, soft = mixer(batch.images, targets, source)
        if learning:
            coverage = covered(mixed, batch.images)
        if mixer.wants_mixed_grad:
            mixed = mixed.requires_grad_() if not mixed.requires_grad else mixed
            mixed.retain_grad()
        watch.lap("mixing")
        with mixer.during(model), autocast(device, precision):
            logits = model(mixed)
        value = loss_fn(logits, smooth(soft, label_smoothing))
        loss = mixer.mixed_weight * value
        (scaler.scale(loss) if scaler else loss).backward()
        if clip_grad:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if scheduler:
            scheduler.step()
        if ema:
            ema.update(model)
        watch.lap("network")
        mixer.after_backward(mixed.grad if mixer.wants_mixed_grad else None)
        watch.lap("mixing")
        for one in learning:
            one.after_backward(batch.images.grad, coverage)
            watch.lap("saliency")
        with torch.no_grad():
            value = value.detach()  # without the weight, so that methods can be compared
            loss_sum += value * len(soft)
            hit_sum += soft.gather(1, logits.argmax(1, keepdim=True)).sum()
            first_bad = torch.where((first_bad < 0) & ~value.isfinite(), step, first_bad)
        seen += len(soft)
        indices.append(batch.index)
        watch.lap("network")
        if (step + 1) % look_every == 0 or step + 1 == steps:
            bad = int(first_bad)
            if bad >= 0:
                raise NotFinite(epoch * len(batches) + bad, indices[bad], epoch * len(batches) + step)
            if progress:
                rate = seen / (time.perf_counter() - begin)
                lr = optimizer.param_groups[0]["lr"]
                progress(
                    step + 1,
                    loss=float(loss_sum) / seen,
                    accuracy=100 * float(hit_sum) / seen,
                    lr=lr,
                    images_per_second=rate,
                )
        elif progress:
            progress(step + 1)
        if step + 1 == steps:
            break
    return {"train_loss": float(loss_sum) / seen, "train_acc": 100 * float(hit_sum) / seen, "images": seen}


def covered(mixed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W): the weight with which each pixel of `images` went into the mixed ones, summed over them."""
    if mixed is images:
        return torch.ones_like(images[:, :1])
    (weight,) = torch.autograd.grad(mixed, images, torch.ones_like(mixed), retain_graph=True)
    return weight[:, :1]


def profile(steps: int, model: nn.Module, mixer, source: Callable | None, batches: Batches, optimizer, **step) -> dict:
    """Milliseconds a step of data, saliency, mixing and network, over `steps` steps after ten to warm up."""
    watch, step = Stopwatch(batches.device), {**step, "scheduler": None}  # a one-cycle schedule has an end
    train_one_epoch(model, mixer, source, batches, optimizer, epoch=0, max_steps=10, **step)
    done, epoch = 0, 1
    while done < steps:
        now = min(steps - done, len(batches))
        train_one_epoch(model, mixer, source, batches, optimizer, epoch=epoch, max_steps=now, watch=watch, **step)
        done, epoch = done + now, epoch + 1
    return {part: 1000 * watch.seconds().get(part, 0.0) / done for part in ("data", "saliency", "mixing", "network")}


def autocast(device: torch.device, precision: torch.dtype | None):
    return torch.autocast(device.type, precision) if precision else nullcontext()


@torch.no_grad()
def predict(
    model: nn.Module, batches: Batches, *, precision: torch.dtype | None = None, progress: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) float32 and labels (N,) of a whole part, on the host, network in evaluation mode (put back
    afterwards).
    """
    training = model.training
    model.eval()
    logits, labels = [], []
    try:
        for step, batch in enumerate(batches.epoch()):
            with exact_float32(), autocast(batches.device, precision):
                logits.append(model(batch.images).float())
            labels.append(batch.labels)
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()


def scores(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Cross-entropy and top-k accuracies in percent; k above the number of classes is left out."""
    ks = tuple(k for k in ks if k <= logits.shape[1])
    correct = topk_correct(logits, labels, ks).double() * (100 / len(labels)) if ks else []
    loss = cross_entropy(logits, F.one_hot(labels, logits.shape[1]).float())
    return {"loss": float(loss), **{f"top{k}": float(value) for k, value in zip(ks, correct, strict=True)}}
