"""Select the keyword arguments of a function from a dictionary of options."""

import inspect
from collections.abc import Callable


def select_kwargs(options: dict, wanted: Callable | list[str]) -> dict:
    """Return the options that `wanted` names: a list of names, or a function that has parameters of these names.

    Positional-only parameters are no options, whatever their names.
    """
    if callable(wanted):
        parameters = inspect.signature(wanted).parameters.values()
        wanted = [one.name for one in parameters if one.kind is not one.POSITIONAL_ONLY]
    return {key: options[key] for key in wanted if key in options}
