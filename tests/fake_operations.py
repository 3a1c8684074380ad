"""Operations of torch on a fake CUDA device, and what a GPU would mind about them. See fake_cuda.py."""

import collections
import contextlib
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from support import ROOT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

CUDA = torch.device("cuda", 0)
PRODUCT = ("mixing", "saliency", "models", "engine", "evaluation", "explanation", "detection")
OUT_OF_REACH = 2**62  # the number that is read back from an integer on the device: no index and no step
NO_LAUNCH = frozenset(  # views, allocations and questions
    "view _unsafe_view expand permute transpose t select slice unsqueeze squeeze detach alias as_strided split "
    "split_with_sizes unbind narrow _reshape_alias diagonal real imag view_as_real view_as_complex lift_fresh empty "
    "empty_strided empty_like new_empty new_empty_strided unfold movedim device size stride sym_size is_pinned "
    "_local_scalar_dense record_stream".split()
)
SIZE_FROM_VALUES = frozenset(
    "nonzero masked_select _unique2 unique_dim unique_consecutive bincount histc equal allclose is_nonzero nms".split()
)
REFUSED = frozenset(  # by torch.use_deterministic_algorithms; for bilinear, F.interpolate has another way
    "kthvalue histc put_ reflection_pad1d_backward reflection_pad2d_backward replication_pad2d_backward "
    "_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward _upsample_bilinear2d_aa_backward "
    "upsample_bicubic2d_backward upsample_linear1d_backward grid_sampler_2d_backward nll_loss2d_forward "
    "nll_loss2d_backward max_unpool2d avg_pool3d_backward".split()
)
COPIES = ("_to_copy", "copy_", "copy", "_copy_from")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
WITHOUT_RESULT = ("_fused_sgd_", "_fused_adam_")  # of a kind that FakeTensorMode cannot run
FAKE_MODE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all, because the product caches constants per device


class Finding(NamedTuple):
    kind: str  # wait, stale copy, refused
    place: str  # file and line of the product
    what: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}: {self.what}"


def is_fake(value) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


def is_on_host(value) -> bool:
    return isinstance(value, torch.Tensor) and not is_fake(value)


def list_arguments(args: tuple, kwargs: dict) -> list:
    """Return all arguments, with those in lists; faster than torch's tree_leaves()."""
    found = []
    for one in (*args, *kwargs.values()):
        found += one if isinstance(one, (list, tuple)) else [one]
    return found


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def find_place(frames: list[traceback.FrameSummary]) -> str:
    """Return file and line of the innermost frame in the product, as `mixing/ops.py:12`, or the package torchvision."""
    for frame in reversed(frames):
        if "/torchvision/" in frame.filename:
            return "torchvision"
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PRODUCT:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "torch"


def find_device_mix_up(error: BaseException | None) -> Finding | None:
    """Return the finding for the error that torch raises if a tensor on the host meets one on the device."""
    text = str(error).splitlines()[0] if str(error or "") else ""
    if not isinstance(error, RuntimeError) or "same device" not in text and "different devices" not in text:
        return None
    return Finding("device mix-up", find_place(traceback.extract_tb(error.__traceback__)), text)


class Inert:
    """Stands for a stream or an event."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0.0


class FakeCuda(TorchDispatchMode):
    """Runs operations with tensors on `cuda` on FakeTensors and all others as they are.

    launches: number of launches so far. An operation counts as one, and so do a kernel of ours and the replay of a
    graph. findings: what was found, with its number.
    """

    def __init__(self):
        super().__init__()
        self.launches = 0
        self.findings: collections.Counter[Finding] = collections.Counter()
        self.in_backward = False
        self.in_place, self.results = False, []  # of the last operation
        self.exceptions = WeakIdKeyDictionary()  # results of any(), which are read as False: nothing is wrong

    def note(self, kind: str, what: str) -> None:
        self.findings[Finding(kind, find_place(traceback.extract_stack()), what)] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default and is_fake(args[0]):
            return self.answer_device(args[0])
        result = self.run(func, args, kwargs)
        name = func.overloadpacket.__name__
        self.results = [one for one in tree_leaves(result) if is_fake(one)]
        if name == "any":
            self.exceptions.update(dict.fromkeys(self.results))
        self.in_place = name.endswith("_") and not name.startswith("_")
        return result

    def answer_device(self, tensor: torch.Tensor) -> torch.device:
        """Return the device that C++ gets to see.

        The autograd engine would look for the streams of a GPU, so everything that it asks about is on `meta`: results
        as they are made, and all tensors in a backward pass. Indexing has to see CUDA, which it treats in its own way.
        """
        by_autograd = self.in_backward or self.in_place or any(tensor is one for one in self.results)
        return torch.device("meta") if by_autograd else CUDA

    def run(self, func, args: tuple, kwargs: dict):
        leaves, wanted = list_arguments(args, kwargs), kwargs.get("device")
        faked = any(map(is_fake, leaves))
        if wanted is not None and torch.device(wanted).type == "meta" and (self.in_backward or faked):
            kwargs["device"] = wanted = CUDA  # C++ asked for the device before
        if not is_cuda(wanted) and not faked:
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False  # needs a GPU
            with FAKE_MODE if any(isinstance(one, FakeTensor) for one in leaves) else contextlib.nullcontext():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.launches += name not in NO_LAUNCH
        if name == "_local_scalar_dense":
            self.note("wait", "a value is read back")
            dtype = args[0].dtype
            if dtype is torch.bool:
                return args[0] not in self.exceptions
            return 1.0 if dtype.is_floating_point else OUT_OF_REACH
        if name in COPIES:
            return self.copy(func, name, args, kwargs)
        self.check_indexing(name, args)
        self.check_refused(name, args)
        if name in SIZE_FROM_VALUES or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.note("wait", f"{name}: its result depends on values")
            return invent_result(name, args)
        if name == "_sample_dirichlet":  # has no FakeTensor implementation
            return torch.empty_like(args[0])
        if name == "index":
            args = (args[0], invent_indices(args[1]))
        return None if name in WITHOUT_RESULT else run_fake(func, args, kwargs)

    def copy(self, func, name: str, args: tuple, kwargs: dict):
        if name == "_to_copy":
            source, target, free = args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking")
        else:
            source, target = args[1], args[0].device
            free = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        if is_fake(source) and not is_cuda(target):
            if name == "copy_" and free and args[0].dtype is torch.bool and not args[0].dim():
                return args[0]
            self.note("stale copy" if free else "wait", "a copy to the host")
            if name != "_to_copy":
                return args[0]
            dtype = kwargs.get("dtype") or source.dtype  # 1, because sums and counts may be divided by
            return torch.full(tuple(source.shape), dtype.is_floating_point or dtype is torch.bool, dtype=dtype)
        if is_on_host(source) and is_cuda(target) and not free:
            of_number = name == "copy_" and not source.dim()
            self.note("wait", "a copy from the host" + " of a number, as in x[i] = number" * of_number)
        return run_fake(func, args, kwargs)

    def check_indexing(self, name: str, args: tuple) -> None:
        if name not in INDEXING:
            return
        indices, writes = [one for one in args[1] if one is not None], name != "index"
        if any(is_on_host(one) and one.dim() for one in indices):
            self.note("wait", f"{name} by an index on the host, which is copied inside")
        if any(is_fake(one) and one.dtype in (torch.bool, torch.uint8) for one in indices):
            fills = writes and is_on_host(args[2]) and args[2].numel() == 1 and len(indices) == 1  # as masked_fill_
            if not fills:
                self.note("wait", f"{name} by a mask, whose size depends on values")
        elif writes and is_on_host(args[2]):
            self.note("wait", f"{name} of a number, as in x[index] = number: it is copied inside")

    def launch_kernel(self, kernel, grid: tuple[int, ...], *args, **options) -> None:
        """Count a kernel of ours in place of mixing.kernels.launch()."""
        self.launches += 1
        if any(is_on_host(one) for one in args):
            self.note("device mix-up", f"{getattr(kernel, '__name__', kernel)} gets a tensor on the host")

    def capture(self, function, arguments: tuple, device: torch.device, pool) -> tuple:
        """Record what a captured function would mind, in place of engine.runtime.graphs.capture()."""
        before = self.launches
        result = function(*arguments)
        self.launches = before
        return Inert(), arguments, result

    def replay(self, graph) -> None:
        """Count a replayed graph in place of engine.runtime.graphs.replay()."""
        self.launches += 1

    def check_refused(self, name: str, args: tuple) -> None:
        sums_floats = name in ("cumsum", "cumsum_") and args[0].is_floating_point()
        if name in REFUSED or sums_floats or name in ("median", "nanmedian") and len(args) > 1:
            self.note("refused", f"{name} with --deterministic")


def run_fake(func, args: tuple, kwargs: dict):
    """Run an operation in the FakeTensorMode. Without FakeTensors of them, it would compute with small constants."""

    def fake(value):
        return FAKE_MODE.from_tensor(value) if is_on_host(value) and not isinstance(value, FakeTensor) else value

    args, kwargs = tree_map(fake, (args, kwargs))
    with FAKE_MODE:
        return func(*args, **kwargs)


def invent_indices(indices: list) -> list:
    """Return an index with positions in place of masks, all of them, because a FakeTensor cannot say which."""
    found = []
    for one in indices:
        if is_fake(one) and one.dtype in (torch.bool, torch.uint8):
            with FAKE_MODE:
                found += [torch.zeros(one.numel(), dtype=torch.long, device=CUDA) for _ in one.shape]
        else:
            found.append(one)
    return found


def invent_result(name: str, args: tuple):
    """Return a result of the right form for an operation whose result depends on values, so that the run continues."""
    first = next(one for one in args if is_fake(one))
    if name in ("equal", "allclose", "is_nonzero"):
        return True
    with FAKE_MODE:
        if name == "nonzero":
            return torch.zeros(first.numel(), first.dim(), dtype=torch.long, device=CUDA)
        if name == "nms":
            return torch.arange(len(first), device=CUDA)
        if name == "masked_select":
            return torch.empty(first.numel(), dtype=first.dtype, device=CUDA)
    raise NotImplementedError(f"{name} of tensors on the device")
