"""The state of a training run: built once, saved in each checkpoint, restored exactly."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from engine.errors import UserError
from engine.runtime.checkpoint import Checkpoint
from engine.runtime.device import get_rng_state, seed_rank_generator, set_rng_state
from engine.runtime.distributed import (
    all_reduce_sum,
    convert_sync_batchnorm,
    gather_object,
    is_main_process,
    rank,
    world_size,
    wrap_ddp,
)
from engine.runtime.graphs import GraphCapture
from engine.training.compilation import CompileClock, compile_network
from engine.training.ema import RAMP_START, ModelEma
from engine.training.network_step import StepConfig, find_capture_obstacle, run_network_step
from engine.training.optimizer import HYPER_PARAMETERS, load_optimizer_state
from engine.training.running_sums import EpochStats
from engine.training.stopwatch import flatten_sources


@dataclass
class TrainingState:
    """Everything whose state determines how training continues."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    mixer: object | None = None  # None: no mixing
    source: object | None = None  # saliency source of the mixer; a list if it chooses among several methods
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEma | None = None
    network: torch.nn.Module | None = (
        None  # `model` or its DistributedDataParallel wrapper; the training step calls this one
    )
    graph_step: bool = False  # whether the network's step is captured as a CUDA graph, with methods that allow it
    kernels: str = "auto"  # torch: no CUDA graphs
    graphs: GraphCapture = field(init=False)  # what the run captures
    compile_clock: CompileClock | None = None  # None: the model is not compiled

    def __post_init__(self):
        self.network = self.network or self.model
        self.graphs = GraphCapture(self.device, self.kernels)
        self.eager_step = partial(run_network_step, self.network, self.scaler)
        self.captured_step = self.graphs.wrap(self.eager_step, "the network's step")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def sources(self) -> list:
        """The saliency sources, each once."""
        return flatten_sources(self.source)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """The model and, if there is one, its weight average."""
        return [self.model, *([self.ema.module] if self.ema else [])]

    def state_dict(self, stats: EpochStats | None = None) -> dict | None:
        """Return entries of a Checkpoint in the main process, and None in the others. All processes must call it.

        stats: of the unfinished epoch, if there is one.
        """
        own = {"rng": get_rng_state(self.device), "method": self.mixer and self.mixer.state_dict()}
        if stats:  # within an epoch, each process has batch statistics of its own
            own |= {"tally": stats.state_dict(), "buffers": [list(network.buffers()) for network in self.networks]}
        if (processes := gather_object(own)) is None:
            return None
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": get_plain_scheduler_state(self.scheduler),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "ema": self.ema.module.state_dict() if self.ema else None,
            "method": [one["method"] for one in processes],
            "saliency": [source.state_dict() for source in self.sources],
            "rng": [one["rng"] for one in processes],
            "inside": [{key: one[key] for key in ("tally", "buffers")} for one in processes] if stats else None,
        }

    def load_state_dict(self, saved: Checkpoint) -> EpochStats | None:
        """Restore the state of a checkpoint. Returns the stats of its unfinished epoch, if there is one.

        Hyper-parameters of the optimizer stay as built, since --force_config may have changed them. If the number of
        processes differs, the random generators are reseeded and the per-process state of the method is dropped.
        Raises UserError if the state of the method or a one-cycle schedule does not fit.
        """
        self.load_optimizer(saved)
        self.model.load_state_dict(saved["model"])
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema and saved["ema"]:
            self.ema.module.load_state_dict(saved["ema"])
            self.ema.step = self.scheduler.last_epoch
        same_processes = len(saved["rng"]) == world_size()
        try:
            if same_processes and self.mixer:
                self.mixer.load_state_dict(saved["method"][rank()])
            for source, state in zip(self.sources, saved["saliency"], strict=True):
                source.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the saved state of the method does not fit ({str(error).splitlines()[0]}): it comes from another "
                "method, source or version\nstart a new run from these weights with --init_from"
            ) from error
        if same_processes:  # generators come last, since loading the rest may draw from them
            set_rng_state(saved["rng"][rank()], self.device)
        else:
            seed_rank_generator(saved["step"] + world_size(), include_main=True)
        return self.load_epoch(saved["inside"]) if saved["inside"] else None

    def load_optimizer(self, saved: Checkpoint) -> None:
        """Restore optimizer and schedule, but keep the current hyper-parameters."""
        kept, base_lrs = set(HYPER_PARAMETERS), self.scheduler.base_lrs
        if isinstance(self.scheduler, OneCycleLR):
            check_one_cycle(saved["scheduler"]["total_steps"], self.scheduler.total_steps)
            kept -= {"momentum", "betas"}  # which the schedule moves
        current = [{key: group[key] for key in kept & group.keys()} for group in self.optimizer.param_groups]
        load_optimizer_state(self.optimizer, saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        for group, own in zip(self.optimizer.param_groups, current, strict=True):
            group.update(own)
        if isinstance(self.scheduler, LambdaLR):  # the learning rate of the current options at this step
            self.scheduler.base_lrs = base_lrs
            for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.scheduler.lr_lambdas, strict=True):
                group |= {"initial_lr": lr, "lr": lr * factor(self.scheduler.last_epoch)}

    def load_epoch(self, saved: list[dict]) -> EpochStats:
        """Restore the batch statistics of an unfinished epoch, and return its stats. saved: one entry per process.

        If the number of processes differs, the statistics are averaged and the main process gets all sums.
        """
        if len(saved) == world_size():
            own = saved[rank()]
        else:
            merged = EpochStats.merge([one["tally"] for one in saved])
            if not is_main_process():  # so that the sums count once
                merged |= {"sums": {name: 0 * value for name, value in merged["sums"].items()}, "seen": 0}
            columns = zip(*(one["buffers"] for one in saved), strict=True)
            own = {"buffers": [average_buffer_lists(column) for column in columns], "tally": merged}
        for network, values in zip(self.networks, own["buffers"], strict=True):
            for buffer, value in zip(network.buffers(), values, strict=True):
                buffer.copy_(value)
        stats = EpochStats()
        stats.load_state_dict(own["tally"], self.device)
        return stats

    def compile_model(self) -> str:
        """Compile the model with torch.compile, if this machine can. Returns a note for the log."""
        self.compile_clock, note = compile_network(self.model)
        return note

    def set_mixer(self, mixer, build_source: Callable) -> None:
        """Use this mixing method from now on, with the saliency source that build_source(mixer) returns.

        Raises ValueError if the method cannot train the network.
        """
        mixer.check_network(self.model)
        self.mixer, self.source = mixer, mixer.build_source(build_source)

    @property
    def step_obstacle(self) -> str | None:
        """Why the network's step cannot be captured as a CUDA graph with the current method, or None."""
        return find_capture_obstacle(self.graphs, self.mixer, self.sources)

    def list_step_notes(self) -> list[str]:
        """Return a note if --graph_step has no effect with the current method."""
        obstacle = self.graph_step and self.step_obstacle
        return [f"--graph_step has no effect: {obstacle}"] if obstacle else []

    def no_sync(self) -> AbstractContextManager:
        """Return a context manager in which backward passes do not average the gradients over the processes."""
        return nullcontext() if self.network is self.model else self.network.no_sync()

    def run_network_step(
        self, config: StepConfig, mixed: torch.Tensor, soft: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the network's part of a step, eagerly or as a captured graph; see network_step.run_network_step()."""
        if not self.graph_step or self.step_obstacle:
            return self.eager_step(config, mixed, soft, weight)
        # a graph reads the weight from the device, where it is written without a wait
        return self.captured_step(config, mixed, soft, torch.full((), weight, device=mixed.device))

    def zero_grad(self) -> None:
        """Clear the gradients. A captured step adds to gradients in the same memory, so with it they are set to 0."""
        self.optimizer.zero_grad(set_to_none=not self.graph_step)

    def sync_sources(self) -> None:
        """Share what the sources have learned since the last call among all processes."""
        if world_size() > 1:
            for source in self.sources:
                source.sync(all_reduce_sum)

    @contextmanager
    def preserve_state(self):
        """Restore generators, batch statistics and method at the end of the block, so that trying out the method leaves
        no trace in the training.
        """
        rng, method = get_rng_state(self.device), copy.deepcopy(self.mixer.state_dict())
        statistics = [buffer.clone() for buffer in self.model.buffers()]
        try:
            yield
        finally:
            for buffer, value in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(value)
            self.zero_grad()
            self.mixer.load_state_dict(method)
            set_rng_state(rng, self.device)


def average_buffer_lists(copies: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the mean of each buffer over several copies of a network. Integer buffers come from the first copy."""
    return [
        torch.stack(values).mean(0) if values[0].is_floating_point() else values[0]
        for values in zip(*copies, strict=True)
    ]


def check_one_cycle(before: int, now: int) -> None:
    """Raise UserError if a one-cycle schedule was saved for another number of steps: torch cannot continue it."""
    if before != now:
        raise UserError(
            f"the one-cycle schedule of this run is fixed for {before:,} steps, but this data and number of processes "
            f"give {now:,}\nresume with those of the run, or start a new run; --init_from takes the weights of this one"
        )


def get_plain_scheduler_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """Return the scheduler's state without functions: torch.load(weights_only=True) refuses them, and building the
    scheduler recreates them.
    """
    plain = (int, float, str, bool, list, type(None))
    return {key: value for key, value in scheduler.state_dict().items() if isinstance(value, plain)}


def build_training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    precision: torch.dtype | None = None,
    *,
    ema: float = 0.0,
    ema_ramp: bool = False,
    total_steps: int = 0,
    graph_step: bool = False,
    kernels: str = "auto",
) -> TrainingState:
    """Return the state of a new run, without a mixing method.

    precision: dtype of autocast; None: float32. float16 gets a gradient scaler. ema: decay of the weight average; 0:
    none. ema_ramp: raise it in the `total_steps` of the run, from RAMP_START if ema is 0. graph_step, kernels: see
    TrainingState.
    """
    average = ModelEma(model, ema or RAMP_START, total_steps * ema_ramp) if ema or ema_ramp else None
    device = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(device) if precision is torch.float16 else None
    network = wrap_ddp(model)
    return TrainingState(
        model,
        optimizer,
        scheduler=scheduler,
        scaler=scaler,
        ema=average,
        network=network,
        graph_step=graph_step,
        kernels=kernels,
    )


def place_network(
    network: torch.nn.Module,
    target_device: torch.device,
    channels_last: bool,
    sync_bn: bool,
    remedy: str = "leave out --sync_bn",
) -> torch.nn.Module:
    """Move the network to a device, with synchronised batch norm if sync_bn, and return it.

    Raises UserError, which ends in the remedy, if the device does not support synchronised batch norm.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return convert_sync_batchnorm(network, sync_bn, remedy).to(target_device, memory_format=layout)
