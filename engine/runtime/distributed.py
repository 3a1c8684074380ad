"""Several processes under torchrun: process group, ranks, collectives, and checks that all processes agree.

A run without torchrun is the main process of a world of size 1: each function then does nothing or returns its input.
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

from engine.errors import UserError, get_first_error_line
from engine.runtime.failure_watch import FailureWatch


class ProcessGroups(NamedTuple):
    """The channels between processes besides the one for gradients."""

    host: dist.ProcessGroup  # gloo, for tensors and objects in host memory
    base_store: dist.Store  # torchrun keeps it across restarts
    failure_watch: FailureWatch


_groups: ProcessGroups | None = None
_alone = False  # the other processes never connected, so this one must report its errors itself


def get_host_group() -> dist.ProcessGroup:
    """Return the process group for tensors in host memory (gloo)."""
    return _groups.host


def rank_environment() -> tuple[int, int, int]:
    """Return rank, world size and local rank as torchrun sets them; 0, 1, 0 without torchrun."""
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
    """Return how often torchrun has restarted the processes after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def count_cores_per_process() -> int:
    """Return the number of CPU cores per process on this machine, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // local_world_size())


def init_processes(device: torch.device, timeout_seconds: float) -> None:
    """Connect to the other processes; from then on only the main process prints to stdout.

    Raises UserError if torchrun's environment variables are missing, if not all processes connect in time, or if two of
    them have the same GPU.
    """
    global _groups, _alone
    own_rank, world_size, _ = rank_environment()
    if world_size == 1 or _groups:
        return

    # ---- Check torchrun's environment ----
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} not set: the processes cannot find each other\n"
            f"start them with torchrun --nproc_per_node {world_size} {os.path.basename(sys.argv[0])} ..."
        )

    # ---- Connect ----
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        base_store = connect_store(timeout, create=own_rank == 0)
        store = get_attempt_store(base_store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=world_size, timeout=timeout)
        host = dist.new_group(backend="gloo", timeout=timeout)
        dist.barrier(host)
        watched = get_attempt_store(connect_store(timeout))
        failure_watch = FailureWatch(store, watched, rank=own_rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        _alone = True
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {own_rank} of {world_size} could not connect to the others at {address} within "
            f"{timeout_seconds:g} s ({get_first_error_line(error)})\n"
            f"check that all {world_size} are started with this address and can reach it, or raise --timeout"
        ) from error

    # ---- From here on, watch for failures and print in the main process only ----
    _groups = ProcessGroups(host, base_store, failure_watch)
    failure_watch.start()
    atexit.register(failure_watch.stop)
    if own_rank:
        sys.stdout = open(os.devnull, "w")
    check_own_gpus(device)


def check_own_gpus(device: torch.device) -> None:
    """Raise UserError if two processes have the same GPU, which NCCL does not support."""
    if device.type != "cuda":
        return
    first: dict[str, int] = {}  # identifier of a GPU -> its process
    for number, gpu in enumerate(all_gather_object(str(torch.cuda.get_device_properties(device).uuid))):
        if gpu in first:
            raise UserError(
                f"processes {first[gpu]} and {number} have the same GPU ({gpu}): start one process per GPU\n"
                "lower --nproc_per_node of torchrun, or let the job scheduler give each process a GPU of its own"
            )
        first[gpu] = number


def connect_store(timeout: timedelta, create: bool = False) -> dist.Store:
    """Open a new connection to the store that all processes share.

    create: this process hosts the store, unless torchrun's agent does.
    """
    create &= os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, world_size(), is_master=create, timeout=timeout)


def get_attempt_store(store: dist.Store) -> dist.Store:
    """Return the part of the store that belongs to this attempt, which ends when torchrun restarts the processes."""
    return dist.PrefixStore(f"attempt {restart_count()}", store)


def shut_down_processes() -> None:
    """Wait until every process arrives here, then destroy the process group."""
    global _groups
    if _groups:
        _groups.failure_watch.stop()
        dist.barrier(_groups.host)  # the main process hosts the store, so it must not exit first
        _groups = None
        dist.destroy_process_group()


def report_error(text: str) -> None:
    """Print an error that ends the run: once for all processes, on stderr of the main process. Call it last.

    Until all processes are connected, the first one on each machine prints its own error.
    """
    if _groups:
        _groups.failure_watch.report(text)
    elif rank_environment()[2] == 0 or _alone:
        print(text, file=sys.stderr, flush=True)


def is_connection_error(error: Exception) -> bool:
    """Return whether `error` means that another process exited or did not answer in time."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    has_type = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return has_type or any(word in str(error) for word in ("closed by peer", "Timed out waiting", "gloo", "NCCL"))


def convert_sync_batchnorm(model: nn.Module, sync_bn: bool, remedy: str = "leave out --sync_bn") -> nn.Module:
    """Return the network, with synchronised batch norm if sync_bn and there are several processes.

    Raises UserError, which ends in the remedy, if the processes do not use NCCL.
    """
    if not sync_bn or world_size() == 1:
        return model
    if dist.get_backend() != "nccl":
        raise UserError(f"torch supports synchronised batch norm on GPUs only; on a CPU, {remedy}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_sync_bn(
    sources: list, hyper_parameters: dict[str, dict], *, sync_bn: bool, method: list[str], clean_weight: float | None
) -> None:
    """Raise ValueError if synchronised batch norm could deadlock.

    It needs the same forward passes in all processes. But each process draws for itself whether and by which method it
    mixes, and a saliency source in training mode adds a pass, as the loss of the unmixed batch does. hyper_parameters:
    method -> their values.
    """
    varies = len(method) > 1 or any(values.get("mix_prob", 1.0) < 1 for values in hyper_parameters.values())
    adds_pass = clean_weight or any(source.mode == "train" for source in sources)
    if world_size() > 1 and sync_bn and varies and adds_pass:
        raise ValueError(
            "--sync_bn with --clean_weight or a saliency pass in training mode needs a single --method and --mix_prob 1"
        )


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes.

    Each process keeps its own batch statistics during an epoch; average_buffers() averages them. Backward passes
    through the unwrapped `model`, such as those of saliency sources, change the local gradients only, as under
    no_sync().
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    parallel = nn.parallel.DistributedDataParallel
    parameters = inspect.signature(parallel.__init__).parameters  # torch 2.15 renames broadcast_buffers
    flag = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    return parallel(model, device_ids=[device.index] if device.type == "cuda" else None, **{flag: False})


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over all processes, in host memory; `values` stays unchanged."""
    values = values.to("cpu", copy=True)
    if world_size() > 1:
        dist.all_reduce(values, group=_groups.host)
    return values


def average_buffers(model: nn.Module) -> None:
    """Replace the running statistics of batch norm by their mean over all processes."""
    if world_size() == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:  # one collective operation for all
        flat = all_reduce_sum(torch.cat([buffer.detach().flatten().double() for buffer in buffers])) / world_size()
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def all_gather_object(value) -> list:
    """Return the values of all processes in order of rank, in every process. A tensor must be in host memory."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_groups.host)
    return values


def gather_object(value) -> list | None:
    """Return the values of all processes in order of rank in the main process, and None in the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main_process() else None
    dist.gather_object(move_to_host(value), values, dst=0, group=_groups.host)
    return values


def move_to_host(value):
    """Return a nested value with its tensors copied to host memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: move_to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))  # the constructor of a named tuple takes no iterable
        return make(map(move_to_host, value))
    return value


def broadcast_from_main(function: Callable):
    """Call function() in the main process only, and return its result in all processes."""
    if world_size() == 1:
        return function()
    results = [function() if is_main_process() else None]
    dist.broadcast_object_list(results, src=0, group=_groups.host)
    return results[0]


def barrier() -> None:
    """Wait until every process arrives here."""
    if _groups:
        dist.barrier(_groups.host)


def main_process_first(function: Callable):
    """Call function() in the main process, then in the first process of each other machine, then in the rest.

    Later processes find what earlier ones have downloaded, with a shared file system or one per machine. Returns the
    result of this process's own call.
    """
    own_turn = 0 if is_main_process() else 1 if rank_environment()[2] == 0 else 2
    for turn in range(3 if _groups else 1):
        if turn == own_turn or not _groups:
            result = function()
        barrier()
    return result


def store_across_restarts(key: str, value: str) -> None:
    """Store a text for the processes that torchrun starts after a failure."""
    if _groups and is_main_process():
        dist.PrefixStore("across restarts", _groups.base_store).set(key, value)


def load_across_restarts(key: str) -> str | None:
    """Return, in all processes, the text stored before torchrun restarted them; None if there is none."""

    def load() -> str | None:
        store = dist.PrefixStore("across restarts", _groups.base_store)
        return store.get(key).decode() if store.check([key]) else None

    return broadcast_from_main(load) if _groups and restart_count() else None


def check_same_value(what: str, value: dict, remedy: str) -> None:
    """Raise UserError if `value`, a flat dictionary, is not the same in all processes. what: its name in messages."""
    check_equal(what, all_gather_object(value), remedy)


def check_equal(what: str, values: list[dict], remedy: str) -> None:
    """Raise UserError, which names the first difference, if the values of the processes differ."""
    for number, other in enumerate(values):
        differing = (key for key in other if values[0].get(key) != other.get(key))
        if key := next(differing, None):
            raise UserError(
                f"the {what} of processes 0 and {number} differ: {key} is {values[0].get(key)} and {other.get(key)}\n"
                f"{remedy}"
            )
