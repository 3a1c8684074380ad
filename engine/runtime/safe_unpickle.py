"""Unpickle without running code: rebuild only known types, and import nothing."""

import argparse
import codecs
import collections
import pickle
import types

import numpy as np
import torch


class Placeholder:
    """Replaces an unknown object in a pickle. It accepts every operation of unpickling, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Placeholder()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __hash__(self):
        return 0


TORCH_OBJECTS = {  # (module, name) in a pickle -> constructor; covers tensors and the containers in checkpoints
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype) or name.endswith("Storage")
    },
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *factory: {},
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.storage", "TypedStorage"): torch.storage.TypedStorage,
    ("torch.storage", "UntypedStorage"): torch.storage.UntypedStorage,
}
NUMPY_OBJECTS = {("_codecs", "encode"): codecs.encode, ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
for _module in (
    "numpy.core.multiarray",
    "numpy._core.multiarray",
):  # before and since numpy 2; these modules are private
    NUMPY_OBJECTS[_module, "_reconstruct"] = np.empty(0).__reduce__()[0]
    NUMPY_OBJECTS[_module, "scalar"] = np.int64().__reduce__()[0]


class SafeUnpickler(pickle.Unpickler):
    """Rebuilds the objects in `allowed`. Any other class or function raises UnpicklingError if strict, and becomes a
    Placeholder otherwise.
    """

    def __init__(self, file, *, allowed: dict = TORCH_OBJECTS, strict: bool = False, **kwargs):
        super().__init__(file, **kwargs)
        self.allowed, self.strict = allowed, strict

    def find_class(self, module: str, name: str):
        if self.strict and (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed")
        return self.allowed.get((module, name), Placeholder)


def load_arrays(file, **kwargs):
    """Load a pickle of numpy arrays and numbers, strings, and plain containers. Raises UnpicklingError if it contains
    anything else.
    """
    return SafeUnpickler(file, allowed=NUMPY_OBJECTS, strict=True, **kwargs).load()


PLACEHOLDER_PICKLE = types.SimpleNamespace(  # has what torch.load needs of a pickle module
    __name__="placeholder_pickle",
    Unpickler=SafeUnpickler,
    load=lambda file, **kwargs: SafeUnpickler(file, **kwargs).load(),
    UnpicklingError=pickle.UnpicklingError,
)
