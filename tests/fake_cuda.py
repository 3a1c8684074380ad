"""Run the code for CUDA without a GPU, count its launches, and record what a GPU would wait for or refuse.

Tensors on the host are real. Tensors on `cuda` are FakeTensors: they have a shape, a dtype, strides and a device, but
no values. The branches for CUDA therefore run as on a GPU, and a FakeCuda sees:

* `wait`: the host waits for the device. It reads a value back, copies without non_blocking, or calls an operation whose
  size depends on the values. CUDA kernels also copy and wait inside index_put_ with a value or an index on the host,
  `x[i] = number` and torch.tensor(..., device="cuda").
* `stale copy`: a non_blocking copy to the host, which may be read before it has arrived. A single bool is a flag that
  the host polls, and stays as it was.
* `refused`: an operation that --deterministic refuses on CUDA.

A tensor on the host that meets one on the device raises an error, as on a GPU. Not seen: values, the layouts that cuDNN
chooses, and streams.
"""

import contextlib
import importlib.util
import pkgutil

import torch
from fake_operations import CUDA, FakeCuda, Inert, is_cuda, is_fake, list_arguments
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from engine.runtime import graphs
from mixing import kernels

TRIED = (2, 14)  # the oldest torch that this was tried with; with another, operations may count differently
PRIVATE = (  # functions of torch that this file relies on: (owner, name)
    (torch._C, "_ensureCUDADeviceGuardSet"),
    (torch.autograd, "_engine_run_backward"),
    (fake_tensor, "init_gpu_context"),
)


class PythonCalls(TorchFunctionMode):
    """Prepares calls of torch functions whose C++ code does not see the device as it is; see FakeCuda."""

    def __init__(self, fake: FakeCuda):
        super().__init__()
        self.fake = fake
        self.leaves = WeakIdKeyDictionary()  # parameter -> the node that gathers its gradient

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.prepare_leaves(args, kwargs)
        self.fake.results, self.fake.in_place = [], False
        if func is torch.Tensor.new_tensor and is_fake(args[0]):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": CUDA, **kwargs}
        if func in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)  # recorded as the copy that it is
        if func in (torch.Tensor.__setitem__, torch.Tensor.__getitem__) and is_fake(args[0]):
            args = (args[0], convert_lists(args[1]), *args[2:])
        return func(*args, **kwargs)

    def prepare_leaves(self, args: tuple, kwargs: dict) -> None:
        """Make the node that gathers the gradient of a parameter while C++ sees the parameter on `meta`."""
        if not torch.is_grad_enabled() or self.fake.in_backward:
            return
        for one in list_arguments(args, kwargs):
            if is_fake(one) and one.requires_grad and one.is_leaf and one not in self.leaves:
                self.fake.in_backward = True
                self.leaves[one] = one.view_as(one).grad_fn.next_functions[0][0]
                self.fake.in_backward = False


def convert_lists(key):
    """Convert the lists in an index to tensors on the host, as C++ does before it copies them to the device."""
    if isinstance(key, list):
        return torch.tensor(key)
    return tuple(map(convert_lists, key)) if type(key) is tuple else key


def find_obstacle() -> str | None:
    """Return why there can be no fake CUDA device here, or None."""
    if torch.cuda.is_available():
        return "there is a CUDA device, whose constants must not be fake"
    if tuple(map(int, torch.__version__.split(".")[:2])) < TRIED:
        return f"torch {torch.__version__}: FakeTensors were tried with {'.'.join(map(str, TRIED))} and later"
    missing = [name for owner, name in PRIVATE if not hasattr(owner, name)]
    return f"torch {torch.__version__} lacks {', '.join(missing)}" if missing else None


def find_launchers() -> list:
    """Return the modules that start kernels, if triton is installed; without it the torch solvers run."""
    if importlib.util.find_spec("triton") is None:
        return []
    names = [f"mixing.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [kernels, *map(importlib.import_module, names)]
    return [module for module in modules if getattr(module, "launch", None) is kernels.launch]


@contextlib.contextmanager
def fake_cuda():
    """Run the block as if torch had found one GPU, and yield the FakeCuda that records it."""
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: a guard that does nothing
    fake = FakeCuda()
    run_backward, data_ptr = torch.autograd._engine_run_backward, torch.Tensor.data_ptr

    def backward(*args, **kwargs):
        before, fake.in_backward = fake.in_backward, True
        try:
            return run_backward(*args, **kwargs)
        finally:
            fake.in_backward = before

    def get_pointer(tensor):
        return tensor.untyped_storage()._cdata + tensor.storage_offset() if is_fake(tensor) else data_ptr(tensor)

    replaced = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (torch.cuda, "get_device_capability", lambda *args: (9, 0)),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "synchronize", lambda *args: fake.note("wait", "synchronize")),
        (torch.cuda, "Stream", Inert),
        (torch.cuda, "Event", Inert),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", lambda *args: Inert()),
        (graphs, "EAGER_CALLS", 1),  # the step that is counted captures, so what a capture minds is found
        (graphs, "capture", fake.capture),
        (graphs, "replay", fake.replay),
        (fake_tensor, "init_gpu_context", lambda *args: None),
        (torch.autograd, "_engine_run_backward", backward),
        (torch.Tensor, "data_ptr", get_pointer),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),
        (torch.Tensor, "pin_memory", lambda tensor, *args: tensor),
    ]
    if launchers := find_launchers():
        replaced += [(kernels, "find_obstacle", lambda device: None)]
        replaced += [(module, "launch", fake.launch_kernel) for module in launchers]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with torch.autograd.set_multithreading_enabled(False), fake, PythonCalls(fake):
            yield fake
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
