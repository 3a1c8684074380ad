"""What a training run carries from epoch to epoch: built, saved, and taken up again exactly where it stopped."""

import copy
import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.checkpoint import FORMAT, save_checkpoint, versions
from engine.cli import UserError
from engine.data import Data
from engine.device import rng_state, set_rng_state
from engine.log import SECRET, RunFolder
from engine.loop import NotFinite
from engine.schedule import build_scheduler


def pick(options: dict, wanted: Callable | list[str]) -> dict:
    """Those of the options that `wanted` names: a list, or a function, by its parameters."""
    names = inspect.signature(wanted).parameters if callable(wanted) else wanted
    return {key: options[key] for key in names if key in options}


@dataclass
class Parts:
    """Everything whose state decides how training goes on."""

    model: torch.nn.Module
    mixer: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    ema: "WeightAverage | None"
    sources: list = field(default_factory=list)  # of saliency

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": plain_state(self.scheduler),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.module.state_dict() if self.ema else None,
            "method": self.mixer.state_dict(),
            "saliency": [source.state_dict() for source in self.sources],
            "rng": [rng_state(self.device)],
        }

    def load(self, saved: dict) -> None:
        """Take up the state of a checkpoint; the random generators last, since building things draws from them.

        What the options say of the optimizer stays: it differs from the saved state where the user forced it to.
        """
        wanted = [{key: group[key] for key in ("weight_decay", "nesterov")} for group in self.optimizer.param_groups]
        base_lrs = self.scheduler.base_lrs
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        for group, own in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(own)
        if isinstance(self.scheduler, LambdaLR) and self.scheduler.base_lrs != base_lrs:
            self.scheduler.base_lrs = base_lrs
            for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.scheduler.lr_lambdas, strict=True):
                group |= {"initial_lr": lr, "lr": lr * factor(self.scheduler.last_epoch)}
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema and saved["ema"]:
            self.ema.module.load_state_dict(saved["ema"])
        try:
            self.mixer.load_state_dict(saved["method"])
            for source, state in zip(self.sources, saved["saliency"], strict=True):
                source.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the saved state of the method does not fit ({str(error).splitlines()[0]}): it was saved by another "
                "method, source or version\nstart a new run; --init_from takes the weights of this one"
            ) from error
        set_rng_state(saved["rng"][0], self.device)


class WeightAverage:
    """Exponential moving average of the weights and of the batch-norm statistics; counters are copied.

    torch's AveragedModel does the same, but makes the host wait for the device at every step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.average = get_ema_multi_avg_fn(decay)

    def update(self, model: torch.nn.Module) -> None:
        pairs = list(zip(tensors_of(self.module), tensors_of(model), strict=True))
        moving = [(own.detach(), new.detach()) for own, new in pairs if own.is_floating_point()]
        self.average(*map(list, zip(*moving, strict=True)), None)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def plain_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """The scheduler's state without functions, which no weights-only load accepts; building it makes them anew."""
    plain = (int, float, str, bool, list, type(None))
    return {key: value for key, value in scheduler.state_dict().items() if isinstance(value, plain)}


def build_parts(
    model: torch.nn.Module, mixer, options: dict, *, steps_per_epoch: int, precision: torch.dtype | None
) -> Parts:
    """Optimizer, schedule, scaler and weight average for `model` by the options of those names. Raises ValueError for
    bad ones.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(),
        options["lr"],
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
        nesterov=options["nesterov"] and options["momentum"] > 0,
        fused=device.type in ("cpu", "cuda"),
    )
    scheduler = build_scheduler(optimizer, steps_per_epoch=steps_per_epoch, **pick(options, build_scheduler))
    scaler = torch.amp.GradScaler(device.type) if precision is torch.float16 else None
    ema = WeightAverage(model, options["ema"]) if options["ema"] else None
    return Parts(model, mixer, optimizer, scheduler, scaler, ema)


def save(
    run: RunFolder,
    parts: Parts,
    options: dict,
    data: Data,
    history: list[dict],
    best: dict,
    *,
    steps: int,
    improved: bool,
    precision: str,
) -> None:
    """best.pt on improvement, epoch_NNN.pt when asked for, and last.pt last of all: only then the epoch counts as done.

    steps: finished optimizer steps. precision: what the network computed in.
    """
    if run.off:
        return
    epoch = len(history)
    content = {
        "format": FORMAT,
        "epoch": epoch,
        "step": steps,
        "precision": precision,
        **parts.state(),
        "config": {key: value for key, value in options.items() if key not in SECRET},
        "classes": list(data.classes),
        "num_classes": len(data.classes),
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "history": history,
        "best": best,
        "versions": versions(),
    }
    if improved:
        save_checkpoint(run.path / "best.pt", content)
    if options["save_every"] and epoch % options["save_every"] == 0:
        save_checkpoint(run.path / f"epoch_{epoch:03d}.pt", content)
    save_checkpoint(run.path / "last.pt", content, keep_previous=True)


@contextmanager
def undisturbed(parts: Parts):
    """Around a look at what a method does: training goes on as if there had been none."""
    state, method = rng_state(parts.device), copy.deepcopy(parts.mixer.state_dict())
    statistics = [buffer.clone() for buffer in parts.model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(parts.model.buffers(), statistics, strict=True):
            buffer.copy_(value)
        parts.model.zero_grad(set_to_none=True)
        parts.mixer.load_state_dict(method)
        set_rng_state(state, parts.device)


@contextmanager
def stop_well(run: RunFolder, parts: Parts):
    """Around an epoch: a loss that is no number and Ctrl-C end with the way to go on."""
    last = run.path / "last.pt"

    def go_on() -> str:
        if run.off or not last.exists():
            return "no epoch was finished, so nothing is kept"
        return f"the last finished epoch is kept: continue with --checkpoint {last}"

    try:
        yield
    except NotFinite as error:
        saved = ""
        if not run.off:
            evidence = {"model": parts.model.state_dict(), "step": error.step, "index": error.index}
            save_checkpoint(run.path / "nonfinite.pt", {**evidence, "weights_of_step": error.now})
            saved = f"; weights and the batch's image numbers are in {run.path / 'nonfinite.pt'}"
        scale = f", loss scale {parts.scaler.get_scale():g}" if parts.scaler else ""
        raise UserError(
            f"{error}, lr by now {parts.scheduler.get_last_lr()[0]:g}{scale}{saved}\n"
            f"try a lower --lr, --clip_grad 1, or --amp bf16 or off; {go_on()}"
        ) from error
    except KeyboardInterrupt:
        print(f"\n{go_on()}", file=sys.stderr)
        raise


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory use so far: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
