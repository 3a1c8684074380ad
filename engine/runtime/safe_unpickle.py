"""Unpickle without running code: tensors and plain containers are rebuilt, everything else becomes a placeholder."""

import argparse
import collections
import pickle
import types

import torch


class Placeholder:
    """Stands for every foreign object in a pickle. It takes whatever is done to it and does nothing."""

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


class PlaceholderUnpickler(pickle.Unpickler):
    """Rebuilds tensors, storages and plain containers; every other class or function becomes Inert and is never
    imported.
    """

    def find_class(self, module: str, name: str):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return Placeholder


ALLOWED = {
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
PLACEHOLDER_PICKLE = types.SimpleNamespace(  # what torch.load asks of a pickle module
    __name__="inert_pickle",
    Unpickler=PlaceholderUnpickler,
    load=lambda file, **kwargs: PlaceholderUnpickler(file, **kwargs).load(),
    UnpicklingError=pickle.UnpicklingError,
)
