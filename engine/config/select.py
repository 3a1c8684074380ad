"""Select the keyword arguments of a function from a dictionary of options."""

import inspect
from collections.abc import Callable


def select_kwargs(options: dict, wanted: Callable | list[str]) -> dict:
    """Those of the options that `wanted` names: a list, or a function, by its parameters."""
    names = inspect.signature(wanted).parameters if callable(wanted) else wanted
    return {key: options[key] for key in names if key in options}
