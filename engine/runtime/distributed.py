"""Several processes under torchrun: how they meet, who is first, what all of them must agree on, and collectives.

A plain run is the first of one process: every function here then does nothing, or returns what it was given.
"""

import atexit
import inspect
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn

from engine.errors import UserError
from engine.runtime.failure_watch import FailureWatch


class ProcessGroups(NamedTuple):
    """What the processes communicate through beside the gradients."""

    host: dist.ProcessGroup  # tensors and objects in host memory
    base: dist.Store  # which torchrun keeps over restarts
    watch: FailureWatch


_group: ProcessGroups | None = None
_alone = False  # whether the others never came, so that no other process can report an error of this one


def host_group() -> dist.ProcessGroup:
    """The process group in host memory (gloo)."""
    return _group.host


def rank_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun sets them; 0, 1, 0 for a plain run."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )


def rank() -> int:
    return rank_environment()[0]


def world_size() -> int:
    return rank_environment()[1]


def is_main_process() -> bool:
    return rank() == 0


def restart_count() -> int:
    """How often torchrun has restarted the processes after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores_per_process() -> int:
    """The number of CPU cores for each process of this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // local_world_size())


def init_processes(device: torch.device, timeout_seconds: float) -> None:
    """Meet the other processes; from here on only the first one prints. Raises UserError if they do not come."""
    global _group, _alone
    own, count, _ = rank_environment()
    if count == 1 or _group:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {count}, but {' and '.join(missing)} not set: the processes cannot find each other\n"
            f"start them with torchrun --nproc_per_node {count} {os.path.basename(sys.argv[0])} ..."
        )
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        base = connect_store(timeout, create=own == 0)
        store = attempt_store(base)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=timeout)
        host = dist.new_group(backend="gloo", timeout=timeout)
        dist.barrier(host)
        watch = FailureWatch(store, attempt_store(connect_store(timeout)), rank=own, world_size=count)
    except (RuntimeError, ValueError) as error:
        _alone = True
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {own} of {count} did not meet the others at {address} within {timeout_seconds:g} s "
            f"({first_error_line(error)})\nare all {count} started, with the same address, and can they reach it?"
        ) from error
    _group = ProcessGroups(host, base, watch)
    watch.start()
    atexit.register(watch.stop)
    if own:
        sys.stdout = open(os.devnull, "w")


def connect_store(timeout: timedelta, create: bool = False) -> dist.Store:
    """A new connection to the common store. create: this process keeps the store, unless torchrun does."""
    create &= os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, world_size(), is_master=create, timeout=timeout)


def attempt_store(store: dist.Store) -> dist.Store:
    """The part of the store that belongs to this start of the processes."""
    return dist.PrefixStore(f"attempt {restart_count()}", store)


def shut_down_processes() -> None:
    """Leave the process group once all processes have come here."""
    global _group
    if _group:
        _group.watch.stop()
        dist.barrier(_group.host)  # the store goes with the first process
        _group = None
        dist.destroy_process_group()


def report_error(text: str) -> None:
    """Print an error that ends the run, once for all processes, on stderr of the first. Call it last.

    Before the processes have met, the first one of each machine prints its own error.
    """
    if _group:
        _group.watch.report(text)
    elif rank_environment()[2] == 0 or _alone:
        print(text, file=sys.stderr, flush=True)


def is_connection_error(error: Exception) -> bool:
    """Whether `error` says that another process went away, or did not answer in time."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or any(word in str(error) for word in ("closed by peer", "Timed out waiting", "gloo", "NCCL"))


def first_error_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def convert_sync_batchnorm(model: nn.Module, sync_bn: bool, otherwise: str = "leave --sync_bn out") -> nn.Module:
    """The network, with batch norm over the images of all processes if sync_bn.

    Raises UserError on a CPU; `otherwise` says what to do instead.
    """
    if not sync_bn or world_size() == 1:
        return model
    if dist.get_backend() != "nccl":
        raise UserError(f"batch norm over all processes: torch has it for GPUs alone; on a CPU {otherwise}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_sync_bn(sources: list, *, sync_bn: bool, method: list[str], mix_prob: float | None) -> None:
    """Raise ValueError where processes could wait for each other forever: each draws for itself whether, and by which
    method, its images are mixed, but batch norm over all processes needs the same passes in each.
    """
    varies = len(method) > 1 or (mix_prob or 1) < 1
    if world_size() > 1 and sync_bn and varies and any(source.mode == "train" for source in sources):
        raise ValueError("--sync_bn: with a saliency pass in training mode it needs one --method, and --mix_prob 1")


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The module whose forward the training step calls: its backward pass averages gradients over the processes.

    Batch statistics stay each process's own during an epoch; average_buffers() averages them. Backward passes through
    the bare `model`, as those of saliency sources, add to the local gradients alone, as under no_sync().
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    parallel = nn.parallel.DistributedDataParallel
    known = inspect.signature(parallel.__init__).parameters  # renamed in torch 2.15
    own_statistics = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return parallel(model, device_ids=[device.index] if device.type == "cuda" else None, **own_statistics)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in host memory; `values` is not changed."""
    values = values.to("cpu", copy=True)
    if world_size() > 1:
        dist.all_reduce(values, group=_group.host)
    return values


def average_buffers(model: nn.Module) -> None:
    """Replace the statistics of batch norm by their mean over the processes."""
    if world_size() == 1:
        return
    moving = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if moving:
        flat = all_reduce_sum(torch.cat([buffer.detach().flatten().double() for buffer in moving])) / world_size()
        for buffer, mean in zip(moving, flat.split([buffer.numel() for buffer in moving]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def all_gather_object(value) -> list:
    """`value` of each process in order of rank, for every process. Plain objects, and tensors in host memory."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_group.host)
    return values


def gather_object(value) -> list | None:
    """`value` of each process in order of rank, for the first process; None for the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main_process() else None
    dist.gather_object(move_to_host(value), values, dst=0, group=_group.host)
    return values


def move_to_host(value):
    """The same nested value with its tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: move_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))  # the constructor of a named tuple takes no list
        return make(map(move_to_host, value))
    return value


def broadcast_from_main(make: Callable):
    """The result of make() in the first process, for all of them; the others do not call it."""
    if world_size() == 1:
        return make()
    box = [make() if is_main_process() else None]
    dist.broadcast_object_list(box, src=0, group=_group.host)
    return box[0]


def barrier() -> None:
    """Wait until every process has come here."""
    if _group:
        dist.barrier(_group.host)


def main_process_first(make: Callable):
    """make() in the first process, then in the first of each other machine, then in the rest: what one downloads the
    others find, on a shared file system as well as on one for each machine.
    """
    own = 0 if is_main_process() else 1 if rank_environment()[2] == 0 else 2
    for turn in range(3 if _group else 1):
        if turn == own or not _group:
            result = make()
        barrier()
    return result


def store_across_restarts(key: str, value: str) -> None:
    """Keep a text for the processes that torchrun restarts after a loss."""
    if _group and is_main_process():
        dist.PrefixStore("across restarts", _group.base).set(key, value)


def load_across_restarts(key: str) -> str | None:
    """The text that an earlier start of these processes has kept, for all of them."""

    def load() -> str | None:
        kept = dist.PrefixStore("across restarts", _group.base)
        return kept.get(key).decode() if kept.check([key]) else None

    return broadcast_from_main(load) if _group and restart_count() else None


def check_same_value(what: str, value: dict, remedy: str) -> None:
    """Raise UserError where `value`, a flat dictionary, is not the same in all processes."""
    check_equal(what, all_gather_object(value), remedy)


def check_equal(what: str, values: list[dict], remedy: str) -> None:
    """Raise UserError that names the first difference. values: of each process."""
    for number, other in enumerate(values):
        differing = (key for key in other if values[0].get(key) != other.get(key))
        if key := next(differing, None):
            raise UserError(
                f"the {what} of process 0 and process {number} differ: {key} {values[0].get(key)} against "
                f"{other.get(key)}\n{remedy}"
            )
