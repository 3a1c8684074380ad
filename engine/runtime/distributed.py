"""Several processes under torchrun: start-up, who is first, what all of them must agree on, and how they end together.

A plain run is the first of one process: every function here then does nothing, or gives back what it was given.

An error in one process would leave the others waiting for it. So each process watches a common store: whoever fails
leaves a message there, the first process shows it, and all of them end.
"""

import atexit
import inspect
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn

from engine.errors import UserError

POLL_SECONDS = 0.2
SHOWN_WITHIN_SECONDS, GRACE_SECONDS = 10.0, 1.0


class ProcessGroups(NamedTuple):
    """What the processes talk through beside the gradients: tensors and objects on the host, and the store."""

    host: dist.ProcessGroup
    base: dist.Store  # as torchrun keeps it over restarts
    store: dist.Store  # of this start
    done: threading.Event  # ends the thread that watches the others
    watcher: threading.Thread


_group: ProcessGroups | None = None
_unmet = False  # whether the others never came, so that there is nobody to speak for this process
_telling = threading.Lock()


def host_group() -> dist.ProcessGroup:
    """The processes, talking through the host (gloo)."""
    return _group.host


def rank_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as torchrun sets them; 0, 1, 0 for a plain run."""
    return tuple(
        int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )


def rank() -> int:
    return rank_environment()[0]


def world_size() -> int:
    return rank_environment()[1]


def is_main_process() -> bool:
    return rank() == 0


def restart_count() -> int:
    """How often torchrun has started the processes anew after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def local_world_size() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores_per_process() -> int:
    """How many processors there are for each process of this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // local_world_size())


def init_processes(device: torch.device, timeout_seconds: float) -> None:
    """Meet the other processes; from here on only the first one prints. Raises UserError if they do not come."""
    global _group, _unmet
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
        base = connect_store(timeout)
        store = attempt_store(base)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=timeout)
        host = dist.new_group(backend="gloo", timeout=timeout)
        dist.barrier(host)
        done = threading.Event()
        watcher = threading.Thread(
            target=watch_for_failures, args=(attempt_store(connect_store(timeout, anew=False)), done), daemon=True
        )
        _group = ProcessGroups(host, base, store, done, watcher)
    except (RuntimeError, ValueError) as error:
        _unmet = True
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"process {own} of {count} did not meet the others at {address} within {timeout_seconds:g} s "
            f"({first_error_line(error)})\nare all {count} started, with the same address, and can they reach it?"
        ) from error
    watcher.start()
    atexit.register(stop_watcher)  # a thread that is in the store when Python ends would abort the process
    if own:
        sys.stdout = open(os.devnull, "w")


def connect_store(timeout: timedelta, anew: bool = True) -> dist.Store:
    """A connection of its own to the common store, which the first process keeps, unless torchrun does; anew: it starts
    it. One that waits would hold up whoever shares it.
    """
    own, count, _ = rank_environment()
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = own == 0 and anew and not kept_by_torchrun
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count, is_master=keeps, timeout=timeout
    )


def attempt_store(store: dist.Store) -> dist.Store:
    return dist.PrefixStore(f"attempt {restart_count()}", store)


def stop_watcher() -> None:
    if _group:
        _group.done.set()
        _group.watcher.join(timeout=5)


def shut_down_processes() -> None:
    """Leave the others in good order, after everyone is done."""
    global _group
    if _group:
        stop_watcher()
        dist.barrier(_group.host)  # the store goes with the first process
        _group = None
        dist.destroy_process_group()


def report_error(text: str) -> None:
    """Show the error that ends the run, once for all processes, on stderr of the first. Call it only to end.

    Before they have met, the first process of each machine speaks.
    """
    if world_size() == 1 or _group is None:
        if rank_environment()[2] == 0 or _unmet:
            print(text, file=sys.stderr, flush=True)
        return
    if not is_main_process():  # most errors are met by all processes, and then the first one says it best
        with suppress(RuntimeError):
            return _group.store.wait(["shown"], timedelta(seconds=GRACE_SECONDS))
    with _telling:  # the watching thread may be at it
        try:
            first_to_fail = _group.store.add("failures", 1) == 1
            if first_to_fail:
                _group.store.set(
                    "failure", text if is_main_process() else f"{text}\n(process {rank()} of {world_size()})"
                )
            if is_main_process():
                show_failure(_group.store)
            else:
                _group.store.wait(["shown"], timedelta(seconds=SHOWN_WITHIN_SECONDS))
        except RuntimeError:  # the store is gone, or nobody is there to show it
            print(text, file=sys.stderr, flush=True)


def show_failure(store: dist.Store) -> None:
    if not store.check(["shown"]):
        print(store.get("failure").decode(), file=sys.stderr, flush=True)
        store.set("shown", "")


def watch_for_failures(store: dist.Store, done: threading.Event) -> None:
    """End this process when another one has failed: it may be waiting for that one, where no exception reaches it."""
    try:
        while not store.check(["failure" if is_main_process() else "shown"]):
            if done.wait(POLL_SECONDS):
                return
    except RuntimeError:
        return  # whoever kept the store has gone: what this process waits for says so
    with _telling:
        if is_main_process():
            show_failure(store)
    sys.stderr.flush()
    os._exit(1)


def is_connection_error(error: Exception) -> bool:
    """Whether `error` says that another process went away, or did not answer in time."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or any(word in str(error) for word in ("closed by peer", "Timed out waiting", "gloo", "NCCL"))


def first_error_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def convert_sync_batchnorm(model: nn.Module, sync_bn: bool, otherwise: str = "leave --sync_bn out") -> nn.Module:
    """The network, with batch norm over the images of all processes if sync_bn. Raises UserError on a CPU, with what
    to do `otherwise`.
    """
    if not sync_bn or world_size() == 1:
        return model
    if dist.get_backend() != "nccl":
        raise UserError(f"batch norm over all processes: torch has it for GPUs alone; on a CPU {otherwise}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_sync_bn(options: dict, sources: list) -> None:
    """Raise ValueError where processes would wait for each other in vain: each draws for itself whether, and by which
    method, its images are mixed, but batch norm over all of them needs the same passes in each.
    """
    training_passes = any(getattr(source, "mode", None) == "train" for source in sources)
    varies = len(options["method"]) > 1 or (options["mix_prob"] or 1) < 1
    if world_size() > 1 and options["sync_bn"] and training_passes and varies:
        raise ValueError("--sync_bn: with a saliency pass in training mode it needs one --method, and --mix_prob 1")


def wrap_ddp(model: nn.Module) -> nn.Module:
    """What the training step calls forward on: gradients become their mean over the processes in its backward pass.

    Batch statistics are each process's own during an epoch; average_buffers() makes them one. Backward passes through
    the bare `model`, as those of saliency, add to the local gradients alone, as under no_sync().
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    parallel = nn.parallel.DistributedDataParallel
    known = inspect.signature(parallel.__init__).parameters  # renamed in torch 2.15
    own_statistics = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return parallel(model, device_ids=[device.index] if device.type == "cuda" else None, **own_statistics)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, on the host; `values` stays as it is."""
    values = values.to("cpu", copy=True)
    if world_size() > 1:
        dist.all_reduce(values, group=_group.host)
    return values


def average_buffers(model: nn.Module) -> None:
    """The statistics of batch norm become their mean over the processes."""
    if world_size() == 1:
        return
    moving = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if moving:
        flat = all_reduce_sum(torch.cat([buffer.detach().flatten().double() for buffer in moving])) / world_size()
        for buffer, mean in zip(moving, flat.split([buffer.numel() for buffer in moving]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def all_gather_object(value) -> list:
    """`value` of each process, in order of rank; every process gets the list. Plain objects and tensors on the host."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_group.host)
    return values


def gather_object(value) -> list | None:
    """`value` of each process, in order of rank, for the first process; None for the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main_process() else None
    dist.gather_object(move_to_host(value), values, dst=0, group=_group.host)
    return values


def move_to_host(value):
    """The same nested value with its tensors on the host."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: move_to_host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        make = getattr(value, "_make", type(value))  # named tuples take no list
        return make(map(move_to_host, value))
    return value


def broadcast_from_main(make: Callable):
    """What make() gives in the first process, for all of them; the others do not call it."""
    if world_size() == 1:
        return make()
    box = [make() if is_main_process() else None]
    dist.broadcast_object_list(box, src=0, group=_group.host)
    return box[0]


def barrier() -> None:
    """Go on when every process has come here."""
    if _group:
        dist.barrier(_group.host)


def main_process_first(make: Callable):
    """make() of the first process, then of the first of each other machine, then of the rest: what one downloads the
    others find, on a file system that all share and on one for each machine.
    """
    own = 0 if is_main_process() else 1 if rank_environment()[2] == 0 else 2
    for turn in range(3 if _group else 1):
        if turn == own or not _group:
            result = make()
        barrier()
    return result


def store_across_restarts(key: str, value: str) -> None:
    """For the processes that torchrun starts anew after a loss; elsewhere nobody asks."""
    if _group and is_main_process():
        dist.PrefixStore("across restarts", _group.base).set(key, value)


def load_across_restarts(key: str) -> str | None:
    """What an earlier start of these processes was told to remember, for all of them."""

    def ask() -> str | None:
        kept = dist.PrefixStore("across restarts", _group.base)
        return kept.get(key).decode() if kept.check([key]) else None

    return broadcast_from_main(ask) if _group and restart_count() else None


def check_same_value(what: str, value: dict, remedy: str) -> None:
    """Raise UserError where `value`, a flat dictionary, is not the same in all processes."""
    for number, other in enumerate(values := all_gather_object(value)):
        differ = [key for key in value if values[0].get(key) != other.get(key)]
        if differ:
            key = differ[0]
            raise UserError(
                f"the {what} of process 0 and process {number} differ: {key} {values[0].get(key)} against "
                f"{other.get(key)}\n{remedy}"
            )
