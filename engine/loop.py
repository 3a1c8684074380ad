"""The training step that every method shares, and evaluation."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from engine.batches import Batches
from engine.device import exact_float32
from engine.distributed import every, gather, ranks, total
from engine.loss import cross_entropy, smooth
from engine.metrics import topk_correct

NEVER = 2**62  # the step of a loss that was always finite


class NotFinite(Exception):
    """The loss left the numbers at `step`, which was seen at step `now`. index: the images of that batch. what, and
    evidence to be kept: where more is known.
    """

    def __init__(self, step: int, index: torch.Tensor, now: int, what: str = "the loss", evidence: dict | None = None):
        seen = f" (seen at step {now})" if evidence is None else ""
        super().__init__(f"{what} is not finite at step {step}{seen}")
        self.step, self.index, self.now, self.evidence = step, index, now, evidence or {}


class Stopped(Exception):
    """Training was asked to stop inside an epoch, where `tally` stands."""

    def __init__(self, tally: "Tally"):
        super().__init__(f"stopped after {tally.step} steps of the epoch")
        self.tally = tally


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


@dataclass
class Tally:
    """What an epoch adds up, in this process: sums over its images so far, on the device until they are asked for."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: int = 0
    step: int = 0  # optimizer steps done

    def add(self, count: int, **sums: torch.Tensor) -> None:
        """What `count` more images bring."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.detach().float()
        self.seen += count

    def state(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "seen": self.seen, "step": self.step}

    @classmethod
    def load(cls, state: dict, device: torch.device) -> "Tally":
        sums = {name: value.to(device) for name, value in state["sums"].items()}
        return cls(sums, state["seen"], state["step"])

    def means(self) -> dict[str, float]:
        """Of all processes, and how many `images` they are of; waits for the device."""
        seen = next(iter(self.sums.values())).new_tensor(self.seen)
        *sums, seen = total(torch.stack([*self.sums.values(), seen]).double()).tolist()
        return {**{name: value / seen for name, value in zip(self.sums, sums, strict=True)}, "images": int(seen)}


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
    network: nn.Module | None = None,
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
    tally: Tally | None = None,
    stop: Callable[[], bool] | None = None,
    steps_before: int | None = None,
) -> dict[str, float]:
    """One pass over the training part. Returns mean loss and accuracy, the latter as the mean label weight of the
    predicted class.

    A step may take several batches (`batches.pieces`), whose gradients are averaged. network: `model` as wrapped for
    several processes, which averages gradients over them; None: `model` itself. tally: where a stopped epoch goes on.

    Losses stay on the device and are looked at every `look_every` steps. progress(step) is called after every step, and
    with loss, accuracy, lr and images_per_second after a look. Raises NotFinite at the look after a loss that is none,
    and Stopped before a step where stop() says so. steps_before: those of earlier epochs.
    """
    device, network = batches.device, network or model
    watch, tally = watch or Stopwatch(device), tally or Tally()
    sources = each_source(source)
    learning = [one for one in sources if getattr(one, "learns", False)]
    source = timed(source, watch)
    model.train()
    first_bad = torch.full((), NEVER, device=device, dtype=torch.long)
    indices = {}
    steps = min(len(batches), max_steps or len(batches))

    def look(now: int) -> None:
        bad = min(every(int(first_bad)))
        if bad < NEVER:
            before = epoch * len(batches) if steps_before is None else steps_before
            raise NotFinite(before + bad, images_of(indices[bad]), before + now)

    watch.start()
    begin, seen_before = time.perf_counter(), tally.seen
    stream = batches.epoch(epoch, start=tally.step)
    for step in range(tally.step, steps):
        if stop and stop():
            look(step - 1)
            raise Stopped(tally)
        optimizer.zero_grad(set_to_none=True)
        indices[step] = []
        for piece in range(batches.pieces):
            batch = next(stream)
            targets = F.one_hot(batch.labels, num_classes).float()
            watch.lap("data")
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
            last = piece + 1 == batches.pieces
            with mixer.during(model), nullcontext() if last or network is model else network.no_sync():
                with autocast(device, precision):
                    logits = network(mixed)
                value = loss_fn(logits, smooth(soft, label_smoothing))
                loss = mixer.mixed_weight * value
                (scaler.scale(loss) if scaler else loss).backward()
            watch.lap("network")
            mixer.after_backward(mixed.grad if mixer.wants_mixed_grad else None)
            watch.lap("mixing")
            for one in learning:
                one.after_backward(batch.images.grad, coverage)
                watch.lap("saliency")
            with torch.no_grad():
                value = value.detach()  # without the weight, so that methods can be compared
                hits = soft.gather(1, logits.argmax(1, keepdim=True)).sum()
                tally.add(len(soft), loss=value * len(soft), hits=hits)
                first_bad = torch.where((first_bad == NEVER) & ~value.isfinite(), step, first_bad)
            indices[step].append(batch.index)
        update(model, optimizer, scaler, clip_grad, pieces=batches.pieces)
        if scheduler:
            scheduler.step()
        if ema:
            ema.update(model)
        tally.step = step + 1
        watch.lap("network")
        if (step + 1) % look_every == 0 or step + 1 == steps:
            look(step)
            indices.clear()
            means = tally.means()
            if progress:
                rate = (tally.seen - seen_before) * ranks() / (time.perf_counter() - begin)
                lr = optimizer.param_groups[0]["lr"]
                progress(step + 1, loss=means["loss"], accuracy=100 * means["hits"], lr=lr, images_per_second=rate)
        elif progress:
            progress(step + 1)
    means = tally.means()
    return {"train_loss": means["loss"], "train_acc": 100 * means["hits"], "images": means["images"]}


def update(model: nn.Module, optimizer, scaler, clip_grad: float, pieces: int) -> None:
    """The optimizer step on the gradients in .grad, which are a sum over `pieces` batches."""
    if pieces > 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(pieces)
    if clip_grad:
        if scaler:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def images_of(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The positions of the images of a step, over all its batches and all processes."""
    return torch.cat([index for of_one in every(pieces) for index in of_one])


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
    model: nn.Module,
    batches: Batches,
    *,
    precision: torch.dtype | None = None,
    progress: Callable | None = None,
    alter: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) float32 and labels (N,) of a whole part, on the host, network in evaluation mode (put back
    afterwards). Of several processes each takes its images, and only the first one gets the whole; the others get
    nothing (0 rows). alter(images, labels, index): what the network sees in place of the images.
    """
    training = model.training
    model.eval()
    logits, labels, places = [], [], []
    try:
        for step, batch in enumerate(batches.epoch()):
            with exact_float32():
                images = alter(batch.images, batch.labels, batch.index) if alter else batch.images
                with autocast(batches.device, precision):
                    logits.append(model(images).float())
            labels.append(batch.labels)
            places.append(batch.index)
            if progress:
                progress(step + 1)
    finally:
        model.train(training)
    own = [torch.cat(parts).cpu() for parts in (logits, labels, places)] if places else None
    parts = [part for part in gather(own) or [] if part]
    if not parts:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    logits, labels, places = map(torch.cat, zip(*parts, strict=True))
    order = places.argsort()
    return logits[order], labels[order]


def scores(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Cross-entropy and top-k accuracies in percent; k above the number of classes is left out."""
    ks = tuple(k for k in ks if k <= logits.shape[1])
    correct = topk_correct(logits, labels, ks).double() * (100 / len(labels)) if ks else []
    loss = cross_entropy(logits, F.one_hot(labels, logits.shape[1]).float())
    return {"loss": float(loss), **{f"top{k}": float(value) for k, value in zip(ks, correct, strict=True)}}
