"""What a training run carries from epoch to epoch: built, saved, and taken up again exactly where it stopped."""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR

from engine.config.select import select_kwargs
from engine.data.image_set import Data
from engine.errors import UserError
from engine.runtime.checkpoint import FORMAT, get_versions, save_checkpoint
from engine.runtime.device import get_rng_state, seed_rank_generator, set_rng_state
from engine.runtime.distributed import all_reduce_sum, gather_object, is_main_process, rank, world_size
from engine.training.ema import ModelEma
from engine.training.loss import LOSSES, cross_entropy_scale
from engine.training.run_folder import SECRET_OPTIONS, RunFolder
from engine.training.running_sums import EpochStats
from engine.training.schedule import build_scheduler
from engine.training.step_calendar import StepSchedule


@dataclass
class TrainingState:
    """Everything whose state decides how training goes on."""

    model: torch.nn.Module
    mixer: object | None  # None where nothing is mixed
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    ema: "ModelEma | None"
    sources: list = field(default_factory=list)  # of saliency

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state(self, tally: EpochStats | None = None) -> dict | None:
        """Everything that a checkpoint keeps of the parts, for the first process; None for the others, which must call
        it too. tally: where the epoch stands, if it is under way.
        """
        own = {"rng": get_rng_state(self.device), "method": self.mixer and self.mixer.state_dict()}
        if tally:  # batch statistics are still each process's own
            own |= {"tally": tally.state(), "buffers": [list(network.buffers()) for network in self.networks]}
        if (every := gather_object(own)) is None:
            return None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": plain_scheduler_state(self.scheduler),
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

    def load(self, saved: dict) -> EpochStats | None:
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
        same = len(saved["rng"]) == world_size()
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
            seed_rank_generator(saved["step"] + world_size(), anew=True)
        return self.load_inside(saved["inside"]) if saved["inside"] else None

    def load_inside(self, saved: list[dict]) -> EpochStats:
        """The batch statistics and sums of an epoch under way; of another number of processes their mean and sum."""
        if len(saved) == world_size():
            own = saved[rank()]
        else:
            columns = zip(*(one["buffers"] for one in saved), strict=True)
            tallies = [one["tally"] for one in saved]
            mine = 1 if is_main_process() else 0  # the first process takes it all
            sums = {key: mine * sum(one["sums"][key] for one in tallies) for key in tallies[0]["sums"]}
            tally = {"sums": sums, "seen": mine * sum(one["seen"] for one in tallies), "step": tallies[0]["step"]}
            own = {"buffers": [average_buffers_of(column) for column in columns], "tally": tally}
        for network, values in zip(self.networks, own["buffers"], strict=True):
            for buffer, value in zip(network.buffers(), values, strict=True):
                buffer.copy_(value)
        return EpochStats.load(own["tally"], self.device)


def average_buffers_of(networks: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The mean of each buffer over several copies of a network; counters are taken from the first."""
    return [
        torch.stack(values).mean(0) if values[0].is_floating_point() else values[0]
        for values in zip(*networks, strict=True)
    ]


def plain_scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """The scheduler's state without functions, which no weights-only load accepts; building it makes them anew."""
    plain = (int, float, str, bool, list, type(None))
    return {key: value for key, value in scheduler.state_dict().items() if isinstance(value, plain)}


def build_training_state(
    model: torch.nn.Module, mixer, options: dict, *, calendar: StepSchedule, precision: torch.dtype | None
) -> TrainingState:
    """Optimizer, schedule, scaler and weight average for `model` by the options of those names. Raises ValueError for
    bad ones.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        param_groups_no_norm_decay(model) if options["no_decay_bn"] else model.parameters(),
        options["lr"],
        momentum=options["momentum"],
        weight_decay=options["weight_decay"],
        nesterov=options["nesterov"] and options["momentum"] > 0,
        fused=device.type in ("cpu", "cuda"),
    )
    scheduler = build_scheduler(optimizer, calendar=calendar, **select_kwargs(options, build_scheduler))
    scaler = torch.amp.GradScaler(device.type) if precision is torch.float16 else None
    ema = ModelEma(model, options["ema"]) if options["ema"] else None
    return TrainingState(model, mixer, optimizer, scheduler, scaler, ema)


def check_batch_size(batch_size: int, accumulate: int, images: int, drop_last: bool) -> None:
    """Raise UserError where a batch cannot be cut into equal parts for all processes, or is larger than the data."""
    cut = world_size() * accumulate
    if batch_size % cut:
        by = f"{world_size()} processes" + (f" x --accumulate {accumulate}" if accumulate > 1 else "")
        below, above = batch_size // cut * cut, (batch_size // cut + 1) * cut
        raise UserError(
            f"--batch_size {batch_size}: the total, which {by} = {cut} do not divide\n"
            f"take {f'{below} or ' if below else ''}{above}"
        )
    if images < (batch_size if drop_last else cut):
        raise UserError(f"--batch_size {batch_size}: only {images} training images; take a smaller one")


def make_source_builder(
    build_source: Callable, parts: TrainingState, data: Data, options: dict, precision, banks: dict
) -> Callable:
    """A function that builds the source of saliency of a mixer, as options["saliency"] or the mixer itself says.

    banks: sources that learn, by name, kept for methods that take turns and for the phases of a run.
    """
    share = {"model": parts.model, "images_count": len(data.train), "device": parts.device}
    share |= {"mean": data.mean, "std": data.std, "precision": precision, "scaler": parts.scaler}
    share |= {"training_loss": LOSSES[options["loss"]]}
    share |= {"cross_entropy_scale": cross_entropy_scale(options["loss"], len(data.classes))}
    share |= select_kwargs(options, ["saliency_size", "bank_size", "bank_momentum", "casm"])

    def make(mixer):
        name = options["saliency"] or mixer.default_source
        source = banks.get(name) or build_source(name, **share | mixer.gradient_options)
        return banks.setdefault(name, source) if source.learns else source

    return make


def loader_options(options: dict, data: Data, device: torch.device) -> dict:
    """What every engine.data.loader.DeviceLoader of a run is told alike."""
    alike = {"device": device, "mean": data.mean, "std": data.std}
    return alike | select_kwargs(options, ["workers", "channels_last"])


def step_options(parts: TrainingState, options: dict, data: Data, precision: torch.dtype | None) -> dict:
    """What engine.training.loop.train_one_epoch is told by the options."""
    return {
        "loss_fn": LOSSES[options["loss"]],
        "num_classes": len(data.classes),
        "precision": precision,
        **{"scheduler": parts.scheduler, "scaler": parts.scaler, "ema": parts.ema},
        **select_kwargs(options, ["label_smoothing", "clip_grad"]),
    }


def param_groups_no_norm_decay(model: torch.nn.Module) -> list[dict]:
    """Two groups of parameters: those of batch norm, without weight decay, and all others."""
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    spared = {id(parameter): parameter for layer in norms for parameter in layer.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in spared]
    return [{"params": others}, {"params": list(spared.values()), "weight_decay": 0.0}]


def save(
    run: RunFolder,
    parts: TrainingState,
    options: dict,
    data: Data,
    history: list[dict],
    best: dict,
    *,
    steps: int,
    precision: str,
    also: Sequence[str] = (),
    tally: EpochStats | None = None,
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
        "config": {key: value for key, value in options.items() if key not in SECRET_OPTIONS},
        "classes": list(data.classes),
        "num_classes": len(data.classes),
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "history": history,
        "best": best,
        "versions": get_versions(),
        **(further or {}),
    }
    for name in also:
        save_checkpoint(run.path / name, content)
    save_checkpoint(run.path / "last.pt", content, keep_previous=True)


def sync_sources(parts: TrainingState) -> None:
    """Between processes: what the sources have learned since the last call."""
    if world_size() > 1:
        for source in parts.sources:
            source.exchange(all_reduce_sum)


@contextmanager
def preserve_state(parts: TrainingState):
    """Around a look at what a method does: training goes on as if there had been none."""
    state, method = get_rng_state(parts.device), copy.deepcopy(parts.mixer.state_dict())
    statistics = [buffer.clone() for buffer in parts.model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(parts.model.buffers(), statistics, strict=True):
            buffer.copy_(value)
        parts.model.zero_grad(set_to_none=True)
        parts.mixer.load_state_dict(method)
        set_rng_state(state, parts.device)
