"""What the scripts and the other packages share. Importing it, or a package in it, does not import torch."""

from collections.abc import Callable
from importlib import import_module


def lazy_attributes(package: str, modules: dict[str, str]) -> Callable[[str], object]:
    """A module's __getattr__ that hands out public names and imports their modules only then.

    modules: module of the package -> its public names, separated by spaces.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get
