"""Select the keyword arguments of a function from a dictionary of options."""

import inspect
from collections.abc import Callable


def select_kwargs(options: dict, wanted: Callable | list[str]) -> dict:
    """Return the options that `wanted` names: a list of names, or a function that has parameters of these names."""
    names = inspect.signature(wanted).parameters if callable(wanted) else wanted
    return {key: options[key] for key in names if key in options}
