"""Code that the scripts and the other packages share. Importing it, or one of its packages, does not import torch."""

from collections.abc import Callable
from importlib import import_module


def lazy_attributes(package: str, modules: dict[str, str]) -> Callable[[str], object]:
    """Return the __getattr__ of a package that imports a module only when one of its public names is used.

    modules: module of the package -> its public names, separated by spaces.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get_attribute(name: str):
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return get_attribute
