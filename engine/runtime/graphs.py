"""Captured CUDA graphs: repeat a fixed sequence of device operations with a single launch.

Launching an operation costs the host some microseconds, however small the operation is. A captured graph launches all
of them at once. See "CUDA Graphs" in the notes on CUDA semantics of the PyTorch documentation for the rules.

* Capturing executes nothing: it records the operations, with the addresses of all tensors that they read and write.
  Whatever outlives a call, such as weights and cached constants, must keep its memory.
* Code on the host runs during the capture only, and not when the graph is replayed. Random numbers drawn on the device
  go on as in eager mode, because torch moves the generator on with each replay.
* Libraries choose algorithms and allocate workspaces in their first calls, so the first calls are eager. They run on
  the stream that is captured later, since these workspaces belong to a stream, and so do the nodes of autograd that
  add to .grad.
"""

import math
import weakref
from collections.abc import Callable
from functools import cache

import torch

from engine.errors import get_first_error_line

EAGER_CALLS = 3  # in a row with the same kind of arguments, before they are captured
MAX_GRAPHS = 4  # of a function
SMALL = 2**23  # elements of a tensor: an operation on more of them takes the device longer than the host to launch it


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def get_capture_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def call_on_capture_stream(function: Callable, arguments: tuple, device: torch.device):
    """Return function(*arguments), computed on the stream of the captures."""
    stream, current = get_capture_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function(*arguments)
    current.wait_stream(stream)  # so memory that either stream frees is not used before the other is done with it
    return result


def copy_arguments(arguments: tuple) -> tuple:
    return tuple(one.detach().clone() if isinstance(one, torch.Tensor) else one for one in arguments)


def capture(function: Callable, arguments: tuple, device: torch.device, pool: tuple | None) -> tuple:
    """Record the operations of function(*arguments) without executing them. The only place that captures.

    Returns the graph, the copies of the arguments that it reads, and the results that a replay writes. pool: memory of
    an earlier graph, to share.
    """
    arguments = copy_arguments(arguments)
    graph, stream, pool = torch.cuda.CUDAGraph(), get_capture_stream(device), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.stream(stream):  # torch.cuda.graph() does not restore the stream after a failed capture
            # other threads may allocate pinned memory for the next batch meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = function(*arguments)
    except Exception:
        renew_generator(device)
        release_pool(device, pool)
        raise
    return graph, arguments, result


def renew_generator(device: torch.device) -> None:
    """Make the random generator of a device usable after a failed capture, which older versions of torch never end.

    Its numbers go on as if nothing had been captured.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def release_pool(device: torch.device, pool: tuple) -> None:
    """Return the memory of a failed capture, in which older versions of torch go on to allocate.

    They would never free what several streams have used, such as a batch read from files, and empty_cache() would fail.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # its name since torch 2.8
    try:
        (end or torch._C._cuda_endAllocateCurrentStreamToPool)(device.index or 0, pool)
    except RuntimeError:  # torch has done so itself
        return
    torch._C._cuda_releasePool(device.index or 0, pool)


def replay(graph) -> None:
    """Execute the operations of a captured graph on the current stream. The only place that replays."""
    graph.replay()


class GraphCapture:
    """Wraps the functions of a run that are worth capturing. notes: lines for the log, on captures that failed.

    All graphs share the memory of their intermediate results, the pool: one runs after the other, and the results of
    one are copied before another may overwrite them.

    No graph is deleted while another may be replayed, not even with the saliency source of a phase that has ended:
    newer versions of torch then free the cuBLAS workspaces of the capture stream, which all graphs use (pytorch issue
    193402), and the pool. A failed capture may leave torch's random generator and its allocator in a state that earlier
    graphs cannot bear. From then on the whole run is eager, without any graph.

    kernels: the option; `torch` captures nothing. obstacle: why nothing is captured, or None.
    """

    def __init__(self, device: torch.device, kernels: str = "auto"):
        self.device, self.notes, self.pool = device, [], None
        self.functions, self.graphs = weakref.WeakSet(), []
        self.obstacle = "--kernels torch does without CUDA graphs" if kernels == "torch" else None
        if not can_capture(device):
            self.obstacle = f"a CUDA graph needs a CUDA device, and this is {device.type}"

    @property
    def enabled(self) -> bool:
        return self.obstacle is None

    def wrap(self, function: Callable, name: str, max_size: float = math.inf) -> Callable:
        """Return a CapturedFunction of a function, or the function itself where nothing can be captured.

        name: what the log calls it. max_size: of a tensor that is passed; with larger ones the calls stay eager.
        """
        if not self.enabled:
            return function
        captured = CapturedFunction(function, name, self, max_size)
        self.functions.add(captured)
        return captured

    def wrap_source(self, source, network_passes: bool = False) -> None:
        """Capture the methods of a saliency source that it declares as capturable. network_passes: these, too."""
        sizes = dict.fromkeys(source.capturable, SMALL)
        sizes |= dict.fromkeys(source.network_passes if network_passes else (), math.inf)
        for name, max_size in sizes.items() if self.enabled else ():
            setattr(source, name, self.wrap(getattr(source, name), f"{type(source).__name__}.{name}", max_size))

    def take_notes(self) -> list[str]:
        """Return the notes since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def disable(self, name: str, error: Exception) -> None:
        """Continue without graphs after a failed capture of the function `name`."""
        self.obstacle, self.graphs = "a capture failed", []
        for function in self.functions:
            function.recordings.clear()
        while isinstance(error.__context__, RuntimeError):  # the end of a broken capture raises another error
            error = error.__context__
        reason = get_first_error_line(error)
        self.notes.append(f"{name} cannot be captured as a CUDA graph ({reason}): the run continues without, slower")


class CapturedFunction:
    """Calls a function by replaying CUDA graphs of it, one for each kind of arguments (describe_call()).

    function takes tensors, None and plain hashable values, and returns a tensor, several in a tuple, or None. It is
    called eagerly until EAGER_CALLS calls in a row had the same kind of arguments, so a rare kind, such as the last
    batch of an epoch, stays eager. Then the arguments are copied into the memory that the graph reads, and copies of
    its results are returned, which later calls leave alone.
    """

    def __init__(self, function: Callable, name: str, graphs: GraphCapture, max_size: float = math.inf):
        self.function, self.name, self.graphs, self.max_size = function, name, graphs, max_size
        self.recordings: dict[tuple, Recording] = {}
        self.last_call, self.in_a_row = None, 0

    def __call__(self, *arguments):
        too_large = any(isinstance(one, torch.Tensor) and one.numel() > self.max_size for one in arguments)
        if too_large or not self.graphs.enabled:
            return self.function(*arguments)
        call = describe_call(arguments, self.graphs.device)
        self.in_a_row, self.last_call = (self.in_a_row + 1 if call == self.last_call else 1), call
        if call not in self.recordings and not self.record(call, arguments):
            return call_on_capture_stream(self.function, arguments, self.graphs.device)
        return self.recordings[call].replay(arguments)

    def record(self, call: tuple, arguments: tuple) -> bool:
        """Capture a graph for this kind of call if it is time to. Returns whether there is one now."""
        if self.in_a_row <= EAGER_CALLS or len(self.recordings) == MAX_GRAPHS:
            return False
        try:
            self.recordings[call] = Recording(self.function, arguments, self.graphs)
        except Exception as error:  # the eager call that follows raises what has nothing to do with the capture
            self.graphs.disable(self.name, error)
            return False
        return True


class Recording:
    """A captured call: a graph, the arguments that it reads and the results that it writes."""

    def __init__(self, function: Callable, arguments: tuple, graphs: GraphCapture):
        self.graph, self.arguments, self.result = capture(function, arguments, graphs.device, graphs.pool)
        graphs.pool = self.graph.pool()
        graphs.graphs.append(self.graph)

    def replay(self, arguments: tuple):
        with torch.no_grad():
            for own, given in zip(self.arguments, arguments, strict=True):
                if isinstance(own, torch.Tensor):
                    own.copy_(given)
            replay(self.graph)
            return copy_result(self.result)


def copy_result(result):
    if isinstance(result, tuple):
        return tuple(map(copy_result, result))
    return result if result is None else result.clone()


def describe_call(arguments: tuple, device: torch.device) -> tuple:
    """Return what a graph is tied to: shapes, types and strides of tensors, plain values, and the modes of torch."""
    kinds = [(one.shape, one.dtype, one.stride()) if isinstance(one, torch.Tensor) else one for one in arguments]
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return (*kinds, autocast, torch.is_grad_enabled())
