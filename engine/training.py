"""What a training run carries from epoch to epoch: built, saved, and taken up again exactly where it stopped."""

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.checkpoint import FORMAT, save_checkpoint, versions
from engine.cli import Terminated, UserError
from engine.data import Data
from engine.device import own_stream, rng_state, set_rng_state
from engine.distributed import gather, is_first, rank, ranks, total, wait_for_all
from engine.log import SECRET, RunFolder
from engine.loop import NotFinite, Stopped, Tally
from engine.loss import LOSSES, cross_entropy_scale
from engine.phases import Calendar
from engine.schedule import build_scheduler


def pick(options: dict, wanted: Callable | list[str]) -> dict:
    """Those of the options that `wanted` names: a list, or a function, by its parameters."""
    names = inspect.signature(wanted).parameters if callable(wanted) else wanted
    return {key: options[key] for key in names if key in options}


@dataclass
class Parts:
    """Everything whose state decides how training goes on."""

    model: torch.nn.Module
    mixer: object | None  # None where nothing is mixed
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    ema: "WeightAverage | None"
    sources: list = field(default_factory=list)  # of saliency

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state(self, tally: Tally | None = None) -> dict | None:
        """Everything that a checkpoint keeps of the parts, for the first process; None for the others, which must call
        it too. tally: where the epoch stands, if it is under way.
        """
        own = {"rng": rng_state(self.device), "method": self.mixer and self.mixer.state_dict()}
        if tally:  # batch statistics are still each process's own
            own |= {"tally": tally.state(), "buffers": [list(network.buffers()) for network in self.networks]}
        if (every := gather(own)) is None:
            return None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": plain_state(self.scheduler),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.module.state_dict() if self.ema else None,
            "method": [one["method"] for one in every],
            "saliency": [source.state_dict() for source in self.sources],
            "rng": [one["rng"] for one in every],
            "inside": [{key: one[key] for key in ("tally", "buffers")} for one in every] if tally else None,
        }

    @property
    def networks(self) -> list[torch.nn.Module]:
        return [self.model, *([self.ema.module] if self.ema else [])]

    def load(self, saved: dict) -> Tally | None:
        """Take up the state of a checkpoint; the random generators last, since building things draws from them. Returns
        where the epoch stands, if it was saved under way.

        What the options say of the optimizer stays: it differs from the saved state where the user forced it to. After
        another number of processes each draws numbers of its own anew, and what a method has learned in each is left.
        """
        wanted = [{key: group[key] for key in ("weight_decay", "nesterov")} for group in self.optimizer.param_groups]
        base_lrs, momentum = self.scheduler.base_lrs, self.optimizer.param_groups[0]["momentum"]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        for group, own in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(own)
        if isinstance(self.scheduler, LambdaLR):  # the rate that the options of now give at this step
            self.scheduler.base_lrs = base_lrs
            for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.scheduler.lr_lambdas, strict=True):
                group |= {"initial_lr": lr, "lr": lr * factor(self.scheduler.last_epoch), "momentum": momentum}
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema and saved["ema"]:
            self.ema.module.load_state_dict(saved["ema"])
        same = len(saved["rng"]) == ranks()
        try:
            if same and self.mixer:
                self.mixer.load_state_dict(saved["method"][rank()])
            for source, state in zip(self.sources, saved["saliency"], strict=True):
                source.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the saved state of the method does not fit ({str(error).splitlines()[0]}): it was saved by another "
                "method, source or version\nstart a new run; --init_from takes the weights of this one"
            ) from error
        if same:
            set_rng_state(saved["rng"][rank()], self.device)
        else:
            own_stream(saved["step"] + ranks(), anew=True)
        return self.load_inside(saved["inside"]) if saved["inside"] else None

    def load_inside(self, saved: list[dict]) -> Tally:
        """The batch statistics and sums of an epoch under way; of another number of processes their mean and sum."""
        if len(saved) == ranks():
            own = saved[rank()]
        else:
            columns = zip(*(one["buffers"] for one in saved), strict=True)
            tallies = [one["tally"] for one in saved]
            mine = 1 if is_first() else 0  # the first process takes it all
            sums = {key: mine * sum(one["sums"][key] for one in tallies) for key in tallies[0]["sums"]}
            tally = {"sums": sums, "seen": mine * sum(one["seen"] for one in tallies), "step": tallies[0]["step"]}
            own = {"buffers": [mean_of(column) for column in columns], "tally": tally}
        for network, values in zip(self.networks, own["buffers"], strict=True):
            for buffer, value in zip(network.buffers(), values, strict=True):
                buffer.copy_(value)
        return Tally.load(own["tally"], self.device)


def mean_of(networks: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The mean of each buffer over several copies of a network; counters are taken from the first."""
    return [
        torch.stack(values).mean(0) if values[0].is_floating_point() else values[0]
        for values in zip(*networks, strict=True)
    ]


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
    model: torch.nn.Module, mixer, options: dict, *, calendar: Calendar, precision: torch.dtype | None
) -> Parts:
    """Optimizer, schedule, scaler and weight average for `model` by the options of those names. Raises ValueError for
    bad ones.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        without_decay_of_norms(model) if options["no_decay_bn"] else model.parameters(),
        options["lr"],
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
        nesterov=options["nesterov"] and options["momentum"] > 0,
        fused=device.type in ("cpu", "cuda"),
    )
    scheduler = build_scheduler(optimizer, calendar=calendar, **pick(options, build_scheduler))
    scaler = torch.amp.GradScaler(device.type) if precision is torch.float16 else None
    ema = WeightAverage(model, options["ema"]) if options["ema"] else None
    return Parts(model, mixer, optimizer, scheduler, scaler, ema)


def check_batch(batch_size: int, accumulate: int, images: int, drop_last: bool) -> None:
    """Raise UserError where a batch cannot be cut into equal parts for all processes, or is larger than the data."""
    cut = ranks() * accumulate
    if batch_size % cut:
        by = f"{ranks()} processes" + (f" x --accumulate {accumulate}" if accumulate > 1 else "")
        below, above = batch_size // cut * cut, (batch_size // cut + 1) * cut
        raise UserError(
            f"--batch_size {batch_size}: the total, which {by} = {cut} do not divide\n"
            f"take {f'{below} or ' if below else ''}{above}"
        )
    if images < (batch_size if drop_last else cut):
        raise UserError(f"--batch_size {batch_size}: only {images} training images; take a smaller one")


def source_maker(build_source: Callable, parts: Parts, data: Data, options: dict, precision, banks: dict) -> Callable:
    """A function that builds the source of saliency of a mixer, as options["saliency"] or the mixer itself says.

    banks: sources that learn, by name, kept for methods that take turns and for the phases of a run.
    """
    share = {"model": parts.model, "images_count": len(data.train), "device": parts.device}
    share |= {"mean": data.mean, "std": data.std, "precision": precision, "scaler": parts.scaler}
    share |= {"training_loss": LOSSES[options["loss"]]}
    share |= {"cross_entropy_scale": cross_entropy_scale(options["loss"], len(data.classes))}
    share |= pick(options, ["saliency_size", "bank_size", "bank_momentum", "casm"])

    def make(mixer):
        name = options["saliency"] or mixer.default_source
        source = banks.get(name) or build_source(name, **share | mixer.gradient_options)
        return banks.setdefault(name, source) if source.learns else source

    return make


def feed_options(options: dict, data: Data, device: torch.device) -> dict:
    """What every engine.batches.Batches of a run is told alike."""
    alike = {"device": device, "mean": data.mean, "std": data.std, "rank": rank(), "ranks": ranks()}
    return alike | pick(options, ["workers", "channels_last"])


def step_options(parts: Parts, options: dict, data: Data, precision: torch.dtype | None) -> dict:
    """What engine.loop.train_one_epoch is told by the options."""
    return {
        "loss_fn": LOSSES[options["loss"]],
        "num_classes": len(data.classes),
        "precision": precision,
        **{"scheduler": parts.scheduler, "scaler": parts.scaler, "ema": parts.ema},
        **pick(options, ["label_smoothing", "clip_grad"]),
    }


def without_decay_of_norms(model: torch.nn.Module) -> list[dict]:
    """Two groups of parameters: those of batch norm, without weight decay, and all others."""
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    spared = {id(parameter): parameter for layer in norms for parameter in layer.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in spared]
    return [{"params": others}, {"params": list(spared.values()), "weight_decay": 0.0}]


def save(
    run: RunFolder,
    parts: Parts,
    options: dict,
    data: Data,
    history: list[dict],
    best: dict,
    *,
    steps: int,
    precision: str,
    also: Sequence[str] = (),
    tally: Tally | None = None,
    before: dict | None = None,
    further: dict | None = None,
) -> None:
    """The files of `also`, and last.pt last of all: only then the epoch counts as done. Every process must call it.

    steps: finished optimizer steps. precision: what the network computed in. tally: of an epoch under way; before:
    what its row in the log needs of its beginning. further: what a kind of network keeps besides.
    """
    if options["log_off"]:
        return
    state = parts.state(tally)
    if run.off:
        return
    epoch = len(history)
    content = {
        "format": FORMAT,
        "epoch": epoch,
        "step": steps,
        "precision": precision,
        "before": before,
        **state,
        "config": {key: value for key, value in options.items() if key not in SECRET},
        "classes": list(data.classes),
        "num_classes": len(data.classes),
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "history": history,
        "best": best,
        "versions": versions(),
        **(further or {}),
    }
    for name in also:
        save_checkpoint(run.path / name, content)
    save_checkpoint(run.path / "last.pt", content, keep_previous=True)


def share_what_was_learned(parts: Parts) -> None:
    """Between processes: what the sources have learned since the last call."""
    if ranks() > 1:
        for source in parts.sources:
            source.exchange(total)


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
def stop_well(run: RunFolder, parts: Parts, keep: Callable[[Tally], None]):
    """Around an epoch: a loss that is no number, Ctrl-C and SIGTERM end with the way to go on. keep(tally) saves the
    epoch as far as it went.
    """
    last = run.path / "last.pt"

    def go_on() -> str:
        if run.off or not last.exists():
            return "no epoch was finished, so nothing is kept"
        return f"what was saved last is kept: continue with --checkpoint {last}"

    try:
        yield
    except NotFinite as error:
        saved = ""
        if not run.off:
            evidence = {"model": parts.model.state_dict(), "step": error.step, "index": error.index}
            save_checkpoint(run.path / "nonfinite.pt", {**evidence, "weights_of_step": error.now, **error.evidence})
            saved = f"; weights and the batch's image numbers are in {run.path / 'nonfinite.pt'}"
        wait_for_all()  # who ends first ends the others, and so would the one that saves
        scale = f", loss scale {parts.scaler.get_scale():g}" if parts.scaler else ""
        raise UserError(
            f"{error}, lr by now {parts.scheduler.get_last_lr()[0]:g}{scale}{saved}\n"
            f"try a lower --lr, --clip_grad 1, or --amp bf16 or off; {go_on()}"
        ) from error
    except Stopped as stopped:
        keep(stopped.tally)
        wait_for_all()
        where = f"{stopped.tally.step} steps into the epoch; "
        raise Terminated(where + (f"continue with --checkpoint {last}" if last.exists() else go_on())) from None
    except KeyboardInterrupt:
        if is_first():
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
